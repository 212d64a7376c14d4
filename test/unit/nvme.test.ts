// The NVMe controller as a driver sees it before it does I/O: registers, enable and reset, queues, admin commands, events,
// shadow doorbells; and what the user's options come to. Status codes are those of the NVMe 1.4 specification.

import assert from "node:assert/strict";
import fs from "node:fs";
import { join } from "node:path";
import { suite } from "uvu";
import { type NvmeOptions, nvme } from "../../iommu-emul/nvme/model.js";
import { CC_ENABLE, type Fields, type GuestQueue, NATIVES, NvmeGuest, PAGE } from "./support/nvme-guest.js";

const CAP = 0x00;
const VS = 0x08;
const INTMS = 0x0c;
const INTMC = 0x10;
const CC = 0x14;
const CSTS = 0x1c;
const AQA = 0x24;

type Test = (guest: NvmeGuest) => Promise<void>;
/** A test with a controller that is ready, or with `cold` as after power-on. */
const withGuest =
  (test: Test, options: ConstructorParameters<typeof NvmeGuest>[0] & { cold?: boolean } = {}) =>
  async () => {
    const guest = new NvmeGuest(options);
    if (options.cold !== true) guest.start();
    await test(guest);
    guest.checkCanaries();
    await guest.close();
  };

const statusOf = async (guest: NvmeGuest, fields: Fields): Promise<number> =>
  (await guest.admin.do(fields)).status;

const registers = suite("nvme: registers");

registers(
  "what the controller can do, by words, halves and bytes; what is read-only stays",
  withGuest(
    async (guest) => {
      assert.equal(guest.reg(CAP), (0x3ff | (1 << 16) | (60 << 24)) >>> 0);
      assert.equal(guest.reg(CAP + 4), 1 << 5);
      assert.equal(guest.reg(VS), 0x10400);
      assert.equal(guest.device.read(0, VS + 1, 1), 4);
      assert.equal(guest.device.read(0, VS + 2, 2), 1);
      for (const offset of [CAP, CAP + 4, VS, CSTS, 0x18, 0x20, 0x38, 0x3c, 0x100, 0xffc, 0x1000, 0x3ffc]) {
        const before = guest.reg(offset);
        for (const bytes of [1, 2, 4] as const) guest.device.write(0, offset, bytes, 0xff);
        assert.equal(guest.reg(offset), before, `register ${offset.toString(16)}`);
      }
      assert.equal(guest.device.read(4, 0, 4), 0);
      guest.device.write(4, 0, 4, 1);
      // Only whole words write.
      guest.device.write(0, AQA, 2, 0x1f);
      guest.device.write(0, AQA, 1, 0x1f);
      assert.equal(guest.reg(AQA), 0);
      guest.setReg(AQA, 0xffff_ffff);
      assert.equal(guest.reg(AQA), 0x0fff_0fff);
      guest.setReg(0x28, 0xffff_ffff);
      assert.equal(guest.reg(0x28), 0xffff_f000);
      guest.setReg(INTMS, 5);
      guest.setReg(INTMS, 2);
      guest.setReg(INTMC, 4);
      assert.equal(guest.reg(INTMS), 3);
      assert.equal(guest.reg(INTMC), 3);
    },
    { cold: true },
  ),
);

registers(
  "enable and disable; what cannot be enabled is fatal, and a reset mends it",
  withGuest(
    async (guest) => {
      // Doorbells of a controller that is off are nothing.
      guest.setReg(0x1000, 5);
      guest.runNow();
      for (const cc of [CC_ENABLE | (1 << 4), CC_ENABLE | (1 << 7), CC_ENABLE | (1 << 11)]) {
        guest.setReg(AQA, 0x001f_001f);
        guest.setReg(CC, cc);
        guest.runNow();
        assert.equal(guest.reg(CSTS), 2);
        guest.setReg(CC, 0);
        assert.equal(guest.reg(CSTS), 0);
      }
      for (const aqa of [0x0000_001f, 0x001f_0000]) {
        guest.setReg(AQA, aqa);
        guest.setReg(CC, CC_ENABLE);
        assert.equal(guest.reg(CSTS), 2, "queues of one entry");
        guest.setReg(CC, 0);
      }
      guest.start();
      assert.equal(guest.reg(CSTS), 1);
      assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
      guest.setReg(CC, 0);
      assert.equal(guest.reg(CSTS), 0);
      assert.notEqual(guest.reg(AQA), 0, "a controller reset keeps the admin queues' registers");
      guest.start();
      guest.device.reset();
      for (const offset of [CC, CSTS, AQA, 0x28, 0x2c, 0x30, 0x34]) assert.equal(guest.reg(offset), 0);
      // The largest admin queues there can be.
      guest.start(4096);
      assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
    },
    { cold: true },
  ),
);

