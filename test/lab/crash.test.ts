// VMMs that end while their device is in the middle of its DMA, killed or with a guest that hangs in its panic: nothing
// stays pinned, the device is stopped before its mappings go, no process is left, and the next start works at once.

import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { BusyGuests } from "./busy.js";
import { policies } from "./recovery.js";
import type { RunningVmm } from "./support.js";

const guests = new BusyGuests("crash");

async function nothingLeft(): Promise<void> {
  await guests.nothingLeft();
  const { stdout } = await guests.lab.host.run('pgrep -f "[d]ist/vmm.js" || true');
  assert.is(stdout.trim(), "", "processes left behind");
}

/** The guest panics and hangs, its device still in its hands. */
async function panic(vmm: RunningVmm): Promise<void> {
  vmm.process.write("echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger\n");
  await vmm.process.waitFor(/end Kernel panic/, 60_000);
  assert.ok((await guests.pinnedPages()) > 0, "what the device may reach is pinned");
}

for (const policy of policies("cached"))
  guests.lab.test(`${policy}: kill -9 in the middle of I/O`, async () => {
    for (let round = 0; round < sized(1, 10); round++) {
      const vmm = await guests.start(policy);
      await guests.begin(vmm);
      await guests.busy(vmm);
      vmm.process.kill("SIGKILL");
      assert.is(await vmm.process.exited, 128 + 9);
      await nothingLeft();
    }
  });

for (const policy of policies("strict"))
  guests.lab.test(
    `${policy}: a guest that hangs in its panic is ended by SIGTERM, and left by Ctrl-A X`,
    async () => {
      for (let round = 0; round < sized(1, 5); round++) {
        for (const how of SOAK ? ["SIGTERM", "Ctrl-A X"] : ["SIGTERM"]) {
          const vmm = await guests.start(policy);
          await guests.begin(vmm);
          const idle = await guests.busy(vmm);
          await panic(vmm);
          if (how === "SIGTERM") vmm.process.kill("SIGTERM");
          else vmm.process.write("\x01x");
          const { status, stats } = await vmm.end(20_000);
          assert.is(status, how === "SIGTERM" ? 1 : 0);
          assert.is(stats.get("dma/pinned_bytes"), 0);
          // Under policy cached nothing of the domain's is a single device's.
          if (policy !== "cached")
            assert.ok(stats.get("dma/released_mappings")! >= idle, "mappings torn down with the machine");
          await nothingLeft();
        }
      }
    },
  );

guests.lab.test("after all that, the device works", async () => {
  const vmm = await guests.start("strict");
  await guests.begin(vmm);
  await guests.busy(vmm);
  vmm.process.write("poweroff -f\n");
  assert.is((await vmm.end()).status, 0);
  await nothingLeft();
});

guests.lab.run();
