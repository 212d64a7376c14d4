// iommu-emul/edu.ts: registers, interrupts and copies of the emulated edu, over a port to memory that is not the guest's.
// That it is QEMU's edu is shown by lab/emulated.test.ts, where both run the same guest.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { type DeviceHost, DMA_FAULT, type EmulatedDevice } from "../../iommu-emul/device.js";
import { edu } from "../../iommu-emul/edu.js";

const SOURCE = 0x80;
const TARGET = 0x88;
const COUNT = 0x90;
const COMMAND = 0x98;
const BUFFER = 0x40000;

/** A device over 64 KiB of memory from bus address 0x10000 on; what else it touches is refused. */
function rig(keys: Record<string, string> = {}) {
  const memory = Buffer.alloc(0x10000, 0xaa);
  const log: string[] = [];
  const access = (what: string, iova: number, bytes: number) => {
    log.push(`${what} 0x${iova.toString(16)} ${bytes}`);
    const at = iova - 0x10000;
    return at >= 0 && at + bytes <= memory.length ? at : -1;
  };
  const host: DeviceHost = {
    dma: {
      read: (iova, into, at, bytes) => {
        const from = access("read", iova, bytes);
        if (from < 0) return DMA_FAULT.notMapped;
        memory.copy(into, at, from, from + bytes);
        return DMA_FAULT.none;
      },
      write: (iova, from, at, bytes) => {
        const to = access("write", iova, bytes);
        if (to < 0) return DMA_FAULT.notMapped;
        from.copy(memory, to, at, at + bytes);
        return DMA_FAULT.none;
      },
      writeInPlace: () => assert.fail("it moves its data itself"),
    },
    natives: {},
    interrupt: (vector) => log.push(`interrupt ${vector}`),
    later: () => assert.fail("it has nothing to wait for"),
    warn: (line) => log.push(`warn ${line}`),
  };
  const device: EmulatedDevice = edu.create(edu.parse(keys), host, { cpus: 1 });
  const write = (offset: number, value: number) => device.write(0, offset, 4, value);
  /** As a driver's writeq: the low half first. */
  const write64 = (offset: number, low: number, high: number) => {
    write(offset, low);
    write(offset + 4, high);
  };
  return {
    device,
    memory,
    write,
    write64,
    read: (offset: number) => device.read(0, offset, 4),
    news: () => log.splice(0),
    copy: (source: number, target: number, bytes: number, command: number) => {
      write(SOURCE, source);
      write(TARGET, target);
      write(COUNT, bytes);
      write(COMMAND, command);
      assert.equal(device.work(), false);
    },
  };
}

const test = suite("edu");

test("a factorial is computed when the device works, and its register is locked until then", () => {
  const { device, read, write, news } = rig();
  write(0x08, 5);
  assert.equal(read(0x20), 0x01, "computing");
  write(0x08, 6);
  assert.equal(read(0x08), 5);
  device.work();
  assert.equal(read(0x20), 0);
  assert.equal(read(0x08), 120);
  write(0x20, 0xffffffff);
  assert.equal(read(0x20), 0x80, "computing is the device's to set");
  write(0x08, 0xffffffff);
  device.work();
  assert.equal(read(0x08), 0);
  assert.equal(read(0x24), 1);
  assert.deepEqual(news(), ["interrupt 0"]);
});

test("factorials are those of C, up to where they are zero", () => {
  const { device, read, write } = rig();
  let wanted = 1n;
  for (let n = 0n; n < 40n; n++) {
    if (n > 0n) wanted = BigInt.asUintN(32, wanted * n);
    write(0x08, Number(n));
    device.work();
    assert.equal(read(0x08), Number(wanted), `${n}!`);
  }
});

test("an interrupt for each raise that leaves a bit set, until all are acknowledged", () => {
  const { read, write, news } = rig();
  write(0x60, 0);
  assert.deepEqual(news(), []);
  write(0x60, 0x80000001);
  write(0x60, 2);
  assert.deepEqual(news(), ["interrupt 0", "interrupt 0"]);
  assert.equal(read(0x24), 0x80000003);
  write(0x64, 0x80000002);
  assert.equal(read(0x24), 1);
  write(0x60, 0);
  assert.deepEqual(news(), ["interrupt 0"], "a bit is still set");
});

test("copies to and from its buffer, and interrupts when asked to", () => {
  const { memory, copy, read, news } = rig();
  memory.write("hello", 0x123);
  copy(0x10123, BUFFER + 10, 5, 5);
  assert.equal(read(0x24), 0x100);
  assert.equal(read(COMMAND), 4, "done, the rest stays");
  assert.deepEqual(news(), ["read 0x10123 5", "interrupt 0"]);
  copy(BUFFER + 8, 0x10200, 9, 3);
  assert.deepEqual(news(), ["write 0x10200 9"]);
  assert.equal(memory.toString("latin1", 0x1ff, 0x20a), "\xaa\0\0hello\0\0\xaa");
  copy(BUFFER, 0x10200, 4096, 3);
  copy(BUFFER + 4096, 0x10200, 0, 3);
  assert.deepEqual(news(), ["write 0x10200 4096", "write 0x10200 0"], "all of it, and nothing behind it");
});