registers(
  "queues that the IOMMU does not let through are fatal: nothing more is done until a reset",
  withGuest(async (guest) => {
    const broken: ((io: GuestQueue) => void)[] = [
      () => guest.unmap(guest.admin.sq, 1),
      () => guest.unmap(guest.admin.cq, 1),
      (io) => guest.unmap(io.sq, 1),
      (io) => guest.unmap(io.cq, 1),
      () => guest.setBusMaster(false),
    ];
    for (const [index, breaks] of broken.entries()) {
      guest.start(32 + index);
      const io = await guest.createQueue(1);
      breaks(io);
      guest.admin.put({ opcode: 0x0a, cdw10: 7 });
      io.put({ opcode: 0, nsid: 1 });
      const queue = index < 2 || index === 4 ? guest.admin : io;
      queue.ring();
      await guest.run();
      assert.equal(guest.reg(CSTS), 3, `case ${index}`);
      guest.setBusMaster(true);
      const stopped = Buffer.from(guest.memory);
      guest.admin.ring();
      io.ring();
      await guest.run();
      assert.ok(guest.memory.equals(stopped));
    }
    guest.start(64);
    assert.equal(guest.reg(CSTS), 1);
    assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
  }),
);

registers.run();

const admin = suite("nvme: admin commands");

admin(
  "identify: controller, namespace, lists, descriptors; what there is not",
  withGuest(
    async (guest) => {
      const page = guest.map(1);
      const identify = async (cns: number, nsid = 0) => {
        guest.poke(page, Buffer.alloc(PAGE, 0xff));
        return statusOf(guest, { opcode: 6, nsid, prp1: page, cdw10: cns });
      };
      assert.equal(await identify(1), 0);
      const ctrl = guest.peek(page, PAGE);
      assert.equal(ctrl.toString("ascii", 4, 24), "SERIAL-1            ");
      assert.equal(ctrl.toString("ascii", 24, 64).trimEnd(), "pvdma NVMe");
      assert.equal(ctrl[77], 7, "MDTS");
      assert.equal(ctrl.readUInt32LE(80), 0x10400);
      assert.equal(ctrl[111], 1, "CNTRLTYPE");
      assert.equal(ctrl.readUInt16LE(256), 0x100, "OACS");
      assert.deepEqual([...ctrl.subarray(512, 514)], [0x66, 0x44]);
      assert.equal(ctrl.readUInt32LE(516), 1, "NN");
      assert.equal(ctrl.readUInt32LE(536), 1, "SGLS");
      const nqn = /^nqn\.2014-08\.org\.nvmexpress:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\0+$/;
      assert.match(ctrl.toString("ascii", 768, 1024), nqn);
      assert.equal(await identify(0, 1), 0);
      const ns = guest.peek(page, PAGE);
      for (const at of [0, 8, 16]) assert.equal(Number(ns.readBigUInt64LE(at)), 32768);
      assert.deepEqual([ns[24], ns[25], ns[26], ns[33], ns[99], ns[130]], [0x10, 0, 0, 9, 0, 9]);
      for (const nsid of [0, 2, 0xffff_ffff]) assert.equal(await identify(0, nsid), 0x0b);
      assert.equal(await identify(2, 0), 0);
      assert.ok(guest.peek(page, PAGE).equals(Buffer.concat([Buffer.from([1]), Buffer.alloc(PAGE - 1)])));
      assert.equal(await identify(2, 1), 0);
      assert.ok(guest.peek(page, PAGE).equals(Buffer.alloc(PAGE)));
      assert.equal(await identify(2, 0xffff_fffe), 0x0b);
      assert.equal(await identify(3, 1), 0);
      const uuid = guest.peek(page, PAGE);
      assert.deepEqual([...uuid.subarray(0, 4), uuid[10]! >> 4, uuid[20]], [3, 16, 0, 0, 5, 0]);
      assert.equal(await identify(3, 2), 0x0b);
      for (const cns of [4, 5, 6, 8, 0x10, 0x11, 0x12, 0x13, 0x1c, 0xff])
        assert.equal(await identify(cns, 1), 2);
      // Where the structure crosses a page, and where it cannot be put.
      const two = guest.map(2);
      const where = { opcode: 6, cdw10: 1, prp1: two + 2048, prp2: two + PAGE };
      assert.equal(await statusOf(guest, where), 0);
      assert.ok(guest.peek(two + 2048, PAGE).equals(ctrl));
      assert.equal(await statusOf(guest, { opcode: 6, cdw10: 1, prp1: 0x1000 }), 4);
      assert.equal(await statusOf(guest, { opcode: 6, cdw10: 1, prp1: page, flags: 0x40 }), 2, "an SGL");
      assert.equal(await statusOf(guest, { opcode: 6, cdw10: 1, prp1: page, flags: 1 }), 2, "fused");
    },
    { serial: "SERIAL-1" },
  ),
);

admin(
  "opcodes that there are not",
  withGuest(async (guest) => {
    for (const opcode of [3, 7, 0x0d, 0x10, 0x11, 0x14, 0x15, 0x18, 0x19, 0x1a, 0x80, 0x84, 0xc0, 0xff]) {
      assert.equal(await statusOf(guest, { opcode }), 1, `opcode ${opcode.toString(16)}`);
    }
  }),
);

