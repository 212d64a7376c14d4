// The C library as the VMM uses it: the system calls Node has no function for. The only place koffi is used.
// Failing calls return -errno, as the kernel does, so that hot paths need neither exceptions nor a second look.

import koffi from "koffi";
import { type Hva, hva } from "../../hypercalls/addresses.js";
import { SystemError } from "../errors.js";

const c = koffi.load(null);
const cIoctl = c.func("ioctl", "int", ["int", "ulong", "uintptr_t"]) as (
  fd: number,
  request: number,
  arg: number,
) => number;
const cIoctlStruct = c.func("ioctl", "int", ["int", "ulong", "void *"]) as (
  fd: number,
  request: number,
  arg: ArrayBufferView,
) => number;
const cMmap = c.func("mmap", "uintptr_t", ["uintptr_t", "size_t", "int", "int", "int", "int64_t"]) as (
  address: number,
  bytes: number,
  protection: number,
  flags: number,
  fd: number,
  offset: number,
) => number;
const cMunmap = c.func("munmap", "int", ["uintptr_t", "size_t"]) as (
  address: number,
  bytes: number,
) => number;
const cMadvise = c.func("madvise", "int", ["uintptr_t", "size_t", "int"]) as (
  a: number,
  b: number,
  c: number,
) => number;
const cMemfdCreate = c.func("memfd_create", "int", ["str", "uint"]) as (
  name: string,
  flags: number,
) => number;
const cEventfd = c.func("eventfd", "int", ["uint", "int"]) as (initial: number, flags: number) => number;
const cRead = c.func("read", "int64_t", ["int", "void *", "size_t"]) as (
  fd: number,
  into: ArrayBufferView,
  bytes: number,
) => number;
const cLseek = c.func("lseek", "int64_t", ["int", "int64_t", "int"]) as (
  fd: number,
  offset: number,
  whence: number,
) => number;
const cGettid = c.func("gettid", "int", []) as () => number;
const cTgkill = c.func("tgkill", "int", ["int", "int", "int"]) as (
  pid: number,
  tid: number,
  signal: number,
) => number;
const cFallocate = c.func("fallocate", "int", ["int", "int", "int64_t", "int64_t"]) as (
  fd: number,
  mode: number,
  offset: number,
  bytes: number,
) => number;
const cPreadv2 = c.func("preadv2", "int64_t", ["int", "uintptr_t", "int", "int64_t", "int"]) as (
  fd: number,
  pieces: number,
  count: number,
  offset: number,
  flags: number,
) => number;
const cPwrite = c.func("pwrite", "int64_t", ["int", "uintptr_t", "size_t", "int64_t"]) as (
  fd: number,
  address: number,
  bytes: number,
  offset: number,
) => number;
const cFlock = c.func("flock", "int", ["int", "int"]) as (fd: number, operation: number) => number;
const cRlimit = koffi.struct("rlimit", { rlim_cur: "uint64_t", rlim_max: "uint64_t" });
interface Rlimit {
  rlim_cur: number | bigint;
  rlim_max: number | bigint;
}
const cGetrlimit = c.func("getrlimit", "int", ["int", koffi.out(koffi.pointer(cRlimit))]) as (
  r: number,
  out: Rlimit,
) => number;
const cSetrlimit = c.func("setrlimit", "int", ["int", koffi.pointer(cRlimit)]) as (
  r: number,
  limits: Rlimit,
) => number;

const PROT_NONE = 0;
export const PROT_READ = 1;
export const PROT_WRITE = 2;
export const MAP_SHARED = 1;
const MAP_PRIVATE = 2;
const MAP_FIXED = 0x10;
const MAP_ANONYMOUS = 0x20;
export const MAP_NORESERVE = 0x4000;
export const MADV_DONTNEED = 4;
export const MADV_HUGEPAGE = 14;
export const MADV_DONTDUMP = 16;
const MAP_FAILED = 2 ** 64;
const MFD_CLOEXEC = 1;
/** MFD_HUGETLB, and MFD_HUGE_2MB. */
export const MFD_HUGETLB_2M = 4 | (21 << 26);
const EFD_CLOEXEC = 0o2000000;
const EFD_NONBLOCK = 0o4000;
const FALLOC_FL_KEEP_SIZE = 1;
const FALLOC_FL_PUNCH_HOLE = 2;
const SEEK_END = 2;
const RWF_NOWAIT = 8;
const LOCK_SH = 1;
const LOCK_EX = 2;
const LOCK_NB = 4;
const RLIMIT_NOFILE = 7;
const RLIMIT_MEMLOCK = 8;

