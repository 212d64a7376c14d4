// The IOVA allocator: O(1) for any number of live ranges, in one Int32Array over shared memory, no lock of its own
// (callers hold their domain's). It counts in pages of 4 KiB below 2^32, IOVAs below 2^44, and hands out no page
// below 1 MiB, so that an address of 0 and a few more are a device's mistake that faults.
//
// The method is two-level segregated fit (Masmano et al., "TLSF: a new dynamic memory allocator for real-time
// systems", ECRTS 2004) with boundary-tag coalescing, on nodes from a pool instead of headers in the memory it
// hands out. Free ranges are kept per zone; zones end at the powers of two that DMA masks are made of. A request
// takes the highest zone below its limit that has room, which leaves low addresses to the devices that can use no
// others. A hash table finds a live range by its first page.
//
// Before all this: single pages, which are most of what drivers map, are kept at hand when they are freed, 16 at most,
// uncut and in the hash table, and go out again first. They are given back when something else finds no room.
//
// Why the work is bounded. alloc looks at each of 8 zones at most twice, before and after what is kept was given back,
// and there at 3 list heads at most, each found through two bitmap words; it splits at most twice. free joins with two
// neighbours at most. No other list is ever walked. The hash table is never more than half full and its keys are spread
// by a Fibonacci multiplication, so a lookup ends after a few slots (expected, not worst case; the keys are ours to
// choose, not the guest's). The price: when no range of a larger size class is left, only the first of the request's
// own class is looked at, so a request for which there would be just enough room can fail where an exhaustive search
// would not.

import { PAGE_SHIFT } from "./addresses.js";
import type { BackendLimits } from "./backend.js";

/** IOVAs are below 2^44, so that a page number is a 32-bit integer. */
export const IOVA_BITS = 44;
const PAGE_LIMIT = 2 ** (IOVA_BITS - PAGE_SHIFT);
/** The lowest IOVA that is handed out. */
export const FIRST_IOVA = 2 ** 20;
const FIRST_PAGE = FIRST_IOVA / 2 ** PAGE_SHIFT;

/** Where zones end, as bits of IOVA: ISA's 24, QEMU edu's 28, 30 to 32 of old PCI devices, then steps. */
const ZONE_BITS = [24, 28, 30, 31, 32, 36, 40, IOVA_BITS];
const ZONES = ZONE_BITS.length;
const zoneFirstPage = (zone: number): number =>
  zone === 0 ? FIRST_PAGE : 2 ** (ZONE_BITS[zone - 1]! - PAGE_SHIFT);
const zoneEndPage = (zone: number): number => 2 ** (ZONE_BITS[zone]! - PAGE_SHIFT);
const ZONE_FIRST_PAGE = Float64Array.from(ZONE_BITS, (_, zone) => zoneFirstPage(zone));

// Size classes: below 32 pages one per size (row 0); above, each power of two is a row of 32 steps.
const STEP_BITS = 5;
const STEPS = 1 << STEP_BITS;
const ROWS = 32 - STEP_BITS + 1;

// A zone: a bitmap of rows, a bitmap of steps per row, and the head of a free list per class.
const ZONE_ROW_MAP = 0;
const ZONE_STEP_MAPS = 1;
const ZONE_HEADS = ZONE_STEP_MAPS + ROWS;
const ZONE_WORDS = ZONE_HEADS + ROWS * STEPS;

// A node: one free or live range. Node 0 is none, everywhere.
const START = 0;
const PAGES = 1;
/** The neighbours in address order, free or not, without a hole or a zone's end between. */
const PREVIOUS = 2;
const NEXT = 3;
/** The neighbours in the free list. A node that is not in use is chained by FREE_NEXT. */
const FREE_PREVIOUS = 4;
const FREE_NEXT = 5;
/** UNUSED, or zone + 1, and LIVE or KEPT if so. A range is free when it is neither. */
const STATE = 6;
const NODE_SHIFT = 3;

const UNUSED = 0;
const LIVE = 0x100;
const KEPT = 0x200;

// The header.
const NODES_TOUCHED = 0;
const UNUSED_HEAD = 1;
const LIVE_COUNT = 2;
/** The pages that are kept, chained by FREE_NEXT. */
const KEPT_HEAD = 3;
const KEPT_COUNT = 4;
const HEADER_WORDS = 8;

