// Policy cached, the host's side: what is mapped when, what is given back when, what a guest that does not keep to the
// protocol can do; then random calls against simple truths, and threads that map while others reclaim. What a device
// reaches is asked of the software IOMMU.

import assert from "node:assert/strict";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import { DEVICE_FLAG, MAP_FLAG, POLICY, STATUS, TABLE } from "../../hypercalls/abi.js";
import { gpa, hva } from "../../hypercalls/addresses.js";
import { createEngineState, Engine, type EngineConfig, type EngineState } from "../../hypercalls/engine.js";
import { Pins } from "../../hypercalls/pins.js";
import { ERRNO, status } from "../../hypercalls/status.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import { sized } from "../soak.js";
import type { CachedJob, CachedReport } from "./support/cached-worker.js";
import {
  entryWords,
  FaultyBackend,
  hvaOfGpaPage,
  MiB,
  PAGE,
  RAM,
  RANGES,
  reach,
  stat,
} from "./support/engine-fixture.js";
import { OwnerTable } from "./support/owner-table.js";
import { Random, seeds } from "./support/random.js";
import { TableGuest } from "./support/table-guest.js";

const { read, write, counted, align } = MAP_FLAG;
const RW = read | write;
const ANY = 2 ** 64;
const LIMIT = (errno: number) => status(STATUS.limit, errno);
const INVALID = (errno: number) => status(STATUS.invalid, errno);
const TABLE_GPA = gpa(2 ** 32);
const GRANULE_PAGES = 4;
/** The gpa page behind RAM. */
const END_PAGE = RAM.at(-1)!.gpa / PAGE + RAM.at(-1)!.bytes / PAGE;
/** Pages of the second and third slot, which follow each other in gpa. */
const HIGH_PAGE = MiB / PAGE;

interface Options {
  readonly granulePages?: number;
  readonly entries?: number;
  readonly hostEntries?: number;
  readonly quotaBytes?: number;
  readonly lockedBytesMax?: number;
  /** Policy of the third device. */
  readonly third?: "cached" | "strict";
}

/** Devices 1 and 2 in a cached domain, device 3 in one of its own, strict unless told otherwise. */
function makeCached({
  granulePages = GRANULE_PAGES,
  entries = 4096,
  hostEntries = entries,
  third = "strict",
  ...options
}: Options = {}) {
  const settings = {
    ranges: RANGES,
    entries: hostEntries,
    lockedBytesMax: options.lockedBytesMax ?? Number.POSITIVE_INFINITY,
    memory: RAM,
    lanes: 0,
    tables: 2048,
  };
  const backends = [0, 1].map(() => new FaultyBackend(new SoftIommu(SoftIommu.create(settings))));
  const limits = { ...backends[0]!.iommu.limits(), entries };
  const device = (handle: number, policy: "cached" | "strict") => ({
    name: `0000:0${handle}:00.0`,
    bdf: handle << 3,
    policy,
    domain: handle < 3 ? 0 : 1,
    addressBits: 39,
    quotaBytes: 0,
    lockableBytes: 0,
  });
  const domain = {
    kind: "cached",
    limits,
    cached: { tableGpa: TABLE_GPA, granuleBytes: granulePages * PAGE },
  } as const;
  const config: EngineConfig = {
    ram: RAM,
    domains: [domain, third === "cached" ? domain : { kind: "translated", limits }],
    devices: [device(1, "cached"), device(2, "cached"), device(3, third)],
    quotaBytes: options.quotaBytes ?? 0,
    lanes: 2,
  };
  const state = createEngineState(config);
  const entriesOfTable = new Int32Array(END_PAGE);
  const table = { entries: entriesOfTable, clear: () => void entriesOfTable.fill(0) };
  const otherEntries = new Int32Array(END_PAGE);
  const otherTable = { entries: otherEntries, clear: () => void otherEntries.fill(0) };
  const engineOf = (lane: number) =>
    new Engine(
      state,
      (domain) => backends[domain]!,
      lane,
      (domain) => (domain === 0 ? table : otherTable),
    );
  const engine = engineOf(0);
  const pins = new Pins(state.pins, 0, "own");
  const guest = new TableGuest(entriesOfTable, engine, 1);
  return {
    state,
    engine,
    another: () => engineOf(1),
    otherEntries,
    guest,
    backend: backends[0]!,
    strict: backends[1]!,
    pins,
  };
}
type Cached = ReturnType<typeof makeCached>;

const reaches = ({ backend }: Cached, page: number) => reach(backend, page * PAGE, RW) === hvaOfGpaPage(page);

