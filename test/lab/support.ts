// What lab tests share: a host with a disk to assign, a VMM that runs in it, its console and its figures, and tests that
// leave their evidence when they fail.

import { createHash, randomFillSync } from "node:crypto";
import { accessSync, constants, createReadStream, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { gunzipSync } from "node:zlib";
import { suite, type Test } from "uvu";
import * as assert from "uvu/assert";
import { isWanted } from "../soak.js";
import { repoRoot, scratchDir } from "./cache.js";
import { guestEnd } from "./guest.js";
import { type Host, type HostProcess, must, shellQuote, tail } from "./host.js";
import { L1, type L1Options, type NvmeDisk } from "./l1.js";
import { LocalHost } from "./local.js";
import { openHost } from "./open.js";

export const MiB = 2 ** 20;
/** From a VMM's start to its guest's first word: 10 s on a quiet machine, all of it software. What takes longer hangs. */
export const bootTimeoutMs = 600_000;

export async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const piece of createReadStream(path)) hash.update(piece as Buffer);
  return hash.digest("hex");
}

/** Asserts that a guest that read a whole disk read what it holds; hashes, that of the content where it is known. */
export function assertRead(hash: string, content: string | undefined): void {
  if (content !== undefined) assert.is(hash, content, "the guest read what the disk holds");
}

/** A disk of zeros, for what needs the device alone. */
export function blankDisk(directory: string, name: string, bytes = 16 * MiB): NvmeDisk {
  const file = join(directory, name);
  writeFileSync(file, "");
  truncateSync(file, bytes);
  return { file };
}

/** A file of random content in a directory; returns its path. */
export function randomDisk(directory: string, name: string, bytes: number): string {
  const file = join(directory, name);
  writeFileSync(file, randomFillSync(Buffer.alloc(bytes)));
  return file;
}

/** What a guest's panic in its kernel's entry code may come of. */
const DEATH_OF_THE_LAB =
  "perhaps of an interrupt that QEMU delivered twice: see qemuArgs() in test/lab/l1.ts";

/**
 * Has a guest that runs the script CONSOLE execute one line; returns what it printed. Rejects when its status is not 0,
 * when the guest's kernel panics, or when it takes longer than `timeoutMs`. `console`: the VMM's process, ours or another.
 */
export async function sh(console: HostProcess, line: string, timeoutMs = bootTimeoutMs): Promise<string> {
  console.write(`${line}\n`);
  const [, output, status, panic] = await console.waitFor(
    /^((?:.|[\r\n])*?)(?:guest: did (\d+)|(Kernel panic - .*?))\r?\n/,
    timeoutMs,
    "stdout",
  );
  if (panic !== undefined) {
    const lab = /ENTRY_TRAMPOLINE|RIP: 0010:(entry|asm)_/.test(output!) ? ` (${DEATH_OF_THE_LAB})` : "";
    throw new Error(`the guest died: ${panic}${lab}: ${line}\n${tail(output!)}`);
  }
  if (status !== "0") throw new Error(`the guest's exit status ${status}: ${line}\n${tail(output!)}`);
  return output!.replaceAll("\r", "");
}

/** A VMM that runs in the host. */
export class RunningVmm {
  private constructor(
    readonly host: Host,
    readonly process: HostProcess,
    /** Where the guest sees each of its devices, such as 0000:00:01.0 → what the VMM calls it. */
    readonly devices: ReadonlyMap<string, string>,
  ) {}

  /** `around` is a shell command with %s for the VMM's; what it runs has to be the VMM itself in the end (exec). */
  static async start(host: Host, args: readonly string[], around = "exec %s"): Promise<RunningVmm> {
    // Most tests count calls: where none is told, it is the policy that makes one for every map and every unmap.
    const policy = args.some((each) => each === "--dma" || each.includes(",dma=")) ? [] : ["--dma", "strict"];
    const command = ["node", join(repoRoot, "dist/vmm.js"), "--stats", ...policy, ...args]
      .map(shellQuote)
      .join(" ");
    const vmm = new RunningVmm(host, await host.spawn(around.replace("%s", command)), devicesOf(args));
    started.push(vmm);
    return vmm;
  }

