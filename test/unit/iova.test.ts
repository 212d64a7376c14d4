// hypercalls/iova.ts: where ranges come from, that they never overlap, and that the work does not grow with them.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { IovaAllocator } from "../../hypercalls/iova.js";
import { Random, SOAK } from "./support/random.js";

const MiB = 2 ** 20;
const PAGE = 4096;
const TOP = 2 ** 32 - 1;
const page = (address: number) => address / PAGE;

/** The ranges of QEMU's emulated VT-d: 39 bits, without the MSI window. */
const VTD = [
  { first: 0, last: 0xfedfffff },
  { first: 0xfef00000, last: 2 ** 39 - 1 },
];
const ALL = [{ first: 0, last: 2 ** 48 - 1 }];

function make(ranges: readonly { first: number; last: number }[], live = 4096): IovaAllocator {
  const words = new Int32Array(new SharedArrayBuffer(IovaAllocator.words(live, ranges.length) * 4));
  const allocator = new IovaAllocator(words, live, ranges.length);
  allocator.init(ranges);
  return allocator;
}

const endPage = (allocator: IovaAllocator, node: number) => allocator.startPage(node) + allocator.pages(node);

const ranges = suite("iova: ranges and limits");

ranges("a range is what was asked for, found by its first page, and gone when it is freed", () => {
  const allocator = make(VTD);
  const node = allocator.alloc(5, TOP, false);
  assert.notEqual(node, 0);
  assert.equal(allocator.pages(node), 5);
  assert.equal(allocator.liveCount, 1);
  const start = allocator.startPage(node);
  assert.equal(allocator.lookup(start), node);
  for (const other of [start + 1, start - 1, 0, 2 ** 32, start + 2 ** 32, 2 ** 41 + 1]) {
    assert.equal(allocator.lookup(other), 0, `page ${other}`);
  }
  allocator.free(node);
  assert.equal(allocator.lookup(start), 0);
  assert.equal(allocator.liveCount, 0);
});

ranges("a mask of any width is honoured, down to 1 MiB and no lower", () => {
  for (let bits = 20; bits <= 64; bits++) {
    const allocator = make(ALL, 64);
    const last = Math.floor(2 ** bits / PAGE) - 1;
    const node = allocator.alloc(1, last, false);
    if (bits === 20) {
      assert.equal(node, 0);
      continue;
    }
    assert.notEqual(node, 0, `${bits} bits`);
    assert.ok(allocator.startPage(node) <= last, `${bits} bits: page ${allocator.startPage(node)}`);
    assert.ok(allocator.startPage(node) >= page(MiB));
  }
  const allocator = make(ALL, 64);
  assert.equal(allocator.alloc(1, -1, false), 0);
  assert.equal(allocator.alloc(1, 0, false), 0);
});

ranges("a limit that is no power of two is honoured to the page", () => {
  const random = new Random(1);
  for (let round = 0; round < 500; round++) {
    const allocator = make(ALL, 64);
    const last = page(MiB) + random.below(random.pick([100, 2 ** 12, 2 ** 20, 2 ** 31]));
    for (let i = 0; i < 20; i++) {
      const node = allocator.alloc(1 + random.below(40), last, random.oneIn(2));
      if (node !== 0) assert.ok(endPage(allocator, node) - 1 <= last, `limit ${last}`);
    }
  }
  // Exactly as many pages as there are below the limit, and one too many.
  assert.notEqual(make(ALL).alloc(100, page(MiB) + 99, false), 0);
  assert.equal(make(ALL).alloc(101, page(MiB) + 99, false), 0);
});

ranges("a limit just inside a zone falls back to the zone below", () => {
  const allocator = make(ALL);
  const last = page(2 ** 32) + 2;
  const node = allocator.alloc(16, last, false);
  assert.notEqual(node, 0);
  assert.ok(endPage(allocator, node) - 1 <= last);
});

ranges("wide devices leave low addresses to narrow ones", () => {
  const allocator = make(VTD);
  for (let i = 0; i < 1000; i++) {
    const node = allocator.alloc(64, TOP, false);
    assert.ok(allocator.startPage(node) >= page(2 ** 36));
  }
  const node = allocator.alloc(1, page(2 ** 32) - 1, false);
  assert.ok(allocator.startPage(node) >= page(2 ** 31) && allocator.startPage(node) < page(2 ** 32));
  // QEMU's edu: nearly all of its 256 MiB in one piece.
  assert.notEqual(allocator.alloc(page(240 * MiB), page(2 ** 28) - 1, false), 0);
});

