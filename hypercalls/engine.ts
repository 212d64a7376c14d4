// The engine: which devices the guest has, what their policies are, and every check of what the guest asks for,
// before a domain is touched. No ioctl, no file: what maps is behind backend.ts, guest memory behind guest-ram.ts.
// All addresses and lengths that come in are the guest's words, as numbers: any register value, rounded where it is
// 2^53 or more, and then out of every range.

import {
  ABI_VERSION,
  DEVICE_FLAG,
  FEATURE,
  LIMITS,
  MAP_FLAG,
  POLICY,
  type PolicyName,
  STATUS,
} from "./abi.js";
import { MAX_EXACT, PAGE_BYTES, pagesTouched } from "./addresses.js";
import type { BackendLimits, DmaBackend } from "./backend.js";
import { type Domain, IdentityDomain, LOCK_WORD, type MapAllFailure, TranslatedDomain } from "./domain.js";
import { GuestRam, type RamSlot, RunList } from "./guest-ram.js";
import { IOVA_BITS } from "./iova.js";
import { Mutex } from "./lock.js";
import { Pins } from "./pins.js";
import { createLanes, readLanes, type Stat, StatsLane } from "./stats.js";
import { ERRNO, INVALID_EINVAL, OK, status } from "./status.js";

/** One IOMMU domain. Identity domains are for the policies pinned and cached, translated ones for lazy and strict. */
export interface DomainConfig {
  readonly kind: "translated" | "identity";
  readonly limits: BackendLimits;
}

/** An assigned device. Its handle is its place in the list, from 1. */
export interface DeviceConfig {
  /** As the guest numbers it: segment << 16 | bus << 8 | device << 3 | function. */
  readonly bdf: number;
  readonly policy: PolicyName;
  /** Index of its domain. */
  readonly domain: number;
  /** Bits of IOVA that the IOMMU translates for it. */
  readonly addressBits: number;
}

/** Everything the engine is told, as plain data. */
export interface EngineConfig {
  readonly ram: readonly RamSlot[];
  readonly domains: readonly DomainConfig[];
  readonly devices: readonly DeviceConfig[];
  /** Most guest memory that may be pinned, in bytes; 0 for no quota. */
  readonly quotaBytes: number;
  /** Threads that have an engine: the vCPUs' and the main thread. */
  readonly lanes: number;
}

/** The engine's state: what a Worker is given (workerData, postMessage) to attach to it. */
export interface EngineState {
  readonly config: EngineConfig;
  readonly domains: readonly SharedArrayBuffer[];
  readonly devices: SharedArrayBuffer;
  readonly pins: SharedArrayBuffer;
  readonly lanes: SharedArrayBuffer;
}

const INVALID_HANDLE = status(STATUS.invalid, ERRNO.ENODEV);
const INVALID_NOT_RAM = status(STATUS.invalid, ERRNO.EFAULT);
const INVALID_TOO_LONG = status(STATUS.invalid, ERRNO.E2BIG);
const INVALID_STALE = status(STATUS.invalid, ERRNO.ESTALE);
const GONE = status(STATUS.gone, ERRNO.ENODEV);

const MAP_BYTES = LIMITS.mapPages * PAGE_BYTES;
const MAP_FLAGS = MAP_FLAG.read | MAP_FLAG.write | MAP_FLAG.align;
const ACCESS = MAP_FLAG.read | MAP_FLAG.write;
const IOVA_END = 2 ** IOVA_BITS;
/** 32-bit words of a list entry. */
const ENTRY_WORDS = LIMITS.entryBytes / 4;

/** A device's word in shared memory. */
const ASSIGNED = 1;
const DEVICE_GONE = 2;

/** Policies that there are so far; lazy will be a translated domain, cached an identity one. */
const DOMAIN_KINDS: Partial<Record<PolicyName, DomainConfig["kind"]>> = {
  pinned: "identity",
  strict: "translated",
};

/**
 * Makes the state that the engines of all threads share, with nothing mapped. Throws a RangeError for a
 * configuration that contradicts itself: the VMM made it, not the user.
 */
export function createEngineState(config: EngineConfig): EngineState {
  const ram = new GuestRam(config.ram);
  if (config.devices.length > LIMITS.devices) {
    throw new RangeError(`${config.devices.length} devices, at most ${LIMITS.devices} can be assigned`);
  }
  for (const device of config.devices) {
    const kind = config.domains[device.domain]?.kind;
    if (kind === undefined || kind !== DOMAIN_KINDS[device.policy]) {
      throw new RangeError(`policy ${device.policy} does not go with domain ${device.domain} (${kind})`);
    }
  }
  for (const { limits } of config.domains) {
    if (Math.floor(limits.pageSizeMask / PAGE_BYTES) % 2 === 0) {
      throw new RangeError(`the IOMMU does not map pages of 4 KiB (page sizes ${limits.pageSizeMask})`);
    }
  }
  const devices = new SharedArrayBuffer((config.devices.length + 1) * 4);
  new Int32Array(devices).fill(ASSIGNED);
  return {
    config,
    domains: config.domains.map(({ kind, limits }) =>
      kind === "translated" ? TranslatedDomain.create(limits) : IdentityDomain.create(),
    ),
    devices,
    pins: new SharedArrayBuffer(Pins.bytes(ram.pages)),
    lanes: createLanes(config.lanes),
  };
}

