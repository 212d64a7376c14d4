// A Worker of the injection test: makes map calls that rules in shared memory decide about.

import { parentPort, workerData } from "node:worker_threads";
import { INJECT, Injector } from "../../../hypercalls/injection.js";

export interface InjectionJob {
  readonly memory: SharedArrayBuffer;
  readonly calls: number;
  /** Threads that are still to come; nobody begins before all are there. */
  readonly gate: SharedArrayBuffer;
}

if (parentPort !== null) {
  const { memory, calls, gate } = workerData as InjectionJob;
  const missing = new Int32Array(gate);
  if (Atomics.sub(missing, 0, 1) === 1) Atomics.notify(missing, 0);
  for (let left = Atomics.load(missing, 0); left > 0; left = Atomics.load(missing, 0)) {
    Atomics.wait(missing, 0, left);
  }
  const injector = new Injector(memory);
  let struck = 0;
  for (let call = 0; call < calls; call++) if (injector.decide(INJECT.map, 1, 4096) !== 0) struck++;
  parentPort.postMessage(struck);
}
