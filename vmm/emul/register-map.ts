// Which guest-physical addresses are registers of emulated devices: a small table in shared memory, written by the main
// thread when a BAR comes, moves or goes, read by vCPUs at every exit to memory that is not RAM. Addresses are gpas in
// bytes, whole pages.

import { PAGE_BYTES } from "../../hypercalls/addresses.js";

/** BARs of all devices: as many as a bus has slots, six each. */
const ENTRIES = 31 * 6;
const COUNT = 0;
const FIRST = 4;
// An entry. Its generation is odd while the rest holds, and changes before and after each change of it.
const GENERATION = 0;
const PAGE_LO = 1;
const PAGE_HI = 2;
const PAGES = 3;
const TARGET = 4;
const ENTRY_WORDS = 8;

export const newRegisterMap = (): SharedArrayBuffer =>
  new SharedArrayBuffer((FIRST + ENTRIES * ENTRY_WORDS) * 4);

/** The main thread's side. */
export class RegisterMap {
  private readonly words: Int32Array;

  constructor(readonly memory: SharedArrayBuffer = newRegisterMap()) {
    this.words = new Int32Array(memory);
  }

  /**
   * From now on accesses to these addresses go to BAR `bar` of the device number `device`. The range overlaps no other,
   * and begins and ends at whole pages. Throws a RangeError without room.
   */
  add(gpa: number, bytes: number, device: number, bar: number): void {
    const { words } = this;
    const count = Atomics.load(words, COUNT);
    let entry = 0;
    while (entry < count && (this.generation(entry) & 1) === 1) entry++;
    if (entry === ENTRIES) throw new RangeError(`more than ${ENTRIES} BARs`);
    const at = FIRST + entry * ENTRY_WORDS;
    const page = gpa / PAGE_BYTES;
    Atomics.store(words, at + PAGE_LO, page | 0);
    Atomics.store(words, at + PAGE_HI, Math.floor(page / 2 ** 32));
    Atomics.store(words, at + PAGES, bytes / PAGE_BYTES);
    Atomics.store(words, at + TARGET, device * 8 + bar);
    Atomics.add(words, at + GENERATION, 1);
    if (entry === count) Atomics.store(words, COUNT, count + 1);
  }

  /** The range that begins at `gpa` is nobody's. An access that a vCPU began before may still reach the device. */
  remove(gpa: number): void {
    const { words } = this;
    for (let entry = 0; entry < Atomics.load(words, COUNT); entry++) {
      const at = FIRST + entry * ENTRY_WORDS;
      if ((this.generation(entry) & 1) === 1 && firstPage(words, at) === gpa / PAGE_BYTES) {
        Atomics.add(words, at + GENERATION, 1);
        return;
      }
    }
  }

  private generation(entry: number): number {
    return Atomics.load(this.words, FIRST + entry * ENTRY_WORDS + GENERATION);
  }
}

const firstPage = (words: Int32Array, at: number): number =>
  (Atomics.load(words, at + PAGE_LO) >>> 0) + Atomics.load(words, at + PAGE_HI) * 2 ** 32;

/** A vCPU's side. After find(), what it found is in the fields. */
export class RegisterLookup {
  device = 0;
  bar = 0;
  /** Of the address, in the BAR. */
  offset = 0;
  /** Bytes of the BAR from there on. */
  left = 0;
  private readonly words: Int32Array;

  constructor(memory: SharedArrayBuffer) {
    this.words = new Int32Array(memory);
  }

  /** Whether the address is a register. While a BAR moves it is nowhere. */
  find(gpa: number): boolean {
    const { words } = this;
    const count = Atomics.load(words, COUNT);
    const page = Math.floor(gpa / PAGE_BYTES);
    for (let entry = 0, at = FIRST; entry < count; entry++, at += ENTRY_WORDS) {
      const generation = Atomics.load(words, at + GENERATION);
      if ((generation & 1) === 0) continue;
      const first = firstPage(words, at);
      const pages = Atomics.load(words, at + PAGES);
      const target = Atomics.load(words, at + TARGET);
      if (page < first || page >= first + pages) continue;
      if (Atomics.load(words, at + GENERATION) !== generation) continue;
      this.device = target >> 3;
      this.bar = target & 7;
      this.offset = gpa - first * PAGE_BYTES;
      this.left = pages * PAGE_BYTES - this.offset;
      return true;
    }
    return false;
  }
}
