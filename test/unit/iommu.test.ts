// The software IOMMU by itself: superpages, tables running out, what a device's access may and may not do, fault
// records, and how unmaps wait. The rules of map and unmap are in iommu-conformance.test.ts, random histories in
// iommu-model.test.ts, threads in iommu-stress.test.ts.

import assert from "node:assert/strict";
import { once } from "node:events";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import { hva, iova, PAGE_BYTES } from "../../hypercalls/addresses.js";
import { ERRNO } from "../../hypercalls/status.js";
import { DMA_FAULT, REFUSED } from "../../iommu-emul/device.js";
import { SoftDmaPort } from "../../iommu-emul/dma-port.js";
import { FaultReader, type FaultRecord } from "../../iommu-emul/faults.js";
import { DEFAULT_RANGES, SoftIommu, type SoftIommuConfig } from "../../iommu-emul/iommu.js";
import { OwnLane } from "../../iommu-emul/lanes.js";
import { FAULT_RECORDS, HEADER, LANE, Shared } from "../../iommu-emul/shared.js";
import { sized } from "../soak.js";

const PAGE = PAGE_BYTES;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const { read: R, write: W } = MAP_FLAG;
const RW = R | W;
/** Where the memory is in the process, or would be. */
const BASE = 0x7f40_0000_0000;
const AT = 64 * MiB;

/** An IOMMU over `bytes` bytes of memory, and a device that may do DMA. */
function setUp(bytes = 64 * PAGE, config: Partial<SoftIommuConfig> = {}) {
  const memory = Buffer.from(new SharedArrayBuffer(Math.min(bytes, 3 * GiB)));
  const window = (at: number, size: number) => memory.subarray(at - BASE, at - BASE + size);
  const shared = SoftIommu.create({ memory: [{ hva: hva(BASE), bytes }], lanes: 2, ...config });
  const iommu = new SoftIommu(shared);
  iommu.setBusMaster(0, true);
  const faults: FaultRecord[] = [];
  const reader = new FaultReader(shared);
  return {
    shared,
    memory,
    iommu,
    reader,
    window,
    port: new SoftDmaPort(shared, 0, window),
    map: (at: number, offset: number, size: number, access = RW) =>
      iommu.map(iova(at), hva(BASE + offset), size, access),
    unmap: (at: number, size: number) => iommu.unmap(iova(at), size),
    drain: () => {
      faults.length = 0;
      reader.drain((fault) => faults.push(fault));
      return faults.map(({ lane, iova, access, reason }) => [lane, iova, access, reason]);
    },
  };
}

/** Bytes that follow a pattern without a short period. */
function pattern(bytes: number, seed = 1): Buffer {
  const buffer = Buffer.alloc(bytes);
  for (let i = 0; i < bytes; i++) buffer[i] = (i * 7 + (i >> 8) * 13 + seed * 29) & 0xff;
  return buffer;
}

// ---- tables ---------------------------------------------------------------------------------------------------------

const tables = suite("iommu-emul: tables");

tables("what is aligned takes large leaves, and tables come and go with what is mapped", () => {
  const { iommu, map, unmap } = setUp(4 * GiB);
  const used = () => iommu.tablesUsed;
  assert.equal(map(GiB, 0, PAGE), 0);
  assert.equal(used(), 3, "one of each level below the root");
  assert.equal(map(GiB + PAGE, PAGE, 511 * PAGE), 0);
  assert.equal(used(), 3);
  assert.equal(map(GiB + 2 * MiB, 2 * MiB, 2 * MiB), 0);
  assert.equal(used(), 3, "2 MiB is a leaf");
  assert.equal(map(GiB + 4 * MiB, PAGE, 2 * MiB), 0);
  assert.equal(used(), 4, "but where the memory is not aligned");
  assert.equal(unmap(GiB, GiB), 6 * MiB);
  assert.equal(used(), 0);
  assert.equal(map(5 * GiB, GiB, 2 * GiB), 0);
  assert.equal(used(), 1, "1 GiB is a leaf");
  assert.equal(map(7 * GiB, GiB + 2 * MiB, GiB), 0);
  assert.equal(used(), 2, "or 512 of 2 MiB");
  assert.equal(unmap(5 * GiB, GiB), -ERRNO.EINVAL);
  assert.equal(unmap(0, 2 ** 48), 3 * GiB);
  assert.deepEqual([used(), iommu.entriesUsed, iommu.lockedBytes], [0, 0, 0]);
});

