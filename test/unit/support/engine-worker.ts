// A Worker of the engine's concurrency test: maps and unmaps at random on the state it shares with the others, over
// a backend in shared memory that notices when two mappings meet.

import { parentPort, workerData } from "node:worker_threads";
import { STATUS } from "../../../hypercalls/abi.js";
import { PAGE_BYTES } from "../../../hypercalls/addresses.js";
import { Engine, type EngineState } from "../../../hypercalls/engine.js";
import { ERRNO, statusClassOf } from "../../../hypercalls/status.js";
import { OwnerTable } from "./owner-table.js";
import { Random } from "./random.js";

export interface WorkerJob {
  readonly state: EngineState;
  /** A word per IOVA page of each domain: the hva page + 1 that is mapped there. */
  readonly owners: readonly SharedArrayBuffer[];
  /** [0]: mappings that met another. [1]: mappings that changed while they lived. [2]: unmaps that got stuck. */
  readonly faults: SharedArrayBuffer;
  readonly lane: number;
  readonly operations: number;
  readonly ramPages: number;
  /** One in so many maps and unmaps of the backend fails; 0: none. */
  readonly failures: number;
  /** Instead: map and unmap for device 1 until it is gone, with the pairs counted here. */
  readonly untilGone?: SharedArrayBuffer;
}

/** A table whose owner does not always do what it is asked to. */
class UnreliableTable extends OwnerTable {
  constructor(
    owners: Int32Array,
    faults: Int32Array,
    readonly random: Random,
    readonly failures: number,
  ) {
    super(owners, faults);
  }

  override map(iova: number, hva: number, bytes: number): number {
    if (this.failures === 0 || !this.random.oneIn(this.failures)) return super.map(iova, hva, bytes);
    return this.random.pick([ERRNO.ENOMEM, ERRNO.EAGAIN]);
  }

  override unmap(iova: number, bytes: number): number {
    if (this.failures === 0 || !this.random.oneIn(this.failures)) return super.unmap(iova, bytes);
    return -ERRNO.EINVAL;
  }
}

function hammer(job: WorkerJob): void {
  const faults = new Int32Array(job.faults);
  const chance = new Random(job.lane + 100);
  const tables = job.owners.map(
    (memory) => new UnreliableTable(new Int32Array(memory), faults, chance, job.failures),
  );
  const engine = new Engine(job.state, (domain) => tables[domain]!, job.lane);
  const random = new Random(job.lane);
  const live: { handle: number; iova: number; gpa: number; pages: number }[] = [];
  const check = (what: string, result: number): boolean => {
    const expected = result === 0 || (job.failures > 0 && statusClassOf(result) === STATUS.limit);
    if (!expected) throw new Error(`${what} failed: status ${result}`);
    return result === 0;
  };
  const unmap = (index: number) => {
    const { handle, iova, gpa, pages } = live[index]!;
    live[index] = live.at(-1)!;
    live.pop();
    const { owners } = tables[job.state.config.devices[handle - 1]!.domain]!;
    for (let page = 0; page < pages; page++) {
      // The guest's RAM begins at hva 0.
      const expected = gpa / PAGE_BYTES + page + 1;
      if (Atomics.load(owners, iova / PAGE_BYTES + page) !== expected) Atomics.add(faults, 1, 1);
    }
    // What gets stuck is forgotten: any thread may unmap it from now on.
    if (!check("unmap", engine.unmap(handle, iova, pages * PAGE_BYTES))) Atomics.add(faults, 2, 1);
  };
  for (let step = 0; step < job.operations; step++) {
    if (live.length === 64 || (live.length > 0 && random.oneIn(2))) unmap(random.below(live.length));
    else {
      const handle = 1 + random.below(job.state.config.devices.length);
      const pages = 1 + random.below(8);
      const gpa = random.below(job.ramPages - 8) * PAGE_BYTES;
      const result = engine.map(handle, gpa, pages * PAGE_BYTES, 2 ** 44, 3 | (random.oneIn(4) ? 4 : 0));
      if (check("map", result)) live.push({ handle, iova: engine.out[0]!, gpa, pages });
    }
  }
  while (live.length > 0) unmap(live.length - 1);
}

/** Maps for device 1 until that is answered with another status than ok, which is to be `gone`. */
function mapUntilGone(job: WorkerJob, progress: Int32Array): void {
  const table = new OwnerTable(new Int32Array(job.owners[0]!), new Int32Array(job.faults));
  const engine = new Engine(job.state, () => table, job.lane);
  for (;;) {
    const result = engine.map(1, 0, PAGE_BYTES, 2 ** 44, 3);
    if (result !== 0) {
      if (statusClassOf(result) !== STATUS.gone) throw new Error(`map failed: status ${result}`);
      return;
    }
    engine.unmap(1, engine.out[0]!, PAGE_BYTES);
    Atomics.add(progress, 0, 1);
  }
}

if (parentPort !== null) {
  const job = workerData as WorkerJob;
  if (job.untilGone === undefined) hammer(job);
  else mapUntilGone(job, new Int32Array(job.untilGone));
  parentPort.postMessage("done");
}
