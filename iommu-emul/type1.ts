// A software IOMMU domain that follows the rules of VFIO type1v2 (linux/drivers/vfio/vfio_iommu_type1.c, 6.1): a
// backend for the engine, and what a device asks where its DMA goes. For one thread only, so far: it keeps its
// tables as objects. Addresses are bytes, IOVAs below 2^48, `last` is inclusive.

import { type Hva, hva, type Iova, PAGE_BYTES } from "../hypercalls/addresses.js";
import type { BackendLimits, DmaBackend } from "../hypercalls/backend.js";
import { ERRNO } from "../hypercalls/status.js";

export interface Type1Options {
  /** IOVAs that can be mapped; what lies between is a hole. */
  readonly ranges: BackendLimits["ranges"];
  /** Most mappings at a time: the module option dma_entry_limit. */
  readonly entries: number;
  /** RLIMIT_MEMLOCK in bytes. As in type1, every mapping counts, also of a page that another one has pinned. */
  readonly lockedBytesMax?: number;
  /** Memory of this process that can be pinned; without it, all can. */
  readonly memory?: readonly { readonly hva: Hva; readonly bytes: number }[];
}

interface Mapping {
  readonly iova: number;
  readonly hva: number;
  readonly bytes: number;
  readonly access: number;
}

// A page table as the hardware has it: 512 slots per table, each empty, a table of the next level, or the end of the
// walk, on every level (superpages). 4 levels of 9 bits and 12 bits of offset are 48 bits.
const SLOTS = 512;
const TOP_LEVEL = 3;
const IOVA_END = 2 ** 48;
/** Where 64-bit addresses wrap. */
const WRAP = 2 ** 64;
/** IOVA bytes under one slot of a level. */
const spanOf = (level: number): number => PAGE_BYTES * SLOTS ** level;

class Table {
  readonly slots: (Table | Mapping | undefined)[] = new Array(SLOTS);
  used = 0;
}

export class Type1 implements DmaBackend {
  readonly #options: Type1Options;
  readonly #root = new Table();
  #entriesUsed = 0;
  #lockedBytes = 0;

  constructor(options: Type1Options) {
    this.#options = options;
  }

  limits(): BackendLimits {
    const { ranges, entries } = this.#options;
    return { ranges, entries, pageSizeMask: 2 ** 64 - PAGE_BYTES };
  }

  /** Mappings there are. */
  get entriesUsed(): number {
    return this.#entriesUsed;
  }

  /** Bytes that count against the locked-memory limit. */
  get lockedBytes(): number {
    return this.#lockedBytes;
  }