tables("superpages and their edges translate byte by byte, for the eye and for DMA", () => {
  const { iommu, map, unmap, port, memory } = setUp(3 * GiB);
  const first = 7 * GiB - 3 * PAGE;
  const from = GiB - 3 * PAGE;
  const bytes = GiB + 2 * MiB + 5 * PAGE;
  assert.equal(map(first, from, bytes, R), 0);
  for (const offset of [
    0,
    3 * PAGE - 1,
    3 * PAGE,
    GiB,
    GiB + 3 * PAGE,
    GiB + 2 * MiB + 3 * PAGE,
    bytes - 1,
  ]) {
    assert.equal(iommu.translate(iova(first + offset), R), BASE + from + offset);
    assert.equal(iommu.translate(iova(first + offset), W), -1);
    const byte = Buffer.alloc(1);
    memory[from + offset] = 0x5a;
    assert.equal(port.read(first + offset, byte, 0, 1), 0);
    assert.equal(byte[0], 0x5a);
  }
  // From pages through the leaf of 1 GiB, which ends where the next window begins, into the one of 2 MiB.
  for (const border of [3 * PAGE, GiB + 3 * PAGE, GiB + 2 * MiB + 3 * PAGE]) {
    const data = pattern(5 * PAGE, border);
    data.copy(memory, from + border - 2 * PAGE - 100);
    const into = Buffer.alloc(4 * PAGE);
    assert.equal(port.read(first + border - 2 * PAGE - 100, into, 0, 4 * PAGE), 0);
    assert.ok(into.equals(data.subarray(0, 4 * PAGE)), `around ${border}`);
  }
  assert.equal(iommu.translate(iova(first - 1), R), -1);
  assert.equal(iommu.translate(iova(first + bytes), R), -1);
  assert.equal(unmap(0, 2 ** 48), bytes);
  assert.equal(iommu.translate(iova(first), R), -1);
  assert.equal(port.read(first + GiB, Buffer.alloc(1), 0, 1), DMA_FAULT.notMapped);
});

tables("without tables a map is ENOMEM, and nothing of it is left", () => {
  const { iommu, map, unmap, port, memory } = setUp(8 * MiB, { tables: 6 });
  assert.equal(map(AT, PAGE, PAGE), 0);
  // The root, three tables for that one: two are left. This one takes two, the next three.
  assert.equal(map(GiB, PAGE, 2 * PAGE), 0, "two tables below the one of level 2");
  const before = memory.toString("latin1");
  for (let i = 0; i < 1000; i++) {
    assert.equal(map(2 * GiB + 2 * MiB - PAGE, PAGE, 3 * PAGE), ERRNO.ENOMEM, `try ${i}`);
    assert.equal(map(2 ** 39 + i * GiB, PAGE, PAGE), ERRNO.ENOMEM, `try ${i}`);
  }
  assert.deepEqual([iommu.tablesUsed, iommu.entriesUsed, iommu.lockedBytes], [5, 2, 3 * PAGE]);
  assert.equal(unmap(GiB, 2 * PAGE), 2 * PAGE);
  // Four tables would do: half of it is entered before the last is missing.
  assert.equal(map(2 * GiB - PAGE, PAGE, 2 * PAGE), ERRNO.ENOMEM);
  assert.equal(port.write(2 * GiB - PAGE, Buffer.alloc(1, 1), 0, 1), DMA_FAULT.notMapped);
  assert.equal(iommu.tablesUsed, 3);
  assert.equal(map(2 * GiB, PAGE, PAGE), 0, "with the tables that were given back");
  assert.equal(port.read(AT, Buffer.alloc(8), 0, 8), 0, "what was mapped is");
  assert.equal(memory.toString("latin1"), before);
});

