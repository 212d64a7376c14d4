// Exits that a vCPU's thread does not serve itself (PCI configuration, MSI-X tables, ACPI registers) go to the main
// thread: the vCPU writes the access into its lane of shared memory, rings by a message and sleeps until the answer
// is there. Rare after boot, and it lets those devices be plain objects of one thread.

import type { MessagePort } from "node:worker_threads";
import { RING_SLOW_EXIT } from "./vcpu-link.js";

const STATE = 0;
const KIND = 1;
const BYTES = 2;
const ADDRESS = 4; // two words
const VALUE = 6; // two words
const LANE_WORDS = 16;

const IDLE = 0;
const ASKED = 1;

export type SlowAccess = "pio-read" | "pio-write" | "mmio-read" | "mmio-write";
const KINDS: readonly SlowAccess[] = ["pio-read", "pio-write", "mmio-read", "mmio-write"];
export const PIO_READ = 0;
export const PIO_WRITE = 1;
export const MMIO_READ = 2;
export const MMIO_WRITE = 3;

export const newSlowExitLane = (): SharedArrayBuffer => new SharedArrayBuffer(LANE_WORDS * 4);

/** A vCPU's side. After a read, `low` and `high` hold the value's words. */
export class SlowExitCaller {
  private readonly lane: Int32Array;

  constructor(
    shared: SharedArrayBuffer,
    private readonly port: MessagePort,
  ) {
    this.lane = new Int32Array(shared);
  }

  /** Has the main thread serve an access of 1 to 8 bytes, and waits for it. */
  access(kind: number, address: number, bytes: number, low: number, high: number): void {
    const { lane } = this;
    lane[KIND] = kind;
    lane[BYTES] = bytes;
    lane[ADDRESS] = address % 2 ** 32;
    lane[ADDRESS + 1] = Math.floor(address / 2 ** 32);
    lane[VALUE] = low;
    lane[VALUE + 1] = high;
    Atomics.store(lane, STATE, ASKED);
    this.port.postMessage(RING_SLOW_EXIT);
    while (Atomics.load(lane, STATE) === ASKED) Atomics.wait(lane, STATE, ASKED);
  }

  get low(): number {
    return this.lane[VALUE]! >>> 0;
  }
  get high(): number {
    return this.lane[VALUE + 1]! >>> 0;
  }
}

/** The main thread's side: serves the access a vCPU asks for, if there is one. */
export function serveSlowExit(
  shared: SharedArrayBuffer,
  serve: (
    kind: SlowAccess,
    address: number,
    bytes: number,
    low: number,
    high: number,
  ) => readonly [number, number],
): void {
  const lane = new Int32Array(shared);
  if (Atomics.load(lane, STATE) !== ASKED) return;
  try {
    const address = (lane[ADDRESS]! >>> 0) + (lane[ADDRESS + 1]! >>> 0) * 2 ** 32;
    const [low, high] = serve(
      KINDS[lane[KIND]!]!,
      address,
      lane[BYTES]!,
      lane[VALUE]! >>> 0,
      lane[VALUE + 1]! >>> 0,
    );
    lane[VALUE] = low;
    lane[VALUE + 1] = high;
  } finally {
    // Whatever happened, the vCPU must not sleep for ever: a stop could not reach it.
    Atomics.store(lane, STATE, IDLE);
    Atomics.notify(lane, STATE);
  }
}
