// How often each page of guest RAM is pinned, and the quota on it: for all domains together, and for each device.
// Shared memory. Order of locks: a domain's, then the one here; nobody who holds this one takes another. Touches no
// guest memory.

import { PAGE_BYTES } from "./addresses.js";
import type { RunList } from "./guest-ram.js";
import { Mutex } from "./lock.js";

const LOCK = 0;
/** Pages with a count above 0, and the most there ever were. */
const PINNED = 1;
const PEAK = 2;
const COUNTS = 4;

/**
 * Pin counts. An exact quota needs a page's count and the total to change together, so this is a lock and plain
 * arithmetic: less per page than an atomic operation, and a thousandth of what pinning a page costs the kernel.
 * Counts do not overflow: every run takes a backend entry, of which there are some 2^16 per domain and 32 domains.
 */
export class Pins {
  readonly #words: Int32Array;
  readonly #lock: Mutex | undefined;
  readonly #quotaPages: number;

  /** Bytes of shared memory for that many pages of RAM: 4 per page, not touched until the page is pinned. */
  static bytes(ramPages: number): number {
    return (COUNTS + ramPages) * 4;
  }

  /**
   * `quotaBytes`: most bytes that may be pinned at a time, 0 for no quota. `lock`: "own" for counts that several
   * domains share; "callers" for those that one domain changes, under its lock.
   */
  constructor(memory: SharedArrayBuffer, quotaBytes: number, lock: "own" | "callers") {
    this.#words = new Int32Array(memory);
    this.#lock = lock === "own" ? new Mutex(this.#words, LOCK) : undefined;
    this.#quotaPages = quotaBytes === 0 ? Number.POSITIVE_INFINITY : Math.floor(quotaBytes / PAGE_BYTES);
  }

  /** Pages pinned at least once, now. */
  get pinnedPages(): number {
    return Atomics.load(this.#words, PINNED);
  }

  /** The most `pinnedPages` ever was. */
  get peakPages(): number {
    return Atomics.load(this.#words, PEAK);
  }

  /** How often RAM page `ramPage` is pinned. */
  countOf(ramPage: number): number {
    return Atomics.load(this.#words, COUNTS + ramPage);
  }

  /** Counts every page of the list once more; false if that would break the quota, and then nothing is changed. */
  add(runs: RunList): boolean {
    this.#lock?.acquire();
    try {
      for (let run = 0; run < runs.count; run++) {
        const counted = this.#addRun(runs.ramPage[run]!, runs.runPages[run]!);
        if (counted === runs.runPages[run]!) continue;
        runs.failedRun = run;
        this.#removeRun(runs.ramPage[run]!, counted);
        while (--run >= 0) this.#removeRun(runs.ramPage[run]!, runs.runPages[run]!);
        return false;
      }
      if (this.#words[PINNED]! > this.#words[PEAK]!) this.#words[PEAK] = this.#words[PINNED]!;
      return true;
    } finally {
      this.#lock?.release();
    }
  }

  /** Counts `pages` pages from `ramPage` once less. They were counted before. */
  remove(ramPage: number, pages: number): void {
    this.#lock?.acquire();
    try {
      this.#removeRun(ramPage, pages);
    } finally {
      this.#lock?.release();
    }
  }

  /** Returns the pages counted, fewer than asked for where the quota ends. */
  #addRun(ramPage: number, pages: number): number {
    const words = this.#words;
    const first = COUNTS + ramPage;
    let pinned = words[PINNED]!;
    let page = 0;
    for (; page < pages; page++) {
      if (words[first + page] === 0) {
        if (pinned >= this.#quotaPages) break;
        pinned++;
      }
      words[first + page]!++;
    }
    words[PINNED] = pinned;
    return page;
  }

  #removeRun(ramPage: number, pages: number): void {
    const words = this.#words;
    const end = COUNTS + ramPage + pages;
    let pinned = words[PINNED]!;
    for (let at = COUNTS + ramPage; at < end; at++) {
      if (--words[at]! === 0) pinned--;
    }
    words[PINNED] = pinned;
  }
}