/** Gives back everything that nobody uses: two looks, since the first forgets that it was used. */
async function sweep({ engine }: Cached): Promise<void> {
  for (let look = 0; look < 2; look++) await engine.sweep(3, async () => true);
}

/**
 * PINNED is set on pages of granules that are mapped, and on no others; pins, entries and figures say the same. With
 * `wasHidden` a page that is mapped may wait for its next map to be PINNED.
 */
function assertConsistent(cached: Cached, granulePages = GRANULE_PAGES, wasHidden = false): void {
  const { engine, guest, backend, pins } = cached;
  let pages = 0;
  let ramPage = 0;
  for (let page = 0; page < END_PAGE; page++) {
    if (hvaOfGpaPage(page) === undefined) {
      assert.equal(guest.isPinned(page), false, `page ${page} is no RAM`);
      continue;
    }
    if (!wasHidden || guest.isPinned(page))
      assert.equal(guest.isPinned(page), reaches(cached, page), `page ${page}`);
    if (reaches(cached, page)) pages++;
    assert.equal(pins.countOf(ramPage++), reaches(cached, page) ? 1 : 0, `pins of page ${page}`);
  }
  assert.equal(engine.pinnedBytes, pages * PAGE);
  assert.equal(engine.mappedBytes(1), pages * PAGE);
  assert.equal(stat(engine, "dma/entries"), backend.iommu.entriesUsed);
  for (const [page, entry] of backend.entries) {
    assert.equal(page % granulePages, 0, "granules are aligned");
    assert.ok(entry.pages <= granulePages);
  }
}

const calls = suite("cached: calls");

calls("is_assigned and table tell what there is; a device without a table has none", () => {
  const { engine } = makeCached({ quotaBytes: MiB });
  assert.equal(engine.isAssigned(8), 0);
  assert.equal(engine.out[1], POLICY.cached | DEVICE_FLAG.identity);
  assert.equal(engine.out[4], MiB / GRANULE_PAGES, "each page of a mapping may take a granule");
  assert.equal(engine.table(1, 0), 0);
  assert.deepEqual([...engine.out.slice(0, 2)], [TABLE_GPA, END_PAGE]);
  assert.equal(engine.table(2, 0), 0);
  assert.equal(engine.out[0], TABLE_GPA, "one for the domain");
  assert.equal(engine.table(3, 1), 0);
  assert.deepEqual([...engine.out.slice(0, 2)], [0, 0]);
  assert.equal(engine.table(4, 0), INVALID(ERRNO.ENODEV));
  assert.equal(engine.table(1, 2), INVALID(ERRNO.EINVAL));
  assert.equal(
    engine.map(3, 0, 1, ANY, RW | counted),
    INVALID(ERRNO.EINVAL),
    "nobody counts for this device",
  );
});

calls("a first map takes a call and maps the granule; the next ones of it take none", () => {
  const cached = makeCached();
  const { guest, engine, backend } = cached;
  assert.equal(guest.map(5, 1), 0);
  assert.equal(guest.calls, 1);
  assert.equal(engine.out[0], 5 * PAGE, "IOVA = gpa");
  for (const page of [4, 5, 6, 7]) assert.ok(reaches(cached, page));
  assert.equal(backend.maps, 1);
  assert.equal(guest.map(5, 1), 0);
  assert.equal(guest.map(4, 4), 0);
  assert.equal(guest.calls, 1);
  for (const [page, pages] of [
    [5, 1],
    [5, 1],
    [4, 4],
  ] as const)
    guest.unmap(page, pages);
  assert.ok(reaches(cached, 5), "it stays mapped");
  assertConsistent(cached);
});

calls("a granule ends where RAM does, and a range may go on in the next slot", () => {
  const cached = makeCached({ granulePages: 32 });
  const { guest, engine } = cached;
  assert.equal(guest.map(47, 1), 0);
  assert.equal(engine.pinnedBytes, 16 * PAGE, "48 pages are a granule and a half");
  assert.equal(guest.map(HIGH_PAGE + 60, 8), 0);
  assertConsistent(cached, 32);
  assert.equal(engine.map(1, 46 * PAGE, 4 * PAGE, ANY, RW | counted), INVALID(ERRNO.EFAULT), "a hole");
  assert.throws(() => makeCached({ granulePages: 3 }), /powers of two/);
  assert.throws(() => makeCached({ granulePages: 128 }), /does not begin with a granule/);
});

calls("a quota that is less than a granule is told as a page, not as none", () => {
  const { engine } = makeCached({ quotaBytes: 2 * PAGE });
  assert.equal(engine.isAssigned(8), 0);
  assert.equal(engine.out[4], PAGE);
});