tables("memory in pieces: those that touch are one, others are apart", () => {
  const parts = [
    { hva: hva(BASE + 8 * PAGE), bytes: 8 * PAGE },
    { hva: hva(BASE), bytes: 8 * PAGE },
    { hva: hva(BASE + 32 * PAGE), bytes: 8 * PAGE },
  ];
  const { iommu, map, port, memory } = setUp(64 * PAGE, { memory: parts });
  assert.equal(map(AT, 6 * PAGE, 4 * PAGE), 0);
  assert.equal(map(AT + 4 * PAGE, 15 * PAGE, 2 * PAGE), ERRNO.EFAULT);
  assert.equal(map(AT + 4 * PAGE, 31 * PAGE, 2 * PAGE), ERRNO.EFAULT);
  assert.equal(map(AT + 4 * PAGE, 39 * PAGE, 2 * PAGE), ERRNO.EFAULT);
  assert.equal(map(AT + 4 * PAGE, -PAGE, PAGE), ERRNO.EFAULT);
  assert.equal(map(AT + 4 * PAGE, 39 * PAGE, PAGE), 0);
  const data = pattern(5 * PAGE);
  assert.equal(port.write(AT, data, 0, 5 * PAGE), 0);
  assert.ok(memory.subarray(6 * PAGE, 10 * PAGE).equals(data.subarray(0, 4 * PAGE)));
  assert.ok(memory.subarray(39 * PAGE, 40 * PAGE).equals(data.subarray(4 * PAGE)));
  assert.equal(iommu.translate(iova(AT + 4 * PAGE + 5), R), BASE + 39 * PAGE + 5);
});

tables("a view says what the configuration said, and contradictions are named", () => {
  const config = { memory: [{ hva: hva(BASE), bytes: PAGE }], lanes: 1 };
  const limits = new SoftIommu(SoftIommu.create(config)).limits();
  assert.deepEqual(limits, { ranges: DEFAULT_RANGES, pageSizeMask: 0x40201000, entries: 65535 });
  const part = (at: number, bytes: number) => ({ hva: hva(at), bytes });
  const wrong: [Partial<SoftIommuConfig>, RegExp][] = [
    [{ memory: [part(BASE + 1, PAGE)] }, /whole pages/],
    [{ memory: [part(BASE, 0)] }, /whole pages/],
    [{ memory: [part(BASE, 2 * PAGE), part(BASE + PAGE, PAGE)] }, /overlaps/],
    [{ memory: [part(0, 1025 * GiB)] }, /1025 GiB; at most 64 and 1024/],
    [{ lanes: 33 }, /33 devices, at most 32/],
    [{ tables: 0 }, /0 page tables/],
    [{ ranges: [{ first: 0, last: 2 ** 48 }] }, /ends above 2\^48/],
    [{ ranges: [...DEFAULT_RANGES].reverse() }, /overlaps/],
  ];
  for (const [change, message] of wrong) {
    assert.throws(() => SoftIommu.create({ ...config, ...change }), { name: "RangeError", message });
  }
  assert.equal(new SoftIommu(SoftIommu.create({ ...config, memory: [part(0, 1024 * GiB)] })).entriesUsed, 0);
});

tables.run();

// ---- a device's accesses --------------------------------------------------------------------------------------------

const dma = suite("iommu-emul: DMA");

