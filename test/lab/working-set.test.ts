// Policy cached when far more memory is used for DMA than the host can map at a time: what nobody has mapped at the
// moment makes room, and no driver is told of an error.

import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import {
  assertNoComplaints,
  assertReads,
  assignedDisk,
  endDriven,
  loadNvme,
  startDriven,
  withEntryLimit,
} from "./recovery.js";
import { LabSuite, MiB } from "./support.js";

/** VFIO's own limit; pages of 4 KiB, and 64 MiB of them are never mapped at a time. */
const DEFAULT = { entries: 65_535, granule: "4K", workingSetMiB: 1024 };
const FEW = { entries: 128, granule: "4K", workingSetMiB: 200 };
const SHORT = { entries: 32, granule: "16K", workingSetMiB: 8 };

for (const { entries, granule, workingSetMiB } of SOAK ? [DEFAULT, FEW] : [SHORT]) {
  const name = `${workingSetMiB} MiB by ${entries} entries of ${granule}`;
  const lab = new LabSuite(`working-set-${entries}`, { diskBytes: workingSetMiB * MiB });
  lab.test(`${name}: room is made again and again, and the driver sees no error`, () =>
    withEntryLimit(lab.host, entries, async () => {
      const disk = assignedDisk(lab);
      // All of the disk fits the guest's page cache, so that each of its pages is read into another one.
      const memory = workingSetMiB > 256 ? "2G" : "512M";
      // Nothing goes because it is idle.
      const args = ["--dma", "cached", "--dma-granule", granule, "--dma-idle", "0", "--memory", memory];
      const vmm = await startDriven(disk.host, [disk.assign], { args });
      const [path] = await loadNvme(vmm);
      await assertReads(vmm, disk, path!);
      // Again: what made room is mapped anew.
      await assertReads(vmm, disk, path!);
      await assertNoComplaints(vmm);
      const host = await vmm.statistics();
      const guest = await vmm.guestStatistics();
      const evicted = host.get("dma/evicted")!;
      console.log(`    ${guest.get("hypercall_map")} map calls, ${evicted} granules made room`);
      assert.ok(evicted > 2 * entries, `${evicted} granules made room`);
      assert.is(host.get("dma/limit_hits"), 0);
      const errors = [...guest].filter(([figure]) => /(^|\/)(errors|retries)\b/.test(figure));
      assert.ok(errors.length > 4, "the guest counts errors");
      for (const [figure, value] of errors) assert.is(value, 0, figure);
      await endDriven(vmm);
    }),
  );
  lab.run();
}
