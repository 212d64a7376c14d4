// A Worker of the cached policy's concurrency test: a vCPU that counts, maps and unmaps at random, and looks, while it has
// pages, whether the device still reaches them.

import { parentPort, workerData } from "node:worker_threads";
import { STATUS } from "../../../hypercalls/abi.js";
import { Engine, type EngineState } from "../../../hypercalls/engine.js";
import { statusClassOf } from "../../../hypercalls/status.js";
import { OwnerTable } from "./owner-table.js";
import { Random } from "./random.js";
import { TableGuest } from "./table-guest.js";

export interface CachedJob {
  readonly state: EngineState;
  readonly table: SharedArrayBuffer;
  readonly owners: SharedArrayBuffer;
  /** [0]: mappings that met another. [1]: pages that were not mapped while they were held. */
  readonly faults: SharedArrayBuffer;
  readonly lane: number;
  readonly operations: number;
  readonly ramPages: number;
}

/** What a Worker has to tell in the end. */
export interface CachedReport {
  readonly calls: number;
  readonly refused: number;
}

const HELD_MAX = 4;

function hammer(job: CachedJob): CachedReport {
  const faults = new Int32Array(job.faults);
  const owners = new Int32Array(job.owners);
  const entries = new Int32Array(job.table);
  const table = { entries, clear: () => void entries.fill(0) };
  const engine = new Engine(
    job.state,
    () => new OwnerTable(owners, faults),
    job.lane,
    () => table,
  );
  const guest = new TableGuest(entries, engine, 1);
  const random = new Random(job.lane);
  const held: { page: number; pages: number }[] = [];
  let refused = 0;
  const look = ({ page, pages }: { page: number; pages: number }) => {
    // The guest's RAM begins at hva 0.
    for (let at = page; at < page + pages; at++)
      if (Atomics.load(owners, at) !== at + 1) Atomics.add(faults, 1, 1);
  };
  for (let step = 0; step < job.operations; step++) {
    if (held.length > 0 && (held.length === HELD_MAX || random.oneIn(2))) {
      const [gone] = held.splice(random.below(held.length), 1);
      look(gone!);
      guest.unmap(gone!.page, gone!.pages);
      continue;
    }
    const pages = 1 + random.below(4);
    const page = random.below(job.ramPages - pages);
    const result = guest.map(page, pages);
    if (result === 0) {
      held.push({ page, pages });
      look(held.at(-1)!);
    } else if (statusClassOf(result) === STATUS.limit) refused++;
    else throw new Error(`map: status ${result}`);
  }
  for (const each of held) {
    look(each);
    guest.unmap(each.page, each.pages);
  }
  return { calls: guest.calls, refused };
}

parentPort?.postMessage(hammer(workerData as CachedJob));
