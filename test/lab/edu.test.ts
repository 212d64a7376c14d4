// Every operation of the DMA API on an edu, whose engine moves the bytes: QEMU's, assigned, and the emulated one, under
// every policy. See edu.ts.

import { setTimeout as sleep } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { eduImage, exerciseEdu, runChecks } from "./edu.js";
import { bindVfio, type Host } from "./host.js";
import { bootL1, l1Bdf } from "./l1.js";
import { type KernelSeries, kernelSeries } from "./packages.js";
import { POLICIES, type Policy } from "./recovery.js";
import { labTest, RunningVmm } from "./support.js";

const test = suite("edu");
let host: Host;

test.before(async () => {
  host = await bootL1({ edu: true, name: "edu", hugePages: true });
  await bindVfio(host, l1Bdf.edu);
});
test.after(() => host?.close());

/**
 * For how long no access may have been refused, so that the first three are sure to be logged. Linux's dmar_fault() may log
 * ten times in 5 s, an access that is refused counts three times, and no setting changes that. Some more, as the host counts
 * its 5 s in ticks.
 */
const LOG_INTERVAL_MS = 8_000;

/** What the host's kernel log has of accesses that the IOMMU refused the device. See LOG_INTERVAL_MS. */
async function iommuFaults(): Promise<{ reads: number; writes: number }> {
  const lines = (await host.kernelLog()).split("\n").filter((line) => line.includes(l1Bdf.edu.slice(5)));
  const count = (access: string) => lines.filter((line) => line.includes(`DMAR: [DMA ${access}`)).length;
  return { reads: count("Read"), writes: count("Write") };
}

/** Addresses of QEMU's edu and of the emulated one, in this host. */
const DEVICES = [l1Bdf.edu, "emul:edu"] as const;
/** Device, policy, kernel. */
type Case = readonly [(typeof DEVICES)[number], Policy, KernelSeries];

// The short form is each kernel and each device once, and lazy, which is strict and more. An emulated device moves bytes at
// once: what lazy has not unmapped yet is still there.
const CASES: readonly Case[] = SOAK
  ? DEVICES.flatMap((device) =>
      kernelSeries.flatMap((kernel) =>
        POLICIES.filter((policy) => policy !== "lazy" || device !== "emul:edu").map(
          (policy): Case => [device, policy, kernel],
        ),
      ),
    )
  : [
      [l1Bdf.edu, "lazy", "6.12"],
      ["emul:edu", "cached", "6.1"],
    ];

for (const [device, policy, kernel] of CASES) {
  const isEmulated = device === "emul:edu";
  const name = `${policy}, ${kernel} guest, ${isEmulated ? "an emulated" : "an assigned"} edu: every operation of the DMA API`;
  /** Under cached nothing is out of reach at once. */
  const refuses = policy !== "cached";
  const body = async () => {
    // Below the end of the device's 28 bits, as policy cached needs it.
    const args = ["--memory", "192M", "--assign", `${device},dma=${policy}`, await eduImage(kernel)];
    const vmm = await RunningVmm.start(host, args);
    await vmm.guestSays("ready");
    if (refuses && !isEmulated) {
      await vmm.sh("modprobe pvdma && modprobe edudma");
      await sleep(LOG_INTERVAL_MS);
      // One write and one read, before the other checks fill the log.
      const { reads, writes } = await iommuFaults();
      assert.equal(await runChecks(vmm, "permissions", "after_unmap"), {});
      assert.equal(await iommuFaults(), { reads: reads + 1, writes: writes + 1 }, "what the IOMMU refused");
    }
    // Linux's VT-d driver lets devices read what is mapped for writing alone: the bit for reading is always set, since it
    // means "present" in the other format of these tables.
    const readable = "FAILED the device read 1000 of 1000 bytes that it may not reach";
    await exerciseEdu(vmm, {
      guest: "0000:00:01.0",
      host: device,
      policy,
      notOk: isEmulated ? {} : { read_of_write_only: readable },
    });
    if (refuses && isEmulated) {
      const { stats } = await vmm.end();
      assert.ok(stats.get("devices/emul:edu/dma/faults")! >= 5, "the software IOMMU refused accesses");
    }
  };
  labTest(test, name, () => host, body);
}
test.run();
