// The dispatcher: frames in, frames out. Every register is the guest's; none of them may do harm.

import assert from "node:assert/strict";
import { suite } from "uvu";
import {
  ABI_VERSION,
  CALL_NAMES,
  CALLS,
  type CallName,
  FEATURE,
  LIMITS,
  MAP_FLAG,
  STATUS,
} from "../../hypercalls/abi.js";
import { Dispatcher, FRAME_WORDS } from "../../hypercalls/dispatcher.js";
import { Engine } from "../../hypercalls/engine.js";
import { ERRNO, status, statusClassOf } from "../../hypercalls/status.js";
import {
  entryWords,
  FakeGuestMemory,
  type Fixture,
  hvaOfGpaPage,
  MiB,
  makeEngine,
  PAGE,
  RANGES,
  reach,
  stat,
} from "./support/engine-fixture.js";
import { Random, SOAK } from "./support/random.js";

const RW = MAP_FLAG.read | MAP_FLAG.write;
const ANY = 2 ** 64;
const INVALID = (errno: number) => status(STATUS.invalid, errno);
const CALL_PAGE = MiB + 10 * PAGE;

interface Guest extends Fixture {
  readonly memory: FakeGuestMemory;
  readonly dispatcher: Dispatcher;
  /** Makes a call with rdi, rsi, r8, r9, r10; returns the status and the five registers. */
  call(call: CallName | number, registers?: readonly number[], cpl?: number): number[];
}

function makeGuest(): Guest {
  const fixture = makeEngine();
  const memory = new FakeGuestMemory();
  const dispatcher = new Dispatcher(fixture.engine, memory);
  return {
    ...fixture,
    memory,
    dispatcher,
    call(call, registers = [], cpl = 0) {
      const frame = new Float64Array(FRAME_WORDS);
      frame[0] = typeof call === "number" ? call : CALLS[call].number;
      frame.set(registers, 1);
      dispatcher.dispatch(frame, cpl);
      return [...frame];
    },
  };
}

const calls = suite("dispatcher");

calls("probe tells version, features, page sizes, quota, and writes the ranges where it is told to", () => {
  const { call, memory } = makeGuest();
  const offer = [0, ABI_VERSION, FEATURE.list | FEATURE.release | FEATURE.table, 0x40201000, 0];
  assert.deepEqual(call("probe", [ABI_VERSION, 0]), [...offer, 0]);
  assert.deepEqual(call("probe", [ABI_VERSION, CALL_PAGE]), [...offer, RANGES.length]);
  const words = memory.page(CALL_PAGE);
  assert.deepEqual(
    [...words.subarray(0, 9)],
    [...entryWords(RANGES.map(({ first, last }) => [Math.max(first, MiB), last] as const)), 0],
    "no address is handed out below 1 MiB",
  );
  for (const [page, expected] of [
    [CALL_PAGE + 8, INVALID(ERRNO.EINVAL)],
    [48 * PAGE, INVALID(ERRNO.EFAULT)],
    [2 ** 64, INVALID(ERRNO.EFAULT)],
  ] as const) {
    assert.deepEqual(call("probe", [ABI_VERSION, page]), [expected, ABI_VERSION, page, 0, 0, 0]);
  }
});

calls("is_assigned, map and unmap: registers in, registers out, the others keep what they held", () => {
  const { call, backends } = makeGuest();
  assert.deepEqual(call("is_assigned", [0x18, 1, 2, 3, 4]), [0, 2, 3, 39, 4096, 0]);
  assert.deepEqual(call("is_assigned", [0x77, 1, 2, 3, 4]), [0, 0, 0, 0, 0, 0]);
  const [result, at, ...rest] = call("map", [2, 5 * PAGE + 7, 5000, 2 ** 32 - 1, RW]);
  assert.equal(result, 0);
  assert.deepEqual(rest, [5 * PAGE + 7, 5000, 2 ** 32 - 1, RW]);
  assert.ok(at! < 2 ** 32 && at! % PAGE === 7);
  assert.equal(reach(backends[0]!, at!, 1), hvaOfGpaPage(5)! + 7);
  assert.deepEqual(call("unmap", [2, at!, 5000, 8, 9]), [0, 2 * PAGE, at!, 5000, 8, 9]);
  assert.equal(reach(backends[0]!, at!, 1), -1);
  // A call that fails leaves every register alone.
  assert.deepEqual(call("unmap", [2, at!, 5000, 8, 9]), [INVALID(ERRNO.ESTALE), 2, at!, 5000, 8, 9]);
});

