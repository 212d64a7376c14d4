// The I/O commands of the NVMe controller against its file: every shape of PRPs and SGLs, every status, what is stored
// when, and what a reset leaves of commands under way. The guest is a driver in this process, over the software IOMMU.

import assert from "node:assert/strict";
import fs from "node:fs";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import type { FileNatives } from "../../iommu-emul/device.js";
import { type Fields, type GuestQueue, NATIVES, NvmeGuest, PAGE } from "./support/nvme-guest.js";
import { Random } from "./support/random.js";

const READ = 2;
const WRITE = 1;
const FLUSH = 0;
const COMPARE = 5;
const WRITE_ZEROES = 8;
const DSM = 9;
const VERIFY = 12;
const SGL = 0x40;
const DATA = 0x00;
const SEGMENT = 0x20;
const LAST_SEGMENT = 0x30;

/** A pattern that tells where in the data a byte belongs. */
function pattern(bytes: number, seed: number): Buffer {
  const random = new Random(seed);
  const data = Buffer.alloc(bytes);
  for (let i = 0; i + 4 <= bytes; i += 4) data.writeUInt32LE(random.next(), i);
  return data;
}

/** A command on `blocks` blocks from `first` on. */
const on = (opcode: number, first: number, blocks: number, more: Omit<Fields, "opcode"> = {}): Fields => ({
  opcode,
  nsid: 1,
  cdw10: first % 2 ** 32,
  cdw11: Math.floor(first / 2 ** 32),
  ...more,
  cdw12: (((more.cdw12 ?? 0) | (blocks - 1)) >>> 0) as number,
});

interface Bench {
  readonly guest: NvmeGuest;
  readonly io: GuestQueue;
}

/** A test with a guest that has an I/O queue; checks afterwards that nothing else was written. */
const withGuest =
  (test: (bench: Bench) => Promise<void>, options: ConstructorParameters<typeof NvmeGuest>[0] = {}) =>
  async () => {
    const guest = new NvmeGuest(options);
    const io = await guest.ready();
    await test({ guest, io });
    guest.checkCanaries();
    await guest.close();
  };

const shapes = suite("nvme: data pointers");

shapes(
  "PRPs: one page, two, lists, offsets, lists that end a page and go on in the next",
  withGuest(async ({ guest, io }) => {
    const disk = fs.openSync(guest.path, "r+");
    // Length in bytes, offset of the first PRP, offset of the list in its page.
    for (const [bytes, offset, listOffset] of [
      [512, 0, 0],
      [4096, 0, 0],
      [512, 3584, 0],
      [1024, 3584, 0],
      [4096, 4, 0],
      [4096, 4092, 0],
      [8192, 0, 0],
      [8192, 2048, 0],
      [12288, 0, 0],
      [65536, 512, 8],
      [131072, 0, 4096 - 8 * 31],
      [131072, 0, 4096 - 8 * 30],
      [131072, 0, 4096 - 8],
      [524288, 0, 0],
      [524288, 4, 4096 - 8 * 64],
      [524288, 2048, 4096 - 8],
    ] as const) {
      const pages = Math.ceil((offset + bytes) / PAGE);
      // Each page on its own, in descending order, so that none follows the one before.
      const at = Array.from({ length: pages }, () => guest.map(1)).reverse();
      let prp2 = 0;
      if (pages === 2) prp2 = at[1]!;
      if (pages > 2) {
        let list = guest.map(1) + listOffset;
        prp2 = list;
        let room = (PAGE - listOffset) / 8;
        for (let page = 1; page < pages; ) {
          if (room === 1 && page < pages - 1) {
            const next = guest.map(1);
            guest.poke64(list, next);
            list = next;
            room = 512;
          }
          guest.poke64(list, at[page]!);
          page++;
          list += 8;
          room--;
        }
      }
      const spread = (data: Buffer): void => {
        for (let done = 0, page = 0; done < bytes; page++) {
          const from = page === 0 ? offset : 0;
          const piece = Math.min(PAGE - from, bytes - done);
          guest.poke(at[page]! + from, data.subarray(done, done + piece));
          done += piece;
        }
      };
      const gather = (): Buffer => {
        const all = Buffer.concat(at.map((page) => guest.peek(page, PAGE)));
        return all.subarray(offset, offset + bytes);
      };
      const blocks = bytes / 512;
      const data = pattern(bytes, bytes + offset);
      const what = `${bytes} bytes, offset ${offset}, list at ${listOffset}`;
      spread(data);
      const write = await io.do(on(WRITE, 1000, blocks, { prp1: at[0]! + offset, prp2 }));
      assert.equal(write.status, 0, what);
      const stored = Buffer.alloc(bytes);
      fs.readSync(disk, stored, 0, bytes, 512_000);
      assert.ok(stored.equals(data), `${what}: what is in the file`);
      spread(Buffer.alloc(bytes, 0xee));
      const around = at.map((page) => guest.peek(page, PAGE));
      const read = await io.do(on(READ, 1000, blocks, { prp1: at[0]! + offset, prp2 }));
      assert.equal(read.status, 0, what);
      assert.ok(gather().equals(data), `${what}: what was read`);
      const first = guest.peek(at[0]!, offset);
      assert.ok(first.equals(around[0]!.subarray(0, offset)), `${what}: before the data`);
      const end = (offset + bytes) % PAGE;
      if (end > 0) {
        const last = guest.peek(at[pages - 1]!, PAGE).subarray(end);
        assert.ok(last.equals(around[pages - 1]!.subarray(end)), `${what}: behind the data`);
      }
    }
    fs.closeSync(disk);
  }),
);

