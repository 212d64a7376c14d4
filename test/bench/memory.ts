// What a guest with an assigned NVMe controller costs its host under policy cached: memory that is pinned while it reads
// into 64 MiB, by size of granule; the first pass over a disk and what comes after it; the time to the guest's first
// word, by size of RAM; and maps from four CPUs at once. `node build/test/bench/memory.js [ROUNDS]`

import { setTimeout as sleep } from "node:timers/promises";
import { scratchDir } from "../lab/cache.js";
import { buildGuestImage, buildModule, guestBegin } from "../lab/guest.js";
import { bindVfio, must } from "../lab/host.js";
import { bootL1, l1Bdf } from "../lab/l1.js";
import { getKernel } from "../lab/packages.js";
import { endDriven, loadNvme, startDriven } from "../lab/recovery.js";
import { CONSOLE } from "../lab/scripts.js";
import { blankDisk, bootTimeoutMs, MiB, RunningVmm } from "../lab/support.js";
import { median } from "../median.js";
import { inLab, present, progress } from "./program.js";
import { type Bar, figure, type Row, type Section } from "./report.js";

const ROUNDS = Number(process.argv[2] ?? 3);
const DISK_MIB = 256;
const GRANULES = ["4K", "16K", "64K", "256K", "2M"] as const;
/** The guest whose pinned memory is looked at; its host has 3 GiB. */
const LARGE = "8G";
/** Under policy pinned: a guest that fits, and the memory that it has to fit. */
const FITTING = "1G";
const ROOM = "2G";

/** Of so many pages that follow each other one is free, where no neighbours are wanted. */
const NEIGHBOURS = 4;
/** fio's buffers: 128 of 512 KiB, all of them given to the device at once. */
const BUFFERS_MIB = 64;
const READ_INTO_BUFFERS = "--rw=randread --bs=512k --iodepth=128 --io_size=128M";
const BUFFERS = [
  { name: "buffers of huge pages", prepare: "true", options: "--iomem=mmaphuge" },
  { name: "of pages of 4 KiB", prepare: "true", options: "--iomem=malloc" },
  // More than the buffers take.
  {
    name: `of every ${NEIGHBOURS}th page`,
    prepare: `modprobe scatter pages=${NEIGHBOURS * 20000} every=${NEIGHBOURS}`,
    options: "--iomem=malloc",
  },
] as const;

/** The first pass. */
const PASS_MIB = 64;
const WARM_UP_SECONDS = 4;
const SECONDS = 4;

const THREADS = [1, 4] as const;

const files = scratchDir();
const kernel = await getKernel("6.12");
const moduleFiles: string[] = [];
for (const name of ["dmabench", "scatter"])
  moduleFiles.push((await buildModule(kernel, "test/modules", name)).file);

const nvme0 = blankDisk(files.path, "disk.raw", DISK_MIB * MiB);
const host = await bootL1({ name: "bench-memory", nvme0, say: progress });
const bdf = l1Bdf.nvme0;
/** The image that startDriven() makes of the same. */
const image = await buildGuestImage({ script: CONSOLE, tools: ["fio"], moduleFiles });

const start = (...args: string[]): Promise<RunningVmm> =>
  startDriven(host, [bdf], { args: ["--dma", "cached", ...args], moduleFiles });

/** The VMM's figures as they are now: its files may be a moment behind. */
async function figures(vmm: RunningVmm): Promise<Map<string, number>> {
  await sleep(500);
  return vmm.statistics();
}

const mib = (from: ReadonlyMap<string, number>, name: string): number => from.get(`dma/${name}`)! / MiB;

/** Calls of the guest's module that map or unmap, so far. */
async function calls(vmm: RunningVmm): Promise<number> {
  const numbers = await vmm.sh("cd /sys/kernel/debug/pvdma && cat hypercall_map hypercall_unmap");
  return numbers
    .trim()
    .split("\n")
    .map(Number)
    .reduce((sum, each) => sum + each);
}

/** A row with a bar for each granule, of figures by granule and round. */
const byGranule = (name: string, values: (granule: string) => readonly number[]): Row => ({
  name,
  bars: GRANULES.map((granule): Bar => ({ contender: granule, values: values(granule) })),
});

