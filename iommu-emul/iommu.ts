// The software IOMMU: one domain that follows the rules of VFIO type1v2 (linux/drivers/vfio/vfio_iommu_type1.c), a
// backend for the engine, with a page table that devices walk (dma-port.ts). All its state is in one SharedArrayBuffer.
// Addresses are bytes, `last` is inclusive.

import { MAP_FLAG } from "../hypercalls/abi.js";
import { type Hva, hva, type Iova, PAGE_BYTES } from "../hypercalls/addresses.js";
import type { BackendLimits, DmaBackend } from "../hypercalls/backend.js";
import { Mutex } from "../hypercalls/lock.js";
import { ERRNO } from "../hypercalls/status.js";
import { Lanes } from "./lanes.js";
import { PageTable, WORD_SHIFT } from "./page-table.js";
import {
  createShared,
  HEADER,
  IOVA_END,
  IOVA_PAGES,
  SETTING,
  Shared,
  type SoftIommuConfig,
  WINDOW_PAGES,
} from "./shared.js";

export { DEFAULT_ENTRIES, DEFAULT_RANGES, LANES_MAX, type SoftIommuConfig } from "./shared.js";

const ACCESS = MAP_FLAG.read | MAP_FLAG.write;
/** Where 64-bit addresses wrap. */
const WRAP = 2 ** 64;
/** 4 KiB, 2 MiB and 1 GiB. */
const PAGE_SIZES = 2 ** 12 + 2 ** 21 + 2 ** 30;

/**
 * A thread's view. `map` and `unmap` can be called by every thread at any time: they take a lock of the IOMMU's own (the
 * engine holds one of the domain around them anyway, so this one is free then). A thread that is terminated within one
 * of them leaves it held for ever: like the engine's threads, those that map are asked to end.
 *
 * Numbers in `map` and `unmap` are any 64-bit values, as doubles.
 */
export class SoftIommu implements DmaBackend {
  readonly #shared: Shared;
  readonly #table: PageTable;
  readonly #lanes: Lanes;
  readonly #lock: Mutex;
  /** Of the last #findMemory: pages that follow without a gap. */
  #memoryPages = 0;

  /** An IOMMU with nothing mapped and no bus master. Throws a RangeError for a configuration that makes no sense. */
  static create(config: SoftIommuConfig): SharedArrayBuffer {
    return createShared(config);
  }

  /** This thread's view of what `create` made. */
  constructor(memory: SharedArrayBuffer) {
    this.#shared = new Shared(memory);
    this.#table = new PageTable(this.#shared);
    this.#lanes = new Lanes(this.#shared);
    this.#lock = new Mutex(this.#shared.header, HEADER.lock);
  }

  /** As a container says it that has nothing mapped yet. */
  limits(): BackendLimits {
    const { ranges, settings } = this.#shared;
    return {
      ranges: Array.from({ length: ranges.length / 2 }, (_, i) => ({
        first: ranges[2 * i]!,
        last: ranges[2 * i + 1]!,
      })),
      pageSizeMask: PAGE_SIZES,
      entries: settings[SETTING.entries]!,
    };
  }