admin(
  "queues: made, used in any number, deleted in the right order; and every way to get it wrong",
  withGuest(async (guest) => {
    const at = guest.map(16);
    const size = (id: number, entries: number) => (((entries - 1) << 16) | id) >>> 0;
    const cq = (id: number, entries = 16, more: Partial<Fields> = {}) =>
      statusOf(guest, { opcode: 5, prp1: at, cdw10: size(id, entries), cdw11: 1, ...more });
    const sq = (id: number, entries = 16, more: Partial<Fields> = {}) =>
      statusOf(guest, { opcode: 1, prp1: at, cdw10: size(id, entries), cdw11: (id << 16) | 1, ...more });
    for (const id of [0, 5, 0xffff]) {
      assert.equal(await cq(id), 0x101);
      assert.equal(await sq(id), 0x101);
    }
    assert.equal(await sq(1), 0x100, "no completion queue yet");
    assert.equal(await cq(1, 1), 0x102);
    assert.equal(await cq(1, 1025), 0x102);
    assert.equal(await cq(1, 16, { prp1: at + 8 }), 0x13);
    assert.equal(await cq(1, 16, { cdw11: 0 }), 2, "not contiguous");
    assert.equal(await cq(1, 16, { cdw11: (5 << 16) | 3 }), 0x108);
    assert.equal(await cq(1, 1024), 0);
    assert.equal(await cq(1), 0x101, "there is one");
    assert.equal(await sq(1, 1), 0x102);
    assert.equal(await sq(1, 1025), 0x102);
    assert.equal(await sq(1, 16, { prp1: at + 1024 }), 0x13);
    assert.equal(await sq(1, 16, { cdw11: 1 << 16 }), 2, "not contiguous");
    assert.equal(await sq(1, 16, { cdw11: 1 }), 0x101, "the admin completion queue");
    assert.equal(await sq(1, 16, { cdw11: (5 << 16) | 1 }), 0x101);
    assert.equal(await sq(1, 16, { cdw11: (2 << 16) | 1 }), 0x100);
    assert.equal(await sq(1), 0);
    assert.equal(await sq(1), 0x101);
    assert.equal(await sq(2, 16, { cdw11: (1 << 16) | 1 }), 0, "two share a completion queue");
    for (const id of [0, 3, 5, 0xffff]) {
      assert.equal(await statusOf(guest, { opcode: 0, cdw10: id }), 0x101);
      assert.equal(await statusOf(guest, { opcode: 4, cdw10: id }), 0x101);
    }
    assert.equal(await statusOf(guest, { opcode: 4, cdw10: 1 }), 0x10c, "it is in use");
    assert.equal(await statusOf(guest, { opcode: 0, cdw10: 1 }), 0);
    assert.equal(await statusOf(guest, { opcode: 4, cdw10: 1 }), 0x10c, "by one still");
    assert.equal(await statusOf(guest, { opcode: 0, cdw10: 2 }), 0);
    assert.equal(await statusOf(guest, { opcode: 4, cdw10: 1 }), 0);
    // Number of queues cannot be asked for when there are some.
    assert.equal(await statusOf(guest, { opcode: 9, cdw10: 7, cdw11: 0x0003_0003 }), 0);
    assert.equal(await cq(4), 0);
    assert.equal(await statusOf(guest, { opcode: 9, cdw10: 7, cdw11: 0x0003_0003 }), 0x0c);
    // Entry sizes that were not set.
    guest.start();
    guest.setReg(CC, 1);
    assert.equal(await cq(1), 2);
  }),
);

admin(
  "all queue pairs side by side, around their ends many times, each with its vector",
  withGuest(async (guest) => {
    const data = guest.map(1);
    const queues: GuestQueue[] = [];
    for (const [id, entries, vector] of [
      [1, 2, 1],
      [2, 3, 2],
      [3, 64, 3],
      [4, 1024, 0],
    ] as const) {
      queues.push(await guest.createQueue(id, entries, vector));
    }
    for (let round = 0; round < 200; round++) {
      for (const queue of queues) {
        const count = Math.min(queue.entries - 1, 1 + (round % 70));
        const before = queue.tail;
        const commands = Array.from({ length: count }, () => ({ opcode: 2, nsid: 1, prp1: data }));
        guest.interrupts.length = 0;
        const done = await queue.doAll(commands);
        assert.ok(done.every(({ status, queue: id }) => status === 0 && id === queue.id));
        assert.equal(done.at(-1)!.head, (before + count) % queue.entries);
        const vector = queue.id === 4 ? 0 : queue.id;
        assert.ok(guest.interrupts.length >= 1 && guest.interrupts.length <= 1 + count / 32);
        assert.ok(guest.interrupts.every((each) => each === vector));
      }
    }
  }),
);

