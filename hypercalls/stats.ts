// Counters of the hypercalls, a lane per thread in shared memory. A lane has one writer, so nothing is locked and
// nothing is atomic: an aligned 64-bit store does not tear on the machines we run on, and a reader that adds up the
// lanes may be a call late, no more.

import { CALL_NAMES, CALLS, STATUS, type StatusClass } from "./abi.js";
import { statusClassOf } from "./status.js";

/** A number with the path under which it is shown, such as `hypercalls/map/calls`. */
export type Stat = readonly [name: string, value: number];

/** Per kind of call. `errors` are calls with another status than ok; `pages` were mapped or unmapped. */
const CALL_FIELDS = ["calls", "errors", "pages", "ns_total", "ns_max"] as const;
const CALLS_FIELD = 0;
const ERRORS_FIELD = 1;
const PAGES_FIELD = 2;
const NS_TOTAL_FIELD = 3;
const NS_MAX_FIELD = 4;

/** Calls by status class, then calls refused before they were looked at. */
const CLASS_FIELDS = CALL_NAMES.length * CALL_FIELDS.length;
const CLASSES = Object.keys(STATUS) as StatusClass[];
const REFUSED_FIELDS = CLASS_FIELDS + CLASSES.length;
export const REFUSED = { cpl: 0, unknown: 1 } as const;
const REFUSED_NAMES = Object.keys(REFUSED);
/** A multiple of 8, so that two lanes share no cache line. */
const LANE_FIELDS = Math.ceil((REFUSED_FIELDS + REFUSED_NAMES.length) / 8) * 8;

/** Shared memory for `lanes` lanes. */
export const createLanes = (lanes: number): SharedArrayBuffer =>
  new SharedArrayBuffer(lanes * LANE_FIELDS * 8);

/** The writer of one lane; one thread only. */
export class StatsLane {
  readonly #fields: Float64Array;

  constructor(memory: SharedArrayBuffer, lane: number) {
    this.#fields = new Float64Array(memory, lane * LANE_FIELDS * 8, LANE_FIELDS);
  }

  /** Counts a call: its number (1 to 6), the status it got, pages mapped or unmapped, and how long it took. */
  record(call: number, status: number, pages: number, ns: number): void {
    const fields = this.#fields;
    const at = (call - 1) * CALL_FIELDS.length;
    fields[at + CALLS_FIELD]!++;
    if (status !== 0) fields[at + ERRORS_FIELD]!++;
    fields[at + PAGES_FIELD]! += pages;
    fields[at + NS_TOTAL_FIELD]! += ns;
    if (ns > fields[at + NS_MAX_FIELD]!) fields[at + NS_MAX_FIELD] = ns;
    fields[CLASS_FIELDS + statusClassOf(status)]!++;
  }

  /** Counts a call that was refused unseen: one of REFUSED. */
  refuse(why: number): void {
    this.#fields[REFUSED_FIELDS + why]!++;
  }
}

/** All counters, over all lanes: sums, and for ns_max the largest. */
export function readLanes(memory: SharedArrayBuffer): Stat[] {
  const all = new Float64Array(memory);
  const over = (field: number, join: (a: number, b: number) => number) => {
    let value = 0;
    for (let at = field; at < all.length; at += LANE_FIELDS) value = join(value, all[at]!);
    return value;
  };
  const sum = (field: number) => over(field, (a, b) => a + b);
  return [
    ...CALL_NAMES.flatMap((call) =>
      CALL_FIELDS.map((name, index): Stat => {
        const field = (CALLS[call].number - 1) * CALL_FIELDS.length + index;
        return [`hypercalls/${call}/${name}`, index === NS_MAX_FIELD ? over(field, Math.max) : sum(field)];
      }),
    ),
    ...CLASSES.map((name): Stat => [`hypercalls/status/${name}`, sum(CLASS_FIELDS + STATUS[name])]),
    ...REFUSED_NAMES.map((name, index): Stat => [`hypercalls/refused/${name}`, sum(REFUSED_FIELDS + index)]),
  ];
}
