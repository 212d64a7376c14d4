// Submission and completion queues in guest memory (4.1): where they are, how far each side has come. Indexes count
// entries. Nothing here interprets a command.

import type { DmaPort } from "../device.js";
import type { Command } from "./command.js";
import { CQE_BYTES } from "./spec.js";

/**
 * Completions that are written to guest memory in one piece, at most: 64 bytes, up to which the port writes words in
 * ascending order, so that an entry's phase tag, which is in its last word, is seen after the rest of it.
 */
const BATCH = 4;

export class CompletionQueue {
  readonly id: number;
  readonly entries: number;
  readonly vector: number;
  readonly interrupts: boolean;
  /** Entries that commands under way will need: one is fetched only when its completion has a place. */
  reserved = 0;
  /** Submission queues that complete here. */
  users = 0;
  /** Its head is taken from the shadow doorbell, whose value when last looked at and the event index follow. */
  shadowed = false;
  shadowSeen = 0;
  eventIndex = -1;
  readonly #iova: number;
  readonly #batch = Buffer.alloc(BATCH * CQE_BYTES);
  readonly #words = new Uint32Array(this.#batch.buffer, this.#batch.byteOffset, (BATCH * CQE_BYTES) / 4);
  #head = 0;
  #tail = 0;
  #phase = 1;
  #batched = 0;

  constructor(id: number, iova: number, entries: number, vector: number, interrupts: boolean) {
    this.id = id;
    this.#iova = iova;
    this.entries = entries;
    this.vector = vector;
    this.interrupts = interrupts;
  }

  get head(): number {
    return this.#head;
  }

  /** Entries that are neither taken nor promised. A queue is full with one entry free (4.1.1). */
  get room(): number {
    return this.entries - 1 - this.#used - this.reserved;
  }

  get #used(): number {
    const used = this.#tail - this.#head;
    return used < 0 ? used + this.entries : used;
  }

  /** The guest has taken entries: its head doorbell. False when that cannot be. */
  moveHead(head: number): boolean {
    if (head >= this.entries) return false;
    const taken = head - this.#head;
    if ((taken < 0 ? taken + this.entries : taken) > this.#used) return false;
    this.#head = head;
    return true;
  }

  /**
   * Adds a completion (4.6), only where `room` or a reservation says that there is a place. It is in guest memory after
   * flush(). False when an earlier one could not be written.
   */
  post(dma: DmaPort, result: number, queue: SubmissionQueue, id: number, status: number): boolean {
    if (this.#batched === BATCH && !this.#write(dma)) return false;
    const at = this.#batched * 4;
    this.#words[at] = result;
    this.#words[at + 1] = 0;
    this.#words[at + 2] = queue.head | (queue.id << 16);
    this.#words[at + 3] = id | (this.#phase << 16) | (status << 17);
    this.#batched++;
    this.#tail++;
    if (this.#tail < this.entries) return true;
    const written = this.#write(dma);
    this.#tail = 0;
    this.#phase ^= 1;
    return written;
  }

  /** Something waits for flush(), or was written by post() since the last. */
  get dirty(): boolean {
    return this.#batched > 0 || this.#unsignalled;
  }
  #unsignalled = false;

  /** Writes what was posted. False when guest memory refused it. The caller signals the vector. */
  flush(dma: DmaPort): boolean {
    const written = this.#batched === 0 || this.#write(dma);
    this.#unsignalled = false;
    return written;
  }

  /** The entries before the tail. */
  #write(dma: DmaPort): boolean {
    const bytes = this.#batched * CQE_BYTES;
    const first = this.#tail - this.#batched;
    this.#batched = 0;
    this.#unsignalled = true;
    return dma.write(this.#iova + first * CQE_BYTES, this.#batch, 0, bytes) === 0;
  }
}

export class SubmissionQueue {
  readonly id: number;
  readonly iova: number;
  readonly entries: number;
  readonly completions: CompletionQueue;
  /** The next entry to fetch. */
  head = 0;
  tail = 0;
  /** Commands fetched and not completed. */
  underWay = 0;
  /** The Delete I/O Submission Queue command that waits for those. */
  deletion: Command | undefined;
  /** Commands to fetch at a time: fewer where they move much. */
  burst = 1;
  /** Its tail is taken from the shadow doorbell, and the register only says that there is something new. */
  shadowed = false;
  shadowSeen = 0;
  eventIndex = -1;

  constructor(id: number, iova: number, entries: number, completions: CompletionQueue) {
    this.id = id;
    this.iova = iova;
    this.entries = entries;
    this.completions = completions;
  }

  get waiting(): number {
    const waiting = this.tail - this.head;
    return waiting < 0 ? waiting + this.entries : waiting;
  }

  /** The guest has added entries: its tail doorbell. False when that cannot be. */
  moveTail(tail: number): boolean {
    if (tail >= this.entries) return false;
    const added = tail - this.tail;
    if ((added < 0 ? added + this.entries : added) + this.waiting >= this.entries) return false;
    this.tail = tail;
    return true;
  }
}