calls("release tells what it took back; without ok the registers keep what they held", () => {
  const { call, engine, backends } = makeGuest();
  call("map", [1, 5 * PAGE, 3 * PAGE, ANY, RW]);
  call("map", [1, 5 * PAGE, PAGE, ANY, RW]);
  assert.deepEqual(call("release", [1, 7, 8, 9, 10]), [0, 2, 4 * PAGE, 8, 9, 10]);
  assert.equal(backends[0]!.iommu.entriesUsed, 0);
  assert.deepEqual(call("release", [1, 7, 8, 9, 10]), [0, 0, 0, 8, 9, 10]);
  assert.deepEqual(call("release", [9, 7, 8, 9, 10]), [INVALID(ERRNO.ENODEV), 9, 7, 8, 9, 10]);
  call("map", [1, 5 * PAGE, PAGE, ANY, RW]);
  backends[0]!.unmapFault = () => ({ errno: ERRNO.EINVAL });
  const stuck = status(STATUS.limit, ERRNO.EPROTO);
  assert.deepEqual(call("release", [1, 7, 8, 9, 10]), [stuck, 1, 7, 8, 9, 10]);
  assert.equal(stat(engine, "hypercalls/release/calls"), 4);
  assert.equal(stat(engine, "hypercalls/release/errors"), 2);
  assert.equal(stat(engine, "hypercalls/release/pages"), 4);
  assert.equal(stat(engine, "dma/limit_hits"), 0, "an unmap is no map that hit a limit");
});

calls("lists go through the call page", () => {
  const { call, memory, backends } = makeGuest();
  memory.page(CALL_PAGE).set(
    entryWords([
      [MiB, PAGE],
      [7 * PAGE, PAGE],
    ]),
  );
  const [result, at, done, ...rest] = call("map_list", [1, CALL_PAGE, 2, ANY, RW]);
  assert.deepEqual([result, done, ...rest], [0, 2, 2, ANY, RW]);
  assert.equal(reach(backends[0]!, at! + PAGE, 2), hvaOfGpaPage(7));
  memory.page(CALL_PAGE).set(
    entryWords([
      [at!, 2 * PAGE],
      [at!, 2 * PAGE],
    ]),
  );
  assert.deepEqual(call("unmap_list", [1, CALL_PAGE, 2, 8, 9]), [INVALID(ERRNO.ESTALE), 1, 1, 2, 8, 9]);
  assert.equal(backends[0]!.iommu.entriesUsed, 0);
});

calls("a whole call page of entries", () => {
  const { call, memory, backends } = makeGuest();
  const entries = Array.from({ length: LIMITS.listEntries }, (_, i) => [(i % 2) * 9 * PAGE, PAGE] as const);
  memory.page(CALL_PAGE).set(entryWords(entries));
  const [result, at, done] = call("map_list", [1, CALL_PAGE, LIMITS.listEntries, ANY, RW]);
  assert.deepEqual([result, done], [0, 256]);
  assert.equal(backends[0]!.iommu.entriesUsed, 256);
  assert.equal(reach(backends[0]!, at! + 255 * PAGE, 1), hvaOfGpaPage(9));
  assert.equal(call("unmap", [1, at!, 256 * PAGE])[0], 0);
});

calls("what was checked is what is used: the guest changes the page after it was read", () => {
  const { call, memory, backends } = makeGuest();
  memory.page(CALL_PAGE).set(entryWords([[MiB, PAGE]]));
  memory.afterCopyIn = () => memory.page(CALL_PAGE).set(entryWords([[2 ** 40, 2 ** 30]]));
  const [result, at] = call("map_list", [1, CALL_PAGE, 1, ANY, RW]);
  assert.equal(result, 0);
  assert.equal(reach(backends[0]!, at!, 1), hvaOfGpaPage(MiB / PAGE));
  assert.equal(backends[0]!.iommu.lockedBytes, PAGE);
});

calls("bad call pages and counts are refused, entries done is 0, nothing is read", () => {
  const { call, memory } = makeGuest();
  memory.afterCopyIn = () => assert.fail("read");
  for (const name of ["map_list", "unmap_list"] as const) {
    for (const [page, count, expected] of [
      [CALL_PAGE, 0, INVALID(ERRNO.EINVAL)],
      [CALL_PAGE, 257, INVALID(ERRNO.E2BIG)],
      [CALL_PAGE, 2 ** 32 + 1, INVALID(ERRNO.E2BIG)],
      [CALL_PAGE, 2 ** 64, INVALID(ERRNO.E2BIG)],
      [CALL_PAGE + 16, 1, INVALID(ERRNO.EINVAL)],
      [48 * PAGE, 1, INVALID(ERRNO.EFAULT)],
      [2 ** 64, 1, INVALID(ERRNO.EFAULT)],
    ] as const) {
      assert.deepEqual(call(name, [1, page, count, ANY, RW]), [expected, 1, 0, count, ANY, RW]);
    }
  }
});