dma("what is mapped, as it is mapped, and nothing beside it", () => {
  const { map, port, memory, drain } = setUp();
  pattern(memory.length, 9).copy(memory);
  const expected = Buffer.from(memory);
  const check = (what: string) => assert.ok(memory.equals(expected), what);
  assert.equal(map(AT, 3 * PAGE, PAGE, RW), 0);
  assert.equal(map(AT + PAGE, 10 * PAGE, PAGE, RW), 0);
  assert.equal(map(AT + 2 * PAGE, 5 * PAGE, PAGE, R), 0);
  assert.equal(map(AT + 4 * PAGE, 6 * PAGE, PAGE, W), 0);
  const data = pattern(4 * PAGE, 3);

  // Every length and offset that is done in another way: bytes, words, copies.
  for (const [offset, bytes] of [
    [0, 4],
    [8, 64],
    [100, 60],
    [1, 4],
    [3, 61],
    [4, 68],
    [7, 1],
    [0, 4096],
    [9, 4000],
  ] as const) {
    assert.equal(port.write(AT + offset, data, offset + 5, bytes), 0);
    data.copy(expected, 3 * PAGE + offset, offset + 5, offset + 5 + bytes);
    check(`write of ${bytes} at ${offset}`);
    const into = Buffer.alloc(2 * PAGE, 0xaa);
    assert.equal(port.read(AT + offset, into, 17, bytes), 0);
    const wanted = Buffer.alloc(2 * PAGE, 0xaa);
    expected.copy(wanted, 17, 3 * PAGE + offset, 3 * PAGE + offset + bytes);
    assert.ok(into.equals(wanted), `read of ${bytes} at ${offset}`);
  }
  // Over the border of two pages that are apart, at offsets of all kinds.
  for (const [before, bytes] of [
    [2, 4],
    [4, 8],
    [60, 128],
    [PAGE, 2 * PAGE],
    [700, 1000],
  ] as const) {
    assert.equal(port.write(AT + PAGE - before, data, 3, bytes), 0);
    data.copy(expected, 4 * PAGE - before, 3, 3 + before);
    data.copy(expected, 10 * PAGE, 3 + before, 3 + bytes);
    check(`write of ${bytes} around the border`);
    const into = Buffer.alloc(bytes);
    assert.equal(port.read(AT + PAGE - before, into, 0, bytes), 0);
    assert.ok(into.equals(data.subarray(3, 3 + bytes)));
  }
  assert.deepEqual(drain(), []);

  // Refused: up to the first page that is not allowed, and not a byte of what comes after.
  assert.equal(port.write(AT + 2 * PAGE - 10, data, 0, 30), DMA_FAULT.access);
  data.copy(expected, 11 * PAGE - 10, 0, 10);
  check("a write into what is for reading");
  assert.equal(port.write(AT + 2 * PAGE + 8, data, 0, 8), DMA_FAULT.access);
  const into = Buffer.alloc(8192, 0xaa);
  assert.equal(port.read(AT + 4 * PAGE, into, 0, 8), DMA_FAULT.access);
  assert.ok(into.every((byte) => byte === 0xaa));
  assert.equal(port.read(AT + 3 * PAGE - 100, into, 0, 4196), DMA_FAULT.notMapped);
  assert.ok(into.subarray(0, 100).equals(expected.subarray(6 * PAGE - 100, 6 * PAGE)));
  assert.ok(into.subarray(100).every((byte) => byte === 0xaa));
  assert.equal(port.write(AT + 5 * PAGE - 1, data, 0, 100), DMA_FAULT.notMapped);
  data.copy(expected, 7 * PAGE - 1, 0, 1);
  assert.equal(port.write(AT - 8, data, 0, 16), DMA_FAULT.notMapped);
  assert.equal(port.write(2 ** 48, data, 0, 1), DMA_FAULT.range);
  assert.equal(port.write(2 ** 64 - 1, data, 0, 1), DMA_FAULT.range);
  assert.equal(port.read(2 ** 63, into, 0, 1), DMA_FAULT.range);
  check("after all that was refused");
  assert.deepEqual(drain(), [
    [0, AT + 2 * PAGE, "write", DMA_FAULT.access],
    [0, AT + 2 * PAGE + 8, "write", DMA_FAULT.access],
    [0, AT + 4 * PAGE, "read", DMA_FAULT.access],
    [0, AT + 3 * PAGE, "read", DMA_FAULT.notMapped],
    [0, AT + 5 * PAGE, "write", DMA_FAULT.notMapped],
    [0, AT - 8, "write", DMA_FAULT.notMapped],
    [0, 2 ** 48, "write", DMA_FAULT.range],
    [0, 2 ** 64, "write", DMA_FAULT.range],
    [0, 2 ** 63, "read", DMA_FAULT.range],
  ]);
});