test("a copy that waits does not see that its registers change", () => {
  const { device, write, read, news } = rig();
  write(SOURCE, 0x10000);
  write(TARGET, BUFFER);
  write(COUNT, 8);
  write(COMMAND, 2);
  assert.equal(device.work(), false);
  assert.deepEqual(news(), [], "without the bit that starts it");
  write(COMMAND, 1);
  for (const register of [SOURCE, SOURCE + 4, TARGET, COUNT, COMMAND]) write(register, 0x7777);
  assert.equal(read(COMMAND), 1);
  device.work();
  assert.deepEqual(news(), ["read 0x10000 8"]);
});

test("a range that is not in the buffer copies nothing, whatever it is made of", () => {
  const { device, write, write64, read, memory, news } = rig();
  const ranges: readonly (readonly [at: readonly [number, number], bytes: readonly [number, number]])[] = [
    [
      [BUFFER - 1, 0],
      [1, 0],
    ],
    [
      [BUFFER, 0],
      [4097, 0],
    ],
    [
      [BUFFER + 4096, 0],
      [1, 0],
    ],
    [
      [BUFFER, 0],
      [0, 1],
    ],
    [
      [BUFFER, 1],
      [1, 0],
    ],
    [
      [0xffffffff, 0xffffffff],
      [2, 0],
    ],
    [
      [BUFFER, 0],
      [0xffffffff, 0xffffffff],
    ],
    [
      [BUFFER + 1, 0],
      [0xffffffff, 0xffffffff],
    ],
    [
      [0, 0],
      [0, 0],
    ],
  ];
  for (const [at, bytes] of ranges) {
    for (const toMemory of [true, false]) {
      write64(toMemory ? SOURCE : TARGET, ...at);
      write64(toMemory ? TARGET : SOURCE, 0x10000, 0);
      write64(COUNT, ...bytes);
      write(COMMAND, toMemory ? 3 : 1);
      device.work();
      assert.equal(read(COMMAND) & 1, 0, "it ends as ever");
      const said = news();
      assert.equal(said.length, 1);
      assert.match(said[0]!, /^warn the guest copies .* nothing is copied$/);
    }
  }
  assert.ok(memory.every((byte) => byte === 0xaa));
});

test("bus addresses are cut to the mask", () => {
  const { device, write, write64, news } = rig();
  write64(SOURCE, 0xf0010004, 0x12345);
  write(TARGET, BUFFER);
  write(COUNT, 4);
  write(COMMAND, 1);
  device.work();
  assert.deepEqual(news(), [
    "warn bus address 0x12345f0010004 is beyond its DMA mask: it takes 0x10004; has the driver set its mask (dma_set_mask)?",
    "read 0x10004 4",
  ]);
  const wide = rig({ dma_mask: "0xffffffffffffffff" });
  wide.write64(SOURCE, 0xf0010004, 0xffff);
  wide.write(TARGET, BUFFER);
  wide.write(COUNT, 4);
  wide.write(COMMAND, 1);
  wide.device.work();
  assert.deepEqual(wide.news(), ["read 0xfffff0010004 4"]);
});

test("a refused read leaves the buffer as it was", () => {
  const { memory, copy } = rig();
  memory.write("old", 0);
  copy(0x10000, BUFFER, 3, 1);
  copy(0x5000, BUFFER, 3, 1);
  copy(BUFFER, 0x10100, 3, 3);
  assert.equal(memory.toString("latin1", 0x100, 0x103), "old");
});

test("accesses of other sizes and to nowhere do nothing", () => {
  const { device, read, write, news } = rig();
  write(0x04, 0x55);
  for (const bytes of [1, 2] as const) {
    for (let offset = 0; offset < 0x100; offset += bytes) {
      device.write(0, offset, bytes, 1);
      assert.equal(device.read(0, offset, bytes), 2 ** (8 * bytes) - 1);
    }
  }
  for (const offset of [0x0c, 0x28, 0x5c, 0xa0, 0x40000, 0xffffc]) {
    write(offset, 1);
    assert.equal(read(offset), 0xffffffff);
  }
  device.work();
  assert.deepEqual(news(), []);
  assert.equal(read(0x04), 0xffffffaa);
});

test("a reset forgets everything", () => {
  const { device, read, write, copy, memory, news } = rig();
  memory.write("secret", 0);
  copy(0x10000, BUFFER, 6, 5);
  write(0x04, 1);
  write(0x20, 0x80);
  write(0x08, 5);
  write(COMMAND, 1);
  news();
  device.reset();
  device.work();
  assert.deepEqual(news(), [], "what waited is not done");
  for (const offset of [0x04, 0x08, 0x20, 0x24, SOURCE, TARGET, COUNT, COMMAND])
    assert.equal(read(offset), 0);
  copy(BUFFER, 0x10100, 6, 3);
  assert.ok(memory.subarray(0x100, 0x106).every((byte) => byte === 0));
});

test("masks that are none", () => {
  for (const text of ["", "x", "-1", "0x", "1.5", "0x10000000000000000", "18446744073709551616"])
    assert.throws(() => edu.parse({ dma_mask: text }), text);
  assert.throws(() => edu.parse({ mask: "1" }));
  assert.deepEqual(edu.parse({}), edu.parse({ dma_mask: "268435455" }));
});

test.run();
