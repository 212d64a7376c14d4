// What is mapped when a driver goes, when a device is reset, when the module is loaded anew or another kernel started;
// and a guest whose host has room for thirty mappings, whose every request must fit beside what the driver keeps.

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { repoRoot } from "./cache.js";
import { buildGuestImage, buildGuestParts, buildModule, type GuestOptions } from "./guest.js";
import { getKernel, type KernelSeries, kernelSeries } from "./packages.js";
import { CONSOLE } from "./scripts.js";
import { LabSuite, MiB, type RunningVmm } from "./support.js";

const PAGE = 4096;
/** The device in the guest. */
const DEVICE = "0000:00:01.0";
const SYSFS = `/sys/bus/pci/devices/${DEVICE}`;
const BIND = `echo ${DEVICE} > /sys/bus/pci/drivers_probe`;
/** Of a driver that has gone with coherent memory. */
const STAYS = "the DMA ops stay until the driver's memory is given back";
const NOTHING = { outstanding: 0, outstanding_bytes: 0 };
/** After so long a guest's kernel that has said a thing ten times says it again: DEFAULT_RATELIMIT_INTERVAL, and a second. */
const SAYS_AGAIN_MS = 6_000;

/** Starts a guest that is told on its console what to do; pvdma is loaded. */
async function startDriven(
  lab: LabSuite,
  options: Partial<GuestOptions>,
  ...args: string[]
): Promise<RunningVmm> {
  const vmm = await lab.start(...args, await buildGuestImage({ script: CONSOLE, ...options }));
  await vmm.guestSays("ready");
  await vmm.sh("modprobe pvdma");
  return vmm;
}

/** Numbers of the device in the guest's debugfs. */
async function inGuest(vmm: RunningVmm, ...names: string[]): Promise<Record<string, number | undefined>> {
  const figures = await vmm.guestStatistics();
  return Object.fromEntries(names.map((name) => [name, figures.get(`${DEVICE}/${name}`)]));
}

const view = (vmm: RunningVmm) => inGuest(vmm, "outstanding", "outstanding_bytes", "leaked");

/** What the host says is mapped, all of it pinned and none stuck. */
async function mappedInHost(vmm: RunningVmm): Promise<number> {
  await sleep(600); // its files are up to 250 ms old
  const figures = await vmm.statistics();
  assert.is(figures.get("dma/stuck_mappings"), 0);
  assert.is(figures.get("dma/pinned_bytes"), figures.get("dma/mapped_bytes"));
  return figures.get("dma/mapped_bytes")!;
}

/** What the module has said of the device since the last time. */
async function told(vmm: RunningVmm): Promise<string[]> {
  const log = await vmm.sh(`dmesg -c`);
  return [...log.matchAll(new RegExp(`${DEVICE}: pvdma: (.*)`, "g"))].map((match) => match[1]!);
}

/** Loads nvme and has it read the whole disk. */
async function readDisk(lab: LabSuite, vmm: RunningVmm): Promise<void> {
  await vmm.sh("modprobe nvme; echo 3 > /proc/sys/vm/drop_caches");
  await lab.checkHash((await vmm.sh("wait_disk; hash")).trim());
}

async function end(vmm: RunningVmm): Promise<Map<string, number>> {
  vmm.process.write("exit 0\n");
  const { status, script, stats } = await vmm.end();
  assert.is(script, 0, "the script's exit status");
  assert.is(status, 0, "the VMM's exit status");
  assert.is(stats.get("dma/pinned_bytes"), 0);
  return stats;
}

const forgetful = async (kernel: KernelSeries) => ({
  kernel,
  moduleFiles: [(await buildModule(await getKernel(kernel), "test/modules", "forgetful")).file],
});

/** Has the forgetful driver bind the device with these parameters; those not given are 0. */
async function bindForgetful(vmm: RunningVmm, parameters: Record<string, number>): Promise<void> {
  const all = { pages: 0, entries: 0, neighbours: 0, buffers: 0, fail: 0, wrong: 0, ...parameters };
  const set = Object.entries(all).map(
    ([name, value]) => `echo ${value} > /sys/module/forgetful/parameters/${name}`,
  );
  await vmm.sh(`modprobe forgetful; echo forgetful > ${SYSFS}/driver_override; ${set.join("; ")}; ${BIND}`);
}

