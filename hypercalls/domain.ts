// The kinds of IOMMU domain, behind one interface. Translated: every mapping has an IOVA range of its own. Identity:
// IOVA = gpa, of all RAM here, of what is used in cached.ts. They call the backend and keep the books; whoever calls them
// holds the domain's lock and has checked the guest's words. The lock is held across the backend's call as well: type1 holds one mutex per container
// across pinning and mapping anyway, so the kernel would do one at a time whatever we did, and books and mappings
// change together.
//
// A mapping that the backend would not unmap is stuck: it stays in the books with its pins, its IOVA is not handed
// out again, it is counted, and the caller learns of it. Unmapping it once more tries again, and so does reclaim.

import { LIMITS, MAP_FLAG, STATUS } from "./abi.js";
import { type Gpa, gpa, iova, PAGE_BYTES } from "./addresses.js";
import type { BackendLimits, DmaBackend } from "./backend.js";
import { type GuestRam, RunList } from "./guest-ram.js";
import { IovaAllocator } from "./iova.js";
import type { Pins } from "./pins.js";
import {
  ERRNO,
  INVALID_EINVAL,
  INVALID_PLACE,
  INVALID_STALE,
  LIMIT_ENTRIES,
  LIMIT_QUOTA,
  LIMIT_STUCK,
  OK,
  status,
  statusOfHostErrno,
} from "./status.js";

/** No room for the range below the device's limit. */
const LIMIT_IOVA = status(STATUS.limit, ERRNO.ERANGE);
/** Nothing is mapped in an identity domain before mapAll. */
const RETRY_NOT_YET = status(STATUS.retry, ERRNO.EAGAIN);

/** What of a map's flags a backend is told. */
export const ACCESS = MAP_FLAG.read | MAP_FLAG.write;

/** RAM that an identity domain could not map; `errno` is positive. */
export interface MapAllFailure {
  readonly gpa: Gpa;
  readonly bytes: number;
  readonly errno: number;
}

/** What a policy does to mappings. A new policy is a new implementation, or a variant of one of the two here. */
export interface Domain {
  /**
   * Makes the runs reachable for the device as one IOVA range, no page above `lastPage`; `flags` are MAP_FLAG bits.
   * Returns a status. With ok, `runs.iovaPage` is the first page of the range; otherwise nothing is mapped for it (but for
   * what the backend will not undo: stuck) and `runs.failedRun` is the first run that could not be done.
   */
  map(handle: number, runs: RunList, lastPage: number, flags: number): number;

  /** Takes back the mapping of `pages` pages that begins at IOVA page `page`. Returns a status. */
  unmap(handle: number, page: number, pages: number): number;

  /**
   * Takes back every mapping of a device, and leaves in `releasedMappings` and `releasedPages` what that was. Returns
   * a status: a limit when some of it is stuck. O(mappings of the domain).
   */
  release(handle: number): number;
  readonly releasedMappings: number;
  readonly releasedPages: number;

  /** Whether reclaim has anything to try. Needs no lock. */
  readonly reclaimable: boolean;

  /**
   * Gives back some of what no driver has mapped any more; returns the mappings that went. There may be more as long as
   * it is any: `again` goes on with what the last call began.
   */
  reclaim(again: boolean): number;

  /** Pages mapped for a device, or for all with handle 0; stuck ones count. */
  mappedPages(handle: number): number;

  /** Backend entries in use. */
  readonly entriesUsed: number;
  /** Mappings that are stuck. */
  readonly stuck: number;
}

// Shared memory of a translated domain: a header, pages mapped per device, the runs, a record per IOVA node, and the
// allocator. Both kinds begin with a header, whose first word is the domain's lock.
export const LOCK_WORD = 0;
const RUNS_TOUCHED = 1;
const RUN_HEAD = 2;
const RUNS_USED = 3;
const STUCK = 4;
const HEADER_WORDS = 8;
/** By handle, from 1; 0 is the sum. (An even number, to keep what follows on 16 bytes.) */
const DEVICE_SLOTS = LIMITS.devices + 2;

// A run: one backend entry. Run 0 is none.
const RUN_RAM_PAGE = 0;
const RUN_PAGES = 1;
const RUN_NEXT = 2;
const RUN_SHIFT = 2;

