// Policy lazy, from a driver's map to the IOMMU: unmaps are made many at a time, a buffer that is mapped again meanwhile
// needs no call, and nothing that was unmapped stays reachable for long; failures on demand reach the driver. Limits, and
// failures on demand one by one: recovery-*.test.ts.

import { basename } from "node:path";
import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import {
  assertNoComplaints,
  assertNothingLeft,
  assertReads,
  assertSettles,
  assignedDisk,
  DEEP_QUEUE,
  emulatedDisks,
  endDriven,
  loadNvme,
  recoversFromLimits,
  setLazy,
  startDriven,
  verify,
} from "./recovery.js";
import { assertViewsAgree, LabSuite, MiB } from "./support.js";

const DISK_MIB = sized(4, 64);
const DEVICE = "0000:00:01.0";
const OTHER = "0000:00:02.0";
const lab = new LabSuite("lazy", { diskBytes: DISK_MIB * MiB, hugePages: true });

lab.test("the data is right, and there are fewer calls than maps, and far fewer than unmaps", async () => {
  const disk = assignedDisk(lab);
  const vmm = await startDriven(disk.host, [disk.assign], { args: ["--dma", "lazy", "--cpus", "2"] });
  const [path] = await loadNvme(vmm);
  await assertReads(vmm, disk, path!);
  await verify(vmm, path!, `--bs=4k --iodepth=16 --size=${DISK_MIB}M`);
  await assertReads(vmm, disk, path!);
  await assertSettles(vmm);
  // The same buffers over and over, and long enough until they are flushed that they are found idle.
  await setLazy(vmm, 1000);
  let last = await assertViewsAgree(vmm);
  for (const [what, how] of [
    ["pages", "--bs=4k --iodepth=16 --size=1M --loops=4"],
    ["lists", "--bs=64k --iodepth=4 --size=4M --loops=8"],
  ] as const) {
    const ios = await verify(vmm, path!, `${how} --iomem=malloc`);
    await assertSettles(vmm);
    const now = await assertViewsAgree(vmm);
    const change = (name: string) => now.guest.get(name)! - last.guest.get(name)!;
    const [maps, unmaps, reused] = ["hypercall_map", "hypercall_unmap", `${DEVICE}/reused`].map(change);
    const lists = change(`${DEVICE}/map_lists`);
    console.log(
      `    ${what}: ${ios} I/Os: ${maps} map calls, ${lists} of lists, ${unmaps} unmap calls, ${reused} found idle`,
    );
    // A buffer whose pages happen to lie side by side is no list.
    if (what === "lists") assert.ok(lists > 0, "they were lists");
    assert.ok(reused! > ios / 2 && maps! < ios / 2, "buffers were used again");
    assert.ok(unmaps! < maps! / 2, "unmaps were gathered");
    last = now;
  }
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
});

lab.test(
  "what was unmapped is reachable no longer than it may be, and a driver that goes leaves nothing",
  async () => {
    const disk = assignedDisk(lab);
    const vmm = await startDriven(disk.host, [disk.assign], { kernel: "6.1", args: ["--dma", "lazy"] });
    const [path] = await loadNvme(vmm);
    await assertSettles(vmm);
    // Once before, so that the driver's pools have the pages that they will need.
    const read = `dd if=${path} of=/dev/null bs=64k count=20 iflag=direct 2> /dev/null`;
    await vmm.sh(read);
    await assertSettles(vmm);
    const idle = await assertViewsAgree(vmm);
    const outstanding = `${DEVICE}/outstanding`;
    await setLazy(vmm, 1000);
    await vmm.sh(read);
    const busy = Number(await vmm.sh(`cat /sys/kernel/debug/pvdma/${DEVICE}/outstanding`));
    assert.ok(busy > idle.guest.get(outstanding)!, "it stays mapped for a while");
    await assertSettles(vmm);
    const settled = await assertViewsAgree(vmm);
    assert.is(settled.guest.get(outstanding), idle.guest.get(outstanding));
    assert.is(settled.host.get("dma/mapped_bytes"), idle.host.get("dma/mapped_bytes"));

    // In the middle of it the driver goes: nothing waits for the time to pass.
    await vmm.sh(`${read}; modprobe -r nvme`);
    const gone = await assertViewsAgree(vmm);
    for (const name of ["outstanding", "idle", "leaked", "stuck"])
      assert.is(gone.guest.get(`${DEVICE}/${name}`), 0, name);
    assert.is(gone.host.get("dma/mapped_bytes"), 0);
    assert.is(gone.host.get("hypercalls/release/calls"), 2, "one when the driver came, one when it went");
    assert.is(gone.host.get("dma/released_mappings"), 0, "and there was nothing to be released");
    await loadNvme(vmm);
    await assertReads(vmm, disk, path!);
    await assertNoComplaints(vmm);
    await assertNothingLeft(vmm);
    await endDriven(vmm);
  },
);

