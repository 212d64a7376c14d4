// The emulated NVMe disk beside QEMU's, under the same guest kernel, over the same file in the same host: sequential
// reads and writes of 128 KiB, random ones of 4 KiB. Rounds are interleaved, and what counts is the ratio of medians
// within one run: in the lab absolute figures say little. `node build/test/bench/beside.js [ROUNDS]`

import { buildGuestImage, type GuestOptions } from "../lab/guest.js";
import { type HostProcess, must } from "../lab/host.js";
import { bootL1 } from "../lab/l1.js";
import { QemuBeside } from "../lab/qemu.js";
import { PRELUDE } from "../lab/scripts.js";
import { RunningVmm } from "../lab/support.js";

const ROUNDS = Number(process.argv[2] ?? 3);
const SECONDS = 5;
const DISK = "/tmp/disk.raw";
const DISK_MIB = 256;

const LOADS = [
  { name: "read 128K", options: "--rw=read --bs=128k --iodepth=8" },
  { name: "write 128K", options: "--rw=write --bs=128k --iodepth=8" },
  { name: "randread 4K", options: "--rw=randread --bs=4k --iodepth=32" },
  { name: "randwrite 4K", options: "--rw=randwrite --bs=4k --iodepth=32" },
];

const guest = (module: boolean): GuestOptions => ({
  script: `${PRELUDE}
${module ? "modprobe pvdma || fail pvdma" : ""}
modprobe nvme || fail nvme
wait_disk
load() {
  fio --name=load --filename=/dev/nvme0n1 --ioengine=io_uring --direct=1 --time_based --runtime=${SECONDS} "$@" \\
    --eta=never --output=/tmp/fio --output-format=json || { cat /tmp/fio; fail fio; }
  awk '/"bw_bytes" :/ { sum += $3 } END { printf "%d\\n", sum }' /tmp/fio
}
${LOADS.map(({ options }, i) => `say load${i} $(load ${options})`).join("\n")}
`,
  tools: ["fio"],
});

interface Contender {
  readonly name: string;
  start(): Promise<HostProcess>;
}

const host = await bootL1({ name: "bench-nvme", say: (line) => console.error(line) });
try {
  await must(host, `dd if=/dev/urandom of=${DISK} bs=1M count=${DISK_MIB} 2> /dev/null`, {
    timeoutMs: 600_000,
  });
  const ours = async (policy: string): Promise<HostProcess> => {
    const image = await buildGuestImage(guest(policy === "strict"));
    return (await RunningVmm.start(host, ["--dma", policy, "--assign", `emul:nvme,file=${DISK}`, image]))
      .process;
  };
  const contenders: Contender[] = [
    {
      name: "QEMU",
      start: async () => {
        const drive = `if=none,id=disk,format=raw,cache=writeback,file=${DISK}`;
        const devices = ["-drive", drive, "-device", "nvme,drive=disk,serial=disk"];
        return (await QemuBeside.start(host, devices, guest(false))).process;
      },
    },
    { name: "pvdma, pinned", start: () => ours("pinned") },
    { name: "pvdma, strict", start: () => ours("strict") },
  ];
  /** Bytes per second by contender and load. */
  const results = contenders.map(() => LOADS.map((): number[] => []));
  for (let round = 0; round < ROUNDS; round++) {
    for (const [who, contender] of contenders.entries()) {
      const vmm = await contender.start();
      for (let load = 0; load < LOADS.length; load++) {
        const pattern = new RegExp(`^guest: load${load} (\\d+)\\r?\\n`, "m");
        const [, bytes] = await vmm.waitFor(pattern, 300_000, "stdout");
        results[who]![load]!.push(Number(bytes));
        console.error(
          `round ${round + 1} of ${ROUNDS}: ${contender.name}, ${LOADS[load]!.name}: ${mibs(Number(bytes))} MiB/s`,
        );
      }
      await vmm.exited;
    }
  }
  for (const [load, { name }] of LOADS.entries()) {
    const peer = median(results[0]![load]!);
    console.log(name);
    for (const [who, contender] of contenders.entries()) {
      const all = results[who]![load]!;
      const spread = `${mibs(Math.min(...all))} to ${mibs(Math.max(...all))}`;
      const ratio = (median(all) / peer).toFixed(2);
      console.log(
        `  ${contender.name.padEnd(14)} ${mibs(median(all)).padStart(8)} MiB/s  (${spread})  ${ratio} of QEMU`,
      );
    }
  }
} finally {
  await host.close();
}

function mibs(bytes: number): string {
  return (bytes / 2 ** 20).toFixed(2);
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!;
}
