// What a strict guest may cost and what it may not reach: without the module, with everything pinned, larger than its
// host.

import * as assert from "uvu/assert";
import { buildGuestImage } from "./guest.js";
import { PRELUDE, READ_ALL } from "./scripts.js";
import { LabSuite, MiB } from "./support.js";

const MEMORY_BYTES = 512 * MiB;

const lab = new LabSuite("limits", { diskBytes: 16 * MiB });

lab.test("without the module the device reaches nothing, and guest and VMM live on", async () => {
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
  const before = await lab.iommuFaults();
  const vmm = await lab.start(image);
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
  assert.ok((await lab.iommuFaults()).length > before.length, "the IOMMU refused the device");
});

lab.test("--dma pinned locks all of the guest's memory, and needs no module", async () => {
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
  const vmm = await lab.start("--dma", "pinned", image);
  await lab.checkHash(await vmm.guestSays("hash"));
  await vmm.guestSays("ready");
  const locked = await vmm.lockedBytes();
  assert.ok(locked >= MEMORY_BYTES && locked < MEMORY_BYTES + 16 * MiB, `locked: ${locked} bytes`);
  vmm.goOn();
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.is(stats.get("dma/peak_pinned_bytes"), MEMORY_BYTES);
  assert.is(stats.get("dma/pinned_bytes"), 0, "after the end");
});

lab.test("a guest of 8 GiB runs on a host of 3 GiB", async () => {
  const { stdout } = await lab.host.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
  if (lab.host.kind === "l1") assert.ok(Number(stdout) < 3 * 2 ** 20, `the host has ${stdout.trim()} KiB`);
  const image = await buildGuestImage({
    script: `${READ_ALL}
say memory $(awk '/^MemTotal/ { print $2 }' /proc/meminfo)
`,
  });
  const vmm = await lab.start("--memory", "8G", image);
  await lab.checkHash(await vmm.guestSays("hash"));
  assert.ok(Number(await vmm.guestSays("memory")) > 7.5 * 2 ** 20);
  const { status, script } = await vmm.end();
  assert.is(status, 0);
  assert.is(script, 0);
});

lab.run();
