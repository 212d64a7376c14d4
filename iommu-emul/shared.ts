// The shared memory of a software IOMMU: where everything is, and its settings. Every thread makes its own views of one
// SharedArrayBuffer. Who may write what, and when, stands with the classes that do.

import { type Hva, hva, PAGE_BYTES } from "../hypercalls/addresses.js";

/** Devices of one IOMMU domain: each has a lane. */
export const LANES_MAX = 32;
export const RANGES_MAX = 32;
/** Pieces of memory that do not follow each other. */
export const PARTS_MAX = 64;

/**
 * Memory is looked at through windows of this size, and numbered so that none holds bytes of two parts: part n begins
 * with the first page of a window. A leaf of the page table, 1 GiB at the most, lies in one window.
 */
export const WINDOW_BYTES = 2 ** 30;
export const WINDOW_PAGES = WINDOW_BYTES / PAGE_BYTES;
/** A slot of the page table has 28 bits for a memory page: 1 TiB, a part that is no whole number of GiB rounded up. */
export const WINDOWS_MAX = 2 ** 28 / WINDOW_PAGES;

/** Slots of a table of the page table, and their number's bits: 4 levels of 9 bits and 12 bits of offset are 48 bits. */
export const SLOT_BITS = 9;
export const SLOTS = 2 ** SLOT_BITS;
/** First IOVA that the page table has no place for. */
export const IOVA_END = 2 ** 48;
export const IOVA_PAGES = IOVA_END / PAGE_BYTES;
/** Most tables: 2 GiB of them. */
export const TABLES_MAX = 2 ** 20;

// 32-bit words at the front. The generation, which devices read with each access, has a cache line of its own.
export const HEADER = {
  lock: 0,
  tables: 1,
  lanes: 2,
  ranges: 3,
  parts: 4,
  /** First table of the free list, 0 for none; tables from `tablesTouched` on were never used. */
  freeTable: 5,
  tablesTouched: 6,
  tablesUsed: 7,
  entriesUsed: 8,
  faultSequence: 9,
  generation: 16,
} as const;
const HEADER_WORDS = 32;

/** 32-bit words of a lane, a cache line. */
export const LANE = {
  /** Odd while an access is under way. */
  section: 0,
  /** Threads that wait for it to end. */
  waiters: 1,
  /** FLAG bits. */
  flags: 2,
  /** Fault records written, and read, so far. */
  faultHead: 3,
  faultTail: 4,
} as const;
export const LANE_WORDS = 16;
/** quiet: it has been no bus master for so long that no access of its is under way, whatever its section says. */
export const FLAG = { busMaster: 1, flush: 2, quiet: 4 } as const;

/** Doubles of a lane that only its device writes. */
export const LANE_COUNT = { faults: 0, lost: 1, noBusMaster: 2 } as const;
export const LANE_COUNTS = 8;

/** Ranges that were unmapped lately: first and last IOVA page, as doubles, by generation. */
export const INVALIDATIONS = 64;

/** Fault records of a lane, of four doubles each. */
export const FAULT_RECORDS = 64;
export const FAULT_FIELDS = 4;

// Doubles: settings that stay as they are, but for lockedBytes.
export const SETTING = { entries: 0, lockedBytesMax: 1, lockedBytes: 2 } as const;
const SETTINGS = 8;

const AT_LANES = HEADER_WORDS * 4;
const AT_SETTINGS = AT_LANES + LANES_MAX * LANE_WORDS * 4;
const AT_RANGES = AT_SETTINGS + SETTINGS * 8;
const AT_PARTS = AT_RANGES + RANGES_MAX * 2 * 8;
const AT_COUNTS = AT_PARTS + PARTS_MAX * 2 * 8;
const AT_INVALIDATIONS = AT_COUNTS + LANES_MAX * LANE_COUNTS * 8;
const AT_FAULTS = AT_INVALIDATIONS + INVALIDATIONS * 2 * 8;
const AT_TABLE_STATES = AT_FAULTS + LANES_MAX * FAULT_RECORDS * FAULT_FIELDS * 8;