const leaks = new LabSuite("leaks", { diskBytes: 8 * MiB, hugePages: true });

// What the kernels do differently is in nvme's own memory, which only the soak looks at in both.
for (const kernel of SOAK ? kernelSeries : (["6.12"] as const)) {
  leaks.test(`${kernel}: what a driver leaves behind is released, and no more than that`, async () => {
    const vmm = await startDriven(leaks, await forgetful(kernel));
    // A page by devres, which is given back; coherent buffers of two pages; a list in calls of 256 and 44.
    await bindForgetful(vmm, { pages: 5, entries: 300, buffers: 2 });
    assert.equal(await view(vmm), { outstanding: 10, outstanding_bytes: 310 * PAGE, leaked: 0 });
    assert.is(await mappedInHost(vmm), 310 * PAGE);
    await told(vmm);
    await vmm.sh(`echo ${DEVICE} > /sys/bus/pci/drivers/forgetful/unbind`);
    assert.equal(await told(vmm), [
      `9 mappings left behind by the driver, ${309 * PAGE} bytes are mapped`,
      `the host released 9 mappings (${309 * PAGE} bytes)`,
      STAYS,
    ]);
    assert.equal(await view(vmm), { ...NOTHING, leaked: 9 });
    assert.is(await mappedInHost(vmm), 0);
    const command = await vmm.sh(`od -An -tu1 -j4 -N1 ${SYSFS}/config`);
    assert.is(Number(command) & 4, 0, "bus mastering, which the driver left on");

    // A probe that fails when all is mapped: its devres comes back after the notification about it.
    await bindForgetful(vmm, { pages: 5, entries: 10, buffers: 2, fail: 1 });
    await vmm.sh(
      "for i in $(seq 50); do grep -q ^0 /sys/kernel/debug/pvdma/*/outstanding && break; sleep 0.1; done",
    );
    assert.equal(await told(vmm), [
      `8 mappings left behind by the driver, ${19 * PAGE} bytes are mapped`,
      `the host released 8 mappings (${19 * PAGE} bytes)`,
      STAYS,
    ]);
    assert.equal(await view(vmm), { ...NOTHING, leaked: 17 });
    assert.is(await mappedInHost(vmm), 0);

    // Unmapped with a wrong length, then rightly, then once more.
    await bindForgetful(vmm, { wrong: 1 });
    assert.equal(await view(vmm), { outstanding: 1, outstanding_bytes: PAGE, leaked: 17 });
    const classes = await inGuest(vmm, "errors/retry", "errors/limit", "errors/invalid", "errors/gone");
    assert.equal(classes, { "errors/retry": 0, "errors/limit": 0, "errors/invalid": 2, "errors/gone": 0 });
    assert.is((await vmm.guestStatistics()).get("errors"), 2);
    await vmm.sh(`rmmod forgetful; echo > ${SYSFS}/driver_override`);
    assert.equal(await view(vmm), { ...NOTHING, leaked: 13 });

    // It gave its buffers back when it was unloaded: to the module, which needed no host for it and is free to go.
    assert.equal(await inGuest(vmm, "late"), { late: 4 });
    assert.is(await vmm.sh("cat /sys/module/pvdma/refcnt"), "0\n");
    assert.not.ok((await told(vmm)).some((line) => line.includes("never freed")));

    // The next driver, and the module anew.
    await vmm.sh(`modprobe nvme; ${BIND}`);
    await readDisk(leaks, vmm);
    await vmm.sh("rmmod nvme");
    assert.equal(await view(vmm), { ...NOTHING, leaked: 13 });
    assert.is(await mappedInHost(vmm), 0);
    await told(vmm);
    await vmm.sh("rmmod pvdma && modprobe pvdma");
    await readDisk(leaks, vmm);
    assert.equal(await inGuest(vmm, "leaked", "errors/invalid"), { leaked: 0, "errors/invalid": 0 });

    // A file that is open keeps nvme's own memory beyond the unbind, and until after the next bind: what is given back
    // then had the bus addresses that are the new driver's now.
    await told(vmm);
    await vmm.sh(`exec 3< /dev/nvme0; echo ${DEVICE} > /sys/bus/pci/drivers/nvme/unbind`);
    const { leaked: left } = await view(vmm);
    assert.equal(
      (await told(vmm)).includes(STAYS),
      left! > 0,
      "6.1 keeps its shadow doorbells, 6.12 does not",
    );
    assert.is(await mappedInHost(vmm), 0);
    await vmm.sh(BIND);
    await readDisk(leaks, vmm);
    assert.equal(await inGuest(vmm, "leaked", "late"), { leaked: left, late: 0 });
    await vmm.sh("exec 3<&-; sleep 1");
    assert.equal(await inGuest(vmm, "leaked", "late"), { leaked: 0, late: left });
    await readDisk(leaks, vmm);
    assert.is((await vmm.guestStatistics()).get("errors"), 0);
    assert.is(await mappedInHost(vmm), (await view(vmm)).outstanding_bytes);

    // The device is reset, by the bus and by its driver, while it is read: its mappings are its driver's.
    assert.match(await vmm.sh(`cat ${SYSFS}/reset_method`), /flr/);
    const read = "dd if=/dev/nvme0n1 bs=64k iflag=direct of=/dev/null 2>> /tmp/dd";
    await vmm.sh(`touch /tmp/on; while [ -e /tmp/on ]; do ${read} || break; done &`);
    for (const how of [`${SYSFS}/reset`, "/sys/class/nvme/nvme*/reset_controller"]) {
      for (let i = 0; i < 3; i++) await vmm.sh(`sleep 0.3; echo 1 > $(echo ${how})`);
    }
    const reads = await vmm.sh("rm /tmp/on; wait; cat /tmp/dd");
    assert.match(reads, /^(\d+\+0 records (in|out)\n)+$/, "reads of the whole disk");
    await readDisk(leaks, vmm);
    assert.is(await mappedInHost(vmm), (await view(vmm)).outstanding_bytes);
    assert.is((await vmm.guestStatistics()).get("errors"), 0);
    await vmm.sh("rmmod nvme");
    assert.equal(await view(vmm), { ...NOTHING, leaked: 0 });
    assert.is(await mappedInHost(vmm), 0);
    await vmm.sh("rmmod pvdma");
    assert.is(await vmm.sh("complaints"), "");
    const stats = await end(vmm);
    assert.is(stats.get("hypercalls/unmap/errors"), 2);
    assert.is(stats.get("dma/released_mappings"), 17 + left!);
  });
}