  /** Waits for a line `guest: WORD …` of the guest's script and returns what follows the word. */
  async guestSays(word: string, timeoutMs = bootTimeoutMs): Promise<string> {
    // Its console only: a line of the VMM's may come in the middle of one of the guest's.
    const pattern = new RegExp(`^guest: ${word}\\b *(.*?)\\r?\\n`, "m");
    const match = await this.process.waitFor(pattern, timeoutMs, "stdout");
    return match[1]!;
  }

  /** guestSays() for what may take hours: once a minute it tells how many calls the guest has made. */
  async guestSaysLate(word: string, timeoutMs: number): Promise<string> {
    const tell = async () => {
      const calls = [...(await this.statistics())].filter(([name]) => /^hypercalls\/\w+\/calls$/.test(name));
      console.log(`    ${calls.reduce((sum, [, count]) => sum + count, 0)} calls`);
    };
    // What ends the guest meanwhile is told below.
    const timer = setInterval(() => tell().catch(() => {}), 60_000);
    try {
      return await this.guestSays(word, timeoutMs);
    } finally {
      clearInterval(timer);
    }
  }

  /** Lets the guest's script go on after a `read`. */
  goOn(): void {
    this.process.write("\n");
  }

  /** sh() of the guest's console. */
  sh(line: string, timeoutMs = bootTimeoutMs): Promise<string> {
    return sh(this.process, line, timeoutMs);
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

  /** For the host's shell: where it keeps its figures and its control socket while it runs. */
  get directory(): string {
    return `"\${XDG_RUNTIME_DIR:-/run}/pvdma/${this.process.pid}"`;
  }

  /** The figures it keeps as files while it runs. */
  async statistics(): Promise<Map<string, number>> {
    return readFigures(await must(this.host, `cd ${this.directory} && grep -r . --exclude=control .`));
  }

  /** `vmm --tell`: returns what it printed. */
  tell(...request: string[]): Promise<string> {
    const words = request.map(shellQuote).join(" ");
    return must(
      this.host,
      `node ${shellQuote(join(repoRoot, "dist/vmm.js"))} --tell ${this.directory} ${words}`,
    );
  }

  /** A connection to its control socket, for who has much to ask; Node takes a second or two to start in the lab. */
  async control(): Promise<{ ask(request: string): Promise<string> }> {
    const script = "process.stdin.pipe(require('node:net').connect(process.argv[1])).pipe(process.stdout)";
    const client = await this.host.spawn(`exec node -e ${shellQuote(script)} ${this.directory}/control`);
    this.process.exited.finally(() => client.kill());
    return {
      ask: async (request) => {
        client.write(`${request}\n`);
        const [answer] = await client.waitFor(/^(?:.*\n)*?(ok|error:).*\n/, 60_000);
        return answer;
      },
    };
  }

  /** The figures that `wanted` names, once they are as it says, or after long enough for them to be. */
  async settledStatistics(wanted: ReadonlyMap<string, number>): Promise<Map<string, number>> {
    for (let tries = 0; ; tries++) {
      const figures = await this.statistics();
      const named = new Map([...wanted.keys()].map((name) => [name, figures.get(name) ?? Number.NaN]));
      if (tries === 20 || [...wanted].every(([name, value]) => named.get(name) === value)) return named;
      await sleep(200);
    }
  }

  /** What it said on stderr beside figures, line by line. */
  messages(): string[] {
    return this.process.stderr.split("\n").filter((line) => line !== "" && readStats(line).size === 0);
  }

  /**
   * What the guest's module counts; the guest runs the script CONSOLE. Packed: every byte on its console costs the lab a
   * millisecond.
   */
  async guestStatistics(): Promise<Map<string, number>> {
    for (let tries = 1; ; tries++) {
      const packed = await this.sh("(cd /sys/kernel/debug/pvdma && grep -r . .) | gzip | base64");
      try {
        return readFigures(gunzipSync(Buffer.from(packed, "base64")).toString());
      } catch (error) {
        // A line of the guest's kernel may have come between.
        if (tries === 3) throw error;
      }
    }
  }

  /** Bytes of locked and pinned memory of the VMM at this moment, as its kernel counts them. */
  async lockedBytes(): Promise<number> {
    const { stdout } = await this.host.run(`cat /proc/${this.process.pid}/status`);
    const kilobytes = (name: string) =>
      Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(stdout)?.[1] ?? Number.NaN);
    return (kilobytes("VmLck") + kilobytes("VmPin")) * 1024;
  }
}