/**
 * One thread's engine over the shared state. The calls return a status and leave their results in `out`, in the
 * order in which abi.ts lists their OUT registers; `pages` is what the last call mapped or unmapped.
 */
export class Engine {
  readonly out = new Float64Array(5);
  pages = 0;
  readonly lane: StatsLane;
  readonly ram: GuestRam;
  /** The IOVA ranges that all domains have in common, as a call page holds them: {u64 first, u64 last}. */
  readonly rangeWords: Uint32Array;

  readonly #state: EngineState;
  readonly #pins: Pins;
  readonly #domains: Domain[];
  readonly #locks: Mutex[];
  readonly #devices: Int32Array;
  readonly #deviceCount: number;
  /** By handle. */
  readonly #domainOf: Int32Array;
  readonly #lastIovaOf: Float64Array;
  readonly #runs = new RunList(LIMITS.listEntries);
  readonly #pageSizeMask: number;

  /** `backends` gives this thread's view of a domain's backend; `lane` (0 to lanes - 1) belongs to this thread. */
  constructor(state: EngineState, backends: (domain: number) => DmaBackend, lane: number) {
    const { config } = state;
    this.#state = state;
    this.lane = new StatsLane(state.lanes, lane);
    this.ram = new GuestRam(config.ram);
    this.#pins = new Pins(state.pins, config.quotaBytes);
    this.#domains = config.domains.map(({ kind, limits }, index) => {
      const memory = state.domains[index]!;
      return kind === "translated"
        ? new TranslatedDomain(memory, limits, this.ram, this.#pins, backends(index))
        : new IdentityDomain(memory, this.ram, this.#pins, backends(index));
    });
    this.#locks = state.domains.map(
      (memory) => new Mutex(new Int32Array(memory, 0, LOCK_WORD + 1), LOCK_WORD),
    );
    this.#devices = new Int32Array(state.devices);
    this.#deviceCount = config.devices.length;
    this.#domainOf = Int32Array.from([0, ...config.devices.map((device) => device.domain)]);
    this.#lastIovaOf = Float64Array.from([
      0,
      ...config.devices.map((device) => 2 ** Math.min(device.addressBits, IOVA_BITS) - 1),
    ]);
    const limits = config.domains.map((domain) => domain.limits);
    this.rangeWords = wordsOfRanges(commonRanges(limits));
    this.#pageSizeMask = limits.map((each) => each.pageSizeMask).reduce(and64, 2 ** 53 - PAGE_BYTES);
  }

  /** What the host offers; all of `out` but the number of ranges written, which is the caller's to do. */
  probe(): number {
    this.pages = 0;
    this.out[0] = ABI_VERSION;
    this.out[1] = FEATURE.list;
    this.out[2] = this.#pageSizeMask;
    this.out[3] = this.#state.config.quotaBytes;
    this.out[4] = 0;
    return OK;
  }

  /** `bdf` as in DeviceConfig. `out`: handle (0 when it is not assigned), policy and flags, bits of IOVA. */
  isAssigned(bdf: number): number {
    this.pages = 0;
    this.out.fill(0);
    const { devices, domains } = this.#state.config;
    const index = devices.findIndex((device) => device.bdf === bdf);
    const device = devices[index];
    if (device === undefined) return OK;
    if (Atomics.load(this.#devices, index + 1) !== ASSIGNED) return GONE;
    const identity = domains[device.domain]!.kind === "identity" ? DEVICE_FLAG.identity : 0;
    this.out[0] = index + 1;
    this.out[1] = POLICY[device.policy] | identity;
    this.out[2] = device.addressBits;
    return OK;
  }

  /** Maps the pages that `bytes` bytes at `gpa` touch. `out`: IOVA of the first byte. */
  map(handle: number, gpa: number, bytes: number, lastIova: number, flags: number): number {
    this.pages = 0;
    const runs = this.#runs;
    runs.clear();
    let result = this.#checkMap(handle, flags);
    if (result !== OK) return result;
    result = this.#append(gpa, bytes, 0);
    if (result !== OK) return result;
    result = this.#mapRuns(handle, lastIova, flags);
    if (result !== OK) return result;
    this.out[0] = runs.iovaPage * PAGE_BYTES + (gpa % PAGE_BYTES);
    return OK;
  }

  /** Unmaps what one map or mapList mapped. `out`: bytes unmapped. */
  unmap(handle: number, iova: number, bytes: number): number {
    this.pages = 0;
    const result = this.#unmap(handle, iova, bytes);
    this.out[0] = this.pages * PAGE_BYTES;
    return result;
  }

  /**
   * Maps `count` (1 to 256) entries {u64 gpa, u64 bytes} as one range, all or nothing. `entries` is a copy that the
   * guest cannot change meanwhile. `out`: IOVA of the range's first page, entries done.
   */
  mapList(handle: number, entries: Uint32Array, count: number, lastIova: number, flags: number): number {
    this.pages = 0;
    this.out[1] = 0;
    const runs = this.#runs;
    runs.clear();
    let result = this.#checkMap(handle, flags);
    if (result !== OK) return result;
    for (let entry = 0; entry < count; entry++) {
      const at = entry * ENTRY_WORDS;
      result = this.#append(word64(entries, at), word64(entries, at + 2), entry);
      if (result !== OK) {
        this.out[1] = entry;
        return result;
      }
    }
    result = this.#mapRuns(handle, lastIova, flags);
    if (result !== OK) {
      this.out[1] = runs.entry[runs.failedRun]!;
      return result;
    }
    this.out[0] = runs.iovaPage * PAGE_BYTES;
    this.out[1] = count;
    return OK;
  }

  /**
   * Unmaps `count` (1 to 256) entries {u64 iova, u64 bytes} in order, up to the first that fails. `out`: bytes
   * unmapped, entries done; both hold with every status.
   */
  unmapList(handle: number, entries: Uint32Array, count: number): number {
    this.pages = 0;
    let result: number = OK;
    let entry = 0;
    for (; entry < count; entry++) {
      const at = entry * ENTRY_WORDS;
      result = this.#unmap(handle, word64(entries, at), word64(entries, at + 2));
      if (result !== OK) break;
    }
    this.out[0] = this.pages * PAGE_BYTES;
    this.out[1] = entry;
    return result;
  }

  /**
   * Maps all RAM in every identity domain; before the guest runs, on one thread. Returns what could not be mapped,
   * and then that domain has nothing mapped.
   */
  mapIdentity(): MapAllFailure | undefined {
    for (const domain of this.#domains) {
      const failure = domain instanceof IdentityDomain ? domain.mapAll() : undefined;
      if (failure !== undefined) return failure;
    }
    return undefined;
  }

  /** Unmaps everything of a device in its translated domain. Returns the mappings in the domain that are stuck. */
  releaseDevice(handle: number): number {
    return this.#release(this.#domainOf[handle]!, handle);
  }

  /**
   * The device is no longer there: calls for it are answered `gone`, and nothing of it stays mapped. In an identity
   * domain it goes on reaching memory until the VMM takes it out of the domain. Returns as releaseDevice.
   */
  removeDevice(handle: number): number {
    // A map looks at this word while it holds the domain's lock: it came before the release, or it is refused.
    Atomics.store(this.#devices, handle, DEVICE_GONE);
    return this.releaseDevice(handle);
  }

  /** The guest starts anew: everything in translated domains is unmapped. Returns the mappings that are stuck. */
  reset(): number {
    return this.#domains.reduce((stuck, _, index) => stuck + this.#release(index, 0), 0);
  }

  /** The end: reset, and identity domains are unmapped. Returns the mappings that are stuck. */
  close(): number {
    let stuck = this.reset();
    for (const domain of this.#domains) if (domain instanceof IdentityDomain) stuck += domain.unmapAll();
    return stuck;
  }

  /** Bytes mapped for a device, or with handle 0 over all domains; what is mapped twice counts twice. */
  mappedBytes(handle: number): number {
    const pages =
      handle === 0
        ? this.#domains.reduce((sum, domain) => sum + domain.mappedPages(0), 0)
        : this.#domains[this.#domainOf[handle]!]!.mappedPages(handle);
    return pages * PAGE_BYTES;
  }

  /** Bytes of guest RAM that are pinned, each page counted once. */
  get pinnedBytes(): number {
    return this.#pins.pinnedPages * PAGE_BYTES;
  }

  /** Every counter and gauge, of all threads, in a fixed order. */
  stats(): Stat[] {
    const counters = readLanes(this.#state.lanes);
    const limitHits = counters.find(([name]) => name === "hypercalls/status/limit")![1];
    const sum = (of: (domain: Domain) => number) =>
      this.#domains.reduce((all, domain) => all + of(domain), 0);
    return [
      ...counters,
      ["dma/pinned_bytes", this.pinnedBytes],
      ["dma/peak_pinned_bytes", this.#pins.peakPages * PAGE_BYTES],
      ["dma/mapped_bytes", this.mappedBytes(0)],
      ["dma/quota_bytes", this.#state.config.quotaBytes],
      ["dma/limit_hits", limitHits],
      ["dma/entries", sum((domain) => domain.entriesUsed)],
      ["dma/stuck_mappings", sum((domain) => domain.stuck)],
      ...this.#state.config.devices.map(
        (_, index): Stat => [`devices/${index + 1}/mapped_bytes`, this.mappedBytes(index + 1)],
      ),
    ];
  }

  #checkHandle(handle: number): number {
    if (!(handle >= 1 && handle <= this.#deviceCount)) return INVALID_HANDLE;
    return Atomics.load(this.#devices, handle) === ASSIGNED ? OK : GONE;
  }

  #checkMap(handle: number, flags: number): number {
    // The comparison first: `&` would see only the low 32 bits.
    if (flags > MAP_FLAGS || (flags & ACCESS) === 0) return INVALID_EINVAL;
    return this.#checkHandle(handle);
  }

  /** Checks a range of guest memory and appends the pages it touches to the runs. */
  #append(gpa: number, bytes: number, entry: number): number {
    // First what keeps the arithmetic after it exact.
    if (bytes < 1) return INVALID_EINVAL;
    if (bytes > MAP_BYTES) return INVALID_TOO_LONG;
    if (gpa > MAX_EXACT - MAP_BYTES) return INVALID_NOT_RAM;
    const pages = pagesTouched(gpa, bytes);
    if (this.#runs.pages + pages > LIMITS.mapPages) return INVALID_TOO_LONG;
    const page = Math.floor(gpa / PAGE_BYTES);
    return this.ram.append(this.#runs, page, pages, entry) ? OK : INVALID_NOT_RAM;
  }

  #mapRuns(handle: number, lastIova: number, flags: number): number {
    const reach = this.#lastIovaOf[handle]!;
    // The last page that lies wholly below the limit.
    const lastPage = Math.floor((Math.min(lastIova, reach) + 1) / PAGE_BYTES) - 1;
    const index = this.#domainOf[handle]!;
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      if (Atomics.load(this.#devices, handle) !== ASSIGNED) return GONE;
      const result = this.#domains[index]!.map(handle, this.#runs, lastPage, flags);
      if (result === OK) this.pages = this.#runs.pages;
      return result;
    } finally {
      lock.release();
    }
  }

  #unmap(handle: number, iova: number, bytes: number): number {
    const result = this.#checkHandle(handle);
    if (result !== OK) return result;
    if (bytes < 1) return INVALID_EINVAL;
    if (bytes > MAP_BYTES) return INVALID_TOO_LONG;
    if (iova >= IOVA_END) return INVALID_STALE;
    const pages = pagesTouched(iova, bytes);
    const index = this.#domainOf[handle]!;
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      const unmapped = this.#domains[index]!.unmap(handle, Math.floor(iova / PAGE_BYTES), pages);
      if (unmapped === OK) this.pages += pages;
      return unmapped;
    } finally {
      lock.release();
    }
  }

  #release(index: number, handle: number): number {
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      this.#domains[index]!.release(handle);
      return this.#domains[index]!.stuck;
    } finally {
      lock.release();
    }
  }
}

/** A 64-bit word of a call page; rounded, as a register would be, from 2^53 on. */
function word64(words: Uint32Array, at: number): number {
  return words[at + 1]! * 2 ** 32 + words[at]!;
}

/** The bits that two 64-bit masks have in common, as numbers (exact where at most 53 bits apart are set). */
function and64(a: number, b: number): number {
  const high = Math.floor(a / 2 ** 32) & Math.floor(b / 2 ** 32);
  return (high >>> 0) * 2 ** 32 + ((a & b) >>> 0);
}

/** What every domain has of the IOVAs that the engine uses, below 2^44. */
function commonRanges(limits: readonly BackendLimits[]): BackendLimits["ranges"] {
  let common: BackendLimits["ranges"] = [{ first: 0, last: IOVA_END - 1 }];
  for (const { ranges } of limits) {
    common = common.flatMap((a) =>
      ranges.flatMap((b) => {
        const first = Math.max(a.first, b.first);
        const last = Math.min(a.last, b.last);
        return first <= last ? [{ first, last }] : [];
      }),
    );
  }
  return common;
}

function wordsOfRanges(ranges: BackendLimits["ranges"]): Uint32Array {
  const fitting = ranges.slice(0, LIMITS.listEntries);
  return Uint32Array.from(
    fitting.flatMap(({ first, last }) => [first, first / 2 ** 32, last, last / 2 ** 32]),
  );
}
