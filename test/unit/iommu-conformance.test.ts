// The software IOMMU gives the answers of the conformance suite's table. The lab asks VFIO for the same.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { DEFAULT_RANGES } from "../../iommu-emul/iommu.js";
import { runOnSoftware } from "../conformance/software.js";
import { expectedAnswers, named, SCENES } from "../conformance/steps.js";

const conformance = suite("iommu-emul: conformance");

/** With the addresses that VT-d has, 39 bits of them, and with all. */
const WIDTHS = { "39 bits": 2 ** 39, "48 bits": 2 ** 48 };
/** The memory's own alignment decides about superpages: 2 MiB, and one page only. */
const PLACES = { "memory aligned": 0x7f12_0000_0000, "memory not aligned": 0x7f12_0000_1000 };

for (const scene of SCENES) {
  for (const [width, end] of Object.entries(WIDTHS)) {
    for (const [place, memory] of Object.entries(PLACES)) {
      conformance(`${scene.name}, ${width}, ${place}`, async () => {
        const ranges = DEFAULT_RANGES.map(({ first, last }) => ({ first, last: Math.min(last, end - 1) }));
        const { answers, limits } = await runOnSoftware(scene, memory, ranges);
        const stage = { limits, memory };
        assert.deepEqual(
          named(scene, stage, answers),
          named(scene, stage, expectedAnswers(scene, stage, false)),
        );
      });
    }
  }
}

conformance.run();