calls("a list of scattered pages is one call", () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  const pages = [1, 9, 17, HIGH_PAGE + 3];
  for (const page of pages) Atomics.add(guest.entries, page, 1);
  const list = entryWords(pages.map((page) => [page * PAGE + 8, 100]));
  assert.equal(engine.mapList(1, list, pages.length, ANY, RW), INVALID(ERRNO.EINVAL), "not one range");
  assert.equal(engine.mapList(1, list, pages.length, ANY, RW | counted), 0);
  assert.equal(engine.out[1], pages.length);
  for (const page of pages) assert.ok(reaches(cached, page));
  assert.equal(engine.mapList(1, list, 4, MiB - 1, RW | counted), INVALID(ERRNO.ERANGE), "beyond its mask");
  assertConsistent(cached);
});

calls("a guest that does not count has it done by the host, and unmaps by calls", async () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  assert.equal(engine.map(1, 8 * PAGE, PAGE, ANY, read), 0);
  assert.equal(guest.count(8), 1);
  await sweep(cached);
  assert.ok(reaches(cached, 8), "in use");
  assert.equal(engine.unmap(1, 8 * PAGE, PAGE), 0);
  assert.equal(guest.count(8), 0);
  assert.equal(engine.unmap(1, 8 * PAGE, PAGE), INVALID(ERRNO.ESTALE), "once too often");
  assert.equal(engine.unmap(1, 47 * PAGE, 2 * PAGE), INVALID(ERRNO.ESTALE), "no RAM");
  assert.equal(engine.map(1, 9 * PAGE, 2 * PAGE, ANY, RW | align), INVALID(ERRNO.ERANGE));
  assert.equal(guest.count(9), 0);
  await sweep(cached);
  assert.ok(!reaches(cached, 8));
  assertConsistent(cached);
});

calls("a count that would overflow is refused, and nothing is changed", () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  const most = (TABLE.countMask >>> 1) + 1;
  Atomics.store(guest.entries, 3, most);
  assert.equal(engine.map(1, 2 * PAGE, 2 * PAGE, ANY, RW), LIMIT(ERRNO.EOVERFLOW));
  assert.deepEqual([guest.count(2), guest.count(3)], [0, most]);
});

calls("what is idle is given back, what is in use or was used lately is not", async () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  guest.map(0, 1);
  guest.map(4, 1);
  guest.map(8, 1);
  guest.unmap(0, 1);
  guest.unmap(8, 1);
  await engine.sweep(1, async () => true);
  for (const page of [0, 4, 8]) assert.ok(reaches(cached, page), "used since the last look");
  guest.map(8, 1);
  guest.unmap(8, 1);
  await engine.sweep(1, async () => true);
  assert.deepEqual(
    [0, 4, 8].map((page) => reaches(cached, page)),
    [false, true, true],
  );
  await engine.sweep(1, async () => true);
  assert.deepEqual(
    [0, 4, 8].map((page) => reaches(cached, page)),
    [false, true, false],
  );
  assert.equal(stat(engine, "dma/idled"), 2);
  assertConsistent(cached);
});

calls("a page that is mapped between the host's look at its entry and the swap stays mapped", async () => {
  for (let page = 0; page < GRANULE_PAGES; page++) {
    const cached = makeCached();
    const { guest, engine } = cached;
    guest.map(0, GRANULE_PAGES);
    guest.unmap(0, GRANULE_PAGES);
    await engine.sweep(1, async () => true);
    // The other CPU's step, in the one place where it is hard to hit by chance.
    const { load } = Atomics;
    let mapped: number | undefined;
    Atomics.load = ((array: Int32Array, index: number) => {
      const value = load(array, index);
      if (array === guest.entries && index === page) mapped ??= guest.map(page, 1);
      return value;
    }) as typeof Atomics.load;
    try {
      await engine.sweep(1, async () => true);
    } finally {
      Atomics.load = load;
    }
    assert.equal(mapped, 0);
    assert.equal(guest.calls, 1, "by a count alone");
    assert.equal(guest.count(page), 1);
    assert.ok(reaches(cached, page), `page ${page}`);
    assertConsistent(cached);
  }
});

