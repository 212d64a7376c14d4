// A backend in shared memory that notices when two mappings meet, for tests with threads.

import { PAGE_BYTES } from "../../../hypercalls/addresses.js";
import type { DmaBackend } from "../../../hypercalls/backend.js";

/** Who has which IOVA page, by atomic exchange: a page mapped twice, or unmapped twice, is a fault. */
export class OwnerTable implements DmaBackend {
  constructor(
    readonly owners: Int32Array,
    readonly faults: Int32Array,
  ) {}

  map(iova: number, hva: number, bytes: number): number {
    for (let at = 0; at < bytes; at += PAGE_BYTES) {
      const owner = (hva + at) / PAGE_BYTES + 1;
      const before = Atomics.exchange(this.owners, (iova + at) / PAGE_BYTES, owner);
      if (before !== 0) Atomics.add(this.faults, 0, 1);
    }
    return 0;
  }

  unmap(iova: number, bytes: number): number {
    let unmapped = 0;
    for (let at = 0; at < bytes; at += PAGE_BYTES) {
      if (Atomics.exchange(this.owners, (iova + at) / PAGE_BYTES, 0) !== 0) unmapped += PAGE_BYTES;
    }
    return unmapped;
  }
}
