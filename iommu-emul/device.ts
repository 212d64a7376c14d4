// What an emulated PCI device is to the rest: what it shows of itself, its registers, and what it can do to the guest,
// which is DMA through the software IOMMU and message-signalled interrupts, and nothing else. Types only. A device
// lives on a thread of its own (vmm/emul/), so nothing of it needs a lock. Bus addresses are IOVAs as the guest wrote
// them: any 64-bit value, as a double, and then out of every range where it is 2^53 or more.

import type { PolicyName } from "../hypercalls/abi.js";

/** Bytes of one register access. The machine splits accesses of 8 into two of 4, the low one first. */
export type AccessBytes = 1 | 2 | 4;

/** A BAR: memory, a power of two of at least 4096 bytes, of which all accesses are trapped. */
export interface BarDescription {
  /** 0 to 5. A BAR of 64 bits takes the next place as well. */
  readonly index: number;
  readonly bytes: number;
  readonly bits: 32 | 64;
}

/** What configuration space shows; the machine does the rest (BARs, command, MSI, reset) by itself. */
export interface PciDescription {
  readonly vendorId: number;
  readonly deviceId: number;
  readonly subsystemVendorId: number;
  readonly subsystemId: number;
  readonly revision: number;
  /** Base class, sub-class and programming interface, 24 bits. */
  readonly classCode: number;
  /** The device's own. */
  readonly bars: readonly BarDescription[];
  /**
   * Message-signalled interrupts: one kind. With MSI-X, table and pending bits are in a BAR of 32 bits that holds no
   * more: the machine makes it, at `bar`, a place that is free in `bars`.
   */
  readonly interrupts:
    | { readonly kind: "msi"; readonly vectors: number }
    | { readonly kind: "msix"; readonly vectors: number; readonly bar: number };
}

/** Why an access to memory was refused; 0 when it was not. */
export const DMA_FAULT = {
  none: 0,
  /** Nothing is mapped there for the device. */
  notMapped: 1,
  /** Mapped, but not for reading, or not for writing. */
  access: 2,
  /** Outside what the IOMMU translates (2^48), or beyond. */
  range: 3,
  /** The guest has not turned on bus mastering. */
  noBusMaster: 4,
} as const;
export type DmaFault = (typeof DMA_FAULT)[keyof typeof DMA_FAULT];

/** What writeInPlace returns when it did nothing. */
export const REFUSED = -(2 ** 31);

/**
 * A device's way to guest memory. read and write go page by page in ascending order, and end at the first page that is
 * refused, which is recorded: what lies before it was done, what lies after it was not touched. `bytes` may be 0. When
 * an unmap has returned, no access that began before it is still under way, and none sees what was mapped.
 */
export interface DmaPort {
  /** Copies `bytes` bytes of memory at `iova` to `into`, from its offset `at` on. */
  read(iova: number, into: Buffer, at: number, bytes: number): DmaFault;
  /** Copies `bytes` bytes of `from`, from its offset `at` on, to memory at `iova`. */
  write(iova: number, from: Buffer, at: number, bytes: number): DmaFault;
  /**
   * Has a system call put the device's data where it belongs, without a copy of it: calls `move` once, with the address
   * of `count` (1 to 1024) struct iovec over the memory of all segments in their order, and returns what it returned.
   * Unmaps wait until it returns, so it must not wait for a disk. It may fill any part of the memory. REFUSED, and
   * nothing is done or recorded, when memory cannot be had in place, or some of it not at all: write() then does what
   * can be done, and records why. `lengths` are more than 0.
   */
  writeInPlace(
    iovas: Float64Array,
    lengths: Int32Array,
    segments: number,
    move: (vectors: number, count: number) => number,
  ): number;
}

/**
 * System calls that Node has no function for. All are optional: a device does without what is missing, as is said of
 * each. Numbers returned are bytes, or -errno.
 */
export interface FileNatives {
  /** Where a buffer's bytes are in this process; for the three below. Missing: none is used. */
  readonly addressOf?: (buffer: ArrayBufferView) => number;
  /** preadv2 with RWF_NOWAIT of one piece: what is cached, -EAGAIN when nothing is. Missing: reads wait for the disk. */
  readonly readCached?: (fd: number, address: number, bytes: number, offset: number) => number;
  /** The same into `count` struct iovec. Missing: one more copy. */
  readonly readCachedInto?: (fd: number, vectors: number, count: number, offset: number) => number;
  /** pwrite. Missing: Node's, which costs some microseconds more. */
  readonly write?: (fd: number, address: number, bytes: number, offset: number) => number;
  /** fallocate, PUNCH_HOLE and KEEP_SIZE; throws. Missing: deallocating does nothing, zeroes are written. */
  readonly punchHole?: (fd: number, offset: number, bytes: number) => void | Promise<void>;
  /** flock, exclusive or shared, without waiting: 0 or -errno. Missing: other users of the file are not noticed. */
  readonly lock?: (fd: number, exclusive: boolean) => number;
}

/** What a device is given. */
export interface DeviceHost {
  readonly dma: DmaPort;
  readonly natives: FileNatives;
  /** Signals a vector (0 to vectors - 1); kept while the guest has it masked, lost while interrupts are off. */
  interrupt(vector: number): void;
  /**
   * Runs `then` on the device's thread with what `operation` comes to. Until then the device is asked for work as
   * before. Both functions of a device that was reset in the meantime are the device's to ignore.
   */
  later<T>(operation: Promise<T>, then: (result: T) => void, failed: (error: Error) => void): void;
  /** A line for the user, about this device. */
  warn(line: string): void;
}

/** A device at work. Nothing here throws for what the guest does. */
export interface EmulatedDevice {
  /** The guest reads a register: `offset` lies in the BAR, naturally aligned. Returns an unsigned value. */
  read(bar: number, offset: number, bytes: AccessBytes): number;
  /** The guest writes a register. */
  write(bar: number, offset: number, bytes: AccessBytes, value: number): void;
  /**
   * Does a bounded piece of the work that waits (a millisecond or so). False when nothing waits: it is asked again after
   * the next register access and whenever something of `later` has come in.
   */
  work(): boolean;
  /** To the state after power-on: function level reset, and the machine's end. No DMA of before happens afterwards. */
  reset(): void;
  /** The machine is gone: gives back files. What the guest was told to be stored is stored when this settles. */
  close(): Promise<void>;
}

/** What a device may need to know of the machine. */
export interface MachineFacts {
  readonly cpus: number;
}

/**
 * A kind of device: `--assign emul:NAME,KEY=VALUE…`. To add one, write a file with one of these, and enter it in
 * models.ts.
 */
export interface DeviceModel<Options> {
  readonly name: string;
  /** For --help: the keys, one line each. */
  readonly help: readonly string[];
  /** The policy of its devices unless the user names one; left out: as for others. */
  readonly policy?: PolicyName;
  /**
   * Checks what the user wrote (zod), before anything is touched; returns plain data that goes to the device's thread.
   * Throws a ZodError, or an Error whose message says what is wrong.
   */
  parse(keys: Readonly<Record<string, string>>): Options;
  /** Main thread: looks at files and the like without changing them. Throws an Error that names the thing and why. */
  check(options: Options): void;
  describe(options: Options, machine: MachineFacts): PciDescription;
  /** On the device's thread. Throws an Error whose message says what cannot be had. */
  create(options: Options, host: DeviceHost, machine: MachineFacts): EmulatedDevice;
}
