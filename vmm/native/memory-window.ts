// Native memory as JavaScript buffers: the only place ref-napi is used. A Buffer ends at 4 GiB on Node 20, so callers
// look at larger memory through several windows.

import { createRequire } from "node:module";
import type { Hva } from "../../hypercalls/addresses.js";

interface RefNapi {
  readPointer(buffer: Buffer, offset: number, bytes: number): Buffer;
}
const ref = createRequire(import.meta.url)("ref-napi") as RefNapi;

/** Largest window, in bytes. A power of two below Node 20's 4 GiB limit, so that an address splits by shifting. */
export const WINDOW_BYTES = 2 ** 30;

/**
 * A Buffer over `bytes` bytes of this process at `address`; no copy. It does not keep the memory mapped: whoever
 * unmaps it sees to it that no window is used afterwards. Throws a RangeError above WINDOW_BYTES.
 */
export function memoryWindow(address: Hva, bytes: number): Buffer {
  if (bytes > WINDOW_BYTES) throw new RangeError(`memory window of ${bytes} bytes, at most ${WINDOW_BYTES}`);
  const pointer = Buffer.alloc(8);
  pointer.writeBigUInt64LE(BigInt(address));
  return ref.readPointer(pointer, 0, bytes);
}