/** Natives that note what was read in place: pieces, and bytes or -errno, which `bytesOf` may change. */
function inPlaceNatives(log: number[][], bytesOf: (bytes: number) => number): FileNatives {
  return {
    ...NATIVES,
    readCachedInto: (fd, vectors, count, offset) => {
      const result = bytesOf(NATIVES.readCachedInto!(fd, vectors, count, offset));
      log.push([count, result]);
      return result;
    },
  };
}

shapes("reads go from the page cache to the guest in place, else through the command's buffer", async () => {
  const calls: number[][] = [];
  let bytesOf = (bytes: number) => bytes;
  const guest = new NvmeGuest({ natives: inPlaceNatives(calls, (bytes) => bytesOf(bytes)) });
  const io = await guest.ready();
  const data = pattern(5 * PAGE, 7);
  const disk = fs.openSync(guest.path, "r+");
  fs.writeSync(disk, data, 0, data.length, 512);
  fs.readSync(disk, Buffer.alloc(2 ** 20), 0, 2 ** 20, 0);
  const at = guest.map(5);
  const list = guest.map(1);
  guest.poke64(list, at + PAGE, at + 2 * PAGE, at + 3 * PAGE, at + 4 * PAGE);
  const read = async (blocks: number) => {
    guest.poke(at, Buffer.alloc(5 * PAGE, 0xee));
    calls.length = 0;
    return (await io.do(on(READ, 1, blocks, { prp1: at, prp2: list }))).status;
  };
  assert.equal(await read(40), 0);
  assert.deepEqual(calls, [[5, 5 * PAGE]]);
  assert.ok(guest.peek(at, 5 * PAGE).equals(data));
  assert.equal(await read(37), 0);
  assert.deepEqual(calls, [[5, 37 * 512]]);
  const expected = Buffer.concat([data.subarray(0, 37 * 512), Buffer.alloc(3 * 512, 0xee)]);
  assert.ok(guest.peek(at, 5 * PAGE).equals(expected), "and nothing behind it");
  // The last page is gone: what lies before it may be written, and the guest hears of it.
  guest.unmap(at + 4 * PAGE, 1);
  assert.equal(await read(40), 4);
  assert.deepEqual(calls, []);
  guest.remap(at + 4 * PAGE);
  // Part of it is cached, or none; then a file system that cannot tell, which is asked no more.
  for (const [result, asked] of [
    [PAGE, 1],
    [-11, 1],
    [-95, 1],
    [5 * PAGE, 0],
  ] as const) {
    bytesOf = () => result;
    assert.equal(await read(40), 0);
    assert.equal(calls.length, asked, `the call said ${result}`);
    assert.ok(guest.peek(at, 5 * PAGE).equals(data), `the call said ${result}`);
  }
  fs.closeSync(disk);
  guest.checkCanaries();
  await guest.close();
});

