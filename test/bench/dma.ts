// What a driver pays for DMA: a page mapped and unmapped, a list of scattered pages, and a disk that is read from; an
// assigned NVMe controller under each of our policies and under QEMU's ways to give a guest a device, in one host. The
// benchmark module uses the plain DMA API (test/modules/dmabench.c), so it is the same for all.
// `node build/test/bench/dma.js [ROUNDS]`

import { scratchDir } from "../lab/cache.js";
import { buildGuestImage, buildModule, type GuestOptions } from "../lab/guest.js";
import { bindVfio, type HostProcess } from "../lab/host.js";
import { bootL1, l1Bdf } from "../lab/l1.js";
import { getKernel } from "../lab/packages.js";
import { QemuBeside } from "../lab/qemu.js";
import { CONSOLE } from "../lab/scripts.js";
import { blankDisk, RunningVmm, sh } from "../lab/support.js";
import { median } from "../median.js";
import { inLab, present, progress } from "./program.js";
import { figure, type Row, type Section } from "./report.js";

const ROUNDS = Number(process.argv[2] ?? 3);
/** Of a round: each measure of each contender. */
const TURNS = 4;
const DISK_BYTES = 256 * 2 ** 20;
/**
 * Milliseconds for each of the ten figures that the module takes when it is loaded, seconds for fio's, and how often each is
 * started in a turn: figures differ by more from start to start than within one, fio's by a seventh (standard deviation).
 */
const MODULE_MS = 100;
const MODULE_STARTS = 3;
const FIO_SECONDS = 3;
const FIO_STARTS = 4;
/** The same two before the first turn. What is compiled while it runs is slow at first, and in the lab the guest's code is, too. */
const WARM_UP = { ms: 3000, seconds: 20 };
const DEVICE = "0000:00:01.0";
const QEMU_ADDRESS = "addr=1.0";
const TIMEOUT_MS = 400_000;

const MEASURES = [
  { word: "pair", name: "a page mapped and unmapped", unit: "µs", starts: MODULE_STARTS },
  { word: "list", name: "a list of 64 scattered pages", unit: "µs", starts: MODULE_STARTS },
  { word: "iops", name: "reads of 4 KiB, 16 at a time", unit: "I/Os per second", starts: FIO_STARTS },
] as const;
type Word = (typeof MEASURES)[number]["word"];

/**
 * Our module with the time after which lazy unmaps what is idle: a call takes several hundred microseconds in the lab, so
 * that its 10 ms would be over before the benchmark's 64 pages have been mapped once.
 */
const PVDMA = "pvdma lazy_ms=500";
const guest = (modules: readonly string[], moduleFile: string): GuestOptions => ({
  script: `${modules.map((module) => `modprobe ${module} || exit 1`).join("\n")}
modprobe nvme || exit 1
${CONSOLE}`,
  tools: ["fio"],
  modules: ["nvme", ...modules.filter((module) => module !== PVDMA)],
  moduleFiles: [moduleFile],
  pvdma: modules.includes(PVDMA),
});

interface Contender {
  readonly name: string;
  /** Starts it on this device. */
  start(bdf: string): Promise<HostProcess>;
}

/** Microseconds of each measure of the module's: medians of its rounds of so many milliseconds. */
async function measureModule(vmm: HostProcess, ms: number): Promise<{ pair: number; list: number }> {
  const run = `modprobe dmabench device=${DEVICE} ms=${ms} && modprobe -r dmabench`;
  const said = await sh(vmm, `dmesg -c > /dev/null; ${run} && dmesg | grep dmabench:`, TIMEOUT_MS);
  const us = (what: string): number => {
    const [, ns] = new RegExp(`dmabench: ${what} \\d+ ([\\d ]+)`).exec(said)!;
    return median(ns!.trim().split(" ").map(Number)) / 1000;
  };
  return { pair: us("pair"), list: us("list") };
}

/** I/Os per second. */
async function measureDisk(vmm: HostProcess, seconds: number): Promise<number> {
  const load = "--rw=randread --bs=4k --iodepth=16 --time_based --ramp_time=1";
  const fio = `fio_json --name=load --filename=/dev/nvme0n1 ${load} --runtime=${seconds}`;
  return Number(await sh(vmm, `${fio} && awk '/"iops" :/ { printf "%d", $3; exit }' /tmp/fio`, TIMEOUT_MS));
}

const files = scratchDir();
/** One for each contender. */
const disks = Array.from({ length: 8 }, (_, n) => blankDisk(files.path, `disk${n}.raw`, DISK_BYTES));
const { file: module } = await buildModule(await getKernel("6.12"), "test/modules", "dmabench");

