// Native memory as JavaScript buffers: the only place ref-napi is used. A Buffer ends at 4 GiB on Node 20, so callers
// look at larger memory through several windows.

import { createRequire } from "node:module";
import { dirname } from "node:path";
import type { Hva } from "../../hypercalls/addresses.js";

interface RefNapi {
  readPointer(buffer: Buffer, offset: number, bytes: number): Buffer;
}

const manifest = createRequire(import.meta.url).resolve("ref-napi/package.json");
/**
 * The package's binding, loaded as the package does it, without the JavaScript around it: that is about C's types, adds
 * methods to everybody's Buffers, and takes three quarters of the time to load, which each thread spends anew.
 */
const ref = createRequire(manifest)("node-gyp-build")(dirname(manifest)) as RefNapi;

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