calls("table: a device without one is told so, and other registers keep what they held", () => {
  const { call } = makeGuest();
  assert.deepEqual(call("table", [1, 1, 8, 9, 10]), [0, 0, 0, 8, 9, 10]);
  assert.deepEqual(call("table", [9, 1, 8, 9, 10]), [INVALID(ERRNO.ENODEV), 9, 1, 8, 9, 10]);
});

calls("an unknown call is ENOSYS, a caller outside the guest's kernel is EPERM, before anything else", () => {
  const { call, engine, backends } = makeGuest();
  for (const number of [0, CALL_NAMES.length + 1, 255, 2 ** 32 - 1]) {
    assert.deepEqual(call(number, [1, 2, 3, 4, 5]), [INVALID(ERRNO.ENOSYS), 1, 2, 3, 4, 5]);
  }
  assert.equal(stat(engine, "hypercalls/refused/unknown"), 4);
  for (const cpl of [1, 2, 3]) {
    assert.deepEqual(call("map", [1, MiB, PAGE, ANY, RW], cpl), [
      INVALID(ERRNO.EPERM),
      1,
      MiB,
      PAGE,
      ANY,
      RW,
    ]);
    assert.equal(call("map_list", [1, CALL_PAGE, 1, ANY, RW], cpl)[2], 0);
    assert.equal(call(99, [], cpl)[0], INVALID(ERRNO.EPERM));
  }
  assert.equal(stat(engine, "hypercalls/refused/cpl"), 9);
  assert.equal(stat(engine, "hypercalls/map/calls"), 0);
  assert.equal(backends[0]!.maps, 0);
});

calls("calls are counted, by kind, class and page, and the lanes of all threads add up", () => {
  const { call, engine, state, backends } = makeGuest();
  const at = call("map", [1, MiB, 3 * PAGE, ANY, RW])[1]!;
  call("map", [1, 48 * PAGE, 1, ANY, RW]);
  backends[0]!.mapFault = () => ({ errno: ERRNO.ENOMEM });
  call("map", [1, MiB, 3 * PAGE, ANY, RW]);
  assert.equal(stat(engine, "hypercalls/map/calls"), 3);
  assert.equal(stat(engine, "hypercalls/map/errors"), 2);
  assert.equal(stat(engine, "hypercalls/map/pages"), 3);
  assert.equal(stat(engine, "hypercalls/status/invalid"), 1);
  assert.equal(stat(engine, "hypercalls/status/limit"), 1);
  assert.equal(stat(engine, "hypercalls/status/ok"), 1);
  assert.equal(stat(engine, "dma/limit_hits"), 1);
  assert.equal(stat(engine, "dma/pinned_bytes"), 3 * PAGE);
  assert.equal(stat(engine, "devices/0000:01:00.0/dma/mapped_bytes"), 3 * PAGE);
  assert.equal(stat(engine, "devices/0000:02:00.0/dma/mapped_bytes"), 0);
  const total = stat(engine, "hypercalls/map/ns_total");
  const most = stat(engine, "hypercalls/map/ns_max");
  assert.ok(most > 0 && total >= most && total <= 3 * most);
  call("unmap", [1, at, 3 * PAGE]);
  assert.equal(stat(engine, "hypercalls/unmap/pages"), 3);

  const other = new Engine(state, (domain) => backends[domain]!, 1);
  const ours = new Float64Array(state.lanes).slice(0, state.lanes.byteLength / 8 / state.config.lanes);
  other.lane.record(CALLS.map.number, 1, 0, false, 5);
  other.lane.time(CALLS.map.number, 1, 2 ** 40, 16);
  const after = new Float64Array(state.lanes).slice(0, ours.length);
  assert.deepEqual(after, ours, "a lane has one writer");
  assert.equal(stat(engine, "hypercalls/map/calls"), 4);
  assert.equal(stat(engine, "hypercalls/map/pages"), 8);
  assert.equal(stat(engine, "hypercalls/map/ns_max"), 2 ** 40);
  const names = engine.stats().map(([name]) => name);
  assert.equal(new Set(names).size, names.length);
});

