// Accesses of assigned devices that the IOMMU refused: counted, and told once per burst. A software IOMMU reports them.
// VFIO's type1 does not, so this reads what the host's kernel logs of them (/dev/kmsg); where the log cannot be read
// (without CAP_SYSLOG, under dmesg_restrict) there is nothing to count. Bus addresses are text, as the kernel wrote them.

import { closeSync, constants, openSync } from "node:fs";
import { readNow, seekToEnd } from "./native/libc.js";

/** An access that the IOMMU refused. */
export interface Fault {
  /** Its name; a BDF in full ("0000:02:00.0"), or without the segment ("02:00.0") where the kernel names none. */
  readonly device: string;
  readonly access: "read" | "write";
  /** Hexadecimal, without 0x. */
  readonly iova: string;
  /** The IOMMU's own words. */
  readonly why: string;
}

/** Where faults are told. */
export interface FaultSource {
  /** Whether all are; the host's kernel, for one, tells some. */
  readonly complete: boolean;
  /** Hands over those since the last call. `more` that are like it were not recorded. */
  read(each: (fault: Fault, more?: number) => void): void;
}

// Intel, drivers/iommu/intel/dmar.c, dmar_fault_do_one(). The brackets have NO_PASID or PASID 0x1 since 5.14; before,
// "PASID ffffffff" stood before "fault addr", and numbers had no 0x.
const INTEL =
  /^DMAR: \[DMA (Read|Write)(?: NO_PASID| PASID 0x[0-9a-f]+)?\] Request device \[([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])\](?: PASID [0-9a-f]+)? fault addr (?:0x)?([0-9a-f]+) \[fault reason [0-9a-fx]+\] (.+)$/;

// AMD, drivers/iommu/amd/iommu.c, amd_iommu_report_page_fault(): of a device with a driver by dev_err(), else with
// device=, which has a segment since 5.19.
const AMD =
  /^(?:\S+ ([0-9a-f:.]+): )?AMD-Vi: Event logged \[IO_PAGE_FAULT (?:device=([0-9a-f:.]+) )?domain=0x[0-9a-f]+ address=0x([0-9a-f]+) flags=0x([0-9a-f]+)\]$/;
const AMD_FLAG_INTERRUPT = 0x08;
const AMD_FLAG_PRESENT = 0x10;
const AMD_FLAG_WRITE = 0x20;

/** Without the zeroes that some kernels put in front. */
const shortHex = (digits: string): string => digits.replace(/^0+(?=.)/, "");

/** The fault that a message of the kernel is about, if it is about one. */
export function parseFault(message: string): Fault | undefined {
  const intel = INTEL.exec(message);
  if (intel !== null) {
    const [, access, bdf, iova, why] = intel;
    return { device: bdf!, access: access === "Read" ? "read" : "write", iova: shortHex(iova!), why: why! };
  }
  const amd = AMD.exec(message);
  const bdf = amd?.[2] ?? amd?.[1];
  if (amd === null || bdf === undefined) return undefined;
  const flags = Number.parseInt(amd[4]!, 16);
  if (flags & AMD_FLAG_INTERRUPT) return undefined;
  return {
    device: bdf,
    access: flags & AMD_FLAG_WRITE ? "write" : "read",
    iova: shortHex(amd[3]!),
    why: flags & AMD_FLAG_PRESENT ? "mapped, but not for that" : "not mapped",
  };
}

/** A record of /dev/kmsg is no longer than this (CONSOLE_EXT_LOG_MAX up to 6.1; less since). */
const RECORD_BYTES = 8192;
/** Most records read at a time: a storm of messages must not hold the main thread. */
const RECORDS_AT_ONCE = 1000;
const EPIPE = 32;
/** Priorities of messages are facility * 8 + level; facility 0 is the kernel, everything else was written by programs. */
const PRIORITIES_OF_KERNEL = 8;

/** The message of a record of /dev/kmsg ("priority,number,time,flags;text", then lines of details), if it is the kernel's. */
export function kernelMessage(record: string): string | undefined {
  const parts = /^(\d+),[^;]*;(.*)/.exec(record);
  return parts !== null && Number(parts[1]) < PRIORITIES_OF_KERNEL ? parts[2] : undefined;
}