shapes(
  "PRPs that cannot be: PRP Offset Invalid; and what the IOMMU refuses: Data Transfer Error, may be tried again",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(4);
    const list = guest.map(1);
    const status = async (blocks: number, prp1: number, prp2: number, opcode = READ) =>
      (await io.do(on(opcode, 0, blocks, { prp1, prp2 }))).status;
    for (const offset of [1, 2, 3]) assert.equal(await status(1, data + offset, 0), 0x13);
    assert.equal(await status(16, data, data + PAGE + 8), 0x13, "second page of two with an offset");
    assert.equal(await status(24, data, list + 4), 0x13, "list not on 8 bytes");
    guest.poke64(list, data + PAGE, data + 2 * PAGE + 512);
    assert.equal(await status(24, data, list), 0x13, "page in a list with an offset");
    guest.poke64(list + PAGE - 8, data + 16);
    assert.equal(await status(24, data, list + PAGE - 8), 0x13, "pointer to the next list with an offset");
    // Not mapped, not there at all, beyond what is translated, and larger than a double holds.
    for (const bad of [data + 5 * PAGE, 0x1000, 2 ** 48, 2 ** 52, 2 ** 64 - 4096]) {
      assert.equal(await status(1, bad, 0), 4);
      assert.equal(await status(1, bad, 0, WRITE), 4);
      assert.equal(await status(24, data, bad), 4, "the list");
      guest.poke64(list, data + PAGE, bad);
      assert.equal(await status(24, data, list), 4, "in the list");
    }
    const refused = await io.do(on(READ, 0, 1, { prp1: 0x1000 }));
    assert.equal(refused.doNotRetry, false);
    assert.equal((await io.do(on(READ, 0, 1, { prp1: data + 1 }))).doNotRetry, true);
    // A page that may only be read takes no data, and one that may only be written gives none.
    const readOnly = guest.map(1, MAP_FLAG.read);
    const writeOnly = guest.map(1, MAP_FLAG.write);
    const before = guest.peek(readOnly, PAGE);
    assert.equal(await status(1, readOnly, 0, READ), 4);
    assert.ok(guest.peek(readOnly, PAGE).equals(before));
    assert.equal(await status(1, readOnly, 0, WRITE), 0);
    assert.equal(await status(1, writeOnly, 0, READ), 0);
    assert.equal(await status(1, writeOnly, 0, WRITE), 4);
    // A list that is its own continuation ends all the same.
    guest.poke64(list + PAGE - 8, list);
    for (let i = 0; i < 511; i++) guest.poke64(list + i * 8, data);
    assert.equal(await status(1024, data, list + PAGE - 8), 0);
  }),
);

shapes(
  "a write whose data cannot be read leaves the file as it was",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(2);
    guest.poke(data, pattern(2 * PAGE, 1));
    assert.equal((await io.do(on(WRITE, 0, 16, { prp1: data, prp2: data + PAGE }))).status, 0);
    const before = fs.readFileSync(guest.path);
    guest.poke(data, pattern(2 * PAGE, 2));
    guest.unmap(data + PAGE, 1);
    assert.equal((await io.do(on(WRITE, 0, 16, { prp1: data, prp2: data + PAGE }))).status, 4);
    assert.ok(fs.readFileSync(guest.path).equals(before));
  }),
);