/** As many as an NVMe driver has under way in the commonest benchmarks; and giving them all back is bounded work. */
const KEPT_MAX = 16;
/** What is below 4 GiB is not kept: it is for devices that can use no other, and they are few. */
const KEPT_FROM_PAGE = 2 ** (32 - PAGE_SHIFT);

/** Live and free ranges alternate at most, and every stretch between two holes may begin and end with a free one. */
const nodesFor = (live: number, stretches: number): number => 1 + 2 * live + stretches;
const slotsFor = (live: number): number => 2 ** Math.ceil(Math.log2(Math.max(16, 2 * live)));

export class IovaAllocator {
  readonly #words: Int32Array;
  readonly #live: number;
  readonly #nodes: number;
  readonly #table: number;
  readonly #tableMask: number;
  readonly #hashShift: number;

  /** Words of memory for at most `live` live ranges within IOVA ranges of that number. */
  static words(live: number, ranges: number): number {
    const nodes = nodesFor(live, ranges + ZONES);
    return HEADER_WORDS + ZONES * ZONE_WORDS + (nodes << NODE_SHIFT) + slotsFor(live);
  }

  /** Node numbers are 1 to this, exclusive: the size of a table beside the allocator that is indexed by node. */
  static nodes(live: number, ranges: number): number {
    return nodesFor(live, ranges + ZONES);
  }

  /**
   * A view of an allocator in `words` (at least IovaAllocator.words long), with the arguments it was made with.
   * Memory that is zero is an allocator that has nothing; one thread calls `init` before the others look.
   */
  constructor(words: Int32Array, live: number, ranges: number) {
    const slots = slotsFor(live);
    this.#words = words;
    this.#live = live;
    this.#nodes = HEADER_WORDS + ZONES * ZONE_WORDS;
    this.#table = this.#nodes + (nodesFor(live, ranges + ZONES) << NODE_SHIFT);
    this.#tableMask = slots - 1;
    this.#hashShift = 32 - Math.log2(slots);
  }

  /** Fills zeroed memory with the free ranges: the host's, cut at the zones, whole pages from 1 MiB to 2^44. */
  init(ranges: BackendLimits["ranges"]): void {
    for (const range of ranges) {
      const first = Math.ceil(range.first / 2 ** PAGE_SHIFT);
      const end = Math.floor((range.last + 1) / 2 ** PAGE_SHIFT);
      for (let zone = 0; zone < ZONES; zone++) {
        const from = Math.max(first, zoneFirstPage(zone));
        const to = Math.min(end, zoneEndPage(zone));
        if (from >= to) continue;
        const node = this.#newNode();
        const at = this.#nodes + (node << NODE_SHIFT);
        this.#words[at + START] = from;
        this.#words[at + PAGES] = to - from;
        this.#words[at + STATE] = zone + 1;
        this.#insertFree(node);
      }
    }
  }

  /** Live ranges. */
  get liveCount(): number {
    return this.#words[LIVE_COUNT]!;
  }

  /** Node numbers in use so far are below this; for scans of all ranges, which are for rare occasions. */
  get nodesTouched(): number {
    return this.#words[NODES_TOUCHED]! + 1;
  }