dma("off the end of what the IOMMU translates", () => {
  const { map, port, memory, drain } = setUp();
  assert.equal(map(2 ** 48 - PAGE, 5 * PAGE, PAGE), 0);
  assert.equal(port.write(2 ** 48 - 8, Buffer.alloc(16, 1), 0, 16), DMA_FAULT.range);
  assert.deepEqual([memory[6 * PAGE - 8], memory[6 * PAGE - 1], memory[6 * PAGE]], [1, 1, 0]);
  assert.deepEqual(drain(), [[0, 2 ** 48, "write", DMA_FAULT.range]]);
});

dma("nothing to copy is nothing; a buffer that is too small is the device's mistake", () => {
  const { port, drain } = setUp();
  assert.equal(port.read(AT, Buffer.alloc(0), 0, 0), 0);
  assert.throws(() => port.read(AT, Buffer.alloc(8), 4, 5), RangeError);
  assert.throws(() => port.write(AT, Buffer.alloc(8), -1, 5), RangeError);
  assert.throws(() => port.write(AT, Buffer.alloc(8), 0, Number.NaN), RangeError);
  assert.deepEqual(drain(), []);
});

dma("a device that is no bus master reaches nothing, which is counted and not recorded", () => {
  const { iommu, map, port, memory, reader, drain } = setUp();
  map(AT, 0, PAGE);
  iommu.setBusMaster(0, false);
  assert.equal(port.write(AT, Buffer.alloc(8, 1), 0, 8), DMA_FAULT.noBusMaster);
  assert.equal(port.write(0, Buffer.alloc(8, 1), 0, 8), DMA_FAULT.noBusMaster);
  assert.ok(memory.every((byte) => byte === 0));
  iommu.setBusMaster(1, true);
  assert.equal(port.write(AT, Buffer.alloc(8, 1), 0, 8), DMA_FAULT.noBusMaster, "another device is one");
  iommu.setBusMaster(0, true);
  assert.equal(port.write(AT, Buffer.alloc(8, 1), 0, 8), 0);
  assert.deepEqual(drain(), []);
  assert.deepEqual(reader.counts(0), { faults: 0, lost: 0, noBusMaster: 3 });
});

dma("the queue of faults is bounded per device, keeps the oldest, and counts what is lost", () => {
  const { iommu, shared, port, window, reader, drain } = setUp();
  iommu.setBusMaster(1, true);
  const other = new SoftDmaPort(shared, 1, window);
  const byte = Buffer.alloc(1);
  for (let i = 0; i < FAULT_RECORDS + 10; i++) {
    assert.equal(port.read(i * PAGE, byte, 0, 1), DMA_FAULT.notMapped);
    if (i % 20 === 0) other.write(i * PAGE, byte, 0, 1);
  }
  assert.ok(reader.pending);
  const expected = [];
  for (let i = 0; i < FAULT_RECORDS + 10; i++) {
    if (i < FAULT_RECORDS) expected.push([0, i * PAGE, "read", DMA_FAULT.notMapped]);
    if (i % 20 === 0) expected.push([1, i * PAGE, "write", DMA_FAULT.notMapped]);
  }
  assert.deepEqual(drain(), expected, "all of them, in the order in which they were");
  assert.ok(!reader.pending);
  assert.deepEqual(drain(), []);
  assert.deepEqual(reader.counts(0), { faults: FAULT_RECORDS + 10, lost: 10, noBusMaster: 0 });
  port.read(5, byte, 0, 1);
  assert.deepEqual(drain(), [[0, 5, "read", DMA_FAULT.notMapped]], "there is room again");
});

