// The guest's RAM as a few slots, and lists of runs of it. Pure arithmetic: nothing here touches the memory.
// Pages are numbered twice: gpa pages (gpa / 4096), and RAM pages, 0 to pages - 1 without holes, which fit 31 bits.

import { type Gpa, type Hva, hva, PAGE_BYTES } from "./addresses.js";

/** One contiguous piece of guest RAM. All three are multiples of 4096. */
export interface RamSlot {
  readonly gpa: Gpa;
  readonly bytes: number;
  readonly hva: Hva;
}

/** What reads and writes the guest's memory: the VMM, over the mapping it made. */
export interface GuestMemory {
  /** Copies `bytes` bytes (a multiple of 4) at `gpa` to the front of `into`; false when not all of it is RAM. */
  copyIn(gpa: Gpa, bytes: number, into: Uint32Array): boolean;
  /** Copies `bytes` bytes (a multiple of 4) from the front of `from` to `gpa`; false when not all of it is RAM. */
  copyOut(gpa: Gpa, bytes: number, from: Uint32Array): boolean;
}

export const RAM_SLOTS_MAX = 8;

/**
 * What one map call asks for: runs of RAM that are contiguous in gpa and hva, in IOVA order. One run becomes one
 * backend entry. Each thread has one of these and fills it anew for every call.
 */
export class RunList {
  /** First RAM page of each run. */
  readonly ramPage: Int32Array;
  readonly runPages: Int32Array;
  /** List entry with which each run starts. */
  readonly entry: Int32Array;
  count = 0;
  /** Pages of all runs. */
  pages = 0;
  /** Set by a domain's map: the range's first IOVA page, or the run that could not be done. */
  iovaPage = 0;
  failedRun = 0;

  constructor(entries: number) {
    const runs = entries * RAM_SLOTS_MAX;
    this.ramPage = new Int32Array(runs);
    this.runPages = new Int32Array(runs);
    this.entry = new Int32Array(runs);
  }

  clear(): void {
    this.count = 0;
    this.pages = 0;
    this.failedRun = 0;
  }
}

export class GuestRam {
  /** RAM pages. */
  readonly pages: number;
  /** The gpa page behind the last. */
  readonly endPage: number;
  // Slots side by side: first gpa page, pages, first RAM page, hva.
  readonly #gpaPage: number[] = [];
  readonly #slotPages: number[] = [];
  readonly #ramPage: number[] = [];
  readonly #hva: number[] = [];

  /** Slots ascend by gpa. Throws a RangeError when they are unaligned, overlap, or are too many. */
  constructor(slots: readonly RamSlot[]) {
    let pages = 0;
    let end = 0;
    for (const slot of slots) {
      if (slot.gpa % PAGE_BYTES || slot.hva % PAGE_BYTES || slot.bytes % PAGE_BYTES || slot.bytes <= 0) {
        throw new RangeError(`RAM slot at gpa ${slot.gpa}, ${slot.bytes} bytes, is not made of whole pages`);
      }
      if (slot.gpa < end) throw new RangeError(`RAM slot at gpa ${slot.gpa} overlaps the one before`);
      const before = this.#hva.length - 1;
      if (
        before >= 0 &&
        slot.gpa === end &&
        slot.hva === this.#hva[before]! + this.#slotPages[before]! * PAGE_BYTES
      ) {
        // Contiguous on both sides: one slot, so that a run does not end between them.
        this.#slotPages[before]! += slot.bytes / PAGE_BYTES;
      } else {
        this.#gpaPage.push(slot.gpa / PAGE_BYTES);
        this.#slotPages.push(slot.bytes / PAGE_BYTES);
        this.#ramPage.push(pages);
        this.#hva.push(slot.hva);
      }
      pages += slot.bytes / PAGE_BYTES;
      end = slot.gpa + slot.bytes;
    }
    if (this.#hva.length < 1 || this.#hva.length > RAM_SLOTS_MAX) {
      throw new RangeError(`${this.#hva.length} RAM slots, 1 to ${RAM_SLOTS_MAX} are possible`);
    }
    if (pages >= 2 ** 31) throw new RangeError(`${pages} pages of RAM, below 2^31 are possible`);
    this.pages = pages;
    this.endPage = end / PAGE_BYTES;
  }

  /** Whether every slot begins at a multiple of so many pages. */
  beginsAt(multiple: number): boolean {
    return this.#gpaPage.every((page) => page % multiple === 0);
  }

  /** RAM pages from gpa page `page` to the end of its slot; 0 when it is not RAM. O(slots). */
  pagesFrom(page: number): number {
    for (let slot = 0; slot < this.#gpaPage.length; slot++) {
      const inSlot = page - this.#gpaPage[slot]!;
      if (inSlot < 0) return 0;
      if (inSlot < this.#slotPages[slot]!) return this.#slotPages[slot]! - inSlot;
    }
    return 0;
  }

  /** Whether `count` pages from gpa page `page` are all RAM. */
  contains(page: number, count: number): boolean {
    while (count > 0) {
      const here = this.pagesFrom(page);
      if (here === 0) return false;
      page += here;
      count -= here;
    }
    return true;
  }

  /**
   * Appends `count` pages (1 to 2^31 - 1) from gpa page `page` to a list: to its last run where that goes on without a
   * gap, as runs of their own otherwise. False when they are not all RAM; the list is then of no use. O(slots).
   */
  append(list: RunList, page: number, count: number, entry: number): boolean {
    for (let slot = 0; slot < this.#gpaPage.length && count > 0; slot++) {
      const inSlot = page - this.#gpaPage[slot]!;
      if (inSlot < 0) return false;
      const left = this.#slotPages[slot]! - inSlot;
      if (left <= 0) continue;
      const pages = Math.min(left, count);
      const ramPage = this.#ramPage[slot]! + inSlot;
      const last = list.count - 1;
      if (inSlot > 0 && last >= 0 && list.ramPage[last]! + list.runPages[last]! === ramPage) {
        list.runPages[last]! += pages;
      } else {
        list.ramPage[list.count] = ramPage;
        list.runPages[list.count] = pages;
        list.entry[list.count] = entry;
        list.count++;
      }
      list.pages += pages;
      page += pages;
      count -= pages;
    }
    return count === 0;
  }

  /** Appends all RAM, a run per slot. */
  appendAll(list: RunList): void {
    for (let slot = 0; slot < this.#gpaPage.length; slot++) {
      this.append(list, this.#gpaPage[slot]!, this.#slotPages[slot]!, 0);
    }
  }

  #slotOf(ramPage: number): number {
    let slot = this.#ramPage.length - 1;
    while (this.#ramPage[slot]! > ramPage) slot--;
    return slot;
  }

  /** Where a RAM page (0 to pages - 1) is in this process. */
  hvaOf(ramPage: number): Hva {
    const slot = this.#slotOf(ramPage);
    return hva(this.#hva[slot]! + (ramPage - this.#ramPage[slot]!) * PAGE_BYTES);
  }

  /** The gpa page of a RAM page (0 to pages - 1). */
  gpaPageOf(ramPage: number): number {
    const slot = this.#slotOf(ramPage);
    return this.#gpaPage[slot]! + (ramPage - this.#ramPage[slot]!);
  }
}
