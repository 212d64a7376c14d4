// The page table of a software IOMMU, in shared memory: 4 levels of tables with 512 slots, leaves of 4 KiB, 2 MiB and
// 1 GiB. One thread at a time changes it; devices walk it meanwhile. IOVA pages are doubles below 2^36, memory pages
// and tables are 32-bit integers. `last` is inclusive.
//
// A slot is a 32-bit word: 0 is empty; with one of the access bits it is a leaf, and the rest says where its memory
// begins; without, it is the number of a table of the next level. As real ones keep bits for software, two say where a
// mapping begins and ends, so that nothing beside the table has to be asked whether a range would cut one in two.

import { MAP_FLAG } from "../hypercalls/abi.js";
import { HEADER, type Shared, SLOT_BITS, SLOTS } from "./shared.js";

const ACCESS = MAP_FLAG.read | MAP_FLAG.write;
/** The leaf is the first, or the last, of its mapping. */
const FIRST = 4;
const LAST = 8;
/** Where a leaf's memory page, or a table's number, begins. */
export const WORD_SHIFT = 4;

const TOP_LEVEL = 3;
/** Pages under one slot of a level. */
const SPAN = [1, 2 ** SLOT_BITS, 2 ** (2 * SLOT_BITS), 2 ** (3 * SLOT_BITS)] as const;
const TOP_SPAN = SPAN[TOP_LEVEL];

const ROOT = 0;
const NONE = -1;

export class PageTable {
  /** Of the last `walk` that found a leaf: its pages up to the one that was asked for, and from that one on. */
  before = 0;
  reach = 0;
  /** Of the last `clear`: mappings of which the first leaf went. */
  cleared = 0;

  readonly #header: Int32Array;
  readonly #slots: Int32Array;
  /** By table: its slots in use; the next one of the list when it is free, or waits to be. */
  readonly #states: Int32Array;
  /** Tables that `clear` left empty: devices may still walk them. */
  #emptied = 0;

  constructor(shared: Shared) {
    this.#header = shared.header;
    this.#slots = shared.slots;
    this.#states = shared.tableStates;
  }

  /**
   * The leaf over an IOVA page: a word with MAP_FLAG's access bits, and from WORD_SHIFT on the
   * memory page; 0 without one. Needs no lock: it reads each level once, and a table stays a table until the caller's
   * access has ended (lanes.ts).
   */
  walk(page: number): number {
    const slots = this.#slots;
    const top = Math.floor(page / TOP_SPAN);
    const rest = page - top * TOP_SPAN;
    let word = Atomics.load(slots, top);
    if (word === 0) return 0;
    word = Atomics.load(slots, ((word >>> WORD_SHIFT) << SLOT_BITS) + (rest >>> (2 * SLOT_BITS)));
    if ((word & ACCESS) !== 0) return this.#leaf(word, rest & (SPAN[2] - 1), SPAN[2]);
    if (word === 0) return 0;
    const middle = (rest >>> SLOT_BITS) & (SLOTS - 1);
    word = Atomics.load(slots, ((word >>> WORD_SHIFT) << SLOT_BITS) + middle);
    if ((word & ACCESS) !== 0) return this.#leaf(word, rest & (SPAN[1] - 1), SPAN[1]);
    if (word === 0) return 0;
    this.before = 0;
    this.reach = 1;
    return Atomics.load(slots, ((word >>> WORD_SHIFT) << SLOT_BITS) + (rest & (SLOTS - 1)));
  }

  /** Whether anything is mapped in the range. O(levels), and the slots that a mapping of the range would take. */
  anyIn(first: number, last: number): boolean {
    return this.#anyIn(ROOT, TOP_LEVEL, 0, first, last);
  }

  /** Whether a mapping has pages on both sides of the beginning, or of the end, of the range. O(levels). */
  isCut(first: number, last: number): boolean {
    let word = this.walk(first);
    if (word !== 0 && ((word & FIRST) === 0 || this.before > 0)) return true;
    word = this.walk(last);
    return word !== 0 && ((word & LAST) === 0 || this.reach > 1);
  }

