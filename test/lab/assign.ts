// The main job in the lab, with one kernel in the guest: it drives a really assigned NVMe controller through map and
// unmap calls. Used by assign-6.1.test.ts and assign-6.12.test.ts, which run side by side.

import { setTimeout } from "node:timers/promises";
import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { buildGuestImage, buildModule } from "./guest.js";
import { getKernel, type KernelSeries } from "./packages.js";
import { READ_AND_WRITE } from "./scripts.js";
import { LabSuite, MiB } from "./support.js";

async function fullImage(kernel: KernelSeries): Promise<string> {
  const { file } = await buildModule(await getKernel(kernel), "test/modules", "dmaprobe");
  return buildGuestImage({
    asShipped: true,
    kernel,
    script: READ_AND_WRITE,
    modules: ["nvme", "pci-stub"],
    moduleFiles: [file],
    tools: ["fio"],
  });
}

/** Runs the tests for one guest kernel: with this many vCPUs, in the soak with 1 and with 4. */
export function runAssignTests(kernel: KernelSeries, vcpus: 1 | 2): void {
  const lab = new LabSuite(`assign-${kernel}`, { diskBytes: 16 * MiB, hugePages: kernel === "6.1" });
  for (const cpus of SOAK ? [1, 4] : [vcpus]) {
    lab.test(
      `a ${kernel} guest with ${cpus} vCPUs reads and writes the whole disk, under 64 MiB locked`,
      async () => {
        const image = await fullImage(kernel);
        const vmm = await lab.start("--cpus", String(cpus), image);
        assert.is(await vmm.guestSays("cpus"), String(cpus));
        const hash = await vmm.guestSays("hash");
        await lab.checkHash(hash);

        await vmm.guestSays("fio");
        let fioEnded = false;
        const verified = vmm.guestSays("verified").finally(() => {
          fioEnded = true;
        });
        verified.catch(() => {}); // looked at below
        const locked: number[] = [];
        while (!fioEnded) {
          const bytes = await vmm.lockedBytes();
          if (!fioEnded) locked.push(bytes);
          await setTimeout(500); // looking costs the host's only processor
        }
        assert.match(await verified, /"error" : 0/, "fio verified without an error");
        assert.ok(locked.length >= 2 && Math.max(...locked) > 0, `locked memory was seen in use: ${locked}`);
        assert.ok(Math.max(...locked) < 64 * MiB, `locked while fio ran: ${Math.max(...locked)} bytes`);

        const rehash = await vmm.guestSays("rehash");
        assert.is.not(rehash, hash, "fio changed the disk");
        const probes = [
          await vmm.guestSays("probe"),
          await vmm.guestSays("probe"),
          await vmm.guestSays("probe"),
        ];
        assert.equal(probes, [
          "0000:00:00.0: no ops of its own",
          "0000:00:00.0: mapped one to one",
          "0000:00:01.0: ops of its own",
        ]);
        assert.ok(Number(await vmm.guestSays("before")) > 0, "the driver had mappings");
        await vmm.guestSays("unloaded");
        assert.is(await vmm.lockedBytes(), 0, "locked after the modules were unloaded");
        vmm.goOn();
        assert.is(await vmm.guestSays("bad"), "0", "no warning in the guest's kernel log");

        const { status, script, stats } = await vmm.end();
        assert.is(status, 0, "the VMM's exit status");
        assert.is(script, 0, "the script's exit status");
        assert.is(
          stats.get("hypercalls/is_assigned/calls"),
          2,
          "one question per device: NVMe and host bridge",
        );
        assert.is(stats.get("dma/pinned_bytes"), 0);
        assert.is(stats.get("dma/mapped_bytes"), 0);
        const errors = ["probe", "is_assigned", "map", "unmap", "map_list", "unmap_list"].map((call) =>
          stats.get(`hypercalls/${call}/errors`),
        );
        assert.equal(errors, [0, 0, 0, 0, 0, 0]);
        assert.ok((stats.get("hypercalls/map/calls") ?? 0) > 1000, "every I/O was a map call");
        const after = await lab.diskHash();
        if (after !== undefined) assert.is(after, rehash, "the disk's file holds what the guest wrote");
      },
    );
  }
  lab.run();
}
