// Devices that misbehave or die under a running guest: accesses that the IOMMU refuses, a device that the host takes
// back in the middle of I/O, one that fails. None of it ends the guest, nor touches its other devices.

import { connect } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import type { PolicyName } from "../../hypercalls/abi.js";
import { buildTestGuest } from "../guest/build.js";
import { SOAK } from "../soak.js";
import { scratchDir } from "./cache.js";
import { buildGuestImage } from "./guest.js";
import { bindDriver, bindVfio, must } from "./host.js";
import { bootL1, type L1, l1Bdf } from "./l1.js";
import { PRELUDE } from "./scripts.js";
import { labTest, MiB, RunningVmm, randomDisk, sha256OfFile } from "./support.js";

const { nvme0, nvme1, edu, pair } = l1Bdf;
/**
 * Fails on demand, where L1's fifth port is. Of QEMU's devices only virtio's can both be told to report errors and have
 * some injected.
 */
const failing = l1Bdf.e1000e;
const FAILING_DEVICE = "virtio-rng-pci,id=failing,bus=port5,aer=on,disable-legacy=on,iommu_platform=on";
/** An unbind waits until the VMM looks, which it does every 250 ms. */
const UNBIND_MS = 10_000;

const test = suite("dying");
const files = scratchDir();
const monitor = join(files.path, "monitor");
const disk = (name: string) => randomDisk(files.path, name, 4 * MiB);
const disks = { nvme0: disk("nvme0"), nvme1: disk("nvme1"), pair: disk("pair") };
let host: L1;

test.before(async () => {
  host = await bootL1({
    nvme0: { file: disks.nvme0 },
    nvme1: { file: disks.nvme1 },
    pair: { file: disks.pair },
    edu: true,
    qemuArgs: ["-device", FAILING_DEVICE, "-monitor", `unix:${monitor},server=on,wait=off`],
    name: "dying",
    hugePages: true,
  });
  for (const bdf of [nvme0, nvme1, edu, failing, ...pair]) await bindVfio(host, bdf);
});
test.after(async () => {
  await host?.close();
  files.remove();
});
const lab = (name: string, body: () => Promise<void>) => labTest(test, name, () => host, body);

/** Has the host take a device from vfio-pci, which waits for the VMM to give it back. */
async function unbind(bdf: string): Promise<void> {
  const begun = Date.now();
  await must(host, `echo ${bdf} > /sys/bus/pci/drivers/vfio-pci/unbind`);
  assert.ok(Date.now() - begun < UNBIND_MS, `the unbind took ${Date.now() - begun} ms`);
}

/** What the VMM says of a device, but for the address, which is checked. */
function linesAbout(vmm: RunningVmm, bdf: string): string[] {
  const said = vmm.process.stderr.split("\n").filter((line) => line.startsWith("vmm: "));
  for (const line of said) assert.ok(line.startsWith(`vmm: ${bdf}: `), line);
  return said.map((line) => line.slice(`vmm: ${bdf}: `.length));
}

const TAKEN = "the host wants it back: it is taken from the guest, which goes on without it";

lab("accesses that the IOMMU refuses are counted, told once per burst, and end nothing", async () => {
  const image = await buildTestGuest("stray", host.shareDir);
  const vmm = await RunningVmm.start(host, ["--memory", "64M", "--assign", edu, image]);
  assert.is(await vmm.guestSays("wrong"), "0", "bytes wrong after a transfer there and back");
  await vmm.guestSays("strayed");
  vmm.goOn();
  assert.is(await vmm.guestSays("wrong"), "0", "the device works as before");
  // The burst is over when the host has been silent for 6 s.
  await vmm.process.waitFor(/more of its accesses were refused/, 60_000, "stderr");
  const during = (await vmm.statistics()).get("dma/faults")!;
  vmm.goOn();
  const stale = await vmm.guestSays("stale");
  await sleep(1000);
  vmm.goOn();
  await vmm.guestSays("alive");
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  const refused = (access: string, iova: string, right: string) =>
    `the IOMMU refused a ${access} at iova 0x${iova}: nothing is mapped there for it (PTE ${right} access is not set)`;
  assert.equal(linesAbout(vmm, edu), [
    refused("read", "2345000", "Read"),
    `${during - 1} more of its accesses were refused within a second, as far as the host logged them`,
    refused("write", stale, "Write"),
  ]);
  // Five more were made; the kernel tells no more than it likes.
  assert.ok(during >= 2 && during <= 6, `faults: ${during}`);
  assert.is(stats.get("dma/faults"), during + 1);
  assert.is(stats.get(`devices/${edu}/dma/faults`), during + 1);
});

