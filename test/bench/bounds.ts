// What calls cost a program in C that does nothing else (bounds.c), and beside it our VMM with a guest that does nothing
// but calls (test/guest/exits.c): C is a bound for all that exit and map as ours does. In the lab, and what needs no device
// on this machine's own /dev/kvm, where there is one. `node build/test/bench/bounds.js [ROUNDS]`

import { execFile } from "node:child_process";
import { join } from "node:path";
import { promisify } from "node:util";
import { buildTestGuest } from "../guest/build.js";
import { repoRoot, scratchDir } from "../lab/cache.js";
import { bindVfio, type Host, must } from "../lab/host.js";
import { bootL1, l1Bdf } from "../lab/l1.js";
import { LocalHost } from "../lab/local.js";
import { blankDisk, RunningVmm, whyNoKvm } from "../lab/support.js";
import { median } from "../median.js";
import { inLab, present, progress } from "./program.js";
import { figure, type Row, type Section } from "./report.js";

const ROUNDS = Number(process.argv[2] ?? 3);
/** Calls or pairs in a round of the guest's, of lists a 16th; the first of six rounds does not count. */
const CALLS = 20_000;
/** Where an exit takes a few microseconds, and not a hundred. */
const CALLS_HERE = 100_000;
const C_TIMEOUT_MS = 120_000;
const TIMEOUT_MS = 400_000;

/** The program in C, as a file that this host has. */
async function compiled(host: Host): Promise<string> {
  const program = join(host.shareDir, "bounds");
  await promisify(execFile)("gcc", [
    ...["-O2", "-I", join(repoRoot, "guest-shim")],
    ...["-o", program, join(repoRoot, "test/bench/bounds.c")],
  ]);
  return program;
}

/** Microseconds by name, as the program in C has them, and the cycles of the time stamp counter in one. */
async function measureC(
  host: Host,
  program: string,
  commands: readonly string[],
): Promise<Map<string, number>> {
  const figures = new Map<string, number>();
  for (const command of commands) {
    const said = await must(host, `${program} ${command}`, { timeoutMs: C_TIMEOUT_MS });
    for (const line of said.trim().split("\n")) {
      const [name, ...ns] = line.split(" ");
      figures.set(name!, median(ns.map(Number)) / 1000);
    }
  }
  return figures;
}

/** The same of our guest's calls; `args` are the VMM's. */
async function measureOurs(
  host: Host,
  args: readonly string[],
  names: readonly string[],
  cyclesPerUs: number,
): Promise<Map<string, number>> {
  const figures = new Map<string, number>();
  const vmm = await RunningVmm.start(host, args);
  for (const name of names) {
    const line = new RegExp(`^guest: ${name} ([\\d ]+)\\r?\\n`, "m");
    const [, cycles] = await vmm.process.waitFor(line, TIMEOUT_MS, "stdout");
    figures.set(name, median(cycles!.split(" ").map(Number)) / cyclesPerUs);
  }
  if ((await vmm.end(TIMEOUT_MS)).status !== 0) throw new Error(`the VMM failed: ${vmm.process.output}`);
  return figures;
}

/** A figure that the program in C has to ours, by its name there. */
interface InC {
  readonly contender: string;
  readonly name: string;
}

const C = "C";
const EXIT: readonly InC[] = [{ contender: C, name: "exit" }];

/**
 * Rounds of C, of ours, and of C again: the machine is not equally fast all the time. `pairs`: what is compared, by the
 * names of ours; an exit is `refused`. Returns the figures of each round by our name, C's two to one of ours.
 */