dma("an unmap is seen, however long the device rested, and however often others unmapped", () => {
  const { shared, map, unmap, port, memory } = setUp(64 * PAGE, { entries: 1000 });
  const { header } = new Shared(shared);
  const byte = Buffer.alloc(1, 7);
  // Generations near where the count wraps, and near where devices are told to drop everything.
  for (const start of [0, 2 ** 30 - 40, 2 ** 31 - 40, -40]) {
    header[HEADER.generation] = start | 0;
    // The device sees this generation, and keeps the translation.
    assert.equal(map(AT, 0, PAGE), 0);
    assert.equal(port.write(AT, byte, 0, 1), 0);
    for (const others of [0, 1, 5, 62, 63, 64, 65, 200]) {
      assert.equal(port.read(AT, byte, 0, 1), 0);
      const hits = port.tlb.hits;
      assert.equal(port.read(AT, byte, 0, 1), 0);
      assert.equal(port.tlb.hits, hits + 1, "from the IOTLB");
      assert.equal(unmap(AT, PAGE), PAGE);
      for (let i = 0; i < others; i++) {
        map(2 * AT, PAGE, PAGE);
        unmap(2 * AT, PAGE);
      }
      memory.fill(0);
      assert.equal(port.write(AT, byte, 0, 1), DMA_FAULT.notMapped, `${others} from ${start}`);
      assert.equal(memory[0], 0);
      assert.equal(map(AT, 0, PAGE), 0);
    }
    unmap(AT, PAGE);
  }
  // A whole turn of the generation while the device rested: it is told on the way.
  map(AT, 0, PAGE);
  port.read(AT, byte, 0, 1);
  const seen = header[HEADER.generation]!;
  unmap(AT, PAGE);
  header[HEADER.generation] = 2 ** 30 - 1;
  map(AT, PAGE, PAGE);
  unmap(AT, PAGE);
  header[HEADER.generation] = seen;
  assert.equal(port.read(AT, byte, 0, 1), DMA_FAULT.notMapped, "after a whole turn");
});

dma("small pieces are moved in words, and a reader never sees half of one", async () => {
  const { shared, map, memory, window } = setUp();
  map(AT, 0, PAGE);
  // Who polls the last word of an entry finds the others written. (Two stores where there should be one show themselves
  // about once in a million times: the full number finds that, the short one that words come in another order.)
  const code = `
    const { workerData, parentPort } = require("node:worker_threads");
    const words = new Int32Array(workerData);
    let seen = 0, torn = 0, early = 0;
    parentPort.postMessage("ready");
    while (seen !== -1) {
      const word = Atomics.load(words, 3);
      if (word === seen) continue;
      const halves = Atomics.load(words, 1);
      if ((halves >>> 16) !== (halves & 0xffff)) torn++;
      const first = Atomics.load(words, 0);
      if (word !== -1 && first !== -1 && first < word) early++;
      seen = word;
    }
    parentPort.postMessage({ torn, early });`;
  const worker = new Worker(code, { eval: true, workerData: memory.buffer });
  await once(worker, "message");
  const port = new SoftDmaPort(shared, 0, window);
  const entry = Buffer.alloc(17);
  for (let i = 1; i < sized(200_000, 30_000_000); i++) {
    for (const word of [0, 2, 3]) entry.writeInt32LE(i, 1 + word * 4);
    entry.writeInt32LE(Math.imul(i & 0xffff, 0x10001), 1 + 4);
    port.write(AT, entry, 1, 16);
  }
  entry.fill(0xff);
  port.write(AT, entry, 1, 16);
  const [found] = await once(worker, "message");
  assert.deepEqual(found, { torn: 0, early: 0 });
});

/** A port whose vectors the test can read: each an offset into its memory and a length. */
function inPlacePort(shared: SharedArrayBuffer, window: (at: number, bytes: number) => Buffer, lane = 0) {
  let words: Uint32Array = new Uint32Array();
  const port = new SoftDmaPort(shared, lane, window, (view) => {
    words = new Uint32Array(view.buffer, view.byteOffset, view.byteLength / 4);
    return 4096;
  });
  const take = (iovas: readonly number[], lengths: readonly number[], seen: (pieces: number[][]) => number) =>
    port.writeInPlace(Float64Array.from(iovas), Int32Array.from(lengths), iovas.length, (address, count) => {
      assert.equal(address, 4096);
      return seen(
        Array.from({ length: count }, (_, i) => {
          const [low, high, bytes, zero] = words.subarray(i * 4, i * 4 + 4);
          assert.equal(zero, 0);
          return [low! + high! * 2 ** 32 - BASE, bytes!];
        }),
      );
    });
  return { port, take };
}

