// The engine over the software IOMMU: what a device can reach is asked of the IOMMU, never of the engine. Includes
// threads in parallel; for random calls against a model see engine-model.test.ts.

import assert from "node:assert/strict";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import { LIMITS, MAP_FLAG, POLICY, STATUS } from "../../hypercalls/abi.js";
import { gpa, hva } from "../../hypercalls/addresses.js";
import { createEngineState, Engine, type EngineConfig } from "../../hypercalls/engine.js";
import { ERRNO, status } from "../../hypercalls/status.js";
import {
  entryWords,
  type Fixture,
  hvaOfGpaPage,
  MiB,
  makeEngine,
  PAGE,
  RAM,
  RAM_PAGES,
  RANGES,
  reach,
  stat,
} from "./support/engine-fixture.js";
import type { WorkerJob } from "./support/engine-worker.js";
import { OwnerTable } from "./support/owner-table.js";
import { SOAK } from "./support/random.js";

const { read, write, align } = MAP_FLAG;
const RW = read | write;
const ANY = 2 ** 64;
const INVALID = (errno: number) => status(STATUS.invalid, errno);
const LIMIT = (errno: number) => status(STATUS.limit, errno);

/** Nothing mapped, pinned or recorded any more. */
function assertClean({ engine, backends, pinCount }: Fixture): void {
  for (const backend of backends) assert.equal(backend.iommu.entriesUsed, 0);
  for (let page = 0; page < RAM_PAGES; page++) assert.equal(pinCount(page), 0, `RAM page ${page}`);
  for (const name of ["pinned_bytes", "mapped_bytes", "entries", "stuck_mappings"]) {
    assert.equal(stat(engine, `dma/${name}`), 0, name);
  }
}

// ---- single calls ---------------------------------------------------------------------------------------------------

const calls = suite("engine: calls");

calls(
  "map reaches exactly the pages that the bytes touch, with the rights asked for, and keeps the offset",
  () => {
    const { engine, backends } = makeEngine();
    assert.equal(engine.map(1, MiB + 100, PAGE, ANY, read), 0);
    const at = engine.out[0]!;
    assert.equal(at % PAGE, 100);
    assert.equal(engine.pages, 2);
    const start = at - 100;
    const backend = backends[0]!;
    for (const offset of [0, 100, PAGE, 2 * PAGE - 1]) {
      assert.equal(reach(backend, start + offset, read), RAM[1]!.hva + offset);
      assert.equal(reach(backend, start + offset, write), -1);
    }
    assert.equal(reach(backend, start - 1, read), -1);
    assert.equal(reach(backend, start + 2 * PAGE, read), -1);
    assert.equal(backend.iommu.entriesUsed, 1, "contiguous memory is one entry");
    assert.equal(engine.unmap(1, at, PAGE), 0);
    assert.equal(engine.out[0], 2 * PAGE);
    assert.equal(reach(backend, start, read), -1);
  },
);

calls("two mappings of one page live and die independently", () => {
  const fixture = makeEngine();
  const { engine, backends, pinCount } = fixture;
  engine.map(1, 5 * PAGE, 100, ANY, read);
  const one = engine.out[0]!;
  engine.map(1, 5 * PAGE + 50, 100, ANY, write);
  const two = engine.out[0]!;
  assert.notEqual(Math.floor(one / PAGE), Math.floor(two / PAGE));
  assert.equal(pinCount(5), 2);
  assert.equal(engine.pinnedBytes, PAGE);
  assert.equal(engine.mappedBytes(1), 2 * PAGE);
  assert.equal(engine.unmap(1, one, 100), 0);
  assert.equal(reach(backends[0]!, one, read), -1);
  assert.equal(reach(backends[0]!, two, write), RAM[0]!.hva + 5 * PAGE + 50);
  assert.equal(engine.pinnedBytes, PAGE);
  assert.equal(engine.unmap(1, two, 100), 0);
  assertClean(fixture);
});

calls("a range over two slots is split only where the host memory is not contiguous", () => {
  const { engine, backends } = makeEngine();
  const start = MiB + 62 * PAGE;
  assert.equal(engine.map(1, start, 4 * PAGE, ANY, RW), 0);
  const at = engine.out[0]!;
  assert.equal(backends[0]!.iommu.entriesUsed, 2);
  for (let page = 0; page < 4; page++) {
    assert.equal(reach(backends[0]!, at + page * PAGE, read), hvaOfGpaPage(start / PAGE + page));
  }
  assert.equal(engine.unmap(1, at, 4 * PAGE), 0);
  assert.equal(backends[0]!.unmaps, 1, "one unmap for the whole");
  assert.equal(backends[0]!.iommu.entriesUsed, 0);
});

calls("a list becomes one range, an entry per contiguous run, one unmap", () => {
  const { engine, backends } = makeEngine();
  // Pages 3 4 | 5 (goes on) | 5 (again) | 20 with an offset | 21 22 (go on).
  const list = entryWords([
    [3 * PAGE, 2 * PAGE],
    [5 * PAGE, PAGE],
    [5 * PAGE + 8, 16],
    [20 * PAGE + 4000, 96],
    [21 * PAGE, PAGE + 1],
  ]);
  assert.equal(engine.mapList(1, list, 5, ANY, write), 0);
  const at = engine.out[0]!;
  assert.equal(at % PAGE, 0);
  assert.equal(engine.out[1], 5);
  assert.deepEqual(
    [3, 4, 5, 5, 20, 21, 22].map((page) => hvaOfGpaPage(page)),
    [0, 1, 2, 3, 4, 5, 6].map((page) => reach(backends[0]!, at + page * PAGE, write)),
  );
  assert.equal(reach(backends[0]!, at + 7 * PAGE, write), -1);
  assert.equal(backends[0]!.iommu.entriesUsed, 3);
  assert.equal(engine.unmap(1, at, 7 * PAGE), 0);
  assert.equal(backends[0]!.unmaps, 1);
});

