// Failures on demand while I/O is verified: maps fail at random, in long runs, for good reasons and for none. Not a byte
// is wrong, nothing hangs, nobody else notices, and when it stops all is as it was.

import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { scratchDir } from "./cache.js";
import { bindVfio } from "./host.js";
import { l1Bdf } from "./l1.js";
import {
  assertNoComplaints,
  assertNothingLeft,
  commandTimeoutMs,
  endDriven,
  guestHash,
  loadNvme,
  startDriven,
  verify,
} from "./recovery.js";
import { assertViewsAgree, LabSuite, MiB, type RunningVmm, randomDisk } from "./support.js";

const DISK_BYTES = sized(4, 64) * MiB;
/** Each writes the disk, in random order, and verifies it. */
const LOOPS = sized(1, 2);
const IOS = (2 * LOOPS * DISK_BYTES) / 4096;
/** `fraction` of the map calls that are struck. */
const RULES = [
  { rule: "p=0.01", fraction: 0.01 },
  { rule: "p=0.2", fraction: 0.2 },
  { rule: "every=1000,burst=100,errno=ENOMEM", fraction: 0.1 },
  { rule: "p=0.05,errno=EAGAIN", fraction: 0.05 },
];

// Machines wander by far more than a driver would. So two devices are read from at the same time, on the same vCPUs, and
// what is compared is the throughput of the one that is injected into as a share of the other's: the one whose I/Os cost
// more gets fewer done. The median of many segments does not mind when some are off.
const SEGMENTS = sized(3, 15);
const SEGMENT_SECONDS = sized(1, 3);
const TOLERANCE = 0.1;

const files = scratchDir();
const lab = new LabSuite(
  "recovery-inject",
  { diskBytes: DISK_BYTES, nvme1: { file: randomDisk(files.path, "other.raw", MiB) } },
  async () => {
    if (lab.host.kind === "l1") await bindVfio(lab.host, l1Bdf.nvme1);
  },
);

const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!;

/** Throughput of the first disk, as a share of the second's where there is one. */
async function throughput(vmm: RunningVmm, when: string, disks: readonly string[]): Promise<number> {
  const line = await vmm.sh(`throughput ${SEGMENTS} ${SEGMENT_SECONDS} ${disks.join(" ")}`, commandTimeoutMs);
  const iops = line.trim().split(" ").map(Number);
  assert.is(iops.length, SEGMENTS * disks.length, line);
  const pairs = Array.from({ length: SEGMENTS }, (_, i) =>
    iops.slice(i * disks.length, (i + 1) * disks.length),
  );
  const share = median(pairs.map(([own, other = 1]) => own! / other));
  console.log(
    `    ${when}: ${pairs.map((pair) => pair.join("/")).join(" ")} IOPS; median ${share.toFixed(3)}`,
  );
  return share;
}

for (const cpus of SOAK ? [1, 4] : [1]) {
  lab.test(
    `maps fail at random and in bursts, ${cpus} vCPUs: verified, and as fast as before when it stops`,
    async () => {
      const other = lab.host.kind === "l1";
      const vmm = await startDriven(lab.host, other ? [lab.bdf, l1Bdf.nvme1] : [lab.bdf], {
        args: ["--cpus", String(cpus)],
      });
      const disks = await loadNvme(vmm, other ? 2 : 1);
      await lab.checkHash(await guestHash(vmm, disks[0]!));
      const before = await throughput(vmm, "before", disks);

      const control = await vmm.control();
      let injected = 0;
      for (const { rule, fraction } of RULES) {
        assert.match(await vmm.tell("inject", `map,device=${lab.bdf},${rule}`), /^ok rule \d+\n$/);
        const begun = Date.now();
        const ios = await verify(vmm, disks[0]!, `--bs=4k --iodepth=64 --size=100% --loops=${LOOPS}`);
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
        injected += struck!;

        if (SOAK || rule === RULES.at(-1)!.rule) {
          const after = await throughput(vmm, "after", disks);
          if (SOAK && other)
            assert.ok(after > (1 - TOLERANCE) * before, `throughput: ${before} before, ${after} after`);
        }
        const { host } = await assertViewsAgree(vmm);
        assert.is(host.get("dma/injected"), injected, "counted, and none since");
        assert.is(host.get(`devices/${lab.bdf}/dma/injected`), injected);
        assert.is(host.get("dma/limit_hits"), 0, "no real failure");
      }
      await lab.checkHash(await guestHash(vmm, disks[0]!));
      await assertNoComplaints(vmm);
      await assertNothingLeft(vmm);
      await endDriven(vmm);
    },
  );
}

lab.run();
