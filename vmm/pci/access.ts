// Accesses of the guest cut into what a register file understands: 1, 2 or 4 bytes, naturally aligned, so that none
// touches two dwords. Pure.

import type { Width } from "../io-bus.js";

const widthAt = (offset: number, left: number): Width =>
  left >= 4 && offset % 4 === 0 ? 4 : left >= 2 && offset % 2 === 0 ? 2 : 1;

/** What reads of nothing give. */
export const allOnes = (width: number): number => 2 ** (8 * width) - 1;

/** Reads `bytes` (1 to 4) bytes at any `offset` through `read`. */
export function readAligned(
  offset: number,
  bytes: number,
  read: (offset: number, width: Width) => number,
): number {
  let value = 0;
  for (let done = 0; done < bytes; ) {
    const width = widthAt(offset + done, bytes - done);
    value += read(offset + done, width) * 2 ** (8 * done);
    done += width;
  }
  return value;
}

/** Writes `bytes` (1 to 4) bytes of `value` at any `offset` through `write`. */
export function writeAligned(
  offset: number,
  bytes: number,
  value: number,
  write: (offset: number, width: Width, value: number) => void,
): void {
  for (let done = 0; done < bytes; ) {
    const width = widthAt(offset + done, bytes - done);
    write(offset + done, width, Math.floor(value / 2 ** (8 * done)) % 2 ** (8 * width));
    done += width;
  }
}