admin(
  "a full completion queue holds commands back, until its head moves; nothing is lost or overwritten",
  withGuest(async (guest) => {
    const io = await guest.createQueue(1, 64);
    // A completion queue of 5 entries for a submission queue of 64.
    assert.equal(await statusOf(guest, { opcode: 0, cdw10: 1 }), 0);
    const small = guest.map(1);
    guest.poke(small, Buffer.alloc(PAGE));
    const make = { opcode: 5, prp1: small, cdw10: (4 << 16) | 2, cdw11: (2 << 16) | 3 };
    assert.equal(await statusOf(guest, make), 0);
    const again = { opcode: 1, prp1: io.sq, cdw10: (63 << 16) | 1, cdw11: (2 << 16) | 1 };
    assert.equal(await statusOf(guest, again), 0);
    io.tail = 0;
    const ids = Array.from({ length: 50 }, () => io.put({ opcode: 0, nsid: 1 }));
    io.ring();
    const seen: number[] = [];
    let head = 0;
    let phase = 1;
    while (seen.length < 50) {
      await guest.run();
      const entries = guest.peek(small, 80);
      let posted = 0;
      while (((entries.readUInt32LE(head * 16 + 12) >>> 16) & 1) === phase) {
        seen.push(entries.readUInt16LE(head * 16 + 12));
        head++;
        if (head === 5) {
          head = 0;
          phase ^= 1;
        }
        posted++;
        assert.ok(posted <= 4, "a queue of 5 has room for 4");
      }
      assert.equal(posted, Math.min(4, 50 - seen.length + posted));
      assert.ok(guest.peek(small + 80, PAGE - 80).equals(Buffer.alloc(PAGE - 80)));
      guest.setReg(0x1000 + 2 * 8 + 4, head);
    }
    assert.deepEqual(seen, ids);
  }),
);

admin(
  "features: defaults, what is set comes back, what cannot be is refused, a reset forgets",
  withGuest(async (guest) => {
    const get = async (id: number, select = 0, cdw11 = 0, nsid = 0) => {
      const { status, result } = await guest.admin.do({ opcode: 10, nsid, cdw10: (select << 8) | id, cdw11 });
      return status === 0 ? result : -status;
    };
    const set = async (id: number, cdw11: number, nsid = 0) =>
      statusOf(guest, { opcode: 9, nsid, cdw10: id, cdw11 });
    for (const [id, initial, value, nsid] of [
      [1, 4, 0x0403_0205, 0],
      [2, 0, 0x20, 0],
      [4, 343, 350, 0],
      [5, 0, 0x1234, 1],
      [6, 1, 0, 0],
      [8, 0, 0x0507, 0],
      [0x0a, 0, 1, 0],
      [0x0b, 0, 0x1f, 0],
    ] as const) {
      assert.equal(await get(id, 0, 0, nsid), initial, `feature ${id}`);
      assert.equal(await set(id, value, nsid), 0, `feature ${id}`);
      assert.equal(await get(id, 0, 0, nsid), value);
      assert.equal(await get(id, 1, 0, nsid), initial);
      assert.equal(await get(id, 2, 0, nsid), initial);
      assert.equal(await get(id, 3, 0, nsid), nsid === 1 ? 6 : 4);
      assert.equal(await get(id, 4, 0, nsid), -2);
    }
    for (const id of [0, 3, 0x0c, 0x0d, 0x0f, 0x10, 0x11, 0x80, 0xff]) {
      assert.equal(await get(id), -2);
      assert.equal(await set(id, 0), 2);
    }
    for (const [id, value] of [
      [1, 8],
      [2, 1],
      [4, 1 << 16],
      [4, 2 << 20],
      [6, 2],
      [7, 0xffff],
      [9, 5],
      [0x0b, 2 ** 31],
    ] as const) {
      assert.equal(await set(id, value), 2, `feature ${id}, ${value}`);
    }
    assert.equal(await set(5, 0x1_0000, 1), 2, "DULBE");
    assert.equal(await set(5, 0, 2), 0x0b);
    assert.equal(await set(6, 1, 1), 0x10f);
    assert.equal(await set(6, 1, 5), 0x0b);
    assert.equal(await get(5, 0, 0, 0), -0x0b);
    assert.equal(await statusOf(guest, { opcode: 9, cdw10: 2 ** 31 + 6, cdw11: 1 }), 0x10d);
    assert.equal(await get(7), 0x0003_0003);
    const queues = await guest.admin.do({ opcode: 9, cdw10: 7, cdw11: 0x00ff_00ff });
    assert.deepEqual([queues.status, queues.result], [0, 0x0003_0003]);
    assert.equal(await set(9, 0x1_0003), 0);
    assert.equal(await get(9, 0, 3), 0x1_0003);
    assert.equal(await get(9, 0, 2), 2);
    assert.equal(await set(4, (1 << 20) | 280), 0);
    assert.equal(await get(4, 0, 1 << 20), 280);
    const page = guest.map(1);
    guest.poke64(page, 0x1_2345_6789);
    assert.equal(await statusOf(guest, { opcode: 9, cdw10: 0x0e, prp1: page }), 0);
    guest.poke64(page, 0);
    assert.equal(await statusOf(guest, { opcode: 10, cdw10: 0x0e, prp1: page }), 0);
    const time = guest.peek(page, 8);
    assert.ok(time.readUIntLE(0, 6) >= 0x1_2345_6789 && time.readUIntLE(0, 6) < 0x1_2345_6789 + 3_600_000);
    assert.equal(time[6], 2);
    guest.start();
    assert.equal(await get(6), 1);
    assert.equal(await get(4), 343);
  }),
);

