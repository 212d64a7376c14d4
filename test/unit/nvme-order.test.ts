// What an NVMe completion promises: with FUA and after a flush data is stored, a flush covers what was completed before
// it, slow file operations hold nothing else up, and those of before a reset touch neither the guest nor what it writes
// afterwards. fdatasync is the real one, counted, and made to wait or fail where a test says so.

import assert from "node:assert/strict";
import fs from "node:fs";
import { suite } from "uvu";
import type { FileNatives } from "../../iommu-emul/device.js";

type Callback = (error: NodeJS.ErrnoException | null) => void;
const real = fs.fdatasync;
/** fdatasync calls that began, and how the next ones go. */
let syncs = 0;
let syncError: NodeJS.ErrnoException | null = null;
let waiting: (() => void)[] | undefined;
fs.fdatasync = ((fd: number, callback: Callback) => {
  syncs++;
  const go = () => real(fd, (error) => callback(syncError ?? error));
  if (waiting === undefined) go();
  else waiting.push(go);
}) as typeof fs.fdatasync;
const letSyncsGo = () => {
  const held = waiting ?? [];
  waiting = undefined;
  for (const go of held) go();
};

// After fdatasync was replaced: the file takes its functions when it is loaded.
const { ALWAYS_CACHED, NvmeGuest, NATIVES, PAGE, CC_ENABLE } = await import("./support/nvme-guest.js");

const READ = { opcode: 2, nsid: 1 } as const;
const WRITE = { opcode: 1, nsid: 1 } as const;
const FLUSH = { opcode: 0, nsid: 1 } as const;
const FUA = 2 ** 30;
/** Nothing is ever cached: every read goes through Node's pool. */
const COLD: FileNatives = { ...NATIVES, readCached: () => -11, readCachedInto: () => -11 };

const order = suite("nvme: what is stored when");

order(
  "a write is not stored by itself; FUA stores before it completes; a flush stores once for all",
  async () => {
    const guest = new NvmeGuest();
    const io = await guest.ready();
    const prp1 = guest.map(1);
    await io.do(FLUSH);
    syncs = 0;
    await io.do({ ...WRITE, prp1, cdw12: 7 });
    assert.equal(syncs, 0);
    waiting = [];
    const fua = io.put({ ...WRITE, prp1, cdw12: FUA + 7 });
    io.ring();
    guest.runNow();
    assert.equal(syncs, 1);
    assert.equal(io.peek(), undefined, "not completed while it is being stored");
    letSyncsGo();
    await guest.run();
    assert.deepEqual(
      io.take().map(({ id, status }) => [id, status]),
      [[fua, 0]],
    );
    // Nothing was written since: nothing to store.
    await io.do(FLUSH);
    await io.do({ ...READ, prp1, cdw12: FUA + 7 });
    assert.equal(syncs, 1);
    // Many that wait at once share two: the one under way may have begun too early for them.
    waiting = [];
    for (let i = 0; i < 20; i++) io.put({ ...WRITE, prp1, cdw10: i * 8, cdw12: FUA + 7 });
    for (let i = 0; i < 10; i++) io.put(FLUSH);
    io.ring();
    guest.runNow();
    letSyncsGo();
    await guest.run();
    const all = io.take();
    assert.equal(all.length, 30);
    assert.ok(all.every(({ status }) => status === 0));
    assert.ok(syncs <= 1 + 3, `${syncs - 1} syncs for 20 writes and 10 flushes`);
    await guest.close();
  },
);

order("a flush does not complete by a sync that began before the writes it covers", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  const prp1 = guest.map(1);
  await io.do({ ...WRITE, prp1, cdw12: 7 });
  syncs = 0;
  waiting = [];
  const first = io.put(FLUSH);
  io.ring();
  guest.runNow();
  assert.equal(syncs, 1);
  const write = io.put({ ...WRITE, prp1, cdw10: 8, cdw12: 7 });
  io.ring();
  // The write is not held up by the sync under way, nor does it hold up the thread while the file is busy with it.
  guest.runNow();
  assert.equal(guest.filesBusy, 2);
  await guest.runUntil(() => io.peek() !== undefined);
  assert.deepEqual(
    io.take().map(({ id }) => id),
    [write],
  );
  const second = io.put(FLUSH);
  io.ring();
  guest.runNow();
  assert.equal(syncs, 1);
  const held = waiting;
  waiting = [];
  held[0]!();
  await guest.runUntil(() => io.peek() !== undefined);
  assert.deepEqual(
    io.take().map(({ id }) => id),
    [first],
  );
  while (syncs < 2) await new Promise(setImmediate);
  guest.runNow();
  assert.equal(io.peek(), undefined, "the second flush waits for the second sync");
  letSyncsGo();
  await guest.run();
  assert.deepEqual(
    io.take().map(({ id }) => id),
    [second],
  );
  await guest.close();
});

