// What a strict guest may cost and what it may not reach: without the module, with everything pinned, larger than its
// host, and killed in the middle of I/O.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { scratchDir } from "./cache.js";
import { buildGuestImage } from "./guest.js";
import type { Host } from "./host.js";
import { openHost } from "./open.js";
import { PRELUDE, READ_ALL } from "./scripts.js";
import { labTest, MiB, RunningVmm, randomDisk, sha256OfFile } from "./support.js";

const DISK_BYTES = 16 * MiB;
const MEMORY_BYTES = 512 * MiB;

const test = suite("limits");
const files = scratchDir();
let host: Host;
let bdf: string;
let disk: string;

test.before(async () => {
  disk = randomDisk(files.path, "disk.raw", DISK_BYTES);
  ({ host, bdf } = await openHost({ nvme0: { file: disk }, name: "limits" }));
});
test.after(async () => {
  await host?.close();
  files.remove();
});
const lab = (name: string, body: () => Promise<void>) => labTest(test, name, () => host, body);

/** What the disk holds, where the host is an L1; a real device is read by the guest alone. */
const diskHash = async (): Promise<string | undefined> =>
  host.kind === "l1" ? sha256OfFile(disk) : undefined;

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
  assert.is(stats.get("dma/pinned_bytes"), 0, "after the end");
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
    const { stdout } = await host.run("echo 1 > /proc/sys/vm/stat_refresh; grep nr_foll_pin /proc/vmstat");
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
  const hash = await again.guestSays("hash");
  const content = await diskHash();
  if (content !== undefined) assert.is(hash, content);
  assert.is((await again.end()).status, 0);
});

test.run();
