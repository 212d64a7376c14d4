// One suite of rules, asked of VFIO, with a real IOMMU and a device that does DMA, and of the software IOMMU: the same
// answers, errno by errno and byte by byte.

import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { parseFault } from "../../vmm/iommu-faults.js";
import { runOnSoftware } from "../conformance/software.js";
import { expectedAnswers, LOCKED_BYTES_MAX, named, SCENES } from "../conformance/steps.js";
import type { SceneReport } from "../conformance/vfio.js";
import { repoRoot } from "./cache.js";
import { bindVfio, type Host, must, shellQuote } from "./host.js";
import { bootL1, l1Bdf } from "./l1.js";
import { labTest } from "./support.js";

const test = suite("conformance");
let host: Host;

test.before(async () => {
  host = await bootL1({ edu: true, name: "conformance" });
  await bindVfio(host, l1Bdf.edu);
});
test.after(() => host?.close());

/** Accesses that the IOMMU refused the device, as the kernel's log has them: each page once. */
async function refusedPages(): Promise<Set<string>> {
  const lines = (await host.kernelLog()).split("\n").map((line) => line.replace(/^\[[^\]]*\] /, ""));
  const faults = lines.map(parseFault).filter((fault) => fault?.device.endsWith(l1Bdf.edu.slice(5)));
  return new Set(faults.map((fault) => `${fault!.access} ${Number.parseInt(fault!.iova, 16)}`));
}

labTest(
  test,
  "VFIO and the software IOMMU give the same answers",
  () => host,
  async () => {
    const program = join(repoRoot, "build/test/conformance/vfio.js");
    const output = await must(
      host,
      `exec prlimit --memlock=${LOCKED_BYTES_MAX} setpriv --bounding-set -ipc_lock -- node ${shellQuote(program)} ${l1Bdf.edu}`,
    );
    const reports = JSON.parse(output) as SceneReport[];
    assert.is(reports.length, SCENES.length);
    let steps = 0;
    for (const [index, scene] of SCENES.entries()) {
      const { memory, limits, answers } = reports[index]!;
      const software = await runOnSoftware(scene, memory, limits.ranges);
      const stage = { memory, limits };
      const expected = (vtd: boolean) => named(scene, stage, expectedAnswers(scene, stage, vtd));
      assert.equal(named(scene, stage, answers), expected(true), `VFIO: ${scene.name}`);
      assert.equal(named(scene, stage, software.answers), expected(false), `software: ${scene.name}`);
      assert.is(limits.entries, scene.entries, "entries that the container says it has");
      steps += answers.length;
      if (scene.name !== "DMA") continue;
      // QEMU's VT-d keeps one record until the kernel has read it, and the kernel logs few in 5 s: some may be missing; none
      // may be of another page.
      const recorded = new Set(
        software.faults.map(({ access, iova }) => `${access} ${Math.floor(iova / 4096) * 4096}`),
      );
      const refused = await refusedPages();
      assert.ok(refused.size > 0, "the kernel logged what was refused");
      assert.equal(
        [...refused].filter((each) => !recorded.has(each)),
        [],
        "refused by VT-d alone",
      );
      console.log(
        `    faults: ${recorded.size} pages in the software's queue, ${refused.size} in the kernel's log`,
      );
    }
    console.log(
      `    ${steps} steps; VFIO's ranges end at 2^${Math.log2(reports[0]!.limits.ranges.at(-1)!.last + 1)}`,
    );
  },
);

test.run();
