// The engine against a small model of what it must do, by random calls: several devices in several domains, quotas,
// few entries, injection rules, and a host whose every map and unmap may fail. After each call the IOMMU's table, the
// pin counts and the answer must be the model's. `PVDMA_SEED=N` repeats one history; PVDMA_SOAK=1 makes 1,000,000 calls.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { CALL_NAMES, CALLS, type CallName, LIMITS, MAP_FLAG, STATUS } from "../../hypercalls/abi.js";
import { Dispatcher, FRAME_WORDS } from "../../hypercalls/dispatcher.js";
import { Engine } from "../../hypercalls/engine.js";
import {
  createInjection,
  INJECT,
  INJECTION_RULES_MAX,
  type InjectionRule,
  Injector,
} from "../../hypercalls/injection.js";
import { ERRNO, status, statusClassOf, statusErrnoOf, statusOfHostErrno } from "../../hypercalls/status.js";
import {
  entryWords,
  FakeGuestMemory,
  type Fault,
  type Fixture,
  type FixtureOptions,
  hvaOfGpaPage,
  MiB,
  makeEngine,
  PAGE,
  RAM,
  RAM_PAGES,
  RANGES,
  reach,
} from "./support/engine-fixture.js";
import { Random, SOAK, seeds } from "./support/random.js";

const { read, write, align } = MAP_FLAG;
const ANY = 2 ** 64;
const INVALID = (errno: number) => status(STATUS.invalid, errno);
const LIMIT = (errno: number) => status(STATUS.limit, errno);
const GONE = status(STATUS.gone, ERRNO.ENODEV);
const STUCK = LIMIT(ERRNO.EPROTO);
const CALL_PAGE = MiB + 10 * PAGE;

/** By handle: 1 and 2 share a domain, 3 has its own, 4 is in the identity domain. */
const DOMAIN_OF = [-1, 0, 0, 1, 2];
const BDF_OF = [-1, 0x10, 0x18, 0x10020, 0x28];
const HANDLES = [1, 2, 3, 4];
const TRANSLATED = [0, 1];
const IDENTITY_HANDLE = 4;

/** RAM page of a gpa page: the slots one after the other. */
const ramPageOf = (gpaPage: number) => (gpaPage < 48 ? gpaPage : gpaPage - MiB / PAGE + 48);
const SLOT_STARTS = new Set(RAM.map((slot) => slot.gpa / PAGE));
/** By gpa page, what the host has there; outside RAM undefined. */
const HVA = Array.from({ length: MiB / PAGE + 96 }, (_, page) => hvaOfGpaPage(page));

type ByteRange = readonly [start: number, bytes: number];

/** What becomes one entry of the IOMMU. */
interface Run {
  readonly gpaPage: number;
  readonly pages: number;
  readonly iovaPage: number;
  /** Whether the IOMMU has it: one that is half unmapped does not have all. */
  there: boolean;
}

interface Mapping {
  readonly handle: number;
  readonly iovaPage: number;
  readonly pages: number;
  readonly runs: readonly Run[];
  readonly access: number;
  stuck: boolean;
}

/** The runs that byte ranges become: contiguous in gpa and in host memory. */
function runsOf(ranges: readonly ByteRange[], iovaPage: number): Run[] {
  const runs: { gpaPage: number; pages: number; iovaPage: number; there: boolean }[] = [];
  for (const [start, bytes] of ranges) {
    for (let page = Math.floor(start / PAGE); page * PAGE < start + bytes; page++, iovaPage++) {
      const last = runs.at(-1);
      if (last !== undefined && last.gpaPage + last.pages === page && !SLOT_STARTS.has(page)) last.pages++;
      else runs.push({ gpaPage: page, pages: 1, iovaPage, there: true });
    }
  }
  return runs;
}

const pagesOf = (runs: readonly Run[]) => runs.reduce((sum, run) => sum + run.pages, 0);

/** What a history saw, to know that the test tests something. */
const seen = new Map<string, number>();
const see = (what: string) => seen.set(what, (seen.get(what) ?? 0) + 1);

/** One random history against the model. */
class History {
  /** The last calls, for whoever looks at a failure. */
  readonly trace: string[] = [];
  steps = 0;

  readonly #random: Random;
  readonly #options: Required<Pick<FixtureOptions, "entries" | "hostEntries" | "lockedBytesMax">>;
  /** In pages, by handle, 0 for the VM; infinite without one. */
  readonly #quotas: readonly number[];
  readonly #fixture: Fixture;
  /** Two threads' engines, one after the other. */
  readonly #engines: readonly Engine[];
  readonly #dispatchers: readonly Dispatcher[];
  readonly #memory = new FakeGuestMemory();
  readonly #frame = new Float64Array(FRAME_WORDS);
  /** The same rules once more, asked by the model. */
  readonly #oracle = new Injector(createInjection());
  /** One in so many backend calls fails; 0: none. */
  #faultRate = 0;
  /** Statuses of the failures that the backend was made to answer in the call under way. */
  readonly #faults: number[] = [];

