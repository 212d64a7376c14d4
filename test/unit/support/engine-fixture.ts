// What the engine's tests share: a guest with a little RAM, a backend that fails on demand, and a view of both.

import { type Gpa, gpa, type Hva, hva, type Iova, iova, PAGE_BYTES } from "../../../hypercalls/addresses.js";
import type { DmaBackend } from "../../../hypercalls/backend.js";
import {
  createEngineState,
  type DeviceConfig,
  Engine,
  type EngineConfig,
  type EngineState,
} from "../../../hypercalls/engine.js";
import type { GuestMemory, RamSlot } from "../../../hypercalls/guest-ram.js";
import { Pins } from "../../../hypercalls/pins.js";
import { SoftIommu } from "../../../iommu-emul/iommu.js";

export const PAGE = PAGE_BYTES;
export const MiB = 2 ** 20;

const slot = (at: number, pages: number, from: number): RamSlot => ({
  gpa: gpa(at),
  bytes: pages * PAGE,
  hva: hva(from),
});

/** 48 pages, a hole, 64 pages, and 32 that follow in gpa but not in hva. */
export const RAM: readonly RamSlot[] = [
  slot(0, 48, 0x7f00_0000_0000),
  slot(MiB, 64, 0x7f00_4000_0000),
  slot(MiB + 64 * PAGE, 32, 0x7f10_0000_0000),
];
export const RAM_PAGES = 144;

/** Where RAM page by gpa is in the host, computed apart from the code under test; undefined outside RAM. */
export function hvaOfGpaPage(page: number): number | undefined {
  for (const { gpa, bytes, hva } of RAM) {
    const offset = page * PAGE - gpa;
    if (offset >= 0 && offset < bytes) return hva + offset;
  }
  return undefined;
}

/** Without the MSI window, as the emulated VT-d. */
export const RANGES = [
  { first: 0, last: 0xfedfffff },
  { first: 0xfef00000, last: 2 ** 39 - 1 },
];

/** What to do instead of the next call: fail with an errno, or (unmap) unmap only the first entry of the range. */
export type Fault = { readonly errno: number } | "partly" | undefined;

/** A software IOMMU whose calls can be made to fail, with a record of the entries that are really mapped. */
export class FaultyBackend implements DmaBackend {
  readonly iommu: SoftIommu;
  /** By IOVA page. */
  readonly entries = new Map<number, { readonly pages: number; readonly hva: number }>();
  mapFault: () => Fault = () => undefined;
  unmapFault: () => Fault = () => undefined;
  maps = 0;
  unmaps = 0;
  /** What came of the map calls, in order: the IOVA page, or -1 when it failed; for tests to empty. */
  readonly mapped: number[] = [];

  constructor(iommu: SoftIommu) {
    this.iommu = iommu;
  }

  map(at: Iova, from: Hva, bytes: number, access: number): number {
    this.maps++;
    const fault = this.mapFault();
    const injected = fault !== undefined && fault !== "partly";
    const errno = injected ? fault.errno : this.iommu.map(at, from, bytes, access);
    this.mapped.push(errno === 0 ? at / PAGE : -1);
    if (errno === 0) this.entries.set(at / PAGE, { pages: bytes / PAGE, hva: from });
    return errno;
  }

  unmap(at: Iova, bytes: number): number {
    this.unmaps++;
    const fault = this.unmapFault();
    if (fault !== undefined && fault !== "partly") return -fault.errno;
    const end = (at + bytes) / PAGE;
    let first = at / PAGE;
    while (first < end && !this.entries.has(first)) first++;
    if (fault === "partly") {
      if (first === end) return 0;
      at = iova(first * PAGE);
      bytes = this.entries.get(first)!.pages * PAGE;
    }
    const unmapped = this.iommu.unmap(at, bytes);
    if (unmapped > 0) for (; first < (at + bytes) / PAGE; first++) this.entries.delete(first);
    return unmapped;
  }
}

export interface Fixture {
  readonly state: EngineState;
  readonly engine: Engine;
  readonly backends: readonly FaultyBackend[];
  /** How often a RAM page is pinned: for a device, or in all. */
  readonly pinCount: (ramPage: number, handle?: number) => number;
}

