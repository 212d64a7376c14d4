// The contract between guest and host: call numbers, call frames, status, limits. Written once, here; the C
// header of the guest is generated from it (cheader.ts) and a test fails when the two differ. Numbers only, no code
// that runs on either side.
//
// How it may grow. The version is (major << 16) | minor. A new call, a new feature bit, or a meaning for a field
// that had to be zero raises minor, and an older guest goes on working: hosts answer calls they do not know with
// invalid/ENOSYS, guests ignore feature bits and flags they do not know. Anything else raises major; a guest refuses
// a host of another major.

export const ABI_MAJOR = 1;
export const ABI_MINOR = 2;
export const ABI_VERSION = (ABI_MAJOR << 16) | ABI_MINOR;

/**
 * Discovery: a block of CPUID leaves in the hypervisor range, found by looking at `first`, `first + step`, … up to
 * `last` for the signature in EBX, ECX, EDX (the scan guests do for every stacked hypervisor interface; KVM's own
 * block is at 0x40000000).
 */
export const CPUID = {
  first: 0x40000100,
  last: 0x4000ff00,
  step: 0x100,
  signature: "PVDMA.PVDMA.",
  /** EAX: highest leaf of the block. EBX, ECX, EDX: signature. */
  leafSignature: 0,
  /** EAX: ABI version. EBX: feature bits. ECX: I/O port, bits 15:0. EDX: entries that fit a call page. */
  leafInterface: 1,
  /** EAX: most pages one call maps. EBX, ECX, EDX: zero. */
  leafLimits: 2,
} as const;

/** The port a call is made with: one 32-bit `out`, EAX the call number, DX the port. */
export const PORT = 0x0b50;

/** Feature bits (CPUID leafInterface.EBX, and probe). */
export const FEATURE = {
  /** map_list and unmap_list are there. */
  list: 1 << 0,
  /** release is there, and is_assigned tells what the host has (since 1.1). */
  release: 1 << 1,
  /** Devices with policy cached have a tracking table, and table tells where (since 1.2). */
  table: 1 << 2,
} as const;
/** What this host has: all of them. CPUID and probe say the same. */
export const FEATURES = FEATURE.list | FEATURE.release | FEATURE.table;

/**
 * An entry of the tracking table: one 32-bit word per page frame of the guest, from gpa 0 on, in memory that the host
 * provides. Both sides change it by sequentially consistent atomic operations only. The guest owns the count and sets
 * `used`; the host owns `pinned` and clears `used`. (Since 1.2.)
 *
 * To map, the guest adds one to the count of every page. Where `pinned` was set in all of them the device reaches the
 * pages, at IOVA = gpa, and stays able to until the counts are 0 again. Where it was not, the guest makes the map call, with
 * MAP_FLAG.counted, and subtracts again if that fails. To unmap it subtracts. The host gives a page back only by a
 * compare-and-swap from count 0. How this goes wrong if a step is left out: test/model/tracking.pml.
 */
export const TABLE = {
  countMask: 0x3fffffff,
  /** The page was mapped since the host last looked. */
  used: 0x40000000,
  /** The device reaches the page while the count is above 0. */
  pinned: 0x80000000,
} as const;

export const LIMITS = {
  /** A call page is one guest page, aligned. */
  callPageBytes: 4096,
  /** A list entry or an IOVA range in the call page: two 64-bit words. */
  entryBytes: 16,
  /** Entries that fit a call page. */
  listEntries: 256,
  /** Most pages one map or map_list covers (1 GiB). */
  mapPages: 1 << 18,
  /** Most devices a guest has assigned; handles are 1 to this. */
  devices: 32,
} as const;

/** What the device may do with the pages, and how they are placed. Other bits must be zero. */
export const MAP_FLAG = {
  /** The device reads memory (DMA_TO_DEVICE). */
  read: 1 << 0,
  /** The device writes memory (DMA_FROM_DEVICE). */
  write: 1 << 1,
  /** Align the IOVA to the length rounded up to a power of two, as dma_alloc_coherent promises drivers. */
  align: 1 << 2,
  /**
   * The guest has counted the pages of this map in the tracking table, and will not unmap them by a call. Only for devices
   * with one. (Since 1.2.) Without it the host counts: unmap then takes it back.
   */
  counted: 1 << 3,
} as const;

/** Policies, from the laxest to the strictest. */
export const POLICY = { pinned: 0, cached: 1, lazy: 2, strict: 3 } as const;
export type PolicyName = keyof typeof POLICY;

/** is_assigned, rsi. */
export const DEVICE_FLAG = {
  /** Bits 7:0 hold the policy. */
  policyMask: 0xff,
  /** IOVA = gpa for this device. With policy pinned a guest needs no call at all. */
  identity: 1 << 8,
} as const;

/**
 * Status, in RAX: bits 7:0 the class, bits 31:8 an errno (Linux numbering) that says more, 0 where there is
 * nothing more to say. A guest decides by the class alone.
 */
export const STATUS = {
  /** Done. */
  ok: 0,
  /** Nothing wrong, ask again. */
  retry: 1,
  /**
   * A quota, the locked-memory limit, the entry limit or no IOVA left, and the host has given back what it may; passes when
   * something is unmapped. It is the host's request to drop what no driver uses, of whatever device, and to ask once more.
   */
  limit: 2,
  /** The guest's mistake; nothing was changed. */
  invalid: 3,
  /** The device is no longer there. */
  gone: 4,
} as const;
export type StatusClass = keyof typeof STATUS;