calls("unmap wants the whole mapping, by its first page, from the device that has it, once", () => {
  const fixture = makeEngine();
  const { engine, backends } = fixture;
  engine.map(1, 3 * PAGE + 5, 3 * PAGE - 5, ANY, RW);
  const at = engine.out[0]!;
  const page = at - 5;
  const wrong: [string, number, number, number, number][] = [
    ["too short", 1, page, 2 * PAGE, INVALID(ERRNO.EINVAL)],
    ["too long", 1, page, 3 * PAGE + 1, INVALID(ERRNO.EINVAL)],
    ["the tail", 1, page + PAGE, 2 * PAGE, INVALID(ERRNO.ESTALE)],
    ["another device of the domain", 2, page, 3 * PAGE, INVALID(ERRNO.ESTALE)],
    ["a device of another domain", 3, page, 3 * PAGE, INVALID(ERRNO.ESTALE)],
    ["2^32 pages further", 1, page + 2 ** 44, 3 * PAGE, INVALID(ERRNO.ESTALE)],
    ["far out", 1, 2 ** 64, 3 * PAGE, INVALID(ERRNO.ESTALE)],
    ["no bytes", 1, page, 0, INVALID(ERRNO.EINVAL)],
    ["all bytes there are", 1, page, 2 ** 64, INVALID(ERRNO.E2BIG)],
  ];
  for (const [what, handle, where, bytes, expected] of wrong) {
    assert.equal(engine.unmap(handle, where, bytes), expected, what);
    assert.equal(reach(backends[0]!, page, read), hvaOfGpaPage(3), what);
  }
  assert.equal(backends[0]!.unmaps, 0);
  // Any byte of the first page will do.
  assert.equal(engine.unmap(1, page + 4095, 2 * PAGE + 1), 0);
  assert.equal(engine.unmap(1, page, 3 * PAGE), INVALID(ERRNO.ESTALE));
  assertClean(fixture);
});

