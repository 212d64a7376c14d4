// The guest's side of the tracking table as guest-shim/pvdma_table.h has it, over the engine instead of a hypercall: so
// that tests of the host's side have somebody to share the table with.

import { MAP_FLAG, TABLE } from "../../../hypercalls/abi.js";
import { PAGE_BYTES } from "../../../hypercalls/addresses.js";
import type { Engine } from "../../../hypercalls/engine.js";

const PINNED = TABLE.pinned | 0;
const ACCESS = MAP_FLAG.read | MAP_FLAG.write;

export class TableGuest {
  /** Calls that were made. */
  calls = 0;

  constructor(
    readonly entries: Int32Array,
    readonly engine: Engine,
    readonly handle: number,
  ) {}

  /** Maps `pages` pages from `page`; returns a status, and with ok the device may use them. */
  map(page: number, pages: number): number {
    let missing = false;
    for (let at = page; at < page + pages; at++) {
      const before = Atomics.add(this.entries, at, 1);
      if ((before & PINNED) === 0) missing = true;
      else if ((before & TABLE.used) === 0) Atomics.or(this.entries, at, TABLE.used);
    }
    if (!missing) return 0;
    this.calls++;
    const bytes = pages * PAGE_BYTES;
    const result = this.engine.map(this.handle, page * PAGE_BYTES, bytes, 2 ** 64, ACCESS | MAP_FLAG.counted);
    if (result !== 0) this.unmap(page, pages);
    return result;
  }

  /** The device no longer uses them. */
  unmap(page: number, pages: number): void {
    for (let at = page; at < page + pages; at++) {
      if ((Atomics.sub(this.entries, at, 1) & TABLE.countMask) === 0)
        throw new Error(`page ${at}: count below 0`);
    }
  }

  count(page: number): number {
    return this.entries[page]! & TABLE.countMask;
  }

  isPinned(page: number): boolean {
    return (this.entries[page]! & PINNED) !== 0;
  }
}