  readonly #mappings: Mapping[] = [];
  readonly #gone = new Set<number>();
  /** Slots of RAM that are mapped one to one for the device with all of it: the first so many. */
  #identitySlots = 0;
  /** Pin counts that there should be, by handle and page, 0 for the VM. */
  readonly #pins = [0, ...HANDLES].map(() => new Int32Array(RAM_PAGES));
  readonly #pinned = [0, 0, 0, 0, 0];
  /** Counters that there should be. */
  readonly #counters = new Map<string, number>();

  constructor(seed: number) {
    const random = new Random(seed);
    this.#random = random;
    const entries = random.pick([4096, 40]);
    const hostEntries = random.pick([entries, entries, 30]);
    const lockedBytesMax = random.pick([2 ** 40, 2 ** 40, 100 * PAGE]);
    this.#options = { entries, hostEntries, lockedBytesMax };
    const quotas = [0, ...HANDLES].map((handle) =>
      random.pick(handle === IDENTITY_HANDLE ? [0, 0, 0, 100] : [0, 0, 30, 60]),
    );
    this.#quotas = quotas.map((pages) => (pages === 0 ? Number.POSITIVE_INFINITY : pages));
    this.#fixture = makeEngine({
      ...this.#options,
      // Room for 64 pages at first, in some histories.
      ranges: random.oneIn(5) ? [{ first: MiB, last: MiB + 64 * PAGE - 1 }] : RANGES,
      quotaBytes: quotas[0]! * PAGE,
      deviceQuotaBytes: quotas.map((pages) => pages * PAGE),
    });
    const { engine, state, backends } = this.#fixture;
    this.#engines = [engine, new Engine(state, (domain) => backends[domain]!, 1)];
    this.#dispatchers = this.#engines.map((each) => new Dispatcher(each, this.#memory));
    const fails = (choices: readonly Fault[]) => (): Fault => {
      if (this.#faultRate === 0 || !random.oneIn(this.#faultRate)) return undefined;
      const fault = random.pick(choices);
      this.#faults.push(fault === "partly" || fault === undefined ? STUCK : statusOfHostErrno(fault.errno));
      return fault;
    };
    const { ENOMEM, ENOSPC, EFAULT, EAGAIN, EINTR, ENODEV, EINVAL } = ERRNO;
    const mapErrnos = [ENOMEM, ENOSPC, EFAULT, EAGAIN, EAGAIN, EINTR, ENODEV].map((errno) => ({ errno }));
    for (const backend of backends) {
      backend.mapFault = fails(mapErrnos);
      backend.unmapFault = fails([{ errno: EINVAL }, "partly"]);
    }
  }

  run(steps: number): void {
    this.#mapIdentity();
    for (; this.steps < steps; this.steps++) {
      if (this.steps % 100 === 0) this.#faultRate = this.#random.pick([0, 0, 12, 3]);
      this.#faults.length = 0;
      for (const backend of this.#fixture.backends) backend.mapped.length = 0;
      this.#step();
      this.#compare();
      if (this.steps % 256 === 0) this.#compareStatistics();
    }
    if (this.#random.oneIn(2)) this.#removeIdentity();
    this.#end();
  }

  #step(): void {
    const kind = this.#random.below(200);
    const crowded = this.#mappings.length > 40;
    if (kind < 50 && !crowded) this.#map("map");
    else if (kind < 105 && !crowded) this.#map("map_list");
    else if (kind < 140) this.#unmap();
    else if (kind < 165) this.#unmapList();
    else if (kind < 180) this.#nonsense();
    else if (kind < 190) this.#changeRules();
    else if (kind < 196) this.#ask();
    else if (kind < 199) this.#release(this.#handle());
    else if (this.#random.oneIn(3)) this.#reset();
    else if (this.#random.oneIn(8)) this.#remove(this.#handle());
    else this.#release(this.#handle());
  }

  /** With nothing that fails any more, all goes. */
  #end(): void {
    this.#faultRate = 0;
    this.#faults.length = 0;
    const { engine, state, backends } = this.#fixture;
    engine.injector.clear();
    this.#oracle.clear();
    this.#reset();
    assert.equal(this.#mappings.length, 0);
    this.#compare();
    this.#compareStatistics();
    assert.equal(engine.close(), 0);
    for (const backend of backends) assert.equal(backend.iommu.entriesUsed, 0);
    for (const memory of [state.pins, ...state.devicePins]) {
      // The second word is the peak.
      const words = new Int32Array(memory).filter((_, index) => index !== 2);
      assert.ok(
        words.every((word) => word === 0),
        "something is pinned at the end",
      );
    }
  }

  // ---- calls --------------------------------------------------------------------------------------------------------

  /** Makes a call; returns its status. Registers that are not results must be what they were. */
  #call(name: CallName, ...registers: number[]): number {
    const frame = this.#frame;
    for (let i = 1; i < FRAME_WORDS; i++) frame[i] = registers[i - 1] ?? 1000 + i;
    const before = [...frame];
    frame[0] = CALLS[name].number;
    this.trace.push(`${name}(${registers})`);
    this.#random.pick(this.#dispatchers).dispatch(frame, 0);
    this.trace.push(` = ${statusClassOf(frame[0])}/${statusErrnoOf(frame[0])} ${frame.slice(1)}`);
    if (this.trace.length > 60) this.trace.splice(0, 2);
    const { out } = CALLS[name];
    const list = name === "map_list" || name === "unmap_list";
    ["rdi", "rsi", "r8", "r9", "r10"].forEach((register, index) => {
      const result = register in out && (frame[0] === 0 || (list && register === "rsi"));
      if (!result) assert.equal(frame[index + 1], before[index + 1], register);
    });
    return frame[0];
  }

  /** Enters a call in the counters that there should be. */
  #count(name: CallName, handle: number, result: number, injected: boolean, pages: number): void {
    const add = (path: string, more: number) => {
      this.#counters.set(path, (this.#counters.get(path) ?? 0) + more);
      if (handle === 0 || path.startsWith("hypercalls/status")) return;
      const ofDevice = `devices/0000:0${handle}:00.0/${path}`;
      this.#counters.set(ofDevice, (this.#counters.get(ofDevice) ?? 0) + more);
    };
    const statusClass = statusClassOf(result);
    add(`hypercalls/${name}/calls`, 1);
    add(`hypercalls/${name}/pages`, pages);
    if (result !== 0) add(`hypercalls/${name}/${injected ? "injected" : "errors"}`, 1);
    if (injected) add("dma/injected", 1);
    else if (statusClass === STATUS.limit && name.startsWith("map")) add("dma/limit_hits", 1);
    add(`hypercalls/status/${Object.keys(STATUS)[statusClass]}`, 1);
    see(`${name} ${injected ? "injected" : Object.keys(STATUS)[statusClass]}`);
  }

  #countReleased(handle: number, mappings: number): void {
    for (const path of ["", `devices/0000:0${handle}:00.0/`]) {
      const name = `${path}dma/released_mappings`;
      this.#counters.set(name, (this.#counters.get(name) ?? 0) + mappings);
    }
  }

  /** Whether there is little IOVA. */
  get #isTight(): boolean {
    return this.#fixture.engine.rangeWords.length < RANGES.length * 4;
  }

  #handle(): number {
    return this.#random.oneIn(8) ? IDENTITY_HANDLE : 1 + this.#random.below(3);
  }

  /** A byte range in RAM; sometimes one that goes on where `after` ended. */
  #range(after: ByteRange | undefined): ByteRange {
    const random = this.#random;
    for (;;) {
      let start = random.pick([random.below(48), MiB / PAGE + random.below(96)]) * PAGE;
      if (after !== undefined && random.oneIn(2)) start = Math.ceil((after[0] + after[1]) / PAGE) * PAGE;
      else if (random.oneIn(3)) start += random.below(PAGE);
      const bytes = 1 + random.below(random.pick([100, PAGE, 5 * PAGE]));
      const first = Math.floor(start / PAGE);
      const last = Math.floor((start + bytes - 1) / PAGE);
      let page = first;
      while (page <= last && HVA[page] !== undefined) page++;
      if (page > last) return [start, bytes];
      after = undefined;
    }
  }

  #map(name: "map" | "map_list"): void {
    const random = this.#random;
    const { backends } = this.#fixture;
    const handle = this.#handle();
    const ranges: ByteRange[] = [];
    const count = name === "map" ? 1 : 1 + random.below(9);
    while (ranges.length < count) ranges.push(this.#range(ranges.at(-1)));
    const [start, bytes] = ranges[0]!;
    const access = 1 + random.below(3);
    const flags = access | (random.oneIn(3) ? align : 0);
    const mask = random.pick([2 ** 24 - 1, 2 ** 28 - 1, 2 ** 32 - 1, ANY]);
    let result: number;
    if (name === "map") result = this.#call(name, handle, start, bytes, mask, flags);
    else {
      this.#memory.page(CALL_PAGE).set(entryWords(ranges));
      result = this.#call(name, handle, CALL_PAGE, count, mask, flags);
      const done = this.#frame[2]!;
      assert.ok(result === 0 ? done === count : done >= 0 && done < count, `${done} of ${count} done`);
    }
    const iovaPage = Math.floor(this.#frame[1]! / PAGE);
    const runs = runsOf(ranges, iovaPage);
    const pages = pagesOf(runs);
    if (this.#gone.has(handle)) {
      assert.equal(result, GONE);
      this.#count(name, handle, result, false, 0);
      return;
    }
    const errno = this.#oracle.decide(
      INJECT.map,
      handle,
      ranges.reduce((sum, range) => sum + range[1], 0),
    );
    this.#count(name, handle, result, errno !== 0, result === 0 ? pages : 0);
    if (errno !== 0)
      assert.equal(result, status(errno === ERRNO.EAGAIN ? STATUS.retry : STATUS.limit, errno));
    if (errno !== 0) return;
    if (handle === IDENTITY_HANDLE) {
      assert.equal(result, this.#identityMap(runs, mask, flags));
      if (result === 0) assert.equal(this.#frame[1], name === "map" ? start : start - (start % PAGE));
      return;
    }
    // When it first met a limit, what was stuck has been tried again; then it was tried once more.
    const first = this.#limitOf(handle, runs);
    const attempts = this.#attempts(DOMAIN_OF[handle]!);
    const stuck = this.#mappings.filter((mapping) => mapping.stuck);
    const taken = new Set(attempts.flat());
    const failed = backends[DOMAIN_OF[handle]!]!.mapped.filter((page) => page === -1).length;
    assert.ok(failed <= (result === 0 ? 1 : 2), "tried more than twice");
    for (const mapping of stuck) {
      const same = DOMAIN_OF[mapping.handle] === DOMAIN_OF[handle];
      this.#settle(mapping, same ? taken : undefined);
    }
    const went = stuck.some((mapping) => !this.#mappings.includes(mapping));
    if (went) see(`reclaimed, and then ${result === 0 ? "mapped" : "not"}`);
    if (result === 0 && this.#faults.includes(LIMIT(ERRNO.EAGAIN))) see("EAGAIN, and then mapped");
    // The model does not know where the allocator finds no room; it is sure to where there is plenty.
    const tight = this.#isTight;
    if (first === 0 && this.#faults.length === 0 && !tight) assert.ok(!went, "reclaimed without need");
    const second = this.#limitOf(handle, runs);
    // What a failed attempt could not undo is stuck.
    const last = result === 0 ? attempts.at(-1) : undefined;
    attempts.forEach((attempt, index) => {
      const later = new Set(attempts.slice(index + 1).flat());
      if (attempt !== last) this.#leftover(handle, attempt, later, runs, access);
    });
    if (result !== 0) {
      const noIova = tight && result === LIMIT(ERRNO.ERANGE);
      const expected = [first, second, ...this.#faults].filter((each) => each !== 0);
      const onlyAgain = this.#faults.length === 1 && this.#faults[0] === LIMIT(ERRNO.EAGAIN);
      if (onlyAgain && first === 0 && !tight)
        assert.notEqual(second, 0, "the host said again, and was not asked again");
      if (this.#faults.length === 0) assert.ok(noIova || result === second, `not ${second}`);
      else assert.ok(noIova || expected.includes(result), `none of ${expected}`);
      return;
    }
    assert.equal(second, 0, "mapped although there is a limit");
    assert.deepEqual(
      last,
      runs.map((run) => run.iovaPage),
      "one range, in order",
    );
    if (name === "map") assert.equal(this.#frame[1]! % PAGE, start % PAGE);
    assert.ok((iovaPage + pages) * PAGE - 1 <= mask && iovaPage * PAGE >= MiB);
    if (flags & align) assert.equal(iovaPage % 2 ** Math.ceil(Math.log2(pages)), 0);
    for (const run of runs) assert.ok(backends[DOMAIN_OF[handle]!]!.entries.has(run.iovaPage));
    this.#add({ handle, iovaPage, pages, runs, access, stuck: false });
  }

  /** Of the map calls that a domain's backend had: the entries of each attempt, which ended at a failure. */
  #attempts(domain: number): number[][] {
    const attempts: number[][] = [[]];
    for (const page of this.#fixture.backends[domain]!.mapped) {
      if (page === -1) attempts.push([]);
      else attempts.at(-1)!.push(page);
    }
    return attempts.filter((attempt) => attempt.length > 0);
  }

  /**
   * Enters what an attempt that failed left in the IOMMU. Its pins are those of the runs that it had mapped. `later`:
   * pages that attempts after it mapped, maybe in its place.
   */
  #leftover(
    handle: number,
    attempt: readonly number[],
    later: ReadonlySet<number>,
    ranges: readonly Run[],
    access: number,
  ): void {
    const { entries } = this.#fixture.backends[DOMAIN_OF[handle]!]!;
    const shift = attempt[0]! - ranges[0]!.iovaPage;
    const runs = ranges.slice(0, attempt.length).map((run) => {
      const iovaPage = run.iovaPage + shift;
      return { ...run, iovaPage, there: entries.has(iovaPage) && !later.has(iovaPage) };
    });
    if (runs.every((run) => !run.there)) return;
    assert.ok(this.#faults.length >= 2, "an undo failed by itself");
    see("undo failed");
    const pages = pagesOf(ranges);
    this.#add({ handle, iovaPage: attempt[0]!, pages, runs, access, stuck: true });
  }

  /** The status with which a map of a device in a translated domain ends when nothing fails but by a limit; 0: ok. */
  #limitOf(handle: number, runs: readonly Run[]): number {
    const domain = DOMAIN_OF[handle]!;
    const inDomain = this.#mappings.filter((each) => DOMAIN_OF[each.handle] === domain);
    const used = inDomain.reduce((sum, each) => sum + each.runs.length, 0);
    if (used + runs.length > this.#options.entries) return LIMIT(ERRNO.ENOSPC);
    const pages = new Set(
      runs.flatMap((run) => Array.from({ length: run.pages }, (_, i) => ramPageOf(run.gpaPage + i))),
    );
    for (const pinner of [handle, 0]) {
      let pinned = this.#pinned[pinner]!;
      for (const page of pages) if (this.#pins[pinner]![page] === 0) pinned++;
      if (pinned > this.#quotas[pinner]!) return LIMIT(ERRNO.EDQUOT);
    }
    const there = inDomain.flatMap((each) => each.runs.filter((run) => run.there));
    let entries = there.length;
    let locked = pagesOf(there) * PAGE;
    for (const run of runs) {
      if (entries >= this.#options.hostEntries) return LIMIT(ERRNO.ENOSPC);
      if (locked + run.pages * PAGE > this.#options.lockedBytesMax) return LIMIT(ERRNO.ENOMEM);
      entries++;
      locked += run.pages * PAGE;
    }
    return 0;
  }

  #identityMap(runs: readonly Run[], mask: number, flags: number): number {
    if (this.#identitySlots === 0) return status(STATUS.retry, ERRNO.EAGAIN);
    let next = runs[0]!.gpaPage;
    for (const run of runs) {
      if (run.gpaPage !== next) return INVALID(ERRNO.EINVAL);
      next += run.pages;
    }
    const pages = pagesOf(runs);
    if (next * PAGE - 1 > mask) return INVALID(ERRNO.ERANGE);
    const aligned = runs[0]!.gpaPage % 2 ** Math.ceil(Math.log2(pages)) === 0;
    return (flags & align) !== 0 && !aligned ? INVALID(ERRNO.ERANGE) : 0;
  }

  /** A device that has something to unmap, mostly. */
  #handleToUnmap(): number {
    const busy = this.#mappings.length > 0 && !this.#random.oneIn(6);
    return busy ? this.#random.pick(this.#mappings).handle : this.#handle();
  }

  /** One of these mappings, sometimes with words that are a little wrong, sometimes something else. */
  #unmapWords(mine: readonly Mapping[]): ByteRange {
    const random = this.#random;
    if (mine.length === 0 || random.oneIn(30)) return [random.below(2 ** 20) * PAGE, random.below(5 * PAGE)];
    const { iovaPage, pages } = random.pick(mine);
    const offset = random.pick([0, random.below(PAGE)]);
    const wrong = random.oneIn(20) ? random.pick([PAGE, -PAGE, 700 * PAGE]) : 0;
    return [iovaPage * PAGE + offset, Math.max(0, pages * PAGE - offset + wrong)];
  }

  /** What is to come of one unmap that was tried: its status and pages; `result` is what the guest was told. */
  #unmapped(
    handle: number,
    [start, bytes]: ByteRange,
    result: () => number,
  ): [result: number, pages: number] {
    if (bytes < 1) return [INVALID(ERRNO.EINVAL), 0];
    const errno = this.#oracle.decide(INJECT.unmap, handle, bytes);
    if (errno !== 0) return [status(errno === ERRNO.EAGAIN ? STATUS.retry : STATUS.limit, errno), -1];
    const page = Math.floor(start / PAGE);
    const pages = Math.floor((start + bytes - 1) / PAGE) - page + 1;
    if (handle === IDENTITY_HANDLE) {
      for (let i = 0; i < pages; i++) if (HVA[page + i] === undefined) return [INVALID(ERRNO.ESTALE), 0];
      return [0, pages];
    }
    const mapping = this.#mappings.find((each) => each.handle === handle && each.iovaPage === page);
    if (mapping === undefined) return [INVALID(ERRNO.ESTALE), 0];
    if (mapping.pages !== pages) return [INVALID(ERRNO.EINVAL), 0];
    this.#settle(mapping);
    if (!this.#mappings.includes(mapping)) return [0, pages];
    assert.ok(this.#faults.includes(result()), "an unmap failed by itself");
    mapping.stuck = true;
    return [result(), 0];
  }

  #unmap(): void {
    const handle = this.#handleToUnmap();
    const words = this.#unmapWords(this.#mappings.filter((mapping) => mapping.handle === handle));
    const result = this.#call("unmap", handle, ...words);
    const [expected, pages] = this.#gone.has(handle)
      ? [GONE, 0]
      : this.#unmapped(handle, words, () => result);
    assert.equal(result, expected);
    if (result === 0) assert.equal(this.#frame[1], pages * PAGE);
    this.#count("unmap", handle, result, pages === -1, Math.max(0, pages));
  }

  #unmapList(): void {
    const random = this.#random;
    const handle = this.#handleToUnmap();
    const mine = this.#mappings.filter((mapping) => mapping.handle === handle);
    const list = Array.from({ length: 1 + random.below(Math.max(1, Math.min(6, mine.length))) }, () => {
      // Each once, but for now and then.
      const one = mine.length > 0 ? [random.pick(mine)] : [];
      if (one[0] !== undefined && !random.oneIn(20)) mine.splice(mine.indexOf(one[0]), 1);
      return this.#unmapWords(one);
    });
    this.#memory.page(CALL_PAGE).set(entryWords(list));
    const result = this.#call("unmap_list", handle, CALL_PAGE, list.length);
    const done = this.#frame[2]!;
    let expected: number = this.#gone.has(handle) ? GONE : 0;
    let injected = false;
    let total = 0;
    let entry = 0;
    while (expected === 0 && entry < list.length) {
      const [each, pages] = this.#unmapped(handle, list[entry]!, () => result);
      expected = each;
      injected = pages === -1;
      total += Math.max(0, pages);
      if (each === 0) entry++;
    }
    assert.deepEqual([result, done], [expected, entry]);
    if (result === 0) assert.equal(this.#frame[1], total * PAGE);
    this.#count("unmap_list", handle, result, injected, total);
  }

  /** A call that is the guest's mistake changes nothing. */
  #nonsense(): void {
    const handle = this.#handle();
    const [start, bytes] = this.#range(undefined);
    const { EINVAL, EFAULT, E2BIG, ENODEV } = ERRNO;
    const wrong: readonly [CallName, number[], number][] = [
      ["map", [0, start, bytes, ANY, 3], ENODEV],
      ["map", [5, start, bytes, ANY, 3], ENODEV],
      ["map", [2 ** 32 + handle, start, bytes, ANY, 3], ENODEV],
      ["map", [handle, 48 * PAGE, bytes, ANY, 3], EFAULT],
      ["map", [handle, MiB + 95 * PAGE, PAGE + 1, ANY, 3], EFAULT],
      ["map", [handle, 2 ** 64, bytes, ANY, 3], EFAULT],
      ["map", [handle, start, 0, ANY, 3], EINVAL],
      ["map", [handle, start, 2 ** 63, ANY, 3], E2BIG],
      ["map", [handle, start, bytes, ANY, align], EINVAL],
      ["map_list", [handle, CALL_PAGE, 0, ANY, 3], EINVAL],
      ["map_list", [handle, CALL_PAGE, LIMITS.listEntries + 1, ANY, 3], E2BIG],
      ["map_list", [handle, CALL_PAGE + 8, 1, ANY, 3], EINVAL],
      ["unmap", [handle, start, 2 ** 40], E2BIG],
      ["unmap_list", [handle, 48 * PAGE, 1], EFAULT],
      ["release", [33], ENODEV],
    ];
    const [name, registers, errno] = this.#random.pick(wrong);
    const result = this.#call(name, ...registers);
    const valid = registers[0]! >= 1 && registers[0]! <= 4 ? registers[0]! : 0;
    // Of a call page nothing is read before the device is looked at; flags are, too.
    const early = name.endsWith("list") || (registers[4] ?? 3) === align;
    const expected = this.#gone.has(valid) && !early ? GONE : INVALID(errno);
    assert.equal(result, expected);
    this.#count(name, valid, result, false, 0);
  }

  #ask(): void {
    const handle = this.#handle();
    if (this.#random.oneIn(3)) {
      this.#count("probe", 0, this.#call("probe", 0, 0), false, 0);
      return;
    }
    const result = this.#call("is_assigned", BDF_OF[handle]!);
    const gone = this.#gone.has(handle);
    const errno = gone ? 0 : this.#oracle.decide(INJECT.isAssigned, handle, 0);
    this.#count("is_assigned", handle, result, errno !== 0, 0);
    if (gone) assert.equal(result, GONE);
    else if (errno !== 0) assert.equal(statusErrnoOf(result), errno);
    else {
      assert.equal(result, 0);
      const quota = Math.min(this.#quotas[0]!, this.#quotas[handle]!);
      const bytes = Number.isFinite(quota) ? quota * PAGE : 0;
      const { 1: answered, 4: entries, 5: pinnable } = this.#frame;
      assert.deepEqual([answered, entries, pinnable], [handle, this.#options.entries, bytes]);
    }
  }

  #changeRules(): void {
    const random = this.#random;
    const { injector } = random.pick(this.#engines);
    if (random.oneIn(2)) {
      const id = 1 + random.below(INJECTION_RULES_MAX);
      this.trace.push(`uninject ${id}`);
      assert.equal(injector.remove(id), this.#oracle.remove(id));
      return;
    }
    const rule: InjectionRule = {
      calls: random.pick(["map", "map", "unmap", "is-assigned"]),
      handle: random.pick([0, 1, 2, 3, 4]),
      minBytes: random.pick([0, 0, 100, 2 * PAGE]),
      skip: random.pick([0, 0, 5]),
      when: random.pick([
        { every: 2 + random.below(10) },
        { probability: 0.2, seed: random.next() },
        { next: 1 + random.below(5) },
        { forMs: 0 },
      ]),
      burst: random.pick([1, 1, 4]),
      effect: random.oneIn(10)
        ? { delayMs: 0.01 }
        : { errno: random.pick(["ENOSPC", "ENOMEM", "EAGAIN"] as const) },
    };
    this.trace.push(`inject ${JSON.stringify(rule)}`);
    assert.equal(injector.add(rule), this.#oracle.add(rule));
    // Few at a time, or everything fails.
    if (this.#oracle.list().length > 5) {
      this.#oracle.clear();
      injector.clear();
    }
  }

  /** What must be left of a device's mappings when all were to be taken back; returns those that went, and pages. */
  #taken(handle: number): [mappings: number, pages: number] {
    let mappings = 0;
    let pages = 0;
    for (const mapping of this.#mappings.filter((each) => each.handle === handle)) {
      this.#settle(mapping);
      if (this.#mappings.includes(mapping)) mapping.stuck = true;
      else {
        mappings++;
        pages += mapping.pages;
      }
    }
    this.#countReleased(handle, mappings);
    return [mappings, pages];
  }

  #release(handle: number): void {
    const result = this.#call("release", handle);
    if (this.#gone.has(handle)) {
      assert.equal(result, GONE);
      this.#count("release", handle, result, false, 0);
      return;
    }
    const [mappings, pages] = this.#taken(handle);
    const left = this.#mappings.some((mapping) => mapping.handle === handle);
    assert.equal(result, left ? STUCK : 0);
    if (left) assert.ok(this.#faults.length > 0, "a release failed by itself");
    else assert.deepEqual([this.#frame[1], this.#frame[2]], [mappings, pages * PAGE]);
    this.#count("release", handle, result, false, pages);
  }

  #remove(handle: number): void {
    this.trace.push(`remove ${handle}`);
    const stuck = this.#random.pick(this.#engines).removeDevice(handle);
    this.#gone.add(handle);
    this.#taken(handle);
    if (handle === IDENTITY_HANDLE) {
      this.#unmapIdentity();
      assert.equal(stuck, this.#identitySlots);
    } else {
      const inDomain = ({ handle: each, stuck }: Mapping) => stuck && DOMAIN_OF[each] === DOMAIN_OF[handle];
      assert.equal(stuck, this.#mappings.filter(inDomain).length);
    }
    see("device removed");
  }

  /** Few histories map it, and in few of these it goes by itself. */
  #removeIdentity(): void {
    if (this.#gone.has(IDENTITY_HANDLE)) return;
    this.#faults.length = 0;
    this.#faultRate = this.#random.pick([0, 2]);
    this.#remove(IDENTITY_HANDLE);
    this.#compare();
  }

  /** It was the last device of its domain: what the IOMMU has left of RAM, from the last slot on, is no longer pinned. */
  #unmapIdentity(): void {
    const { entries } = this.#fixture.backends[DOMAIN_OF[IDENTITY_HANDLE]!]!;
    if (this.#identitySlots > 0) see("identity unmapped");
    for (; this.#identitySlots > 0; this.#identitySlots--) {
      const { gpa, bytes } = RAM[this.#identitySlots - 1]!;
      if (entries.has(gpa / PAGE)) {
        assert.ok(this.#faults.length > 0, "an unmap of RAM failed by itself");
        see("identity not unmapped");
        return;
      }
      const run = { gpaPage: gpa / PAGE, pages: bytes / PAGE };
      this.#pin({ handle: IDENTITY_HANDLE, runs: [run] }, -1);
    }
  }

  #reset(): void {
    this.trace.push("reset");
    const stuck = this.#random.pick(this.#engines).reset();
    for (const handle of HANDLES) this.#taken(handle);
    assert.equal(stuck, this.#mappings.length);
    if (stuck > 0) assert.ok(this.#faults.length > 0, "a reset failed by itself");
  }

  #mapIdentity(): void {
    this.#faultRate = this.#random.pick([0, 3]);
    const failure = this.#fixture.engine.mapIdentity();
    this.trace.push(`map identity: ${failure?.errno ?? "ok"}`);
    const { hostEntries, lockedBytesMax } = this.#options;
    const room = hostEntries >= RAM.length && lockedBytesMax >= RAM_PAGES * PAGE;
    const quota = Math.min(this.#quotas[0]!, this.#quotas[IDENTITY_HANDLE]!) < RAM_PAGES;
    if (quota) assert.equal(failure?.errno, ERRNO.EDQUOT);
    else if (this.#faults.length === 0) assert.equal(failure === undefined, room && !this.#isTight);
    if (failure !== undefined) {
      // What was mapped before the failure is undone, unless that fails as well: such a machine is not started.
      this.#faultRate = 0;
      assert.equal(this.#fixture.engine.close(), 0);
      return;
    }
    this.#identitySlots = RAM.length;
    for (const pinner of [0, IDENTITY_HANDLE]) {
      this.#pins[pinner]!.fill(1);
      this.#pinned[pinner] = RAM_PAGES;
    }
    see("identity mapped");
  }

  // ---- the books ----------------------------------------------------------------------------------------------------

  #add(mapping: Mapping): void {
    this.#mappings.push(mapping);
    this.#pin(mapping, 1);
  }

  /**
   * Looks at what the IOMMU has left of a mapping that was to be unmapped; forgets it when that is nothing. `taken`:
   * pages where others were mapped since, so that its own are gone.
   */
  #settle(mapping: Mapping, taken: ReadonlySet<number> = new Set()): void {
    const { entries } = this.#fixture.backends[DOMAIN_OF[mapping.handle]!]!;
    let left = 0;
    for (const run of mapping.runs) {
      const there = entries.has(run.iovaPage) && !taken.has(run.iovaPage);
      assert.ok(run.there || !there, "an entry came back");
      run.there = there;
      if (there) left++;
    }
    if (left > 0) return;
    this.#mappings.splice(this.#mappings.indexOf(mapping), 1);
    this.#pin(mapping, -1);
  }

  #pin(
    { handle, runs }: { handle: number; runs: readonly Pick<Run, "gpaPage" | "pages">[] },
    times: number,
  ): void {
    for (const { gpaPage, pages } of runs) {
      for (let i = 0; i < pages; i++) {
        const page = ramPageOf(gpaPage + i);
        for (const pinner of [0, handle]) {
          const pins = this.#pins[pinner]!;
          if (pins[page] === 0) this.#pinned[pinner]!++;
          pins[page]! += times;
          if (pins[page] === 0) this.#pinned[pinner]!--;
        }
      }
    }
  }

  /** The invariants: the IOMMU maps what the model has and nothing else; pins are the mappings over each page. */
  #compare(): void {
    const { engine, backends, pinCount } = this.#fixture;
    const reachable = [0, 0];
    const entries = [0, 0];
    const mapped = [0, 0, 0, 0, 0];
    for (const { handle, runs, access, stuck } of this.#mappings) {
      const domain = DOMAIN_OF[handle]!;
      for (const run of runs) {
        if (!run.there) assert.ok(stuck, "half of a mapping is gone");
        for (let i = 0; i < run.pages; i++) {
          const at = (run.iovaPage + i) * PAGE;
          const host = run.there ? HVA[run.gpaPage + i]! : -1;
          if (reach(backends[domain]!, at, read) !== (access & read ? host : -1))
            assert.fail(`read of ${at}`);
          if (reach(backends[domain]!, at, write) !== (access & write ? host : -1))
            assert.fail(`write of ${at}`);
        }
        if (run.there) {
          reachable[domain]! += run.pages;
          entries[domain]!++;
        }
        mapped[handle]! += run.pages;
      }
    }
    for (const domain of TRANSLATED) {
      const { iommu } = backends[domain]!;
      assert.equal(iommu.lockedBytes, reachable[domain]! * PAGE, "a device reaches more than what is mapped");
      assert.equal(iommu.entriesUsed, entries[domain]);
    }
    const identityBytes = RAM.slice(0, this.#identitySlots).reduce((sum, slot) => sum + slot.bytes, 0);
    assert.equal(backends[2]!.iommu.lockedBytes, identityBytes);
    for (let pinner = 0; pinner < this.#pins.length; pinner++) {
      const expected = this.#pins[pinner]!;
      for (let page = 0; page < RAM_PAGES; page++) {
        if (pinCount(page, pinner) !== expected[page]) assert.fail(`pins of page ${page} for ${pinner}`);
      }
      assert.ok(this.#pinned[pinner]! <= this.#quotas[pinner]!, "more pinned than the quota");
    }
    assert.equal(engine.pinnedBytes, this.#pinned[0]! * PAGE);
    for (const handle of [1, 2, 3]) assert.equal(engine.mappedBytes(handle), mapped[handle]! * PAGE);
  }

  #compareStatistics(): void {
    const { engine } = this.#fixture;
    const numbers = new Map(engine.stats());
    for (const [name, value] of this.#counters) assert.equal(numbers.get(name), value, name);
    assert.equal(numbers.get("dma/stuck_mappings"), this.#mappings.filter(({ stuck }) => stuck).length);
    for (const handle of HANDLES) {
      const pinned = numbers.get(`devices/0000:0${handle}:00.0/dma/pinned_bytes`);
      assert.equal(pinned, this.#pinned[handle]! * PAGE);
    }
    for (const name of CALL_NAMES) {
      const calls = this.#counters.get(`hypercalls/${name}/calls`) ?? 0;
      assert.equal(numbers.get(`hypercalls/${name}/calls`), calls, name);
    }
  }
}

const ALL_ANSWERS = [...Object.keys(STATUS), "injected"];

const model = suite("engine: model");

model("random calls of four devices, with limits, injected failures and a failing host", () => {
  const steps = 2000;
  let operations = 0;
  const all = seeds(SOAK ? 500 : 15);
  for (const seed of all) {
    const history = new History(seed);
    try {
      history.run(steps);
    } catch (error) {
      const trace = history.trace.slice(-40).join("\n    ");
      const [what] = (error as Error).message.split("\n");
      throw new Error(`PVDMA_SEED=${seed}, step ${history.steps}: ${what}\n    ${trace}`, { cause: error });
    }
    operations += history.steps;
  }
  console.log(`model: ${operations} operations, seeds ${all[0]} to ${all.at(-1)}`);
  if (SOAK)
    console.log(
      [...seen]
        .sort()
        .map(([what, count]) => `  ${what}: ${count}`)
        .join("\n"),
    );
  if (all.length === 1) return;
  const wanted = [
    ...["map", "map_list"].flatMap((call) => ALL_ANSWERS.map((answer) => `${call} ${answer}`)),
    ...["unmap", "unmap_list", "is_assigned"].flatMap((call) => [
      `${call} ok`,
      `${call} injected`,
      `${call} gone`,
    ]),
    ...["unmap limit", "unmap_list limit", "release ok", "release limit", "undo failed", "identity mapped"],
    ...["device removed", "reclaimed, and then mapped", "reclaimed, and then not", "EAGAIN, and then mapped"],
    ...(SOAK ? ["identity unmapped", "identity not unmapped"] : []), // too rare for the short form
  ];
  assert.deepEqual(
    wanted.filter((what) => !seen.has(what)),
    [],
    "never happened",
  );
});

model.run();