shapes(
  "SGLs: one block, segments, chains, pieces of any size",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(64);
    const list = guest.map(4);
    const random = new Random(3);
    const total = 64 * 512;
    const check = async (
      sgl: readonly [number, number, number],
      pieces: [number, number][],
      what: string,
    ) => {
      const written = pattern(total, pieces.length);
      let done = 0;
      for (const [at, bytes] of pieces) {
        guest.poke(at, written.subarray(done, done + bytes));
        done += bytes;
      }
      assert.equal(done, total);
      for (const flags of [0x40, 0x80]) {
        assert.equal((await io.do(on(WRITE, 64, 64, { flags, sgl }))).status, 0, what);
        for (const [at, bytes] of pieces) guest.poke(at, Buffer.alloc(bytes));
        assert.equal((await io.do(on(READ, 64, 64, { flags, sgl }))).status, 0, what);
        const read = Buffer.concat(pieces.map(([at, bytes]) => guest.peek(at, bytes)));
        assert.ok(read.equals(written), what);
      }
    };
    await check([data + 3, total, DATA], [[data + 3, total]], "one block at an odd address");
    for (const count of [1, 2, 7, 300]) {
      const pieces: [number, number][] = [];
      let left = total;
      let at = data;
      for (let i = 0; i < count; i++) {
        const bytes = i === count - 1 ? left : 1 + random.below(Math.floor((left - 100) / (count - i)));
        pieces.push([at, bytes]);
        left -= bytes;
        at += bytes + random.below(4);
      }
      // All in one last segment.
      guest.pokeSgl(list, ...pieces.map(([address, bytes]) => [address, bytes, DATA] as const));
      await check([list, count * 16, LAST_SEGMENT], pieces, `${count} pieces in one segment`);
      if (count < 7) continue;
      // The first three, an empty one and a pointer; then the rest.
      guest.pokeSgl(
        list + 2 * PAGE,
        ...pieces.slice(0, 3).map(([address, bytes]) => [address, bytes, DATA] as const),
        [0, 0, DATA],
        [list + 3 * 16, (count - 3) * 16, LAST_SEGMENT],
      );
      await check([list + 2 * PAGE, 5 * 16, SEGMENT], pieces, `${count} pieces in two segments`);
    }
  }),
);

shapes(
  "SGLs that cannot be, each with its status",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(2);
    const list = guest.map(2);
    const status = async (...sgl: [number, number, number]) =>
      (await io.do(on(READ, 0, 2, { flags: SGL, sgl }))).status;
    assert.equal(await status(data, 1024, DATA), 0);
    assert.equal(await status(data, 1023, DATA), 0x0f, "too short");
    assert.equal(await status(data, 1025, DATA), 0x0f, "too long");
    assert.equal(await status(data, 0, DATA), 0x0f, "nothing");
    for (const type of [0x01, 0x0a, 0x10, 0x21, 0x3f, 0x40, 0x50, 0xf0]) {
      assert.equal(await status(data, 1024, type), 0x11, `type ${type.toString(16)}`);
      guest.pokeSgl(list, [data, 1024, type]);
      assert.equal(await status(list, 16, LAST_SEGMENT), 0x11, `type ${type.toString(16)} in a segment`);
    }
    guest.pokeSgl(list, [data, 512, DATA], [data, 512, DATA], [data, 512, DATA]);
    assert.equal(await status(list, 32, LAST_SEGMENT), 0);
    assert.equal(await status(list, 16, LAST_SEGMENT), 0x0f, "segments too short");
    assert.equal(await status(list, 48, LAST_SEGMENT), 0x0f, "segments too long");
    assert.equal(await status(list, 0, LAST_SEGMENT), 0x0d, "empty segment");
    assert.equal(await status(list, 24, LAST_SEGMENT), 0x0d, "a segment and a half");
    assert.equal(await status(list, 32, SEGMENT), 0x0d, "no pointer at the end");
    guest.pokeSgl(list, [data, 512, DATA], [list + PAGE, 16, LAST_SEGMENT], [data, 512, DATA]);
    guest.pokeSgl(list + PAGE, [data, 512, DATA]);
    assert.equal(await status(list, 32, SEGMENT), 0);
    assert.equal(await status(list, 48, SEGMENT), 0x0e, "pointer before the end");
    assert.equal(await status(list, 32, LAST_SEGMENT), 0x0e, "pointer in the last segment");
    guest.pokeSgl(list, [list, 16, SEGMENT]);
    assert.equal(await status(list, 16, SEGMENT), 0x0e, "a segment that points to itself");
    const many = guest.map(5);
    for (let i = 0; i < 1025; i++) guest.pokeSgl(many + i * 16, [data, i < 1024 ? 1 : 0, DATA]);
    assert.equal(await status(many, 1024 * 16, LAST_SEGMENT), 0, "1024 descriptors");
    assert.equal(await status(many, 1025 * 16, LAST_SEGMENT), 0x0e, "1025 descriptors");
    assert.equal(await status(data + 3 * PAGE, 1024, DATA), 4, "data not mapped");
    assert.equal(await status(data + 3 * PAGE, 16, LAST_SEGMENT), 4, "segment not mapped");
    assert.equal(await status(2 ** 64 - 4096, 2 ** 32 - 16, LAST_SEGMENT), 4, "segment nowhere");
    assert.equal((await io.do(on(READ, 0, 2, { flags: 0xc0, prp1: data }))).status, 2, "reserved kind");
  }),
);