ranges("when the highest zone is full the next lower one serves", () => {
  const allocator = make([{ first: 0, last: 2 ** 31 - 1 }]);
  const starts: number[] = [];
  for (;;) {
    const node = allocator.alloc(page(64 * MiB), TOP, false);
    if (node === 0) break;
    starts.push(allocator.startPage(node));
  }
  // 16 in [1 GiB, 2 GiB), 12 in [256 MiB, 1 GiB), 3 in [16 MiB, 256 MiB).
  assert.equal(starts.length, 31);
  assert.ok(starts[0]! >= page(2 ** 30) && starts.at(-1)! < page(2 ** 28));
});

ranges(
  "nothing is handed out in a hole, outside the host's ranges, or of a page that is there in part",
  () => {
    const odd = [
      { first: 2 * MiB + 1, last: 2 * MiB + 5 * PAGE },
      { first: 3 * MiB, last: 3 * MiB + 3 * PAGE - 2 },
    ];
    const allocator = make(odd);
    const got: number[] = [];
    for (;;) {
      const node = allocator.alloc(1, TOP, false);
      if (node === 0) break;
      got.push(allocator.startPage(node));
    }
    const first = page(2 * MiB);
    const second = page(3 * MiB);
    assert.deepEqual(
      got.sort((a, b) => a - b),
      [first + 1, first + 2, first + 3, first + 4, second, second + 1],
    );

    const vtd = make(VTD, 70000);
    let below = 0;
    for (;;) {
      const node = vtd.alloc(256, page(2 ** 32) - 1, false);
      if (node === 0) break;
      const start = vtd.startPage(node);
      assert.ok(start + 256 <= page(0xfee00000) || start >= page(0xfef00000), `page ${start.toString(16)}`);
      below += 256;
    }
    // All of it: 4 GiB less the first and the MSI window's MiB.
    assert.equal(below, page(2 ** 32) - page(2 * MiB));
  },
);

ranges("align gives natural alignment to the length rounded up, also where only just enough is left", () => {
  const random = new Random(2);
  const allocator = make(VTD, 70000);
  for (let i = 0; i < 5000; i++) {
    const pages = 1 + random.below(random.pick([4, 40, 600]));
    const align = random.oneIn(2);
    const node = allocator.alloc(pages, TOP, align);
    const unit = align ? 2 ** Math.ceil(Math.log2(pages)) : 1;
    assert.equal(allocator.startPage(node) % unit, 0, `${pages} pages`);
    if (random.oneIn(4)) allocator.free(node);
  }
  // 1 GiB with 1 GiB alignment in a zone of 1 GiB.
  const exact = make([{ first: 0, last: 2 ** 31 - 1 }]);
  const node = exact.alloc(2 ** 18, TOP, true);
  assert.equal(exact.startPage(node), page(2 ** 30));
});

ranges("a free range of the same size class that is too small does not hide a larger one", () => {
  const allocator = make([{ first: 2 ** 30, last: 2 ** 31 - 1 }]);
  // From 64 pages on a class holds two sizes: a hole of 64 is where one looks for 65.
  const hole = allocator.alloc(64, TOP, false);
  assert.notEqual(allocator.alloc(1, TOP, false), 0);
  allocator.free(hole);
  assert.notEqual(allocator.alloc(65, TOP, false), 0);
  assert.equal(allocator.startPage(allocator.alloc(64, TOP, false)), page(2 ** 30), "and the hole is used");
});

ranges("as many ranges live as may, no more", () => {
  const allocator = make(VTD, 3);
  const nodes = [1, 2, 3].map(() => allocator.alloc(1, TOP, false));
  assert.equal(allocator.alloc(1, TOP, false), 0);
  allocator.free(nodes[1]!);
  assert.notEqual(allocator.alloc(1, TOP, false), 0);
});

ranges("a page below 4 GiB that was freed does not go to a device that can use another", () => {
  const allocator = make(ALL);
  allocator.free(allocator.alloc(1, page(2 ** 32) - 1, false));
  assert.ok(allocator.startPage(allocator.alloc(1, TOP, false)) >= page(2 ** 32));
});

