// `npm start`: the whole thing once, to look at. A stock Debian guest in our VMM drives a really assigned NVMe
// controller in the lab; at the end, what was read, what it cost and what was pinned. Exits non-zero if anything
// is not as it should be.

import { createHash, randomFillSync } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { scratchDir } from "./cache.js";
import { buildGuestImage, guestEnd } from "./guest.js";
import { bindVfio } from "./host.js";
import { bootL1, l1Bdf } from "./l1.js";
import { readStats } from "./support.js";

const diskBytes = 64 << 20;
const ramBytes = 512 << 20;
const guestTimeoutMs = 300_000;

const script = `
echo "guest: Linux $(uname -r), $(nproc) CPU, $(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB"
modprobe pvdma || exit 1
modprobe nvme || exit 1
tries=0
while [ ! -b /dev/nvme0n1 ]; do
  tries=$((tries + 1))
  if [ $tries -gt 300 ]; then echo "guest: no /dev/nvme0n1"; dmesg | tail; exit 1; fi
  sleep 0.1
done
echo "guest: /dev/nvme0n1 is there, $(cat /sys/block/nvme0n1/size) sectors, after $(cut -d ' ' -f 1 /proc/uptime) s"
sha256sum /dev/nvme0n1 || exit 1
echo "guest: read after $(cut -d ' ' -f 1 /proc/uptime) s; what its module counted:"
cd /sys/kernel/debug/pvdma 2>/dev/null && for f in $(find . -type f | sort); do echo "  \${f#./} $(cat $f)"; done
exit 0
`;

const steps = 6;
let step = 0;
const started = Date.now();
function progress(what: string): void {
  console.log(`[${++step}/${steps}] ${what}`);
}

function mib(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(2)} MiB`;
}

async function demo(): Promise<boolean> {
  const files = scratchDir();
  progress("making guest.img: stock kernel 6.12, nvme and pvdma modules, one script");
  const image = await buildGuestImage({ kernel: "6.12", script, asShipped: true });

  progress(`making a disk of ${mib(diskBytes)} with random content`);
  const content = randomFillSync(Buffer.alloc(diskBytes));
  const file = join(files.path, "disk.raw");
  writeFileSync(file, content);
  const fileHash = createHash("sha256").update(content).digest("hex");

  progress(`booting the lab's host, with the disk as NVMe controller ${l1Bdf.nvme0} behind its IOMMU`);
  const l1 = await bootL1({ nvme0: { file }, name: "start", say: (line) => console.log(`      ${line}`) });
  try {
    console.log(`      Linux ${l1.kernel.abi}, up after ${(l1.bootMs / 1000).toFixed(1)} s`);
    progress("binding it to vfio-pci");
    await bindVfio(l1, l1Bdf.nvme0);

    const command = `node dist/vmm.js --assign ${l1Bdf.nvme0} --memory ${ramBytes >> 20}M --stats`;
    progress(`${command} guest.img`);
    const guestStarted = Date.now();
    const vmm = await l1.spawn(`exec ${command} '${image}'`, {
      onOutput: (bytes, stream) => {
        if (stream === "stdout") process.stdout.write(bytes);
      },
    });
    const timer = setTimeout(() => vmm.kill("SIGKILL"), guestTimeoutMs);
    const status = await vmm.exited;
    clearTimeout(timer);
    const guestSeconds = (Date.now() - guestStarted) / 1000;

    progress("what came of it");
    const stats = readStats(vmm.stderr);
    const guestStatus = guestEnd.exec(vmm.stdout)?.[1];
    const guestHash = /^([0-9a-f]{64}) {2}\/dev\/nvme0n1\r?$/m.exec(vmm.stdout)?.[1];
    const equal = guestHash === fileHash;
    const pinned = stats.get("dma/peak_pinned_bytes");
    const calls = [...stats].flatMap(([name, count]) => {
      const call = /^hypercalls\/([^/]+)\/calls$/.exec(name)?.[1];
      return call === undefined ? [] : [{ call, count }];
    });
    const total = calls.reduce((sum, { count }) => sum + count, 0);
    const each = calls.filter(({ count }) => count > 0).map(({ call, count }) => `${call} ${count}`);
    console.log(`
  SHA-256 as the guest read it   ${guestHash ?? "none"}
  SHA-256 of the disk's file     ${fileHash}   ${equal ? "equal" : "NOT EQUAL"}
  hypercalls                     ${calls.length === 0 ? "unknown" : `${total} (${each.join(", ")})`}
  pinned at the most             ${pinned === undefined ? "unknown" : `${mib(pinned)} of ${mib(ramBytes)} of guest RAM (${((100 * pinned) / ramBytes).toFixed(2)} %)`}
  time                           ${((Date.now() - started) / 1000).toFixed(1)} s, of which the guest ${guestSeconds.toFixed(1)} s
`);
    const wrong: string[] = [];
    if (status !== 0)
      wrong.push(`the VMM ended with exit status ${status}: ${vmm.stderr.trim().split("\n").at(-1) ?? ""}`);
    if (guestStatus !== "0")
      wrong.push(
        guestStatus === undefined
          ? "the guest's script did not end"
          : `the guest's script ended with ${guestStatus}`,
      );
    if (!equal) wrong.push("the guest did not read what is on the disk");
    if (calls.length === 0 || pinned === undefined) wrong.push("the VMM printed no statistics");
    for (const problem of wrong) console.error(`FAILED: ${problem}`);
    if (wrong.length > 0) console.error(`the host's console is in ${l1.saveLog()}`);
    return wrong.length === 0;
  } finally {
    await l1.close();
    files.remove();
  }
}

try {
  if (!(await demo())) process.exitCode = 1;
} catch (error) {
  console.error(`FAILED: ${(error as Error).message}`);
  process.exitCode = 1;
}
