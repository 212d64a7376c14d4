// What lab tests share: a VMM that runs in the host, its console and its figures, and tests that leave their evidence
// when they fail.

import { createHash, randomFillSync } from "node:crypto";
import { createReadStream, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Test } from "uvu";
import { repoRoot } from "./cache.js";
import { guestEnd } from "./guest.js";
import { type Host, type HostProcess, shellQuote, tail } from "./host.js";
import { L1 } from "./l1.js";

export const MiB = 2 ** 20;
/** From a VMM's start to its guest's first word: 10 s on a quiet machine, all of it software. */
export const bootTimeoutMs = 240_000;

export async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const piece of createReadStream(path)) hash.update(piece as Buffer);
  return hash.digest("hex");
}

/** A file of random content in a directory; returns its path. */
export function randomDisk(directory: string, name: string, bytes: number): string {
  const file = join(directory, name);
  writeFileSync(file, randomFillSync(Buffer.alloc(bytes)));
  return file;
}

/** A VMM that runs in the host. */
export class RunningVmm {
  private constructor(
    readonly host: Host,
    readonly process: HostProcess,
  ) {}

  static async start(host: Host, args: readonly string[]): Promise<RunningVmm> {
    const command = ["node", join(repoRoot, "dist/vmm.js"), "--stats", ...args].map(shellQuote).join(" ");
    const vmm = new RunningVmm(host, await host.spawn(`exec ${command}`));
    started.push(vmm);
    return vmm;
  }

  /** Waits for a line `guest: WORD …` of the guest's script and returns what follows the word. */
  async guestSays(word: string, timeoutMs = bootTimeoutMs): Promise<string> {
    const match = await this.process.waitFor(new RegExp(`^guest: ${word}\\b *(.*?)\\r?\\n`, "m"), timeoutMs);
    return match[1]!;
  }

  /** Lets the guest's script go on after a `read`. */
  goOn(): void {
    this.process.write("\n");
  }

  /** Waits for the end: exit status of the VMM, of the guest's script, and the figures it printed. */
  async end(
    timeoutMs = bootTimeoutMs,
  ): Promise<{ status: number; script: number; stats: Map<string, number> }> {
    const timer = setTimeout(() => this.process.kill("SIGKILL"), timeoutMs);
    const status = await this.process.exited;
    clearTimeout(timer);
    return {
      status,
      script: Number(guestEnd.exec(this.process.stdout)?.[1] ?? -1),
      stats: readStats(this.process.stderr),
    };
  }

  /** Bytes of locked and pinned memory of the VMM at this moment, as its kernel counts them. */
  async lockedBytes(): Promise<number> {
    const { stdout } = await this.host.run(`cat /proc/${this.process.pid}/status`);
    const kilobytes = (name: string) =>
      Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(stdout)?.[1] ?? Number.NaN);
    return (kilobytes("VmLck") + kilobytes("VmPin")) * 1024;
  }
}

/** "name value" lines as --stats prints them. */
export function readStats(text: string): Map<string, number> {
  return new Map([...text.matchAll(/^([a-z]\S*\/\S+) (\d+(?:\.\d+)?)$/gm)].map((m) => [m[1]!, Number(m[2])]));
}

/** VMMs that the test at hand started: their consoles are its evidence. */
let started: RunningVmm[] = [];

/**
 * Adds a test that prints, when it fails, the consoles of its VMMs and of the host, and that leaves no VMM running.
 */
export function labTest(test: Test, name: string, host: () => Host, body: () => Promise<void>): void {
  test(name, async () => {
    started = [];
    const begun = Date.now();
    try {
      await body();
    } catch (error) {
      for (const vmm of started)
        console.log(`--- console of a VMM in "${name}"\n${tail(vmm.process.output, 120)}\n---`);
      const l1 = host();
      if (l1 instanceof L1) console.log(`--- the host's console is in ${l1.saveLog()}`);
      throw error;
    } finally {
      for (const vmm of started) vmm.process.kill("SIGKILL");
      await Promise.all(started.map((vmm) => vmm.process.exited.catch(() => undefined)));
      console.log(`  ${name}: ${((Date.now() - begun) / 1000).toFixed(1)} s`);
    }
  });
}
