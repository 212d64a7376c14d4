// Failures on demand while I/O is verified: maps fail at random, in long runs, for good reasons and for none. Not a byte
// is wrong, nothing hangs, nobody else notices, and when it stops all is as it was. For an assigned controller and for an
// emulated one alike.

import * as assert from "uvu/assert";
import { median } from "../median.js";
import { SOAK, sized } from "../soak.js";
import {
  assertNoComplaints,
  assertNothingLeft,
  assertReads,
  assertSettles,
  commandTimeoutMs,
  endDriven,
  loadNvme,
  type Policy,
  startDriven,
  type TestedDisk,
  verify,
} from "./recovery.js";
import { assertViewsAgree, MiB, type RunningVmm } from "./support.js";

/** Bytes of the disk that is injected into. */
export const DISK_BYTES = sized(4, 64) * MiB;
/** Each writes the disk, in random order, and verifies it. */
const LOOPS = sized(1, 2);
const IOS = (2 * LOOPS * DISK_BYTES) / 4096;
/** `fraction` of the map calls that are struck. */
export const RULES = [
  { rule: "p=0.01", fraction: 0.01 },
  { rule: "p=0.2", fraction: 0.2 },
  { rule: "every=1000,burst=100,errno=ENOMEM", fraction: 0.1 },
  { rule: "p=0.05,errno=EAGAIN", fraction: 0.05 },
];

// Machines wander by far more than a driver would. So two devices are read from at the same time, on the same vCPUs, and
// what is compared is the throughput of the one that is injected into as a share of the other's: the one whose I/Os cost
// more gets fewer done. Single shares wander by a quarter, their median by less the more there are: segments are added
// until it is known well enough to tell a change of TOLERANCE from chance (three standard errors of a difference).
const BATCH = sized(3, 15);
const BATCHES = sized(1, 24);
const SEGMENT_SECONDS = 1;
const TOLERANCE = 0.1;
const STANDARD_ERROR = TOLERANCE / 3 / Math.SQRT2;

/** The standard error of a median, relative to it, by the spread of the middle half, which does not mind outliers. */
function relativeError(values: readonly number[]): number {
  const middle = median(values);
  const deviation = 1.4826 * median(values.map((value) => Math.abs(value / middle - 1)));
  return (1.2533 * deviation) / Math.sqrt(values.length);
}

/** Throughput of the first disk, as a share of the second's where there is one. */
async function throughput(vmm: RunningVmm, when: string, disks: readonly string[]): Promise<number> {
  const shares: number[] = [];
  let error = Number.POSITIVE_INFINITY;
  for (let batch = 0; batch < BATCHES && error > STANDARD_ERROR; batch++) {
    const line = await vmm.sh(`throughput ${BATCH} ${SEGMENT_SECONDS} ${disks.join(" ")}`, commandTimeoutMs);
    const iops = line.trim().split(" ").map(Number);
    assert.is(iops.length, BATCH * disks.length, line);
    for (let at = 0; at < iops.length; at += disks.length) {
      shares.push(iops[at]! / (disks.length > 1 ? Math.max(iops[at + 1]!, 1) : 1));
    }
    error = relativeError(shares);
  }
  const share = median(shares);
  const known = `${share.toFixed(3)} ± ${(error * share).toFixed(3)}`;
  console.log(`    ${when}: ${known} of the other disk's, from ${shares.length} s`);
  if (SOAK)
    assert.ok(error <= STANDARD_ERROR, `${known}: too uncertain; the machine is too busy for this test`);
  return share;
}

/**
 * A guest with this many vCPUs drives the first disk under each rule; the second, where there is one, is what its
 * throughput is compared with. Under policy cached every map makes a call, so that it can fail, while there is a rule, and
 * few do afterwards.
 */
export async function recoversFromInjection(
  policy: Policy,
  [disk, ...others]: readonly [TestedDisk, ...TestedDisk[]],
  cpus: number,
  rules = RULES,
): Promise<void> {
  const vmm = await startDriven(
    disk.host,
    [disk, ...others].map(({ assign }) => assign),
    { args: ["--dma", policy, "--cpus", String(cpus)] },
  );
  const paths = await loadNvme(vmm, 1 + others.length);
  const [path] = paths;
  await assertReads(vmm, disk, path!);
  const before = await throughput(vmm, "before", paths);

  const control = await vmm.control();
  let injected = 0;
  for (const { rule, fraction } of rules) {
    assert.match(await vmm.tell("inject", `map,device=${disk.name},${rule}`), /^ok rule \d+\n$/);
    const begun = Date.now();
    const ios = await verify(vmm, path!, `--bs=4k --iodepth=64 --size=100% --loops=${LOOPS}`);
    const seconds = (Date.now() - begun) / 1000;
    assert.ok(ios >= IOS, `${ios} I/Os of ${IOS}`);
    const listed = await control.ask("inject");
    assert.is(await control.ask("uninject all"), "ok 1 rules removed\n");
    const [matched, struck] = /\(matched (\d+), struck (\d+)\)/.exec(listed)!.slice(1).map(Number);
    console.log(
      `    ${rule}: ${ios} I/Os verified in ${seconds.toFixed(1)} s; ${struck} of ${matched} maps failed`,
    );
    // Half of what is due: a run may end at the beginning of a burst.
    assert.ok(struck! > (fraction / 2) * matched!, listed);
    // Under policy lazy maps that find their buffer idle make no call.
    if (policy !== "lazy") assert.ok(matched! >= ios, "every map made its call");
    injected += struck!;

    if (SOAK || rule === rules.at(-1)!.rule) {
      const after = await throughput(vmm, "after", paths);
      if (SOAK && others.length > 0)
        assert.ok(after > (1 - TOLERANCE) * before, `throughput: ${before} before, ${after} after`);
    }
    if (policy === "lazy") await assertSettles(vmm);
    const { host, guest } = await assertViewsAgree(vmm);
    assert.is(host.get("dma/injected"), injected, "counted, and none since");
    assert.is(host.get(`devices/${disk.name}/dma/injected`), injected);
    assert.is(host.get("dma/limit_hits"), 0, "no real failure");
    if (policy === "cached") {
      const again = await verify(vmm, path!, "--bs=4k --iodepth=16 --size=1M --loops=4 --iomem=malloc");
      const calls = (await vmm.guestStatistics()).get("hypercall_map")! - guest.get("hypercall_map")!;
      assert.ok(calls < again / 2, `cached again: ${calls} calls for ${again} I/Os`);
    }
  }
  for (const [i, each] of [disk, ...others].entries()) await assertReads(vmm, each, paths[i]!);
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
}
