// Workers of the software IOMMU's stress test: threads that map, unmap and map elsewhere, and threads that do DMA to the
// same IOVAs meanwhile. Both know what an access may find, and throw when it is something else.
//
// A slot is 16 IOVA pages; a mapping takes some of them, from the first on, and lies somewhere in a chunk of 16 pages of
// memory. Before a chunk is mapped all its words become a stamp: slot and the mapping's number. After unmap has
// returned all become POISON. Devices write words with the slot's number. So:
// - a device that reads POISON, or a stamp older than the mapping that was there when it began, used a stale mapping;
// - a word of a chunk that is no longer POISON when it is used again was written after unmap had returned;
// - a stamp that another mapping wrote, or words for another slot, went astray.

import { parentPort, workerData } from "node:worker_threads";
import { hva, iova } from "../../../hypercalls/addresses.js";
import { DMA_FAULT } from "../../../iommu-emul/device.js";
import { SoftDmaPort } from "../../../iommu-emul/dma-port.js";
import { SoftIommu } from "../../../iommu-emul/iommu.js";
import { Random } from "./random.js";

const PAGE = 4096;
export const CHUNK_PAGES = 16;
export const CHUNK_BYTES = CHUNK_PAGES * PAGE;
const CHUNK_WORDS = CHUNK_BYTES / 4;
export const SLOTS_PER_MAPPER = 3;
/** More than slots, so that some lie poisoned for a while. */
export const CHUNKS_PER_MAPPER = 6;
/** IOVA of slot 0; they follow each other. */
export const SLOTS_AT = 2 ** 30;
/** A page per device that is always mapped, at these IOVAs; it writes there all the time. */
export const OWN_PAGES_AT = 2 ** 29;

export const POISON = 0x0dead000;
/** A word that a device wrote; the low bits are the slot. */
const FROM_DEVICE = 0x40000000;
/** Stamps are negative: sign, 24 bits of number, 7 bits of slot. */
const SLOT_BITS = 7;
const stampOf = (slot: number, number: number): number =>
  0x80000000 | ((number & 0xffffff) << SLOT_BITS) | slot | 0;
const slotOf = (word: number): number => word & (2 ** SLOT_BITS - 1);
const numberOf = (word: number): number => (word >>> SLOT_BITS) & 0xffffff;

/** Words of `control`. */
export const CONTROL = { mappersLeft: 0, accesses: 1, faults: 2, hits: 3, stop: 4 } as const;

export interface StressJob {
  readonly kind: "mapper" | "device";
  /** Its number, from 0, among its kind. */
  readonly index: number;
  readonly iommu: SharedArrayBuffer;
  /** The memory that the IOMMU was given, from hva 0 on. */
  readonly memory: SharedArrayBuffer;
  /** By slot: the number of the mapping that was last made there. */
  readonly current: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly mappers: number;
  /** Of a mapper. */
  readonly rounds: number;
  readonly seed: number;
}

class Mapper {
  readonly #job: StressJob;
  readonly #iommu: SoftIommu;
  readonly #words: Int32Array;
  readonly #current: Int32Array;
  readonly #random: Random;
  /** Chunks that are not mapped; all are poisoned. */
  readonly #free: number[] = [];
  /** By slot of this mapper: chunk and pages that are mapped there. */
  readonly #mapped: ({ chunk: number; pages: number } | undefined)[] = new Array(SLOTS_PER_MAPPER);
  #number = 0;

  constructor(job: StressJob) {
    this.#job = job;
    this.#iommu = new SoftIommu(job.iommu);
    this.#words = new Int32Array(job.memory);
    this.#current = new Int32Array(job.current);
    this.#random = new Random(job.seed);
    for (let i = 0; i < CHUNKS_PER_MAPPER; i++) {
      this.#free.push(job.index * CHUNKS_PER_MAPPER + i);
      this.#chunk(this.#free[i]!).fill(POISON);
    }
  }