shapes.run();

const commands = suite("nvme: I/O commands");

commands(
  "what is refused: opcode, namespace, fused, directive, size, range",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(1);
    const blocks = (16 * 2 ** 20) / 512;
    const expect = async (fields: Fields, status: number, what: string) => {
      const completion = await io.do({ prp1: data, ...fields });
      assert.equal(completion.status, status, what);
      assert.equal(completion.doNotRetry, status !== 0, what);
    };
    for (const opcode of [3, 4, 6, 7, 0x0d, 0x0e, 0x11, 0x15, 0x79, 0x80, 0xff]) {
      await expect(on(opcode, 0, 1), 1, `opcode ${opcode}`);
    }
    for (const opcode of [READ, WRITE, COMPARE, WRITE_ZEROES, VERIFY, DSM, FLUSH]) {
      for (const nsid of [0, 2, 0xffff_fffe]) await expect({ ...on(opcode, 0, 1), nsid }, 0x0b, "namespace");
      const all = { ...on(opcode, 0, 1), nsid: 0xffff_ffff };
      await expect(all, opcode === FLUSH ? 0 : 0x0b, "all namespaces");
      await expect({ ...on(opcode, 0, 1), flags: 1 }, 2, "fused, first");
      await expect({ ...on(opcode, 0, 1), flags: 2 }, 2, "fused, second");
    }
    for (const opcode of [READ, WRITE, COMPARE, WRITE_ZEROES, VERIFY]) {
      for (const [first, count, status] of [
        [blocks - 1, 2, 0x80],
        [blocks, 1, 0x80],
        [2 ** 32, 1, 0x80],
        [2 ** 53, 1, 0x80],
        [2 ** 64 - 2048, 8, 0x80],
        [0, 65536, 0x80],
      ] as const) {
        await expect(on(opcode, first, count), status, `${count} blocks at ${first}`);
      }
      if (opcode !== WRITE_ZEROES && opcode !== VERIFY)
        await expect(on(opcode, 0, 1025), 2, "larger than MDTS");
    }
    await expect(on(READ, blocks - 1, 1), 0, "the last block");
    await expect(on(WRITE, 0, 1, { cdw12: 1 << 20 }), 2, "a directive");
    assert.equal(fs.statSync(guest.path).size, blocks * 512);
  }),
);

commands(
  "write zeroes, with and without deallocation; compare; verify",
  withGuest(async ({ guest, io }) => {
    const pages = 16;
    const data = guest.map(pages);
    const list = guest.map(1);
    for (let i = 1; i < pages; i++) guest.poke64(list + (i - 1) * 8, data + i * PAGE);
    const all = { prp1: data, prp2: list };
    const ones = Buffer.alloc(pages * PAGE, 1);
    for (const deallocate of [0, 2 ** 25]) {
      guest.poke(data, ones);
      assert.equal((await io.do(on(WRITE, 0, 128, all))).status, 0);
      assert.equal((await io.do(on(WRITE_ZEROES, 3, 100, { cdw12: deallocate }))).status, 0);
      const file = fs.readFileSync(guest.path).subarray(0, pages * PAGE);
      const expected = Buffer.from(ones).fill(0, 3 * 512, 103 * 512);
      assert.ok(file.equals(expected));
      assert.equal((await io.do(on(COMPARE, 0, 128, all))).status, 0x285);
      guest.poke(data, expected);
      assert.equal((await io.do(on(COMPARE, 0, 128, all))).status, 0);
      guest.poke(data + 64 * 512 - 1, Buffer.from([1]));
      assert.equal((await io.do(on(COMPARE, 0, 128, all))).status, 0x285);
      assert.equal((await io.do(on(COMPARE, 0, 63, all))).status, 0);
      assert.equal((await io.do(on(COMPARE, 0, 1, { prp1: 0x1000 }))).status, 4);
    }
    // More than goes through a buffer at a time.
    fs.writeFileSync(guest.path, Buffer.alloc(16 * 2 ** 20, 7));
    assert.equal((await io.do(on(WRITE_ZEROES, 1, 32766))).status, 0);
    const expected = Buffer.alloc(16 * 2 ** 20)
      .fill(7, 0, 512)
      .fill(7, 32767 * 512);
    assert.ok(fs.readFileSync(guest.path).equals(expected));
    assert.equal((await io.do(on(VERIFY, 0, 32768))).status, 0);
  }),
);

