// Emulated devices in the lab, beside the real thing: see emulated.ts.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { emulatedTests, FACTS, runFacts } from "./emulated.js";
import { bindVfio, type Host } from "./host.js";
import { bootL1, l1Bdf } from "./l1.js";
import { labTest } from "./support.js";

const test = suite("emulated");
let host: Host;
test.before(async () => {
  host = await bootL1({ edu: true, name: "emulated" });
  await bindVfio(host, l1Bdf.edu);
});
test.after(() => host?.close());
const add = (name: string, body: (host: Host) => Promise<void>) =>
  labTest(
    test,
    name,
    () => host,
    () => body(host),
  );

add("QEMU's edu, assigned, does what an emulated one does", async (host) => {
  const { stats, messages } = await runFacts(host, ["--assign", l1Bdf.edu], FACTS);
  // The host's kernel logs a few and then no more for a while.
  assert.ok(stats.get(`devices/${l1Bdf.edu}/dma/faults`)! >= 1, messages.join("\n"));
});
for (const [name, body] of emulatedTests) add(name, body);
test.run();