/** What the guest has pinned when fio has read into its buffers, by granule; one round: it does not wander. */
async function measurePinned(): Promise<Section> {
  const results = new Map<string, number[]>();
  const bounds = new Map<string, number>();
  for (const granule of GRANULES) {
    const vmm = await start("--memory", LARGE, "--dma-granule", granule);
    await vmm.sh(
      "echo 40 > /proc/sys/vm/nr_hugepages; echo never > /sys/kernel/mm/transparent_hugepage/enabled",
    );
    const amounts: number[] = [];
    for (const { name, prepare, options } of BUFFERS) {
      await vmm.sh(prepare);
      const [path] = await loadNvme(vmm);
      const own = async () => Number(await vmm.sh("cat /sys/kernel/debug/pvdma/0000:*/outstanding"));
      const [before, ownBefore] = [mib(await figures(vmm), "pinned_bytes"), await own()];
      await vmm.sh(`fio_json --name=load --filename=${path} ${READ_INTO_BUFFERS} ${options}`);
      const all = await figures(vmm);
      const [now, peak] = [mib(all, "pinned_bytes"), mib(all, "peak_pinned_bytes")];
      const bound = before + BUFFERS_MIB + ((await own()) - ownBefore) * granuleMiB(granule);
      if (!bounds.has(granule)) bounds.set(granule, bound);
      amounts.push(now);
      progress(
        `  granules of ${granule}, ${name}: ${figure(before)} MiB pinned before, ${figure(now)} after, ${figure(peak)} at the most`,
      );
      // Nothing is pinned then.
      await vmm.sh("modprobe -r nvme");
    }
    results.set(granule, amounts);
    await endDriven(vmm);
  }
  return {
    id: "memory-pinned",
    title: `What a guest of ${LARGE} has pinned that reads into ${BUFFERS_MIB} MiB, by granule`,
    about:
      `fio reads at random, ${BUFFERS_MIB} MiB at a time, direct (guest kernel 6.12, 1 vCPU); the driver's queues and lists count as well. ` +
      "The bound, for the first, is what the driver had pinned before, the buffers, and a granule for each mapping that it has made for itself since.",
    unit: "MiB",
    better: "less",
    rows: [
      byGranule("the bound", (granule) => [bounds.get(granule)!]),
      ...BUFFERS.map(({ name }, i) => byGranule(name, (granule) => [results.get(granule)![i]!])),
    ],
  };
}

const granuleMiB = (granule: string): number =>
  (Number.parseInt(granule, 10) * (granule.endsWith("M") ? MiB : 1024)) / MiB;

/** What policy pinned does with a guest that its host has room for, and with one that it has not, in words. */
async function policyPinned(): Promise<string> {
  // So that it is the VMM that has no memory, and not all of the host.
  const group = "/sys/fs/cgroup/vmm";
  await must(
    host,
    `mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +memory > /sys/fs/cgroup/cgroup.subtree_control &&
     mkdir ${group} && echo ${ROOM} > ${group}/memory.max`,
  );
  const around = `echo $$ > ${group}/cgroup.procs; exec %s`;
  const ends = async (memory: string): Promise<string> => {
    const args = ["--assign", bdf, "--dma", "pinned", "--memory", memory, image];
    const vmm = await RunningVmm.start(host, args, around);
    const end = await Promise.race([
      vmm.process.exited.then((status) =>
        status === 137
          ? "is killed for want of memory"
          : `does not start: ${vmm.messages().at(-1) ?? status}`,
      ),
      vmm.guestSays("ready").then(
        async () => `has ${figure(mib(await figures(vmm), "pinned_bytes"))} MiB pinned`,
        () => "says nothing",
      ),
    ]);
    vmm.process.kill("SIGKILL");
    await vmm.process.exited;
    return end;
  };
  const words = `Under policy pinned, with ${ROOM} of memory for the VMM, a guest of ${FITTING} ${await ends(FITTING)}, and one of ${LARGE} ${await ends(LARGE)}.`;
  progress(`  ${words}`);
  return words;
}

