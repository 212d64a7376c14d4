// Where the lab keeps what is costly to make (kernels, guest images) and what lives only as long as a run.
// Touches ${XDG_CACHE_HOME:-~/.cache}/pvdma and the temporary directory.

import { mkdirSync, mkdtempSync, readdirSync, realpathSync, renameSync, rmSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The lab's cache directory (made if absent). */
export function cacheDir(...below: string[]): string {
  const base = process.env.XDG_CACHE_HOME || join(homedir(), ".cache");
  const dir = join(base, "pvdma", ...below);
  mkdirSync(dir, { recursive: true });
  return dir;
}

/** The root of the working tree: the nearest directory above this file that has a package.json. */
export const repoRoot: string = (() => {
  let dir = dirname(fileURLToPath(import.meta.url));
  for (;;) {
    try {
      if (readdirSync(dir).includes("package.json")) return realpathSync(dir);
    } catch {}
    if (dirname(dir) === dir) return process.cwd();
    dir = dirname(dir);
  }
})();

/** A directory (or file) that appears whole or not at all: write to the name it is given, then it is renamed to `target`. */
export async function makeAtomically(
  target: string,
  make: (temporary: string) => Promise<void>,
): Promise<void> {
  const parent = dirname(target);
  mkdirSync(parent, { recursive: true });
  sweepDead(parent, ".making-");
  const work = mkdtempSync(join(parent, `.making-${process.pid}-`));
  try {
    const made = join(work, "made");
    await make(made);
    try {
      renameSync(made, target);
    } catch (error) {
      // Somebody else made a directory of the same name meanwhile; theirs is as good.
      const code = (error as NodeJS.ErrnoException).code;
      if (code !== "ENOTEMPTY" && code !== "EEXIST") throw error;
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

const live = new Set<() => void>();
let hooked = false;

/**
 * Runs `cleanup` (synchronous) when this process ends for whatever reason it can see: exit, an uncaught error,
 * SIGINT, SIGTERM, SIGHUP. Returns the way to take it back.
 */
export function atExit(cleanup: () => void): () => void {
  if (!hooked) {
    hooked = true;
    process.on("exit", () => {
      for (const each of [...live]) each();
    });
    for (const [signal, number] of [
      ["SIGINT", 2],
      ["SIGTERM", 15],
      ["SIGHUP", 1],
    ] as const) {
      process.on(signal, () => process.exit(128 + number));
    }
  }
  live.add(cleanup);
  return () => live.delete(cleanup);
}

/** A fresh private directory under the system's temporary directory; remove() or the end of the process removes it. */
export function scratchDir(): { path: string; remove: () => void } {
  const base = realpathSync(tmpdir());
  sweepDead(base, "pvdma-lab-");
  const path = mkdtempSync(join(base, `pvdma-lab-${process.pid}-`));
  const wipe = (): void => rmSync(path, { recursive: true, force: true });
  const forget = atExit(wipe);
  return {
    path,
    remove: () => {
      forget();
      wipe();
    },
  };
}

/** Removes what processes that were killed left behind: names are `<prefix><pid>-<random>`. */
function sweepDead(dir: string, prefix: string): void {
  for (const name of readdirSync(dir)) {
    const pid = name.startsWith(prefix) ? Number.parseInt(name.slice(prefix.length), 10) : Number.NaN;
    if (Number.isNaN(pid)) continue;
    try {
      process.kill(pid, 0);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") continue;
      try {
        rmSync(join(dir, name), { recursive: true, force: true });
      } catch {}
    }
  }
}