calls("the guest's words are checked, and a refusal changes nothing", () => {
  const fixture = makeEngine();
  const { engine, backends } = fixture;
  const wrong: [string, Parameters<Engine["map"]>, number][] = [
    ["handle 0", [0, MiB, 1, ANY, RW], INVALID(ERRNO.ENODEV)],
    ["a handle nobody has", [5, MiB, 1, ANY, RW], INVALID(ERRNO.ENODEV)],
    ["a large handle", [2 ** 64, MiB, 1, ANY, RW], INVALID(ERRNO.ENODEV)],
    ["a handle that is 1 in 32 bits", [2 ** 32 + 1, MiB, 1, ANY, RW], INVALID(ERRNO.ENODEV)],
    ["no bytes", [1, MiB, 0, ANY, RW], INVALID(ERRNO.EINVAL)],
    ["neither read nor write", [1, MiB, 1, ANY, align], INVALID(ERRNO.EINVAL)],
    ["an unknown flag", [1, MiB, 1, ANY, RW | 8], INVALID(ERRNO.EINVAL)],
    ["a flag above 32 bits", [1, MiB, 1, ANY, RW + 2 ** 40], INVALID(ERRNO.EINVAL)],
    ["the hole", [1, 48 * PAGE, 1, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["one byte into the hole", [1, 47 * PAGE, PAGE + 1, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["from the hole into RAM", [1, MiB - 1, 2, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["one byte beyond RAM", [1, MiB + 95 * PAGE, PAGE + 1, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["a gpa that is 0 in 32 bits", [1, 2 ** 32, 1, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["the last gpa there is", [1, 2 ** 64, 1, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["a range that wraps", [1, 2 ** 64, PAGE, ANY, RW], INVALID(ERRNO.EFAULT)],
    ["more than 1 GiB", [1, 0, 2 ** 30 + 1, ANY, RW], INVALID(ERRNO.E2BIG)],
    ["1 GiB and a page by its offset", [1, 1, 2 ** 30, ANY, RW], INVALID(ERRNO.E2BIG)],
    ["all bytes there are", [1, 0, 2 ** 64, ANY, RW], INVALID(ERRNO.E2BIG)],
    ["no IOVA below the limit", [1, 0, 1, 0, RW], LIMIT(ERRNO.ERANGE)],
    ["nor below 1 MiB", [1, 0, 1, MiB - 1, RW], LIMIT(ERRNO.ERANGE)],
  ];
  for (const [what, words, expected] of wrong) {
    assert.equal(engine.map(...words), expected, what);
    assert.equal(engine.pages, 0, what);
  }
  assert.equal(backends[0]!.maps, 0);
  assertClean(fixture);
});

calls("a bad list entry is named, and nothing of the list is mapped", () => {
  const fixture = makeEngine();
  const good = [MiB, PAGE] as const;
  const bad: [readonly [number, number], number][] = [
    [[48 * PAGE, 1], INVALID(ERRNO.EFAULT)],
    [[MiB, 0], INVALID(ERRNO.EINVAL)],
    [[MiB, 2 ** 63], INVALID(ERRNO.E2BIG)],
    [[2 ** 63, PAGE], INVALID(ERRNO.EFAULT)],
    [[0, 2 ** 30], INVALID(ERRNO.E2BIG)],
  ];
  for (const [entry, expected] of bad) {
    assert.equal(fixture.engine.mapList(1, entryWords([good, good, entry, good]), 4, ANY, RW), expected);
    assert.equal(fixture.engine.out[1], 2);
  }
  assert.equal(fixture.backends[0]!.maps, 0);
  assertClean(fixture);
});

calls("the IOVA stays below the device's mask and inside what the IOMMU translates", () => {
  const { engine } = makeEngine({ ranges: [{ first: 0, last: 2 ** 48 - 1 }] });
  for (const [last, top] of [
    [2 ** 24 - 1, 2 ** 24],
    [2 ** 28 - 1, 2 ** 28],
    [2 ** 32 - 1, 2 ** 32],
    [3 * MiB + 4094, 3 * MiB],
    [2 ** 64, 2 ** 39],
  ] as const) {
    for (let i = 0; i < 20; i++) {
      assert.equal(engine.map(1, 0, 3 * PAGE, last, RW | align), 0);
      assert.ok(engine.out[0]! + 3 * PAGE <= top, `${engine.out[0]} with mask ${last}`);
      assert.equal(engine.out[0]! % (4 * PAGE), 0);
    }
  }
});

calls("the least mask that covers some of the ranges that a guest is told is enough", () => {
  const { engine } = makeEngine();
  const [first = 0, high = 0] = engine.rangeWords;
  assert.equal(high, 0);
  assert.equal(engine.map(1, 0, PAGE, first + PAGE - 1, RW), 0);
  assert.equal(engine.out[0], first);
  assert.equal(engine.map(1, 0, PAGE, first - 1, RW), LIMIT(ERRNO.ERANGE));
});

calls("the entry limit is a limit: reported with the entry, undone, over when something is unmapped", () => {
  const fixture = makeEngine({ entries: 3 });
  const { engine } = fixture;
  const list = (pages: number[]) => entryWords(pages.map((page) => [page * PAGE, PAGE] as const));
  assert.equal(engine.mapList(1, list([1, 2, 9, 5, 30]), 5, ANY, RW), LIMIT(ERRNO.ENOSPC));
  assert.equal(engine.out[1], 4, "the entry that did not fit");
  assert.equal(fixture.backends[0]!.maps, 0, "refused before anything was mapped");
  assertClean(fixture);
  assert.equal(engine.map(1, 0, PAGE, ANY, RW), 0);
  const first = engine.out[0]!;
  assert.equal(engine.mapList(1, list([1, 9]), 2, ANY, RW), 0);
  const second = engine.out[0]!;
  assert.equal(engine.map(1, 0, PAGE, ANY, RW), LIMIT(ERRNO.ENOSPC));
  assert.equal(engine.unmap(1, first, PAGE), 0);
  assert.equal(engine.map(1, 0, PAGE, ANY, RW), 0);
  assert.equal(engine.unmap(1, engine.out[0]!, PAGE), 0);
  assert.equal(engine.unmap(1, second, 2 * PAGE), 0);
  assertClean(fixture);
});

calls("a guest cannot map the same pages without end", () => {
  const fixture = makeEngine({ entries: 100_000 });
  const { engine } = fixture;
  // 16 times RAM and one largest mapping, then no more, until something is unmapped.
  const most = 16 * engine.ram.pages + LIMITS.mapPages;
  const pages = RAM[0]!.bytes / PAGE;
  const at: number[] = [];
  while ((at.length + 1) * pages <= most) {
    assert.equal(engine.map(1, RAM[0]!.gpa, RAM[0]!.bytes, ANY, RW), 0);
    at.push(engine.out[0]!);
  }
  assert.equal(engine.map(1, RAM[0]!.gpa, RAM[0]!.bytes, ANY, RW), LIMIT(ERRNO.EDQUOT));
  assert.equal(engine.unmap(1, at[0]!, RAM[0]!.bytes), 0);
  assert.equal(engine.map(1, RAM[0]!.gpa, RAM[0]!.bytes, ANY, RW), 0);
  assert.equal(engine.reset(), 0);
  assertClean(fixture);
});

calls("the quota counts pages, not mappings, over all domains", () => {
  const fixture = makeEngine({ quotaBytes: 4 * PAGE + 100 });
  const { engine } = fixture;
  assert.equal(engine.map(1, 0, 3 * PAGE, ANY, RW), 0);
  assert.equal(engine.map(3, PAGE, 3 * PAGE, ANY, RW), 0, "two of the three are pinned already");
  assert.equal(engine.pinnedBytes, 4 * PAGE);
  assert.equal(engine.map(2, 10 * PAGE, 1, ANY, RW), LIMIT(ERRNO.EDQUOT));
  const list = entryWords([
    [0, PAGE],
    [2 * PAGE, PAGE],
    [10 * PAGE, PAGE],
  ]);
  assert.equal(engine.mapList(2, list, 3, ANY, RW), LIMIT(ERRNO.EDQUOT));
  assert.equal(engine.out[1], 2);
  assert.equal(engine.pinnedBytes, 4 * PAGE);
  assert.equal(stat(engine, "dma/peak_pinned_bytes"), 4 * PAGE);
  assert.equal(engine.reset(), 0);
  assert.equal(engine.map(2, 10 * PAGE, 4 * PAGE, ANY, RW), 0);
  assert.equal(engine.reset(), 0);
  assertClean(fixture);
});

calls("a device's quota counts its own pages; at its end the others go on", () => {
  const fixture = makeEngine({ quotaBytes: 8 * PAGE, deviceQuotaBytes: { 1: 3 * PAGE } });
  const { engine, pinCount } = fixture;
  assert.equal(engine.map(2, 0, 2 * PAGE, ANY, RW), 0);
  const other = engine.out[0]!;
  assert.equal(engine.map(1, 0, 3 * PAGE, ANY, RW), 0, "that another device has pinned two does not matter");
  const mine = engine.out[0]!;
  assert.equal(engine.map(1, PAGE, 2 * PAGE, ANY, RW), 0, "its own pages once more are no more pages");
  const again = engine.out[0]!;
  const list = entryWords([
    [PAGE, PAGE],
    [9 * PAGE, PAGE],
  ]);
  assert.equal(engine.map(1, 9 * PAGE, 1, ANY, RW), LIMIT(ERRNO.EDQUOT));
  assert.equal(engine.mapList(1, list, 2, ANY, RW), LIMIT(ERRNO.EDQUOT));
  assert.equal(engine.out[1], 1, "the entry that did not fit");
  assert.deepEqual(
    [0, 1, 2, 9].map((page) => pinCount(page, 1)),
    [1, 2, 2, 0],
  );
  assert.equal(stat(engine, "devices/0000:01:00.0/dma/pinned_bytes"), 3 * PAGE);
  assert.equal(stat(engine, "devices/0000:02:00.0/dma/pinned_bytes"), 2 * PAGE);
  assert.equal(stat(engine, "dma/pinned_bytes"), 3 * PAGE);
  // The VM's quota ends a map after the device's has let it pass: nothing stays counted for the device.
  assert.equal(engine.map(2, 20 * PAGE, 6 * PAGE, ANY, RW), LIMIT(ERRNO.EDQUOT));
  assert.equal(pinCount(20, 2), 0);
  assert.equal(stat(engine, "devices/0000:02:00.0/dma/pinned_bytes"), 2 * PAGE);
  assert.equal(engine.map(2, 20 * PAGE, 5 * PAGE, ANY, RW), 0);
  assert.equal(engine.unmap(2, engine.out[0]!, 5 * PAGE), 0);
  assert.equal(engine.unmap(1, mine, 3 * PAGE), 0);
  assert.equal(engine.map(1, 9 * PAGE, 1, ANY, RW), 0, "over when something is unmapped");
  assert.equal(engine.unmap(1, engine.out[0]!, 1), 0);
  assert.equal(engine.unmap(1, again, 2 * PAGE), 0);
  assert.equal(engine.unmap(2, other, 2 * PAGE), 0);
  assert.equal(stat(engine, "devices/0000:01:00.0/dma/peak_pinned_bytes"), 3 * PAGE);
  assertClean(fixture);
});

calls("host errnos are limits, retry, or gone; what was done of a list is undone", () => {
  const list = entryWords([
    [0, PAGE],
    [9 * PAGE, PAGE],
    [10 * PAGE, PAGE],
    [5 * PAGE, PAGE],
  ]);
  for (const [errno, expected] of [
    [ERRNO.ENOMEM, LIMIT(ERRNO.ENOMEM)],
    [ERRNO.ENOSPC, LIMIT(ERRNO.ENOSPC)],
    [ERRNO.EFAULT, LIMIT(ERRNO.EFAULT)],
    [ERRNO.EINTR, status(STATUS.retry, ERRNO.EINTR)],
    [ERRNO.ENODEV, status(STATUS.gone, ERRNO.ENODEV)],
  ] as const) {
    for (const [failing, entry] of [
      [1, 0],
      [2, 1],
      [3, 3],
    ] as const) {
      const fixture = makeEngine();
      const backend = fixture.backends[0]!;
      backend.mapFault = () => (backend.maps === failing ? { errno } : undefined);
      assert.equal(fixture.engine.mapList(1, list, 4, ANY, RW), expected);
      assert.equal(fixture.engine.out[1], entry, `backend call ${failing}`);
      assert.equal(backend.unmaps, failing === 1 ? 0 : 1);
      assertClean(fixture);
    }
  }
});

calls("what the backend does not unmap is reported, stays recorded, and is never handed out again", () => {
  for (const [fault, expected] of [
    [{ errno: ERRNO.EINVAL }, LIMIT(ERRNO.EINVAL)],
    ["partly", LIMIT(ERRNO.EPROTO)],
  ] as const) {
    // Room for 6 pages, and no more.
    const fixture = makeEngine({ ranges: [{ first: MiB, last: MiB + 6 * PAGE - 1 }] });
    const { engine } = fixture;
    const backend = fixture.backends[0]!;
    const list = entryWords([
      [0, PAGE],
      [9 * PAGE, PAGE],
    ]);
    engine.mapList(1, list, 2, ANY, RW);
    const at = engine.out[0]!;
    backend.unmapFault = () => fault;
    assert.equal(engine.unmap(1, at, 2 * PAGE), expected);
    backend.unmapFault = () => ({ errno: ERRNO.EINVAL });
    assert.equal(stat(engine, "dma/stuck_mappings"), 1);
    assert.equal(engine.pinnedBytes, 2 * PAGE, "what may be reachable stays pinned");
    const others: number[] = [];
    while (engine.map(2, 0, PAGE, ANY, RW) === 0) others.push(engine.out[0]!);
    assert.equal(others.length, 4);
    for (const other of others) assert.ok(other < at || other >= at + 2 * PAGE);
    // Once more, and it goes.
    backend.unmapFault = () => undefined;
    assert.equal(engine.unmap(1, at, 2 * PAGE), 0);
    assert.equal(stat(engine, "dma/stuck_mappings"), 0);
    for (const other of others) assert.equal(engine.unmap(2, other, PAGE), 0);
    assertClean(fixture);
  }
});

calls("EAGAIN from the host gets one more try, and no third", () => {
  const list = entryWords([
    [0, PAGE],
    [9 * PAGE, PAGE],
  ]);
  const fixture = makeEngine();
  const { engine } = fixture;
  const backend = fixture.backends[0]!;
  backend.mapFault = () => (backend.maps === 2 ? { errno: ERRNO.EAGAIN } : undefined);
  assert.equal(engine.mapList(1, list, 2, ANY, RW), 0);
  assert.equal(backend.maps, 4, "the list from its beginning");
  assert.equal(reach(backend, engine.out[0]! + PAGE, read), hvaOfGpaPage(9));
  assert.equal(engine.unmap(1, engine.out[0]!, 2 * PAGE), 0);
  backend.maps = 0;
  backend.mapFault = () => ({ errno: ERRNO.EAGAIN });
  assert.equal(engine.mapList(1, list, 2, ANY, RW), LIMIT(ERRNO.EAGAIN));
  assert.equal(backend.maps, 2);
  assertClean(fixture);
});

calls("on a limit what is stuck is tried again, in all domains, and then the map once more", () => {
  for (const [limit, errno] of [
    [{ entries: 2 }, ERRNO.ENOSPC],
    [{ hostEntries: 2 }, ERRNO.ENOSPC],
    [{ lockedBytesMax: 2 * PAGE }, ERRNO.ENOMEM],
    [{ ranges: [{ first: MiB, last: MiB + 2 * PAGE - 1 }] }, ERRNO.ERANGE],
    [{ deviceQuotaBytes: { 1: 2 * PAGE } }, ERRNO.EDQUOT],
    [{ quotaBytes: 4 * PAGE }, ERRNO.EDQUOT],
  ] as const) {
    const fixture = makeEngine(limit);
    const { engine, backends } = fixture;
    // Two mappings of device 1, and two of device 3 in the other domain.
    for (const handle of [1, 3]) {
      for (const page of [0, 9]) assert.equal(engine.map(handle, (handle + page) * PAGE, PAGE, ANY, RW), 0);
    }
    for (const backend of backends) backend.unmapFault = () => ({ errno: ERRNO.EINVAL });
    for (const handle of [1, 3]) assert.equal(engine.release(handle), LIMIT(ERRNO.EPROTO));
    assert.equal(stat(engine, "dma/stuck_mappings"), 4);
    const [first, second] = [backends[0]!, backends[1]!];
    first.maps = 0;
    first.unmaps = 0;
    second.unmaps = 0;
    assert.equal(engine.map(1, 20 * PAGE, PAGE, ANY, RW), LIMIT(errno));
    assert.deepEqual([first.unmaps, second.unmaps], [2, 2], "tried, each once");
    assert.ok(first.maps <= 1, "and without success not mapped again");
    // The other domain's give way: that helps where the limit is common to both.
    second.unmapFault = () => undefined;
    const common = "quotaBytes" in limit;
    assert.equal(engine.map(1, 20 * PAGE, PAGE, ANY, RW), common ? 0 : LIMIT(errno));
    assert.equal(stat(engine, "dma/stuck_mappings"), 2);
    first.unmapFault = () => undefined;
    assert.equal(engine.map(1, 21 * PAGE, PAGE, ANY, RW), 0);
    assert.equal(stat(engine, "dma/stuck_mappings"), common ? 2 : 0, "only when there is need");
    assert.equal(engine.reset(), 0);
    assertClean(fixture);
  }
});

calls("an undo that fails leaves a stuck mapping, not a hidden one", () => {
  const fixture = makeEngine();
  const { engine } = fixture;
  const backend = fixture.backends[0]!;
  backend.mapFault = () => (backend.maps === 2 ? { errno: ERRNO.ENOMEM } : undefined);
  backend.unmapFault = () => ({ errno: ERRNO.EINVAL });
  const list = entryWords([
    [0, PAGE],
    [9 * PAGE, PAGE],
  ]);
  assert.equal(engine.mapList(1, list, 2, ANY, RW), LIMIT(ERRNO.ENOMEM));
  assert.equal(stat(engine, "dma/stuck_mappings"), 1);
  assert.equal(fixture.pinCount(0), 1);
  assert.equal(fixture.pinCount(9), 0);
  assert.equal(engine.mappedBytes(1), PAGE);
  backend.unmapFault = () => undefined;
  assert.equal(engine.release(1), 0);
  assertClean(fixture);
});

calls("unmapList goes up to the first that fails and tells how far", () => {
  const { engine } = makeEngine();
  const map = (page: number) => {
    engine.map(1, page * PAGE, PAGE, ANY, RW);
    return [engine.out[0]!, PAGE] as const;
  };
  const [a, b, c] = [map(1), map(2), map(3)];
  assert.equal(engine.unmapList(1, entryWords([a, [b[0] + PAGE * 50, PAGE], c]), 3), INVALID(ERRNO.ESTALE));
  assert.deepEqual([engine.out[0], engine.out[1], engine.pages], [PAGE, 1, 1]);
  assert.equal(engine.unmapList(1, entryWords([b, c]), 2), 0);
  assert.deepEqual([engine.out[0], engine.out[1]], [2 * PAGE, 2]);
  assert.equal(engine.mappedBytes(0), 0);
});

calls("is assigned: every device by its address, with policy and kind; others are not", () => {
  const { engine } = makeEngine();
  const ask = (bdf: number) => {
    assert.equal(engine.isAssigned(bdf), 0);
    return [...engine.out.subarray(0, 3)];
  };
  assert.deepEqual(ask(0x10), [1, POLICY.strict, 39]);
  assert.deepEqual(ask(0x10020), [3, POLICY.strict, 39]);
  assert.deepEqual(ask(0x28), [4, POLICY.pinned | 256, 39]);
  for (const bdf of [0, 0x20, 2 ** 32 + 0x10, 2 ** 64]) assert.deepEqual(ask(bdf), [0, 0, 0]);
});

calls("is assigned: what the host has for the device", () => {
  const limits = (options: Parameters<typeof makeEngine>[0], bdf = 0x10) => {
    const { engine } = makeEngine(options);
    assert.equal(engine.isAssigned(bdf), 0);
    return [...engine.out.subarray(3)];
  };
  assert.deepEqual(limits({ entries: 50 }), [50, 0]);
  assert.deepEqual(limits({ entries: 50 }, 0x77), [0, 0]);
  assert.deepEqual(limits({ quotaBytes: 9 * PAGE }), [4096, 9 * PAGE]);
  assert.deepEqual(limits({ lockableBytes: { 1: 7 * PAGE } }), [4096, 7 * PAGE]);
  assert.deepEqual(limits({ lockableBytes: { 1: 7 * PAGE } }, 0x18), [4096, 0], "another device's");
  const lockable = { 1: 7 * PAGE, 2: 7 * PAGE };
  const all = { quotaBytes: 9 * PAGE, lockableBytes: lockable, deviceQuotaBytes: { 1: 5 * PAGE } };
  assert.deepEqual(limits(all), [4096, 5 * PAGE]);
  assert.deepEqual(limits(all, 0x18), [4096, 7 * PAGE]);
});

calls("a device that is removed keeps nothing and gets nothing; the others go on", () => {
  const fixture = makeEngine();
  const { engine, backends } = fixture;
  engine.map(1, 0, PAGE, ANY, RW);
  const mine = engine.out[0]!;
  engine.map(2, 0, PAGE, ANY, RW);
  const other = engine.out[0]!;
  assert.equal(engine.removeDevice(1), 0);
  const gone = status(STATUS.gone, ERRNO.ENODEV);
  assert.equal(reach(backends[0]!, mine, read), -1);
  assert.equal(reach(backends[0]!, other, read), RAM[0]!.hva);
  assert.equal(engine.map(1, 0, PAGE, ANY, RW), gone);
  assert.equal(engine.unmap(1, mine, PAGE), gone);
  assert.equal(engine.isAssigned(0x10), gone);
  assert.equal(engine.release(1), gone);
  assert.equal(engine.unmap(2, other, PAGE), 0);
  assertClean(fixture);
});

calls("release takes back all of one device, and says how much", () => {
  const fixture = makeEngine();
  const { engine, backends } = fixture;
  const mine = [1, 2, 3].map((pages) => {
    assert.equal(engine.map(1, 5 * PAGE, pages * PAGE, ANY, RW), 0);
    return engine.out[0]!;
  });
  engine.map(2, 5 * PAGE, PAGE, ANY, RW);
  const other = engine.out[0]!;
  assert.equal(engine.release(1), 0);
  assert.deepEqual([engine.out[0], engine.out[1], engine.pages], [3, 6 * PAGE, 6]);
  for (const at of mine) assert.equal(reach(backends[0]!, at, read), -1);
  assert.equal(reach(backends[0]!, other, read), RAM[0]!.hva + 5 * PAGE);
  assert.equal(engine.release(1), 0);
  assert.deepEqual([engine.out[0], engine.out[1]], [0, 0]);
  assert.equal(engine.map(1, 0, PAGE, ANY, RW), 0, "the device goes on");
  // What the host does not unmap stays, and the next time it is tried again.
  engine.map(1, 9 * PAGE, PAGE, ANY, RW);
  const backend = backends[0]!;
  backend.unmapFault = () => (backend.unmaps === 4 ? { errno: ERRNO.EINVAL } : undefined);
  assert.equal(engine.release(1), LIMIT(ERRNO.EPROTO));
  assert.equal(engine.mappedBytes(1), PAGE);
  assert.equal(engine.release(1), 0);
  assert.deepEqual([engine.out[0], engine.out[1]], [1, PAGE]);
  assert.equal(stat(engine, "devices/0000:01:00.0/dma/released_mappings"), 5);
  assert.equal(stat(engine, "devices/0000:02:00.0/dma/released_mappings"), 0);
  for (const handle of [0, 5, 2 ** 32 + 1, 2 ** 64]) {
    assert.equal(engine.release(handle), INVALID(ERRNO.ENODEV));
  }
  assert.equal(engine.release(4), 0, "nothing of an identity domain is a single device's");
  assert.equal(engine.reset(), 0);
  assert.equal(stat(engine, "dma/released_mappings"), 6);
  assertClean(fixture);
});

calls("reset unmaps everything in translated domains", () => {
  const fixture = makeEngine();
  const { engine } = fixture;
  for (const handle of [1, 2, 3]) for (let i = 0; i < 10; i++) engine.map(handle, i * PAGE, 5000, ANY, RW);
  assert.equal(engine.mappedBytes(0), 60 * PAGE);
  assert.equal(engine.reset(), 0);
  assertClean(fixture);
});

calls("an identity domain maps all RAM at its own address, checks, and answers", () => {
  const fixture = makeEngine();
  const { engine, backends } = fixture;
  assert.equal(engine.map(4, 0, 1, ANY, RW), status(STATUS.retry, ERRNO.EAGAIN), "not before it is mapped");
  assert.equal(engine.mapIdentity(), undefined);
  for (const { gpa, bytes, hva } of RAM) {
    assert.equal(reach(backends[2]!, gpa, write), hva);
    assert.equal(reach(backends[2]!, gpa + bytes - 1, write), hva + bytes - 1);
  }
  assert.equal(reach(backends[2]!, 48 * PAGE, read), -1);
  assert.equal(engine.pinnedBytes, RAM_PAGES * PAGE);
  assert.equal(engine.map(4, MiB + 5, PAGE, ANY, RW), 0);
  assert.equal(engine.out[0], MiB + 5);
  assert.equal(engine.map(4, MiB, PAGE, MiB + PAGE - 1, RW), 0);
  assert.equal(engine.map(4, MiB, PAGE, MiB + PAGE - 2, RW), INVALID(ERRNO.ERANGE));
  assert.equal(engine.map(4, 48 * PAGE, 1, ANY, RW), INVALID(ERRNO.EFAULT));
  assert.equal(engine.unmap(4, MiB, PAGE), 0);
  assert.equal(engine.unmap(4, 48 * PAGE, PAGE), INVALID(ERRNO.ESTALE));
  const apart = entryWords([
    [0, PAGE],
    [5 * PAGE, PAGE],
  ]);
  assert.equal(engine.mapList(4, apart, 2, ANY, RW), INVALID(ERRNO.EINVAL));
  engine.reset();
  assert.equal(engine.mappedBytes(4), RAM_PAGES * PAGE, "a guest reset does not undo it");
  backends[2]!.unmapFault = () => (backends[2]!.unmaps === 2 ? { errno: ERRNO.EINVAL } : undefined);
  assert.equal(engine.close(), 2, "one slot went, the next did not");
  assert.equal(engine.pinnedBytes, (RAM_PAGES - 32) * PAGE);
  assert.equal(engine.close(), 0);
  assertClean(fixture);
});

calls("an identity domain is unmapped when its last device is removed, and not before", () => {
  const { state, backends } = makeEngine();
  const devices = state.config.devices.map((device, index) =>
    index < 2 ? device : { ...device, policy: "pinned" as const, domain: 2 },
  );
  const engine = new Engine(createEngineState({ ...state.config, devices }), (at) => backends[at]!, 0);
  assert.equal(engine.mapIdentity(), undefined);
  assert.equal(engine.removeDevice(3), 0);
  assert.equal(reach(backends[2]!, 0, read), RAM[0]!.hva);
  assert.equal(engine.map(4, 0, PAGE, ANY, RW), 0);
  assert.equal(engine.removeDevice(4), 0);
  assert.equal(reach(backends[2]!, 0, read), -1);
  assert.equal(engine.pinnedBytes, 0);
  assert.equal(engine.map(4, 0, PAGE, ANY, RW), status(STATUS.gone, ERRNO.ENODEV));
  assert.equal(engine.close(), 0);
});

calls("RAM that cannot be mapped at the start is named, and nothing stays", () => {
  const fixture = makeEngine();
  const backend = fixture.backends[2]!;
  backend.mapFault = () => (backend.maps === 2 ? { errno: ERRNO.ENOMEM } : undefined);
  assert.deepEqual(fixture.engine.mapIdentity(), { gpa: MiB, bytes: 64 * PAGE, errno: ERRNO.ENOMEM });
  assertClean(fixture);
  const small = makeEngine({ quotaBytes: 50 * PAGE });
  assert.deepEqual(small.engine.mapIdentity(), { gpa: MiB, bytes: 64 * PAGE, errno: ERRNO.EDQUOT });
  assertClean(small);
});

calls("a configuration that contradicts itself is refused", () => {
  const { state } = makeEngine();
  const { config } = state;
  const bad: [Partial<EngineConfig>, RegExp][] = [
    [{ ram: [{ gpa: gpa(1), bytes: PAGE, hva: hva(0) }] }, /whole pages/],
    [{ ram: [...RAM, RAM[0]!] }, /overlaps/],
    [{ ram: [] }, /RAM slots/],
    [{ devices: Array.from({ length: 33 }, () => config.devices[0]!) }, /33 devices/],
    [{ devices: [{ ...config.devices[0]!, policy: "pinned" }] }, /policy pinned/],
    [{ devices: [{ ...config.devices[0]!, domain: 9 }] }, /domain 9/],
    [
      {
        devices: [],
        domains: [{ kind: "translated", limits: { ranges: RANGES, entries: 1, pageSizeMask: 2 ** 21 } }],
      },
      /4 KiB/,
    ],
  ];
  for (const [change, message] of bad) {
    assert.throws(() => createEngineState({ ...config, ...change }), { name: "RangeError", message });
  }
});

calls.run();

// ---- threads --------------------------------------------------------------------------------------------------------

const threads = suite("engine: threads");

const SHARED_RAM_PAGES = 512;
const SHARED_IOVA_END = 64 * MiB;

/** A state for real threads, with the tables of a backend in shared memory. */
function makeShared(): Omit<WorkerJob, "lane"> {
  const limits = { ranges: [{ first: MiB, last: SHARED_IOVA_END - 1 }], entries: 400, pageSizeMask: PAGE };
  const device = (bdf: number, domain: number) =>
    ({
      name: `d${bdf}`,
      bdf,
      policy: "strict",
      domain,
      addressBits: 39,
      quotaBytes: 0,
      lockableBytes: 0,
    }) as const;
  return {
    state: createEngineState({
      ram: [{ gpa: gpa(0), bytes: SHARED_RAM_PAGES * PAGE, hva: hva(0) }],
      domains: [
        { kind: "translated", limits },
        { kind: "translated", limits },
      ],
      devices: [device(8, 0), device(16, 0), device(24, 1)],
      quotaBytes: SHARED_RAM_PAGES * PAGE,
      lanes: 5,
    }),
    owners: [0, 1].map(() => new SharedArrayBuffer((SHARED_IOVA_END / PAGE) * 4)),
    faults: new SharedArrayBuffer(12),
    operations: SOAK ? 2_000_000 : 40_000,
    ramPages: SHARED_RAM_PAGES,
    failures: 0,
  };
}

/** Runs a job on four Workers; resolves when all are done. */
function onFourThreads(job: Omit<WorkerJob, "lane">): Promise<unknown> {
  const file = new URL("./support/engine-worker.js", import.meta.url);
  return Promise.all(
    [1, 2, 3, 4].map(
      (lane) =>
        new Promise<void>((resolve, reject) => {
          const worker = new Worker(file, { workerData: { ...job, lane } });
          worker.once("message", () => resolve());
          worker.once("error", reject);
        }),
    ),
  );
}

/** After four threads have done a job: what they must have left, once `engine` has unmapped the rest. */
async function hammered(job: Omit<WorkerJob, "lane">): Promise<Engine> {
  const faults = new Int32Array(job.faults);
  await onFourThreads(job);
  assert.deepEqual([...faults.subarray(0, 2)], [0, 0]);
  assert.equal(faults[2]! > 0, job.failures > 0);
  const tables = job.owners.map((memory) => new OwnerTable(new Int32Array(memory), faults));
  const engine = new Engine(job.state, (domain) => tables[domain]!, 0);
  if (job.failures > 0) assert.equal(engine.reset(), 0);
  assert.equal(engine.pinnedBytes, 0);
  for (const { name } of job.state.config.devices) {
    assert.equal(stat(engine, `devices/${name}/dma/pinned_bytes`), 0);
  }
  for (const name of ["entries", "stuck_mappings", "mapped_bytes"])
    assert.equal(stat(engine, `dma/${name}`), 0);
  assert.ok(stat(engine, "dma/peak_pinned_bytes") > 0);
  for (const memory of job.owners) assert.ok(new Int32Array(memory).every((owner) => owner === 0));
  return engine;
}

threads("four threads on one state: ranges never meet, counts are exact, all returns to zero", async () => {
  await hammered(makeShared());
});

threads("four threads, limits and a host that fails: each reclaims what any of them left stuck", async () => {
  const job = makeShared();
  const devices = job.state.config.devices.map((device) => ({ ...device, quotaBytes: 200 * PAGE }));
  const state = createEngineState({ ...job.state.config, devices, quotaBytes: 300 * PAGE });
  const engine = await hammered({ ...job, state, failures: 20 });
  assert.ok(stat(engine, "dma/peak_pinned_bytes") <= 300 * PAGE);
});

threads("a device that is removed while four threads map for it keeps no mapping", async () => {
  for (let round = 0; round < (SOAK ? 200 : 5); round++) {
    const job = { ...makeShared(), untilGone: new SharedArrayBuffer(4) };
    const progress = new Int32Array(job.untilGone);
    const table = new OwnerTable(new Int32Array(job.owners[0]!), new Int32Array(job.faults));
    const engine = new Engine(job.state, () => table, 0);
    const done = onFourThreads(job);
    while (Atomics.load(progress, 0) < 5000) await new Promise((resolve) => setTimeout(resolve, 1));
    assert.equal(engine.removeDevice(1), 0);
    await done;
    assert.equal(engine.mappedBytes(1), 0);
    assert.equal(engine.pinnedBytes, 0);
    assert.ok(new Int32Array(job.owners[0]!).every((owner) => owner === 0));
  }
});

threads.run();