/** The first pass over a disk, and what comes after it, by granule. */
async function measureGranules(): Promise<Section[]> {
  const measures = [
    {
      id: "seconds",
      title: `The first pass: ${PASS_MIB} MiB read through the page cache`,
      unit: "s",
      better: "less",
    },
    { id: "calls", title: "Calls of that pass that map", unit: "calls", better: "less" },
    { id: "ms", title: "Time that the host took for them", unit: "ms", better: "less" },
    { id: "iops", title: "Reads of 4 KiB after it, 16 at a time", unit: "I/Os per second", better: "more" },
    { id: "entries", title: "Mappings of the IOMMU in the end", unit: "entries", better: "less" },
    { id: "mib", title: "Pinned in the end", unit: "MiB", better: "less" },
  ] as const;
  const hostMs = (from: ReadonlyMap<string, number>): number =>
    (from.get("hypercalls/map/ns_total")! + from.get("hypercalls/map_list/ns_total")!) / 1e6;
  const results = new Map(GRANULES.map((granule) => [granule as string, measures.map((): number[] => [])]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const granule of GRANULES) {
      const vmm = await start("--dma-granule", granule, "--dma-idle", "0");
      const [path] = await loadNvme(vmm);
      const [callsBefore, before] = [await calls(vmm), await figures(vmm)];
      const times = await vmm.sh(
        `cat /proc/uptime; dd if=${path} of=/dev/null bs=1M count=${PASS_MIB} 2> /dev/null && cat /proc/uptime`,
      );
      const [begun, ended] = times.trim().split("\n").map(Number.parseFloat) as [number, number];
      const made = (await calls(vmm)) - callsBefore;
      const ms = hostMs(await figures(vmm)) - hostMs(before);
      await vmm.sh(`throughput 1 ${WARM_UP_SECONDS} ${path}`);
      const iops = Number(await vmm.sh(`throughput 1 ${SECONDS} ${path}`));
      const after = await figures(vmm);
      await endDriven(vmm);
      const values = [ended - begun, made, ms, iops, after.get("dma/entries")!, mib(after, "pinned_bytes")];
      for (const [i, value] of values.entries()) results.get(granule)![i]!.push(value);
      const words = measures.map(({ title, unit }, i) => `${title}: ${figure(values[i]!)} ${unit}`);
      progress(`  round ${round + 1} of ${ROUNDS}: granules of ${granule}: ${words.join("; ")}`);
    }
  }
  return measures.map(({ id, title, unit, better }, i) => ({
    id: `memory-granule-${id}`,
    title: `${title}, by granule`,
    about: `The same guest for all of these: kernel 6.12, 1 vCPU, 512 MiB, policy cached, --dma-idle 0.`,
    unit,
    better,
    reference: "64K",
    rows: [byGranule("granules of", (granule) => results.get(granule)![i]!)],
  }));
}

/** The time from the VMM's start to the first word of the guest's init, and its memory and the nested faults until then. */
async function measureStart(): Promise<Section[]> {
  const thp = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  await must(host, `echo advise > ${thp}`);
  const contenders = [
    { name: "512 MiB", args: ["--dma", "cached", "--memory", "512M"] },
    { name: "16 GiB", args: ["--dma", "cached", "--memory", "16G"] },
    { name: "512 MiB, thp", args: ["--dma", "cached", "--memory", "512M", "--hugepages", "thp"] },
    { name: "16 GiB, thp", args: ["--dma", "cached", "--memory", "16G", "--hugepages", "thp"] },
    { name: "512 MiB, pinned", args: ["--dma", "pinned", "--memory", "512M"] },
  ];
  const results = contenders.map(() => ({
    seconds: [] as number[],
    touched: [] as number[],
    faults: [] as number[],
  }));
  // One start takes longer than another by more than what is looked for.
  const rounds = 3 * ROUNDS;
  for (let round = 0; round < rounds; round++) {
    for (const [who, { name, args }] of contenders.entries()) {
      const begun = performance.now();
      const vmm = await RunningVmm.start(host, ["--assign", bdf, ...args, image]);
      await vmm.process.waitFor(guestBegin, bootTimeoutMs, "stdout");
      const seconds = (performance.now() - begun) / 1000;
      const status = await must(host, `grep VmRSS /proc/${vmm.process.pid}/status`);
      const touched = Number(/(\d+) kB/.exec(status)![1]) / 1024;
      // Of all VMs that there are, and there is one.
      const faults = Number(await must(host, "cat /sys/kernel/debug/kvm/pf_fixed"));
      vmm.process.kill();
      await vmm.process.exited;
      results[who]!.seconds.push(seconds);
      results[who]!.touched.push(touched);
      results[who]!.faults.push(faults);
      progress(
        `  round ${round + 1} of ${rounds}: ${name}: init after ${figure(seconds)} s, ${figure(touched)} MiB of memory, ${figure(faults)} faults`,
      );
    }
  }
  const rows = (of: "seconds" | "touched" | "faults"): Row[] => [
    {
      name: "RAM of",
      bars: contenders.map(({ name }, i) => ({ contender: name, values: results[i]![of] })),
    },
  ];
  const about =
    "With the controller assigned, policy cached unless it says pinned; guest kernel 6.12, 1 vCPU. thp: --hugepages thp.";
  const common = { about, better: "less", reference: "512 MiB" } as const;
  return [
    {
      ...common,
      id: "memory-start",
      title: "From the VMM's start to the guest's init",
      unit: "s",
      rows: rows("seconds"),
    },
    {
      ...common,
      id: "memory-touched",
      title: "Memory of the VMM's process by then, its own included",
      unit: "MiB",
      rows: rows("touched"),
    },
    {
      ...common,
      id: "memory-faults",
      title: "Page faults by which the host's kernel gave memory to the guest",
      about: `${about} A kernel writes 64 bytes about each page of its RAM before its init runs, and zeroes 64 MiB of bounce buffers if there is RAM above 4 GiB.`,
      unit: "faults",
      rows: rows("faults"),
    },
  ];
}