leaks.test("a kernel started by another begins with nothing of it mapped", async () => {
  const parts = await buildGuestParts({ script: CONSOLE });
  const kexec = join(leaks.files.path, "kexec");
  execFileSync("gcc", ["-static", "-Os", "-o", kexec, join(repoRoot, "test/lab/kexec.c")]);
  const vmm = await startDriven(leaks, {
    files: {
      "usr/bin/kexec": { content: readFileSync(kexec), mode: 0o755 },
      kernel: { content: readFileSync(parts.kernel.vmlinuz) },
      initrd: { content: parts.initrd },
    },
  });
  await readDisk(leaks, vmm);
  const before = await view(vmm);
  assert.ok(before.outstanding! > 0);
  vmm.process.write(`kexec /kernel /initrd '${parts.cmdline}'\n`);
  await vmm.guestSays("ready");
  assert.is(await mappedInHost(vmm), before.outstanding_bytes, "nobody has told the host");
  await vmm.sh("modprobe pvdma");
  await readDisk(leaks, vmm);
  const lines = await told(vmm);
  const released = `the host released ${before.outstanding} mappings (${before.outstanding_bytes} bytes)`;
  assert.ok(lines.includes(released), lines.join("\n"));
  const after = await view(vmm);
  assert.is(after.leaked, 0, "no driver of this kernel's did it");
  assert.is(await mappedInHost(vmm), after.outstanding_bytes);
  await end(vmm);
});

