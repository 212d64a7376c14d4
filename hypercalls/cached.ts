// Policy cached: IOVA = gpa, and a page stays mapped when its driver has unmapped it, so that the next map of it needs no
// call. The guest counts its mappings in the tracking table (TABLE in abi.ts); here is the host's side of it. Whoever
// calls holds the domain's lock and has checked the guest's words. What is mapped is known from records of our own: the
// table, which the guest can scribble over, says what need not be asked, never what is safe.
//
// The order of steps is what makes it right, and test/model/tracking.pml explores it: PINNED is set after the backend
// mapped, and taken by compare-and-swap, entry by entry, before it unmaps.

import { MAP_FLAG, STATUS, TABLE } from "./abi.js";
import { iova, PAGE_BYTES, PAGE_SHIFT } from "./addresses.js";
import type { BackendLimits, DmaBackend } from "./backend.js";
import { ACCESS, type Domain, placeAtGpa } from "./domain.js";
import { type GuestRam, RunList } from "./guest-ram.js";
import type { Pins } from "./pins.js";
import {
  ERRNO,
  INVALID_PLACE,
  INVALID_STALE,
  LIMIT_ENTRIES,
  LIMIT_QUOTA,
  LIMIT_STUCK,
  OK,
  status,
  statusErrnoOf,
  statusOfHostErrno,
} from "./status.js";

/** The table of one domain, as one thread sees it. */
export interface TrackingTable {
  /** An entry per gpa page, from 0 to RAM's end, in memory that the guest reads and writes. */
  readonly entries: Int32Array;
  /** Makes every entry 0 and gives the memory behind them back. */
  clear(): void;
}

// As signed words, which is what an Int32Array holds.
const PINNED = TABLE.pinned | 0;
const USED = TABLE.used;
const COUNT = TABLE.countMask;
/** Half of what a count can hold: as many mappings may be under way on other CPUs when one is refused. */
const COUNT_MAX = (COUNT >>> 1) + 1;

const LIMIT_COUNT = status(STATUS.limit, ERRNO.EOVERFLOW);

/** Granules that are given back for one that cannot be mapped, before it is given up. */
const EVICTIONS_MAX = 16;

/**
 * How often the hand may go round for one attempt at a call, in the last two rounds without regard to use: a guest that goes
 * on using everything gets all that is free all the same. A hostile guest that counts all but one would have it go round for
 * each page it asks for, with the domain locked.
 */
const ROUNDS_MAX = 4;

/** Attempts to take one from a count that others change. */
const UNCOUNT_TRIES = 1000;

/** Largest granule: an IOMMU's, and the CPU's, large page. */
export const GRANULE_MAX_BYTES = 2 ** 21;

// Shared memory: a header, whose word 0 is the domain's lock; the granules that are mapped, without gaps and in no order;
// where in that list each granule is.
const MAPPED = 1;
const HAND = 2;
const PAGES = 3;
const STUCK = 4;
const HIDDEN = 5;
const SWEEP = 6;
/** Counters, as doubles. */
const COUNTERS = 8;
const EVICTED = 0;
const IDLED = 1;
const HEADER_WORDS = 16;

function layout(limits: BackendLimits, ram: GuestRam, granuleBytes: number) {
  const granules = Math.ceil(ram.endPage / (granuleBytes / PAGE_BYTES));
  const entries = Math.min(limits.entries, granules);
  return {
    entries,
    list: HEADER_WORDS,
    places: HEADER_WORDS + entries,
    words: HEADER_WORDS + entries + granules,
  };
}

/**
 * Memory is mapped in granules: naturally aligned pieces of 4 KiB to 2 MiB, each one entry of the backend, of which a
 * granule at RAM's end has the pages that are RAM. All are mapped readable and writable.
 */
export class CachedDomain implements Domain {
  readonly releasedMappings = 0;
  readonly releasedPages = 0;

