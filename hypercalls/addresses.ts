// The address spaces, kept apart by type: a guest-physical address, a bus address and a host pointer are
// all numbers below 2^53, and mixing two of them up is somebody's corrupted disk. No arithmetic on hardware here.
// Convention everywhere: `bytes` and `pages` are lengths, ranges are given as start and length, `last` is inclusive.

declare const space: unique symbol;

/** Guest-physical address in bytes. */
export type Gpa = number & { readonly [space]: "gpa" };
/** Bus address as the device emits it, in bytes. */
export type Iova = number & { readonly [space]: "iova" };
/** Address in this process, in bytes (x86-64 user space ends at 2^47, so a double holds it exactly). */
export type Hva = number & { readonly [space]: "hva" };

export const gpa = (value: number): Gpa => value as Gpa;
export const iova = (value: number): Iova => value as Iova;
export const hva = (value: number): Hva => value as Hva;

/** The page every structure here counts in: x86's smallest, and the smallest IOMMU granule of VT-d and AMD-Vi. */
export const PAGE_BYTES = 4096;
/** A large page of x86-64. */
export const HUGE_PAGE_BYTES = 2 ** 21;
export const PAGE_SHIFT = 12;

/** Above this a double no longer holds every integer; a 64-bit register that is larger is out of every valid range. */
export const MAX_EXACT = Number.MAX_SAFE_INTEGER;

/** Pages that `bytes` bytes from `address` touch; `bytes` at least 1. */
export const pagesTouched = (address: number, bytes: number): number =>
  Math.floor((address + bytes - 1) / PAGE_BYTES) - Math.floor(address / PAGE_BYTES) + 1;
