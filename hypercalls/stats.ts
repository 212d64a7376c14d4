// Counters of the hypercalls: a lane per thread in shared memory, in it a block per device and one, the first, for
// calls that are no device's. A lane has one writer, so nothing is locked and nothing is atomic: an aligned 64-bit
// store does not tear on the machines we run on, and a reader that adds up the lanes may be a call late, no more
// (`ns_total` by the calls since the last that was timed).

import { CALL_NAMES, CALLS, type CallName, STATUS, type StatusClass } from "./abi.js";
import { statusClassOf } from "./status.js";

/** A number with the path under which it is shown, such as `hypercalls/map/calls`. */
export type Stat = readonly [name: string, value: number];

/**
 * Per kind of call. `errors` are calls with another status than ok, but for those that `injected` counts: failures
 * on demand. `pages` were mapped or unmapped. The times are from a sample of the calls: the total is what all of them took
 * as far as the sample tells, the largest that of the sample.
 */
const CALL_FIELDS = ["calls", "errors", "injected", "pages", "ns_total", "ns_max"] as const;
type CallField = (typeof CALL_FIELDS)[number];
const CALLS_FIELD = 0;
const ERRORS_FIELD = 1;
const INJECTED_FIELD = 2;
const PAGES_FIELD = 3;
const NS_TOTAL_FIELD = 4;
const NS_MAX_FIELD = 5;

/** Behind them calls by status class, then these, then calls refused before they were looked at. */
const CLASS_FIELDS = CALL_NAMES.length * CALL_FIELDS.length;
const CLASSES = Object.keys(STATUS) as StatusClass[];
const EVENT_FIELDS = CLASS_FIELDS + CLASSES.length;
/** What else is counted. `limitHits`: maps that the host, not an injected failure, refused for a limit. */
export const EVENT = { limitHits: 0, injected: 1, delayed: 2, faults: 3, releasedMappings: 4 } as const;
const REFUSED_FIELDS = EVENT_FIELDS + Object.keys(EVENT).length;
export const REFUSED = { cpl: 0, unknown: 1 } as const;
const REFUSED_NAMES = Object.keys(REFUSED);
/** A multiple of 8, so that two lanes share no cache line. */
const BLOCK_FIELDS = Math.ceil((REFUSED_FIELDS + REFUSED_NAMES.length) / 8) * 8;

/** Shared memory for that many lanes, with blocks for `devices` devices. */
export const createLanes = (lanes: number, devices: number): SharedArrayBuffer =>
  new SharedArrayBuffer(lanes * (1 + devices) * BLOCK_FIELDS * 8);

/** The writer of one lane; one thread only. Handles are 0, for no device, to the number of devices. */
export class StatsLane {
  readonly #fields: Float64Array;

  constructor(memory: SharedArrayBuffer, lane: number, devices: number) {
    const fields = (1 + devices) * BLOCK_FIELDS;
    this.#fields = new Float64Array(memory, lane * fields * 8, fields);
  }

  /**
   * Counts a call: its number (1 to the number of calls), its device, the status it got, whether a failure was
   * injected, pages mapped or unmapped.
   */
  record(call: number, handle: number, status: number, injected: boolean, pages: number): void {
    const fields = this.#fields;
    const block = handle * BLOCK_FIELDS;
    const at = block + (call - 1) * CALL_FIELDS.length;
    const statusClass = statusClassOf(status);
    fields[at + CALLS_FIELD]!++;
    if (status !== 0) this.#countFailure(at, block, call, statusClass, injected);
    fields[at + PAGES_FIELD]! += pages;
    fields[block + CLASS_FIELDS + statusClass]!++;
  }

  /** How long a call took, which stands for so many calls of its kind. */
  time(call: number, handle: number, ns: number, standsFor: number): void {
    const fields = this.#fields;
    const at = handle * BLOCK_FIELDS + (call - 1) * CALL_FIELDS.length;
    fields[at + NS_TOTAL_FIELD]! += ns * standsFor;
    if (ns > fields[at + NS_MAX_FIELD]!) fields[at + NS_MAX_FIELD] = ns;
  }

  #countFailure(at: number, block: number, call: number, statusClass: number, injected: boolean): void {
    const fields = this.#fields;
    if (injected) {
      fields[at + INJECTED_FIELD]!++;
      fields[block + EVENT_FIELDS + EVENT.injected]!++;
      return;
    }
    fields[at + ERRORS_FIELD]!++;
    if (statusClass === STATUS.limit && (call === CALLS.map.number || call === CALLS.map_list.number)) {
      fields[block + EVENT_FIELDS + EVENT.limitHits]!++;
    }
  }

  /** Counts `times` events of a device: one of EVENT. */
  count(event: number, handle: number, times: number): void {
    this.#fields[handle * BLOCK_FIELDS + EVENT_FIELDS + event]! += times;
  }

  /** Counts a call that was refused unseen: one of REFUSED. */
  refuse(why: number): void {
    this.#fields[REFUSED_FIELDS + why]!++;
  }
}

/** Reads the counters over all lanes: sums, and for ns_max the largest. Without a handle, over all devices and none. */
export class LaneReader {
  readonly #fields: Float64Array;
  readonly #blocks: number;

  constructor(memory: SharedArrayBuffer, devices: number) {
    this.#fields = new Float64Array(memory);
    this.#blocks = 1 + devices;
  }

  event(event: number, handle?: number): number {
    return this.#sum(EVENT_FIELDS + event, handle);
  }

  call(call: CallName, field: CallField, handle?: number): number {
    const index = (CALLS[call].number - 1) * CALL_FIELDS.length + CALL_FIELDS.indexOf(field);
    return field === "ns_max" ? this.#max(index, handle) : this.#sum(index, handle);
  }

  /** Every counter of these calls. */
  calls(names: readonly CallName[], handle?: number): Stat[] {
    return names.flatMap((call) =>
      CALL_FIELDS.map((field): Stat => [`hypercalls/${call}/${field}`, this.call(call, field, handle)]),
    );
  }

  /** How calls ended. */
  answers(): Stat[] {
    return [
      ...CLASSES.map((name): Stat => [`hypercalls/status/${name}`, this.#sum(CLASS_FIELDS + STATUS[name])]),
      ...REFUSED_NAMES.map((name, i): Stat => [`hypercalls/refused/${name}`, this.#sum(REFUSED_FIELDS + i)]),
    ];
  }

  #sum(field: number, handle?: number): number {
    return this.#over(field, handle, (a, b) => a + b);
  }

  #max(field: number, handle?: number): number {
    return this.#over(field, handle, Math.max);
  }

  #over(field: number, handle: number | undefined, join: (a: number, b: number) => number): number {
    const step = BLOCK_FIELDS * (handle === undefined ? 1 : this.#blocks);
    let value = 0;
    for (let at = (handle ?? 0) * BLOCK_FIELDS + field; at < this.#fields.length; at += step) {
      value = join(value, this.#fields[at]!);
    }
    return value;
  }
}
