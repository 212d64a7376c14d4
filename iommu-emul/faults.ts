// Accesses that the software IOMMU refused: a bounded queue of records per device, in shared memory. A queue has one
// writer, the device's thread, and one reader, so neither ever waits, a thread that ends leaves nothing locked, and a
// device that faults without end pushes out no other's records. What finds no place is counted as lost.

import { type Iova, iova } from "../hypercalls/addresses.js";
import type { DmaFault } from "./device.js";
import {
  FAULT_FIELDS,
  FAULT_RECORDS,
  HEADER,
  LANE,
  LANE_COUNT,
  LANE_COUNTS,
  LANE_WORDS,
  Shared,
} from "./shared.js";

export interface FaultRecord {
  /** The device's lane. */
  readonly lane: number;
  /** The first byte that was refused; 2^53 or more is rounded. */
  readonly iova: Iova;
  readonly access: "read" | "write";
  /** DMA_FAULT.notMapped, access or range. */
  readonly reason: DmaFault;
}

/** What a device was refused, since the start. */
export interface FaultCounts {
  /** By the IOMMU; each is recorded or lost. */
  readonly faults: number;
  /** Of these, found the queue full. */
  readonly lost: number;
  /** Because the guest had not turned on bus mastering; such an access reaches no IOMMU, so there is no record. */
  readonly noBusMaster: number;
}

// A record: IOVA, access (1: write), reason, and the number by which the devices' records are ordered.
const IOVA = 0;
const WRITE = 1;
const REASON = 2;
const SEQUENCE = 3;

/** The device's side: its thread only. */
export class FaultWriter {
  readonly #shared: Shared;
  readonly #lane: number;

  constructor(shared: Shared, lane: number) {
    this.#shared = shared;
    this.#lane = lane;
  }

  record(at: number, write: boolean, reason: DmaFault): void {
    const { header, lanes, counts, faults } = this.#shared;
    const lane = this.#lane;
    counts[lane * LANE_COUNTS + LANE_COUNT.faults]!++;
    const head = Atomics.load(lanes, lane * LANE_WORDS + LANE.faultHead);
    if (((head - Atomics.load(lanes, lane * LANE_WORDS + LANE.faultTail)) | 0) >= FAULT_RECORDS) {
      counts[lane * LANE_COUNTS + LANE_COUNT.lost]!++;
      return;
    }
    const field = (lane * FAULT_RECORDS + (head & (FAULT_RECORDS - 1))) * FAULT_FIELDS;
    faults[field + IOVA] = at;
    faults[field + WRITE] = write ? 1 : 0;
    faults[field + REASON] = reason;
    faults[field + SEQUENCE] = Atomics.add(header, HEADER.faultSequence, 1);
    Atomics.store(lanes, lane * LANE_WORDS + LANE.faultHead, (head + 1) | 0);
  }

  countNoBusMaster(): void {
    this.#shared.counts[this.#lane * LANE_COUNTS + LANE_COUNT.noBusMaster]!++;
  }
}

/** Reads the records: one thread only, the main thread. */
export class FaultReader {
  readonly #shared: Shared;
  readonly #lanes: number;

  /** `memory` is what SoftIommu.create() made. */
  constructor(memory: SharedArrayBuffer) {
    this.#shared = new Shared(memory);
    this.#lanes = this.#shared.header[HEADER.lanes]!;
  }

  /** Whether `drain` has anything to give. Cheap. */
  get pending(): boolean {
    for (let lane = 0; lane < this.#lanes; lane++) if (this.#isWaiting(lane)) return true;
    return false;
  }

  /**
   * Takes the records out of the queues, in the order in which they were written; at most as many as the queues hold,
   * so a device that goes on faulting does not hold up the caller. Returns how many there were.
   */
  drain(each: (record: FaultRecord) => void): number {
    for (let taken = 0; taken < this.#lanes * FAULT_RECORDS; taken++) {
      const lane = this.#oldest();
      if (lane < 0) return taken;
      const { lanes, faults } = this.#shared;
      const field = this.#next(lane);
      const record: FaultRecord = {
        lane,
        iova: iova(faults[field + IOVA]!),
        access: faults[field + WRITE] === 1 ? "write" : "read",
        reason: faults[field + REASON] as DmaFault,
      };
      Atomics.add(lanes, lane * LANE_WORDS + LANE.faultTail, 1);
      each(record);
    }
    return this.#lanes * FAULT_RECORDS;
  }

  /** Any thread; a device at work may be an access further. */
  counts(lane: number): FaultCounts {
    const { counts } = this.#shared;
    const of = (field: number): number => counts[lane * LANE_COUNTS + field]!;
    return {
      faults: of(LANE_COUNT.faults),
      lost: of(LANE_COUNT.lost),
      noBusMaster: of(LANE_COUNT.noBusMaster),
    };
  }

  /** The lane whose next record was written first; -1 without any. */
  #oldest(): number {
    const { faults } = this.#shared;
    let oldest = -1;
    let sequence = 0;
    for (let lane = 0; lane < this.#lanes; lane++) {
      if (!this.#isWaiting(lane)) continue;
      const its = faults[this.#next(lane) + SEQUENCE]!;
      // The number wraps at 2^32.
      if (oldest < 0 || ((its - sequence) | 0) < 0) {
        oldest = lane;
        sequence = its;
      }
    }
    return oldest;
  }

  #isWaiting(lane: number): boolean {
    const { lanes } = this.#shared;
    const head = Atomics.load(lanes, lane * LANE_WORDS + LANE.faultHead);
    return head !== Atomics.load(lanes, lane * LANE_WORDS + LANE.faultTail);
  }

  /** Where the lane's next record begins. */
  #next(lane: number): number {
    const tail = Atomics.load(this.#shared.lanes, lane * LANE_WORDS + LANE.faultTail);
    return (lane * FAULT_RECORDS + (tail & (FAULT_RECORDS - 1))) * FAULT_FIELDS;
  }
}
