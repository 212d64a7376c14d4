// Policy cached, from a driver's map to the IOMMU: pages stay mapped, so that most maps need no call; the host takes back
// what is idle and what it needs. Limits and failures on demand: recovery-*.test.ts.

import * as assert from "uvu/assert";
import { sized } from "../soak.js";
import { buildGuestImage, buildModule } from "./guest.js";
import { must } from "./host.js";
import { getKernel } from "./packages.js";
import {
  assertNoComplaints,
  assertNothingLeft,
  assertReads,
  assignedDisk,
  DEEP_QUEUE,
  emulatedDisks,
  endDriven,
  loadNvme,
  recoversFromLimits,
  startDriven,
  type TestedDisk,
  verify,
} from "./recovery.js";
import { CONSOLE } from "./scripts.js";
import { assertViewsAgree, LabSuite, MiB, RunningVmm } from "./support.js";

const DISK_MIB = sized(8, 64);
const lab = new LabSuite("cached", { diskBytes: DISK_MIB * MiB });

/** Calls that map, so far. */
async function mapCalls(vmm: RunningVmm): Promise<number> {
  return (await vmm.guestStatistics()).get("hypercall_map")!;
}

async function emulated(): Promise<TestedDisk> {
  return (await emulatedDisks(lab.host, DISK_MIB * MiB))[0]!;
}

for (const [what, disk] of [
  ["an assigned disk", async () => assignedDisk(lab)],
  ["an emulated disk", emulated],
] as const) {
  lab.test(`${what}: the data is right, and once its buffers are mapped there are no calls`, async () => {
    const tested = await disk();
    const vmm = await startDriven(tested.host, [tested.assign], { args: ["--dma", "cached"] });
    const [path] = await loadNvme(vmm);
    await assertReads(vmm, tested, path!);
    await verify(vmm, path!, `--bs=4k --iodepth=16 --size=${DISK_MIB}M`);
    await assertReads(vmm, tested, path!);
    // The same small file of buffers over and over.
    const before = await mapCalls(vmm);
    const ios = await verify(vmm, path!, "--bs=4k --iodepth=16 --size=1M --loops=4 --iomem=malloc");
    const calls = (await mapCalls(vmm)) - before;
    console.log(`    ${calls} calls for ${ios} I/Os`);
    assert.ok(calls < ios / 4, `${calls} calls for ${ios} I/Os`);
    const host = await vmm.statistics();
    assert.is(host.get("hypercall_unmap"), 0);
    assert.ok(host.get("dma/pinned_bytes")! > 0);
    await assertNoComplaints(vmm);
    await assertNothingLeft(vmm);
    await endDriven(vmm);
  });
}

lab.test("calls counted: cached none for 100,000 pairs, strict two for each pair and each list", async () => {
  const [cached, strict] = await emulatedDisks(lab.host, MiB, MiB);
  const devices = [`${cached!.assign},dma=cached`, `${strict!.assign},dma=strict`];
  const { file } = await buildModule(await getKernel("6.12"), "test/modules", "dmabench");
  const vmm = await startDriven(lab.host, devices, { moduleFiles: [file] });
  await loadNvme(vmm, 2);
  /** What a run of the module adds to the guest's operations on a device, and to the host's calls for it. */
  const bench = async (slot: string, disk: TestedDisk, ms: number) => {
    const look = async () => {
      const [guest, host] = [await vmm.guestStatistics(), await vmm.statistics()];
      const made = (name: string) => guest.get(`0000:00:${slot}.0/${name}`)!;
      const calls = ["map", "map_list", "unmap", "unmap_list", "table", "release"].map(
        (call) => host.get(`devices/${disk.name}/hypercalls/${call}/calls`)!,
      );
      // What was asked again is no operation of the driver's.
      const called = calls.reduce((sum, each) => sum + each, 0) - made("retries");
      return [made("maps"), made("map_lists"), called] as const;
    };
    const before = await look();
    await vmm.sh(`modprobe dmabench device=0000:00:${slot}.0 ms=${ms} && modprobe -r dmabench`, 300_000);
    const after = await look();
    const [pairs, lists, calls] = after.map((value, i) => value - before[i]!) as [number, number, number];
    console.log(`    ${pairs} pairs, ${lists} lists, ${calls} calls`);
    return { pairs, lists, calls };
  };
  // Its pages are the kernel's to choose: warm are those that it was given before.
  let warm = await bench("01", cached!, 400);
  for (let tries = 0; tries < 5 && warm.calls > 0; tries++) warm = await bench("01", cached!, 400);
  assert.is(warm.calls, 0);
  assert.ok(warm.pairs >= 100_000 && warm.lists > 0);
  const { pairs, lists, calls } = await bench("02", strict!, 100);
  assert.ok(pairs > 100 && lists > 10);
  assert.is(calls, 2 * (pairs + lists));
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
});