calls("without an entry left the least used granule makes room; with all in use it is a limit", () => {
  const cached = makeCached({ entries: 3 });
  const { guest, engine } = cached;
  for (const page of [0, 4, 8]) guest.map(page, 1);
  guest.unmap(4, 1);
  assert.equal(guest.map(12, 1), 0);
  assert.deepEqual(
    [0, 4, 8, 12].map((page) => reaches(cached, page)),
    [true, false, true, true],
  );
  assert.equal(stat(engine, "dma/evicted"), 1);
  assert.equal(guest.map(16, 1), LIMIT(ERRNO.ENOSPC));
  assert.equal(guest.count(16), 0);
  assertConsistent(cached);
});

calls("the same under a quota, under the host's limits, and with a list larger than all of them", () => {
  for (const options of [
    { quotaBytes: 3 * GRANULE_PAGES * PAGE },
    { hostEntries: 3 },
    { lockedBytesMax: 3 * GRANULE_PAGES * PAGE },
  ]) {
    const cached = makeCached(options);
    const { guest } = cached;
    for (let round = 0; round < 3; round++) {
      for (let page = 0; page < 48; page += 4) {
        assert.equal(guest.map(page, 2), 0);
        guest.unmap(page, 2);
      }
    }
    assert.equal(guest.map(0, 13) & 0xff, STATUS.limit, "four granules at a time");
    for (let page = 0; page < 13; page++) assert.equal(guest.count(page), 0);
    assertConsistent(cached);
  }
});

calls("a strict device gets what a cached one does not use", () => {
  const cached = makeCached({ quotaBytes: 2 * GRANULE_PAGES * PAGE });
  const { guest, engine } = cached;
  guest.map(0, 1);
  guest.map(4, 1);
  guest.unmap(4, 1);
  assert.equal(engine.map(3, 20 * PAGE, PAGE, ANY, RW), 0);
  assert.ok(!reaches(cached, 4));
  assert.ok(reaches(cached, 0));
});

calls("a strict device's map takes as much from a cached one as it needs, sixteen granules at a time", () => {
  const cached = makeCached({ granulePages: 1, quotaBytes: 64 * PAGE });
  const { guest } = cached;
  guest.map(HIGH_PAGE, 64);
  guest.unmap(HIGH_PAGE, 62);
  // Another thread's: it has not searched in this domain before.
  const engine = cached.another();
  assert.equal(engine.map(3, 0, 40 * PAGE, ANY, RW), 0);
  assert.equal(stat(engine, "dma/evicted"), 48);
  const more = (HIGH_PAGE + 64) * PAGE;
  assert.equal(engine.map(3, more, 23 * PAGE, ANY, RW), LIMIT(ERRNO.EDQUOT), "what is idle is not enough");
  assert.equal(engine.map(3, more, 22 * PAGE, ANY, RW), 0);
  assert.equal(engine.pinnedBytes, 64 * PAGE);
  for (const page of [62, 63]) assert.ok(reaches(cached, HIGH_PAGE + page), "what is in use stays");
});

calls("and for want of memory that can be locked, which all share", () => {
  const { guest, engine, strict } = makeCached({ granulePages: 1 });
  guest.map(HIGH_PAGE, 64);
  guest.unmap(HIGH_PAGE, 64);
  let faults = 1;
  strict.mapFault = () => (faults-- > 0 ? { errno: ERRNO.ENOMEM } : undefined);
  assert.equal(engine.map(3, 0, 40 * PAGE, ANY, RW), 0);
  assert.equal(stat(engine, "dma/evicted"), 48);
});

calls("so does another cached domain, for which each page of a list takes a granule", () => {
  const options = { granulePages: 2, quotaBytes: 100 * PAGE, third: "cached" } as const;
  const { guest, engine, otherEntries } = makeCached(options);
  guest.map(HIGH_PAGE, 96);
  guest.unmap(HIGH_PAGE, 96);
  const pages = Array.from({ length: 24 }, (_, n): [number, number] => [n * 2 * PAGE, PAGE]);
  for (const [at] of pages) otherEntries[at / PAGE]!++;
  assert.equal(engine.mapList(3, entryWords(pages), pages.length, ANY, RW | counted), 0);
  assert.ok(stat(engine, "dma/evicted") < 48, "and not more");
});

calls("a list for which everything that is idle has to go is served", () => {
  const { guest, engine } = makeCached({ granulePages: 1, entries: 40 });
  for (let at = 0; at < 40; at++) guest.map(at, 1);
  guest.unmap(0, 40);
  assert.equal(guest.map(HIGH_PAGE, 40), 0);
  assert.equal(stat(engine, "dma/evicted"), 40);
});