/**
 * The devices that a VMM's arguments assign, on the guest's bus in their order: no test asks for a slot of its own. The
 * second emulated device of a model has a number in its name.
 */
function devicesOf(args: readonly string[]): Map<string, string> {
  const devices = args.filter((_, i) => args[i - 1] === "--assign").map((text) => text.split(",")[0]!);
  const assigned = devices.map((name, i) => {
    const before = devices.slice(0, i).filter((other) => other === name).length;
    return before === 0 ? name : `${name}.${before}`;
  });
  return new Map(assigned.map((name, i) => [`0000:00:${(i + 1).toString(16).padStart(2, "0")}.0`, name]));
}

/** "./name:value" lines as grep prints them. */
function readFigures(text: string): Map<string, number> {
  return new Map([...text.matchAll(/^\.\/(\S+):(-?\d+(?:\.\d+)?)$/gm)].map((m) => [m[1]!, Number(m[2])]));
}

/** "name value" lines as --stats prints them. */
export function readStats(text: string): Map<string, number> {
  return new Map([...text.matchAll(/^([a-z]\S*) (\d+(?:\.\d+)?)$/gm)].map((m) => [m[1]!, Number(m[2])]));
}

/** Calls about mappings, each of which both views count. */
const CALLS = ["map", "unmap", "map_list", "unmap_list", "release", "table"];
/** Calls that failed: the guest tried again, or gave up. */
const FAILED = "retries + errors";

/**
 * What a VMM's statistics say in the words of the guest's view (/sys/kernel/debug/pvdma), for the numbers that both
 * have: under policy cached, where most maps and all unmaps make no call, those of calls alone.
 */
function hostViewAsGuest(
  host: ReadonlyMap<string, number>,
  before: ReadonlyMap<string, number>,
  devices: RunningVmm["devices"],
  isCached: (guestBdf: string) => boolean,
): Map<string, number | undefined> {
  const view = new Map<string, number | undefined>();
  const since = (name: string) => (host.get(name) ?? Number.NaN) - (before.get(name) ?? 0);
  for (const name of ["hypercall_map", "hypercall_unmap", "hypercall_pv_dev"]) view.set(name, since(name));
  for (const [guestBdf, hostBdf] of devices) {
    const of = (name: string) => since(`devices/${hostBdf}/${name}`);
    const call = (name: string, field: string) => of(`hypercalls/${name}/${field}`);
    const failed = (name: string) => call(name, "errors") + call(name, "injected");
    const done = (name: string) => call(name, "calls") - failed(name);
    const set = (name: string, value: number) => view.set(`${guestBdf}/${name}`, value);
    for (const name of CALLS) set(`hypercalls/${name}`, call(name, "calls"));
    set(
      FAILED,
      CALLS.map(failed).reduce((sum, each) => sum + each),
    );
    if (isCached(guestBdf)) continue;
    for (const name of ["map", "unmap"]) {
      set(`${name}s`, done(name));
      set(`${name}_lists`, done(`${name}_list`));
      set(`pages_${name}ped`, call(name, "pages") + call(`${name}_list`, "pages"));
    }
    set("outstanding_bytes", host.get(`devices/${hostBdf}/dma/mapped_bytes`) ?? Number.NaN);
  }
  return view;
}

