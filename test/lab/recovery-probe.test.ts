// Each call that a driver makes while it probes fails once: the driver copes or gives up in good order, leaves nothing
// mapped, and binds when it is asked again.

import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { type KernelSeries, kernelSeries } from "./packages.js";
import { assertNothingLeft, endDriven, loadNvme, type Policy, policies, startDriven } from "./recovery.js";
import { assertViewsAgree, LabSuite, MiB, type RunningVmm } from "./support.js";

/** Enough for 200 maps: those of the probe, of the scan for partitions, and of reading it in pieces of 16 KiB. */
const DISK_BYTES = 4 * MiB;
const CALLS = SOAK ? Array.from({ length: 200 }, (_, call) => call) : [0, 1, 3, 5, 8, 40, 199];
/** So many of them a probe makes under policy lazy, too; what finds its buffer or its list idle makes none. */
const FEWEST = 15;
const ROUND_TIMEOUT_MS = 120_000;
const SLOT = "0000:00:01.0";
const DEBUGFS = `/sys/kernel/debug/pvdma/${SLOT}`;

const lab = new LabSuite("recovery-probe", { diskBytes: DISK_BYTES, hugePages: true });

/** Binds the driver, reads the disk if there is one, and unbinds it. */
async function round(vmm: RunningVmm): Promise<{ outcome: string; log: string }> {
  const outcome = (await vmm.sh(`bind ${SLOT}`, ROUND_TIMEOUT_MS)).trim();
  if (outcome === "disk") {
    const read = `dd if=$(disk_of ${SLOT}) iflag=direct bs=16k 2> /dev/null | sha256sum`;
    await lab.checkHash((await vmm.sh(read, ROUND_TIMEOUT_MS)).split(" ")[0]!);
  }
  await vmm.sh(`unbind ${SLOT}`, ROUND_TIMEOUT_MS);
  assert.is(await vmm.sh("complaints"), "", "the guest's kernel log");
  return { outcome, log: await vmm.sh("dmesg | sed -n '/nvme/s/^[^]]*] //p'") };
}

/**
 * Nothing is mapped, and the driver has given everything back: nvme of 6.1 its shadow doorbells only when its work is
 * done, which after a failed probe is after the unbind. What was taken back by force then is what it gave back late.
 */
async function assertNothingMapped(policy: Policy, vmm: RunningVmm): Promise<void> {
  await vmm.sh(`for i in $(seq 100); do [ $(cat ${DEBUGFS}/leaked) = 0 ] && break; sleep 0.1; done`);
  const { host, guest } = await assertViewsAgree(vmm);
  assert.is(guest.get(`${SLOT}/outstanding`), 0, "the guest has mappings");
  assert.is(guest.get(`${SLOT}/leaked`), 0, "the driver left mappings behind");
  assert.is(host.get("dma/mapped_bytes"), 0, "the host has mappings");
  assert.is(host.get("dma/pinned_bytes"), 0, "the host has pages pinned");
  // Under policy cached nothing of the domain's is a single driver's.
  if (policy !== "cached")
    assert.is(
      host.get("dma/released_mappings"),
      guest.get(`${SLOT}/late`),
      "what had to be taken back by force",
    );
}

async function failsOnce(policy: Policy, kernel: KernelSeries): Promise<void> {
  const vmm = await startDriven(lab.host, [lab.bdf], { kernel, args: ["--dma", policy] });
  await loadNvme(vmm);
  await vmm.sh(`unbind ${SLOT}`);
  const first = await round(vmm);
  assert.is(first.outcome, "disk", first.log);

  const control = await vmm.control();
  const summary = new Map<string, number[]>();
  // Under policy lazy a call that meets a limit is made again when something is idle.
  const times = policy === "lazy" ? "next=1,burst=2" : "next=1";
  for (const call of CALLS) {
    if (SOAK && call % 20 === 0) console.log(`    call ${call}: ${new Date().toISOString()}`);
    await control.ask(`inject map,skip=${call},${times}`);
    const { outcome, log } = await round(vmm);
    const rules = await control.ask("inject");
    await control.ask("uninject all");
    const struck = Number(/struck (\d+)\)/.exec(rules)![1]);
    if (policy === "lazy" && call >= FEWEST && struck === 0) break;
    assert.ok(struck > 0, `call ${call} came`);
    assert.ok(["disk", "failed", "no disk"].includes(outcome), `call ${call}: ${outcome}\n${log}`);
    await assertNothingMapped(policy, vmm);
    const again = await round(vmm);
    assert.is(again.outcome, "disk", `bound at the next try after call ${call} failed\n${again.log}`);

    // With what it said, but for what changes from run to run.
    const said = outcome === "disk" ? "" : log.trim().split("\n").slice(-2).join(" | ");
    const bytes = /no mapping of (\d+) bytes/.exec(log)?.[1] ?? "?";
    const what = `${outcome}, ${bytes} bytes${said && `: ${said}`}`.replace(/0x[0-9a-f]+/g, "0x…");
    summary.set(what, [...(summary.get(what) ?? []), call]);
  }
  for (const [what, calls] of summary) console.log(`    ${calls.join(" ")}: ${what}`);
  assert.ok(
    [...summary.keys()].some((what) => !what.startsWith("disk")),
    "some failures end a probe",
  );
  await assertNothingLeft(vmm);
  await endDriven(vmm);
}

for (const policy of policies("cached"))
  for (const kernel of SOAK ? kernelSeries : (["6.12"] as const))
    lab.test(`${policy}, ${kernel} guest: each map of a probe fails once`, () => failsOnce(policy, kernel));

lab.run();