order("a sync that fails is a write fault for those who asked", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  const prp1 = guest.map(1);
  syncError = Object.assign(new Error("EIO"), { errno: -5 });
  assert.equal((await io.do({ ...WRITE, prp1, cdw12: FUA })).status, 0x280);
  assert.equal((await io.do(FLUSH)).status, 0x280);
  syncError = null;
  assert.equal((await io.do(FLUSH)).status, 0);
  await guest.close();
});

order("without a volatile write cache every write is stored", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  const prp1 = guest.map(1);
  await io.do(FLUSH);
  assert.equal((await guest.admin.do({ opcode: 9, cdw10: 6, cdw11: 0 })).status, 0);
  syncs = 0;
  await io.do({ ...WRITE, prp1, cdw12: 7 });
  await io.do({ opcode: 8, nsid: 1, cdw12: 7 });
  assert.equal(syncs, 2);
  await guest.close();
});

order(
  "shutdown stores everything before it says that it is complete, and nothing is fetched meanwhile",
  async () => {
    for (const kind of [1, 2]) {
      const guest = new NvmeGuest();
      const io = await guest.ready();
      const prp1 = guest.map(1);
      await io.do({ ...WRITE, prp1, cdw12: 7 });
      syncs = 0;
      waiting = [];
      guest.setReg(0x14, CC_ENABLE | (kind << 14));
      assert.equal(guest.reg(0x1c), 1 | (1 << 2));
      io.put({ ...READ, prp1, cdw12: 7 });
      io.ring();
      guest.runNow();
      assert.equal(syncs, 1);
      assert.equal(guest.reg(0x1c), 1 | (1 << 2));
      letSyncsGo();
      await guest.run();
      assert.equal(guest.reg(0x1c), 1 | (2 << 2));
      assert.equal(io.peek(), undefined);
      // A reset is the way back.
      guest.start();
      assert.equal(guest.reg(0x1c), 1);
      assert.equal((await guest.admin.do({ opcode: 0x0a, cdw10: 7 })).status, 0);
      await guest.close();
    }
  },
);

order("closing stores what is left", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  await io.do({ ...WRITE, prp1: guest.map(1), cdw12: 7 });
  syncs = 0;
  await guest.close();
  assert.equal(syncs, 1);
});

order.run();

const slow = suite("nvme: operations that wait for the disk");

slow("reads that wait do not hold up others, and complete in any order", async () => {
  let cold = true;
  const guest = new NvmeGuest({
    natives: {
      ...NATIVES,
      readCached: (...how) => (cold ? COLD : ALWAYS_CACHED).readCached!(...how),
      readCachedInto: (...how) => (cold ? COLD : ALWAYS_CACHED).readCachedInto!(...how),
    },
  });
  const io = await guest.ready(128);
  const prp1 = guest.map(1);
  guest.hold();
  const waits = io.put({ ...READ, prp1 });
  io.ring();
  guest.runNow();
  assert.equal(io.peek(), undefined);
  cold = false;
  for (let i = 0; i < 100; i++) {
    const quick = io.put({ ...READ, prp1 });
    io.ring();
    guest.runNow();
    assert.deepEqual(
      io.take().map(({ id, status }) => [id, status]),
      [[quick, 0]],
    );
  }
  guest.release();
  await guest.run();
  assert.deepEqual(
    io.take().map(({ id, status }) => [id, status]),
    [[waits, 0]],
  );
  await guest.close();
});

slow("more commands than the controller holds wait in their queues", async () => {
  const guest = new NvmeGuest({ natives: COLD });
  const io = await guest.ready(256);
  const prp1 = guest.map(1);
  guest.hold();
  for (let i = 0; i < 200; i++) io.put({ ...READ, prp1, cdw10: i });
  io.ring();
  guest.runNow();
  assert.equal(guest.filesBusy, 64);
  guest.release();
  await guest.run();
  assert.equal(io.take().length, 200);
  await guest.close();
});