admin(
  "log pages: lengths, offsets, SMART counts, the error log",
  withGuest(async (guest) => {
    const io = await guest.createQueue(1);
    const page = guest.map(4);
    const list = guest.map(1);
    guest.poke64(list, page + PAGE, page + 2 * PAGE, page + 3 * PAGE);
    const log = async (id: number, bytes: number, offset = 0, nsid = 0xffff_ffff) => {
      const words = bytes / 4 - 1;
      const prp2 = bytes > 2 * PAGE ? list : page + PAGE;
      const cdw10 = ((words << 16) | id) >>> 0;
      const where = { prp1: page, prp2, cdw10, cdw11: words >>> 16 };
      const cdw12 = offset % 2 ** 32;
      const cdw13 = Math.floor(offset / 2 ** 32);
      return statusOf(guest, { opcode: 2, nsid, ...where, cdw12, cdw13 });
    };
    for (const id of [0, 4, 6, 7, 0x0d, 0x80, 0xff]) assert.equal(await log(id, 512), 0x109);
    assert.equal(await log(2, 512, 0, 1), 2, "SMART of a namespace");
    assert.equal(await log(1, 512, 2), 2, "offset of half a word");
    assert.equal(await log(1, 512, 4097), 2, "offset behind the end");
    assert.equal(await log(1, 4, 2 ** 40), 2);
    assert.equal(await log(1, 2 ** 20), 2, "larger than MDTS");
    assert.equal(await log(3, 512), 0);
    assert.equal(guest.peek(page, 16).toString("ascii", 8), "1.0     ");
    assert.equal(await log(5, 4096), 0);
    const effects = guest.peek(page, 4096);
    assert.deepEqual(
      [6, 0x0d].map((opcode) => effects.readUInt32LE(opcode * 4)),
      [1, 0],
    );
    assert.deepEqual(
      [0, 1, 2, 4].map((opcode) => effects.readUInt32LE(1024 + opcode * 4)),
      [1, 3, 1, 0],
    );
    // 1500 KiB read, 1000 blocks written, 10 errors so far and two more.
    const data = guest.map(128);
    const prps = guest.map(1);
    guest.poke64(prps, ...Array.from({ length: 127 }, (_, i) => data + (i + 1) * PAGE));
    for (const cdw12 of [999, 999, 999]) {
      await io.do({ opcode: 2, nsid: 1, prp1: data, prp2: prps, cdw12 });
    }
    await io.do({ opcode: 1, nsid: 1, prp1: data, prp2: prps, cdw12: 999 });
    await io.do({ opcode: 2, nsid: 1, id: 0x1234, prp1: data, cdw10: 77_777, cdw12: 0 });
    await guest.admin.do({ opcode: 0x99, id: 0x4321 });
    assert.equal(await log(2, 512), 0);
    const smart = guest.peek(page, 512);
    const count = (at: number) => Number(smart.readBigUInt64LE(at));
    assert.equal(smart[0], 0);
    assert.equal(smart.readUInt16LE(1), 303);
    assert.deepEqual([smart[3], smart[4], smart[5]], [100, 10, 0]);
    assert.deepEqual([32, 48, 64, 80, 112, 160, 176].map(count), [3, 1, 3, 1, 1, 0, 14]);
    assert.equal(await log(1, 8192), 0);
    const errors = guest.peek(page, 8192);
    const entry = (i: number) => ({
      count: Number(errors.readBigUInt64LE(i * 64)),
      queue: errors.readUInt16LE(i * 64 + 8),
      id: errors.readUInt16LE(i * 64 + 10),
      status: (errors.readUInt16LE(i * 64 + 12) >>> 1) & 0x7ff,
      lba: Number(errors.readBigUInt64LE(i * 64 + 16)),
      nsid: errors.readUInt32LE(i * 64 + 24),
    });
    assert.deepEqual(entry(0), { count: 14, queue: 0, id: 0x4321, status: 1, lba: 0, nsid: 0 });
    assert.deepEqual(entry(1), { count: 13, queue: 1, id: 0x1234, status: 0x80, lba: 77_777, nsid: 1 });
    assert.equal(entry(14).count, 0);
    assert.ok(errors.subarray(4096).equals(Buffer.alloc(4096)), "behind the page's end are zeroes");
    assert.equal(await log(1, 64, 64), 0);
    assert.ok(guest.peek(page, 64).equals(errors.subarray(64, 128)));
    // Around its end: the newest 64.
    for (let i = 0; i < 100; i++) await guest.admin.do({ opcode: 0x99 });
    assert.equal(await log(1, 4096), 0);
    const newest = guest.peek(page, 4096);
    for (let i = 0; i < 64; i++) assert.equal(newest.readUInt32LE(i * 64), 114 - i);
  }),
);