commands(
  "dataset management gives space back, and checks every range before it touches one",
  withGuest(async ({ guest, io }) => {
    const list = guest.map(1);
    const bytes = 16 * 2 ** 20;
    const range = (i: number, blocks: number, first: number) => {
      const entry = Buffer.alloc(16);
      entry.writeUInt32LE(blocks, 4);
      guest.poke(list + i * 16, entry);
      guest.poke64(list + i * 16 + 8, first);
    };
    const full = Buffer.alloc(bytes, 9);
    fs.writeFileSync(guest.path, full);
    const deallocate = (ranges: number, attributes = 4) =>
      io.do({ opcode: DSM, nsid: 1, prp1: list, cdw10: ranges - 1, cdw11: attributes });
    range(0, 8, 0);
    range(1, 2048, 4096);
    range(2, 0, 100);
    range(3, 1, 32768);
    assert.equal((await deallocate(4)).status, 0x80);
    assert.ok(fs.readFileSync(guest.path).equals(full), "one is out of range: none is done");
    assert.equal((await deallocate(3, 3)).status, 0);
    assert.ok(fs.readFileSync(guest.path).equals(full), "hints only");
    const before = fs.statSync(guest.path).blocks;
    assert.equal((await deallocate(3)).status, 0);
    const expected = Buffer.from(full)
      .fill(0, 0, 4096)
      .fill(0, 4096 * 512, 6144 * 512);
    assert.ok(fs.readFileSync(guest.path).equals(expected));
    assert.ok(fs.statSync(guest.path).blocks < before - 2000, "the file has holes");
    assert.equal(fs.statSync(guest.path).size, bytes);
    for (let i = 0; i < 256; i++) range(i, 1, i * 16);
    assert.equal((await deallocate(256)).status, 0);
    range(0, 0xffff_ffff, 0);
    assert.equal((await deallocate(1)).status, 0x80);
    range(0, 1, 2 ** 64 - 2048);
    assert.equal((await deallocate(1)).status, 0x80);
    assert.equal((await io.do({ opcode: DSM, nsid: 1, prp1: 0x1000, cdw11: 4 })).status, 4);
  }),
);

commands(
  "without natives: the same answers; deallocating is a hint that is not taken",
  withGuest(
    async ({ guest, io }) => {
      const data = guest.map(1);
      guest.poke(data, pattern(PAGE, 5));
      assert.equal((await io.do(on(WRITE, 8, 8, { prp1: data }))).status, 0);
      guest.poke(data, Buffer.alloc(PAGE));
      assert.equal((await io.do(on(READ, 8, 8, { prp1: data }))).status, 0);
      assert.ok(guest.peek(data, PAGE).equals(pattern(PAGE, 5)));
      assert.equal((await io.do(on(WRITE_ZEROES, 8, 1, { cdw12: 2 ** 25 }))).status, 0);
      const file = fs.readFileSync(guest.path).subarray(4096, 8192);
      assert.ok(file.equals(Buffer.from(pattern(PAGE, 5)).fill(0, 0, 512)));
      const range = Buffer.alloc(16);
      range.writeUInt32LE(8, 4);
      guest.poke(data, range);
      guest.poke64(data + 8, 8);
      assert.equal((await io.do({ opcode: DSM, nsid: 1, prp1: data, cdw11: 4 })).status, 0);
      assert.ok(fs.readFileSync(guest.path).subarray(4096, 8192).equals(file));
      assert.equal((await io.do({ opcode: FLUSH, nsid: 1 })).status, 0);
    },
    { natives: {} },
  ),
);

