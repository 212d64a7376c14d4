// The lab's own: a host that measured its TSC wrongly at first, as busy machines do, has guests that run all the same.

import { readFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { buildGuestImage } from "./guest.js";
import { bootL1, type L1 } from "./l1.js";
import { CONSOLE } from "./scripts.js";
import { labTest, RunningVmm } from "./support.js";

/** What a KVM takes for the same frequency: its tsc_tolerance_ppm, by default. */
const TOLERANCE_PPM = 250;
/** The TSC's frequency, where the processor's stays the same. */
const MHZ = Number(/^cpu MHz\s*: ([\d.]+)$/m.exec(readFileSync("/proc/cpuinfo", "utf8"))?.[1]);
/** Too low, and not by more than the 1 % that Linux's second measure corrects. */
const FIRST_KHZ = Math.round(MHZ * 1000 * 0.998);

const test = suite("clock");
let host: L1;
test.before(async () => {
  host = await bootL1({ kernelArgs: `tsc_early_khz=${FIRST_KHZ}`, name: "clock" });
});
test.after(() => host?.close());

labTest(
  test,
  "a guest's timers run, whatever its host measured first",
  () => host,
  async () => {
    const log = await host.kernelLog();
    assert.match(log, /Switched to clocksource tsc\n.*kvm_amd: /s, "KVM came when the TSC had been measured");
    const second = Number(/Refined TSC clocksource calibration: ([\d.]+) MHz/.exec(log)?.[1]) * 1000;
    if (!(second - FIRST_KHZ > (second * TOLERANCE_PPM) / 1e6)) {
      console.log(`    no more to show on this machine: first ${FIRST_KHZ} kHz, then ${second} kHz`);
      return;
    }
    const vmm = await RunningVmm.start(host, [await buildGuestImage({ script: CONSOLE })]);
    await vmm.guestSays("ready");
    assert.not.match(await host.kernelLog(), /TSC rate below hardware speed/);
    // Each comes later than the one before where KVM has it wrong.
    await vmm.sh("for i in $(seq 20); do sleep 0.05; done");
    vmm.process.write("exit 0\n");
    assert.is((await vmm.end()).status, 0);
  },
);
test.run();
