// What the engine itself costs: a map and an unmap through the dispatcher, over a backend that does nothing.
// With --expose-gc also the bytes it leaves to the garbage collector.

import { CALLS, MAP_FLAG } from "../../hypercalls/abi.js";
import { gpa, hva, PAGE_BYTES } from "../../hypercalls/addresses.js";
import type { DmaBackend } from "../../hypercalls/backend.js";
import { Dispatcher, FRAME_WORDS } from "../../hypercalls/dispatcher.js";
import { createEngineState, Engine } from "../../hypercalls/engine.js";
import type { GuestMemory } from "../../hypercalls/guest-ram.js";
import { present, progress } from "./program.js";
import type { Row } from "./report.js";

const RAM_BYTES = 2 ** 29;
const LIST = 64;

/** Takes everything for done. */
class NoBackend implements DmaBackend {
  map(): number {
    return 0;
  }
  unmap(_iova: number, bytes: number): number {
    return bytes;
  }
}

const page = new Uint32Array(1024);
const memory: GuestMemory = {
  copyIn: (_gpa, bytes, into) => {
    into.set(page.subarray(0, bytes / 4));
    return true;
  },
  copyOut: () => true,
};

const backend = new NoBackend();
const state = createEngineState({
  ram: [{ gpa: gpa(0), bytes: RAM_BYTES, hva: hva(0x7f00_0000_0000) }],
  domains: [
    {
      kind: "translated",
      limits: { ranges: [{ first: 0, last: 2 ** 39 - 1 }], entries: 65535, pageSizeMask: PAGE_BYTES },
    },
  ],
  devices: [
    {
      name: "0000:01:00.0",
      bdf: 8,
      policy: "strict",
      domain: 0,
      addressBits: 39,
      quotaBytes: 0,
      lockableBytes: 0,
    },
  ],
  quotaBytes: 0,
  lanes: 1,
});
const engine = new Engine(state, () => backend, 0);
const dispatcher = new Dispatcher(engine, memory);
const frame = new Float64Array(FRAME_WORDS);

function call(number: number, a: number, b: number, c: number, d = 0, e = 0): number {
  frame[0] = number;
  frame[1] = a;
  frame[2] = b;
  frame[3] = c;
  frame[4] = d;
  frame[5] = e;
  dispatcher.dispatch(frame, 0);
  if (frame[0] !== 0) throw new Error(`call ${number}: status ${frame[0]}`);
  return frame[1]!;
}

let turn = 0;
function pair(pages: number): void {
  turn = (turn + 7919) % (RAM_BYTES / PAGE_BYTES - pages);
  const at = call(CALLS.map.number, 1, turn * PAGE_BYTES, pages * PAGE_BYTES, 2 ** 64, MAP_FLAG.write);
  call(CALLS.unmap.number, 1, at, pages * PAGE_BYTES);
}

function listPair(): void {
  const at = call(CALLS.map_list.number, 1, 0, LIST, 2 ** 64, MAP_FLAG.write);
  call(CALLS.unmap.number, 1, at, LIST * PAGE_BYTES);
}

/** Nanoseconds of a map and its unmap, and the bytes of garbage they leave, round by round. */
interface Cost {
  readonly name: string;
  readonly ns: number[];
  garbage: number;
}

const ROUNDS = 5;
const ROUND_MS = 300;
const costs: Cost[] = [];

function measure(name: string, once: () => void): void {
  const run = (count: number) => {
    for (let i = 0; i < count; i++) once();
  };
  progress(`  ${name}`);
  run(20000);
  globalThis.gc?.();
  const heap = process.memoryUsage().heapUsed;
  run(1000);
  const cost: Cost = { name, ns: [], garbage: (process.memoryUsage().heapUsed - heap) / 1000 };
  for (let round = 0; round < ROUNDS; round++) {
    let count = 0;
    const start = performance.now();
    while (performance.now() - start < ROUND_MS) {
      run(1000);
      count += 1000;
    }
    cost.ns.push(((performance.now() - start) * 1e6) / count);
  }
  costs.push(cost);
}

for (let i = 0; i < LIST; i++) page.set([(i * 37 * PAGE_BYTES) >>> 0, 0, PAGE_BYTES, 0], i * 4);
measure("1 page", () => pair(1));
measure("16 pages", () => pair(16));
measure("512 pages", () => pair(512));
measure(`list of ${LIST} scattered pages`, listPair);
for (let i = 0; i < 30000; i++) call(CALLS.map.number, 1, i * PAGE_BYTES, PAGE_BYTES, 2 ** 64, MAP_FLAG.read);
measure("1 page, 30,000 others mapped", () => pair(1));

const rows = (name: string, values: (cost: Cost) => number[]): Row[] =>
  costs.map((cost) => ({ name: cost.name, bars: [{ contender: name, values: values(cost) }] }));
const garbage = costs.map((cost) => `${cost.name}: ${cost.garbage.toFixed(0)}`).join("; ");
present({
  sections: [
    {
      id: "engine",
      title: "What the mapping engine costs",
      about:
        "A map and its unmap through the dispatcher, over a backend that does nothing: checks, books, IOVA. No exit, no " +
        `system call.${globalThis.gc === undefined ? "" : ` Bytes left to the garbage collector by a pair: ${garbage}.`}`,
      unit: "ns per map and unmap",
      better: "less",
      rows: rows("strict", (cost) => cost.ns),
    },
  ],
});
