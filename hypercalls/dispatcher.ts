// From a call frame to the engine and back. It decodes registers, reads the call page once into memory of its own,
// and counts; what the values mean is checked in engine.ts. A frame is a Float64Array: [0] the call number in and
// the status out, [1] to [5] arguments and results in the order of FRAME_REGISTERS.

import { performance } from "node:perf_hooks"; // the global of that name is looked up by a function at every use
import { CALL_NAMES, CALLS, LIMITS } from "./abi.js";
import { gpa, MAX_EXACT, PAGE_BYTES } from "./addresses.js";
import type { Engine } from "./engine.js";
import type { GuestMemory } from "./guest-ram.js";
import { REFUSED } from "./stats.js";
import {
  INVALID_CALL,
  INVALID_CPL,
  INVALID_EINVAL,
  INVALID_NOT_RAM,
  INVALID_TOO_LONG,
  OK,
} from "./status.js";

/** Numbers in a frame. */
export const FRAME_WORDS = 6;

/**
 * Of each kind of call a vCPU's first so many are timed, and then one of 16 or so, at random, which stands for those since
 * the last one: to look at the clock twice takes a quarter of what a map and its books take. At random, so that of
 * devices that call by turns each has its share.
 */
const ALL_TIMED = 4096;
const GAP_BITS = 5;

/** Services the calls of one vCPU, on its thread. */
export class Dispatcher {
  readonly #engine: Engine;
  readonly #memory: GuestMemory;
  /** This thread's copy of the call page: what was checked is what is used, whatever the guest writes meanwhile. */
  readonly #page = new Uint32Array(LIMITS.callPageBytes / 4);
  // By number of the call: those timed so far, up to ALL_TIMED; those from the last that was timed to the next; and of these
  // the ones to come. There is no call 0.
  readonly #timed = new Int32Array(CALL_NAMES.length + 1);
  readonly #gap = new Int32Array(CALL_NAMES.length + 1).fill(1, 1);
  readonly #left = new Int32Array(CALL_NAMES.length + 1).fill(1, 1);
  #random = 1;
  readonly #now: () => number;

  /** `now`: a clock in ms. */
  constructor(engine: Engine, memory: GuestMemory, now: () => number = () => performance.now()) {
    this.#engine = engine;
    this.#memory = memory;
    this.#now = now;
  }

  /**
   * Does the call in the frame and puts status and results there. Registers that hold 2^53 or more come rounded, as
   * doubles do. Registers that are not valid with the status keep what they held. `cpl`: the caller's privilege
   * level; 1 to 3 are refused. Never throws, whatever the frame holds.
   */
  dispatch(frame: Float64Array, cpl: number): void {
    const engine = this.#engine;
    const { lane } = engine;
    const call = frame[0]!;
    // Entries done: valid with every status.
    const isList = call === CALLS.map_list.number || call === CALLS.unmap_list.number;
    if (cpl > 0) {
      lane.refuse(REFUSED.cpl);
      frame[0] = INVALID_CPL;
      if (isList) frame[2] = 0;
      return;
    }
    const standsFor = this.#standsFor(call);
    const start = standsFor > 0 ? this.#now() : 0;
    const result = isList ? this.#list(call, frame) : this.#single(call, frame);
    frame[0] = result;
    if (result === INVALID_CALL) lane.refuse(REFUSED.unknown);
    else {
      lane.record(call, engine.handle, result, engine.injected, engine.pages);
      if (standsFor > 0) lane.time(call, engine.handle, Math.round((this.#now() - start) * 1e6), standsFor);
    }
  }

  /** The calls for which this one is timed; 0: it is not, and never is a number that is no call's. */
  #standsFor(call: number): number {
    const left = this.#left[call]! - 1;
    if (left > 0) this.#left[call] = left;
    if (left !== 0) return 0;
    const standsFor = this.#gap[call]!;
    let gap = 1;
    if (this.#timed[call]! < ALL_TIMED) this.#timed[call]!++;
    if (this.#timed[call]! === ALL_TIMED) {
      // Numerical Recipes' generator, of which the high bits are good.
      this.#random = (Math.imul(this.#random, 1664525) + 1013904223) | 0;
      gap = 1 + (this.#random >>> (32 - GAP_BITS));
    }
    this.#gap[call] = gap;
    this.#left[call] = gap;
    return standsFor;
  }

  #single(call: number, frame: Float64Array): number {
    const engine = this.#engine;
    switch (call) {
      case CALLS.map.number:
        return this.#results(engine.map(frame[1]!, frame[2]!, frame[3]!, frame[4]!, frame[5]!), frame, 1);
      case CALLS.unmap.number:
        return this.#results(engine.unmap(frame[1]!, frame[2]!, frame[3]!), frame, 1);
      case CALLS.is_assigned.number:
        return this.#results(engine.isAssigned(frame[1]!), frame, 5);
      case CALLS.release.number:
        return this.#results(engine.release(frame[1]!), frame, 2);
      case CALLS.table.number:
        return this.#results(engine.table(frame[1]!, frame[2]!), frame, 2);
      case CALLS.probe.number:
        return this.#probe(frame);
      default:
        return INVALID_CALL;
    }
  }

  /** Puts that many results of a call that ended well into the frame; returns its status. */
  #results(result: number, frame: Float64Array, count: number): number {
    const { out } = this.#engine;
    for (let index = 0; result === OK && index < count; index++) frame[index + 1] = out[index]!;
    return result;
  }

  #probe(frame: Float64Array): number {
    const engine = this.#engine;
    const page = frame[2]!;
    engine.probe();
    if (page !== 0) {
      const checked = this.#checkPage(page);
      if (checked !== OK) return checked;
      const ranges = engine.rangeWords;
      if (!this.#memory.copyOut(gpa(page), ranges.length * 4, ranges)) return INVALID_NOT_RAM;
      engine.out[4] = (ranges.length * 4) / LIMITS.entryBytes;
    }
    frame.set(engine.out, 1);
    return OK;
  }

  #list(call: number, frame: Float64Array): number {
    const engine = this.#engine;
    const page = frame[2]!;
    const count = frame[3]!;
    engine.begin(frame[1]!);
    frame[2] = 0;
    if (count < 1) return INVALID_EINVAL;
    if (count > LIMITS.listEntries) return INVALID_TOO_LONG;
    const checked = this.#checkPage(page);
    if (checked !== OK) return checked;
    if (!this.#memory.copyIn(gpa(page), count * LIMITS.entryBytes, this.#page)) return INVALID_NOT_RAM;
    const result =
      call === CALLS.map_list.number
        ? engine.mapList(frame[1]!, this.#page, count, frame[4]!, frame[5]!)
        : engine.unmapList(frame[1]!, this.#page, count);
    if (result === OK) frame[1] = engine.out[0]!;
    frame[2] = engine.out[1]!;
    return result;
  }

  /** A call page is a whole page of guest RAM. */
  #checkPage(page: number): number {
    if (page > MAX_EXACT) return INVALID_NOT_RAM;
    if (page % PAGE_BYTES !== 0) return INVALID_EINVAL;
    return this.#engine.ram.contains(page / PAGE_BYTES, 1) ? OK : INVALID_NOT_RAM;
  }
}