calls("of a kind's calls the first are timed, and then some, which stand for all", () => {
  const { engine } = makeEngine();
  let looks = 0;
  const dispatcher = new Dispatcher(engine, new FakeGuestMemory(), () => looks++);
  const unmap = (handle: number) =>
    dispatcher.dispatch(Float64Array.of(CALLS.unmap.number, handle, MiB, 1, 0, 0), 0);
  const total = (device = "") => stat(engine, `${device}hypercalls/unmap/ns_total`) / 1e6;
  /** How many of so many calls were timed. */
  const timed = (count: number): number => {
    const before = looks;
    // Two devices, by turns.
    for (let i = 0; i < count; i++) unmap(1 + (i % 2));
    return (looks - before) / 2;
  };
  assert.equal(timed(4096), 4096);
  assert.equal(total(), 4096);
  const later = timed(64_000);
  assert.ok(later > 64_000 / 20 && later < 64_000 / 14, `${later} of 64,000`);
  const all = 4096 + 64_000;
  assert.ok(
    total() <= all && total() > all - 32,
    `${total()} for ${all}: those since the last wait for the next`,
  );
  for (const name of ["0000:01:00.0", "0000:02:00.0"]) {
    const its = total(`devices/${name}/`);
    assert.ok(its > 0.45 * all && its < 0.55 * all, `${name}: ${its} of ${all}`);
  }
  assert.equal(
    stat(engine, "hypercalls/unmap/ns_max"),
    1e6,
    "the largest is of one call, not of all it stands for",
  );

  const before = looks;
  for (const number of [0, CALL_NAMES.length + 1, 2 ** 32 - 1])
    for (let i = 0; i < 40; i++) dispatcher.dispatch(Float64Array.of(number, 0, 0, 0, 0, 0), 0);
  assert.equal(looks, before, "what is no call is not timed");
  dispatcher.dispatch(Float64Array.of(CALLS.is_assigned.number, 8, 0, 0, 0, 0), 0);
  assert.equal(stat(engine, "hypercalls/is_assigned/ns_total"), 1e6, "each kind has its own first ones");
});

calls("random frames never throw, never reach outside the RAM, and leave nothing behind", () => {
  for (let seed = 0; seed < (SOAK ? 200 : 3); seed++) {
    const random = new Random(seed);
    const { dispatcher, engine, backends, memory } = makeGuest();
    const frame = new Float64Array(FRAME_WORDS);
    const mapped: number[] = [];
    const value = (): number =>
      random.pick([
        () => random.below(6),
        () => random.below(300),
        () => random.below(200) * PAGE,
        () => MiB + random.below(100 * PAGE),
        () => 2 ** random.below(65) - random.below(2),
        () => 2 ** random.below(54) + random.below(2 ** 20),
        () => (mapped.length > 0 ? random.pick(mapped) : 0),
        () => CALL_PAGE,
      ])();
    for (let step = 0; step < 20000; step++) {
      frame[0] = random.oneIn(200) ? CALLS.release.number : 1 + random.below(6);
      for (let i = 1; i < FRAME_WORDS; i++) frame[i] = value();
      // Most random calls end at the first check: help them, one register at a time, and fill the call page.
      if (random.oneIn(2)) frame[1] = 1 + random.below(3);
      if (random.oneIn(2)) frame[2] = random.pick([CALL_PAGE, random.below(40 * PAGE)]);
      if (random.oneIn(2)) frame[3] = 1 + random.below(8);
      if (random.oneIn(2)) frame[4] = ANY;
      if (random.oneIn(2)) frame[5] = 1 + random.below(7);
      if (random.oneIn(4)) {
        const entries = Array.from({ length: 8 }, () => [value() % ANY, value() % ANY] as const);
        memory.page(CALL_PAGE).set(entryWords(entries));
      }
      const call = frame[0]!;
      dispatcher.dispatch(frame, random.oneIn(50) ? 3 : 0);
      const result = frame[0]!;
      assert.ok(Number.isInteger(result) && statusClassOf(result) <= STATUS.gone, `status ${result}`);
      // The backend's word for memory that is not the guest's.
      assert.notEqual(result, status(STATUS.limit, ERRNO.EFAULT));
      const maps = call === CALLS.map.number || call === CALLS.map_list.number;
      if (result === 0 && maps) mapped.push(frame[1]!);
    }
    assert.ok(mapped.length > 100, `${mapped.length} maps got through`);
    assert.equal(engine.close(), 0);
    for (const backend of backends) assert.equal(backend.iommu.entriesUsed, 0);
    assert.equal(engine.pinnedBytes, 0);
  }
});

calls.run();