  isLive(node: number): boolean {
    return (this.#words[this.#nodes + (node << NODE_SHIFT) + STATE]! & LIVE) !== 0;
  }

  #isFree(node: number): boolean {
    return (this.#words[this.#nodes + (node << NODE_SHIFT) + STATE]! & (LIVE | KEPT)) === 0;
  }

  /** First page of a live range. */
  startPage(node: number): number {
    return this.#words[this.#nodes + (node << NODE_SHIFT) + START]! >>> 0;
  }

  /** Pages of a live range. */
  pages(node: number): number {
    return this.#words[this.#nodes + (node << NODE_SHIFT) + PAGES]! >>> 0;
  }

  /**
   * Takes `pages` pages (1 to 2^30), none above page `lastPage`. `align`: naturally aligned to the length rounded
   * up to a power of two. Returns the range's node, or 0 when there is no room or as many ranges live as may.
   */
  alloc(pages: number, lastPage: number, align: boolean): number {
    const words = this.#words;
    const kept = words[KEPT_HEAD]!;
    if (pages === 1 && kept !== 0 && words[this.#nodes + (kept << NODE_SHIFT) + START]! >>> 0 <= lastPage) {
      const at = this.#nodes + (kept << NODE_SHIFT);
      words[KEPT_HEAD] = words[at + FREE_NEXT]!;
      words[KEPT_COUNT]!--;
      words[at + STATE]! ^= KEPT | LIVE;
      words[LIVE_COUNT]!++;
      return kept;
    }
    if (words[LIVE_COUNT]! + words[KEPT_COUNT]! < this.#live) {
      const node = this.#cut(pages, lastPage, align);
      // What is kept makes no room below where it is.
      if (node !== 0 || lastPage < KEPT_FROM_PAGE) return node;
    }
    if (kept === 0) return 0;
    this.#giveBackKept();
    return words[LIVE_COUNT]! < this.#live ? this.#cut(pages, lastPage, align) : 0;
  }

  /** Takes pages as alloc does, from the free ranges. */
  #cut(pages: number, lastPage: number, align: boolean): number {
    const limit = Math.min(lastPage, PAGE_LIMIT - 1);
    const alignMask = align && pages > 1 ? 2 ** (32 - Math.clz32(pages - 1)) - 1 : 0;
    for (let zone = ZONES - 1; zone >= 0; zone--) {
      if (ZONE_FIRST_PAGE[zone]! > limit) continue;
      const node = this.#find(zone, pages, limit, alignMask);
      if (node !== 0) return this.#take(node, pages, alignMask);
    }
    return 0;
  }

  /** Gives a live range back. */
  free(node: number): void {
    const words = this.#words;
    const at = this.#nodes + (node << NODE_SHIFT);
    words[LIVE_COUNT]!--;
    if (
      words[at + PAGES] === 1 &&
      words[KEPT_COUNT]! < KEPT_MAX &&
      words[at + START]! >>> 0 >= KEPT_FROM_PAGE
    ) {
      words[at + STATE]! ^= LIVE | KEPT;
      words[at + FREE_NEXT] = words[KEPT_HEAD]!;
      words[KEPT_HEAD] = node;
      words[KEPT_COUNT]!++;
      return;
    }
    words[at + STATE]! &= ~LIVE;
    this.#join(node);
  }

  #giveBackKept(): void {
    const words = this.#words;
    let node = words[KEPT_HEAD]!;
    words[KEPT_HEAD] = 0;
    words[KEPT_COUNT] = 0;
    while (node !== 0) {
      const at = this.#nodes + (node << NODE_SHIFT);
      const next = words[at + FREE_NEXT]!;
      words[at + STATE]! &= ~KEPT;
      this.#join(node);
      node = next;
    }
  }

