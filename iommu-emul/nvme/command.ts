// A command under way: its 16 words, where its data goes in guest memory, and a buffer to hold the data. They are made
// once and used again. Segment addresses are IOVAs as the guest wrote them.

import type { SubmissionQueue } from "./queues.js";
import { COMMANDS_MAX, SGL_DESCRIPTORS_MAX, TRANSFER_BYTES_MAX, u64 } from "./spec.js";

/** Memory for a command's data. `address` is what FileNatives.addressOf said of it, 0 without one. */
export interface DataBuffer {
  readonly bytes: Buffer;
  readonly address: number;
}

/** Instead of a status: the command ends later. */
export const PENDING = -1;

export class Command {
  /** The submission queue entry (4.2), copied out of guest memory once. */
  readonly words = new Uint32Array(16);
  readonly segmentIova = new Float64Array(SGL_DESCRIPTORS_MAX);
  readonly segmentBytes = new Int32Array(SGL_DESCRIPTORS_MAX);
  segments = 0;
  /** The queue it came from; undefined while the command is free. */
  queue: SubmissionQueue | undefined;
  /** A file operation for it is under way. */
  waiting = false;
  /** It was completed by an abort; what its file operation comes to is of no interest. */
  aborted = false;
  /** For the functions that do the work: the file range it is about. */
  fileOffset = 0;
  bytes = 0;
  /** Word 0 of its completion. */
  result = 0;
  readonly #makeBuffer: () => DataBuffer;
  #data: DataBuffer | undefined;

  constructor(makeBuffer: () => DataBuffer) {
    this.#makeBuffer = makeBuffer;
  }

  get opcode(): number {
    return this.words[0]! & 0xff;
  }
  get id(): number {
    return this.words[0]! >>> 16;
  }
  get namespace(): number {
    return this.words[1]!;
  }
  /** Words 10 and 11 as the first block of an I/O command. */
  get firstBlock(): number {
    return u64(this.words[10]!, this.words[11]!);
  }

  /** TRANSFER_BYTES_MAX bytes, made when first wanted: a queue that is never deep costs one. */
  get data(): DataBuffer {
    this.#data ??= this.#makeBuffer();
    return this.#data;
  }

  /** Appends a piece of guest memory, to the last segment where it goes on from there. False when there are too many. */
  addSegment(iova: number, bytes: number): boolean {
    const last = this.segments - 1;
    if (last >= 0 && this.segmentIova[last]! + this.segmentBytes[last]! === iova) {
      this.segmentBytes[last]! += bytes;
      return true;
    }
    if (this.segments === SGL_DESCRIPTORS_MAX) return false;
    this.segmentIova[this.segments] = iova;
    this.segmentBytes[this.segments] = bytes;
    this.segments++;
    return true;
  }
}

/** All commands there are: when none is free, nothing more is fetched. The last one given back goes out first. */
export class CommandPool {
  readonly all: readonly Command[];
  readonly #free: Command[];

  constructor(addressOf?: (buffer: Buffer) => number) {
    const makeBuffer = (): DataBuffer => {
      const bytes = Buffer.allocUnsafeSlow(TRANSFER_BYTES_MAX);
      return { bytes, address: addressOf?.(bytes) ?? 0 };
    };
    this.all = Array.from({ length: COMMANDS_MAX }, () => new Command(makeBuffer));
    this.#free = [...this.all];
  }

  get free(): number {
    return this.#free.length;
  }

  /** Only when one is free. */
  take(queue: SubmissionQueue): Command {
    const command = this.#free.pop()!;
    command.queue = queue;
    command.waiting = false;
    command.aborted = false;
    command.segments = 0;
    command.bytes = 0;
    command.result = 0;
    return command;
  }

  give(command: Command): void {
    command.queue = undefined;
    command.waiting = false;
    this.#free.push(command);
  }
}