calls("the same while other CPUs use all of it again and again", () => {
  const { guest, backend } = makeCached({ granulePages: 1, entries: 40 });
  for (let at = 0; at < 40; at++) guest.map(at, 1);
  guest.unmap(0, 40);
  backend.unmapFault = () => {
    for (let at = 0; at < 40; at++) if (guest.isPinned(at)) guest.entries[at]! |= TABLE.used;
    return undefined;
  };
  assert.equal(guest.map(HIGH_PAGE, 40), 0);
});

calls("a guest that has all but one granule in use does not have the host search for ever", () => {
  const cached = makeCached({ granulePages: 1, entries: 20 });
  const { guest, engine, backend } = cached;
  guest.map(0, 20);
  guest.unmap(19, 1);
  // Says that it has counted, and has not: what a call maps is free again at once.
  const result = engine.map(1, HIGH_PAGE * PAGE, 90 * PAGE, ANY, RW | counted);
  assert.equal(result, LIMIT(ERRNO.ENOSPC));
  assert.ok(
    stat(engine, "dma/evicted") <= 60,
    `${stat(engine, "dma/evicted")} granules given back, not one for each page`,
  );
  assert.equal(backend.iommu.entriesUsed, 20);
  for (let page = 0; page < 19; page++) assert.ok(reaches(cached, page), `page ${page} is in use`);
  assertConsistent(cached, 1);
});

calls("while there are rules of injection every map makes its call, and afterwards none", () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  guest.map(0, 1);
  const rule = {
    calls: "map",
    handle: 0,
    minBytes: 0,
    skip: 0,
    when: { every: 2 },
    burst: 1,
    effect: { errno: "ENOMEM" },
  } as const;
  const id = engine.injector.add(rule);
  engine.injectionChanged();
  const results = [1, 2, 3, 4].map(() => guest.map(0, 1));
  assert.deepEqual(results, [0, LIMIT(ERRNO.ENOMEM), 0, LIMIT(ERRNO.ENOMEM)]);
  assert.equal(guest.count(0), 3);
  assert.equal(guest.isPinned(0), false);
  assert.ok(reaches(cached, 0), "and it stays mapped");
  engine.injector.remove(id);
  engine.injectionChanged();
  const before = guest.calls;
  guest.map(0, 1);
  guest.map(0, 1);
  assert.equal(guest.calls, before + 1);
});

calls("begun anew, and with the domain's last device, everything is unmapped and no count is left", () => {
  const cached = makeCached();
  const { guest, engine } = cached;
  guest.map(0, 9);
  assert.equal(engine.table(1, 1), 0);
  assert.equal(guest.count(0), 0);
  assertConsistent(cached);
  assert.equal(engine.pinnedBytes, 0);
  guest.map(0, 9);
  assert.equal(engine.removeDevice(1), 0);
  assert.ok(reaches(cached, 0), "the other device's");
  assert.equal(guest.map(4, 1), status(STATUS.gone, ERRNO.ENODEV), "its next map is told");
  const other = new TableGuest(guest.entries, engine, 2);
  assert.equal(other.map(4, 1), 0);
  assert.equal(other.map(4, 1), 0);
  assert.equal(other.calls, 1, "the other's is PINNED again");
  assert.equal(engine.removeDevice(2), 0);
  assert.equal(engine.pinnedBytes, 0);
  assert.deepEqual([guest.count(0), guest.count(4)], [1, 3], "counts are the guest's");
  for (let page = 0; page < END_PAGE; page++) assert.ok(!guest.isPinned(page));
  guest.unmap(0, 9);
  assert.equal(engine.close(), 0);
  assert.equal(guest.count(4), 0, "until the machine ends");
});

calls("what the backend does not unmap is stuck: never PINNED, never said to be mapped, tried again", () => {
  const cached = makeCached({ entries: 2 });
  const { guest, engine, backend } = cached;
  guest.map(0, 1);
  guest.unmap(0, 1);
  guest.map(4, 1);
  backend.unmapFault = () => ({ errno: ERRNO.EINVAL });
  assert.equal(guest.map(8, 1), LIMIT(ERRNO.ENOSPC));
  assert.equal(stat(engine, "dma/stuck_mappings"), 1);
  assert.equal(engine.pinnedBytes, 2 * GRANULE_PAGES * PAGE, "its pages stay pinned");
  assert.equal(guest.map(0, 1), LIMIT(ERRNO.EPROTO));
  backend.unmapFault = () => undefined;
  assert.equal(guest.map(8, 1), 0);
  assert.equal(stat(engine, "dma/stuck_mappings"), 0);
  assertConsistent(cached);
});