/** Bytes of the whole. Table states, a word each, come before the tables. */
const bytesFor = (tables: number): number => atTables(tables) + tables * SLOTS * 4;
const atTables = (tables: number): number => Math.ceil((AT_TABLE_STATES + tables * 4) / 4096) * 4096;

/** Memory that devices may be given, contiguous in this process; whole pages. */
export interface MemoryPart {
  readonly hva: Hva;
  readonly bytes: number;
}

/** IOVAs in bytes that can be mapped, `last` inclusive, ascending and disjoint. */
export type IovaRanges = readonly { readonly first: number; readonly last: number }[];

/** Plain data: everything that the IOMMU is told. */
export interface SoftIommuConfig {
  /** Memory that can be mapped, any order; up to 1 TiB in 64 pieces (parts that touch each other are one piece). */
  readonly memory: readonly MemoryPart[];
  /** Devices: they have the lanes 0 to lanes - 1, of at most 32. */
  readonly lanes: number;
  /** What can be mapped; DEFAULT_RANGES when left out. Below 2^48. */
  readonly ranges?: IovaRanges;
  /** Most mappings at a time, as type1's module option dma_entry_limit; 65,535 when left out, which is its default. */
  readonly entries?: number;
  /** As RLIMIT_MEMLOCK: every mapping counts with all its bytes, also where another one has the same pages. */
  readonly lockedBytesMax?: number;
  /** Page tables there are, 2 KiB each (untouched ones cost nothing); left out, a generous number. */
  readonly tables?: number;
}

/** 48 bits without the window where writes are interrupts, as the kernel says of a VT-d that translates 48 bits. */
export const DEFAULT_RANGES: IovaRanges = [
  { first: 0, last: 0xfedf_ffff },
  { first: 0xfef0_0000, last: IOVA_END - 1 },
];

/** vfio_iommu_type1's default for dma_entry_limit. */
export const DEFAULT_ENTRIES = 65535;

/** Views of the shared memory; each thread has its own, over the same bytes. */
export class Shared {
  readonly header: Int32Array;
  /** LANE_WORDS words for each lane. */
  readonly lanes: Int32Array;
  readonly settings: Float64Array;
  /** First and last byte of each range. */
  readonly ranges: Float64Array;
  /** Address and bytes of each part. */
  readonly parts: Float64Array;
  /** LANE_COUNTS doubles for each lane. */
  readonly counts: Float64Array;
  readonly invalidations: Float64Array;
  readonly faults: Float64Array;
  readonly tableStates: Int32Array;
  /** Slots of all tables, one table after the other. */
  readonly slots: Int32Array;

  constructor(memory: SharedArrayBuffer) {
    this.header = new Int32Array(memory, 0, HEADER_WORDS);
    const tables = this.header[HEADER.tables]!;
    this.lanes = new Int32Array(memory, AT_LANES, LANES_MAX * LANE_WORDS);
    this.settings = new Float64Array(memory, AT_SETTINGS, SETTINGS);
    this.ranges = new Float64Array(memory, AT_RANGES, this.header[HEADER.ranges]! * 2);
    this.parts = new Float64Array(memory, AT_PARTS, this.header[HEADER.parts]! * 2);
    this.counts = new Float64Array(memory, AT_COUNTS, LANES_MAX * LANE_COUNTS);
    this.invalidations = new Float64Array(memory, AT_INVALIDATIONS, INVALIDATIONS * 2);
    this.faults = new Float64Array(memory, AT_FAULTS, LANES_MAX * FAULT_RECORDS * FAULT_FIELDS);
    this.tableStates = new Int32Array(memory, AT_TABLE_STATES, tables);
    this.slots = new Int32Array(memory, atTables(tables), tables * SLOTS);
  }
}

