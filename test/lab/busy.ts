// Guests whose device is in the middle of its DMA when their life ends, and what has to hold then. Used by
// reboot.test.ts, where the VMM lives on, and crash.test.ts, where it ends, too.

import * as assert from "uvu/assert";
import { buildGuestImage } from "./guest.js";
import type { Policy } from "./recovery.js";
import { CONSOLE } from "./scripts.js";
import { LabSuite, MiB, type RunningVmm } from "./support.js";

// Requests of up to 512 KiB, so many at a time that to unmap them all takes as long, in the lab, as the device needs for
// several of them: it is seen at work if it is not stopped first.
const IOPS = 20;
const READERS = 16;
const IN_FLIGHT = 40;
const READ = "while true; do dd if=/dev/nvme0n1 of=/dev/null bs=2M iflag=direct 2> /dev/null; done";
const OUTSTANDING = "cat /sys/kernel/debug/pvdma/*/outstanding";

export class BusyGuests {
  readonly lab: LabSuite;
  #image = "";
  #idlePages = 0;

  constructor(name: string) {
    this.lab = new LabSuite(name, { diskBytes: 2 * MiB, iops: IOPS, hugePages: true }, async () => {
      this.#image = await buildGuestImage({ script: CONSOLE });
      this.#idlePages = await this.lab.pinnedPages();
    });
  }

  start(policy: Policy, ...args: string[]): Promise<RunningVmm> {
    return this.lab.start("--memory", "256M", "--dma", policy, ...args, this.#image);
  }

  /**
   * Waits for a guest that begins its life, and sees that nothing is left of whatever was before. Returns the mappings
   * that its VMM has taken back so far.
   */
  async begin(vmm: RunningVmm): Promise<number> {
    await vmm.guestSays("ready");
    await this.nothingLeft();
    const figures = await vmm.statistics();
    assert.is(figures.get("dma/pinned_bytes"), 0);
    return figures.get("dma/released_mappings")!;
  }

  /** Has it read what the disk holds, and keep its device busy. Returns the mappings its driver held before that. */
  async busy(vmm: RunningVmm): Promise<number> {
    await this.lab.checkHash((await vmm.sh("modprobe pvdma && modprobe nvme && wait_disk && hash")).trim());
    const mappings = Number(await vmm.sh(OUTSTANDING));
    assert.ok((await this.pinnedPages()) > 0, "what the device may reach is pinned");
    await vmm.sh(`for i in $(seq ${READERS}); do ${READ} & done`);
    await vmm.sh(`until [ $(${OUTSTANDING}) -ge ${IN_FLIGHT} ]; do sleep 0.1; done`);
    return mappings;
  }

  /** Pages pinned on the host, less those that were before the first test. */
  async pinnedPages(): Promise<number> {
    return (await this.lab.pinnedPages()) - this.#idlePages;
  }

  /** Asserts that nothing is pinned, and that no device was stopped later than its mappings. */
  async nothingLeft(): Promise<void> {
    assert.is(await this.pinnedPages(), 0, "pages left pinned");
    assert.equal(await this.lab.iommuFaults(), [], "the device reached for memory that was taken from it");
  }
}
