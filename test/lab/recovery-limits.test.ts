// The host's real limits, far too low: the guest's driver is told of every map that does not happen, waits, and not a
// byte is wrong. QEMU beside it on the same device, for comparison.

import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { must } from "./host.js";
import { QemuBeside } from "./qemu.js";
import {
  assertNoComplaints,
  assertNothingLeft,
  type DrivenGuest,
  endDriven,
  guestHash,
  loadNvme,
  startDriven,
  verify,
} from "./recovery.js";
import { PRELUDE } from "./scripts.js";
import { assertViewsAgree, LabSuite, MiB } from "./support.js";

/** Read when a container is opened, so it holds for a VMM that starts after it was set. */
const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
const ENTRY_LIMITS = [30, 50, 90];

// So slow that the driver's queue is full most of the time, however slow the guest is.
const lab = new LabSuite("recovery-limits", { diskBytes: sized(8, 64) * MiB, iops: 150 });

async function withEntryLimit(limit: number, body: () => Promise<void>): Promise<void> {
  const before = (await must(lab.host, `cat ${ENTRY_LIMIT}; echo ${limit} > ${ENTRY_LIMIT}`)).trim();
  try {
    await body();
  } finally {
    await must(lab.host, `echo ${before} > ${ENTRY_LIMIT}`);
  }
}

/** Reads the whole disk, writes and verifies, and reads again; at a queue depth that the host cannot map all of. */
async function recovers(guest: DrivenGuest, fioOptions: string): Promise<void> {
  const vmm = await startDriven(lab.host, [lab.bdf], guest);
  const [disk] = await loadNvme(vmm);
  const hash = await guestHash(vmm, disk!);
  await lab.checkHash(hash);

  const begun = Date.now();
  const ios = await verify(vmm, disk!, `--iodepth=128 --iodepth_batch=64 ${fioOptions}`);
  const seconds = (Date.now() - begun) / 1000;
  const rehash = await guestHash(vmm, disk!);
  assert.is.not(rehash, hash, "fio changed the disk");
  await lab.checkHash(rehash);

  const { host, guest: inGuest } = await assertViewsAgree(vmm);
  const told = [...inGuest].find(([path]) => path.endsWith("/errors/limit"))![1];
  assert.ok(told > 0, "the guest counted errors");
  assert.is(host.get("dma/limit_hits"), told, "the host counted the same");
  assert.is(host.get("hypercalls/map/errors")! + host.get("hypercalls/map_list/errors")!, told);
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
  console.log(
    `    the whole disk is right; ${ios} I/Os verified in ${seconds.toFixed(1)} s; ` +
      `${told} of ${inGuest.get("hypercall_map")} maps failed, and the driver was told of each`,
  );
}

for (const limit of ENTRY_LIMITS) {
  for (const cpus of SOAK ? [1, 4] : [limit === 90 ? 4 : 1]) {
    lab.test(`dma_entry_limit ${limit}, ${cpus} vCPUs: the driver waits, and every byte is right`, () => {
      // A job and a part of the disk for each vCPU, which has a queue of its own.
      const bytes = (sized(2, 64) * MiB) / cpus;
      const options = `--bs=4k --size=${bytes} --numjobs=${cpus} --offset_increment=${bytes}`;
      return withEntryLimit(limit, () => recovers({ args: ["--cpus", String(cpus)] }, options));
    });
  }
}

// These bound the bytes that are mapped at a time, so fio asks for more than that: 128 times 34 KiB.
const largeRequests = `--bsrange=4k-64k --size=${sized(8, 64)}M`;
lab.test("locked-memory limit of 1 MiB: the same", () => {
  const around = "exec prlimit --memlock=1048576 setpriv --bounding-set -ipc_lock -- %s";
  return recovers({ around }, largeRequests);
});
lab.test("--dma-limit 1M: the same", () => recovers({ args: ["--dma-limit", "1M"] }, largeRequests));

for (const limit of SOAK ? ENTRY_LIMITS : [50]) {
  lab.test(`dma_entry_limit ${limit}: QEMU beside`, () =>
    withEntryLimit(limit, async () => {
      const content = await lab.diskHash();
      const script = `${PRELUDE}
modprobe nvme_core admin_timeout=10 io_timeout=10
modprobe nvme
wait_disk
say hash $(hash)
say errors $(dmesg | grep -c 'I/O error')
`;
      const qemu = await QemuBeside.strict(lab.host, lab.bdf, { script });
      const ended = await qemu.end(sized(3, 10) * 60_000);
      assert.match(qemu.process.stdout, /^guest: /m, "its guest ran");
      const [hash = "nothing"] = qemu.said("hash");
      const verdict = content === undefined ? "" : hash === content ? ": right" : ": WRONG";
      const errors = qemu.said("errors")[0] ?? "an unknown number of";
      console.log(
        `    QEMU's guest read  ${hash}${verdict}, and saw ${errors} I/O errors; ` +
          `${qemu.failedMaps} maps failed${ended ? "" : "; it did not come to its end"}\n` +
          `    the disk holds     ${content ?? "unknown"}`,
      );
    }),
  );
}

lab.run();
