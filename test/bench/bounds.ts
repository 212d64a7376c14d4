// What the host's kernel costs by itself, by a program in C (bounds.c), and beside it our VMM with a guest that does nothing
// but calls (test/guest/exits.c): nobody can be faster than C. `node build/test/bench/bounds.js [ROUNDS]`

import { execFile } from "node:child_process";
import { join } from "node:path";
import { promisify } from "node:util";
import { buildTestGuest } from "../guest/build.js";
import { repoRoot, scratchDir } from "../lab/cache.js";
import { bindVfio, must } from "../lab/host.js";
import { bootL1, l1Bdf } from "../lab/l1.js";
import { blankDisk, RunningVmm } from "../lab/support.js";
import { median } from "../median.js";
import { present, progress } from "./program.js";
import { figure, type Row } from "./report.js";

const ROUNDS = Number(process.argv[2] ?? 3);
/** Calls or pairs in a round of the guest's, of lists a 16th; the first of six rounds does not count. */
const CALLS = 20_000;
const C_TIMEOUT_MS = 120_000;
const TIMEOUT_MS = 400_000;

const files = scratchDir();
const nvme0 = blankDisk(files.path, "disk.raw");
const host = await bootL1({ name: "bench-bounds", nvme0, say: progress });
try {
  const program = join(host.shareDir, "bounds");
  await promisify(execFile)("gcc", [
    ...["-O2", "-I", join(repoRoot, "guest-shim")],
    ...["-o", program, join(repoRoot, "test/bench/bounds.c")],
  ]);
  const exits = await buildTestGuest("exits", host.shareDir);
  const bdf = l1Bdf.nvme0;
  await bindVfio(host, bdf);
  const group = (await must(host, `basename $(readlink /sys/bus/pci/devices/${bdf}/iommu_group)`)).trim();

  /** Microseconds by name, as the program in C has them, and the cycles of the time stamp counter in one. */
  async function measureC(): Promise<Map<string, number>> {
    const figures = new Map<string, number>();
    for (const what of ["exit", `vfio ${group} ${bdf}`]) {
      const said = await must(host, `${program} ${what}`, { timeoutMs: C_TIMEOUT_MS });
      for (const line of said.trim().split("\n")) {
        const [name, ...ns] = line.split(" ");
        figures.set(name!, median(ns.map(Number)) / 1000);
      }
    }
    return figures;
  }
  /** The same of our guest's calls. */
  async function measureOurs(names: Iterable<string>, cyclesPerUs: number): Promise<Map<string, number>> {
    const figures = new Map<string, number>();
    const args = ["--cmdline", `count=${CALLS}`, "--dma", "strict", "--assign", bdf, exits];
    const vmm = await RunningVmm.start(host, args);
    for (const name of names) {
      const line = new RegExp(`^guest: ${name} ([\\d ]+)\\r?\\n`, "m");
      const [, cycles] = await vmm.process.waitFor(line, TIMEOUT_MS, "stdout");
      figures.set(name, median(cycles!.split(" ").map(Number)) / cyclesPerUs);
    }
    if ((await vmm.end(TIMEOUT_MS)).status !== 0) throw new Error(`the VMM failed: ${vmm.process.output}`);
    return figures;
  }

  const inC = new Map(["exit", "vfio-pair", "vfio-list"].map((name) => [name, [] as number[]]));
  const ours = new Map(["refused", "pair", "list"].map((name) => [name, [] as number[]]));
  // The lab is slow with code that it has not met before.
  const cyclesPerUs = (await measureC()).get("cycles")!;
  for (let round = 1; round <= ROUNDS; round++) {
    // C before ours and after: the machine below the lab is not equally fast all the time.
    const before = await measureC();
    const between = await measureOurs(ours.keys(), cyclesPerUs);
    const after = await measureC();
    for (const [name, values] of inC) values.push(before.get(name)!, after.get(name)!);
    for (const [name, values] of ours) values.push(between.get(name)!);
    progress(
      `  round ${round} of ${ROUNDS}: an exit in C: ${figure(before.get("exit")!)} and ${figure(after.get("exit")!)} µs, ` +
        `ours: ${figure(between.get("refused")!)} µs`,
    );
  }

  const row = (name: string, nameInC: string, nameInOurs: string): Row => ({
    name,
    bars: [
      { contender: "C", values: inC.get(nameInC)! },
      { contender: "pvdma", values: ours.get(nameInOurs)! },
    ],
  });
  present({
    sections: [
      {
        id: "bounds",
        title: "What the host's kernel costs by itself",
        about:
          "A minimal C program: an exit to user space and back; VFIO maps of one page and their unmap, without a guest. Beside it " +
          "our VMM and a guest that does nothing but calls under policy strict: one that is looked at, counted and refused; one " +
          "that maps, and one that unmaps. C before ours and after, in each round.",
        unit: "µs",
        better: "less",
        reference: "C",
        rows: [
          row("an exit and the way back", "exit", "refused"),
          row("a page mapped and unmapped", "vfio-pair", "pair"),
          row("64 pages mapped as one, and one unmap", "vfio-list", "list"),
        ],
      },
    ],
  });
} finally {
  await host.close();
  files.remove();
}