commands(
  "read-only: the guest reads, and every write is refused as write-protected",
  withGuest(async ({ guest, io }) => {
    const data = guest.map(1);
    guest.poke(data, pattern(PAGE, 1));
    assert.equal((await io.do(on(WRITE, 0, 8, { prp1: data }))).status, 0);
    const other = new NvmeGuest({ file: guest.path, readonly: true, natives: { ...NATIVES, lock: () => 0 } });
    const queue = await other.ready();
    const page = other.map(1);
    assert.equal((await queue.do(on(READ, 0, 8, { prp1: page }))).status, 0);
    assert.ok(other.peek(page, PAGE).equals(pattern(PAGE, 1)));
    assert.equal((await queue.do(on(WRITE, 0, 8, { prp1: page }))).status, 0x20);
    assert.equal((await queue.do(on(WRITE_ZEROES, 0, 8))).status, 0x20);
    other.poke(page, Buffer.alloc(16));
    assert.equal((await queue.do({ opcode: DSM, nsid: 1, prp1: page, cdw11: 4 })).status, 0x20);
    assert.equal((await queue.do({ opcode: FLUSH, nsid: 1 })).status, 0);
    await other.close();
  }),
);

commands(
  "blocks of 4096 bytes",
  withGuest(
    async ({ guest, io }) => {
      const data = guest.map(3);
      guest.poke(data, pattern(2 * PAGE, 4));
      assert.equal((await io.do(on(WRITE, 2, 2, { prp1: data, prp2: data + PAGE }))).status, 0);
      const file = fs.readFileSync(guest.path);
      assert.ok(file.subarray(2 * PAGE, 4 * PAGE).equals(pattern(2 * PAGE, 4)));
      assert.equal((await io.do(on(READ, 4096, 1, { prp1: data }))).status, 0x80);
      assert.equal((await io.do(on(READ, 4095, 1, { prp1: data }))).status, 0);
      assert.equal((await io.do(on(READ, 0, 129, { prp1: data }))).status, 2);
    },
    { blockBytes: 4096 },
  ),
);

commands(
  "a file that fails: read error, write fault, capacity exceeded; counted, and tried again",
  async () => {
    let errno = 0;
    const natives: FileNatives = {
      ...NATIVES,
      write: (fd, address, bytes, offset) =>
        errno > 0 ? -errno : NATIVES.write!(fd, address, bytes, offset),
    };
    const guest = new NvmeGuest({ natives });
    const io = await guest.ready();
    const data = guest.map(1);
    const media = async () => {
      const log = guest.map(1);
      await guest.admin.do({ opcode: 2, nsid: 0xffff_ffff, prp1: log, cdw10: (127 << 16) | 2 });
      return guest.peek(log, 512).readUInt32LE(160);
    };
    for (const [code, status, counted] of [
      [5, 0x280, 1],
      [28, 0x81, 1],
      [122, 0x81, 1],
      [30, 0x280, 2],
    ] as const) {
      errno = code;
      const completion = await io.do(on(WRITE, 0, 8, { prp1: data }));
      assert.equal(completion.status, status);
      assert.equal(completion.doNotRetry, false);
      assert.equal(await media(), counted);
    }
    errno = 0;
    assert.equal((await io.do(on(WRITE, 0, 8, { prp1: data }))).status, 0);
    // Somebody cuts the file: what is left is read, the rest is not.
    fs.truncateSync(guest.path, 2 ** 20);
    assert.equal((await io.do(on(READ, 2040, 8, { prp1: data }))).status, 0);
    assert.equal((await io.do(on(READ, 2041, 8, { prp1: data }))).status, 0x281);
    assert.equal((await io.do(on(COMPARE, 4000, 8, { prp1: data }))).status, 0x281);
    assert.equal((await io.do(on(VERIFY, 2000, 100))).status, 0x281);
    assert.equal(await media(), 5);
    await guest.close();
  },
);

commands.run();