  /** A range that has just become free leaves the hash table and goes into the lists, joined with its neighbours. */
  #join(node: number): void {
    const words = this.#words;
    this.#forget(node);
    const at = this.#nodes + (node << NODE_SHIFT);
    const next = words[at + NEXT]!;
    if (next !== 0 && this.#isFree(next)) {
      this.#removeFree(next);
      this.#absorbNext(node, next);
    }
    const previous = words[at + PREVIOUS]!;
    if (previous !== 0 && this.#isFree(previous)) {
      this.#removeFree(previous);
      this.#absorbNext(previous, node);
      this.#insertFree(previous);
    } else {
      this.#insertFree(node);
    }
  }

  /** The live range that starts at `page` (any number), or 0. */
  lookup(page: number): number {
    const words = this.#words;
    let slot = this.#slotOf(page);
    for (;;) {
      const node = words[this.#table + slot]!;
      if (node === 0) return 0;
      if (words[this.#nodes + (node << NODE_SHIFT) + START]! >>> 0 === page)
        return this.isLive(node) ? node : 0;
      slot = (slot + 1) & this.#tableMask;
    }
  }

  /** A free range of `zone` in which the request fits, or 0. */
  #find(zone: number, pages: number, limit: number, alignMask: number): number {
    // From here up every range is large enough, however it is aligned.
    let node = this.#firstOfAtLeast(zone, pages + alignMask);
    if (node !== 0 && this.#fits(node, pages, limit, alignMask)) return node;
    // Smaller ones may do as well: by luck of their alignment, or in the class that the request itself is in.
    if (alignMask !== 0) {
      node = this.#firstOfAtLeast(zone, pages);
      if (node !== 0 && this.#fits(node, pages, limit, alignMask)) return node;
    }
    node = this.#words[this.#zone(zone) + ZONE_HEADS + classOf(pages)]!;
    return node !== 0 && this.#fits(node, pages, limit, alignMask) ? node : 0;
  }

  /** The head of the smallest class that has free ranges and none below `pages`; 0 without one. */
  #firstOfAtLeast(zone: number, pages: number): number {
    const words = this.#words;
    const at = this.#zone(zone);
    // Up to the next class boundary.
    const rounded = pages < STEPS ? pages : pages + ((1 << (31 - STEP_BITS - Math.clz32(pages))) - 1);
    const wanted = classOf(rounded);
    let row = wanted >>> STEP_BITS;
    let steps = words[at + ZONE_STEP_MAPS + row]! & (-1 << (wanted & (STEPS - 1)));
    if (steps === 0) {
      const rows = words[at + ZONE_ROW_MAP]! & (-2 << row);
      if (rows === 0) return 0;
      row = lowestBit(rows);
      steps = words[at + ZONE_STEP_MAPS + row]!;
    }
    return words[at + ZONE_HEADS + (row << STEP_BITS) + lowestBit(steps)]!;
  }

  #fits(node: number, pages: number, limit: number, alignMask: number): boolean {
    const at = this.#nodes + (node << NODE_SHIFT);
    const start = this.#words[at + START]! >>> 0;
    const skipped = -start & alignMask;
    return skipped + pages <= this.#words[at + PAGES]! >>> 0 && start + skipped + pages - 1 <= limit;
  }

  /** Cuts the request out of a free range in which it fits, and makes it live. */
  #take(node: number, pages: number, alignMask: number): number {
    const words = this.#words;
    this.#removeFree(node);
    let taken = node;
    const skipped = -words[this.#nodes + (node << NODE_SHIFT) + START]! & alignMask;
    if (skipped !== 0) {
      taken = this.#split(node, skipped);
      this.#insertFree(node);
    }
    const at = this.#nodes + (taken << NODE_SHIFT);
    if (words[at + PAGES]! >>> 0 !== pages) this.#insertFree(this.#split(taken, pages));
    words[at + STATE]! |= LIVE;
    words[LIVE_COUNT]!++;
    this.#remember(taken);
    return taken;
  }

  /** Cuts a node that is in no list behind its first `pages` pages; returns the node of the rest. */
  #split(node: number, pages: number): number {
    const words = this.#words;
    const rest = this.#newNode();
    const at = this.#nodes + (node << NODE_SHIFT);
    const restAt = this.#nodes + (rest << NODE_SHIFT);
    const next = words[at + NEXT]!;
    words[restAt + START] = (words[at + START]! >>> 0) + pages;
    words[restAt + PAGES] = (words[at + PAGES]! >>> 0) - pages;
    words[restAt + PREVIOUS] = node;
    words[restAt + NEXT] = next;
    words[restAt + STATE] = words[at + STATE]!;
    words[at + PAGES] = pages;
    words[at + NEXT] = rest;
    if (next !== 0) words[this.#nodes + (next << NODE_SHIFT) + PREVIOUS] = rest;
    return rest;
  }

  /** Joins a node with its successor, which is in no list and ceases to be. */
  #absorbNext(node: number, next: number): void {
    const words = this.#words;
    const at = this.#nodes + (node << NODE_SHIFT);
    const nextAt = this.#nodes + (next << NODE_SHIFT);
    const after = words[nextAt + NEXT]!;
    words[at + PAGES] = (words[at + PAGES]! >>> 0) + (words[nextAt + PAGES]! >>> 0);
    words[at + NEXT] = after;
    if (after !== 0) words[this.#nodes + (after << NODE_SHIFT) + PREVIOUS] = node;
    words[nextAt + STATE] = UNUSED;
    words[nextAt + FREE_NEXT] = words[UNUSED_HEAD]!;
    words[UNUSED_HEAD] = next;
  }

  /** A node of the pool, fields unset. There always is one: see nodesFor. */
  #newNode(): number {
    const words = this.#words;
    const node = words[UNUSED_HEAD]!;
    // Nodes that were never used are not chained, so that their memory stays untouched.
    if (node === 0) return ++words[NODES_TOUCHED]!;
    words[UNUSED_HEAD] = words[this.#nodes + (node << NODE_SHIFT) + FREE_NEXT]!;
    return node;
  }

  #zone(zone: number): number {
    return HEADER_WORDS + zone * ZONE_WORDS;
  }

  #zoneOf(node: number): number {
    return this.#zone((this.#words[this.#nodes + (node << NODE_SHIFT) + STATE]! & (LIVE - 1)) - 1);
  }

  #insertFree(node: number): void {
    const words = this.#words;
    const at = this.#nodes + (node << NODE_SHIFT);
    const zone = this.#zoneOf(node);
    const sizeClass = classOf(words[at + PAGES]! >>> 0);
    const head = words[zone + ZONE_HEADS + sizeClass]!;
    words[at + FREE_PREVIOUS] = 0;
    words[at + FREE_NEXT] = head;
    if (head !== 0) words[this.#nodes + (head << NODE_SHIFT) + FREE_PREVIOUS] = node;
    words[zone + ZONE_HEADS + sizeClass] = node;
    words[zone + ZONE_STEP_MAPS + (sizeClass >>> STEP_BITS)]! |= 1 << (sizeClass & (STEPS - 1));
    words[zone + ZONE_ROW_MAP]! |= 1 << (sizeClass >>> STEP_BITS);
  }

  #removeFree(node: number): void {
    const words = this.#words;
    const at = this.#nodes + (node << NODE_SHIFT);
    const previous = words[at + FREE_PREVIOUS]!;
    const next = words[at + FREE_NEXT]!;
    if (next !== 0) words[this.#nodes + (next << NODE_SHIFT) + FREE_PREVIOUS] = previous;
    if (previous !== 0) {
      words[this.#nodes + (previous << NODE_SHIFT) + FREE_NEXT] = next;
      return;
    }
    const zone = this.#zoneOf(node);
    const sizeClass = classOf(words[at + PAGES]! >>> 0);
    words[zone + ZONE_HEADS + sizeClass] = next;
    if (next !== 0) return;
    const row = sizeClass >>> STEP_BITS;
    words[zone + ZONE_STEP_MAPS + row]! &= ~(1 << (sizeClass & (STEPS - 1)));
    if (words[zone + ZONE_STEP_MAPS + row] === 0) words[zone + ZONE_ROW_MAP]! &= ~(1 << row);
  }

  #slotOf(page: number): number {
    // 2^32 divided by the golden ratio: pages that follow each other land far apart (Knuth, vol. 3, 6.4).
    return Math.imul(page, 0x9e3779b1) >>> this.#hashShift;
  }

  #remember(node: number): void {
    const words = this.#words;
    let slot = this.#slotOf(words[this.#nodes + (node << NODE_SHIFT) + START]!);
    while (words[this.#table + slot] !== 0) slot = (slot + 1) & this.#tableMask;
    words[this.#table + slot] = node;
  }

  /** Removes a live node from the hash table and closes the gap, so that no lookup ends early at it. */
  #forget(node: number): void {
    const words = this.#words;
    const table = this.#table;
    const mask = this.#tableMask;
    let gap = this.#slotOf(words[this.#nodes + (node << NODE_SHIFT) + START]!);
    while (words[table + gap] !== node) gap = (gap + 1) & mask;
    for (let slot = gap; ; ) {
      slot = (slot + 1) & mask;
      const other = words[table + slot]!;
      if (other === 0) break;
      const home = this.#slotOf(words[this.#nodes + (other << NODE_SHIFT) + START]!);
      // It may move to the gap when its home is not between the gap and where it is.
      if (((slot - home) & mask) < ((slot - gap) & mask)) continue;
      words[table + gap] = other;
      gap = slot;
    }
    words[table + gap] = 0;
  }
}

/** Size class of a length of 1 to 2^32 - 1 pages: row * 32 + step. */
function classOf(pages: number): number {
  if (pages < STEPS) return pages;
  const high = 31 - Math.clz32(pages);
  return ((high - STEP_BITS + 1) << STEP_BITS) + ((pages >>> (high - STEP_BITS)) & (STEPS - 1));
}

/** Position of the lowest set bit of a word that is not 0. */
function lowestBit(word: number): number {
  return 31 - Math.clz32(word & -word);
}