// A mapping, beside the IOVA node that holds its range.
const MAPPING_HANDLE = 0;
/** Its first run; or, of a mapping that is one run, ~ of the run's first RAM page, and no run is taken for it. */
const MAPPING_RUNS = 1;
/** Pages that the backend has not unmapped yet: all of them, fewer when it is stuck half way. */
const MAPPING_REACHABLE = 2;
const MAPPING_STUCK = 3;
const MAPPING_SHIFT = 2;

/** More entries than this are not used, whatever the backend allows: 2^20 take some 100 MiB of tables, if touched. */
const ENTRIES_MAX = 2 ** 20;

/**
 * Most pages a translated domain maps at a time: sixteen times RAM, and a largest mapping more. Drivers map a page a
 * few times over; a guest that maps the same pages for ever would fill the host with IOMMU tables, 2 MiB of them for
 * each GiB, whatever the quota on distinct pinned pages is.
 */
const mappedPagesMax = (ramPages: number): number => 16 * ramPages + LIMITS.mapPages;

/** Memory offsets of a translated domain, in bytes. */
function layout(limits: BackendLimits) {
  const ranges = limits.ranges.length;
  const entries = Math.min(limits.entries, ENTRIES_MAX);
  const devices = HEADER_WORDS * 4;
  const runs = devices + DEVICE_SLOTS * 8;
  const mappings = runs + ((entries + 1) << RUN_SHIFT) * 4;
  const allocator = mappings + (IovaAllocator.nodes(entries, ranges) << MAPPING_SHIFT) * 4;
  return {
    entries,
    devices,
    runs,
    mappings,
    allocator,
    bytes: allocator + IovaAllocator.words(entries, ranges) * 4,
  };
}

/**
 * Policies strict and lazy. Mappings live and die
 * independently of each other, whatever pages they share. One mapping is one range and one unmap, and takes one
 * entry per contiguous run of memory.
 */
export class TranslatedDomain implements Domain {
  releasedMappings = 0;
  releasedPages = 0;

  readonly #ram: GuestRam;
  readonly #pins: Pins;
  /** By handle; of this domain's devices. */
  readonly #devicePins: readonly Pins[];
  readonly #backend: DmaBackend;
  readonly #entries: number;
  readonly #header: Int32Array;
  readonly #devicePages: Float64Array;
  readonly #runs: Int32Array;
  readonly #mappings: Int32Array;
  readonly #allocator: IovaAllocator;

  /** Shared memory for a new domain, with nothing mapped. */
  static create(limits: BackendLimits): SharedArrayBuffer {
    const memory = new SharedArrayBuffer(layout(limits).bytes);
    allocatorOf(memory, limits).init(limits.ranges);
    return memory;
  }

  /** This thread's view of the domain in `memory`. */
  constructor(
    memory: SharedArrayBuffer,
    limits: BackendLimits,
    ram: GuestRam,
    pins: Pins,
    devicePins: readonly Pins[],
    backend: DmaBackend,
  ) {
    const at = layout(limits);
    this.#ram = ram;
    this.#pins = pins;
    this.#devicePins = devicePins;
    this.#backend = backend;
    this.#entries = at.entries;
    this.#header = new Int32Array(memory, 0, HEADER_WORDS);
    this.#devicePages = new Float64Array(memory, at.devices, DEVICE_SLOTS);
    this.#runs = new Int32Array(memory, at.runs, (at.mappings - at.runs) / 4);
    this.#mappings = new Int32Array(memory, at.mappings, (at.allocator - at.mappings) / 4);
    this.#allocator = allocatorOf(memory, limits);
  }