/**
 * Asserts that guest and host agree about all that both count: calls, mappings, pages, failures, what is mapped now. They
 * do when the guest rests (runs the script CONSOLE), loaded the module once, bound every device, and calls the host by the
 * module alone. The host's files may be a moment behind: they have 10 s. `found` mistakes of drivers the module has found
 * without a call under policy lazy; under cached it finds all of them so. `before` is what the host had counted when the
 * guest booted, if it was not its first boot. Returns both views.
 */
export async function assertViewsAgree(
  vmm: RunningVmm,
  found = 0,
  before: ReadonlyMap<string, number> = new Map(),
): Promise<{ guest: Map<string, number>; host: Map<string, number> }> {
  const { devices } = vmm;
  const guest = await vmm.guestStatistics();
  const ours = new Map<string, number | undefined>(guest);
  // Only a device under policy cached has a table to ask for.
  const isCached = (bdf: string) => guest.get(`${bdf}/hypercalls/table`)! > 0;
  for (const bdf of devices.keys()) {
    const failed = [...guest].filter(
      ([name]) =>
        name === `${bdf}/retries` ||
        (name.startsWith(`${bdf}/errors/`) && !(isCached(bdf) && name.endsWith("/invalid"))),
    );
    ours.set(`${bdf}/${FAILED}`, failed.reduce((sum, [, value]) => sum + value, 0) - found);
  }
  for (const end = Date.now() + 10_000; ; await sleep(250)) {
    const host = await vmm.statistics();
    const theirs = hostViewAsGuest(host, before, devices, isCached);
    const differing = [...theirs.keys()].filter((name) => ours.get(name) !== theirs.get(name));
    if (differing.length === 0) return { guest, host };
    if (Date.now() < end) continue;
    const differences = (view: ReadonlyMap<string, number | undefined>) =>
      Object.fromEntries(differing.map((name) => [name, view.get(name)]));
    assert.equal(differences(ours), differences(theirs), "the guest's view is the host's");
  }
}

/** VMMs that the test at hand started: their consoles are its evidence. */
let started: RunningVmm[] = [];

/**
 * What a VMM that still runs is doing: where its threads are, which exits its vCPUs make, whether its host still has timer
 * interrupts, and whether a key that is typed brings a silent guest on, which would have missed an interrupt.
 */
async function liveEvidence(vmm: RunningVmm): Promise<string> {
  const { host, process } = vmm;
  const counters = async () =>
    (await host.run(`grep LOC: /proc/interrupts; cd ${vmm.directory} && grep -r . | grep exits`)).stdout;
  const { stdout: threads } = await host.run(
    `cd /proc/${process.pid}/task && for t in *; do echo "$t $(cat $t/comm) $(cut -d' ' -f3,14,15 $t/stat): $(cat $t/stack | tr '\\n' ' ')"; done`,
  );
  if (threads === "") return "the VMM has ended";
  const first = await counters();
  const silent = process.stdout.length;
  await sleep(3000);
  const second = await counters();
  const before = process.stdout.length;
  process.write("\n");
  await sleep(3000);
  return [
    `its threads (state, user and system ticks, kernel stack):\n${threads}`,
    `the host's timer interrupts and the VMM's exits, and 3 s later:\n${first}\n${second}`,
    `bytes of console output: ${silent}, 3 s later ${before}; what came within 3 s of a newline: ` +
      JSON.stringify(process.stdout.slice(before)),
  ].join("\n");
}

/**
 * Adds a test that prints, when it fails, the consoles of its VMMs and of the host, and that leaves no VMM running.
 */
