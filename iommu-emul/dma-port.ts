// A device's accesses to guest memory through the software IOMMU. One per device, on its thread; no call allocates but
// for what Buffer.copy does. How accesses and unmaps meet is in lanes.ts.

import { MAP_FLAG } from "../hypercalls/abi.js";
import { type Hva, PAGE_BYTES } from "../hypercalls/addresses.js";
import { DMA_FAULT, type DmaFault, type DmaPort, type FileNatives, REFUSED } from "./device.js";
import { FaultWriter } from "./faults.js";
import { Iotlb } from "./iotlb.js";
import { OwnLane } from "./lanes.js";
import { PageTable, WORD_SHIFT } from "./page-table.js";
import { FLAG, HEADER, IOVA_END, Shared, WINDOW_BYTES, windowsOf } from "./shared.js";

/** Up to here a copy is quicker done here than asked for. */
const SMALL_BYTES = 64;
/** Pieces that one system call takes: UIO_MAXIOV. */
const VECTORS_MAX = 1024;
/** struct iovec in 32-bit words: address and bytes, 64 bits each. */
const VECTOR_WORDS = 4;

/**
 * The device's port. Permissions are taken at their word: reading needs a mapping for reading, writing one for writing.
 * (VT-d under Linux lets reads of write-only mappings through; real devices must not rely on that, ours cannot.)
 *
 * Pieces of up to 64 bytes whose address and length are multiples of 4 are moved in 32-bit words, lowest address first:
 * memory never shows half of such a word, and shows none before those below it, as a driver expects that polls a
 * completion queue. Of larger pieces no order is promised.
 *
 * Without bus mastering every access is refused, before anything else is looked at; it is counted, and not recorded: a
 * real device would put nothing on the bus, so no IOMMU would see it.
 */
export class SoftDmaPort implements DmaPort {
  readonly tlb: Iotlb;
  readonly #lane: OwnLane;
  readonly #table: PageTable;
  readonly #faults: FaultWriter;
  readonly #windows: Buffer[];
  /** The same memory in words. */
  readonly #words: Int32Array[];
  /** Where the windows are, for system calls. */
  readonly #hvas: Float64Array;
  /** struct iovec[], in an ArrayBuffer of its own, which does not move. */
  readonly #vectors = new Uint32Array(new ArrayBuffer(VECTORS_MAX * VECTOR_WORDS * 4));
  /** 0: there is none to give away. */
  readonly #vectorsAddress: number;
  #vectorCount = 0;
  /** Where the last of them ends; -1: there is none. */
  #vectorEnd = -1;
  /** Of the access under way that was refused: its first byte that was. */
  #refusedAt = 0;