  get entriesUsed(): number {
    return Atomics.load(this.#header, RUNS_USED);
  }

  get stuck(): number {
    return Atomics.load(this.#header, STUCK);
  }

  mappedPages(handle: number): number {
    return this.#devicePages[handle]!;
  }

  map(handle: number, runs: RunList, lastPage: number, flags: number): number {
    const free = this.#entries - this.#header[RUNS_USED]!;
    if (runs.count > free) {
      runs.failedRun = free;
      return LIMIT_ENTRIES;
    }
    if (this.#devicePages[0]! + runs.pages > mappedPagesMax(this.#ram.pages)) return LIMIT_QUOTA;
    const node = this.#allocator.alloc(runs.pages, lastPage, (flags & MAP_FLAG.align) !== 0);
    if (node === 0) return LIMIT_IOVA;
    const devicePins = this.#devicePins[handle]!;
    if (!devicePins.add(runs)) {
      this.#allocator.free(node);
      return LIMIT_QUOTA;
    }
    if (!this.#pins.add(runs)) {
      for (let run = 0; run < runs.count; run++) devicePins.remove(runs.ramPage[run]!, runs.runPages[run]!);
      this.#allocator.free(node);
      return LIMIT_QUOTA;
    }
    const page = this.#allocator.startPage(node);
    let at = page;
    for (let run = 0; run < runs.count; run++) {
      const pages = runs.runPages[run]!;
      const errno = this.#backend.map(
        iova(at * PAGE_BYTES),
        this.#ram.hvaOf(runs.ramPage[run]!),
        pages * PAGE_BYTES,
        flags & ACCESS,
      );
      if (errno !== 0) {
        runs.failedRun = run;
        this.#undo(handle, node, runs, run, at - page);
        return statusOfHostErrno(errno);
      }
      at += pages;
    }
    this.#record(handle, node, runs, runs.count, runs.pages);
    runs.iovaPage = page;
    return OK;
  }

  unmap(handle: number, page: number, pages: number): number {
    const node = this.#allocator.lookup(page);
    if (node === 0 || this.#mappings[(node << MAPPING_SHIFT) + MAPPING_HANDLE] !== handle)
      return INVALID_STALE;
    if (this.#allocator.pages(node) !== pages) return INVALID_EINVAL;
    return this.#unmapNode(node);
  }

  release(handle: number): number {
    this.releasedMappings = 0;
    this.releasedPages = 0;
    let result: number = OK;
    for (let node = 1; node < this.#allocator.nodesTouched; node++) {
      if (!this.#allocator.isLive(node)) continue;
      if (this.#mappings[(node << MAPPING_SHIFT) + MAPPING_HANDLE] !== handle) continue;
      const pages = this.#allocator.pages(node);
      if (this.#unmapNode(node) === OK) {
        this.releasedMappings++;
        this.releasedPages += pages;
      } else result = LIMIT_STUCK;
    }
    return result;
  }

  get reclaimable(): boolean {
    return this.stuck > 0;
  }

  reclaim(): number {
    let left = this.stuck;
    let given = 0;
    // The search ends with the last that is stuck: there are none but for a host that contradicts itself.
    for (let node = 1; left > 0 && node < this.#allocator.nodesTouched; node++) {
      if (!this.#allocator.isLive(node)) continue;
      if (this.#mappings[(node << MAPPING_SHIFT) + MAPPING_STUCK] === 0) continue;
      left--;
      if (this.#unmapNode(node) === OK) given++;
    }
    return given;
  }

  /** Unmaps a live mapping and forgets it; it gets stuck, or stays it, when the backend does less than that. */
  #unmapNode(node: number): number {
    const mappings = this.#mappings;
    const at = node << MAPPING_SHIFT;
    const page = this.#allocator.startPage(node);
    const bytes = this.#backend.unmap(iova(page * PAGE_BYTES), this.#allocator.pages(node) * PAGE_BYTES);
    const left = mappings[at + MAPPING_REACHABLE]! - (bytes > 0 ? bytes / PAGE_BYTES : 0);
    if (left > 0) {
      mappings[at + MAPPING_REACHABLE] = left;
      if (mappings[at + MAPPING_STUCK] === 0) this.#header[STUCK]!++;
      mappings[at + MAPPING_STUCK] = 1;
      return bytes < 0 ? statusOfHostErrno(-bytes) : LIMIT_STUCK;
    }
    if (mappings[at + MAPPING_STUCK] !== 0) this.#header[STUCK]!--;
    this.#forget(node);
    return OK;
  }

  /** Takes back the first `runs` runs of a map that failed, `pages` pages. */
  #undo(handle: number, node: number, runs: RunList, mapped: number, pages: number): void {
    for (let run = mapped; run < runs.count; run++) {
      this.#unpin(handle, runs.ramPage[run]!, runs.runPages[run]!);
    }
    if (mapped === 0) {
      this.#allocator.free(node);
      return;
    }
    // In the books first: if it cannot be unmapped it is stuck like any other.
    this.#record(handle, node, runs, mapped, pages);
    this.#unmapNode(node);
  }

  /** Enters a mapping with its first `count` runs, of which `pages` pages are reachable. */
  #record(handle: number, node: number, runs: RunList, count: number, pages: number): void {
    this.#header[RUNS_USED]! += count;
    const isOneRun = count === 1 && pages === this.#allocator.pages(node);
    const head = isOneRun ? ~runs.ramPage[0]! : this.#chain(runs, count);
    const at = node << MAPPING_SHIFT;
    this.#mappings[at + MAPPING_HANDLE] = handle;
    this.#mappings[at + MAPPING_RUNS] = head;
    this.#mappings[at + MAPPING_REACHABLE] = pages;
    this.#mappings[at + MAPPING_STUCK] = 0;
    this.#devicePages[handle]! += pages;
    this.#devicePages[0]! += pages;
  }

  /** Takes runs of the pool for the first `count` of the list; returns the first one. */
  #chain(runs: RunList, count: number): number {
    const words = this.#runs;
    let head = 0;
    for (let run = count - 1; run >= 0; run--) {
      const at = this.#newRun() << RUN_SHIFT;
      words[at + RUN_RAM_PAGE] = runs.ramPage[run]!;
      words[at + RUN_PAGES] = runs.runPages[run]!;
      words[at + RUN_NEXT] = head;
      head = at >> RUN_SHIFT;
    }
    return head;
  }

  /** Removes a mapping that the device no longer reaches: its pins, its runs, its range. */
  #forget(node: number): void {
    const at = node << MAPPING_SHIFT;
    const handle = this.#mappings[at + MAPPING_HANDLE]!;
    const head = this.#mappings[at + MAPPING_RUNS]!;
    let pages: number;
    if (head < 0) {
      pages = this.#allocator.pages(node);
      this.#unpin(handle, ~head, pages);
      this.#header[RUNS_USED]!--;
    } else pages = this.#unchain(handle, head);
    this.#devicePages[handle]! -= pages;
    this.#devicePages[0]! -= pages;
    this.#allocator.free(node);
  }

  /** Unpins a chain of runs and gives it back to the pool; returns its pages. */
  #unchain(handle: number, head: number): number {
    const words = this.#runs;
    let pages = 0;
    for (let run = head; run !== 0; ) {
      const at = run << RUN_SHIFT;
      const next = words[at + RUN_NEXT]!;
      this.#unpin(handle, words[at + RUN_RAM_PAGE]!, words[at + RUN_PAGES]!);
      pages += words[at + RUN_PAGES]!;
      words[at + RUN_NEXT] = this.#header[RUN_HEAD]!;
      this.#header[RUN_HEAD] = run;
      this.#header[RUNS_USED]!--;
      run = next;
    }
    return pages;
  }

  #unpin(handle: number, ramPage: number, pages: number): void {
    this.#devicePins[handle]!.remove(ramPage, pages);
    this.#pins.remove(ramPage, pages);
  }

  /** A run of the pool; there are as many as entries, and map looked before. */
  #newRun(): number {
    const header = this.#header;
    const run = header[RUN_HEAD]!;
    if (run === 0) return ++header[RUNS_TOUCHED]!;
    header[RUN_HEAD] = this.#runs[(run << RUN_SHIFT) + RUN_NEXT]!;
    return run;
  }
}

/**
 * Policy pinned: all RAM is mapped at its own address, once, at the start; map and unmap check and answer. Nothing is recorded per mapping, so unmap cannot tell a mapping from one that never was.
 */
export class IdentityDomain implements Domain {
  readonly releasedMappings = 0;
  readonly releasedPages = 0;
  readonly reclaimable = false;

