// A device's IOTLB: the leaves it used lately, by 4 KiB page, in 16 sets of 4. It belongs to the device's thread and is
// told of nothing: what was unmapped it reads from the ring of invalidations, at the beginning of each access. What is
// not mapped is not remembered, so a new mapping needs no invalidation.

import { HEADER, INVALIDATIONS, type Shared } from "./shared.js";

const SETS = 16;
const WAYS = 4;
const ENTRIES = SETS * WAYS;
/** No page's number. */
const NO_PAGE = -1;

export class Iotlb {
  /** Of the last `lookup` that found something: the leaf's pages from the one that was asked for on. */
  reach = 0;
  hits = 0;
  misses = 0;

  readonly #header: Int32Array;
  readonly #invalidations: Float64Array;
  /** Generation up to which this knows what was unmapped. */
  #generation: number;
  readonly #pages = new Float64Array(ENTRIES).fill(NO_PAGE);
  readonly #words = new Int32Array(ENTRIES);
  readonly #reaches = new Int32Array(ENTRIES);
  /** By set: the way to be replaced next, in turn. */
  readonly #next = new Uint8Array(SETS);

  constructor(shared: Shared) {
    this.#header = shared.header;
    this.#invalidations = shared.invalidations;
    this.#generation = Atomics.load(shared.header, HEADER.generation);
  }

  /** D2 of lanes.ts: forgets what was unmapped since the last time. */
  catchUp(): void {
    const generation = Atomics.load(this.#header, HEADER.generation);
    const behind = (generation - this.#generation) | 0;
    if (behind === 0) return;
    // As far behind as the ring is long, the oldest range may be overwritten at this moment.
    if (behind < 0 || behind >= INVALIDATIONS) this.flush();
    else for (let i = behind - 1; i >= 0; i--) this.#drop(((generation - i) & (INVALIDATIONS - 1)) * 2);
    this.#generation = generation;
  }

  flush(): void {
    this.#pages.fill(NO_PAGE);
  }

  /** The word that PageTable.walk() gave for the page, or 0. */
  lookup(page: number): number {
    const pages = this.#pages;
    const first = (page & (SETS - 1)) * WAYS;
    for (let entry = first; entry < first + WAYS; entry++) {
      if (pages[entry] !== page) continue;
      this.hits++;
      this.reach = this.#reaches[entry]!;
      return this.#words[entry]!;
    }
    this.misses++;
    return 0;
  }

  enter(page: number, word: number, reach: number): void {
    const set = page & (SETS - 1);
    const way = this.#next[set]!;
    this.#next[set] = (way + 1) % WAYS;
    const entry = set * WAYS + way;
    this.#pages[entry] = page;
    this.#words[entry] = word;
    this.#reaches[entry] = reach;
  }

  /** Forgets every page of the range. Mappings go as a whole, so the pages that a leaf reaches on to go as well. */
  #drop(at: number): void {
    const pages = this.#pages;
    const first = this.#invalidations[at]!;
    const last = this.#invalidations[at + 1]!;
    for (let entry = 0; entry < ENTRIES; entry++) {
      const page = pages[entry]!;
      if (first <= page && page <= last) pages[entry] = NO_PAGE;
    }
  }
}