slow(
  "abort: reads and flushes that wait end at once, and their data goes nowhere; writes do not",
  async () => {
    const guest = new NvmeGuest({ natives: COLD });
    const io = await guest.ready();
    const prp1 = guest.map(1);
    const abort = async (id: number, queue = 1) => {
      const { status, result } = await runAdmin({ opcode: 8, cdw10: (id << 16) | queue });
      assert.equal(status, 0);
      return result;
    };
    /** While results are held back, doAll would wait for ever. */
    const runAdmin = async (fields: { opcode: number; cdw10: number }) => {
      guest.admin.put(fields);
      guest.admin.ring();
      guest.runNow();
      return guest.admin.take()[0]!;
    };
    await io.do({ ...WRITE, prp1, cdw12: 7 });
    const before = guest.peek(prp1, PAGE);
    guest.hold();
    const read = io.put({ ...READ, prp1, cdw10: 64, cdw12: 7 });
    io.ring();
    guest.runNow();
    assert.equal(await abort(read), 0);
    assert.deepEqual(
      io.take().map(({ id, status }) => [id, status]),
      [[read, 7]],
    );
    assert.equal(await abort(read), 1, "it has ended");
    assert.equal(await abort(0x7777), 1, "there is none");
    assert.equal(await abort(read, 9), 1, "no such queue");
    const flush = io.put(FLUSH);
    io.ring();
    guest.runNow();
    assert.equal(await abort(flush), 0);
    // Writes wait while a sync is under way.
    const write = io.put({ ...WRITE, prp1, cdw12: FUA + 7 });
    io.ring();
    guest.runNow();
    assert.equal(await abort(write), 1);
    guest.release();
    await guest.run();
    assert.deepEqual(
      io.take().map(({ id, status }) => [id, status]),
      [
        [flush, 7],
        [write, 0],
      ],
    );
    assert.ok(guest.peek(prp1, PAGE).equals(before), "the aborted read's data came after all");
    await guest.close();
  },
);

slow("deleting a submission queue waits for its commands", async () => {
  const guest = new NvmeGuest({ natives: COLD });
  const io = await guest.ready();
  const prp1 = guest.map(1);
  guest.hold();
  io.put({ ...READ, prp1 });
  io.ring();
  guest.runNow();
  guest.admin.put({ opcode: 0, cdw10: 1 });
  guest.admin.put({ opcode: 4, cdw10: 1 });
  guest.admin.ring();
  guest.runNow();
  // The completion queue has a user.
  assert.deepEqual(
    guest.admin.take().map(({ status }) => status),
    [0x10c],
  );
  guest.release();
  await guest.run();
  assert.equal(io.take().length, 1);
  assert.equal(guest.admin.take().length, 1);
  assert.equal((await guest.admin.do({ opcode: 4, cdw10: 1 })).status, 0);
  await guest.close();
});

for (const how of ["controller reset", "function reset"] as const) {
  slow(
    `${how} in mid-I/O: nothing of before reaches the guest, and it is ready when it is over`,
    async () => {
      const guest = new NvmeGuest({ natives: COLD });
      const io = await guest.ready();
      const data = guest.map(1);
      guest.poke(data, Buffer.alloc(PAGE, 0x55));
      guest.hold();
      // What is read is zeroes, what is in memory is not.
      for (let i = 0; i < 16; i++) io.put({ ...READ, prp1: data, cdw10: 1024 + i * 8, cdw12: 7 });
      for (let i = 0; i < 16; i++) io.put({ ...WRITE, prp1: data, cdw10: i * 8, cdw12: FUA + 7 });
      io.ring();
      guest.runNow();
      io.take();
      const interrupts = guest.interrupts.length;
      if (how === "controller reset") guest.setReg(0x14, 0);
      else guest.device.reset();
      assert.equal(guest.reg(0x1c), 0);
      // Even when the operations are over, and the controller is at work again, before their results come.
      await guest.heldCount(guest.filesBusy);
      guest.start();
      assert.equal(guest.reg(0x1c), 1);
      const memory = Buffer.from(guest.memory);
      guest.release();
      await guest.run();
      assert.ok(guest.memory.equals(memory), "memory was written after the reset");
      assert.equal(guest.interrupts.length, interrupts);
      const again = await guest.createQueue(1);
      assert.equal((await again.do({ ...READ, prp1: data, cdw12: 7 })).status, 0);
      await guest.close();
    },
  );
}

slow("a controller is not ready again while an old write is under way", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  const data = guest.map(1);
  waiting = [];
  io.put({ ...WRITE, prp1: data, cdw12: FUA + 7 });
  io.ring();
  guest.runNow();
  guest.start();
  assert.equal(guest.reg(0x1c), 0);
  guest.admin.put({ opcode: 0x0a, cdw10: 7 });
  guest.admin.ring();
  guest.runNow();
  assert.equal(guest.admin.peek(), undefined);
  letSyncsGo();
  await guest.run();
  assert.equal(guest.reg(0x1c), 1);
  assert.equal((await guest.admin.do({ opcode: 0x0a, cdw10: 7 })).status, 0);
  await guest.close();
});

slow("closing waits for operations under way", async () => {
  const guest = new NvmeGuest();
  const io = await guest.ready();
  const data = guest.map(1);
  waiting = [];
  io.put({ ...WRITE, prp1: data, cdw12: FUA + 7 });
  io.ring();
  guest.runNow();
  let closed = false;
  const closing = guest.close().then(() => {
    closed = true;
  });
  await new Promise(setImmediate);
  assert.equal(closed, false);
  letSyncsGo();
  await closing;
});

slow.run();
