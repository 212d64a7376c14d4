// Statistics as files, debugfs in style: a directory per VM, a file per number, each readable with cat while the
// guest runs. Main thread, on a timer; a number that did not change costs no system call.

import { closeSync, ftruncateSync, mkdirSync, openSync, rmSync, writeSync } from "node:fs";
import { dirname, join } from "node:path";
import { VmmError } from "./errors.js";

/** How old a number in a file may be. */
const PERIOD_MS = 250;

/** Names are paths with slashes. */
export type ReadStatistics = () => Iterable<readonly [name: string, value: number]>;

interface StatFile {
  readonly fd: number;
  value: number;
  bytes: number;
}

/**
 * The directory of a VM that names none, gone when the VM is; undefined where there is no place that only this user
 * can write to (others could plant links in /tmp).
 */
export function defaultStatsDir(environment: NodeJS.ProcessEnv, pid: number): string | undefined {
  const runtime = environment.XDG_RUNTIME_DIR;
  if (runtime !== undefined && runtime !== "") return join(runtime, "pvdma", String(pid));
  return process.getuid?.() === 0 ? `/run/pvdma/${pid}` : undefined;
}

export class StatsDirectory {
  private readonly files = new Map<string, StatFile>();
  private readonly timer: NodeJS.Timeout;
  private stale = false;

  /** Makes `path` and keeps its files up to date until close(); `keep` leaves them there with their last values. */
  constructor(
    private readonly path: string,
    private readonly keep: boolean,
    private readonly read: ReadStatistics,
    private readonly warn: (line: string) => void,
  ) {
    try {
      mkdirSync(path, { recursive: true, mode: 0o755 });
      this.update();
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      throw new VmmError(
        `statistics directory ${path}: cannot be written (${code}); name another with --stats-dir`,
      );
    }
    this.timer = setInterval(() => this.refresh(), PERIOD_MS);
    this.timer.unref();
  }

  private update(): void {
    for (const [name, value] of this.read()) {
      const file = this.files.get(name) ?? this.create(name);
      if (value === file.value) continue;
      const text = Buffer.from(`${value}\n`);
      writeSync(file.fd, text, 0, text.length, 0);
      if (text.length < file.bytes) ftruncateSync(file.fd, text.length);
      file.value = value;
      file.bytes = text.length;
    }
  }

  /**
   * Brings the files up to date at once. A full file system, say, is no reason to end the guest: the files keep the values
   * they have, from then on.
   */
  refresh(): void {
    if (this.stale) return;
    try {
      this.update();
    } catch (error) {
      this.stale = true;
      clearInterval(this.timer);
      const code = (error as NodeJS.ErrnoException).code;
      this.warn(
        `statistics directory ${this.path}: cannot be written any more (${code}); its files are stale from now`,
      );
    }
  }

  close(): void {
    clearInterval(this.timer);
    this.refresh();
    for (const { fd } of this.files.values()) closeSync(fd);
    this.files.clear();
    if (!this.keep) rmSync(this.path, { recursive: true, force: true });
  }

  private create(name: string): StatFile {
    const path = join(this.path, name);
    mkdirSync(dirname(path), { recursive: true });
    const file = { fd: openSync(path, "w", 0o644), value: Number.NaN, bytes: 0 };
    this.files.set(name, file);
    return file;
  }
}