calls("a guest that scribbles over the table hurts itself alone", async () => {
  const cached = makeCached({ entries: 4 });
  const { guest, engine, backend } = cached;
  const random = new Random(7);
  for (let step = 0; step < 5000; step++) {
    guest.entries[random.below(END_PAGE)] = random.below(2 ** 32) | 0;
    engine.map(1, random.below(48) * PAGE, PAGE, ANY, RW | (random.oneIn(2) ? counted : 0));
    if (random.oneIn(4)) engine.unmap(1, random.below(48) * PAGE, PAGE);
    if (random.oneIn(50)) await engine.sweep(2, async () => true);
    const pages = [...backend.entries.values()].reduce((sum, entry) => sum + entry.pages, 0);
    assert.equal(engine.pinnedBytes, pages * PAGE, "what is mapped is pinned, and nothing else is");
    assert.ok(backend.entries.size <= 4);
  }
  assert.equal(engine.close(), 0);
  assert.equal(engine.pinnedBytes, 0);
  assert.equal(backend.entries.size, 0);
});

calls.run();

// ---- random calls -----------------------------------------------------------------------------------------------------

const model = suite("cached: random calls");
const OPERATIONS = sized(4000, 100_000);

/** What a driver has: ranges of pages, mapped as one; how it is unmapped. */
interface Held {
  readonly ranges: readonly { readonly page: number; readonly pages: number }[];
  readonly handle: number;
  readonly how: "counted" | "called" | "strict";
  /** strict: its bus address. */
  readonly iova: number;
}

/** One random history: two devices that are counted, one that is strict and shares their quota, a host that fails. */
class Story {
  readonly #random: Random;
  readonly #granulePages: number;
  readonly #cached: Cached;
  readonly #guests: readonly TableGuest[];
  #held: Held[] = [];
  #isGone = false;
  readonly #hasRules: boolean;
  #rules: number[] = [];
  /** Whether a rule or a device's end has taken PINNED from what is mapped. */
  #wasHidden = false;
  /** What happened, to know that the test tests something. */
  readonly seen: Map<string, number>;