dma("in place: the pieces of all segments, joined where memory goes on, and what move says", () => {
  const { shared, window, map } = setUp(3 * GiB);
  const { take } = inPlacePort(shared, window);
  // Two pages that follow each other as IOVAs and not in memory, two that do so in memory only, one over a window's end.
  map(AT, 8 * PAGE, PAGE);
  map(AT + PAGE, 4 * PAGE, PAGE);
  map(AT + 16 * PAGE, 5 * PAGE, PAGE);
  map(AT + 32 * PAGE, GiB - PAGE, 2 * PAGE);
  const pieces: number[][] = [];
  const result = take(
    [AT + 100, AT + 16 * PAGE, AT + 32 * PAGE + 8],
    [2 * PAGE - 100, 512, 2 * PAGE - 8],
    (seen) => {
      pieces.push(...seen);
      return -11;
    },
  );
  assert.equal(result, -11);
  assert.deepEqual(pieces, [
    [8 * PAGE + 100, PAGE - 100],
    [4 * PAGE, PAGE + 512],
    [GiB - PAGE + 8, 2 * PAGE - 8],
  ]);
});

dma("in place: what is refused in part is not begun, not recorded, and can be asked for again", () => {
  const { shared, window, map, iommu, drain, port: plain } = setUp(3000 * PAGE);
  const { port, take } = inPlacePort(shared, window);
  const never = () => assert.fail("it was begun");
  map(AT, 0, PAGE);
  map(AT + PAGE, PAGE, PAGE, R);
  assert.equal(take([AT], [PAGE + 4], never), REFUSED, "a page that is for reading only");
  assert.equal(take([AT, AT + 9 * PAGE], [4, 4], never), REFUSED, "not mapped");
  assert.equal(take([2 ** 52], [4], never), REFUSED, "beyond all");
  iommu.setBusMaster(0, false);
  assert.equal(take([AT], [4], never), REFUSED, "no bus mastering");
  iommu.setBusMaster(0, true);
  assert.deepEqual(drain(), []);
  const one = (pieces: number[][]) => pieces.length;
  assert.equal(plain.writeInPlace(Float64Array.of(AT), Int32Array.of(4), 1, never), REFUSED, "no addresses");
  // Every second page: as many pieces as pages.
  for (let page = 0; page < 1025; page++) map(2 * GiB + page * PAGE, (100 + 2 * page) * PAGE, PAGE);
  assert.equal(take([2 * GiB], [1024 * PAGE], one), 1024);
  assert.equal(take([2 * GiB], [1025 * PAGE], never), REFUSED, "more than a system call takes");
  assert.equal(take([AT], [PAGE], one), 1);
  assert.throws(() => take([AT], [PAGE], () => assert.fail("of its own")), /of its own/);
  assert.equal(port.write(AT, pattern(4), 0, 4), 0, "the access has ended all the same");
});

dma.run();

// ---- how an unmap waits ---------------------------------------------------------------------------------------------

const waiting = suite("iommu-emul: waiting");

/** A thread that unmaps AT, or turns off device 0; posts what came of it. */
function unmapper(shared: SharedArrayBuffer, what: "unmap" | "off"): Worker {
  const url = new URL("../../iommu-emul/iommu.js", import.meta.url);
  const code = `
    const { workerData, parentPort } = require("node:worker_threads");
    import(${JSON.stringify(url.href)}).then(({ SoftIommu }) => {
      const iommu = new SoftIommu(workerData);
      parentPort.postMessage(${what === "unmap" ? `iommu.unmap(${AT}, ${PAGE})` : "iommu.setBusMaster(0, false)"});
    });`;
  return new Worker(code, { eval: true, workerData: shared });
}

