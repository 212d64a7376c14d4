// Guests that crash or reboot in the middle of their device's DMA, again and again in one VMM: the device is stopped
// before its mappings go, nothing stays pinned from one life to the next, and the next driver reads what is there.

import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { BusyGuests } from "./busy.js";
import { POLICIES, type Policy } from "./recovery.js";

/** Each end comes so often. */
const ROUNDS = sized(1, 10);
/** What the guest is told to do. */
const ENDS = {
  reset: "echo b > /proc/sysrq-trigger",
  "triple fault": "echo triple > /sys/kernel/reboot/type; echo b > /proc/sysrq-trigger",
  panic: "echo c > /proc/sysrq-trigger",
  reboot: "reboot -f",
};
type End = keyof typeof ENDS;
const ALL = Object.keys(ENDS) as End[];

const guests = new BusyGuests("reboot");

async function endsAgainAndAgain(policy: Policy, ends: readonly End[]): Promise<void> {
  // Two vCPUs: one causes the end while the other is at work, in a call of the module as likely as not.
  const vmm = await guests.start(policy, "--cpus", "2");
  let before = await guests.begin(vmm);
  for (let round = 0; round < ROUNDS; round++) {
    for (const end of ends) {
      const idle = await guests.busy(vmm);
      vmm.process.write(`${ENDS[end]}\n`);
      const after = await guests.begin(vmm);
      const torn = after - before;
      before = after;
      console.log(`    ${policy}, ${end}: ${torn} mappings torn down; the idle driver had ${idle}`);
      // Under policy cached nothing of the domain's is a single device's; what is left after its end begin() has seen.
      if (policy === "cached") continue;
      // A driver that shuts down unmaps its requests, which policy lazy puts off, and leaves its queues and pools.
      const expected = end !== "reboot" ? torn > idle + 4 : policy === "lazy" || torn <= idle + 4;
      assert.ok(expected, `${end}: ${torn} mappings torn down with the machine, of an idle driver ${idle}`);
    }
  }
  await guests.busy(vmm);
  vmm.process.write("poweroff -f\n");
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.is(stats.get("dma/pinned_bytes"), 0);
  assert.is(stats.get("dma/stuck_mappings"), 0);
  await guests.nothingLeft();
  const said = vmm.process.stderr.split("\n").filter((line) => line.startsWith("vmm: "));
  assert.is(said.length, ends.includes("triple fault") ? ROUNDS : 0, said.join("\n"));
  for (const line of said) assert.match(line, /^vmm: guest: triple fault on vCPU [01]: it starts anew$/);
}

// The short form has each end under one policy.
for (const [policy, ends] of SOAK
  ? POLICIES.map((policy) => [policy, ALL] as const)
  : ([
      ["strict", ["triple fault", "reboot"]],
      ["cached", ["reset", "panic"]],
    ] as const))
  guests.lab.test(`${policy}: ${ends.join(", ")} in the middle of I/O, in one VMM`, () =>
    endsAgainAndAgain(policy, ends),
  );

guests.lab.run();
