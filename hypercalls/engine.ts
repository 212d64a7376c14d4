// The engine: which devices the guest has, what their policies are, and every check of what the guest asks for,
// before a domain is touched. No ioctl, no file: what maps is behind backend.ts, guest memory behind guest-ram.ts.
// All addresses and lengths that come in are the guest's words, as numbers: any register value, rounded where it is
// 2^53 or more, and then out of every range.

import {
  ABI_VERSION,
  CALL_NAMES,
  DEVICE_FLAG,
  FEATURES,
  LIMITS,
  MAP_FLAG,
  POLICY,
  type PolicyName,
  STATUS,
} from "./abi.js";
import { type Gpa, MAX_EXACT, PAGE_BYTES, pagesTouched } from "./addresses.js";
import type { BackendLimits, DmaBackend } from "./backend.js";
import { CachedDomain, type TrackingTable } from "./cached.js";
import {
  ACCESS,
  type Domain,
  IdentityDomain,
  LOCK_WORD,
  type MapAllFailure,
  TranslatedDomain,
} from "./domain.js";
import { GuestRam, type RamSlot, RunList } from "./guest-ram.js";
import { createInjection, INJECT, Injector } from "./injection.js";
import { FIRST_IOVA, IOVA_BITS } from "./iova.js";
import { Mutex } from "./lock.js";
import { Pins } from "./pins.js";
import { createLanes, EVENT, LaneReader, type Stat, StatsLane } from "./stats.js";
import {
  ERRNO,
  GONE,
  INVALID_EINVAL,
  INVALID_HANDLE,
  INVALID_NOT_RAM,
  INVALID_STALE,
  INVALID_TOO_LONG,
  LIMIT_STUCK,
  OK,
  status,
  statusClassOf,
  statusErrnoOf,
} from "./status.js";

export type DomainKind = "translated" | "identity" | "cached";

/** The kind of domain that a policy needs. Lazy and strict differ in when the guest calls, not in what a call does. */
export const DOMAIN_KINDS: Readonly<Record<PolicyName, DomainKind>> = {
  pinned: "identity",
  cached: "cached",
  lazy: "translated",
  strict: "translated",
};

/** One IOMMU domain. */
export interface DomainConfig {
  readonly kind: DomainKind;
  readonly limits: BackendLimits;
  /** Of a cached domain: where its tracking table is in the guest, and the bytes that it maps at a time. */
  readonly cached?: { readonly tableGpa: Gpa; readonly granuleBytes: number };
}

/** An assigned device. Its handle is its place in the list, from 1. */
export interface DeviceConfig {
  /** What statistics call it: its address on the host. */
  readonly name: string;
  /** As the guest numbers it: segment << 16 | bus << 8 | device << 3 | function. */
  readonly bdf: number;
  readonly policy: PolicyName;
  /** Index of its domain. */
  readonly domain: number;
  /** Bits of IOVA that the IOMMU translates for it. */
  readonly addressBits: number;
  /**
   * Most guest memory that may be pinned for it, in bytes; 0 for no quota. What several devices have pinned counts
   * for each. Devices of an identity domain reach the same pages: the smallest of their quotas is every one's.
   */
  readonly quotaBytes: number;
  /**
   * What can be locked for it, in bytes, by RLIMIT_MEMLOCK or by a limit of its IOMMU; 0 for no limit. The guest is told, no
   * more.
   */
  readonly lockableBytes: number;
}

/** Everything the engine is told, as plain data. */
export interface EngineConfig {
  readonly ram: readonly RamSlot[];
  readonly domains: readonly DomainConfig[];
  readonly devices: readonly DeviceConfig[];
  /** Most guest memory that may be pinned, in bytes, each page counted once; 0 for no quota. */
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
  /** By handle - 1; the devices of a domain whose IOVA = gpa have one in common. */
  readonly devicePins: readonly SharedArrayBuffer[];
  readonly lanes: SharedArrayBuffer;
  readonly injection: SharedArrayBuffer;
}