/** Shared memory of a new IOMMU, with nothing mapped. RangeError: the configuration contradicts itself. */
export function createShared(config: SoftIommuConfig): SharedArrayBuffer {
  const { ranges = DEFAULT_RANGES, entries = DEFAULT_ENTRIES, lanes } = config;
  const { lockedBytesMax = Number.POSITIVE_INFINITY } = config;
  const parts = piecesOf(config.memory);
  const windows = parts.reduce((sum, { bytes }) => sum + Math.ceil(bytes / WINDOW_BYTES), 0);
  if (parts.length > PARTS_MAX || windows > WINDOWS_MAX) {
    throw new RangeError(
      `software IOMMU: ${parts.length} pieces of memory, ${windows} GiB; at most ${PARTS_MAX} and ${WINDOWS_MAX}`,
    );
  }
  if (!(lanes >= 0 && lanes <= LANES_MAX)) {
    throw new RangeError(`software IOMMU: ${lanes} devices, at most ${LANES_MAX}`);
  }
  let next = 0;
  for (const { first, last } of ranges) {
    if (first < next || last < first || last >= IOVA_END) {
      throw new RangeError(`software IOMMU: IOVA range ${first} to ${last} overlaps, or ends above 2^48`);
    }
    next = last + 1;
  }
  if (ranges.length > RANGES_MAX) {
    throw new RangeError(`software IOMMU: ${ranges.length} IOVA ranges, at most ${RANGES_MAX}`);
  }
  // A table holds 512 pages of 4 KiB: as many tables as all memory takes 16 times over, and some for scattered IOVAs.
  const generous = 2 ** 14 + (16 * windows * WINDOW_PAGES) / SLOTS;
  const tables = config.tables ?? Math.min(generous, TABLES_MAX);
  if (!(tables >= 1 && tables <= TABLES_MAX)) {
    throw new RangeError(`software IOMMU: ${tables} page tables, 1 to ${TABLES_MAX} can be`);
  }
  const memory = new SharedArrayBuffer(bytesFor(tables));
  const header = new Int32Array(memory, 0, HEADER_WORDS);
  header[HEADER.tables] = tables;
  header[HEADER.lanes] = lanes;
  header[HEADER.ranges] = ranges.length;
  header[HEADER.parts] = parts.length;
  // Table 0 is the root.
  header[HEADER.tablesTouched] = 1;
  const shared = new Shared(memory);
  shared.settings[SETTING.entries] = entries;
  shared.settings[SETTING.lockedBytesMax] = lockedBytesMax;
  shared.ranges.set(ranges.flatMap(({ first, last }) => [first, last]));
  shared.parts.set(parts.flatMap(({ hva, bytes }) => [hva, bytes]));
  return memory;
}

/** Parts by address, those that touch each other as one. */
function piecesOf(memory: readonly MemoryPart[]): MemoryPart[] {
  const pieces: MemoryPart[] = [];
  for (const part of [...memory].sort((a, b) => a.hva - b.hva)) {
    if (part.hva % PAGE_BYTES || part.bytes % PAGE_BYTES || part.bytes <= 0 || part.hva < 0) {
      throw new RangeError(`software IOMMU: memory at ${part.hva}, ${part.bytes} bytes, is not whole pages`);
    }
    const before = pieces.at(-1);
    const end = before === undefined ? 0 : before.hva + before.bytes;
    if (before !== undefined && part.hva < end) {
      throw new RangeError(`software IOMMU: memory at ${part.hva} overlaps`);
    }
    if (before !== undefined && part.hva === end) {
      pieces[pieces.length - 1] = { hva: before.hva, bytes: before.bytes + part.bytes };
    } else pieces.push(part);
  }
  return pieces;
}

/** The windows of the memory by number: where each begins in this process, and its bytes. */
export function windowsOf(shared: Shared): MemoryPart[] {
  const windows: MemoryPart[] = [];
  for (let part = 0; part < shared.parts.length; part += 2) {
    const bytes = shared.parts[part + 1]!;
    for (let at = 0; at < bytes; at += WINDOW_BYTES) {
      windows.push({ hva: hva(shared.parts[part]! + at), bytes: Math.min(WINDOW_BYTES, bytes - at) });
    }
  }
  return windows;
}