ranges("single pages that are kept at hand count like live ranges: the hash table never fills", () => {
  const live = 16;
  const words = new Int32Array(new SharedArrayBuffer(IovaAllocator.words(live, VTD.length) * 4));
  new IovaAllocator(words, live, VTD.length).init(VTD);
  let reads = 0;
  const bounded = new Proxy(words, {
    get: (target, key) => {
      assert.ok(reads++ < 10_000, "a lookup without an end");
      return target[key as unknown as number];
    },
    set: (target, key, value: number) => {
      target[key as unknown as number] = value;
      return true;
    },
  });
  const allocator = new IovaAllocator(bounded, live, VTD.length);
  const fill = (pages: number) => Array.from({ length: live }, () => allocator.alloc(pages, TOP, false));
  for (const node of fill(1)) allocator.free(node);
  const nodes = fill(2);
  assert.ok(!nodes.includes(0));
  assert.equal(allocator.alloc(1, TOP, false), 0);
  assert.equal(allocator.lookup(page(MiB)), 0);
  for (const node of nodes) assert.equal(allocator.lookup(allocator.startPage(node)), node);
});

ranges("a second view of the same memory sees the same ranges", () => {
  const words = new Int32Array(new SharedArrayBuffer(IovaAllocator.words(16, 2) * 4));
  const one = new IovaAllocator(words, 16, 2);
  one.init(VTD);
  const other = new IovaAllocator(words, 16, 2);
  const node = one.alloc(3, TOP, false);
  assert.equal(other.lookup(one.startPage(node)), node);
  other.free(node);
  assert.equal(one.liveCount, 0);
});

ranges.run();

const random = suite("iova: model");

/** Every stretch is one free range again: the largest possible request in each zone succeeds. */
function assertWhole(allocator: IovaAllocator): void {
  assert.equal(allocator.liveCount, 0);
  const nodes = [
    allocator.alloc(page(2 ** 30), page(2 ** 31) - 1, true),
    allocator.alloc(page(2 ** 30 - 2 ** 28), page(2 ** 30) - 1, false),
    allocator.alloc(page(240 * MiB), page(2 ** 28) - 1, false),
    allocator.alloc(page(15 * MiB), page(2 ** 24) - 1, false),
    allocator.alloc(page(0xfee00000 - 2 ** 31), page(2 ** 32) - 1, false),
    allocator.alloc(page(2 ** 39 - 2 ** 36), TOP, false),
  ];
  assert.ok(!nodes.includes(0), `not coalesced: ${nodes}`);
  for (const node of nodes) allocator.free(node);
}

random("random ranges never overlap, stay where they belong, and coalesce to what there was", () => {
  for (let seed = 0; seed < (SOAK ? 200 : 4); seed++) {
    const random = new Random(seed);
    const allocator = make(VTD, 1000);
    const taken = new Map<number, number>(); // page → node
    const live: number[] = [];
    const drop = (index: number) => {
      const node = live[index]!;
      live[index] = live.at(-1)!;
      live.pop();
      const start = allocator.startPage(node);
      assert.equal(allocator.lookup(start), node);
      for (let at = start; at < endPage(allocator, node); at++) assert.ok(taken.delete(at));
      allocator.free(node);
      assert.equal(allocator.lookup(start), 0);
    };
    for (let step = 0; step < 20000; step++) {
      // Grows for a while, shrinks for a while.
      if (live.length > 0 && random.below(100) < (step % 4000 < 2000 ? 40 : 60)) {
        drop(random.below(live.length));
        continue;
      }
      const pages = 1 + random.below(random.pick([1, 1, 8, 33, 100]));
      const last = random.pick([
        TOP,
        page(2 ** 32) - 1,
        page(2 ** 28) - 1,
        page(2 ** 24) - 1,
        page(3 * MiB) + 7,
      ]);
      const align = random.oneIn(3);
      const node = allocator.alloc(pages, last, align);
      if (node === 0) {
        const fullUp = live.length === 1000 || last < page(2 ** 24);
        assert.ok(fullUp, `seed ${seed} step ${step}: no ${pages} pages up to ${last}`);
        continue;
      }
      assert.equal(allocator.pages(node), pages);
      assert.ok(endPage(allocator, node) - 1 <= last);
      for (let at = allocator.startPage(node); at < endPage(allocator, node); at++) {
        assert.ok(!taken.has(at), `seed ${seed} step ${step}: page ${at} twice`);
        assert.ok(at >= page(MiB) && at < page(2 ** 39));
        assert.ok(at < page(0xfee00000) || at >= page(0xfef00000));
        taken.set(at, node);
      }
      live.push(node);
      assert.equal(allocator.liveCount, live.length);
    }
    while (live.length > 0) drop(live.length - 1);
    assertWhole(allocator);
  }
});