const LIMIT_EAGAIN = status(STATUS.limit, ERRNO.EAGAIN);

const MAP_BYTES = LIMITS.mapPages * PAGE_BYTES;
const MAP_FLAGS = ACCESS | MAP_FLAG.align | MAP_FLAG.counted;
const IOVA_END = 2 ** IOVA_BITS;
/** 32-bit words of a list entry. */
const ENTRY_WORDS = LIMITS.entryBytes / 4;

/** A device's word in shared memory. */
const ASSIGNED = 1;
const DEVICE_GONE = 2;

/** Calls that are of a device, in the statistics. */
const DEVICE_CALLS = CALL_NAMES.filter((call) => call !== "probe");

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
  for (const { kind, cached, limits } of config.domains) {
    if ((kind === "cached") !== (cached !== undefined))
      throw new RangeError(`a ${kind} domain, and its table`);
    if (Math.floor(limits.pageSizeMask / PAGE_BYTES) % 2 === 0) {
      throw new RangeError(`the IOMMU does not map pages of 4 KiB (page sizes ${limits.pageSizeMask})`);
    }
  }
  const names = new Set(config.devices.map((device) => device.name));
  if (names.size < config.devices.length) throw new RangeError("two devices have the same name");
  const devices = new SharedArrayBuffer((config.devices.length + 1) * 4);
  new Int32Array(devices).fill(ASSIGNED);
  return {
    config,
    domains: config.domains.map(({ kind, limits, cached }) => {
      if (kind === "translated") return TranslatedDomain.create(limits);
      return cached === undefined
        ? IdentityDomain.create()
        : CachedDomain.create(limits, ram, cached.granuleBytes);
    }),
    devices,
    pins: new SharedArrayBuffer(Pins.bytes(ram.pages)),
    devicePins: createDevicePins(config, Pins.bytes(ram.pages)),
    lanes: createLanes(config.lanes, config.devices.length),
    injection: createInjection(),
  };
}

function createDevicePins({ devices, domains }: EngineConfig, bytes: number): SharedArrayBuffer[] {
  const memories: SharedArrayBuffer[] = [];
  for (const { domain } of devices) {
    const same = devices.findIndex((device) => device.domain === domain);
    const shared = domains[domain]!.kind === "translated" ? undefined : memories[same];
    memories.push(shared ?? new SharedArrayBuffer(bytes));
  }
  return memories;
}

/** The smallest of the limits that there are; 0 without one. */
function smallest(limits: readonly number[]): number {
  const there = limits.filter((limit) => limit > 0);
  return there.length === 0 ? 0 : Math.min(...there);
}

/**
 * One thread's engine over the shared state. The calls return a status and leave their results in `out`, in the
 * order in which abi.ts lists their OUT registers.
 */
export class Engine {
  readonly out = new Float64Array(5);
  // Of the last call: the pages that it mapped or unmapped, its device (0: none that there is), and whether the status
  // that it got is an injected failure.
  pages = 0;
  handle = 0;
  injected = false;
  readonly injector: Injector;
  readonly lane: StatsLane;
  readonly ram: GuestRam;
  /** The IOVA ranges that all domains have in common, as a call page holds them: {u64 first, u64 last}. */
  readonly rangeWords: Uint32Array;

  readonly #state: EngineState;
  readonly #pins: Pins;
  /** By handle. */
  readonly #devicePins: Pins[];
  readonly #domains: (TranslatedDomain | IdentityDomain | CachedDomain)[];
  readonly #locks: Mutex[];
  readonly #devices: Int32Array;
  readonly #deviceCount: number;
  /** By handle. */
  readonly #domainOf: Int32Array;
  readonly #lastIovaOf: Float64Array;
  readonly #runs = new RunList(LIMITS.listEntries);
  readonly #pageSizeMask: number;

