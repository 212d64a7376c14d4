// The lab's own: a host that measured its TSC wrongly at first, as busy machines do, has guests that run all the same.

import { readFileSync } from "node:fs";
import * as assert from "uvu/assert";
import { buildGuestImage } from "./guest.js";
import { CONSOLE } from "./scripts.js";
import { LabSuite } from "./support.js";

/** What KVM takes for the same frequency: its tsc_tolerance_ppm, by default. */
const TOLERANCE_PPM = 250;
/** The TSC's frequency, where the processor's stays the same. */
const MHZ = Number(/^cpu MHz\s*: ([\d.]+)$/m.exec(readFileSync("/proc/cpuinfo", "utf8"))?.[1]);
/** Too low, and not by more than the 1 % that Linux's second measure corrects. */
const FIRST_KHZ = Math.round(MHZ * 1000 * 0.998);

const lab = new LabSuite("clock", { kernelArgs: `tsc_early_khz=${FIRST_KHZ}` });

lab.test("a guest's timers run, whatever its host measured first", async () => {
  const log = await lab.host.kernelLog();
  const [first, second] = [
    /Detected ([\d.]+) MHz TSC/,
    /Refined TSC clocksource calibration: ([\d.]+) MHz/,
  ].map((line) => Number(line.exec(log)?.[1]));
  if (!(second! - first! > (second! * TOLERANCE_PPM) / 1e6))
    console.log(`    shows nothing on this machine: first ${first} MHz, then ${second} MHz`);
  const vmm = await lab.start(await buildGuestImage({ script: CONSOLE }));
  await vmm.guestSays("ready");
  // Where each comes later than the one before, not even a minute is enough.
  await vmm.sh("for i in $(seq 50); do sleep 0.05; done", 60_000);
  vmm.process.write("exit 0\n");
  assert.is((await vmm.end()).status, 0);
  assert.not.match(await lab.host.kernelLog(), /TSC rate below hardware speed/);
});

if (process.env.PVDMA_HOST_BDF === undefined) lab.run();
