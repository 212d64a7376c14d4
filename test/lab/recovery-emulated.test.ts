// Recovery from failed mappings on emulated controllers, as on assigned ones: what recovery-limits.test.ts and
// recovery-inject.test.ts do, behind the software IOMMU. VFIO is not touched.

import { suite } from "uvu";
import { SOAK, sized } from "../soak.js";
import { DISK_BYTES, RULES, recoversFromInjection } from "./injected.js";
import { bootL1, type L1 } from "./l1.js";
import { DEEP_QUEUE, emulatedDisks, type Policy, policies, recoversFromLimits } from "./recovery.js";
import { labTest, MiB } from "./support.js";

const DISK_MIB = sized(8, 64);
const test = suite("recovery-emulated");
let host: L1;
test.before(async () => {
  host = await bootL1({ name: "recovery-emulated", hugePages: true });
});
test.after(() => host?.close());

async function recovers(policy: Policy, args: string[], fioOptions: string): Promise<void> {
  const [disk] = await emulatedDisks(host, DISK_MIB * MiB);
  await recoversFromLimits(policy, disk!, { args }, fioOptions);
}
/** fio asks for more bytes at a time than a mebibyte: 128 times 34 KiB. */
const largeRequests = `${DEEP_QUEUE} --bsrange=4k-64k --size=${DISK_MIB}M`;

for (const policy of policies("lazy"))
  for (const [entries, cpus] of SOAK
    ? ([
        [30, 1],
        [30, 4],
        [50, 1],
        // One vCPU never has 90 in use at a time, for nothing holds this device back.
        [90, 4],
      ] as const)
    : ([[30, 1]] as const)) {
    const name = `${policy}, entries=${entries}, ${cpus} vCPUs: the driver waits, and every byte is right`;
    const body = () => {
      // A job and a part of the disk for each vCPU. Nothing holds this device back: one batch has to be too much for 90.
      const bytes = (sized(2, 64) * MiB) / cpus;
      const jobs = `--bs=4k --size=${bytes} --numjobs=${cpus} --offset_increment=${bytes}`;
      const args = ["--cpus", String(cpus), "--emul-iommu", `entries=${entries}`];
      return recovers(policy, args, `--iodepth=128 --iodepth_batch=128 ${jobs}`);
    };
    labTest(test, name, () => host, body);
  }

for (const policy of policies("strict"))
  for (const [limit, args] of [
    ["locked=1M", ["--emul-iommu", "locked=1M"]],
    ["--dma-limit 1M", ["--dma-limit", "1M"]],
  ] as const)
    if (SOAK || limit === "locked=1M")
      labTest(
        test,
        `${policy}, ${limit}: the same`,
        () => host,
        () => recovers(policy, [...args], largeRequests),
      );

for (const policy of policies("cached"))
  for (const cpus of SOAK ? [1, 4] : [1]) {
    const name = `${policy}, maps fail at random and in bursts, ${cpus} vCPUs: verified, and as fast as before when it stops`;
    const body = async () => {
      const [disk, other] = await emulatedDisks(host, DISK_BYTES, MiB);
      // What a rule does to a driver does not depend on what is behind it: the short form is content with one.
      await recoversFromInjection(policy, [disk!, other!], cpus, SOAK ? RULES : RULES.slice(1, 2));
    };
    labTest(test, name, () => host, body);
  }

test.run();