async function takesBack(policy: PolicyName): Promise<void> {
  const [dying, neighbour] = pair;
  const image = await buildGuestImage({
    script: `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
at=/sys/bus/pci/devices/0000:00
wait_for() { for i in $(seq 300); do [ -e $1 ] && return; sleep 0.1; done; fail "no $1"; }
wait_for $at:01.0/nvme/nvme*/nvme*n1
wait_for $at:03.0/nvme/nvme*/nvme*n1
dying=/dev/$(basename $at:01.0/nvme/nvme*/nvme*n1)
other=/dev/$(basename $at:03.0/nvme/nvme*/nvme*n1)
wait_for $dying
wait_for $other
for i in 1 2 3 4; do
  (while dd if=$dying of=/dev/null bs=256k iflag=direct 2> /dev/null; do :; done; echo failed > /tmp/dd$i) &
done
sleep 1
say busy
read -r line
wait
say io $(cat /tmp/dd*)
# The last request fails before the kernel has taken the device out.
for i in $(seq 300); do [ -e $at:01.0 ] || break; sleep 0.1; done
say there $(ls -d $at:01.0)
say neighbour $(od -An -tx2 -N4 $at:02.0/config)
say hash $(sha256sum $other | cut -d ' ' -f 1)
say removed $(dmesg | grep -c '01.0: pvdma: the host no longer has this device: removed')
say bad $(dmesg | grep -cE 'BUG|WARNING|Oops|left behind')
`,
  });
  const before = await sha256OfFile(disks.nvme1);
  const vmm = await RunningVmm.start(host, [
    "--dma",
    policy,
    ...[dying, neighbour, nvme1].flatMap((bdf) => ["--assign", bdf]),
    image,
  ]);
  await vmm.guestSays("busy");
  assert.ok((await vmm.statistics()).get(`devices/${dying}/dma/mapped_bytes`)! > 0, "mapped while busy");
  await unbind(dying);
  await sleep(1000); // files of figures are up to 250 ms old
  const after = await vmm.statistics();
  if (policy === "strict") {
    // Under policy cached the pages are its domain's, which others use.
    assert.is(after.get(`devices/${dying}/dma/mapped_bytes`), 0, "mapped for the device that is gone");
    assert.is(after.get(`devices/${dying}/dma/pinned_bytes`), 0);
  }
  assert.is(after.get("dma/stuck_mappings"), 0);
  vmm.goOn();
  assert.is(await vmm.guestSays("io"), "failed failed failed failed");
  assert.is(await vmm.guestSays("there"), "", "the guest's kernel has removed it");
  assert.is(await vmm.guestSays("neighbour"), "8086 10d3", "a device of the same IOMMU group is still there");
  assert.is(await vmm.guestSays("hash"), before, "the other disk");
  assert.is(await vmm.guestSays("removed"), "1", "by the module, which says so");
  assert.is(await vmm.guestSays("bad"), "0", "complaints of the guest's kernel");
  const { status, script, stats } = await vmm.end();
  assert.is(status, 0);
  assert.is(script, 0);
  assert.equal(linesAbout(vmm, dying), [TAKEN]);
  // Under cached all that it read into may have been mapped: the module has seen that the bus no longer has it.
  if (policy !== "cached") assert.ok(stats.get("hypercalls/status/gone")! > 0, "calls were answered `gone`");
  assert.is(stats.get("dma/pinned_bytes"), 0);
  await bindVfio(host, dying);
}

for (const policy of SOAK ? (["strict", "lazy", "cached"] as const) : (["strict", "cached"] as const)) {
  lab(
    `a device that the host takes back in the middle of I/O is pulled out; the others work on (${policy})`,
    () => takesBack(policy),
  );
}