const host = await bootL1({
  name: "bench-dma",
  memoryMiB: 8192,
  moreNvme: disks,
  // As QEMU's guests have them, whose RAM is anonymous memory.
  hugePages: true,
  say: progress,
});
try {
  const ours = (policy: string): Contender => ({
    name: `pvdma, ${policy}`,
    start: async (bdf) => {
      const image = await buildGuestImage(guest(policy === "pinned" ? [] : [PVDMA], module));
      return (await RunningVmm.start(host, ["--dma", policy, "--assign", bdf, image])).process;
    },
  });
  const qemu = (name: string, devices: string[], kernelArgs: string, modules: string[]): Contender => ({
    name: `QEMU, ${name}`,
    start: async (bdf) => {
      const device = ["-device", `vfio-pci,host=${bdf},${QEMU_ADDRESS}`];
      return (await QemuBeside.start(host, [...devices, ...device], guest(modules, module), kernelArgs))
        .process;
    },
  });
  const virtio = ["-device", "virtio-iommu-pci,addr=2.0"];
  const intel = ["-device", "intel-iommu,intremap=on,caching-mode=on"];
  // virtio_pci is built in.
  const virtioModules = ["virtio-iommu"];
  const contenders: Contender[] = [
    ours("pinned"),
    ours("cached"),
    ours("lazy"),
    ours("strict"),
    qemu("pinned", [], "", []),
    qemu("virtio-iommu lazy", virtio, "iommu.strict=0", virtioModules),
    qemu("virtio-iommu strict", virtio, "iommu.strict=1", virtioModules),
    qemu("intel-iommu strict", intel, "intel_iommu=on iommu.strict=1", []),
  ];
  if (contenders.length !== disks.length) throw new Error("not a disk for each contender");
  /** One of ours, one of QEMU's: they take their turns in this order, another one first each time. */
  const order = contenders.map((_, n) => (n % 2 === 0 ? n / 2 : (n - 1 + contenders.length) / 2));
  /** By measure and contender, a figure a start. */
  const results = new Map(MEASURES.map(({ word }) => [word, contenders.map((): number[] => [])]));

  /** What comes of a measurement; an error says whose it is. */
  const measureOf = async <T>(who: number, measurement: Promise<T>): Promise<T> => {
    try {
      return await measurement;
    } catch (error) {
      throw new Error(`${contenders[who]!.name}: ${(error as Error).message}`, { cause: error });
    }
  };

  const vmms: HostProcess[] = [];
  for (const [who, { name, start }] of contenders.entries()) {
    progress(`  ${name} starts`);
    const bdf = l1Bdf.moreNvme(who);
    await bindVfio(host, bdf);
    const vmm = await start(bdf);
    await vmm.waitFor(/^guest: ready\r?\n/m, TIMEOUT_MS, "stdout");
    await sh(vmm, "wait_disk", TIMEOUT_MS);
    await measureOf(who, measureModule(vmm, WARM_UP.ms));
    await measureOf(who, measureDisk(vmm, WARM_UP.seconds));
    vmms.push(vmm);
  }
  for (let turn = 1; turn <= ROUNDS * TURNS; turn++) {
    const add = (word: Word, who: number, value: number) => results.get(word)![who]!.push(value);
    const first = turn % order.length;
    const turns = [...order.slice(first), ...order.slice(0, first)];
    for (let n = 0; n < MODULE_STARTS; n++) {
      for (const who of turns) {
        const { pair, list } = await measureOf(who, measureModule(vmms[who]!, MODULE_MS));
        add("pair", who, pair);
        add("list", who, list);
      }
    }
    for (let n = 0; n < FIO_STARTS; n++) {
      for (const who of turns) {
        add("iops", who, await measureOf(who, measureDisk(vmms[who]!, FIO_SECONDS)));
      }
    }
    for (const { word, name, unit, starts } of MEASURES) {
      const figures = contenders.map(
        ({ name }, who) => `${name} ${figure(median(results.get(word)![who]!.slice(-starts)))}`,
      );
      progress(`  turn ${turn} of ${ROUNDS * TURNS}: ${name}: ${figures.join(", ")} ${unit}`);
    }
  }
  const rows = (word: Word): Row => ({
    name: MEASURES.find((measure) => measure.word === word)!.name,
    bars: contenders.map(({ name }, who) => ({ contender: name, values: results.get(word)![who]! })),
  });
  const peers = {
    best: "the best vIOMMU",
    contenders: contenders.map(({ name }) => name).filter((name) => /iommu/.test(name)),
  };
  const about =
    "An assigned NVMe controller, guest kernel 6.12, 1 vCPU, 512 MiB of RAM in huge pages, after a warm-up. " +
    "All guests are there at once, each with a controller of its own, and take turns of seconds. " +
    "Lazy with lazy_ms=500: a call takes several hundred microseconds here, and its 10 ms would be over before a page's turn " +
    "came again.";
  const sections: Section[] = [
    {
      id: "dma",
      title: "What a map and its unmap cost a driver",
      about:
        `${about} The same module over the plain DMA API in every guest; 64 pages, every second one of a block; ` +
        `${ROUNDS * TURNS * MODULE_STARTS} starts.`,
      unit: "µs",
      better: "less",
      reference: "pvdma, pinned",
      peers,
      rows: [rows("pair"), rows("list")],
    },
    {
      id: "dma-iops",
      title: "What is left of the disk's speed",
      about: `${about} fio with io_uring; ${ROUNDS * TURNS * FIO_STARTS} starts.`,
      unit: "I/Os per second",
      better: "more",
      reference: "pvdma, pinned",
      peers,
      rows: [rows("iops")],
    },
  ];
  present({ sections: inLab(sections) });
} finally {
  await host.close();
  files.remove();
}