admin.run();

const events = suite("nvme: asynchronous events");

/** Asks for an event, and answers with what comes when `then` has happened; undefined when nothing does. */
async function eventAfter(guest: NvmeGuest, then: () => Promise<void> | void) {
  const id = guest.admin.put({ opcode: 12 });
  guest.admin.ring();
  await guest.run();
  assert.equal(guest.admin.peek(), undefined);
  await then();
  await guest.run();
  return guest.admin.take().find((completion) => completion.id === id);
}

const readLog = async (guest: NvmeGuest, id: number, retain = 0) => {
  const prp1 = guest.map(1);
  const cdw10 = (15 << 16) | (retain << 15) | id;
  assert.equal(await statusOf(guest, { opcode: 2, nsid: 0xffff_ffff, prp1, cdw10 }), 0);
};

events(
  "doorbells that are not there, and values that cannot be: one event, and no more until the log was read",
  withGuest(async (guest) => {
    const io = await guest.createQueue(1, 16);
    const wrong = await eventAfter(guest, () => guest.setReg(0x1000 + 2 * 8, 1));
    assert.deepEqual([wrong?.status, wrong?.result], [0, 0x01_00_00]);
    for (const [offset, value] of [
      [8, 16],
      [8, 0xffff_ffff],
      [12, 1],
      [12, 16],
      [4, 31],
      [0, 32],
    ] as const) {
      guest.admin.put({ opcode: 12 });
      guest.admin.ring();
      await guest.run();
      guest.setReg(0x1000 + offset, value);
      await guest.run();
      assert.equal(guest.admin.peek(), undefined, "masked");
      await readLog(guest, 1);
      // Reading the log cleared what was pending.
      assert.equal(guest.admin.peek(), undefined);
      guest.setReg(0x1000 + offset, value);
      await guest.run();
      assert.deepEqual(
        guest.admin.take().map(({ status, result }) => [status, result]),
        [[0, 0x01_01_00]],
        `${value} to ${offset}`,
      );
    }
    await readLog(guest, 1, 1);
    assert.equal(await eventAfter(guest, () => guest.setReg(0x3ff8, 1)), undefined, "retained");
    // The queues are as they were.
    assert.equal((await io.do({ opcode: 0, nsid: 1 })).status, 0);
    // A tail that runs over entries that wait: the guest takes no completions, so 15 are done and 14 wait.
    await readLog(guest, 1);
    for (const count of [15, 14]) {
      for (let i = 0; i < count; i++) io.put({ opcode: 0, nsid: 1 });
      io.ring();
      await guest.run();
    }
    guest.setReg(0x1008, (io.tail + 2) % 16);
    await guest.run();
    // It answers the request from before.
    assert.deepEqual(
      guest.admin.take().map(({ result }) => result),
      [0x01_01_00],
    );
    const done: number[] = io.take().map(({ id }) => id);
    await guest.run();
    done.push(...io.take().map(({ id }) => id));
    assert.equal(done.length, 29);
  }),
);

events(
  "temperature: a threshold below what it is, when the guest wants to know",
  withGuest(async (guest) => {
    const threshold = async (kelvin: number) => {
      assert.equal(await statusOf(guest, { opcode: 9, cdw10: 4, cdw11: kelvin }), 0);
    };
    const warning = async () => {
      const prp1 = guest.map(1);
      await guest.admin.do({ opcode: 2, nsid: 0xffff_ffff, prp1, cdw10: (127 << 16) | 0x8002 });
      return guest.peek(prp1, 1)[0];
    };
    await threshold(300);
    assert.equal(await warning(), 2);
    const event = await eventAfter(guest, async () => {
      guest.admin.put({ opcode: 9, cdw10: 0x0b, cdw11: 2 });
      guest.admin.ring();
      await guest.run();
    });
    assert.deepEqual([event?.status, event?.result], [0, 0x02_01_01]);
    await threshold(340);
    assert.equal(await warning(), 0);
  }),
);

events(
  "at most four requests; abort takes one back; a reset takes all",
  withGuest(async (guest) => {
    const ids = Array.from({ length: 4 }, () => guest.admin.put({ opcode: 12 }));
    guest.admin.ring();
    await guest.run();
    assert.equal(guest.admin.peek(), undefined);
    assert.equal(await statusOf(guest, { opcode: 12 }), 0x105);
    const abort = guest.admin.put({ opcode: 8, cdw10: ids[1]! << 16 });
    guest.admin.ring();
    await guest.run();
    const taken = guest.admin.take();
    assert.deepEqual(
      taken.map(({ id, status, result }) => [id, status, result]).sort((a, b) => a[1]! - b[1]!),
      [
        [abort, 0, 0],
        [ids[1], 7, 0],
      ],
    );
    const { status, result } = await guest.admin.do({ opcode: 8, cdw10: ids[1]! << 16 });
    assert.deepEqual([status, result], [0, 1]);
    guest.start();
    guest.setReg(0x3000, 1);
    await guest.run();
    assert.equal(guest.admin.peek(), undefined);
  }),
);