lab("a guest that reboots for ever starts again without a device that is gone", async () => {
  const image = await buildTestGuest("life", host.shareDir);
  const args = ["--memory", "64M", "--cmdline", "reset", "--assign", nvme0, "--assign", nvme1, image];
  const vmm = await RunningVmm.start(host, args);
  // The guest maps a page for its first device, which is the other one from then on.
  for (let life = 0; life < 2; life++) await vmm.guestSays("mapped");
  const mapped = `devices/${nvme1}/hypercalls/map/calls`;
  assert.is((await vmm.statistics()).get(mapped), 0);
  await unbind(nvme0);
  await vmm.process.waitFor(/the guest starts again without/, 60_000, "stderr");
  for (let life = 0; life < 3; life++) await vmm.guestSays("mapped");
  // The host has all of it: its own driver reads the disk.
  await must(host, "modprobe nvme");
  await bindDriver(host, nvme0, "nvme");
  const read = "sha256sum $(ls -d /dev/nvme*n1) | cut -d ' ' -f 1";
  assert.is((await must(host, read)).trim(), await sha256OfFile(disks.nvme0));
  const counted = (await vmm.statistics()).get(`devices/${nvme0}/hypercalls/map/calls`)!;
  vmm.process.kill("SIGTERM");
  const { status, stats } = await vmm.end(20_000);
  assert.is(status, 1);
  assert.match(vmm.process.stderr, `vmm: the guest starts again without ${nvme0}\n`);
  assert.not.match(vmm.process.stderr, /while it was taken away|could not be undone/);
  assert.ok(counted >= 2, "what was counted for the device that is gone");
  assert.is(stats.get(`devices/${nvme0}/hypercalls/map/calls`), counted, "it maps no more");
  assert.ok(stats.get(mapped)! >= 3, "the other device maps");
  assert.is(stats.get("hypercalls/map/calls"), counted + stats.get(mapped)!);
  await bindVfio(host, nvme0);
});

lab("--dma pinned: with the last device all of the guest's memory is given back", async () => {
  const image = await buildTestGuest("life", host.shareDir);
  const args = ["--memory", "64M", "--cmdline", "ask", "--dma", "pinned", image];
  const vmm = await RunningVmm.start(host, ["--assign", nvme0, "--assign", nvme1, ...args]);
  await vmm.guestSays("alive");
  assert.ok((await vmm.lockedBytes()) >= 64 * MiB);
  await unbind(nvme0);
  assert.ok((await vmm.lockedBytes()) >= 64 * MiB, "the other device reaches it still");
  await unbind(nvme1);
  assert.is(await vmm.lockedBytes(), 0);
  vmm.goOn();
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.is(stats.get("dma/pinned_bytes"), 0);
  assert.not.match(vmm.process.stderr, /while it was taken away|could not be undone/);
  for (const bdf of [nvme0, nvme1]) await bindVfio(host, bdf);
});

/** Has QEMU let a device report an error: its monitor's command pcie_aer_inject_error. */
function injectError(id: string, error: string): Promise<void> {
  return new Promise((resolve, reject) => {
    let text = "";
    const socket = connect(monitor, () => socket.write(`pcie_aer_inject_error ${id} ${error}\n`));
    socket.setEncoding("utf8").setTimeout(20_000, () => socket.destroy(new Error(`QEMU's monitor: ${text}`)));
    socket.on("error", reject).on("data", (chunk: string) => {
      text += chunk;
      if (!text.includes("OK id:")) return;
      socket.destroy();
      resolve();
    });
  });
}

lab("a device that fails (AER) is pulled out, and the guest goes on", async () => {
  const image = await buildGuestImage({
    script: `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
wait_disk
config() { od -An -tx4 -N4 /sys/bus/pci/devices/0000:00:0$1.0/config; }
say before $(config 1) $(config 2)
say hash $(hash)
read -r line
say after $(config 1) $(config 2)
echo 3 > /proc/sys/vm/drop_caches
say hash $(hash)
`,
  });
  const vmm = await RunningVmm.start(host, ["--assign", nvme0, "--assign", failing, image]);
  assert.is(await vmm.guestSays("before"), "00101b36 10441af4");
  assert.is(await vmm.guestSays("hash"), await sha256OfFile(disks.nvme0));
  await injectError("failing", "MALF_TLP");
  await vmm.process.waitFor(/it is taken from the guest/, 60_000, "stderr");
  vmm.goOn();
  assert.is(await vmm.guestSays("after"), "00101b36 ffffffff");
  assert.is(await vmm.guestSays("hash"), await sha256OfFile(disks.nvme0));
  const { status, script } = await vmm.end();
  assert.is(status, 0);
  assert.is(script, 0);
  assert.equal(linesAbout(vmm, failing), [
    "an uncorrectable PCI Express error, see the host's kernel log: it is taken from the guest, which goes on without it",
  ]);
  assert.match(await host.kernelLog(), new RegExp(`AER: Uncorrectable \\(Fatal\\) .*${failing}`));
});

test.run();
