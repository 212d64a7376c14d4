// Memory that a device is to read and that is written only once it is mapped: the device reads what was written, wherever
// in RAM it is, and on hosts with either kernel. A host that pins another page than the guest writes would say ok.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { buildTestGuest } from "../guest/build.js";
import { bindVfio } from "./host.js";
import { bootL1, type L1, l1Bdf } from "./l1.js";
import { kernelSeries } from "./packages.js";
import { labTest, RunningVmm } from "./support.js";

for (const kernel of kernelSeries) {
  const test = suite(`unwritten-${kernel}`);
  let host: L1;
  test.before(async () => {
    host = await bootL1({ kernel, edu: true, name: `unwritten-${kernel}` });
    await bindVfio(host, l1Bdf.edu);
  });
  test.after(() => host?.close());

  const name = `${kernel} host: what is written after it was mapped for reading is what the device reads`;
  labTest(
    test,
    name,
    () => host,
    async () => {
      const image = await buildTestGuest("unwritten", host.shareDir);
      const vmm = await RunningVmm.start(host, ["--memory", "4G", "--assign", l1Bdf.edu, image]);
      for (const where of ["low", "high"]) assert.is(await vmm.guestSays("unwritten"), `${where} wrong=0`);
      const { status, stats } = await vmm.end();
      assert.is(status, 0);
      assert.is(stats.get("dma/faults"), 0);
      assert.is(stats.get("hypercalls/map/errors"), 0);
    },
  );
  test.run();
}