export interface FixtureOptions {
  /** Entries that the IOMMU says it has. */
  readonly entries?: number;
  /** Entries that it really has (others may use some), and memory that can be locked. */
  readonly hostEntries?: number;
  readonly lockedBytesMax?: number;
  readonly quotaBytes?: number;
  /** By handle. */
  readonly deviceQuotaBytes?: Readonly<Record<number, number>>;
  /** By handle. */
  readonly lockableBytes?: Readonly<Record<number, number>>;
  readonly ranges?: readonly { readonly first: number; readonly last: number }[];
}

/**
 * Domain 0 is translated and has the devices 1 (39 bits) and 2 (39 bits), domain 1 is translated and has device 3,
 * domain 2 is an identity domain with device 4; not mapped yet. Device N is called 0000:0N:00.0.
 */
export function makeEngine(options: FixtureOptions = {}): Fixture {
  const ranges = options.ranges ?? RANGES;
  const entries = options.entries ?? 4096;
  const { hostEntries = entries, lockedBytesMax = Number.POSITIVE_INFINITY } = options;
  const settings = { ranges, entries: hostEntries, lockedBytesMax, memory: RAM, lanes: 0, tables: 2048 };
  const backends = [0, 1, 2].map(() => new FaultyBackend(new SoftIommu(SoftIommu.create(settings))));
  const device = (handle: number, bdf: number, domain: number): DeviceConfig => ({
    name: `0000:0${handle}:00.0`,
    bdf,
    policy: domain === 2 ? "pinned" : "strict",
    domain,
    addressBits: 39,
    quotaBytes: options.deviceQuotaBytes?.[handle] ?? 0,
    lockableBytes: options.lockableBytes?.[handle] ?? 0,
  });
  const config: EngineConfig = {
    ram: RAM,
    domains: backends.map((backend, index) => ({
      kind: index === 2 ? "identity" : "translated",
      limits: { ...backend.iommu.limits(), entries },
    })),
    devices: [device(1, 0x10, 0), device(2, 0x18, 0), device(3, 0x10020, 1), device(4, 0x28, 2)],
    quotaBytes: options.quotaBytes ?? 0,
    lanes: 2,
  };
  const state = createEngineState(config);
  const engine = new Engine(state, (domain) => backends[domain]!, 0);
  const pins = [state.pins, ...state.devicePins].map((memory) => new Pins(memory, 0, "own"));
  return { state, engine, backends, pinCount: (page, handle = 0) => pins[handle]!.countOf(page) };
}

/** One gauge or counter. */
export function stat(engine: Engine, name: string): number {
  const found = engine.stats().find(([each]) => each === name);
  if (found === undefined) throw new Error(`no statistic ${name}`);
  return found[1];
}

/** List entries as a call page holds them. */
export function entryWords(entries: readonly (readonly [at: number, bytes: number])[]): Uint32Array {
  return Uint32Array.from(
    entries.flatMap(([at, bytes]) => [at, Math.floor(at / 2 ** 32), bytes, Math.floor(bytes / 2 ** 32)]),
  );
}

/** Where a device of the domain that reads or writes the byte ends up; -1 for a fault. */
export function reach(backend: FaultyBackend, at: number, access: number): number {
  return backend.iommu.translate(iova(at), access);
}

/** The guest's memory: real bytes for the fixture's RAM. */
export class FakeGuestMemory implements GuestMemory {
  readonly bytes = new Map<number, Uint8Array>();
  /** Called after a copy, as a guest that writes to the page just then. */
  afterCopyIn: () => void = () => undefined;

  constructor() {
    for (const each of RAM) {
      for (let at = 0; at < each.bytes; at += PAGE)
        this.bytes.set((each.gpa + at) / PAGE, new Uint8Array(PAGE));
    }
  }

  page(at: number): Uint32Array {
    const page = this.bytes.get(at / PAGE);
    if (page === undefined) throw new RangeError(`gpa ${at} is no RAM page`);
    return new Uint32Array(page.buffer);
  }

  copyIn(at: Gpa, bytes: number, into: Uint32Array): boolean {
    const page = this.bytes.get(Math.floor(at / PAGE));
    if (page === undefined || bytes > PAGE || at % PAGE !== 0) return false;
    into.set(new Uint32Array(page.buffer, 0, bytes / 4));
    this.afterCopyIn();
    return true;
  }

  copyOut(at: Gpa, bytes: number, from: Uint32Array): boolean {
    const page = this.bytes.get(Math.floor(at / PAGE));
    if (page === undefined || bytes > PAGE || at % PAGE !== 0) return false;
    new Uint32Array(page.buffer).set(from.subarray(0, bytes / 4));
    return true;
  }
}