  /** VFIO_IOMMU_MAP_DMA: checks and errnos in the kernel's order. */
  map(at: Iova, from: Hva, bytes: number, access: number): number {
    const { ranges, entries, lockedBytesMax = Number.POSITIVE_INFINITY, memory } = this.#options;
    if (access === 0) return ERRNO.EINVAL;
    if (bytes <= 0 || bytes % PAGE_BYTES || at % PAGE_BYTES || from % PAGE_BYTES) return ERRNO.EINVAL;
    if (at + bytes > WRAP || from + bytes > WRAP) return ERRNO.EINVAL;
    const last = at + bytes - 1;
    if (this.#firstIn(this.#root, TOP_LEVEL, 0, at, last) !== undefined) return ERRNO.EEXIST;
    if (this.#entriesUsed >= entries) return ERRNO.ENOSPC;
    if (!ranges.some((range) => range.first <= at && last <= range.last)) return ERRNO.EINVAL;
    if (this.#lockedBytes + bytes > lockedBytesMax) return ERRNO.ENOMEM;
    if (memory && !memory.some((part) => part.hva <= from && from + bytes <= part.hva + part.bytes)) {
      return ERRNO.EFAULT;
    }
    this.#entriesUsed++;
    this.#lockedBytes += bytes;
    this.#set(this.#root, TOP_LEVEL, 0, { iova: at, hva: from, bytes, access });
    return 0;
  }

  /** VFIO_IOMMU_UNMAP_DMA: whole mappings only, cutting one is EINVAL, and nothing there is 0 bytes, not an error. */
  unmap(at: Iova, bytes: number): number {
    if (bytes <= 0 || bytes % PAGE_BYTES || at % PAGE_BYTES || at + bytes > WRAP) return -ERRNO.EINVAL;
    const last = at + bytes - 1;
    const atStart = this.#lookup(at);
    if (atStart !== undefined && atStart.iova < at) return -ERRNO.EINVAL;
    const atEnd = this.#lookup(last);
    if (atEnd !== undefined && atEnd.iova + atEnd.bytes - 1 > last) return -ERRNO.EINVAL;
    let unmapped = 0;
    for (let from: number = at; ; ) {
      const mapping = this.#firstIn(this.#root, TOP_LEVEL, 0, from, last);
      if (mapping === undefined) return unmapped;
      from = mapping.iova + mapping.bytes;
      this.#clear(this.#root, TOP_LEVEL, 0, mapping);
      this.#entriesUsed--;
      this.#lockedBytes -= mapping.bytes;
      unmapped += mapping.bytes;
    }
  }

  /** Where a device's access to one byte goes; `access` is MAP_FLAG.read or MAP_FLAG.write. -1: a fault. */
  translate(at: Iova, access: number): Hva | -1 {
    const mapping = this.#lookup(at);
    if (mapping === undefined || (mapping.access & access) === 0) return -1;
    return hva(mapping.hva + (at - mapping.iova));
  }

  #lookup(at: number): Mapping | undefined {
    if (at >= IOVA_END) return undefined;
    let table = this.#root;
    for (let level = TOP_LEVEL; ; level--) {
      const entry = table.slots[Math.floor(at / spanOf(level)) % SLOTS];
      if (!(entry instanceof Table)) return entry;
      table = entry;
    }
  }

  /** The lowest mapping that has a byte in the range. Walks tables that are there, and leaves out the rest. */
  #firstIn(table: Table, level: number, base: number, first: number, last: number): Mapping | undefined {
    const span = spanOf(level);
    const from = Math.max(0, Math.floor((first - base) / span));
    const to = Math.min(SLOTS - 1, Math.floor((last - base) / span));
    for (let slot = from; slot <= to; slot++) {
      const entry = table.slots[slot];
      if (entry === undefined) continue;
      if (!(entry instanceof Table)) return entry;
      const found = this.#firstIn(entry, level - 1, base + slot * span, first, last);
      if (found !== undefined) return found;
    }
    return undefined;
  }

  /** Enters a mapping, in slots as large as its alignment allows. */
  #set(table: Table, level: number, base: number, mapping: Mapping): void {
    this.#eachSlot(level, base, mapping, (slot, whole) => {
      let entry = table.slots[slot];
      if (entry === undefined) {
        entry = whole ? mapping : new Table();
        table.slots[slot] = entry;
        table.used++;
      }
      if (entry instanceof Table) this.#set(entry, level - 1, base + slot * spanOf(level), mapping);
    });
  }

  /** Removes a mapping, and the tables that it leaves empty. */
  #clear(table: Table, level: number, base: number, mapping: Mapping): void {
    this.#eachSlot(level, base, mapping, (slot) => {
      const entry = table.slots[slot];
      if (entry instanceof Table) {
        this.#clear(entry, level - 1, base + slot * spanOf(level), mapping);
        if (entry.used > 0) return;
      }
      table.slots[slot] = undefined;
      table.used--;
    });
  }

  /** Visits the slots of a table that a mapping touches; `whole` where it fills the slot. */
  #eachSlot(
    level: number,
    base: number,
    mapping: Mapping,
    visit: (slot: number, whole: boolean) => void,
  ): void {
    const span = spanOf(level);
    const end = mapping.iova + mapping.bytes;
    const to = Math.min(SLOTS - 1, Math.floor((end - 1 - base) / span));
    for (let slot = Math.max(0, Math.floor((mapping.iova - base) / span)); slot <= to; slot++) {
      const start = base + slot * span;
      visit(slot, mapping.iova <= start && start + span <= end);
    }
  }
}