  constructor(seed: number, seen: Map<string, number>) {
    const random = new Random(seed);
    this.#random = random;
    this.seen = seen;
    this.#hasRules = random.oneIn(2);
    this.#granulePages = 2 ** random.below(5);
    this.#cached = makeCached({
      granulePages: this.#granulePages,
      entries: 3 + random.below(40),
      quotaBytes: random.oneIn(2) ? (8 + random.below(100)) * this.#granulePages * PAGE : 0,
    });
    const { guest, engine } = this.#cached;
    this.#guests = [guest, new TableGuest(guest.entries, engine, 2)];
  }

  async run(steps: number): Promise<void> {
    const { backend, strict, engine } = this.#cached;
    const random = this.#random;
    let failing = false;
    const mapFault = () =>
      failing && random.oneIn(4) ? { errno: random.pick([ERRNO.ENOMEM, ERRNO.EAGAIN]) } : undefined;
    for (const each of [backend, strict]) each.mapFault = mapFault;
    backend.unmapFault = () => (failing && random.oneIn(8) ? { errno: ERRNO.EINVAL } : undefined);
    for (let step = 0; step < steps; step++) {
      failing = step % 1000 < 300;
      if (this.#held.length > 0 && (this.#held.length > 12 || random.oneIn(2))) this.#unmap();
      else this.#map();
      if (random.oneIn(40)) await engine.sweep(1 + random.below(8), async () => !random.oneIn(4));
      if (this.#hasRules && random.oneIn(200)) this.#changeRules();
      if (random.oneIn(1500)) this.#beginAnew();
      if (step === Math.floor(steps * 0.9)) this.#remove();
      if (step % 25 === 0) this.#compare();
    }
    failing = false;
    this.#compareCounts();
    assert.equal(engine.close(), 0);
    assert.equal(backend.entries.size + strict.entries.size, 0);
    assert.equal(engine.pinnedBytes, 0);
  }

  #see(what: string): void {
    this.seen.set(what, (this.seen.get(what) ?? 0) + 1);
  }

  #range() {
    const random = this.#random;
    const pages = 1 + random.below(6);
    return { page: random.oneIn(2) ? random.below(48 - pages) : HIGH_PAGE + random.below(96 - pages), pages };
  }

  #map(): void {
    const random = this.#random;
    const { engine } = this.#cached;
    const guest = random.pick(this.#guests);
    const { handle } = guest;
    const ranges = [this.#range()];
    const [{ page, pages }] = ranges as [Held["ranges"][number]];
    let how: Held["how"] = "counted";
    let result: number;
    switch (random.below(24)) {
      case 0:
        how = "strict";
        result = engine.map(3, page * PAGE, pages * PAGE, ANY, RW);
        break;
      case 1:
      case 2:
      case 3:
      case 4:
        how = "called";
        result = engine.map(handle, page * PAGE, pages * PAGE, ANY, RW);
        break;
      case 5:
      case 6:
      case 7: {
        while (ranges.length < 5) ranges.push(this.#range());
        for (const each of ranges)
          for (let at = 0; at < each.pages; at++) Atomics.add(guest.entries, each.page + at, 1);
        const list = entryWords(ranges.map((each) => [each.page * PAGE, each.pages * PAGE]));
        result = engine.mapList(handle, list, ranges.length, ANY, RW | counted);
        if (result !== 0) for (const each of ranges) guest.unmap(each.page, each.pages);
        break;
      }
      default:
        result = guest.map(page, pages);
    }
    const what = how === "counted" && ranges.length > 1 ? "list" : how;
    this.#see(`${what} ${result === 0 ? "ok" : (result & 0xff) === STATUS.limit ? "limit" : "other"}`);
    if (result === 0) {
      this.#held.push({ ranges, handle, how, iova: engine.out[0]! });
      this.#assertReached(this.#held.at(-1)!);
      return;
    }
    const classes = [STATUS.limit, ...(this.#rules.length > 0 ? [STATUS.retry] : [])] as number[];
    if (this.#isGone && handle === 2 && how !== "strict") classes.push(STATUS.gone);
    assert.ok(classes.includes(result & 0xff), `status ${result}`);
  }

  #unmap(): void {
    const { engine } = this.#cached;
    const [gone] = this.#held.splice(this.#random.below(this.#held.length), 1) as [Held];
    this.#assertReached(gone);
    const [{ page, pages }] = gone.ranges as [Held["ranges"][number]];
    if (gone.how === "strict") assert.equal(engine.unmap(3, gone.iova, pages * PAGE), 0);
    else if (gone.how === "called" && !(this.#isGone && gone.handle === 2))
      assert.equal(engine.unmap(gone.handle, page * PAGE, pages * PAGE), 0);
    else for (const each of gone.ranges) this.#cached.guest.unmap(each.page, each.pages);
  }

  /** Whatever else went on: what a driver has is mapped. */
  #assertReached({ ranges, how, iova }: Held): void {
    for (const { page, pages } of ranges) {
      for (let at = 0; at < pages; at++) {
        const is =
          how === "strict"
            ? reach(this.#cached.strict, iova + at * PAGE, RW) === hvaOfGpaPage(page + at)
            : reaches(this.#cached, page + at);
        assert.ok(is, `page ${page + at}, ${how}`);
      }
    }
  }

  #changeRules(): void {
    const random = this.#random;
    const { engine } = this.#cached;
    if (this.#rules.length > 0) for (const id of this.#rules.splice(0)) engine.injector.remove(id);
    else
      this.#rules.push(
        engine.injector.add({
          calls: "map",
          handle: random.below(4),
          minBytes: 0,
          skip: 0,
          when: { every: 1 + random.below(4) },
          burst: 1 + random.below(3),
          effect: { errno: random.pick(["ENOSPC", "EAGAIN"] as const) },
        }),
      );
    engine.injectionChanged();
    this.#wasHidden = true;
  }

  /** Another kernel: nobody has anything. */
  #beginAnew(): void {
    const { engine, guest } = this.#cached;
    this.#held = this.#held.filter(({ how }) => how === "strict");
    const result = engine.table(1, 1);
    this.#see(`begun anew ${result === 0 ? "ok" : "limit"}`);
    const stuck = stat(engine, "dma/stuck_mappings");
    assert.equal(result === 0, stuck === 0);
    for (let page = 0; page < END_PAGE; page++) assert.equal(guest.entries[page], 0);
    if (stuck === 0) assert.equal(engine.mappedBytes(1), 0);
  }

  #remove(): void {
    this.#cached.engine.removeDevice(2);
    this.#isGone = true;
    this.#wasHidden = true;
    // What it has, its driver may go on believing in; the other device's pages stay.
    for (const held of this.#held) this.#assertReached(held);
  }

  #compare(): void {
    const { engine } = this.#cached;
    const stuck = stat(engine, "dma/stuck_mappings") > 0;
    if (stuck) this.#see("stuck");
    // With these there is more to the books than who is reached.
    if (stuck || this.#rules.length > 0 || this.#held.some(({ how }) => how === "strict")) return;
    this.#see("compared");
    assertConsistent(this.#cached, this.#granulePages, this.#wasHidden);
  }

  #compareCounts(): void {
    const counts = new Map<number, number>();
    for (const { ranges, how } of this.#held)
      for (const { page, pages } of how === "strict" ? [] : ranges)
        for (let at = page; at < page + pages; at++) counts.set(at, (counts.get(at) ?? 0) + 1);
    for (let page = 0; page < END_PAGE; page++)
      assert.equal(this.#cached.guest.count(page), counts.get(page) ?? 0);
  }
}

model("what a driver has is reached, and the books are right", async () => {
  const seen = new Map<string, number>();
  for (const seed of seeds(sized(12, 100))) {
    try {
      await new Story(seed, seen).run(OPERATIONS);
    } catch (error) {
      throw new Error(`PVDMA_SEED=${seed}: ${(error as Error).message}`, { cause: error });
    }
  }
  if (process.env.PVDMA_SEED !== undefined) return;
  const ends = ["counted", "called", "list", "strict"].flatMap((how) => [`${how} ok`, `${how} limit`]);
  assert.deepEqual(
    [...ends, "counted other", "begun anew ok", "stuck", "compared"].filter((what) => !seen.has(what)),
    [],
    "never happened",
  );
});

model.run();

// ---- threads ----------------------------------------------------------------------------------------------------------

const threads = suite("cached: threads");
const PAGES = 512;

threads("vCPUs map and unmap while the host reclaims: no page goes while it is held", async () => {
  const VCPUS = 4;
  const operations = sized(150_000, 5_000_000);
  const config: EngineConfig = {
    ram: [{ gpa: gpa(0), bytes: PAGES * PAGE, hva: hva(0) }],
    domains: [
      {
        kind: "cached",
        // Room for a quarter of the granules: four vCPUs with four times four pages fit just so.
        limits: { ranges: RANGES, pageSizeMask: PAGE, entries: PAGES / 4 / 4 },
        cached: { tableGpa: TABLE_GPA, granuleBytes: 4 * PAGE },
      },
    ],
    devices: [
      {
        name: "0000:01:00.0",
        bdf: 8,
        policy: "cached",
        domain: 0,
        addressBits: 39,
        quotaBytes: 0,
        lockableBytes: 0,
      },
    ],
    quotaBytes: 0,
    lanes: VCPUS + 1,
  };
  const state: EngineState = createEngineState(config);
  const shared = {
    table: new SharedArrayBuffer(PAGES * 4),
    owners: new SharedArrayBuffer(PAGES * 4),
    faults: new SharedArrayBuffer(8),
  };
  const workers = Array.from({ length: VCPUS }, (_, lane) => {
    const job: CachedJob = { state, ...shared, lane, operations: operations / VCPUS, ramPages: PAGES };
    return new Worker(new URL("./support/cached-worker.js", import.meta.url), { workerData: job });
  });
  const reports: CachedReport[] = [];
  const ended = workers.map(
    (worker) =>
      new Promise<void>((resolve, reject) => {
        worker.on("message", (report: CachedReport) => reports.push(report));
        worker.on("error", reject);
        worker.on("exit", () => resolve());
      }),
  );
  const entries = new Int32Array(shared.table);
  const owners = new OwnerTable(new Int32Array(shared.owners), new Int32Array(shared.faults));
  const engine = new Engine(
    state,
    () => owners,
    VCPUS,
    () => ({ entries, clear: () => void entries.fill(0) }),
  );
  let sweeps = 0;
  let running = true;
  const all = Promise.all(ended).finally(() => {
    running = false;
  });
  while (running) {
    await engine.sweep(8, async () => true);
    sweeps++;
    await new Promise((resolve) => setImmediate(resolve));
  }
  await all;
  assert.equal(reports.length, VCPUS);
  assert.deepEqual([...new Int32Array(shared.faults)], [0, 0], "mapped twice, gone while held");
  for (let page = 0; page < PAGES; page++) assert.equal(entries[page]! & TABLE.countMask, 0, `page ${page}`);
  const sum = (of: (report: CachedReport) => number) => reports.reduce((all, report) => all + of(report), 0);
  const evicted = stat(engine, "dma/evicted");
  const idled = stat(engine, "dma/idled");
  console.log(
    `${operations} operations, ${sum((each) => each.calls)} calls, ${sum((each) => each.refused)} refused; ` +
      `${evicted} granules evicted, ${idled} idle in ${sweeps} sweeps`,
  );
  assert.ok(evicted > 1000 && idled > 0, "there was something to reclaim");
  assert.equal(engine.close(), 0);
  assert.equal(engine.pinnedBytes, 0);
});

threads.run();