export function labTest(test: Test, name: string, host: () => Host, body: () => Promise<void>): void {
  if (!isWanted(name)) {
    test.skip(name, body);
    return;
  }
  test(name, async () => {
    started = [];
    const begun = Date.now();
    try {
      await body();
    } catch (error) {
      for (const vmm of started) {
        console.log(`--- console of a VMM in "${name}"\n${tail(vmm.process.output, 120)}\n---`);
        console.log(
          `--- ${await liveEvidence(vmm).catch((why: Error) => `no more to see: ${why.message}`)}\n---`,
        );
      }
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

/** Why /dev/kvm of this very machine may not be used: the error's name; undefined when it may. */
export function whyNoKvm(): string | undefined {
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
    return undefined;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code;
  }
}

/** A test as labTest() makes them, on this very machine; it is skipped, with a line that says why, without /dev/kvm. */
export function localTest(suiteName: string, name: string, body: (host: Host) => Promise<void>): void {
  const test = suite(suiteName);
  const why = whyNoKvm();
  if (why === undefined) {
    const host = new LocalHost();
    test.after(() => host.close());
    labTest(
      test,
      name,
      () => host,
      () => body(host),
    );
  } else {
    console.log(`${name}: skipped, /dev/kvm: ${why}; the lab has one`);
    test.skip(name, () => undefined);
  }
  test.run();
}

/** The host of a LabSuite, and the disk of the controller that is assigned in it. */
export interface LabOptions extends Omit<L1Options, "nvme0" | "name">, Pick<NvmeDisk, "iops" | "properties"> {
  /** Default 1 MiB. */
  diskBytes?: number;
}

/** Tests that share a host with one NVMe controller over a disk of random content; see openHost() about a real one. */
export class LabSuite {
  readonly files = scratchDir();
  host!: Host;
  /** The controller's address in the host. */
  bdf!: string;
  readonly #suite: Test;
  readonly #disk: string;
  #wanted = 0;

  /** `prepare` runs once, when the host is up and before the first test. */
  constructor(name: string, options: LabOptions = {}, prepare?: () => Promise<void>) {
    const { diskBytes = MiB, iops, properties, ...hostOptions } = options;
    this.#suite = suite(name);
    this.#disk = randomDisk(this.files.path, "disk.raw", diskBytes);
    const nvme0 = {
      file: this.#disk,
      ...(iops !== undefined && { iops }),
      ...(properties && { properties }),
    };
    this.#suite.before(async () => {
      if (this.#wanted === 0) return;
      try {
        ({ host: this.host, bdf: this.bdf } = await openHost({ ...hostOptions, nvme0, name }));
        await prepare?.();
      } catch (error) {
        console.log(error); // uvu does not tell what a hook throws
        throw error;
      }
    });
    this.#suite.after(async () => {
      await this.host?.close();
      this.files.remove();
    });
  }

  test(name: string, body: () => Promise<void>): void {
    if (isWanted(name)) this.#wanted++;
    labTest(this.#suite, name, () => this.host, body);
  }

  /** To be called after the last test(). */
  run(): void {
    this.#suite.run();
  }

  /** Starts a VMM with the controller assigned. */
  start(...args: string[]): Promise<RunningVmm> {
    return RunningVmm.start(this.host, ["--assign", this.bdf, ...args]);
  }

  /** SHA-256 of what the disk holds; undefined where it is a real one, which guests alone read. */
  async diskHash(): Promise<string | undefined> {
    return this.host.kind === "l1" ? sha256OfFile(this.#disk) : undefined;
  }

  /** Asserts that a guest that read the whole disk read what it holds. */
  async checkHash(hash: string): Promise<void> {
    assertRead(hash, await this.diskHash());
  }

  /** Pages that the host's kernel holds pinned for the long term: those pinned since its boot less those given back. */
  async pinnedPages(): Promise<number> {
    const text = await must(this.host, "echo 1 > /proc/sys/vm/stat_refresh; grep nr_foll_pin /proc/vmstat");
    const [acquired, released] = [...text.matchAll(/\d+$/gm)].map((match) => Number(match[0]));
    return acquired! - released!;
  }

  /** Lines of the host's kernel log in which the IOMMU refused the controller an access. */
  async iommuFaults(): Promise<string[]> {
    const about = this.bdf.slice(5);
    return (await this.host.kernelLog())
      .split("\n")
      .filter((line) => /DMAR: \[|AMD-Vi: Event logged/.test(line) && line.includes(about));
  }
}