const codeOf = new Map(Object.entries(koffi.os.errno).map(([code, number]) => [number, code]));

/** The symbolic name of an errno, "ENOMEM" for 12. */
export const errnoName = (errno: number): string => codeOf.get(errno) ?? `errno ${errno}`;

/** Throws a SystemError when `result` is a -errno; returns it otherwise. */
export function check(call: string, result: number): number {
  if (result < 0) throw new SystemError(call, -result, errnoName(-result));
  return result;
}

/** ioctl with an integer or an address in native memory as argument: result, or -errno. Allocates nothing. */
export function ioctl(fd: number, request: number, arg: number): number {
  const result = cIoctl(fd, request, arg);
  return result < 0 ? -koffi.errno() : result;
}

/**
 * ioctl with a structure in a JavaScript buffer: result, or -errno. The buffer must be at least as large as the
 * structure the request number names and stay alive until the call returns (the kernel keeps no pointer to it).
 */
export function ioctlStruct(fd: number, request: number, struct: ArrayBufferView): number {
  const result = cIoctlStruct(fd, request, struct);
  return result < 0 ? -koffi.errno() : result;
}

/**
 * An ioctl that is made again and again with the same argument, a number or a structure: result, or -errno. The bytes of the
 * structure may change between calls; the caller keeps it reachable. Allocates nothing: an address that a closure holds
 * is passed as it is, one that a property holds would be boxed for every call.
 */
export function preparedIoctl(fd: number, request: number, arg: number | DataView): () => number {
  const value: number = typeof arg === "number" ? arg : addressOf(arg);
  return () => {
    const result = cIoctl(fd, request, value);
    return result < 0 ? -koffi.errno() : result;
  };
}

/**
 * Where a JavaScript buffer's bytes are, for structures that point to others. The caller keeps the buffer reachable
 * until the kernel is done; V8 does not move it.
 */
export const addressOf = (view: ArrayBufferView): Hva => hva(Number(koffi.address(view)));

/** What mmap returned. Throws when that is no address. */
function mapped(address: number): Hva {
  if (address >= MAP_FAILED - 4096) check("mmap", -koffi.errno());
  return hva(address);
}

/**
 * mmap of a file, shared, at an address of the kernel's choosing, or at `at` instead of what is there. `bytes` and `offset`
 * whole pages. Throws.
 */
export function mmapShared(
  fd: number,
  bytes: number,
  offset: number,
  protection: number,
  flags = 0,
  at?: Hva,
): Hva {
  const where = at === undefined ? 0 : MAP_FIXED;
  return mapped(cMmap(at ?? 0, bytes, protection, MAP_SHARED | where | flags, fd, offset));
}

/** Memory of this process alone, all zero, to read and write, at `at` instead of what is there; whole pages. Throws. */
export function mmapPrivate(at: Hva, bytes: number): void {
  const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
  mapped(cMmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0));
}

/**
 * Keeps a range of addresses free for what is to be mapped there, from a multiple of `alignment` (a power of two) on; both
 * whole pages. Throws.
 */
export function reserveAddresses(bytes: number, alignment: number): Hva {
  const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  const first = mapped(cMmap(0, bytes + alignment, PROT_NONE, flags, -1, 0));
  const start = hva(Math.ceil(first / alignment) * alignment);
  if (start > first) munmap(first, start - first);
  // What follows is a page at least: first and start are both whole pages, and start - first is less than the alignment.
  munmap(hva(start + bytes), first + alignment - start);
  return start;
}

/** Views of the range must not be used afterwards: the engine does not know that they dangle. */
export function munmap(address: Hva, bytes: number): void {
  if (cMunmap(address, bytes) < 0) check("munmap", -koffi.errno());
}

/** Best effort: 0 or -errno. */
export const madvise = (address: Hva, bytes: number, advice: number): number =>
  cMadvise(address, bytes, advice) < 0 ? -koffi.errno() : 0;

