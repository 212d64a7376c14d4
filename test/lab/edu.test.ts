// Every operation of the DMA API on an edu, whose engine moves the bytes: QEMU's, assigned, and the emulated one. See
// edu.ts.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { eduImage, exerciseEdu } from "./edu.js";
import { bindVfio, type Host } from "./host.js";
import { bootL1, l1Bdf } from "./l1.js";
import { kernelSeries } from "./packages.js";
import { labTest, RunningVmm } from "./support.js";

const test = suite("edu");
let host: Host;

test.before(async () => {
  host = await bootL1({ edu: true, name: "edu" });
  await bindVfio(host, l1Bdf.edu);
});
test.after(() => host?.close());

/** Lines of the host's kernel log in which the IOMMU refused the device something. */
async function iommuFaults(access: "Read" | "Write"): Promise<number> {
  const log = await host.kernelLog();
  return log
    .split("\n")
    .filter((line) => line.includes(`DMAR: [DMA ${access}`) && line.includes(l1Bdf.edu.slice(5))).length;
}

// The short form is each kernel once, and each device once.
for (const kernel of kernelSeries) {
  const body = async () => {
    const before = { reads: await iommuFaults("Read"), writes: await iommuFaults("Write") };
    const vmm = await RunningVmm.start(host, ["--assign", l1Bdf.edu, await eduImage(kernel)]);
    await vmm.guestSays("ready");
    await exerciseEdu(vmm, {
      guest: "0000:00:01.0",
      host: l1Bdf.edu,
      notOk: {
        // Linux's VT-d driver lets devices read what is mapped for writing alone: the bit for reading is always set,
        // since it means "present" in the other format of these tables.
        read_of_write_only: "FAILED the device read 1000 of 1000 bytes that it may not reach",
      },
    });
    assert.ok((await iommuFaults("Read")) > before.reads, "the IOMMU refused reads");
    assert.ok((await iommuFaults("Write")) > before.writes, "the IOMMU refused writes");
  };
  if (SOAK || kernel === "6.12")
    labTest(test, `a ${kernel} guest uses and misuses every operation of the DMA API`, () => host, body);

  const emulated = async () => {
    const vmm = await RunningVmm.start(host, ["--assign", "emul:edu", await eduImage(kernel)]);
    await vmm.guestSays("ready");
    await exerciseEdu(vmm, { guest: "0000:00:01.0", host: "emul:edu" });
    const { stats } = await vmm.end();
    assert.ok((stats.get("devices/emul:edu/dma/faults") ?? 0) >= 5, "the software IOMMU refused accesses");
  };
  if (SOAK || kernel === "6.1")
    labTest(test, `the same in a ${kernel} guest with an emulated edu`, () => host, emulated);
}
test.run();