/** What the kernel logs from now on. */
export class KernelLog {
  private readonly record = Buffer.alloc(RECORD_BYTES);

  private constructor(private readonly fd: number) {}

  /** Undefined where there is no log, or none for this process. */
  static open(path = "/dev/kmsg"): KernelLog | undefined {
    let fd: number;
    try {
      fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    } catch {
      return undefined;
    }
    if (seekToEnd(fd) === 0) return new KernelLog(fd);
    closeSync(fd);
    return undefined;
  }

  /** Hands over the messages since the last call. */
  read(each: (message: string) => void): void {
    for (let count = 0; count < RECORDS_AT_ONCE; count++) {
      const bytes = readNow(this.fd, this.record);
      // Records that were overwritten before we came to them are lost; the next call gives the oldest there is.
      if (bytes === -EPIPE) continue;
      if (bytes <= 0) return;
      const message = kernelMessage(this.record.toString("latin1", 0, bytes));
      if (message !== undefined) each(message);
    }
  }

  close(): void {
    closeSync(this.fd);
  }
}

/** What the kernel logs of faults. */
export const loggedFaults = (log: Pick<KernelLog, "read">): FaultSource => ({
  complete: false,
  read: (each) =>
    log.read((message) => {
      const fault = parseFault(message);
      if (fault !== undefined) each(fault);
    }),
});

/**
 * How long no fault makes the end of a burst. The kernel logs ten at once, or as few as three (VT-d's handler asks its
 * limit three times for a fault that comes alone), and is then silent for 5 s (the default limit), so a burst that goes on
 * shows itself again after 5 s and the period of our looks.
 */
const QUIET_MS = 6000;

interface Burst {
  readonly beganMs: number;
  lastMs: number;
  /** Faults after the first. */
  more: number;
  readonly complete: boolean;
}

/** Attributes faults to the guest's devices. Main thread, on a timer. */
export class FaultWatch {
  private readonly bursts = new Map<string, Burst>();

  /** `devices` by name; `count` is called for faults of one of them, `say` with the lines for the user. */
  constructor(
    private readonly sources: readonly FaultSource[],
    private readonly devices: ReadonlyMap<string, { readonly handle: number }>,
    private readonly count: (handle: number, times: number) => void,
    private readonly say: (line: string) => void,
  ) {}

  /** Looks for what is new. `nowMs`: any clock that does not go back. */
  look(nowMs: number): void {
    for (const source of this.sources)
      source.read((fault, more = 0) => this.fault(fault, 1 + more, source.complete, nowMs));
    for (const [name, { lastMs }] of this.bursts) if (nowMs - lastMs >= QUIET_MS) this.endBurst(name);
  }

  /** Ends bursts that go on, with their last lines. */
  close(): void {
    for (const name of this.bursts.keys()) this.endBurst(name);
  }

  private fault({ device, access, iova, why }: Fault, times: number, complete: boolean, nowMs: number): void {
    const name = this.deviceOf(device);
    if (name === undefined) return;
    this.count(this.devices.get(name)!.handle, times);
    const burst = this.bursts.get(name);
    if (burst !== undefined) {
      burst.lastMs = nowMs;
      burst.more += times;
      return;
    }
    this.bursts.set(name, { beganMs: nowMs, lastMs: nowMs, more: times - 1, complete });
    this.say(
      `${name}: the IOMMU refused a ${access} at iova 0x${iova}: nothing is mapped there for it (${why})`,
    );
  }

  /**
   * One of ours, or undefined. Without a segment the message may be about a device of another segment, which then
   * passes for ours; hosts with assigned devices of the same number in two segments cannot be told better.
   */
  private deviceOf(told: string): string | undefined {
    if (this.devices.has(told)) return told;
    for (const name of this.devices.keys()) if (name.endsWith(`:${told}`)) return name;
    return undefined;
  }

  private endBurst(name: string): void {
    const { beganMs, lastMs, more, complete } = this.bursts.get(name)!;
    this.bursts.delete(name);
    if (more === 0) return;
    const seconds = Math.ceil((lastMs - beganMs) / 1000);
    const within = seconds > 1 ? `${seconds} s` : "a second";
    const known = complete ? "" : ", as far as the host logged them";
    this.say(`${name}: ${more} more of its accesses were refused within ${within}${known}`);
  }
}