// In short: recovery-emulated.test.ts.
if (SOAK)
  lab.test("a quota that is smaller than what is used: what is idle makes room, every byte is right", () =>
    recoversFromLimits(
      "lazy",
      assignedDisk(lab),
      { args: ["--cpus", "4", "--dma-limit", "1M"] },
      `${DEEP_QUEUE} --bsrange=4k-64k --size=${DISK_MIB}M`,
      600,
    ),
  );

lab.test("failures on demand strike the calls that are made, flushes too", async () => {
  const disk = assignedDisk(lab);
  const vmm = await startDriven(disk.host, [disk.assign], { args: ["--dma", "lazy", "--cpus", "2"] });
  const [path] = await loadNvme(vmm);
  // A map that fails once is made again when something is idle: it takes two in a row for the driver to hear of it.
  await vmm.tell("inject", "map,p=0.2,burst=2");
  await vmm.tell("inject", "unmap,p=0.2,errno=EAGAIN");
  const ios = await verify(vmm, path!, "--bs=4k --iodepth=64 --size=2M");
  const rules = await vmm.tell("inject");
  await vmm.tell("uninject", "all");
  const struck = [...rules.matchAll(/struck (\d+)\)/g)].map((match) => Number(match[1]));
  console.log(`    ${ios} I/Os; ${struck.join(" and ")} calls failed`);
  assert.ok(struck.length === 2 && struck.every((count) => count > 0), rules);
  await assertReads(vmm, disk, path!);
  await assertSettles(vmm);
  const { guest } = await assertViewsAgree(vmm);
  assert.ok(guest.get(`${DEVICE}/errors/limit`)! > 0, "the driver was told");
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
});

lab.test("a limit is a request to the whole guest: what is idle of another device goes", async () => {
  const quota = 2 * MiB;
  const [idle, other] = await emulatedDisks(lab.host, 4 * MiB, MiB);
  const vmm = await startDriven(lab.host, [`${idle!.assign},dma=lazy`, `${other!.assign},dma=strict`], {
    args: ["--dma-limit", String(quota)],
  });
  const paths = await loadNvme(vmm, 2);
  await assertSettles(vmm);
  await setLazy(vmm, 1000);
  // 64 KiB of the page cache at a time, each once, until what is idle leaves less than the other disk is going to need; then that.
  const used = (await vmm.statistics()).get("dma/pinned_bytes")!;
  const reads = Math.floor((quota - used - 2 ** 17) / 2 ** 16);
  const idleOne = `cat /sys/kernel/debug/pvdma/${DEVICE}/idle`;
  const readDisk = (i: number, options: string) => `dd if=${paths[i]} of=/dev/null ${options} 2> /dev/null`;
  const [before, after] = (
    await vmm.sh(
      `echo 64 > /sys/block/${basename(paths[0]!)}/queue/read_ahead_kb; ` +
        `${readDisk(0, `bs=64k count=${reads}`)}; ${idleOne}; ${readDisk(1, "bs=256k count=1 iflag=direct")}; ${idleOne}`,
    )
  ).split("\n");
  assert.ok(Number(before) >= reads, `idle after ${reads} reads: ${before}`);
  assert.is(after, "0", "what was idle went");
  const guest = await vmm.guestStatistics();
  assert.ok(guest.get(`${OTHER}/retries`)! > 0, "and the call was made again");
  for (const device of [DEVICE, OTHER]) assert.is(guest.get(`${device}/errors/limit`), 0, device);
  await setLazy(vmm, 10);
  for (const [i, disk] of [idle!, other!].entries()) await assertReads(vmm, disk, paths[i]!);
  await assertSettles(vmm);
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
});

lab.run();