  /** Mappings there are. */
  get entriesUsed(): number {
    return Atomics.load(this.#shared.header, HEADER.entriesUsed);
  }

  /** Bytes that are mapped, which is what counts against the locked-memory limit. */
  get lockedBytes(): number {
    return this.#shared.settings[SETTING.lockedBytes]!;
  }

  /** Tables in use, but for the root. */
  get tablesUsed(): number {
    return Atomics.load(this.#shared.header, HEADER.tablesUsed);
  }

  /**
   * VFIO_IOMMU_MAP_DMA, checks and errnos in the kernel's order: EINVAL (access, alignment, size, wrap), EEXIST (overlap),
   * ENOSPC (entries), EINVAL (outside the ranges), then page by page EFAULT (memory that the IOMMU was not given) or
   * ENOMEM (locked-memory limit), ENOMEM (tables).
   */
  map(at: Iova, from: Hva, bytes: number, access: number): number {
    if (access === 0 || (access & ~ACCESS) !== 0) return ERRNO.EINVAL;
    if (!(bytes > 0) || bytes % PAGE_BYTES || at % PAGE_BYTES || from % PAGE_BYTES) return ERRNO.EINVAL;
    if (at + bytes > WRAP || from + bytes > WRAP) return ERRNO.EINVAL;
    this.#lock.acquire();
    try {
      return this.#map(at, from, bytes, access);
    } finally {
      this.#lock.release();
    }
  }

  /**
   * VFIO_IOMMU_UNMAP_DMA: whole mappings only, cutting one is EINVAL, and nothing there is 0 bytes, not an error. When it
   * returns, no device has an access to what was unmapped under way, nor will have. It waits for those it finds.
   * (A range that ends at 2^64 unmaps nothing in Linux before 6.18, whose sum wrapped; here it is a range like others.)
   */
  unmap(at: Iova, bytes: number): number {
    if (!(bytes > 0) || bytes % PAGE_BYTES || at % PAGE_BYTES || at + bytes > WRAP) return -ERRNO.EINVAL;
    const first = at / PAGE_BYTES;
    const last = Math.min(first + bytes / PAGE_BYTES, IOVA_PAGES) - 1;
    if (first > last) return 0;
    this.#lock.acquire();
    try {
      if (this.#table.isCut(first, last)) return -ERRNO.EINVAL;
      const pages = this.#remove(first, last);
      this.#shared.header[HEADER.entriesUsed]! -= this.#table.cleared;
      this.#shared.settings[SETTING.lockedBytes]! -= pages * PAGE_BYTES;
      return pages * PAGE_BYTES;
    } finally {
      this.#lock.release();
    }
  }

  /**
   * Where a device's access to one byte goes; `access` is MAP_FLAG.read or MAP_FLAG.write. -1: a fault. To look at
   * only: nothing keeps what it says true.
   */
  translate(at: Iova, access: number): Hva | -1 {
    if (!(at >= 0 && at < IOVA_END)) return -1;
    const page = Math.floor(at / PAGE_BYTES);
    const word = this.#table.walk(page);
    return (word & access) === 0 ? -1 : this.#hvaOf(word >>> WORD_SHIFT, at - page * PAGE_BYTES);
  }

  /**
   * Lets a device do DMA, or no more: what its command register says. Off, as all begin: when it returns, no access of
   * the device is under way. One thread at a time, and not the device's.
   */
  setBusMaster(lane: number, on: boolean): void {
    this.#lanes.setBusMaster(lane, on);
  }

  /**
   * The device's thread has ended, whatever it was doing: nobody waits for it any more, and it is no bus master. Only
   * when it is really gone (after the Worker's event `exit`). Until then unmaps wait for an access that it was torn
   * out of, for ever on the thread that gets the event: turn bus mastering off before terminate(), and none does that begins
   * after that.
   */
  markDead(lane: number): void {
    this.#lanes.markDead(lane);
  }

  #map(at: number, from: number, bytes: number, access: number): number {
    const { header, settings } = this.#shared;
    const first = at / PAGE_BYTES;
    const pages = bytes / PAGE_BYTES;
    if (first < IOVA_PAGES && this.#table.anyIn(first, Math.min(first + pages, IOVA_PAGES) - 1)) {
      return ERRNO.EEXIST;
    }
    if (header[HEADER.entriesUsed]! >= settings[SETTING.entries]!) return ERRNO.ENOSPC;
    if (!this.#isMappable(at, bytes)) return ERRNO.EINVAL;
    // The kernel pins from the first page on, and looks at the limit after each: the first that fails decides.
    const memoryPage = this.#findMemory(from);
    const lockable = Math.floor(
      (settings[SETTING.lockedBytesMax]! - settings[SETTING.lockedBytes]!) / PAGE_BYTES,
    );
    if (this.#memoryPages < pages && this.#memoryPages <= lockable) return ERRNO.EFAULT;
    if (pages > lockable) return ERRNO.ENOMEM;
    if (!this.#table.set(first, memoryPage, pages, access)) {
      this.#remove(first, first + pages - 1);
      return ERRNO.ENOMEM;
    }
    header[HEADER.entriesUsed]!++;
    settings[SETTING.lockedBytes]! += bytes;
    return 0;
  }

  /** Makes a range unreachable, up to the last access that may have begun before; returns the pages that were mapped. */
  #remove(first: number, last: number): number {
    const pages = this.#table.clear(first, last);
    if (pages > 0) this.#lanes.invalidate(first, last);
    // An access may be in a table that was entered for a mapping which then failed, without a page mapped.
    this.#lanes.waitForAll();
    this.#table.releaseTables();
    return pages;
  }

  #isMappable(at: number, bytes: number): boolean {
    const { ranges } = this.#shared;
    for (let range = 0; range < ranges.length; range += 2) {
      if (ranges[range]! <= at && at + bytes - 1 <= ranges[range + 1]!) return true;
    }
    return false;
  }

  /** The memory page at an address; sets #memoryPages, 0 when it is not the IOMMU's. */
  #findMemory(from: number): number {
    const { parts } = this.#shared;
    let page = 0;
    for (let part = 0; part < parts.length; part += 2) {
      const offset = from - parts[part]!;
      const bytes = parts[part + 1]!;
      if (offset >= 0 && offset < bytes) {
        this.#memoryPages = (bytes - offset) / PAGE_BYTES;
        return page + offset / PAGE_BYTES;
      }
      page += Math.ceil(bytes / PAGE_BYTES / WINDOW_PAGES) * WINDOW_PAGES;
    }
    this.#memoryPages = 0;
    return 0;
  }

  #hvaOf(memoryPage: number, offset: number): Hva {
    const { parts } = this.#shared;
    let page = memoryPage;
    for (let part = 0; ; part += 2) {
      const pages = Math.ceil(parts[part + 1]! / PAGE_BYTES / WINDOW_PAGES) * WINDOW_PAGES;
      if (page < pages) return hva(parts[part]! + page * PAGE_BYTES + offset);
      page -= pages;
    }
  }
}