/** Pages mapped and unmapped from one CPU and from four at once, that nobody needs to ask the host about. */
async function measureCpus(): Promise<Section> {
  const vmm = await start("--cpus", "4");
  await loadNvme(vmm);
  const load = (threads: number, ms: number): string =>
    `modprobe dmabench device=0000:00:01.0 threads=${threads} ms=${ms} && modprobe -r dmabench`;
  /** A pair's share of the time, over all threads, in microseconds. */
  const bench = async (threads: number, ms: number): Promise<number> => {
    const rounds = await vmm.sh(
      `dmesg -c > /dev/null; ${load(threads, ms)} && dmesg | sed -n 's/.*dmabench: pair [0-9]* //p'`,
    );
    // What it says is the mean of the threads' own figures: over their number it is never less than all time by all pairs.
    return median(rounds.trim().split(/\s+/).map(Number)) / threads / 1000;
  };
  for (const threads of THREADS) await bench(threads, 100);
  const results = THREADS.map((): number[] => []);
  for (let round = 0; round < 3 * ROUNDS; round++) {
    for (const [i, threads] of THREADS.entries()) {
      const us = await bench(threads, 400);
      results[i]!.push(us);
      progress(`  round ${round + 1}: ${threads} CPUs: ${figure(us)} µs a pair`);
    }
  }
  // The module has other pages each time it is loaded, and may have to ask for them at first. Its rounds take 10 s.
  const look = "cat maps; cat ../hypercall_map ../hypercall_unmap";
  const seen = await vmm.sh(
    `cd /sys/kernel/debug/pvdma/0000:00:01.0; ${load(THREADS.at(-1)!, 2000)} & sleep 4; ${look}; sleep 3; ${look}; wait $!`,
  );
  const [maps, ...counts] = seen.trim().split("\n").map(Number) as [number, ...number[]];
  const pairs = counts[2]! - maps;
  const made = counts[3]! + counts[4]! - counts[0]! - counts[1]!;
  progress(`  ${made} calls for ${pairs} pairs on ${THREADS.at(-1)} CPUs`);
  await endDriven(vmm);
  return {
    id: "memory-cpus",
    title: "A page mapped and unmapped, by CPUs that do it at once",
    about:
      "A guest of 4 vCPUs under policy cached, in a host of one processor: the time by the pairs of all CPUs together. " +
      `For ${pairs} pairs of four CPUs at once the host was called ${made} times.`,
    unit: "µs",
    better: "less",
    reference: "1 CPU",
    rows: [
      {
        name: "a pair, all told",
        bars: THREADS.map((threads, i) => ({
          contender: `${threads} CPU${threads > 1 ? "s" : ""}`,
          values: results[i]!,
        })),
      },
    ],
  };
}

try {
  await bindVfio(host, bdf);
  const memory = await measurePinned();
  const cpus = await measureCpus();
  const starts = await measureStart();
  const granules = await measureGranules();
  const all = await policyPinned();
  const { about } = memory;
  const sections = [{ ...memory, about: `${about} ${all}` }, ...granules, ...starts, cpus];
  present({ sections: inLab(sections) });
} finally {
  await host.close();
  files.remove();
}