/** A register of a call frame. RAX and RDX (the port) are taken; every register not named OUT keeps its value. */
export type FrameRegister = "rdi" | "rsi" | "r8" | "r9" | "r10";
/** The frame's registers in the order in which the dispatcher sees them as arguments 0 to 4 and results 0 to 4. */
export const FRAME_REGISTERS = ["rdi", "rsi", "r8", "r9", "r10"] as const satisfies readonly FrameRegister[];

export interface CallSpec {
  readonly number: number;
  readonly about: string;
  readonly in: Partial<Record<FrameRegister, string>>;
  readonly out: Partial<Record<FrameRegister, string>>;
}

/**
 * The calls. IN: RAX, the call number, beside what is listed. OUT: RAX, the status; the other OUT registers are
 * valid with status ok, and `entries done` with every status.
 */
export const CALLS = {
  probe: {
    number: 1,
    about: "What the host offers. Changes nothing.",
    in: {
      rdi: "the guest's ABI version",
      rsi: "gpa of a call page that receives the IOVA ranges as {u64 first, u64 last}; 0 for none",
    },
    out: {
      rdi: "the host's ABI version",
      rsi: "feature bits",
      r8: "page sizes the IOMMU maps, a bit mask (bit 12 is 4 KiB)",
      r9: "most bytes that may be pinned; 0 for no quota",
      r10: "IOVA ranges written",
    },
  },
  is_assigned: {
    number: 2,
    about:
      "Whether the host gives this device to the guest. Asked once per device, the answer does not change.",
    in: { rdi: "segment << 16 | bus << 8 | device << 3 | function, as the guest numbers them" },
    out: {
      rdi: "handle for the other calls; 0: not an assigned device",
      rsi: "policy, and DEVICE_FLAG bits",
      r8: "bits of IOVA the IOMMU translates for it",
      r9: "runs of contiguous memory that its IOMMU domain maps at a time, all devices of the domain together; 0: not told (since 1.1)",
      r10: "most bytes that can be pinned for it at a time; 0: no limit is known (since 1.1)",
    },
  },
  map: {
    number: 3,
    about: "Makes every page that the bytes touch reachable for the device.",
    in: {
      rdi: "handle",
      rsi: "gpa of the first byte; the range must lie in guest RAM",
      r8: "bytes, at least 1",
      r9: "last IOVA the device can emit (its DMA mask)",
      r10: "MAP_FLAG bits, read or write at least",
    },
    out: { rdi: "IOVA of the first byte; the offset in the page is kept" },
  },
  unmap: {
    number: 4,
    about:
      "Takes back what one map or map_list gave. Range and length must be those of that mapping, to the page. " +
      "When it returns ok under policy strict the device reaches none of it any more.",
    in: {
      rdi: "handle",
      rsi: "IOVA of any byte of the mapping's first page",
      r8: "bytes from there to its end",
    },
    out: { rdi: "bytes unmapped, whole pages" },
  },
  map_list: {
    number: 5,
    about:
      "Maps a list as one contiguous IOVA range: the pages that each entry touches, one entry after the other. " +
      "All or nothing: with another status than ok nothing of it is mapped, except in the rare case that the host " +
      "cannot undo a part; that part stays pinned, and its IOVA is given to nobody. With policy cached pages may stay mapped " +
      "that nobody has mapped. A device with identity needs a list that is contiguous, unless the guest counted its pages: each then is where its gpa says.",
    in: {
      rdi: "handle",
      rsi: "gpa of the call page: entries {u64 gpa, u64 bytes}",
      r8: "entries, 1 to 256",
      r9: "last IOVA the device can emit (its DMA mask)",
      r10: "MAP_FLAG bits, read or write at least",
    },
    out: {
      rdi: "IOVA of the range's first page",
      rsi: "entries done: all, or the index of the first that could not be done",
    },
  },
  unmap_list: {
    number: 6,
    about: "Unmaps a list of mappings, in order, up to the first that fails.",
    in: {
      rdi: "handle",
      rsi: "gpa of the call page: entries {u64 iova, u64 bytes}, each as unmap takes them",
      r8: "entries, 1 to 256",
    },
    out: { rdi: "bytes unmapped, whole pages", rsi: "entries done" },
  },
  release: {
    number: 7,
    about:
      "Takes back every mapping of a device whose driver is gone (since 1.1); none of a device that has its domain's " +
      "addresses, identity, in common with others: see table. The caller has stopped the device " +
      "first: bus mastering off, or reset. With another status than ok some of it stays mapped; asking again tries again.",
    in: { rdi: "handle" },
    out: { rdi: "mappings taken back", rsi: "bytes of them, whole pages" },
  },
  table: {
    number: 8,
    about:
      "Where the tracking table is that this device's policy cached uses (since 1.2). Devices of one domain have one in " +
      "common. Begun anew, when a kernel finds it for the first time and when the last driver of such a device is gone, " +
      "nothing is mapped and all counts are 0; the devices of the domain have to be stopped.",
    in: { rdi: "handle", rsi: "1 to begin anew, else 0" },
    out: { rdi: "gpa of the table, whole pages", rsi: "entries; 0: this device has none" },
  },
} as const satisfies Record<string, CallSpec>;
export type CallName = keyof typeof CALLS;
export const CALL_NAMES = Object.keys(CALLS) as CallName[];