  readonly #ram: GuestRam;
  readonly #pins: Pins;
  readonly #devicePins: Pins;
  readonly #backend: DmaBackend;
  /** Runs that are mapped, in slot order. */
  readonly #header: Int32Array;

  /** Shared memory for a new domain, with nothing mapped. */
  static create(): SharedArrayBuffer {
    return new SharedArrayBuffer(HEADER_WORDS * 4);
  }

  /** This thread's view of the domain in `memory`. `devicePins` is what all its devices have pinned, together. */
  constructor(memory: SharedArrayBuffer, ram: GuestRam, pins: Pins, devicePins: Pins, backend: DmaBackend) {
    this.#header = new Int32Array(memory, 0, HEADER_WORDS);
    this.#ram = ram;
    this.#pins = pins;
    this.#devicePins = devicePins;
    this.#backend = backend;
  }

  get entriesUsed(): number {
    return Atomics.load(this.#header, RUNS_USED);
  }

  get stuck(): number {
    return 0;
  }

  /** Every device of the domain reaches all of it. */
  mappedPages(): number {
    return this.entriesUsed === 0 ? 0 : this.#ram.pages;
  }

  /**
   * Maps all RAM, readable and writable, one entry per slot. Returns what could not be mapped (EDQUOT: a quota), and
   * then nothing is.
   */
  mapAll(): MapAllFailure | undefined {
    const runs = this.#all();
    if (!this.#devicePins.add(runs)) return this.#failure(runs, runs.failedRun, ERRNO.EDQUOT);
    if (!this.#pins.add(runs)) {
      for (let run = 0; run < runs.count; run++) {
        this.#devicePins.remove(runs.ramPage[run]!, runs.runPages[run]!);
      }
      return this.#failure(runs, runs.failedRun, ERRNO.EDQUOT);
    }
    for (let run = 0; run < runs.count; run++) {
      const bytes = runs.runPages[run]! * PAGE_BYTES;
      const errno = this.#backend.map(
        iova(this.#gpa(runs, run)),
        this.#ram.hvaOf(runs.ramPage[run]!),
        bytes,
        ACCESS,
      );
      if (errno !== 0) {
        for (let rest = run; rest < runs.count; rest++) this.#unpin(runs, rest);
        this.unmapAll();
        return this.#failure(runs, run, errno);
      }
      Atomics.add(this.#header, RUNS_USED, 1);
    }
    return undefined;
  }

  /** Unmaps what mapAll mapped; returns the entries that the backend would not unmap, which keep their pins. */
  unmapAll(): number {
    const runs = this.#all();
    for (let run = this.entriesUsed - 1; run >= 0; run--) {
      const bytes = runs.runPages[run]! * PAGE_BYTES;
      if (this.#backend.unmap(iova(this.#gpa(runs, run)), bytes) !== bytes) break;
      this.#unpin(runs, run);
      Atomics.sub(this.#header, RUNS_USED, 1);
    }
    return this.entriesUsed;
  }

  map(_handle: number, runs: RunList, lastPage: number, flags: number): number {
    return this.entriesUsed === 0 ? RETRY_NOT_YET : placeAtGpa(this.#ram, runs, lastPage, flags);
  }

  unmap(_handle: number, page: number, pages: number): number {
    return this.#ram.contains(page, pages) ? OK : INVALID_STALE;
  }

  /** Nothing of this is a single device's. */
  release(): number {
    return OK;
  }

  reclaim(): number {
    return 0;
  }

  #unpin(runs: RunList, run: number): void {
    this.#devicePins.remove(runs.ramPage[run]!, runs.runPages[run]!);
    this.#pins.remove(runs.ramPage[run]!, runs.runPages[run]!);
  }

  #all(): RunList {
    const runs = new RunList(1);
    this.#ram.appendAll(runs);
    return runs;
  }

  #failure(runs: RunList, run: number, errno: number): MapAllFailure {
    return { gpa: this.#gpa(runs, run), bytes: runs.runPages[run]! * PAGE_BYTES, errno };
  }

  #gpa(runs: RunList, run: number): Gpa {
    return gpa(this.#ram.gpaPageOf(runs.ramPage[run]!) * PAGE_BYTES);
  }
}

/** Whether the runs are one range at their own address, below the limit and aligned if that is wanted; a status. */
export function placeAtGpa(ram: GuestRam, runs: RunList, lastPage: number, flags: number): number {
  const first = ram.gpaPageOf(runs.ramPage[0]!);
  let next = first;
  for (let run = 0; run < runs.count; run++) {
    if (ram.gpaPageOf(runs.ramPage[run]!) !== next) {
      // A list that is not contiguous cannot become one range here.
      runs.failedRun = run;
      return INVALID_EINVAL;
    }
    next += runs.runPages[run]!;
  }
  // It will never fit, so this is no limit that may pass: such a device wants a translated domain.
  if (next - 1 > lastPage) return INVALID_PLACE;
  if ((flags & MAP_FLAG.align) !== 0 && first % 2 ** Math.ceil(Math.log2(runs.pages)) !== 0) {
    return INVALID_PLACE;
  }
  runs.iovaPage = first;
  return OK;
}

function allocatorOf(memory: SharedArrayBuffer, limits: BackendLimits): IovaAllocator {
  const { allocator, entries } = layout(limits);
  return new IovaAllocator(new Int32Array(memory, allocator), entries, limits.ranges.length);
}
