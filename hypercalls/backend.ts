// The seam: what the engine needs from whatever really maps, VFIO or the software IOMMU. Types only.
// One backend is one IOMMU domain (a VFIO container). A backend never throws: it answers with errnos (Linux numbers).

import type { Hva, Iova } from "./addresses.js";

export interface DmaBackend {
  /**
   * Pins the memory at `hva` and maps it at `iova`, as one entry. Both and `bytes` are multiples of 4096; `access`
   * is MAP_FLAG.read, MAP_FLAG.write or both. Returns 0, or a positive errno, and then nothing of it is mapped.
   */
  map(iova: Iova, hva: Hva, bytes: number, access: number): number;

  /**
   * Unmaps every entry that lies wholly inside the range; the device reaches none of them when it returns. Returns
   * the bytes that were really unmapped (0 when nothing was there), or a negative errno.
   */
  unmap(iova: Iova, bytes: number): number;
}

/** What a backend can do, asked once, before the first mapping. Plain data: it crosses to other threads. */
export interface BackendLimits {
  /** IOVA ranges in bytes, `last` inclusive, ascending and disjoint (holes are the MSI window, for one). */
  readonly ranges: readonly { readonly first: number; readonly last: number }[];
  /** A bit per page size the IOMMU maps, bit 12 for 4 KiB; a 64-bit mask rounded to a double is fine. */
  readonly pageSizeMask: number;
  /** Entries that can be mapped at a time. */
  readonly entries: number;
}