leaks.test("a device whose owner is not told maps nothing; what is unmapped in vain is no leak", async () => {
  const inject = ["--inject", "is-assigned,next=1", "--inject", "unmap,next=1"];
  const vmm = await startDriven(leaks, await forgetful("6.12"), ...inject);
  await bindForgetful(vmm, { pages: 2 });
  assert.equal(await told(vmm), [
    "the host does not say whether it is assigned: limit (errno 28)",
    "no DMA until a driver is bound anew",
  ]);
  assert.is(await vmm.sh(`ls ${SYSFS} | grep -x driver || true`), "", "the driver's probe failed");
  await vmm.sh(BIND);
  await told(vmm);
  await vmm.sh("rmmod forgetful"); // devres unmaps its page, in vain
  const mapped = `${3 * PAGE} bytes are mapped`;
  const [unmap, memory, ...rest] = await told(vmm);
  assert.match(unmap!, /^4096 bytes at bus address 0x\w+ stay mapped: limit \(errno 28\)/);
  assert.match(memory!, /^4096 bytes at bus address 0x\w+ are never freed/);
  assert.equal(rest, [
    `2 mappings left behind by the driver, ${mapped}`,
    `1 mappings left because the host did not unmap them, ${mapped}`,
    `the host released 3 mappings (${3 * PAGE} bytes)`,
  ]);
  assert.equal(await view(vmm), { ...NOTHING, leaked: 2 });
  assert.is(await mappedInHost(vmm), 0);
  await vmm.sh(`echo > ${SYSFS}/driver_override; modprobe nvme; ${BIND}`);
  await readDisk(leaks, vmm);
  await vmm.sh("rmmod nvme pvdma");
  assert.is(await vmm.sh("complaints"), "");
  const stats = await end(vmm);
  assert.is(stats.get("hypercalls/is_assigned/calls"), 2);
  assert.is(stats.get("hypercalls/is_assigned/injected"), 1);
  assert.is(stats.get("hypercalls/unmap/injected"), 1);
  assert.equal(await leaks.iommuFaults(), []);
});
leaks.run();

const limited = new LabSuite("thirty mappings", { diskBytes: 8 * MiB, entryLimit: 30 });

for (const kernel of SOAK ? kernelSeries : (["6.1"] as const)) {
  limited.test(`${kernel}: nvme reads the whole disk; a list that fails half way is undone`, async () => {
    const vmm = await startDriven(limited, await forgetful(kernel));
    await vmm.sh("modprobe nvme; wait_disk");
    // 30 / 4 - 1 pages, see pvdma_mapping_max()
    const offered = await inGuest(vmm, "max_mapping_bytes", "outstanding");
    assert.is(offered.max_mapping_bytes, 6 * PAGE);
    assert.is(Number(await vmm.sh("cat /sys/block/nvme0n1/queue/max_hw_sectors_kb")), 24);
    await vmm.sh("echo 1024 > /sys/block/nvme0n1/queue/read_ahead_kb");
    await readDisk(limited, vmm);
    const { outstanding, ...errors } = await inGuest(vmm, "outstanding", "errors/limit", "errors/invalid");
    assert.ok(outstanding! >= offered.outstanding! && outstanding! < 30, `${outstanding} mappings`);
    assert.ok(errors["errors/limit"]! > 0, "the limit was reached");
    assert.is(errors["errors/invalid"], 0);
    assert.is((await vmm.guestStatistics()).get("errors"), errors["errors/limit"]);
    assert.is((await vmm.statistics()).get("hypercalls/status/limit"), errors["errors/limit"]);
    await vmm.sh("rmmod nvme");
    assert.equal(await view(vmm), { ...NOTHING, leaked: 0 });

    // The first call's 256 pages are one run of memory, the second's 44 are 44: more than there is room for.
    const counted = ["map_lists", "pages_mapped", "pages_unmapped", "errors/limit"] as const;
    const before = await inGuest(vmm, ...counted);
    await told(vmm);
    // Reading the disk may have used up what the kernel says of one kind.
    await sleep(SAYS_AGAIN_MS);
    await bindForgetful(vmm, { neighbours: 256, entries: 44 });
    assert.match((await told(vmm)).join("; "), /^no mapping of \d+ bytes [^;]*: limit \(errno 28\)[^;]*$/);
    const after = await inGuest(vmm, ...counted);
    assert.equal(
      counted.map((name) => after[name]! - before[name]!),
      [1, 257, 257, 1],
    );
    assert.equal(await view(vmm), { ...NOTHING, leaked: 0 });
    assert.is(await mappedInHost(vmm), 0);
    assert.is(await vmm.sh("complaints"), "");
    await end(vmm);
  });
}
if (process.env.PVDMA_HOST_BDF === undefined) limited.run();
