// The main job in the lab: stock guests drive a really assigned NVMe controller through map and unmap calls.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { scratchDir } from "./cache.js";
import { buildGuestImage, buildModule } from "./guest.js";
import type { Host } from "./host.js";
import { openHost } from "./open.js";
import { getKernel, type KernelSeries } from "./packages.js";
import { bootTimeoutMs, labTest, MiB, RunningVmm, randomDisk, sha256OfFile } from "./support.js";

const DISK_BYTES = 32 * MiB;
const MEMORY_BYTES = 512 * MiB;

/** Functions for the guests' scripts. */
const PRELUDE = `
say() { echo "guest: $*"; }
fail() { say "failed $*"; dmesg | tail -n 30; exit 1; }
wait_disk() {
  tries=0
  while [ ! -b /dev/nvme0n1 ]; do
    tries=$((tries + 1)); [ $tries -gt 600 ] && fail "no /dev/nvme0n1"
    sleep 0.1
  done
}
hash() { sha256sum /dev/nvme0n1 | cut -d ' ' -f 1; }
`;

const READ_ALL = `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
wait_disk
say hash $(hash)
`;

const READ_AND_WRITE = `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
wait_disk
say cpus $(nproc)
say hash $(hash)
say fio
fio --name=v --filename=/dev/nvme0n1 --rw=randwrite --bs=4k --size=8M --ioengine=io_uring --iodepth=16 --direct=1 \\
  --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/tmp/fio --output-format=json || { cat /tmp/fio; fail fio; }
say verified $(grep -c . /tmp/fio) $(grep -m1 '"error"' /tmp/fio)
sync
echo 3 > /proc/sys/vm/drop_caches
say rehash $(hash)
# The host bridge is not assigned: a driver bound to it gets no ops of ours, and the host one question about it.
modprobe pci-stub
echo 1b36 0008 > /sys/bus/pci/drivers/pci-stub/new_id
for i in 1 2 3; do
  echo 0000:00:00.0 > /sys/bus/pci/drivers/pci-stub/unbind
  echo 0000:00:00.0 > /sys/bus/pci/drivers/pci-stub/bind
done
modprobe dmaprobe
dmesg | sed -n 's/.*dmaprobe: /guest: probe /p'
modprobe -r dmaprobe pci-stub
say before $(cat /sys/kernel/debug/pvdma/*/outstanding)
modprobe -r nvme || fail "nvme does not unload"
modprobe -r pvdma || fail "pvdma does not unload"
say unloaded
read -r line
say bad $(dmesg | grep -cE 'BUG|WARNING|Oops|DMA-API|left behind')
`;

const test = suite("assign");
const files = scratchDir();
let host: Host;
let bdf: string;
let disk: string;

test.before(async () => {
  disk = randomDisk(files.path, "disk.raw", DISK_BYTES);
  ({ host, bdf } = await openHost({ nvme0: { file: disk }, name: "assign" }));
});
test.after(async () => {
  await host?.close();
  files.remove();
});
const lab = (name: string, body: () => Promise<void>) => labTest(test, name, () => host, body);

/** What the disk holds, where the host is an L1; a real device is read by the guest alone. */
const diskHash = async (): Promise<string | undefined> =>
  host.kind === "l1" ? sha256OfFile(disk) : undefined;

async function fullImage(kernel: KernelSeries): Promise<string> {
  const { file } = await buildModule(await getKernel(kernel), "test/modules", "dmaprobe");
  return buildGuestImage({
    kernel,
    script: READ_AND_WRITE,
    modules: ["nvme", "pci-stub"],
    moduleFiles: [file],
    tools: ["fio"],
  });
}

for (const kernel of ["6.1", "6.12"] as const) {
  for (const cpus of [1, 4]) {
    lab(
      `a ${kernel} guest with ${cpus} vCPUs reads and writes the whole disk, under 64 MiB locked`,
      async () => {
        const before = await diskHash();
        const image = await fullImage(kernel);
        const vmm = await RunningVmm.start(host, ["--assign", bdf, "--cpus", String(cpus), image]);
        assert.is(await vmm.guestSays("cpus"), String(cpus));
        const hash = await vmm.guestSays("hash");
        if (before !== undefined) assert.is(hash, before, "the guest read what the disk holds");

        await vmm.guestSays("fio");
        let fioEnded = false;
        const verified = vmm.guestSays("verified").finally(() => {
          fioEnded = true;
        });
        const locked: number[] = [];
        while (!fioEnded) {
          const bytes = await vmm.lockedBytes();
          if (!fioEnded) locked.push(bytes);
        }
        assert.match(await verified, /"error" : 0/, "fio verified without an error");
        assert.ok(locked.length >= 2 && Math.max(...locked) > 0, `locked memory was seen in use: ${locked}`);
        assert.ok(Math.max(...locked) < 64 * MiB, `locked while fio ran: ${Math.max(...locked)} bytes`);

        const rehash = await vmm.guestSays("rehash");
        assert.is.not(rehash, hash, "fio changed the disk");
        const probes = [
          await vmm.guestSays("probe"),
          await vmm.guestSays("probe"),
          await vmm.guestSays("probe"),
        ];
        assert.equal(probes, [
          "0000:00:00.0: no ops of its own",
          "0000:00:00.0: mapped one to one",
          "0000:00:01.0: ops of its own",
        ]);
        assert.ok(Number(await vmm.guestSays("before")) > 0, "the driver had mappings");
        await vmm.guestSays("unloaded");
        assert.is(await vmm.lockedBytes(), 0, "locked after the modules were unloaded");
        vmm.goOn();
        assert.is(await vmm.guestSays("bad"), "0", "no warning in the guest's kernel log");

        const { status, script, stats } = await vmm.end();
        assert.is(status, 0, "the VMM's exit status");
        assert.is(script, 0, "the script's exit status");
        assert.is(
          stats.get("hypercalls/is_assigned/calls"),
          2,
          "one question per device: NVMe and host bridge",
        );
        assert.is(stats.get("dma/pinned_bytes"), 0);
        assert.is(stats.get("dma/mapped_bytes"), 0);
        const errors = ["probe", "is_assigned", "map", "unmap", "map_list", "unmap_list"].map((call) =>
          stats.get(`hypercalls/${call}/errors`),
        );
        assert.equal(errors, [0, 0, 0, 0, 0, 0]);
        assert.ok((stats.get("hypercalls/map/calls") ?? 0) > 1000, "every I/O was a map call");
        const after = await diskHash();
        if (after !== undefined) assert.is(after, rehash, "the disk's file holds what the guest wrote");
      },
    );
  }
}