  run(): void {
    for (let round = 0; round < this.#job.rounds; round++) {
      const index = this.#random.below(SLOTS_PER_MAPPER);
      if (this.#mapped[index] === undefined) this.#map(index);
      else this.#unmap(index);
    }
    for (let index = 0; index < SLOTS_PER_MAPPER; index++) if (this.#mapped[index]) this.#unmap(index);
    for (const chunk of this.#free) this.#assertPoisoned(chunk);
  }

  #map(index: number): void {
    const slot = this.#slot(index);
    const [chunk] = this.#free.splice(this.#random.below(this.#free.length), 1);
    this.#assertPoisoned(chunk!);
    const number = ++this.#number;
    this.#chunk(chunk!).fill(stampOf(slot, number));
    const pages = 1 + this.#random.below(CHUNK_PAGES);
    const errno = this.#iommu.map(this.#iova(slot), hva(chunk! * CHUNK_BYTES), pages * PAGE, 3);
    if (errno !== 0) throw new Error(`map of slot ${slot}: errno ${errno}`);
    this.#mapped[index] = { chunk: chunk!, pages };
    Atomics.store(this.#current, slot, number);
  }

  #unmap(index: number): void {
    const slot = this.#slot(index);
    const { chunk, pages } = this.#mapped[index]!;
    this.#mapped[index] = undefined;
    const bytes = this.#iommu.unmap(this.#iova(slot), CHUNK_BYTES);
    if (bytes !== pages * PAGE) throw new Error(`unmap of slot ${slot}: ${bytes}, not ${pages} pages`);
    const words = this.#chunk(chunk);
    const stamp = stampOf(slot, this.#number);
    for (let at = 0; at < CHUNK_WORDS; at++) {
      const word = words[at]!;
      const fine =
        word < 0 ? slotOf(word) === slot : word === (FROM_DEVICE | slot) && at < (pages * PAGE) / 4;
      if (!fine) throw new Error(`slot ${slot}, mapped with ${stamp}: found ${word} at ${at}`);
    }
    words.fill(POISON);
    this.#free.push(chunk);
  }

  #assertPoisoned(chunk: number): void {
    const words = this.#chunk(chunk);
    for (let at = 0; at < CHUNK_WORDS; at++) {
      if (words[at] !== POISON)
        throw new Error(`written after unmap: chunk ${chunk}, word ${at}: ${words[at]}`);
    }
  }

  #chunk(chunk: number): Int32Array {
    return this.#words.subarray(chunk * CHUNK_WORDS, (chunk + 1) * CHUNK_WORDS);
  }

  #slot(index: number): number {
    return this.#job.index * SLOTS_PER_MAPPER + index;
  }

  #iova(slot: number) {
    return iova(SLOTS_AT + slot * CHUNK_BYTES);
  }
}

function runDevice(job: StressJob): void {
  const { memory } = job;
  let vectors: Uint32Array = new Uint32Array();
  const port = new SoftDmaPort(
    job.iommu,
    job.index,
    (at, bytes) => Buffer.from(memory, at, bytes),
    (view) => {
      vectors = new Uint32Array(view.buffer, view.byteOffset, view.byteLength / 4);
      return 1;
    },
  );
  /** What a system call would do. */
  const move = (_vectors: number, count: number): number => {
    let from = 0;
    for (let i = 0; i < count; i++) {
      const bytes = vectors[i * 4 + 2]!;
      buffer.copy(Buffer.from(memory, vectors[i * 4]!, bytes), 0, from, from + bytes);
      from += bytes;
    }
    if (from !== moving) throw new Error(`${from} bytes in ${count} pieces, not ${moving}`);
    return DMA_FAULT.none;
  };
  let moving = 0;
  const writeInPlace = (at: number, bytes: number) => {
    moving = bytes;
    return port.writeInPlace(Float64Array.of(at), Int32Array.of(bytes), 1, move);
  };
  const control = new Int32Array(job.control);
  const current = new Int32Array(job.current);
  const random = new Random(job.seed);
  const words = new Int32Array(CHUNK_WORDS);
  const buffer = Buffer.from(words.buffer);
  const slots = job.mappers * SLOTS_PER_MAPPER;
  let done = 0;
  let faults = 0;
  while (Atomics.load(control, CONTROL.mappersLeft) > 0 && Atomics.load(control, CONTROL.stop) === 0) {
    words.fill(FROM_DEVICE, 0, PAGE / 4);
    port.write(OWN_PAGES_AT + job.index * PAGE, buffer, 0, PAGE);

    const slot = random.below(slots);
    const at = SLOTS_AT + slot * CHUNK_BYTES;
    const write = random.oneIn(2);
    const before = Atomics.load(current, slot);
    // Short ones find out whether a page is mapped, long ones are under way for long.
    const bytes = 4 * (1 + random.below(random.oneIn(2) ? 16 : CHUNK_WORDS));
    words.fill(FROM_DEVICE | slot, 0, bytes / 4);
    let fault: number;
    if (!write) fault = port.read(at, buffer, 0, bytes);
    else fault = random.oneIn(2) ? port.write(at, buffer, 0, bytes) : writeInPlace(at, bytes);
    if (fault === DMA_FAULT.none) done++;
    else faults++;
    if (write) continue;
    let stamp = 0;
    for (let word = 0; word < bytes / 4; word++) {
      const found = words[word]!;
      if (found === (FROM_DEVICE | slot)) continue;
      const stale = found < 0 && ((numberOf(found) - before) & 0xffffff) >= 0x800000;
      const mixed = found < 0 && stamp !== 0 && stamp !== found;
      if (found < 0 && slotOf(found) === slot && !stale && !mixed) stamp = found;
      else throw new Error(`stale mapping: slot ${slot} at ${before}, word ${word}: ${found} after ${stamp}`);
    }
  }
  Atomics.add(control, CONTROL.accesses, done);
  Atomics.add(control, CONTROL.faults, faults);
  Atomics.add(control, CONTROL.hits, port.tlb.hits);
}

if (parentPort !== null) {
  const job = workerData as StressJob;
  const control = new Int32Array(job.control);
  try {
    if (job.kind === "device") runDevice(job);
    else new Mapper(job).run();
  } catch (error) {
    Atomics.store(control, CONTROL.stop, 1);
    throw error;
  } finally {
    if (job.kind === "mapper") Atomics.sub(control, CONTROL.mappersLeft, 1);
  }
}
