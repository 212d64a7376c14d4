// The memory of a tracking table (hypercalls/cached.ts): a memfd of its own, mapped once and for the life of the process,
// that the guest sees as a memory slot. Entries nobody touched cost nothing.

import type { Gpa, Hva } from "../hypercalls/addresses.js";
import type { TrackingTable } from "../hypercalls/cached.js";
import type { GpaRange } from "./boot/layout.js";
import { errorMessage, VmmError } from "./errors.js";
import { createSharedMemory } from "./guest-memory.js";
import { punchHole } from "./native/libc.js";
import { memoryWindow } from "./native/memory-window.js";

/** What a Worker needs to see a table; plain numbers. */
export interface TableDescription {
  readonly fd: number;
  readonly gpa: Gpa;
  readonly hva: Hva;
  /** Whole pages. */
  readonly bytes: number;
}

/** Makes a table of zeros; throws a VmmError when the system refuses. */
export function createTable({ gpa, bytes }: GpaRange): TableDescription {
  try {
    return { gpa, bytes, ...createSharedMemory("tracking-table", bytes) };
  } catch (error) {
    throw new VmmError(`${bytes} bytes for the tracking table cannot be had: ${errorMessage(error)}`);
  }
}

/** This thread's view. */
export function openTable({ fd, hva, bytes }: TableDescription): TrackingTable {
  const window = memoryWindow(hva, bytes);
  const entries = new Int32Array(window.buffer, window.byteOffset, bytes / 4);
  return {
    entries,
    clear: () => {
      try {
        punchHole(fd, 0, bytes);
      } catch {
        // It only costs more: the guest may be waiting for this in a call, where nothing throws.
        entries.fill(0);
      }
    },
  };
}