  /**
   * Enters a mapping, where nothing is, with leaves as large as IOVA and memory are aligned for. False when the tables
   * do not suffice: the caller then clears the range, in which is what was entered.
   */
  set(first: number, memoryPage: number, pages: number, access: number): boolean {
    let page = first;
    let memory = memoryPage;
    let left = pages;
    let mark = FIRST;
    while (left > 0) {
      const level = leafLevel(page, memory, left);
      const span = SPAN[level];
      const table = this.#tableFor(page, level);
      if (table === NONE) return false;
      const slot = Math.floor(page / span) % SLOTS;
      const count = Math.min(Math.floor(left / span), SLOTS - slot);
      const at = (table << SLOT_BITS) + slot;
      for (let i = 0; i < count; i++) {
        left -= span;
        const word = (memory << WORD_SHIFT) | access | mark | (left === 0 ? LAST : 0);
        Atomics.store(this.#slots, at + i, word);
        memory += span;
        mark = 0;
      }
      this.#states[table]! += count;
      page += count * span;
    }
    return true;
  }

  /**
   * Empties the range, in which mappings lie as a whole; returns the pages that were mapped. Walks tables that are
   * there. The tables that it leaves empty are free after `releaseTables` only.
   */
  clear(first: number, last: number): number {
    this.cleared = 0;
    return this.#clear(ROOT, TOP_LEVEL, 0, first, last);
  }

  /** After a clear, when no access that may walk its tables is under way. */
  releaseTables(): void {
    const states = this.#states;
    while (this.#emptied !== 0) {
      const table = this.#emptied;
      this.#emptied = states[table]!;
      states[table] = this.#header[HEADER.freeTable]!;
      this.#header[HEADER.freeTable] = table;
      this.#header[HEADER.tablesUsed]!--;
    }
  }

  #leaf(word: number, offset: number, span: number): number {
    this.before = offset;
    this.reach = span - offset;
    return (word + (offset << WORD_SHIFT)) | 0;
  }

  #anyIn(table: number, level: number, base: number, first: number, last: number): boolean {
    const span = spanOf(level);
    const to = slotOf(last, base, span);
    for (let slot = slotOf(first, base, span); slot <= to; slot++) {
      const word = this.#slots[(table << SLOT_BITS) + slot]!;
      if (word === 0) continue;
      // No table is empty: where the range has all of a table's pages, there is one that is mapped.
      const start = base + slot * span;
      if ((word & ACCESS) !== 0 || (first <= start && start + span - 1 <= last)) return true;
      if (this.#anyIn(word >>> WORD_SHIFT, level - 1, start, first, last)) return true;
    }
    return false;
  }

  #clear(table: number, level: number, base: number, first: number, last: number): number {
    const states = this.#states;
    const span = spanOf(level);
    const to = slotOf(last, base, span);
    let pages = 0;
    for (let slot = slotOf(first, base, span); slot <= to; slot++) {
      const at = (table << SLOT_BITS) + slot;
      const word = this.#slots[at]!;
      if (word === 0) continue;
      if ((word & ACCESS) !== 0) {
        if ((word & FIRST) !== 0) this.cleared++;
        pages += span;
      } else {
        const child = word >>> WORD_SHIFT;
        pages += this.#clear(child, level - 1, base + slot * span, first, last);
        if (states[child] !== 0) continue;
        states[child] = this.#emptied;
        this.#emptied = child;
      }
      Atomics.store(this.#slots, at, 0);
      if (--states[table]! === 0) break;
    }
    return pages;
  }

  /** The table of a level on the way to a page, made if need be; NONE when there is no table left. */
  #tableFor(page: number, level: number): number {
    let table = ROOT;
    for (let at = TOP_LEVEL; at > level; at--) {
      const slot = (table << SLOT_BITS) + (Math.floor(page / spanOf(at)) % SLOTS);
      let next = this.#slots[slot]! >>> WORD_SHIFT;
      if (next === 0) {
        next = this.#newTable();
        if (next === 0) return NONE;
        this.#states[table]!++;
        Atomics.store(this.#slots, slot, next << WORD_SHIFT);
      }
      table = next;
    }
    return table;
  }

  /** An empty table, or 0. */
  #newTable(): number {
    const header = this.#header;
    let table = header[HEADER.freeTable]!;
    if (table !== 0) header[HEADER.freeTable] = this.#states[table]!;
    else {
      if (header[HEADER.tablesTouched]! >= header[HEADER.tables]!) return 0;
      table = header[HEADER.tablesTouched]!++;
    }
    header[HEADER.tablesUsed]!++;
    this.#states[table] = 0;
    return table;
  }
}

const spanOf = (level: number): number => SPAN[level as 0 | 1 | 2 | 3];

/** The slot of a table from page `base` on that has the page, or the nearest. */
const slotOf = (page: number, base: number, span: number): number =>
  Math.max(0, Math.min(SLOTS - 1, Math.floor((page - base) / span)));

/** The largest leaf that may begin here: 4 KiB, 2 MiB or 1 GiB, as hardware has them. */
function leafLevel(page: number, memory: number, pages: number): 0 | 1 | 2 {
  if (pages >= SPAN[2] && page % SPAN[2] === 0 && memory % SPAN[2] === 0) return 2;
  return pages >= SPAN[1] && page % SPAN[1] === 0 && memory % SPAN[1] === 0 ? 1 : 0;
}