lab.test("what is idle is given back, and mapped again when it is needed", async () => {
  const disk = assignedDisk(lab);
  const vmm = await startDriven(disk.host, [disk.assign], { args: ["--dma", "cached", "--dma-idle", "2"] });
  const [path] = await loadNvme(vmm);
  await assertReads(vmm, disk, path!);
  const busy = (await vmm.statistics()).get("dma/peak_pinned_bytes")!;
  // Its queues stay: they are mapped for as long as it has a driver.
  await vmm.sh("sleep 8");
  const idle = (await vmm.statistics()).get("dma/pinned_bytes")!;
  console.log(`    pinned: ${busy / MiB} MiB at most, ${idle / MiB} MiB when idle`);
  assert.ok(idle > 0 && idle < MiB && idle < busy / 2, `${idle} bytes of ${busy} stay pinned`);
  await assertReads(vmm, disk, path!);
  await verify(vmm, path!, "--bs=4k --iodepth=16 --size=1M");
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
});

lab.test(
  "a quota that is smaller than what is used: the host reclaims all the time, and every byte is right",
  () =>
    recoversFromLimits(
      "cached",
      assignedDisk(lab),
      { args: ["--dma-granule", "4K", "--dma-limit", "1M", "--cpus", "4"] },
      `${DEEP_QUEUE} --bsrange=4k-64k --size=${DISK_MIB}M`,
      sized(0, 600),
    ),
);

lab.test(
  "--hugepages hugetlb: RAM is of large pages, each mapped by one entry, over a reboot too",
  async () => {
    const disk = assignedDisk(lab);
    const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    const available = async () =>
      Number(
        await must(disk.host, `echo $(($(cat ${pool}/free_hugepages) - $(cat ${pool}/resv_hugepages)))`),
      );
    const reserve = (pages: number) => must(disk.host, `echo ${pages} > ${pool}/nr_hugepages`);
    const args = ["--dma", "cached", "--hugepages", "hugetlb", "--memory", "256M"];
    await reserve(100);
    const image = await buildGuestImage({ kernel: "6.12", script: CONSOLE, tools: ["fio"] });
    const short = await RunningVmm.start(disk.host, ["--assign", disk.assign, ...args, image]);
    assert.is((await short.end()).status, 1);
    assert.match(
      short.messages().join("\n"),
      /^vmm: 256 MiB of guest RAM .*; it takes 128 huge pages of 2 MiB, and 100 are free; /m,
    );

    await reserve(140);
    const vmm = await startDriven(disk.host, [disk.assign], { args });
    assert.is(await available(), 12);
    let before: ReadonlyMap<string, number> | undefined;
    for (let life = 0; life < 2; life++) {
      if (life > 0) {
        await assertViewsAgree(vmm);
        vmm.process.write("reboot -f\n");
        await vmm.guestSays("ready");
        before = await vmm.statistics();
        await vmm.sh("modprobe pvdma");
      }
      const [path] = await loadNvme(vmm);
      await assertReads(vmm, disk, path!);
      await verify(vmm, path!, "--bs=4k --iodepth=16 --size=1M");
      const figures = await vmm.statistics();
      const [pinned, entries] = ["dma/pinned_bytes", "dma/entries"].map((name) => figures.get(name)!);
      console.log(`    ${pinned! / MiB} MiB pinned by ${entries} entries`);
      assert.ok(entries! > 0);
      assert.is(pinned, entries! * 2 * MiB);
    }
    await assertNoComplaints(vmm);
    await assertNothingLeft(vmm, before);
    await endDriven(vmm);
    assert.is(await available(), 140);
    await reserve(0);
  },
);

lab.run();