/** Resolves when somebody sleeps until the lane's access ends. */
async function somebodyWaits(shared: Shared, lane: number): Promise<void> {
  const at = lane * (shared.lanes.length / 32) + LANE.waiters;
  while (Atomics.load(shared.lanes, at) === 0) await new Promise((resolve) => setTimeout(resolve, 2));
}

for (const what of ["unmap", "off"] as const) {
  waiting(`${what} returns when the access under way has ended, or its device`, async () => {
    for (const end of ["leave", "dead"] as const) {
      const { iommu, shared, map } = setUp();
      map(AT, 0, PAGE);
      const views = new Shared(shared);
      const lane = new OwnLane(views, 0);
      lane.enter();
      const worker = unmapper(shared, what);
      let returned = false;
      const result = once(worker, "message").then(([value]) => {
        returned = true;
        return value;
      });
      const exited = once(worker, "exit");
      await somebodyWaits(views, 0);
      await new Promise((resolve) => setTimeout(resolve, 20));
      assert.ok(!returned, "it waits");
      assert.throws(() => new OwnLane(views, 0), /lane 0 has an access under way/);
      if (end === "leave") lane.leave();
      else iommu.markDead(0);
      assert.equal(await result, what === "unmap" ? PAGE : undefined);
      await exited;
      if (what === "unmap") assert.equal(iommu.translate(iova(AT), R), -1);
      // The next device on a lane goes on where the one before ended.
      new OwnLane(views, 0).enter();
      assert.equal(Atomics.load(views.lanes, LANE.section) & 1, 1);
    }
  });
}

waiting("an unmap waits for what is moved in place", async () => {
  const { shared, map, window } = setUp();
  map(AT, 0, PAGE);
  const views = new Shared(shared);
  const { take } = inPlacePort(shared, window);
  const worker = unmapper(shared, "unmap");
  const unmapped = once(worker, "message");
  const exited = once(worker, "exit");
  // The unmap's thread takes longer to begin than this one.
  let begun = false;
  for (let tries = 0; tries < 10 && !begun; tries++) {
    const result = take([AT], [PAGE], () => {
      const until = Date.now() + 2000;
      while (Atomics.load(views.lanes, LANE.waiters) === 0 && Date.now() < until);
      begun = Atomics.load(views.lanes, LANE.waiters) !== 0;
      return 0;
    });
    assert.equal(result, 0, "it was not unmapped under the move");
  }
  assert.ok(begun, "the unmap came");
  assert.equal((await unmapped)[0], PAGE);
  assert.equal(
    take([AT], [4], () => assert.fail("it was begun")),
    REFUSED,
  );
  await exited;
});

waiting(
  "nobody waits for a device that is no bus master, wherever its thread was stopped, until it is one again",
  async () => {
    const { iommu, shared, map } = setUp();
    map(AT, 0, PAGE);
    iommu.setBusMaster(0, false);
    const views = new Shared(shared);
    const lane = new OwnLane(views, 0);
    lane.enter();
    const unmapping = async (): Promise<unknown> => {
      const worker = unmapper(shared, "unmap");
      const waited = somebodyWaits(views, 0).then(() => "waits");
      const result = await Promise.race([once(worker, "message").then(([value]) => value), waited]);
      if (result === "waits") {
        const exited = once(worker, "exit");
        lane.leave();
        await exited;
      } else Atomics.store(views.lanes, LANE.waiters, 1);
      await waited;
      Atomics.store(views.lanes, LANE.waiters, 0);
      return result;
    };
    assert.equal(await unmapping(), PAGE);
    iommu.setBusMaster(0, true);
    map(AT, 0, PAGE);
    assert.equal(await unmapping(), "waits");
  },
);

waiting("an access of another device, or a later one, holds nobody up", () => {
  const { shared, map, unmap } = setUp(64 * PAGE, { lanes: 1 });
  const views = new Shared(shared);
  const lane = new OwnLane(views, 1);
  lane.enter();
  map(AT, 0, PAGE);
  assert.equal(unmap(AT, PAGE), PAGE, "a lane that is no device's");
});

waiting.run();
