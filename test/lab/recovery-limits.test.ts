// The host's real limits, far too low: the guest's driver is told of every map that does not happen, waits, and not a
// byte is wrong. QEMU beside it on the same device, for comparison.

import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { QemuBeside } from "./qemu.js";
import {
  assignedDisk,
  DEEP_QUEUE,
  type DrivenGuest,
  type Policy,
  policies,
  recoversFromLimits,
  withEntryLimit,
} from "./recovery.js";
import { PRELUDE } from "./scripts.js";
import { LabSuite, MiB } from "./support.js";

const ENTRY_LIMITS = [30, 50, 90];

// So slow that the driver's queue is full most of the time, however slow the guest is.
const lab = new LabSuite("recovery-limits", { diskBytes: sized(8, 64) * MiB, iops: 150 });

const recovers = (policy: Policy, guest: DrivenGuest, fioOptions: string) =>
  recoversFromLimits(policy, assignedDisk(lab), guest, `${DEEP_QUEUE} ${fioOptions}`);

for (const policy of policies("strict"))
  for (const limit of SOAK ? ENTRY_LIMITS : [30])
    for (const cpus of SOAK ? [1, 4] : [1])
      lab.test(
        `${policy}, dma_entry_limit ${limit}, ${cpus} vCPUs: the driver waits, and every byte is right`,
        () => {
          // A job and a part of the disk for each vCPU, which has a queue of its own.
          const bytes = (sized(2, 64) * MiB) / cpus;
          const options = `--bs=4k --size=${bytes} --numjobs=${cpus} --offset_increment=${bytes}`;
          return withEntryLimit(lab.host, limit, () =>
            recovers(policy, { args: ["--cpus", String(cpus)] }, options),
          );
        },
      );

// These bound the bytes that are mapped at a time, so fio asks for more than that: 128 times 34 KiB.
const largeRequests = `--bsrange=4k-64k --size=${sized(8, 64)}M`;
for (const policy of policies("cached")) {
  lab.test(`${policy}, locked-memory limit of 1 MiB: the same`, () => {
    const around = "exec prlimit --memlock=1048576 setpriv --bounding-set -ipc_lock -- %s";
    return recovers(policy, { around }, largeRequests);
  });
  if (SOAK)
    lab.test(`${policy}, --dma-limit 1M: the same`, () =>
      recovers(policy, { args: ["--dma-limit", "1M"] }, largeRequests),
    );
}

for (const limit of SOAK ? ENTRY_LIMITS : [50]) {
  lab.test(`dma_entry_limit ${limit}: QEMU beside`, () =>
    withEntryLimit(lab.host, limit, async () => {
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