random("the hash table closes its gaps: every range is found while others come and go", () => {
  const random = new Random(7);
  // 8 ranges in 16 slots, so that chains form and wrap.
  for (let round = 0; round < 2000; round++) {
    const allocator = make(ALL, 8);
    const live: number[] = [];
    for (let step = 0; step < 30; step++) {
      if (live.length === 8 || (live.length > 0 && random.oneIn(2))) {
        allocator.free(live.splice(random.below(live.length), 1)[0]!);
      } else {
        live.push(allocator.alloc(1 + random.below(9), TOP, false));
      }
      for (const node of live) assert.equal(allocator.lookup(allocator.startPage(node)), node);
    }
  }
});

random("the memory accesses of alloc, lookup and free do not grow with the live ranges", () => {
  const live = 65535;
  const memory = new Int32Array(new SharedArrayBuffer(IovaAllocator.words(live, VTD.length) * 4));
  const plain = new IovaAllocator(memory, live, VTD.length);
  plain.init(VTD);
  let accesses = 0;
  const counting = new Proxy(memory, {
    get: (words, key) => {
      accesses++;
      return words[key as unknown as number];
    },
    set: (words, key, value: number) => {
      accesses++;
      words[key as unknown as number] = value;
      return true;
    },
  });
  const counted = new IovaAllocator(counting, live, VTD.length);
  const random = new Random(3);
  const worst = (samples: number) => {
    const most = { alloc: 0, lookup: 0, free: 0 };
    for (let i = 0; i < samples; i++) {
      accesses = 0;
      const last = random.pick([TOP, page(2 ** 32) - 1, page(2 ** 24) - 1]);
      const node = counted.alloc(1 + random.below(64), last, random.oneIn(2));
      most.alloc = Math.max(most.alloc, accesses);
      if (node === 0) continue;
      const start = plain.startPage(node);
      accesses = 0;
      counted.lookup(start);
      most.lookup = Math.max(most.lookup, accesses);
      accesses = 0;
      counted.free(node);
      most.free = Math.max(most.free, accesses);
    }
    return most;
  };
  const fragment = (count: number) => {
    const nodes: number[] = [];
    while (plain.liveCount < count) {
      const node = plain.alloc(1 + random.below(16), random.pick([TOP, page(2 ** 32) - 1]), random.oneIn(2));
      assert.notEqual(node, 0);
      nodes.push(node);
    }
    // Free every third: as fragmented as it gets.
    for (let i = 0; i < nodes.length; i += 3) plain.free(nodes[i]!);
  };
  const few = worst(2000);
  fragment(1000);
  const some = worst(2000);
  fragment(65000);
  assert.ok(plain.liveCount > 40000);
  const many = worst(2000);
  // The worst: what is kept at hand, each of it by itself, is given back first, and so many were freed.
  const kept: number[] = [];
  while (plain.liveCount < live) kept.push(plain.alloc(1, TOP, false));
  for (let i = 0; i < 64; i++) plain.free(kept[2 * i]!);
  // 16 of them are kept, and with what lives now they are as many ranges as there may be.
  while (plain.liveCount < live - 16) plain.alloc(2, TOP, false);
  accesses = 0;
  assert.notEqual(counted.alloc(2, TOP, false), 0);
  assert.ok(accesses > 250 && accesses < 1000, `${accesses} to give back what is kept`);
  // The hash table's expected probe lengths differ a little with its load; the rest has a fixed bound.
  for (const most of [few, some, many]) {
    assert.ok(most.alloc < 250 && most.free < 250 && most.lookup < 80, JSON.stringify({ few, some, many }));
  }
});

random.run();
