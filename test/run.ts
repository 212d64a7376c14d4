// Runs the tests: every compiled *.test.js in a process of its own, as many side by side as there are
// processors, fast ones first and of the others the longest, and ends with one line that counts them.
// Arguments choose tests by a part of their path.

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const built = dirname(fileURLToPath(import.meta.url));
const root = dirname(dirname(built));
/** In this order: no special file needed; a real machine booted in software. */
const DIRECTORIES = ["unit", "lab"];
/** Files that take minutes, the longest first: begun last, one would run alone at the end. */
const LONG = ["cached", "hostile", "leaks", "recovery-limits", "lazy", "working-set", "calls", "dying"];

/** Where a file stands in its directory: the long ones, then the others by name. */
function rank(name: string): number {
  const at = LONG.indexOf(name.replace(/\.test\.js$/, ""));
  return at < 0 ? LONG.length : at;
}

function testFiles(): string[] {
  const wanted = process.argv.slice(2);
  return DIRECTORIES.flatMap((directory) => {
    const path = join(built, directory);
    if (!existsSync(path)) return [];
    return readdirSync(path)
      .filter((name) => name.endsWith(".test.js"))
      .sort()
      .sort((one, other) => rank(one) - rank(other))
      .map((name) => join(path, name));
  }).filter((path) => wanted.length === 0 || wanted.some((part) => relative(built, path).includes(part)));
}

interface Outcome {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
}

/** A file that takes longer hangs. */
const fileTimeoutMs = (path: string): number =>
  (process.env.PVDMA_SOAK !== undefined ? 240 : path.includes("/unit/") ? 10 : 40) * 60_000;
const running = new Set<ChildProcess>();
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.on(signal, () => {
    begun = files.length;
    for (const child of running) child.kill(signal);
  });
}

/**
 * Runs one file; its output comes when it has ended, so that files that run side by side do not mix, and of a file that
 * is alone at once. Counts by uvu's closing lines; a file that dies early is one failure.
 */
function runFile(path: string, alone: boolean): Promise<Outcome & { readonly output: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ["--enable-source-maps", path], {
      cwd: root,
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, FORCE_COLOR: "0" },
    });
    const timeoutMs = fileTimeoutMs(relative(root, path));
    const timer = setTimeout(() => {
      output += `\n${relative(built, path)}: killed after ${timeoutMs / 60_000} minutes\n`;
      child.kill("SIGKILL");
    }, timeoutMs);
    running.add(child);
    let output = "";
    for (const stream of [child.stdout, child.stderr]) {
      stream.on("data", (chunk: Buffer) => {
        output += chunk.toString();
        if (alone) process.stdout.write(chunk);
      });
    }
    child.on("close", (code) => {
      clearTimeout(timer);
      running.delete(child);
      const count = (label: string) =>
        Number(new RegExp(`^\\s*${label}:\\s+(\\d+)`, "m").exec(output)?.[1] ?? 0);
      const total = count("Total");
      const passed = count("Passed");
      const skipped = count("Skipped");
      // uvu's total does not have those that are skipped.
      const failed = total - passed;
      const ended = code === 0 && total + skipped > 0;
      resolve({ output, passed, skipped, failed: ended ? failed : Math.max(failed, 1) });
    });
  });
}

function runLint(): Outcome {
  const biome = join(root, "node_modules", ".bin", "biome");
  const ok =
    spawnSync(biome, ["check", "."], { cwd: root, stdio: ["ignore", "inherit", "inherit"] }).status === 0;
  return { passed: ok ? 1 : 0, failed: ok ? 0 : 1, skipped: 0 };
}

const started = Date.now();
const total = { passed: 0, failed: 0, skipped: 0 };
const failures: string[] = [];
function add(name: string, outcome: Outcome): void {
  for (const key of ["passed", "failed", "skipped"] as const) total[key] += outcome[key];
  if (outcome.failed > 0) failures.push(name);
}

const seconds = () => `${Math.round((Date.now() - started) / 1000)} s`;
const files = testFiles();
if (process.argv.length === 2) add("lint", runLint());
let begun = 0;
/** Takes files one by one until none is left. */
async function work(): Promise<void> {
  for (let path = files[begun++]; path !== undefined; path = files[begun++]) {
    const name = relative(built, path);
    console.log(`[${begun}/${files.length}] ${name} begins (${seconds()})`);
    const alone = files.length === 1;
    const outcome = await runFile(path, alone);
    console.log(`\n${name} (${seconds()})\n${alone ? "" : `${outcome.output.trimEnd()}\n`}`);
    add(name, outcome);
  }
}
/** One device can be assigned once at a time. */
const workers = process.env.PVDMA_HOST_BDF === undefined ? Math.min(availableParallelism(), 4) : 1;
await Promise.all(Array.from({ length: workers }, work));
console.log(`\n${seconds()}`);
if (process.env.PVDMA_TESTS !== undefined)
  console.log(`of the lab's, only tests with "${process.env.PVDMA_TESTS}" in their name (PVDMA_TESTS)`);
if (failures.length > 0) console.log(`failed: ${failures.join(", ")}`);
console.log(
  `${total.passed} passed, ${total.failed} failed${total.skipped > 0 ? `, ${total.skipped} skipped` : ""}`,
);
process.exitCode = total.failed > 0 || total.passed === 0 ? 1 : 0;