  readonly #ram: GuestRam;
  readonly #pins: Pins;
  readonly #devicePins: Pins;
  readonly #backend: DmaBackend;
  readonly #table: TrackingTable;
  readonly #entries: number;
  /** Pages of a granule are 1 << this. */
  readonly #shift: number;
  readonly #header: Int32Array;
  readonly #counters: Float64Array;
  /** Granules that are mapped, the first MAPPED of them. */
  readonly #list: Int32Array;
  /** By granule: its place in the list, from 1; 0 when it is not mapped; negative when it is stuck. */
  readonly #places: Int32Array;
  /** The granule in hand, as a run. */
  readonly #run = new RunList(1);
  /** Granules that the attempt at hand may still look at in search of one to give back. */
  #looksLeft = 0;

  /**
   * Shared memory for a new domain, with nothing mapped. Throws a RangeError when `granuleBytes` is no power of two from
   * 4 KiB to 2 MiB, or a slot of RAM does not begin with a granule.
   */
  static create(limits: BackendLimits, ram: GuestRam, granuleBytes: number): SharedArrayBuffer {
    const pages = granuleBytes / PAGE_BYTES;
    if (!(pages >= 1 && granuleBytes <= GRANULE_MAX_BYTES && Number.isInteger(Math.log2(pages)))) {
      throw new RangeError(
        `granules of ${granuleBytes} bytes; powers of two from 4096 to ${GRANULE_MAX_BYTES} are possible`,
      );
    }
    if (!ram.beginsAt(pages))
      throw new RangeError(`RAM does not begin with a granule of ${granuleBytes} bytes`);
    return new SharedArrayBuffer(layout(limits, ram, granuleBytes).words * 4);
  }

  /** This thread's view of the domain in `memory`. `devicePins` is what all its devices have pinned, together. */
  constructor(
    memory: SharedArrayBuffer,
    limits: BackendLimits,
    granuleBytes: number,
    ram: GuestRam,
    pins: Pins,
    devicePins: Pins,
    backend: DmaBackend,
    table: TrackingTable,
  ) {
    const at = layout(limits, ram, granuleBytes);
    this.#ram = ram;
    this.#pins = pins;
    this.#devicePins = devicePins;
    this.#backend = backend;
    this.#table = table;
    this.#entries = at.entries;
    this.#shift = Math.log2(granuleBytes) - PAGE_SHIFT;
    this.#header = new Int32Array(memory, 0, HEADER_WORDS);
    this.#counters = new Float64Array(memory, COUNTERS * 4, 2);
    this.#list = new Int32Array(memory, at.list * 4, at.entries);
    this.#places = new Int32Array(memory, at.places * 4, at.words - at.places);
    if (table.entries.length < ram.endPage) {
      throw new RangeError(`a tracking table of ${table.entries.length} entries for ${ram.endPage} pages`);
    }
  }

