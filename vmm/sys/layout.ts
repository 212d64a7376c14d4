// How kernel structures are written down in this directory: names exactly as in the C headers, so that a test can
// compile a probe against the system's headers and compare every number. Nothing here talks to the kernel.

/** `size` of the structure in bytes; every other key is a member (dots for nested ones) with its offset in bytes. */
export type StructLayout = Readonly<Record<string, number>> & { readonly size: number };

/** A zeroed structure to pass to an ioctl. All kernel structures here are little-endian. */
export const newStruct = (layout: StructLayout, extraBytes = 0): DataView =>
  new DataView(new ArrayBuffer(layout.size + extraBytes));

/** Writes a number of 0 to 2^53 - 1 as a __u64, without BigInt: setUint32 takes its value modulo 2^32. */
export function setU64(view: DataView, offset: number, value: number): void {
  view.setUint32(offset, value, true);
  view.setUint32(offset + 4, value / 2 ** 32, true);
}

/** Reads a __u64 as a double: exact below 2^53, rounded above (compare before use). */
export const getU64 = (view: DataView, offset: number): number =>
  view.getUint32(offset, true) + view.getUint32(offset + 4, true) * 2 ** 32;
