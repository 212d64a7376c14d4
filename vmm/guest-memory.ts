// Guest RAM: one memfd, mapped once and for the life of the process, so that no view of it can dangle. Pages nobody
// touched cost nothing. In the file, and so in host addresses, low and high RAM follow each other without the hole.

import { closeSync, ftruncateSync, readSync, writeSync } from "node:fs";
import { type Gpa, gpa, type Hva, hva } from "../hypercalls/addresses.js";
import type { GuestMemory as GuestMemoryAccess, RamSlot } from "../hypercalls/guest-ram.js";
import { VmmError } from "./errors.js";
import {
  MADV_DONTDUMP,
  MAP_NORESERVE,
  madvise,
  memfdCreate,
  mmapShared,
  PROT_READ,
  PROT_WRITE,
  punchHole,
} from "./native/libc.js";
import { memoryWindow, WINDOW_BYTES } from "./native/memory-window.js";

/** A piece of RAM as the engine knows it, and where it is in the file. */
export interface RamPiece extends RamSlot {
  readonly fileOffset: number;
}

/** What a Worker needs to see the same memory; plain numbers. */
export interface RamDescription {
  readonly fd: number;
  readonly slots: readonly RamPiece[];
}

/**
 * A memfd of so many bytes (whole pages), all zero, mapped for the life of the process and left out of core dumps; pages
 * nobody touches cost nothing. Throws a SystemError.
 */
export function createSharedMemory(name: string, bytes: number): { readonly fd: number; readonly hva: Hva } {
  const fd = memfdCreate(name);
  try {
    ftruncateSync(fd, bytes);
    const address = mmapShared(fd, bytes, 0, PROT_READ | PROT_WRITE, MAP_NORESERVE);
    madvise(address, bytes, MADV_DONTDUMP);
    return { fd, hva: address };
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** Makes RAM of the given pieces (whole pages, ascending, apart); throws a VmmError when the system refuses. */
export function createRam(pieces: readonly { gpa: number; bytes: number }[]): RamDescription {
  const totalBytes = pieces.reduce((sum, piece) => sum + piece.bytes, 0);
  let memory: ReturnType<typeof createSharedMemory>;
  try {
    memory = createSharedMemory("guest-ram", totalBytes);
  } catch (error) {
    const mebibytes = totalBytes / 2 ** 20;
    throw new VmmError(
      `${mebibytes} MiB of guest RAM cannot be had: ${(error as Error).message}; give less --memory`,
    );
  }
  const { fd, hva: base } = memory;
  let fileOffset = 0;
  const slots = pieces.map((piece) => {
    const slot = { gpa: gpa(piece.gpa), bytes: piece.bytes, fileOffset, hva: hva(base + fileOffset) };
    fileOffset += piece.bytes;
    return slot;
  });
  return { fd, slots };
}

/** Access to guest RAM by guest-physical address. Every thread has its own; all see the same bytes. */
export class GuestMemory implements GuestMemoryAccess {
  /** Windows over the mapping, made when first used; index is the file offset / WINDOW_BYTES. */
  private readonly windows: (Uint32Array | undefined)[] = [];
  private firstWord = 0;
  private readonly totalBytes: number;
  private readonly base: Hva;

  constructor(readonly ram: RamDescription) {
    this.totalBytes = ramBytes(ram);
    this.base = ram.slots[0]?.hva ?? hva(0);
  }

  /** File offset of `bytes` bytes of RAM at `address`, or -1 when they are not wholly inside one piece. */
  fileOffset(address: number, bytes: number): number {
    for (let i = 0; i < this.ram.slots.length; i++) {
      const slot = this.ram.slots[i]!;
      if (address >= slot.gpa && address + bytes <= slot.gpa + slot.bytes) {
        return slot.fileOffset + (address - slot.gpa);
      }
    }
    return -1;
  }

  /**
   * Copies `bytes` bytes out of RAM, for the hot path. `address` and `bytes` must be multiples of 4 and the range must
   * not cross a multiple of WINDOW_BYTES (a call page never does). False, and nothing copied, when it is not RAM.
   */
  copyIn(address: Gpa, bytes: number, into: Uint32Array): boolean {
    const words = bytes / 4;
    const window = this.windowFor(address, bytes);
    if (window === undefined) return false;
    for (let i = 0; i < words; i++) into[i] = window[this.firstWord + i]!;
    return true;
  }

  /** The reverse of copyIn, under the same rules. */
  copyOut(address: Gpa, bytes: number, from: Uint32Array): boolean {
    const words = bytes / 4;
    const window = this.windowFor(address, bytes);
    if (window === undefined) return false;
    for (let i = 0; i < words; i++) window[this.firstWord + i] = from[i]!;
    return true;
  }

  /** Writes bytes into RAM; throws a RangeError when they do not fit it. Not for hot paths. */
  write(address: number, bytes: Uint8Array): void {
    let offset = this.requireOffset(address, bytes.length);
    for (let done = 0; done < bytes.length; ) {
      const written = writeSync(this.ram.fd, bytes, done, bytes.length - done, offset);
      done += written;
      offset += written;
    }
  }

  /** Copies `bytes` bytes of an open file into RAM, a megabyte at a time; throws when the file is shorter. */
  load(address: number, file: number, fileOffset: number, bytes: number): void {
    this.requireOffset(address, bytes);
    const piece = Buffer.allocUnsafe(Math.min(bytes, 2 ** 20));
    for (let done = 0; done < bytes; ) {
      const got = readSync(file, piece, 0, Math.min(piece.length, bytes - done), fileOffset + done);
      if (got === 0) throw new RangeError(`file ended ${bytes - done} bytes early`);
      this.write(address + done, piece.subarray(0, got));
      done += got;
    }
  }

  /** All RAM reads as zero again and costs nothing. The guest must not be running. */
  clear(): void {
    punchHole(this.ram.fd, 0, this.totalBytes);
  }

  private requireOffset(address: number, bytes: number): number {
    const offset = this.fileOffset(address, bytes);
    if (offset < 0) throw new RangeError(`${bytes} bytes at gpa 0x${address.toString(16)} are not guest RAM`);
    return offset;
  }

  /** The window that holds the range, which begins at its word `firstWord`; undefined when it is not all there. */
  private windowFor(address: number, bytes: number): Uint32Array | undefined {
    const offset = this.fileOffset(address, bytes);
    if (offset < 0) return undefined;
    const window = this.window(offset);
    this.firstWord = (offset % WINDOW_BYTES) / 4;
    return this.firstWord + bytes / 4 <= window.length ? window : undefined;
  }

  private window(offset: number): Uint32Array {
    const index = Math.floor(offset / WINDOW_BYTES);
    let window = this.windows[index];
    if (window === undefined) {
      const start = index * WINDOW_BYTES;
      const bytes = memoryWindow(hva(this.base + start), Math.min(WINDOW_BYTES, this.totalBytes - start));
      window = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
      this.windows[index] = window;
    }
    return window;
  }
}

/** Size of guest RAM in bytes. */
export const ramBytes = (ram: RamDescription): number => ram.slots.reduce((sum, slot) => sum + slot.bytes, 0);