events(
  "an event waits for room in the completion queue, like everything else",
  withGuest(async (guest) => {
    guest.start(4);
    guest.admin.put({ opcode: 12 });
    for (let i = 0; i < 2; i++) guest.admin.put({ opcode: 0x99 });
    guest.admin.ring();
    guest.runNow();
    guest.admin.put({ opcode: 0x99 });
    guest.admin.ring();
    guest.runNow();
    guest.setReg(0x3000, 1);
    guest.runNow();
    const first: number[] = [];
    for (let next = guest.admin.next(); next !== undefined; next = guest.admin.next())
      first.push(next.status);
    assert.deepEqual(first, [1, 1, 1]);
    guest.setReg(0x1004, guest.admin.head);
    guest.runNow();
    assert.deepEqual(
      guest.admin.take().map(({ result }) => result),
      [0x01_00_00],
    );
  }),
);

events.run();

const shadow = suite("nvme: shadow doorbells");

shadow(
  "the guest writes registers only when it must, and nothing is missed",
  withGuest(async (guest) => {
    const data = guest.map(1);
    const doorbells = guest.map(1);
    const indexes = guest.map(1);
    guest.poke(doorbells, Buffer.alloc(PAGE));
    guest.poke(indexes, Buffer.alloc(PAGE));
    for (const [prp1, prp2, status] of [
      [doorbells + 8, indexes, 2],
      [doorbells, indexes + 512, 2],
      [0x1000, indexes, 4],
    ] as const) {
      assert.equal(await statusOf(guest, { opcode: 0x7c, prp1, prp2 }), status);
    }
    const early = await guest.createQueue(1, 16);
    assert.equal(await statusOf(guest, { opcode: 0x7c, prp1: doorbells, prp2: indexes }), 0);
    const late = await guest.createQueue(2, 32);
    for (const io of [early, late]) io.shadow = { doorbells, events: indexes };
    for (const io of [early, late]) {
      for (let round = 0; round < 300; round++) {
        const commands = Array.from({ length: 1 + (round % (io.entries - 1)) }, () => ({
          opcode: 2,
          nsid: 1,
          prp1: data,
        }));
        const done = await io.doAll(commands);
        assert.ok(done.every(({ status }) => status === 0));
      }
    }
    // A controller at work looks by itself: while commands come all the time, the register is hardly written.
    const long = await guest.createQueue(3, 1024);
    long.shadow = { doorbells, events: indexes };
    let submitted = 0;
    let taken = 0;
    while (taken < 5000) {
      for (; submitted < 5000 && submitted - taken < 200; submitted++) {
        long.put({ opcode: 2, nsid: 1, prp1: data });
        long.ring();
      }
      guest.device.work();
      taken += long.take().length;
    }
    // Once when it began, and for each queue where an index is passed or an end: 5 laps.
    assert.ok(long.rings < 25, `${long.rings} register writes for ${submitted} commands`);
    // The admin queue goes on by its registers.
    assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
    // At rest it asks for nothing: the guest has been told to write the register.
    assert.equal(guest.device.work(), false);
    const index = guest.peek(indexes + 16, 4).readUInt32LE(0);
    assert.equal(index, late.tail);
    // Values that cannot be.
    const event = await eventAfter(guest, () => {
      guest.poke(doorbells + 16, Buffer.from([0xff, 0xff, 0, 0]));
      guest.setReg(0x1010, 0);
    });
    assert.equal(event?.result, 0x01_01_00);
    // The pages go away.
    guest.unmap(doorbells, 1);
    guest.setReg(0x1008, 0);
    guest.runNow();
    assert.equal(guest.reg(CSTS), 3);
    guest.start();
    assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
  }),
);

shadow(
  "a full completion queue's head is asked for; an admin queue with a shadow of its own is understood",
  withGuest(async (guest) => {
    const doorbells = guest.map(1);
    const events = guest.map(1);
    guest.poke(doorbells, Buffer.alloc(PAGE));
    guest.poke(events, Buffer.alloc(PAGE));
    assert.equal(await statusOf(guest, { opcode: 0x7c, prp1: doorbells, prp2: events }), 0);
    const io = await guest.createQueue(1, 64);
    io.shadow = { doorbells, events };
    // Ten that are taken, and all that the queue holds, which are not; five more commands wait.
    const flushes = (count: number) => Array.from({ length: count }, () => io.put({ opcode: 0, nsid: 1 }));
    flushes(10);
    io.ring();
    await guest.run();
    assert.equal(io.take().length, 10);
    const ids = flushes(40);
    io.ring();
    await guest.run();
    ids.push(...flushes(23));
    io.ring();
    await guest.run();
    ids.push(...flushes(5));
    io.ring();
    await guest.run();
    // Some are taken: that is no doorbell's turn but for the event index, which the full queue has moved.
    const before = io.rings;
    const seen = io.take(10).map(({ id }) => id);
    assert.equal(io.rings, before + 1);
    await guest.run();
    seen.push(...io.take().map(({ id }) => id));
    assert.deepEqual(seen, ids);
    // A register written with what is older than the shadow says only that there is something new.
    guest.setReg(0x1008, (io.tail + 60) % 64);
    guest.setReg(0x100c, (io.head + 60) % 64);
    await guest.run();
    assert.equal(io.peek(), undefined);
    assert.equal(guest.reg(CSTS), 1);
    assert.equal(await eventAfter(guest, () => undefined), undefined);
    guest.admin.shadow = { doorbells, events };
    for (let i = 0; i < 100; i++) assert.equal(await statusOf(guest, { opcode: 0x0a, cdw10: 7 }), 0);
  }),
);