  get entriesUsed(): number {
    return Atomics.load(this.#header, MAPPED);
  }

  get stuck(): number {
    return Atomics.load(this.#header, STUCK);
  }

  /** Granules given back because something else had no room, and because nobody used them. */
  get evicted(): number {
    return this.#counters[EVICTED]!;
  }
  get idled(): number {
    return this.#counters[IDLED]!;
  }

  /** Every device of the domain reaches all of it. */
  mappedPages(): number {
    return Atomics.load(this.#header, PAGES);
  }

  /**
   * Makes sure that every granule of the runs is mapped. Granules that are mapped when a later one fails stay: nobody
   * counts them, so they go when there is need.
   */
  map(_handle: number, runs: RunList, lastPage: number, flags: number): number {
    const counted = (flags & MAP_FLAG.counted) !== 0;
    const placed = counted ? this.#checkReach(runs, lastPage) : placeAtGpa(this.#ram, runs, lastPage, flags);
    if (placed !== OK) return placed;
    if (!counted) {
      const result = this.#count(runs);
      if (result !== OK) return result;
    }
    this.#allowLooks(runs.pages);
    for (let run = 0; run < runs.count; run++) {
      const page = this.#ram.gpaPageOf(runs.ramPage[run]!);
      const result = this.#mapPages(page, runs.runPages[run]!);
      if (result === OK) continue;
      runs.failedRun = run;
      if (!counted) this.#uncountRuns(runs, runs.count);
      return result;
    }
    runs.iovaPage = this.#ram.gpaPageOf(runs.ramPage[0]!);
    return OK;
  }

  /** Takes back what a map without MAP_FLAG.counted counted; the page stays mapped. */
  unmap(_handle: number, page: number, pages: number): number {
    if (!this.#ram.contains(page, pages)) return INVALID_STALE;
    // First a look: what is mapped less than this is not changed, not for a moment, in which it might be given back.
    for (let at = page; at < page + pages; at++) {
      if ((Atomics.load(this.#table.entries, at) & COUNT) === 0) return INVALID_STALE;
    }
    for (let at = page; at < page + pages; at++) this.#uncount(at);
    return OK;
  }

  /** Nothing of this is a single device's. */
  release(): number {
    return OK;
  }

  get reclaimable(): boolean {
    return this.entriesUsed > 0;
  }

  /** Up to EVICTIONS_MAX granules at a time, the least used first. */
  reclaim(again: boolean): number {
    if (!again) this.#allowLooks(0);
    let given = 0;
    while (given < EVICTIONS_MAX && this.#evict()) given++;
    return given;
  }

  /**
   * From now on no entry is PINNED, so that every map makes its call, or again as always. What is mapped stays mapped.
   */
  hide(hidden: boolean): void {
    if (hidden && this.#header[HIDDEN] === 0) this.clearPinned();
    this.#header[HIDDEN] = hidden ? 1 : 0;
  }

  /** The next map of each page makes a call. What is mapped stays mapped. */
  clearPinned(): void {
    const { entries } = this.#table;
    for (let at = this.#header[MAPPED]! - 1; at >= 0; at--) {
      const first = this.#list[at]! << this.#shift;
      const end = first + this.#pagesOf(this.#list[at]!);
      for (let page = first; page < end; page++) Atomics.and(entries, page, ~PINNED);
    }
  }

  /**
   * Looks at the next `count` granules that are mapped, and gives those back that nobody has mapped or used since the
   * last time. Returns false when that was the last of them, and the next call begins anew. One thread's.
   */
  sweep(count: number): boolean {
    const header = this.#header;
    // From the end: the last of the list takes the place of one that goes.
    let at = Math.min(header[SWEEP] === 0 ? header[MAPPED]! : header[SWEEP]!, header[MAPPED]!);
    for (; at > 0 && count > 0; count--) {
      at--;
      if (this.#giveBack(this.#list[at]!, false)) this.#counters[IDLED]!++;
    }
    header[SWEEP] = at;
    return at > 0;
  }

  /**
   * Unmaps everything, whoever has it mapped: the devices are gone. Counts are the guest's, which takes them back. Returns
   * the granules that are stuck.
   */
  unmapAll(): number {
    this.clearPinned();
    for (let at = this.#header[MAPPED]! - 1; at >= 0; at--) this.#unmapGranule(this.#list[at]!);
    return this.stuck;
  }

  /** Nobody has anything mapped: a kernel that finds the table begins, or the last one has ended. */
  forgetCounts(): void {
    this.#table.clear();
  }

  /** The same, and nothing is mapped any more. Returns the granules that are stuck. */
  beginAnew(): number {
    const stuck = this.unmapAll();
    this.forgetCounts();
    return stuck;
  }

  /** Whether every run lies below the device's limit: each is where its gpa says. */
  #checkReach(runs: RunList, lastPage: number): number {
    for (let run = 0; run < runs.count; run++) {
      if (this.#ram.gpaPageOf(runs.ramPage[run]!) + runs.runPages[run]! - 1 <= lastPage) continue;
      runs.failedRun = run;
      return INVALID_PLACE;
    }
    return OK;
  }

  /** Counts every page of the runs once more, or none. */
  #count(runs: RunList): number {
    const { entries } = this.#table;
    for (let run = 0; run < runs.count; run++) {
      const page = this.#ram.gpaPageOf(runs.ramPage[run]!);
      for (let done = 0; done < runs.runPages[run]!; done++) {
        if ((Atomics.add(entries, page + done, 1) & COUNT) < COUNT_MAX) continue;
        for (; done >= 0; done--) this.#uncount(page + done);
        this.#uncountRuns(runs, run);
        runs.failedRun = run;
        return LIMIT_COUNT;
      }
    }
    return OK;
  }

  #uncountRuns(runs: RunList, count: number): void {
    for (let run = 0; run < count; run++) {
      const page = this.#ram.gpaPageOf(runs.ramPage[run]!);
      for (let done = 0; done < runs.runPages[run]!; done++) this.#uncount(page + done);
    }
  }

  /** Counts a page once less; false, and nothing changed, when its count is 0. */
  #uncount(page: number): boolean {
    const { entries } = this.#table;
    let seen = Atomics.load(entries, page);
    // As often as honest CPUs can come in between, not as a hostile one does.
    for (let tries = 0; (seen & COUNT) !== 0 && tries < UNCOUNT_TRIES; tries++) {
      const before = Atomics.compareExchange(entries, page, seen, seen - 1);
      if (before === seen) return true;
      seen = before;
    }
    return false;
  }

  #mapPages(page: number, pages: number): number {
    const end = page + pages;
    for (let at = page; at < end; ) {
      const granule = at >> this.#shift;
      const result = this.#need(granule);
      if (result !== OK) return result;
      const next = Math.min(end, (granule + 1) << this.#shift);
      // PINNED also in a granule that was there: its entries lose it when the guest overwrites them, or are hidden.
      const bits = this.#header[HIDDEN] === 0 ? PINNED | USED : USED;
      for (; at < next; at++) Atomics.or(this.#table.entries, at, bits);
    }
    return OK;
  }

  /** Sees to it that a granule is mapped, giving back others if that is needed. */
  #need(granule: number): number {
    const place = this.#places[granule]!;
    if (place > 0) return OK;
    if (place < 0 && !this.#unmapGranule(granule)) return LIMIT_STUCK;
    for (let evictions = 0; ; evictions++) {
      const result = this.#mapGranule(granule);
      const errno = statusErrnoOf(result);
      const mayHelp = errno === ERRNO.ENOSPC || errno === ERRNO.EDQUOT || errno === ERRNO.ENOMEM;
      if (!mayHelp || evictions === EVICTIONS_MAX || !this.#evict()) return result;
    }
  }

  #mapGranule(granule: number): number {
    const header = this.#header;
    const at = header[MAPPED]!;
    if (at >= this.#entries) return LIMIT_ENTRIES;
    const first = granule << this.#shift;
    const pages = this.#pagesOf(granule);
    const run = this.#run;
    run.clear();
    this.#ram.append(run, first, pages, 0);
    if (!this.#devicePins.add(run)) return LIMIT_QUOTA;
    const ramPage = run.ramPage[0]!;
    if (!this.#pins.add(run)) {
      this.#devicePins.remove(ramPage, pages);
      return LIMIT_QUOTA;
    }
    const address = iova(first * PAGE_BYTES);
    const errno = this.#backend.map(address, this.#ram.hvaOf(ramPage), pages * PAGE_BYTES, ACCESS);
    if (errno !== 0) {
      this.#devicePins.remove(ramPage, pages);
      this.#pins.remove(ramPage, pages);
      return statusOfHostErrno(errno);
    }
    this.#list[at] = granule;
    this.#places[granule] = at + 1;
    header[MAPPED] = at + 1;
    header[PAGES]! += pages;
    if (header[HIDDEN] === 0) this.#setPinned(first, first + pages);
    return OK;
  }

  #setPinned(first: number, end: number): void {
    for (let page = first; page < end; page++) Atomics.or(this.#table.entries, page, PINNED);
  }

  /** An attempt begins, at a map of up to so many granules. */
  #allowLooks(granules: number): void {
    const most = Math.min(this.#header[MAPPED]! + granules, this.#entries);
    this.#looksLeft = ROUNDS_MAX * most + EVICTIONS_MAX;
  }

  /**
   * Gives one granule back that nobody has mapped: the hand goes round, passing those that were used since it last came,
   * and, if there is no other, takes one of these (Corbató's clock). False when all are in use, or the call has looked
   * long enough.
   */
  #evict(): boolean {
    const header = this.#header;
    for (let round = 0; round < 2; round++) {
      for (let looks = header[MAPPED]!; looks > 0; looks--) {
        if (this.#looksLeft-- <= 0) return false;
        if (header[HAND]! >= header[MAPPED]!) header[HAND] = 0;
        if (this.#giveBack(this.#list[header[HAND]!]!, round > 0 || this.#looksLeft < 2 * header[MAPPED]!)) {
          this.#counters[EVICTED]!++;
          return true;
        }
        header[HAND]!++;
      }
    }
    return false;
  }

  /**
   * Takes PINNED from every entry of a granule by compare-and-swap and then unmaps it. At the first entry that is in use, or
   * was used when the caller is not in need, everything is put back. True when the granule is gone.
   */
  #giveBack(granule: number, inNeed: boolean): boolean {
    if (this.#places[granule]! < 0) return this.#unmapGranule(granule);
    const { entries } = this.#table;
    const first = granule << this.#shift;
    const end = first + this.#pagesOf(granule);
    for (let page = first; page < end; page++) {
      const seen = Atomics.load(entries, page);
      if ((seen & COUNT) === 0) {
        if ((seen & USED) === 0 || inNeed) {
          if (Atomics.compareExchange(entries, page, seen, 0) === seen) continue;
        } else this.#forgetUse(page, end);
      }
      if (this.#header[HIDDEN] === 0) this.#setPinned(first, page);
      return false;
    }
    return this.#unmapGranule(granule);
  }

  /** From the first entry that was used on: one that is found used at each look would keep the others' marks for ever. */
  #forgetUse(page: number, end: number): void {
    const { entries } = this.#table;
    for (; page < end; page++) {
      // What is in use at this moment was used when the next look comes.
      if ((Atomics.load(entries, page) & COUNT) === 0) Atomics.and(entries, page, ~USED);
    }
  }

  /** Unmaps a granule whose entries are not PINNED; it is stuck when the backend does less than that. */
  #unmapGranule(granule: number): boolean {
    const header = this.#header;
    const place = this.#places[granule]!;
    const first = granule << this.#shift;
    const pages = this.#pagesOf(granule);
    const bytes = pages * PAGE_BYTES;
    if (this.#backend.unmap(iova(first * PAGE_BYTES), bytes) !== bytes) {
      if (place > 0) {
        this.#places[granule] = -place;
        header[STUCK]!++;
      }
      return false;
    }
    if (place < 0) header[STUCK]!--;
    // The last of the list takes its place.
    const at = Math.abs(place) - 1;
    const last = this.#list[--header[MAPPED]!]!;
    this.#list[at] = last;
    this.#places[last] = this.#places[last]! < 0 ? -at - 1 : at + 1;
    this.#places[granule] = 0;
    header[PAGES]! -= pages;
    const run = this.#run;
    run.clear();
    this.#ram.append(run, first, pages, 0);
    this.#devicePins.remove(run.ramPage[0]!, pages);
    this.#pins.remove(run.ramPage[0]!, pages);
    return true;
  }

  /** Pages of a granule that are RAM. */
  #pagesOf(granule: number): number {
    return Math.min(1 << this.#shift, this.#ram.pagesFrom(granule << this.#shift));
  }
}
