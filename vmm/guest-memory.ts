// Guest RAM: one memfd, mapped once and for the life of the process, so that no view of it can dangle. Pages nobody
// touched cost nothing. In the file, and so in host addresses, low and high RAM follow each other without the hole. The ends
// of both are memory of the process instead: see writtenAtBoot().

import { closeSync, existsSync, ftruncateSync, readFileSync, readSync } from "node:fs";
import { release } from "node:os";
import { type Gpa, gpa, HUGE_PAGE_BYTES, type Hva, hva, PAGE_BYTES } from "../hypercalls/addresses.js";
import type { GuestMemory as GuestMemoryAccess, RamSlot } from "../hypercalls/guest-ram.js";
import { VmmError } from "./errors.js";
import {
  check,
  MADV_DONTDUMP,
  MADV_DONTNEED,
  MADV_HUGEPAGE,
  MAP_NORESERVE,
  MFD_HUGETLB_2M,
  madvise,
  memfdCreate,
  mmapPrivate,
  mmapShared,
  PROT_READ,
  PROT_WRITE,
  punchHole,
  reserveAddresses,
} from "./native/libc.js";
import { memoryWindow, WINDOW_BYTES } from "./native/memory-window.js";

/** A piece of RAM as the engine knows it, and where it is in what is mapped: the file, but for the private ranges. */
export interface RamPiece extends RamSlot {
  readonly offset: number;
}

/** Pages of 2 MiB: reserved ones of hugetlbfs, or those that the kernel makes of 4 KiB ones where it can (THP). */
export type HugePages = "hugetlb" | "thp";

/** Why the kernel will make no large pages of shared memory, as this is; undefined when it does. */
export function noLargePages(): string | undefined {
  const file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  const set = existsSync(file) ? /\[(\w+)\]/.exec(readFileSync(file, "utf8"))?.[1] : "missing";
  if (set !== "never" && set !== "deny" && set !== "missing") return undefined;
  return `--hugepages thp: this host makes no huge pages of shared memory (${file} is ${set}): RAM is of 4 KiB pages; echo advise > ${file}`;
}

/** What a Worker needs to see the same memory; plain data. */
export interface RamDescription {
  /** Of the memfd: to give memory back, not to read or to write, for it has nothing of the private ranges. */
  readonly fd: number;
  readonly slots: readonly RamPiece[];
  readonly hugePages?: HugePages;
  /** Anonymous memory that is mapped over holes of the file. */
  readonly privateRanges: readonly RamRange[];
}

interface RamRange {
  readonly offset: number;
  readonly bytes: number;
}

/**
 * Of its RAM Linux takes little from the end (page tables), before that 64 bytes about each page (struct page), and then the
 * hash tables of its file names and inodes: 12 bytes for 8 KiB of RAM of 2^n bytes, up to twice that for other sizes, and
 * fewer above 64 GiB.
 */
const BEHIND_DESCRIPTORS = 8 * 2 ** 20;
const DESCRIPTOR_SHARE = 64 / PAGE_BYTES;
const HASH_SHARE = 16 / 8192;
/** What Linux sets aside to copy through for devices that do not reach high RAM (linux/kernel/dma/swiotlb.c). */
const BOUNCE_BUFFERS = 64 * 2 ** 20;

/**
 * What a guest with high RAM writes before its init runs, and never gives to a device that is assigned to it: what it has
 * to know about its pages, at the end of high RAM, 280 MiB for RAM of 16 GiB, and the bounce buffers, zeroed, at the end
 * of low RAM: memblock hands out from the end (linux/mm/sparse.c, linux/mm/memblock.c). There pages of 2 MiB, if the host
 * makes them, save a fault for each page of 4 KiB and take no more memory. The high range is a little larger than what is
 * written, and the rest of it RAM as any other. Elsewhere large pages are for who asks for them: one that is pinned in
 * part is not given up at all. The kernel makes them of a process's own memory unless told otherwise, and of memfds only if
 * told to. Nothing without high RAM, and the low range alone where the descriptors do not fit it.
 */
