// What limits how much the guest's drivers can have mapped at a time: the IOMMU domain's entries, locked memory, the
// quotas. Which of them are too small to begin with, said before a driver fails. Reads /proc only.

import { readFileSync } from "node:fs";
import { lockedMemoryLimitBytes } from "./native/libc.js";
import { sizeText } from "./schemas.js";

/** capability.h: no limit on locked memory. */
const CAP_IPC_LOCK = 14;

/**
 * What RLIMIT_MEMLOCK lets this process pin through VFIO, in bytes; 0 where there is no limit, for its size or for
 * CAP_IPC_LOCK. (A limit of no bytes at all is 1.)
 */
export function lockableBytes(): number {
  const limit = lockedMemoryLimitBytes();
  if (!Number.isFinite(limit) || hasIpcLock()) return 0;
  return Math.max(limit, 1);
}

/** VFIO asks capable(), so a capability counts in the first user namespace alone, not in a rootless container. */
function hasIpcLock(): boolean {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1] ?? "0";
  const initialNamespace = /^\s*0\s+0\s+4294967295\s*$/.test(readFileSync("/proc/self/uid_map", "utf8"));
  return initialNamespace && ((BigInt(`0x${effective}`) >> BigInt(CAP_IPC_LOCK)) & 1n) === 1n;
}

/** What there is for one device, all of it together. */
export interface DmaRoom {
  /** Mappings that its IOMMU domain takes at a time, and what to raise for more. */
  readonly entries: number;
  readonly raiseEntries: string;
  /** Bytes: its own quota, the VM's, and what the process may lock; 0 for no limit. */
  readonly quotaBytes: number;
  readonly vmQuotaBytes: number;
  readonly lockableBytes: number;
  readonly raiseLockable: string;
  /** What the smallest mapping may pin, where that is more than its pages: policy cached's granule. */
  readonly mappingBytes?: number | undefined;
}

/** Where the limits of a device's IOMMU come from, in words: what to raise. */
export const RAISE = {
  vfio: { raiseEntries: "dma_entry_limit of vfio_iommu_type1", raiseLockable: "raise it (ulimit -l)" },
  emulated: { raiseEntries: "entries= of --emul-iommu", raiseLockable: "raise locked= of --emul-iommu" },
} as const;

/**
 * What says, in a line each, that a device's driver will hardly probe, and what to raise. Measured with NVMe on Linux
 * 6.12: probed and at rest, its driver keeps 4 + 2 per vCPU mappings, of 16 + 80 per vCPU KiB. Beside those it takes a
 * few to do anything; less than 4 mappings or 32 KiB more is too little.
 */
export function smallRoom(room: DmaRoom, cpus: number): string[] {
  const entries = 4 + 2 * cpus + 4;
  const bytes = Math.max((16 + 80 * cpus + 32) * 2 ** 10, entries * (room.mappingBytes ?? 0));
  const limits = [
    { has: room.quotaBytes, what: "its --dma-limit", raise: "raise it" },
    { has: room.vmQuotaBytes, what: "the --dma-limit of the VM", raise: "raise it" },
    { has: room.lockableBytes, what: "the limit of locked memory", raise: room.raiseLockable },
  ].filter(({ has }) => has > 0 && has < bytes);
  return [
    ...(room.entries < entries
      ? [
          `its IOMMU domain takes ${room.entries} mappings at a time, too few for most drivers to probe; ` +
            `raise ${room.raiseEntries}`,
        ]
      : []),
    ...limits.map(
      ({ has, what, raise }) => `${what} is ${sizeText(has)}, too little for most drivers to probe; ${raise}`,
    ),
  ];
}
