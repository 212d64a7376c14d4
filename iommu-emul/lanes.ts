// How an unmap waits for devices. Each device has a lane in shared memory, in which it says that an access is under way;
// an unmap first makes the mapping unreachable and then waits for every access that may have begun before.
//
// Why that is enough. All atomic operations on shared memory have one order that all threads agree on (ECMAScript,
// "Memory Model": sequentially consistent atomics), and it agrees with each thread's own order.
//
//   unmap, under the IOMMU's lock            access, on the device's thread
//   U1  clear the slots of the page table    D1  section := odd
//   U2  post the range, generation := g      D2  read the generation; drop from the IOTLB what was posted since
//   U3  read section of each lane            D3  look up, walk, copy (or a system call does)
//       odd: wait until it is another        D4  section := even
//
// If U3 reads a section that D1 has not made odd yet, then U3 is before D1 and U2 before D2: the access sees generation
// g and drops the range from its IOTLB, and as U1 is before U2 its walk finds the cleared slots. Otherwise U3 reads the
// odd value, and the unmap waits until D4 has changed it: the copy is done, and what came of it is seen by whoever runs
// after the unmap. Either way no access that could reach the mapping is under way when unmap returns. An access that
// begins after U2 may be waited for as well, but only the one that U3 met: the section is a number that counts up.
//
// The same holds for a table of the page table that an unmap left empty, which is used again after U3 only, and for
// bus mastering with "flag := 0" for U1 and U2 and its reading for D2.
//
// Once a device's bus mastering is off and its section was even, or has changed, it is quiet: U3 passes it by. It may make
// its section odd all the same, but finds the flag at D2 and touches nothing. So its thread can be ended by force
// (`terminate()` of a Worker stops it anywhere), and no unmap that begins after that waits for what it leaves behind. Bus
// mastering is turned on in the order "quiet := 0, flag := 1": a U3 that passes the lane by is before both, and a D2 that
// finds the flag set is after them, so it reads that unmap's generation.
//
// The ring of invalidations needs no more care: a second unmap posts after the first has waited for the access (the
// lock), so while an access is at D2 at most one range is being written, and that is slot g + 1 of the ring, which
// an access that is less than the ring's length behind does not read. The generation has 32 bits, so a device that
// rests must not sleep through a whole turn of it: every 2^30 the unmap tells each lane to drop everything. (A lane
// that is not told yet when it looks is at most one generation past that point, which waits for it.)
//
// The sleep. U3 adds itself to `waiters` before it sleeps on the section, D4 looks at `waiters` after it changed the
// section: one of them sees the other, and Atomics.wait does not sleep when the section has changed already.

import { FLAG, HEADER, INVALIDATIONS, LANE, LANE_WORDS, type Shared } from "./shared.js";

/** Looks at a section this often before it sleeps: a copy of a page takes less, a system call does not. */
const SPINS = 200;
/** Generations, a power of two far below 2^31, after which lanes are told to drop everything. */
const TURN = 2 ** 30;

/** Everybody else's side of the lanes. Any thread. */
export class Lanes {
  readonly #header: Int32Array;
  readonly #words: Int32Array;
  readonly #invalidations: Float64Array;

  constructor(shared: Shared) {
    this.#header = shared.header;
    this.#words = shared.lanes;
    this.#invalidations = shared.invalidations;
  }

  /** U2: the pages, `last` inclusive, are no longer mapped. The caller holds the IOMMU's lock. */
  invalidate(firstPage: number, lastPage: number): void {
    const generation = (this.#header[HEADER.generation]! + 1) | 0;
    const at = (generation & (INVALIDATIONS - 1)) * 2;
    this.#invalidations[at] = firstPage;
    this.#invalidations[at + 1] = lastPage;
    if ((generation & (TURN - 1)) === 0) {
      for (let lane = 0; lane < this.#header[HEADER.lanes]!; lane++) {
        Atomics.or(this.#words, lane * LANE_WORDS + LANE.flags, FLAG.flush);
      }
    }
    Atomics.store(this.#header, HEADER.generation, generation);
  }

  /** U3, for every device of the domain. */
  waitForAll(): void {
    for (let lane = 0; lane < this.#header[HEADER.lanes]!; lane++) {
      const flags = Atomics.load(this.#words, lane * LANE_WORDS + LANE.flags);
      if ((flags & FLAG.quiet) === 0) this.waitFor(lane);
    }
  }

  /** U3: returns when the access that this lane has under way, if any, has ended. */
  waitFor(lane: number): void {
    const words = this.#words;
    const at = lane * LANE_WORDS + LANE.section;
    const section = Atomics.load(words, at);
    if ((section & 1) === 0) return;
    for (let spin = 0; spin < SPINS; spin++) {
      if (Atomics.load(words, at) !== section) return;
    }
    Atomics.add(words, lane * LANE_WORDS + LANE.waiters, 1);
    while (Atomics.load(words, at) === section) Atomics.wait(words, at, section);
    Atomics.sub(words, lane * LANE_WORDS + LANE.waiters, 1);
  }

  /** Off: returns when the access that this lane has under way, if any, has ended. One thread at a time. */
  setBusMaster(lane: number, on: boolean): void {
    const at = lane * LANE_WORDS + LANE.flags;
    if (on) {
      Atomics.and(this.#words, at, ~FLAG.quiet);
      Atomics.or(this.#words, at, FLAG.busMaster);
    } else if ((Atomics.load(this.#words, at) & FLAG.quiet) === 0) {
      Atomics.and(this.#words, at, ~FLAG.busMaster);
      this.waitFor(lane);
      Atomics.or(this.#words, at, FLAG.quiet);
    }
  }

  /** Ends, for everybody who waits, the access of a thread that is no more: from now on this one writes the section. */
  markDead(lane: number): void {
    const at = lane * LANE_WORDS;
    Atomics.and(this.#words, at + LANE.flags, ~FLAG.busMaster);
    const section = Atomics.load(this.#words, at + LANE.section);
    if ((section & 1) !== 0) Atomics.store(this.#words, at + LANE.section, (section + 1) | 0);
    Atomics.notify(this.#words, at + LANE.section);
  }
}

/** The device's side of a lane. Its thread only. */
export class OwnLane {
  readonly #words: Int32Array;
  readonly #section: number;
  readonly #waiters: number;
  readonly #flags: number;
  /** What the section holds: nobody else writes it while this thread lives. */
  #value: number;

  constructor(shared: Shared, lane: number) {
    const at = lane * LANE_WORDS;
    this.#words = shared.lanes;
    this.#section = at + LANE.section;
    this.#waiters = at + LANE.waiters;
    this.#flags = at + LANE.flags;
    this.#value = Atomics.load(this.#words, this.#section);
    if ((this.#value & 1) !== 0) {
      throw new Error(`software IOMMU: lane ${lane} has an access under way; is its thread marked dead?`);
    }
  }

  /** D1. `leave` follows, whatever happens. */
  enter(): void {
    this.#value = (this.#value + 1) | 0;
    Atomics.store(this.#words, this.#section, this.#value);
  }

  /** D4. */
  leave(): void {
    this.#value = (this.#value + 1) | 0;
    Atomics.store(this.#words, this.#section, this.#value);
    if (Atomics.load(this.#words, this.#waiters) !== 0) Atomics.notify(this.#words, this.#section);
  }

  /** D2, between enter and leave: FLAG bits. `flush` is given once, and then done. */
  takeFlags(): number {
    const flags = Atomics.load(this.#words, this.#flags);
    return (flags & FLAG.flush) === 0 ? flags : Atomics.and(this.#words, this.#flags, ~FLAG.flush);
  }
}
