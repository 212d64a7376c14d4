// The Host that is this very machine: for a host with a device bound to vfio-pci (PVDMA_HOST_BDF=0000:02:00.0),
// and, inside L1, what the agent starts processes with.

import { type ChildProcess, spawn as spawnChild } from "node:child_process";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { atExit, repoRoot, scratchDir } from "./cache.js";
import {
  type Host,
  type HostProcess,
  must,
  type RunOptions,
  type RunResult,
  runToEnd,
  type SpawnOptions,
  shellQuote,
  TrackedProcess,
} from "./host.js";

export class LocalProcess extends TrackedProcess {
  pid: number;
  readonly #child: ChildProcess;

  constructor(child: ChildProcess, command: string, options: SpawnOptions) {
    super(command, options.onOutput);
    this.#child = child;
    this.pid = child.pid!;
    child.stdout!.on("data", (bytes: Buffer) => this.feed("stdout", bytes));
    child.stderr!.on("data", (bytes: Buffer) => this.feed("stderr", bytes));
    child.stdin!.on("error", () => {}); // it may end, or close its stdin, before it read all of it
    child.on("exit", (code, signal) => {
      const status = signal === null ? (code ?? 255) : 128 + constants.signals[signal];
      // Its last output may still be in the pipe; what it left running may hold the pipe open for ever.
      const late = setTimeout(() => this.finish({ status }), 500);
      child.on("close", () => {
        clearTimeout(late);
        this.finish({ status });
      });
    });
  }

  write(data: string | Buffer): void {
    this.#child.stdin!.write(data);
  }

  end(): void {
    this.#child.stdin!.end();
  }

  kill(signal: NodeJS.Signals = "SIGTERM"): void {
    if (this.ended) return;
    try {
      process.kill(-this.pid, signal);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
    }
  }

  /** Stops and starts reading its output: how a slow reader holds it back. */
  pause(paused: boolean): void {
    for (const stream of [this.#child.stdout!, this.#child.stderr!]) {
      if (paused) stream.pause();
      else stream.resume();
    }
  }
}

/** The shell that script(1), `pid`, starts on the terminal it makes: undefined until it has. */
function firstChild(pid: number): number | undefined {
  try {
    const child = Number.parseInt(readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8"), 10);
    return Number.isNaN(child) ? undefined : child;
  } catch {
    return undefined;
  }
}

/** Starts a shell command in a process group of its own. */
export async function startLocal(command: string, options: SpawnOptions = {}): Promise<LocalProcess> {
  const cwd = options.cwd ?? repoRoot;
  const argv =
    options.pty === undefined
      ? ["sh", "-c", command]
      : [
          "script",
          "-qefc",
          `stty rows ${options.pty.rows} cols ${options.pty.columns}; sh -c ${shellQuote(command)}`,
          "/dev/null",
        ];
  // setpriv: when this process is gone, even by SIGKILL, the kernel kills the shell (and what it has become by exec).
  const child = spawnChild("setpriv", ["--pdeathsig", "KILL", "--", ...argv], {
    cwd,
    env: { ...process.env, ...options.env },
    detached: true,
    stdio: ["pipe", "pipe", "pipe"],
  });
  const started = await new Promise<LocalProcess>((resolve, reject) => {
    child.on("error", (error) =>
      reject(new Error(`cannot start setpriv ${argv[0]} in ${cwd}: ${error.message}`)),
    );
    child.on("spawn", () => resolve(new LocalProcess(child, command, options)));
  });
  if (options.pty !== undefined) {
    // script(1) answers every signal with a SIGTERM to the shell; so take the shell for the process, it leads a
    // group of its own.
    for (let tries = 0; tries < 200 && !started.ended; tries++) {
      const shell = firstChild(child.pid!);
      if (shell !== undefined) {
        started.pid = shell;
        break;
      }
      await sleep(10);
    }
  }
  return started;
}

export class LocalHost implements Host {
  readonly kind = "local";
  readonly shareDir: string;
  readonly #scratch = scratchDir();
  readonly #processes = new Set<LocalProcess>();
  readonly #forget: () => void;

  constructor() {
    this.shareDir = this.#scratch.path;
    this.#forget = atExit(() => this.#killAll());
  }

  run(command: string, options?: RunOptions): Promise<RunResult> {
    return runToEnd(this, command, options);
  }

  async spawn(command: string, options?: SpawnOptions): Promise<HostProcess> {
    const child = await startLocal(command, options);
    this.#processes.add(child);
    void child.exited.then(() => this.#processes.delete(child));
    return child;
  }

  kernelLog(): Promise<string> {
    return must(this, "dmesg");
  }

  async close(): Promise<void> {
    this.#killAll();
    await Promise.allSettled([...this.#processes].map((child) => child.exited));
    this.#forget();
    this.#scratch.remove();
  }

  #killAll(): void {
    for (const child of this.#processes) child.kill("SIGKILL");
  }
}
