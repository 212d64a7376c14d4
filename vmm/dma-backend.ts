// What is behind a DMA domain, as plain data that every thread can be given, and each thread's view of it.

import type { DmaBackend } from "../hypercalls/backend.js";
import { openSoftBackend } from "./emul/iommu.js";
import { VfioBackend } from "./vfio/container.js";

/** A VFIO container by its file number (-1: none, of devices that are gone), or a software IOMMU's memory. */
export type BackendHandle =
  | { readonly kind: "vfio"; readonly fd: number }
  | { readonly kind: "soft"; readonly memory: SharedArrayBuffer };

/** This thread's view. */
export const openBackend = (handle: BackendHandle): DmaBackend =>
  handle.kind === "vfio" ? new VfioBackend(handle.fd) : openSoftBackend(handle.memory);