export function writtenAtBoot(pieces: readonly { readonly bytes: number }[]): RamRange[] {
  const last = pieces.at(-1);
  if (pieces.length < 2 || last === undefined) return [];
  const end = pieces.reduce((sum, piece) => sum + piece.bytes, 0);
  const lowEnd = end - last.bytes;
  const ranges = [largePages(Math.max(0, lowEnd - BOUNCE_BUFFERS), lowEnd)];
  // What does not fit high RAM is in low RAM, but who knows where.
  if (last.bytes >= end * DESCRIPTOR_SHARE) {
    const wanted = end * (DESCRIPTOR_SHARE + HASH_SHARE) + BEHIND_DESCRIPTORS;
    ranges.push(largePages(Math.max(lowEnd, end - wanted), end));
  }
  return ranges.filter(({ bytes }) => bytes >= HUGE_PAGE_BYTES);
}

/** A range from where its first large page can begin; `bytes` are fewer than a large page's, or negative, when none fits. */
function largePages(start: number, end: number): RamRange {
  const offset = Math.ceil(start / HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES;
  return { offset, bytes: end - offset };
}

/**
 * Whether this kernel, when it pins a page of a process's own memory for reading alone, pins the one that a later write will
 * change. Before 6.2 it may be the page of zeros that all processes have in common, and a device would go on reading
 * zeros from there, whatever the guest had written meanwhile (linux/mm/gup.c, gup_must_unshare). A file's pages, a
 * memfd's among them, are pinned as they are by all kernels.
 */
export function pinsPrivatePages(kernel: string): boolean {
  const [, major, minor] = /^(\d+)\.(\d+)/.exec(kernel) ?? [];
  return Number(major) > 6 || (Number(major) === 6 && Number(minor) >= 2);
}

/**
 * A memfd of so many bytes (whole pages of its kind), all zero, mapped for the life of the process and left out of core
 * dumps; pages nobody touches cost nothing, but pages of hugetlbfs are taken from the host's at once: a process that
 * touches one that is not there is killed. Throws a SystemError.
 */
export function createSharedMemory(
  name: string,
  bytes: number,
  hugePages?: HugePages,
): { readonly fd: number; readonly hva: Hva } {
  const reserved = hugePages === "hugetlb";
  const fd = memfdCreate(name, reserved ? MFD_HUGETLB_2M : 0);
  try {
    ftruncateSync(fd, bytes);
    // A large page is one for the guest, too, if it begins at a multiple of its size on both sides.
    const address = reserveAddresses(bytes, HUGE_PAGE_BYTES);
    mmapShared(fd, bytes, 0, PROT_READ | PROT_WRITE, reserved ? 0 : MAP_NORESERVE, address);
    madvise(address, bytes, MADV_DONTDUMP);
    if (hugePages === "thp") madvise(address, bytes, MADV_HUGEPAGE);
    return { fd, hva: address };
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** What to do when memory cannot be had. */
function advice(totalBytes: number, hugePages: HugePages | undefined): string {
  if (hugePages !== "hugetlb") return "give less --memory";
  const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
  const count = (name: string) => {
    const file = `${pool}/${name}`;
    return existsSync(file) ? Number(readFileSync(file, "utf8")) : 0;
  };
  const free = count("free_hugepages") - count("resv_hugepages");
  return (
    `it takes ${totalBytes / HUGE_PAGE_BYTES} huge pages of 2 MiB, and ${free} are free; ` +
    `reserve more (echo N > ${pool}/nr_hugepages), or use --hugepages thp`
  );
}

/**
 * Makes RAM of the given pieces (whole pages of its kind, ascending, apart). `kernel` is the host's release. Throws a VmmError
 * when the system refuses.
 */
export function createRam(
  pieces: readonly { gpa: number; bytes: number }[],
  hugePages?: HugePages,
  kernel = release(),
): RamDescription {
  const totalBytes = pieces.reduce((sum, piece) => sum + piece.bytes, 0);
  const mayBePrivate = hugePages === undefined && pinsPrivatePages(kernel);
  const privateRanges = mayBePrivate ? writtenAtBoot(pieces) : [];
  let memory: ReturnType<typeof createSharedMemory> | undefined;
  try {
    memory = createSharedMemory("guest-ram", totalBytes, hugePages);
    for (const { offset, bytes } of privateRanges) {
      const at = hva(memory.hva + offset);
      mmapPrivate(at, bytes);
      madvise(at, bytes, MADV_DONTDUMP);
      madvise(at, bytes, MADV_HUGEPAGE);
    }
  } catch (error) {
    if (memory !== undefined) closeSync(memory.fd);
    const mebibytes = totalBytes / 2 ** 20;
    throw new VmmError(
      `${mebibytes} MiB of guest RAM cannot be had: ${(error as Error).message}; ${advice(totalBytes, hugePages)}`,
    );
  }
  const { fd, hva: base } = memory;
  let offset = 0;
  const slots = pieces.map((piece) => {
    const slot = { gpa: gpa(piece.gpa), bytes: piece.bytes, offset, hva: hva(base + offset) };
    offset += piece.bytes;
    return slot;
  });
  return { fd, slots, ...(hugePages && { hugePages }), privateRanges };
}

/** Access to guest RAM by guest-physical address. Every thread has its own; all see the same bytes. */
export class GuestMemory implements GuestMemoryAccess {
  /** Windows over the mapping, made when first used; index is the offset / WINDOW_BYTES. */
  private readonly windows: (Uint32Array | undefined)[] = [];
  private firstWord = 0;
  private readonly totalBytes: number;
  private readonly base: Hva;

  constructor(readonly ram: RamDescription) {
    this.totalBytes = ramBytes(ram);
    this.base = ram.slots[0]?.hva ?? hva(0);
  }

  /** Offset in host memory of `bytes` bytes of RAM at `address`, or -1 when they are not wholly inside one piece. */
  private offsetOf(address: number, bytes: number): number {
    for (let i = 0; i < this.ram.slots.length; i++) {
      const slot = this.ram.slots[i]!;
      if (address >= slot.gpa && address + bytes <= slot.gpa + slot.bytes) {
        return slot.offset + (address - slot.gpa);
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
    const offset = this.requireOffset(address, bytes.length);
    // Not write(2), which hugetlbfs does not have.
    for (let done = 0; done < bytes.length; ) {
      const within = (offset + done) % WINDOW_BYTES;
      const window = this.window(offset + done);
      const part = bytes.subarray(done, done + Math.min(bytes.length - done, window.byteLength - within));
      new Uint8Array(window.buffer, window.byteOffset + within, part.length).set(part);
      done += part.length;
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

  /** All RAM reads as zero again, and costs nothing unless it is reserved. The guest must not be running. */
  clear(): void {
    const { hugePages, privateRanges } = this.ram;
    for (const { offset, bytes } of privateRanges)
      check("madvise", madvise(hva(this.base + offset), bytes, MADV_DONTNEED));
    // What is given back to hugetlbfs somebody else may take.
    if (hugePages !== "hugetlb") punchHole(this.ram.fd, 0, this.totalBytes);
    else for (let at = 0; at < this.totalBytes; at += WINDOW_BYTES) this.window(at).fill(0);
  }

  private requireOffset(address: number, bytes: number): number {
    const offset = this.offsetOf(address, bytes);
    if (offset < 0) throw new RangeError(`${bytes} bytes at gpa 0x${address.toString(16)} are not guest RAM`);
    return offset;
  }

  /** The window that holds the range, which begins at its word `firstWord`; undefined when it is not all there. */
  private windowFor(address: number, bytes: number): Uint32Array | undefined {
    const offset = this.offsetOf(address, bytes);
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