/** An anonymous file in memory, `flags` MFD_* beside CLOEXEC; the name shows in /proc/PID/maps. Throws. */
export function memfdCreate(name: string, flags = 0): number {
  const fd = cMemfdCreate(name, MFD_CLOEXEC | flags);
  return fd < 0 ? check("memfd_create", -koffi.errno()) : fd;
}

/** A non-blocking event counter of 0. Throws. */
export function eventfd(): number {
  const fd = cEventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  return fd < 0 ? check("eventfd", -koffi.errno()) : fd;
}

/**
 * Reads from a file that does not block: bytes, or -errno (EAGAIN: nothing is there). For files that are looked at
 * again and again: Node's readSync makes an exception of every look in vain.
 */
export function readNow(fd: number, into: ArrayBufferView): number {
  const bytes = cRead(fd, into, into.byteLength);
  return bytes < 0 ? -koffi.errno() : bytes;
}

/** Goes to the end of a file: 0 or -errno. */
export const seekToEnd = (fd: number): number => (cLseek(fd, 0, SEEK_END) < 0 ? -koffi.errno() : 0);

/** Gives a file's range back to the system; it reads as zeroes afterwards. Throws. */
export function punchHole(fd: number, offset: number, bytes: number): void {
  if (cFallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, bytes) < 0) {
    check("fallocate", -koffi.errno());
  }
}

/** struct iovec of one piece: address and bytes, 64 bits each. In an ArrayBuffer of its own, which does not move. */
const piece = new Uint32Array(new ArrayBuffer(16));
const pieceAddress = addressOf(piece);

/**
 * Reads what the page cache has of a file to native memory, without waiting: bytes, which may be fewer, or -errno
 * (EAGAIN: nothing is cached; EOPNOTSUPP: the file system cannot tell). Allocates nothing.
 */
export function readCached(fd: number, address: number, bytes: number, offset: number): number {
  piece[0] = address % 2 ** 32;
  piece[1] = address / 2 ** 32;
  piece[2] = bytes;
  return readCachedInto(fd, pieceAddress, 1, offset);
}

/** The same for several pieces: `vectors` is the address of `count` (1 to 1024) struct iovec. Allocates nothing. */
export function readCachedInto(fd: number, vectors: number, count: number, offset: number): number {
  const done = cPreadv2(fd, vectors, count, offset, RWF_NOWAIT);
  return done < 0 ? -koffi.errno() : done;
}

/** Writes native memory to a file: bytes, which may be fewer, or -errno. Allocates nothing. */
export function writeAt(fd: number, address: number, bytes: number, offset: number): number {
  const done = cPwrite(fd, address, bytes, offset);
  return done < 0 ? -koffi.errno() : done;
}

/** Locks an open file against other opens of it (flock), without waiting: 0 or -errno (EAGAIN: it is locked). */
export const lockFile = (fd: number, exclusive: boolean): number =>
  cFlock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) < 0 ? -koffi.errno() : 0;

/** The kernel's id of the calling thread. */
export const gettid = (): number => cGettid();

/** Sends a signal to one thread of this process: 0 or -errno. */
export const signalThread = (tid: number, signal: number): number =>
  cTgkill(process.pid, tid, signal) < 0 ? -koffi.errno() : 0;

/** Raises the soft limit of open files to the hard one: one file per interrupt vector adds up. */
export function raiseOpenFilesLimit(): void {
  const limits: Rlimit = { rlim_cur: 0, rlim_max: 0 };
  if (cGetrlimit(RLIMIT_NOFILE, limits) === 0) {
    cSetrlimit(RLIMIT_NOFILE, { rlim_cur: limits.rlim_max, rlim_max: limits.rlim_max });
  }
}

/** The soft limit of locked memory in bytes; Infinity where there is none. */
export function lockedMemoryLimitBytes(): number {
  const limits: Rlimit = { rlim_cur: 0, rlim_max: 0 };
  if (cGetrlimit(RLIMIT_MEMLOCK, limits) !== 0) return Number.POSITIVE_INFINITY;
  const soft = Number(limits.rlim_cur);
  return soft >= 2 ** 63 ? Number.POSITIVE_INFINITY : soft;
}
