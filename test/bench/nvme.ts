// The emulated NVMe disk beside QEMU's, under the same guest kernel, over the same file in the same host: sequential
// reads and writes of 128 KiB, random ones of 4 KiB. Rounds are interleaved, and what counts is the ratio of medians
// within one run: in the lab absolute figures say little. `node build/test/bench/nvme.js [ROUNDS]`

import { buildGuestImage, type GuestOptions } from "../lab/guest.js";
import { type HostProcess, must } from "../lab/host.js";
import { bootL1 } from "../lab/l1.js";
import { QemuBeside } from "../lab/qemu.js";
import { PRELUDE } from "../lab/scripts.js";
import { MiB, RunningVmm } from "../lab/support.js";
import { present, progress } from "./program.js";
import { figure } from "./report.js";

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

const host = await bootL1({ name: "bench-nvme", say: progress });
try {
  await must(host, `dd if=/dev/urandom of=${DISK} bs=1M count=${DISK_MIB} 2> /dev/null`, {
    timeoutMs: 600_000,
  });
  const qemuVersion = await must(
    host,
    "qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \\([0-9.]*\\).*/\\1/p'",
  );
  const ours = async (policy: string): Promise<HostProcess> => {
    const image = await buildGuestImage(guest(policy !== "pinned"));
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
    ...["pinned", "cached", "strict"].map((policy) => ({
      name: `pvdma, ${policy}`,
      start: () => ours(policy),
    })),
  ];
  /** MiB per second by load and contender. */
  const results = LOADS.map(() => contenders.map((): number[] => []));
  for (let round = 0; round < ROUNDS; round++) {
    for (const [who, contender] of contenders.entries()) {
      const vmm = await contender.start();
      for (const [load, { name }] of LOADS.entries()) {
        const pattern = new RegExp(`^guest: load${load} (\\d+)\\r?\\n`, "m");
        const [, bytes] = await vmm.waitFor(pattern, 300_000, "stdout");
        const mibs = Number(bytes) / MiB;
        results[load]![who]!.push(mibs);
        progress(`  round ${round + 1} of ${ROUNDS}: ${contender.name}, ${name}: ${figure(mibs)} MiB/s`);
      }
      await vmm.exited;
    }
  }
  present({
    measuredOn: { "QEMU, peer and the lab's hardware": qemuVersion.trim() },
    sections: [
      {
        id: "nvme",
        title: "The emulated NVMe disk, ours and QEMU's",
        about:
          `fio with io_uring in the same guest (kernel 6.12, 1 vCPU, 512 MiB), ${SECONDS} s a load, over the same file of ` +
          `${DISK_MIB} MiB in the host's memory. Ours behind the software IOMMU: with all of the guest's memory mapped ` +
          "(pinned), and with the module, which makes no call for what is still mapped (cached) or one for each map and " +
          "unmap (strict). QEMU's disk reaches all memory.",
        unit: "MiB/s",
        better: "more",
        reference: "QEMU",
        rows: LOADS.map(({ name }, load) => ({
          name,
          bars: contenders.map((contender, who) => ({
            contender: contender.name,
            values: results[load]![who]!,
          })),
        })),
      },
    ],
  });
} finally {
  await host.close();
}