  /**
   * `memory` is what SoftIommu.create() made, `lane` the device's. `window` gives a Buffer over up to 1 GiB of this
   * process's memory (vmm/native: memoryWindow); it is asked now, once for each GiB. One port per lane at a time.
   * Without `addressOf` nothing is moved in place.
   */
  constructor(
    memory: SharedArrayBuffer,
    lane: number,
    window: (hva: Hva, bytes: number) => Buffer,
    addressOf?: FileNatives["addressOf"],
  ) {
    const shared = new Shared(memory);
    if (!(lane >= 0 && lane < shared.header[HEADER.lanes]!)) {
      throw new RangeError(`software IOMMU: no lane ${lane}`);
    }
    this.tlb = new Iotlb(shared);
    this.#lane = new OwnLane(shared, lane);
    this.#table = new PageTable(shared);
    this.#faults = new FaultWriter(shared, lane);
    const windows = windowsOf(shared);
    this.#windows = windows.map(({ hva, bytes }) => window(hva, bytes));
    this.#hvas = Float64Array.from(windows, ({ hva }) => hva);
    this.#vectorsAddress = addressOf?.(this.#vectors) ?? 0;
    this.#words = this.#windows.map(
      (bytes) => new Int32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4),
    );
  }

  read(iova: number, into: Buffer, at: number, bytes: number): DmaFault {
    return this.#access(iova, into, at, bytes, MAP_FLAG.read);
  }

  write(iova: number, from: Buffer, at: number, bytes: number): DmaFault {
    return this.#access(iova, from, at, bytes, MAP_FLAG.write);
  }

  writeInPlace(
    iovas: Float64Array,
    lengths: Int32Array,
    segments: number,
    move: (vectors: number, count: number) => number,
  ): number {
    if (this.#vectorsAddress === 0) return REFUSED;
    const lane = this.#lane;
    lane.enter();
    try {
      if (!this.#begin()) return REFUSED;
      this.#vectorCount = 0;
      this.#vectorEnd = -1;
      for (let i = 0; i < segments; i++) {
        const fault = this.#pieces(iovas[i]!, undefined, 0, lengths[i]!, MAP_FLAG.write);
        if (fault !== DMA_FAULT.none || this.#vectorCount > VECTORS_MAX) return REFUSED;
      }
      return move(this.#vectorsAddress, this.#vectorCount);
    } finally {
      lane.leave();
    }
  }

  #access(iova: number, buffer: Buffer, at: number, bytes: number, access: number): DmaFault {
    // The device's own numbers, not the guest's: a mistake here is the device model's.
    if (!(bytes >= 0 && at >= 0 && at + bytes <= buffer.length)) {
      throw new RangeError(`DMA of ${bytes} bytes at ${at} of a buffer of ${buffer.length}`);
    }
    if (bytes === 0) return DMA_FAULT.none;
    const lane = this.#lane;
    let fault: DmaFault = DMA_FAULT.noBusMaster;
    lane.enter();
    try {
      if (this.#begin()) fault = this.#pieces(iova, buffer, at, bytes, access);
    } finally {
      lane.leave();
    }
    if (fault === DMA_FAULT.noBusMaster) this.#faults.countNoBusMaster();
    else if (fault !== DMA_FAULT.none) {
      this.#faults.record(this.#refusedAt, access === MAP_FLAG.write, fault);
    }
    return fault;
  }

  /** D2, after enter(): false without bus mastering, else the IOTLB holds nothing that was unmapped. */
  #begin(): boolean {
    const flags = this.#lane.takeFlags();
    if ((flags & FLAG.flush) !== 0) this.tlb.flush();
    if ((flags & FLAG.busMaster) === 0) return false;
    this.tlb.catchUp();
    return true;
  }

  /** Translates; copies what is contiguous in memory as one piece, or without a buffer notes where it is. */
  #pieces(iova: number, buffer: Buffer | undefined, at: number, bytes: number, access: number): DmaFault {
    const { tlb } = this;
    let fault: DmaFault = DMA_FAULT.none;
    let pieceAt = 0;
    let pieceBytes = 0;
    let done = 0;
    while (done < bytes) {
      const position = iova + done;
      if (!(position >= 0 && position < IOVA_END)) {
        fault = DMA_FAULT.range;
        this.#refusedAt = position;
        break;
      }
      const page = Math.floor(position / PAGE_BYTES);
      let word = tlb.lookup(page);
      let reach = tlb.reach;
      if (word === 0) {
        word = this.#table.walk(page);
        reach = this.#table.reach;
        if (word !== 0) tlb.enter(page, word, reach);
      }
      if ((word & access) === 0) {
        fault = word === 0 ? DMA_FAULT.notMapped : DMA_FAULT.access;
        this.#refusedAt = position;
        break;
      }
      const offset = position - page * PAGE_BYTES;
      const memoryAt = (word >>> WORD_SHIFT) * PAGE_BYTES + offset;
      const length = Math.min(bytes - done, reach * PAGE_BYTES - offset);
      // What follows in memory joins the piece, but for a new window, whose number is that of another part, perhaps.
      if (memoryAt !== pieceAt + pieceBytes || memoryAt % WINDOW_BYTES === 0) {
        this.#copy(pieceAt, buffer, at + done - pieceBytes, pieceBytes, access);
        pieceAt = memoryAt;
        pieceBytes = 0;
      }
      pieceBytes += length;
      done += length;
    }
    this.#copy(pieceAt, buffer, at + done - pieceBytes, pieceBytes, access);
    return fault;
  }

  /** One piece, in one window. */
  #copy(memoryAt: number, buffer: Buffer | undefined, at: number, bytes: number, access: number): void {
    const index = Math.floor(memoryAt / WINDOW_BYTES);
    const offset = memoryAt - index * WINDOW_BYTES;
    if (buffer === undefined) this.#addVector(this.#hvas[index]! + offset, bytes);
    else if (bytes > SMALL_BYTES) {
      const window = this.#windows[index]!;
      if (access === MAP_FLAG.write) buffer.copy(window, offset, at, at + bytes);
      else window.copy(buffer, at, offset, offset + bytes);
    } else if (((offset | bytes) & 3) === 0) this.#copyWords(index, offset >> 2, buffer, at, bytes, access);
    else this.#copyBytes(this.#windows[index]!, offset, buffer, at, bytes, access);
  }

  /** Too many are counted, and not noted. */
  #addVector(address: number, bytes: number): void {
    if (bytes === 0) return;
    const vectors = this.#vectors;
    if (address === this.#vectorEnd) vectors[this.#vectorCount * VECTOR_WORDS - 2]! += bytes;
    else if (++this.#vectorCount <= VECTORS_MAX) {
      const at = (this.#vectorCount - 1) * VECTOR_WORDS;
      vectors[at] = address % 2 ** 32;
      vectors[at + 1] = address / 2 ** 32;
      vectors[at + 2] = bytes;
    }
    this.#vectorEnd = address + bytes;
  }

  #copyWords(index: number, first: number, buffer: Buffer, at: number, bytes: number, access: number): void {
    const words = this.#words[index]!;
    for (let i = 0; i < bytes; i += 4) {
      const byte = at + i;
      if (access === MAP_FLAG.write) {
        words[first + (i >> 2)] =
          buffer[byte]! | (buffer[byte + 1]! << 8) | (buffer[byte + 2]! << 16) | (buffer[byte + 3]! << 24);
      } else {
        const word = words[first + (i >> 2)]!;
        buffer[byte] = word;
        buffer[byte + 1] = word >> 8;
        buffer[byte + 2] = word >> 16;
        buffer[byte + 3] = word >> 24;
      }
    }
  }

  #copyBytes(
    window: Buffer,
    offset: number,
    buffer: Buffer,
    at: number,
    bytes: number,
    access: number,
  ): void {
    if (access === MAP_FLAG.write) for (let i = 0; i < bytes; i++) window[offset + i] = buffer[at + i]!;
    else for (let i = 0; i < bytes; i++) buffer[at + i] = window[offset + i]!;
  }
}