lab("without the module the device reaches nothing, and guest and VMM live on", async () => {
  const image = await buildGuestImage({
    pvdma: false,
    script: `${PRELUDE}
modprobe nvme_core admin_timeout=3
modprobe nvme
sleep 12
say disk $([ -b /dev/nvme0n1 ] && echo there || echo none)
dmesg | grep -i nvme | sed 's/^/guest: log /'
say alive $(cat /proc/uptime)
`,
  });
  const logged = (await host.kernelLog()).length;
  const vmm = await RunningVmm.start(host, ["--assign", bdf, image]);
  assert.is(await vmm.guestSays("disk"), "none");
  await vmm.guestSays("alive");
  const { status, script, stats } = await vmm.end();
  assert.is(status, 0, "the VMM's exit status");
  assert.is(script, 0, "the script's exit status");
  assert.match(
    vmm.process.stdout,
    /guest: log .*nvme.*(Device not ready|timeout|failed|error)/i,
    "the driver's own error",
  );
  assert.is(stats.get("hypercalls/map/calls"), 0);
  assert.is(stats.get("dma/peak_pinned_bytes"), 0);
  const log = (await host.kernelLog()).slice(logged);
  assert.match(log, new RegExp(`DMAR: \\[DMA (Read|Write).*${bdf.slice(5)}`), "the IOMMU refused the device");
});

lab("--dma pinned locks all of the guest's memory, and needs no module", async () => {
  const image = await buildGuestImage({
    pvdma: false,
    script: `${PRELUDE}
modprobe nvme
wait_disk
say hash $(hash)
say ready
read -r line
`,
  });
  const vmm = await RunningVmm.start(host, ["--assign", bdf, "--dma", "pinned", image]);
  const hash = await vmm.guestSays("hash");
  const before = await diskHash();
  if (before !== undefined) assert.is(hash, before);
  await vmm.guestSays("ready");
  const locked = await vmm.lockedBytes();
  assert.ok(locked >= MEMORY_BYTES && locked < MEMORY_BYTES + 16 * MiB, `locked: ${locked} bytes`);
  vmm.goOn();
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.is(stats.get("dma/peak_pinned_bytes"), MEMORY_BYTES);
  assert.is(stats.get("dma/pinned_bytes"), MEMORY_BYTES, "until the guest ends");
});

lab("a guest of 8 GiB runs on a host of 3 GiB", async () => {
  const { stdout } = await host.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
  if (host.kind === "l1") assert.ok(Number(stdout) < 3 * 2 ** 20, `the host has ${stdout.trim()} KiB`);
  const image = await buildGuestImage({
    script: `${READ_ALL}
say memory $(awk '/^MemTotal/ { print $2 }' /proc/meminfo)
`,
  });
  const vmm = await RunningVmm.start(host, ["--assign", bdf, "--memory", "8G", image]);
  const hash = await vmm.guestSays("hash");
  const before = await diskHash();
  if (before !== undefined) assert.is(hash, before);
  assert.ok(Number(await vmm.guestSays("memory")) > 7.5 * 2 ** 20);
  const { status, script } = await vmm.end();
  assert.is(status, 0);
  assert.is(script, 0);
});

lab("kill -9 in the middle of I/O leaves nothing, and the device can be had again at once", async () => {
  const image = await buildGuestImage({
    script: `${READ_ALL}
say busy
while true; do dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2> /dev/null; done
`,
  });
  /** Pages pinned for the long term, less those given back, over the host's whole life. */
  const pinned = async () => {
    const { stdout } = await host.run("grep nr_foll_pin /proc/vmstat");
    const [acquired, released] = [...stdout.matchAll(/\d+$/gm)].map((match) => Number(match[0]));
    return acquired! - released!;
  };
  const idle = await pinned();
  const vmm = await RunningVmm.start(host, ["--assign", bdf, "--cpus", "2", image]);
  await vmm.guestSays("busy");
  assert.ok((await pinned()) > idle, "pages are pinned during I/O");
  vmm.process.kill("SIGKILL");
  assert.is(await vmm.process.exited, 128 + 9);
  assert.is(await pinned(), idle, "pins left behind");
  const { stdout } = await host.run('pgrep -f "[d]ist/vmm.js" || true');
  assert.is(stdout.trim(), "", "processes left behind");

  const again = await RunningVmm.start(host, ["--assign", bdf, await buildGuestImage({ script: READ_ALL })]);
  const hash = await again.guestSays("hash", bootTimeoutMs);
  const content = await diskHash();
  if (content !== undefined) assert.is(hash, content);
  assert.is((await again.end()).status, 0);
});

test.run();