shadow.run();

const options = suite("nvme: options");

options("what the user writes", () => {
  const parse = (keys: Record<string, string>) => nvme.parse(keys);
  assert.deepEqual(parse({ file: "x" }), {
    file: "x",
    bytes: undefined,
    readonly: false,
    blockBytes: 512,
    serial: undefined,
  });
  const all = { file: "x", size: "10G", readonly: "on", lba: "4096", serial: "A 1" };
  assert.deepEqual(parse(all), {
    file: "x",
    bytes: 10 * 2 ** 30,
    readonly: true,
    blockBytes: 4096,
    serial: "A 1",
  });
  for (const keys of [
    {},
    { file: "" },
    { file: "x", size: "0" },
    { file: "x", size: "-1" },
    { file: "x", size: "2000T" },
    { file: "x", size: "1.5G" },
    { file: "x", readonly: "yes" },
    { file: "x", lba: "1024" },
    { file: "x", serial: "" },
    { file: "x", serial: "a".repeat(21) },
    { file: "x", serial: "\u00e9" },
    { file: "x", other: "y" },
  ]) {
    assert.throws(() => parse(keys as Record<string, string>), Error, JSON.stringify(keys));
  }
  const { interrupts, bars, classCode } = nvme.describe(parse({ file: "x" }), { cpus: 3 });
  assert.deepEqual(interrupts, { kind: "msix", vectors: 4, bar: 4 });
  assert.deepEqual(bars, [{ index: 0, bytes: 16384, bits: 64 }]);
  assert.equal(classCode, 0x010802);
});

options(
  "files that cannot be had: one line that says why; nothing is made or changed by looking",
  async () => {
    const guest = new NvmeGuest();
    const file = (name: string) => join(guest.directory, name);
    const host = { dma: guest.dma, natives: NATIVES, interrupt() {}, later() {}, warn() {} };
    const base: Omit<NvmeOptions, "file"> = {
      bytes: undefined,
      readonly: false,
      blockBytes: 512,
      serial: undefined,
    };
    const check = (name: string, more: Partial<NvmeOptions> = {}) =>
      nvme.check({ ...base, ...more, file: file(name) });
    assert.throws(() => check("none"), /none is not there; create it, or give size=/);
    assert.throws(() => check("none", { bytes: 512, readonly: true }), /readonly=on it is not made/);
    assert.throws(() => check("none", { bytes: 513 }), /513 bytes, which are not whole blocks of 512/);
    check("none", { bytes: 1024 });
    assert.equal(fs.existsSync(file("none")), false);
    fs.writeFileSync(file("odd"), Buffer.alloc(1000));
    assert.throws(() => check("odd"), /1000 bytes, which are not whole blocks/);
    fs.writeFileSync(file("empty"), "");
    assert.throws(() => check("empty"), /is empty/);
    fs.writeFileSync(file("small"), Buffer.alloc(1024));
    assert.throws(() => check("small", { bytes: 2048 }), /has 1024 bytes, not 2048 as size= says/);
    assert.throws(() => check("small", { blockBytes: 4096 }), /not whole blocks of 4096/);
    check("small", { bytes: 1024 });
    assert.throws(() => nvme.check({ ...base, file: guest.directory }), /neither a file nor a block device/);
    assert.throws(() => nvme.check({ ...base, file: "/dev/null" }), /neither a file nor a block device/);
    // The guest's own disk is in use; reading it together with others that read is no harm.
    const open = (name: string, readonly: boolean) =>
      nvme.create({ ...base, file: file(name), readonly }, host, { cpus: 1 });
    assert.throws(() => open("disk.img", false), /disk.img is in use by another device or program/);
    assert.throws(() => open("disk.img", true), /in use/);
    const readers = [open("small", true), open("small", true)];
    assert.throws(() => open("small", false), /in use/);
    for (const reader of readers) await reader.close();
    await open("small", false).close();
    // Made sparse.
    await nvme.create({ ...base, file: file("new"), bytes: 2 ** 40 }, host, { cpus: 1 }).close();
    const made = fs.statSync(file("new"));
    assert.deepEqual([made.size, made.blocks, made.mode & 0o777], [2 ** 40, 0, 0o600]);
    await guest.close();
  },
);

options.run();