async function compare(
  host: Host,
  commands: readonly string[],
  args: readonly string[],
  pairs: Readonly<Record<string, readonly InC[]>>,
): Promise<(name: string) => Row["bars"]> {
  const program = await compiled(host);
  const inC = new Map(Object.values(pairs).flatMap((all) => all.map(({ name }) => [name, [] as number[]])));
  const ours = new Map(Object.keys(pairs).map((name) => [name, [] as number[]]));
  // A machine is slow with code that it has not met before, and the lab is very slow.
  const cyclesPerUs = (await measureC(host, program, commands)).get("cycles")!;
  for (let round = 1; round <= ROUNDS; round++) {
    const before = await measureC(host, program, commands);
    const between = await measureOurs(host, args, [...ours.keys()], cyclesPerUs);
    const after = await measureC(host, program, commands);
    for (const [name, values] of inC) values.push(before.get(name)!, after.get(name)!);
    for (const [name, values] of ours) values.push(between.get(name)!);
    progress(
      `  round ${round} of ${ROUNDS}: an exit in C: ${figure(before.get("exit")!)} and ${figure(after.get("exit")!)} µs, ` +
        `ours: ${figure(between.get("refused")!)} µs`,
    );
  }
  return (pair) => [
    ...pairs[pair]!.map(({ contender, name }) => ({ contender, values: inC.get(name)! })),
    { contender: "pvdma", values: ours.get(pair)! },
  ];
}

/** On this machine's own processor. */
async function measureHere(): Promise<Section[]> {
  const why = whyNoKvm();
  if (why !== undefined) {
    progress(`  no exits on this machine's own /dev/kvm (${why}): in the lab alone`);
    return [];
  }
  const host = new LocalHost();
  try {
    progress("  on this machine's own /dev/kvm:");
    const exits = await buildTestGuest("exits", host.shareDir);
    const args = ["--cmdline", `count=${CALLS_HERE} only refused`, "--memory", "64M", exits];
    const bars = await compare(host, ["exit"], args, { refused: EXIT });
    return [
      {
        id: "exit",
        title: "An exit to TypeScript beside one to C, without a lab",
        about:
          "On this machine's own /dev/kvm: a guest that does nothing but make calls, each looked at and refused, by a minimal C " +
          "program and by our VMM, which counts them, too. C before ours and after, in each round.",
        unit: "µs",
        better: "less",
        reference: C,
        rows: [{ name: "an exit and the way back", bars: bars("refused") }],
      },
    ];
  } finally {
    await host.close();
  }
}

const here = await measureHere();
const files = scratchDir();
const nvme0 = blankDisk(files.path, "disk.raw");
const host = await bootL1({ name: "bench-bounds", nvme0, say: progress });
try {
  const exits = await buildTestGuest("exits", host.shareDir);
  const bdf = l1Bdf.nvme0;
  await bindVfio(host, bdf);
  const group = (await must(host, `basename $(readlink /sys/bus/pci/devices/${bdf}/iommu_group)`)).trim();

  const args = ["--cmdline", `count=${CALLS}`, "--dma", "strict", "--assign", bdf, exits];
  const served = (what: string): InC[] => [
    { contender: C, name: `served-${what}` },
    { contender: "C, without a guest", name: `vfio-${what}` },
  ];
  const pairs = { refused: EXIT, pair: served("pair"), list: served("list") };
  const bars = await compare(host, ["exit", `vfio ${group} ${bdf}`], args, pairs);
  const section: Section = {
    id: "bounds",
    title: "What calls cost beside a C program that does nothing else",
    about:
      "A minimal C program and a guest that does nothing but exits: one and the way back; VFIO maps of one page, or of 64, " +
      "after an exit, and their unmap after the next (more than the sum: what follows an exit runs colder); the same ioctls " +
      "without a guest. Beside it our VMM under policy strict: a call that is looked at, counted and refused; one that " +
      "maps, and one that unmaps, with what our module's code in the guest does for them. C before ours and after, in each " +
      "round.",
    unit: "µs",
    better: "less",
    reference: C,
    rows: [
      { name: "an exit and the way back", bars: bars("refused") },
      { name: "a page mapped and unmapped", bars: bars("pair") },
      { name: "64 pages mapped as one, and one unmap", bars: bars("list") },
    ],
  };
  present({ sections: [...here, ...inLab([section])] });
} finally {
  await host.close();
  files.remove();
}