  /**
   * `backends` gives this thread's view of a domain's backend, `tables` that of a cached domain's tracking table; `lane` (0 to
   * lanes - 1) belongs to this thread.
   */
  constructor(
    state: EngineState,
    backends: (domain: number) => DmaBackend,
    lane: number,
    tables: (domain: number) => TrackingTable = noTable,
  ) {
    const { config } = state;
    this.#state = state;
    this.lane = new StatsLane(state.lanes, lane, config.devices.length);
    this.injector = new Injector(state.injection);
    this.ram = new GuestRam(config.ram);
    // Counts of one domain are changed by whoever holds its lock.
    this.#pins = new Pins(state.pins, config.quotaBytes, config.domains.length > 1 ? "own" : "callers");
    const devicePins = config.devices.map((device, index) => {
      const sharing = config.devices.filter(({ domain }) => domain === device.domain);
      const common = config.domains[device.domain]!.kind !== "translated";
      const quota = common ? smallest(sharing.map(({ quotaBytes }) => quotaBytes)) : device.quotaBytes;
      return new Pins(state.devicePins[index]!, quota, "callers");
    });
    // Handle 0 is nobody's, and never looked at.
    this.#devicePins = [this.#pins, ...devicePins];
    this.#domains = config.domains.map(({ kind, limits, cached }, index) => {
      const memory = state.domains[index]!;
      if (kind === "translated") {
        return new TranslatedDomain(memory, limits, this.ram, this.#pins, this.#devicePins, backends(index));
      }
      const first = config.devices.findIndex(({ domain }) => domain === index);
      // Without a device there is nothing to count for one.
      const pins =
        devicePins[first] ?? new Pins(new SharedArrayBuffer(Pins.bytes(this.ram.pages)), 0, "callers");
      const backend = backends(index);
      if (cached === undefined) return new IdentityDomain(memory, this.ram, this.#pins, pins, backend);
      const { granuleBytes } = cached;
      return new CachedDomain(
        memory,
        limits,
        granuleBytes,
        this.ram,
        this.#pins,
        pins,
        backend,
        tables(index),
      );
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
    // A mask is enough for a guest when it covers some of these: they begin where addresses are handed out.
    const first = config.domains.some(({ kind }) => kind === "translated") ? FIRST_IOVA : 0;
    this.rangeWords = wordsOfRanges(commonRanges(first, limits));
    this.#pageSizeMask = limits.map((each) => each.pageSizeMask).reduce(and64, 2 ** 53 - PAGE_BYTES);
  }

  /** What the host offers; all of `out` but the number of ranges written, which is the caller's to do. */
  probe(): number {
    this.begin(0);
    this.out[0] = ABI_VERSION;
    this.out[1] = FEATURES;
    this.out[2] = this.#pageSizeMask;
    this.out[3] = this.#state.config.quotaBytes;
    this.out[4] = 0;
    return OK;
  }

  /** A call begins, with this in its handle's register. */
  begin(handle: number): void {
    this.pages = 0;
    this.handle = handle >= 1 && handle <= this.#deviceCount ? handle | 0 : 0;
    this.injected = false;
    this.injector.sleptMs = 0;
  }

  /**
   * `bdf` as in DeviceConfig. `out`: handle (0 when it is not assigned), policy and flags, bits of IOVA, entries of its
   * domain, most bytes that can be pinned for it.
   */
  isAssigned(bdf: number): number {
    this.begin(0);
    this.out.fill(0);
    const { devices, domains, quotaBytes } = this.#state.config;
    const index = devices.findIndex((device) => device.bdf === bdf);
    const device = devices[index];
    if (device === undefined) return OK;
    this.handle = index + 1;
    if (Atomics.load(this.#devices, index + 1) !== ASSIGNED) return GONE;
    const injected = this.#inject(INJECT.isAssigned, 0);
    if (injected !== OK) return injected;
    const { kind, limits, cached } = domains[device.domain]!;
    this.out[0] = index + 1;
    this.out[1] = POLICY[device.policy] | (kind === "translated" ? 0 : DEVICE_FLAG.identity);
    this.out[2] = device.addressBits;
    this.out[3] = limits.entries;
    // Each page of a mapping may take a granule.
    const most = smallest([device.quotaBytes, quotaBytes, device.lockableBytes]);
    this.out[4] =
      cached === undefined || most === 0
        ? most
        : Math.max(Math.floor(most / cached.granuleBytes), 1) * PAGE_BYTES;
    return OK;
  }

  /**
   * The tracking table of a device's domain. `anew`: everything is unmapped first and all counts are forgotten. `out`: gpa,
   * entries; both 0 for a device without one.
   */
  table(handle: number, anew: number): number {
    this.begin(handle);
    const checked = this.#checkHandle();
    if (checked !== OK) return checked;
    if (anew > 1) return INVALID_EINVAL;
    this.out.fill(0);
    const index = this.#domainOf[handle]!;
    const domain = this.#domains[index]!;
    if (!(domain instanceof CachedDomain)) return OK;
    if (anew === 1 && this.#locked(index, () => domain.beginAnew()) > 0) return LIMIT_STUCK;
    this.out[0] = this.#state.config.domains[index]!.cached!.tableGpa;
    this.out[1] = this.ram.endPage;
    return OK;
  }

  /** Maps the pages that `bytes` bytes at `gpa` touch. `out`: IOVA of the first byte. */
  map(handle: number, gpa: number, bytes: number, lastIova: number, flags: number): number {
    this.begin(handle);
    const runs = this.#runs;
    runs.clear();
    let result = this.#checkMap(flags);
    if (result !== OK) return result;
    result = this.#append(gpa, bytes, 0);
    if (result !== OK) return result;
    result = this.#inject(INJECT.map, bytes);
    if (result !== OK) return result;
    result = this.#mapRuns(handle, lastIova, flags);
    if (result !== OK) return result;
    this.out[0] = runs.iovaPage * PAGE_BYTES + (gpa % PAGE_BYTES);
    return OK;
  }

  /** Unmaps what one map or mapList mapped. `out`: bytes unmapped. */
  unmap(handle: number, iova: number, bytes: number): number {
    this.begin(handle);
    const result = this.#unmap(handle, iova, bytes);
    this.out[0] = this.pages * PAGE_BYTES;
    return result;
  }

  /**
   * Maps `count` (1 to 256) entries {u64 gpa, u64 bytes} as one range, all or nothing. `entries` is a copy that the
   * guest cannot change meanwhile. `out`: IOVA of the range's first page, entries done.
   */
  mapList(handle: number, entries: Uint32Array, count: number, lastIova: number, flags: number): number {
    this.begin(handle);
    this.out[1] = 0;
    const runs = this.#runs;
    runs.clear();
    let result = this.#checkMap(flags);
    if (result !== OK) return result;
    let allBytes = 0;
    for (let entry = 0; entry < count; entry++) {
      const at = entry * ENTRY_WORDS;
      const bytes = word64(entries, at + 2);
      result = this.#append(word64(entries, at), bytes, entry);
      if (result !== OK) {
        this.out[1] = entry;
        return result;
      }
      allBytes += bytes;
    }
    result = this.#inject(INJECT.map, allBytes);
    if (result !== OK) return result;
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
    this.begin(handle);
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

  /** Takes back every mapping of a device; the guest asks. `out`: mappings, bytes. */
  release(handle: number): number {
    this.begin(handle);
    const result = this.#checkHandle();
    return result === OK ? this.#release(handle) : result;
  }

  /**
   * The device is no longer there: calls for it are answered `gone`, and nothing of it stays mapped. In an identity
   * or cached domain it goes on reaching memory until the VMM takes it out of the domain; with the domain's last device all
   * is unmapped. Returns the mappings of its domain that are stuck.
   */
  removeDevice(handle: number): number {
    this.begin(handle);
    // A map looks at this word while it holds the domain's lock: it came before the release, or it is refused.
    Atomics.store(this.#devices, handle, DEVICE_GONE);
    this.#release(handle);
    const index = this.#domainOf[handle]!;
    const domain = this.#domains[index]!;
    const inUse = (at: number) =>
      this.#domainOf[at] === index && Atomics.load(this.#devices, at) === ASSIGNED;
    for (let other = 1; other <= this.#deviceCount; other++) {
      if (!inUse(other)) continue;
      // Its maps are to make their calls, and hear of it; the others' get PINNED back by one call each.
      if (domain instanceof CachedDomain) this.#locked(index, () => domain.clearPinned());
      return domain.stuck;
    }
    return this.#unmapAll(index);
  }

  /** The guest starts anew: everything in translated domains is unmapped. Returns the mappings that are stuck. */
  reset(): number {
    for (let handle = 1; handle <= this.#deviceCount; handle++) this.#release(handle);
    return this.#domains.reduce((stuck, domain) => stuck + domain.stuck, 0);
  }

  /** The end: reset, and identity domains are unmapped. Returns the mappings that are stuck. */
  close(): number {
    this.reset();
    const stuck = this.#domains.reduce((sum, _, index) => sum + this.#unmapAll(index), 0);
    for (const domain of this.#domains) if (domain instanceof CachedDomain) domain.forgetCounts();
    return stuck;
  }

  /** Unmaps what is no single device's; returns the mappings of the domain that are stuck. */
  #unmapAll(index: number): number {
    const domain = this.#domains[index]!;
    return domain instanceof TranslatedDomain ? domain.stuck : this.#locked(index, () => domain.unmapAll());
  }

  /**
   * Gives back what cached domains have mapped and nobody has used since the last time. Takes a domain's lock for `granules`
   * of them at a time; `pause` is called before each, and says whether to go on. One thread's.
   */
  async sweep(granules: number, pause: () => Promise<boolean>): Promise<void> {
    for (const [index, domain] of this.#domains.entries()) {
      if (!(domain instanceof CachedDomain)) continue;
      do if (!(await pause())) return;
      while (this.#locked(index, () => domain.sweep(granules)));
    }
  }

  /**
   * Rules of injection were added or removed. They see the calls that are made, and under policy cached few are: while there
   * is a rule for maps, every map makes its call.
   */
  injectionChanged(): void {
    for (const [index, domain] of this.#domains.entries()) {
      // Looked at under the lock: of two changes at a time, the later one's word is the last.
      if (domain instanceof CachedDomain) this.#locked(index, () => domain.hide(this.injector.hasMapRules));
    }
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

  /** Counts IOMMU faults: accesses of the device outside its mappings; handle 0 when it is not known whose. */
  countFaults(handle: number, times: number): void {
    this.lane.count(EVENT.faults, handle, times);
  }

  /** Every counter and gauge, of all threads, in a fixed order. */
  stats(): Stat[] {
    const { lanes, config } = this.#state;
    const reader = new LaneReader(lanes, config.devices.length);
    const sum = (of: (domain: Domain) => number) =>
      this.#domains.reduce((all, domain) => all + of(domain), 0);
    return [
      // The names that these have had since 2008, where users look for them.
      ["hypercall_map", reader.call("map", "calls") + reader.call("map_list", "calls")],
      ["hypercall_unmap", reader.call("unmap", "calls") + reader.call("unmap_list", "calls")],
      ["hypercall_pv_dev", reader.call("is_assigned", "calls")],
      ...reader.calls(CALL_NAMES),
      ...reader.answers(),
      ...this.#dmaStats(reader, this.#pins, config.quotaBytes),
      ["dma/delayed", reader.event(EVENT.delayed)],
      ["dma/entries", sum((domain) => domain.entriesUsed)],
      ["dma/evicted", sum((domain) => (domain instanceof CachedDomain ? domain.evicted : 0))],
      ["dma/idled", sum((domain) => (domain instanceof CachedDomain ? domain.idled : 0))],
      ["dma/stuck_mappings", sum((domain) => domain.stuck)],
      ...config.devices.flatMap(({ name, quotaBytes }, index) => {
        const handle = index + 1;
        return [
          ...reader.calls(DEVICE_CALLS, handle),
          ...this.#dmaStats(reader, this.#devicePins[handle]!, quotaBytes, handle),
        ].map(([path, value]): Stat => [`devices/${name}/${path}`, value]);
      }),
    ];
  }

  /** The numbers that there are for each device, and over all without a handle. */
  #dmaStats(reader: LaneReader, pins: Pins, quotaBytes: number, handle?: number): Stat[] {
    return [
      ["dma/pinned_bytes", pins.pinnedPages * PAGE_BYTES],
      ["dma/peak_pinned_bytes", pins.peakPages * PAGE_BYTES],
      ["dma/mapped_bytes", this.mappedBytes(handle ?? 0)],
      ["dma/quota_bytes", quotaBytes],
      ["dma/limit_hits", reader.event(EVENT.limitHits, handle)],
      ["dma/injected", reader.event(EVENT.injected, handle)],
      ["dma/faults", reader.event(EVENT.faults, handle)],
      ["dma/released_mappings", reader.event(EVENT.releasedMappings, handle)],
    ];
  }

  /** Not for hot paths. */
  #locked<T>(index: number, body: () => T): T {
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      return body();
    } finally {
      lock.release();
    }
  }

  /**
   * Of the call's handle. A plain load: a device that goes this moment is seen under its domain's lock by a map, and an unmap
   * finds nothing to undo.
   */
  #checkHandle(): number {
    if (this.handle === 0) return INVALID_HANDLE;
    return this.#devices[this.handle] === ASSIGNED ? OK : GONE;
  }

  #checkMap(flags: number): number {
    // The comparison first: `&` would see only the low 32 bits.
    if (flags > MAP_FLAGS || (flags & ACCESS) === 0) return INVALID_EINVAL;
    const result = this.#checkHandle();
    if (result !== OK || (flags & MAP_FLAG.counted) === 0) return result;
    return this.#domains[this.#domainOf[this.handle]!] instanceof CachedDomain ? OK : INVALID_EINVAL;
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
    let result = this.#tryMap(handle, lastPage, flags);
    // One more try where it can end otherwise: there is room now, or the host itself says "again".
    if (
      statusClassOf(result) === STATUS.limit &&
      (this.#makeRoom(this.#domainOf[handle]!, result) || result === LIMIT_EAGAIN)
    ) {
      result = this.#tryMap(handle, lastPage, flags);
    }
    if (result === OK) this.pages = this.#runs.pages;
    return result;
  }

  #tryMap(handle: number, lastPage: number, flags: number): number {
    const index = this.#domainOf[handle]!;
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      if (this.#devices[handle] !== ASSIGNED) return GONE;
      return this.#domains[index]!.map(handle, this.#runs, lastPage, flags);
    } finally {
      lock.release();
    }
  }

  /**
   * Gives back what can be, for a map in the domain `asking` that met a limit: in all domains, since the VM's quota and locked
   * memory are common to them. But what is cached goes only for these two, about as much of it as the map may need, and not for
   * its own domain, which has done that. One domain's lock at a time, for some mappings at a time, and none is held by the
   * caller. Returns whether there may be room now: under the quota also when others have made it meanwhile.
   */
  #makeRoom(asking: number, limit: number): boolean {
    const errno = statusErrnoOf(limit);
    const { quotaBytes, domains } = this.#state.config;
    const most = this.#mostPinned((domains[asking]!.cached?.granuleBytes ?? PAGE_BYTES) / PAGE_BYTES);
    // With this many pinned the map has room: under the quota, or where the host's limit was met.
    let enough = Number.POSITIVE_INFINITY;
    const isQuota = errno === ERRNO.EDQUOT && quotaBytes > 0;
    const quotaPages = Math.floor(quotaBytes / PAGE_BYTES);
    if (isQuota) enough = quotaPages - most;
    else if (errno === ERRNO.ENOMEM) enough = this.#pins.pinnedPages - most;
    let given = 0;
    for (let index = 0; index < this.#domains.length; index++) {
      const domain = this.#domains[index]!;
      if (!domain.reclaimable) continue;
      if (!(domain instanceof CachedDomain)) {
        given += this.#reclaim(index, false);
        continue;
      }
      if (index === asking) continue;
      // Others may map as fast as this gives back: not longer than it takes once.
      for (let left = domain.entriesUsed, again = false; left > 0 && this.#pins.pinnedPages > enough; ) {
        const some = this.#reclaim(index, again);
        if (some === 0) break;
        given += some;
        left -= some;
        again = true;
      }
    }
    return given > 0 || (isQuota && this.#pins.pinnedPages < quotaPages);
  }

  #reclaim(index: number, again: boolean): number {
    const lock = this.#locks[index]!;
    lock.acquire();
    try {
      return this.#domains[index]!.reclaim(again);
    } finally {
      lock.release();
    }
  }

  /** Pages that the runs pin at the most, in granules of so many pages: none of them is pinned already. */
  #mostPinned(granulePages: number): number {
    const runs = this.#runs;
    let granules = 0;
    for (let run = 0; run < runs.count; run++) {
      // Two pages more than a granule holds may lie in three of them.
      granules += Math.ceil((runs.runPages[run]! - 1) / granulePages) + 1;
    }
    return granules * granulePages;
  }

  /** Lets the rules decide about a call of `this.handle`; holds no lock. Returns the status of a failure, or ok. */
  #inject(kind: number, bytes: number): number {
    const { injector } = this;
    const slept = injector.sleptMs;
    const errno = injector.decide(kind, this.handle, bytes);
    if (injector.sleptMs > slept) this.lane.count(EVENT.delayed, this.handle, 1);
    if (errno === 0) return OK;
    this.injected = true;
    return status(errno === ERRNO.EAGAIN ? STATUS.retry : STATUS.limit, errno);
  }

  #unmap(handle: number, iova: number, bytes: number): number {
    const result = this.#checkHandle();
    if (result !== OK) return result;
    if (bytes < 1) return INVALID_EINVAL;
    if (bytes > MAP_BYTES) return INVALID_TOO_LONG;
    if (iova >= IOVA_END) return INVALID_STALE;
    const injected = this.#inject(INJECT.unmap, bytes);
    if (injected !== OK) return injected;
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

  /** Takes back what a device has mapped, counts it, and leaves mappings and bytes in `out`. */
  #release(handle: number): number {
    const index = this.#domainOf[handle]!;
    const lock = this.#locks[index]!;
    const domain = this.#domains[index]!;
    lock.acquire();
    try {
      const result = domain.release(handle);
      this.pages = domain.releasedPages;
      this.lane.count(EVENT.releasedMappings, handle, domain.releasedMappings);
      this.out[0] = domain.releasedMappings;
      this.out[1] = domain.releasedPages * PAGE_BYTES;
      return result;
    } finally {
      lock.release();
    }
  }
}

function noTable(domain: number): TrackingTable {
  throw new RangeError(`no tracking table for domain ${domain}`);
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

/** What every domain has of the IOVAs that the engine uses, from `first` to 2^44. */
function commonRanges(first: number, limits: readonly BackendLimits[]): BackendLimits["ranges"] {
  let common: BackendLimits["ranges"] = [{ first, last: IOVA_END - 1 }];
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
