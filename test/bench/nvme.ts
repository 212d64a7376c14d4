// The emulated NVMe disk beside QEMU's, under the same guest kernel, over files in the same host: sequential
// reads and writes of 128 KiB, random ones of 4 KiB. Rounds are interleaved, and what counts is the ratio of medians
// within one run: in the lab absolute figures say little. `node build/test/bench/nvme.js [ROUNDS]`

import { buildGuestImage, type GuestOptions } from "../lab/guest.js";
import { type HostProcess, must } from "../lab/host.js";
import { bootL1 } from "../lab/l1.js";
import { QemuBeside } from "../lab/qemu.js";
import { CONSOLE } from "../lab/scripts.js";
import { MiB, RunningVmm, sh } from "../lab/support.js";
import { inLab, present, progress } from "./program.js";
import { figure, type Section } from "./report.js";

const ROUNDS = Number(process.argv[2] ?? 3);
/** Of a round: each load by each contender, for so long. */
const TURNS = 4;
const SECONDS = 2;
/** A program in JavaScript is slow until it has been run for a while, and in the lab that takes longer. */
const WARM_UP_SECONDS = 5;
const DISK_MIB = 64;
const TIMEOUT_MS = 300_000;

const LOADS = [
  { name: "read 128K", options: "--rw=read --bs=128k --iodepth=8" },
  { name: "write 128K", options: "--rw=write --bs=128k --iodepth=8" },
  { name: "randread 4K", options: "--rw=randread --bs=4k --iodepth=32" },
  { name: "randwrite 4K", options: "--rw=randwrite --bs=4k --iodepth=32" },
];

/** Takes its commands from its console. */
const guest = (module: boolean): GuestOptions => ({
  script: `${module ? "modprobe pvdma || exit 1" : ""}\nmodprobe nvme || exit 1\n${CONSOLE}`,
  tools: ["fio"],
});

/** A guest that runs, and the MiB per second that it got, by load. */
interface Contender {
  readonly name: string;
  readonly vmm: HostProcess;
  readonly results: readonly number[][];
}

/** MiB per second of a load. */
async function measure(vmm: HostProcess, options: string, seconds: number): Promise<number> {
  const fio = `fio_json --name=load --filename=/dev/nvme0n1 --time_based --runtime=${seconds} ${options}`;
  const sum = `awk '/"bw_bytes" :/ { sum += $3 } END { printf "%d", sum }' /tmp/fio`;
  return Number(await sh(vmm, `${fio} && ${sum}`, TIMEOUT_MS)) / MiB;
}

// Large pages as QEMU's guests have them, whose RAM is anonymous memory.
const host = await bootL1({ name: "bench-nvme", hugePages: true, say: progress });

async function qemu(disk: string): Promise<HostProcess> {
  const drive = `if=none,id=disk,format=raw,cache=writeback,file=${disk}`;
  const devices = ["-drive", drive, "-device", "nvme,drive=disk,serial=disk"];
  return (await QemuBeside.start(host, devices, guest(false))).process;
}

async function ours(policy: string, disk: string): Promise<HostProcess> {
  const image = await buildGuestImage(guest(policy !== "pinned"));
  return (await RunningVmm.start(host, ["--dma", policy, "--assign", `emul:nvme,file=${disk}`, image]))
    .process;
}

try {
  const contenders: Contender[] = [];
  for (const policy of ["QEMU", "pinned", "cached", "strict"]) {
    const name = policy === "QEMU" ? policy : `pvdma, ${policy}`;
    progress(`  ${name} starts`);
    const disk = `/tmp/${policy}.raw`;
    await must(host, `dd if=/dev/urandom of=${disk} bs=1M count=${DISK_MIB} 2> /dev/null`, {
      timeoutMs: TIMEOUT_MS,
    });
    const vmm = await (policy === "QEMU" ? qemu(disk) : ours(policy, disk));
    await vmm.waitFor(/^guest: ready\r?\n/m, TIMEOUT_MS, "stdout");
    await sh(vmm, "wait_disk", TIMEOUT_MS);
    for (const { options } of LOADS) await measure(vmm, options, WARM_UP_SECONDS);
    contenders.push({ name, vmm, results: LOADS.map(() => []) });
  }
  for (let turn = 0; turn < ROUNDS * TURNS; turn++) {
    for (const [load, { name, options }] of LOADS.entries()) {
      for (const { vmm, results } of contenders) results[load]!.push(await measure(vmm, options, SECONDS));
      const figures = contenders.map((each) => `${each.name} ${figure(each.results[load]!.at(-1)!)}`);
      progress(`  turn ${turn + 1} of ${ROUNDS * TURNS}: ${name}: ${figures.join(", ")} MiB/s`);
    }
  }
  const sections: Section[] = [
    {
      id: "nvme",
      title: "The emulated NVMe disk, ours and QEMU's",
      about:
        `fio with io_uring in the same guest (kernel 6.12, 1 vCPU, 512 MiB), after a warm-up, over a file of ${DISK_MIB} MiB ` +
        `in the host's memory. All guests are there at once and take turns of ${SECONDS} s: medians of ${ROUNDS * TURNS}. ` +
        "Ours behind the software IOMMU: with all of the guest's memory mapped " +
        "(pinned), and with the module, which makes no call for what is still mapped (cached) or one for each map and " +
        "unmap (strict). QEMU's disk reaches all memory.",
      unit: "MiB/s",
      better: "more",
      reference: "QEMU",
      rows: LOADS.map(({ name }, load) => ({
        name,
        bars: contenders.map(({ name, results }) => ({ contender: name, values: results[load]! })),
      })),
    },
  ];
  present({ sections: inLab(sections) });
} finally {
  await host.close();
}
