// vmm/emul: register accesses on their way from vCPUs to an emulated device, with real threads on both sides, and the
// table that says which addresses are registers.

import assert from "node:assert/strict";
import { closeSync } from "node:fs";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import {
  COMMAND_CLOSE,
  COMMAND_RESET,
  createLink,
  LinkControl,
  LinkDevice,
  type LinkState,
  RegisterPort,
  RING_ENTRIES,
} from "../../vmm/emul/link.js";
import { RegisterLookup, RegisterMap } from "../../vmm/emul/register-map.js";
import { DeviceRegisters } from "../../vmm/emul/registers.js";
import { eventfd, readNow } from "../../vmm/native/libc.js";
import { CONTROL_STOP, controlWords, newVcpuControl } from "../../vmm/vcpu-link.js";
import { sized } from "../soak.js";
import type { LinkJob } from "./support/link-worker.js";

const worker = (job: LinkJob): Worker =>
  new Worker(new URL("./support/link-worker.js", import.meta.url), { workerData: job });
const ended = (thread: Worker) => new Promise<void>((resolve) => thread.once("exit", () => resolve()));
const message = (thread: Worker) =>
  new Promise<unknown>((resolve, reject) => thread.once("message", resolve).once("error", reject));

/** A vCPU's word that stops it. */
const stopWord = () => new Int32Array(new SharedArrayBuffer(4));
const portOf = (link: LinkState, stop = stopWord(), cpu = 0) => new RegisterPort(link, cpu, stop, 0);

/** A device's side that notes what it gets. */
function listener(link: LinkState) {
  const log: string[] = [];
  const device = new LinkDevice(link);
  const server = {
    read: (bar: number, offset: number, bytes: number) => {
      log.push(`read${bytes} ${bar}:${offset.toString(16)}`);
      return 0x12345678;
    },
    write: (bar: number, offset: number, bytes: number, value: number) => {
      log.push(`write${bytes} ${bar}:${offset.toString(16)} ${value.toString(16)}`);
    },
    command: (command: number) => {
      log.push(`command ${command}`);
    },
  };
  return { device, log, serve: () => device.serve(server) };
}

const ring = suite("emul: ring");

ring("writes arrive in order, whole, and unsigned", () => {
  const link = createLink(1, 1);
  const port = portOf(link);
  const { serve, log } = listener(link);
  port.write(0, 0, 4, 0xffffffff);
  port.write(5, 0xffffc, 2, 0x12345678);
  port.write(2, 2 ** 31 - 4, 1, -1);
  assert.deepEqual(log, [], "posted");
  serve();
  assert.deepEqual(log, ["write4 0:0 ffffffff", "write2 5:ffffc 5678", "write1 2:7ffffffc ff"]);
  serve();
  assert.equal(log.length, 3);
});

ring("it goes round, and head and tail wrap", () => {
  const link = createLink(1, 1);
  const words = new Int32Array(link.memory);
  words.fill(0x7ffffffe, 33, 34); // HEAD and TAIL, so that they pass the sign
  words.fill(0x7ffffffe, 49, 50);
  const port = portOf(link);
  const { serve, log } = listener(link);
  for (let round = 0; round < 5; round++) {
    for (let i = 0; i < RING_ENTRIES; i++) port.write(0, 4 * i, 4, round);
    serve();
    assert.equal(log.length, RING_ENTRIES);
    assert.deepEqual(
      log.splice(0),
      Array.from({ length: RING_ENTRIES }, (_, i) => `write4 0:${(4 * i).toString(16)} ${round}`),
    );
  }
});

ring("a full ring holds a write up; a stop, or the device's end, does away with it", () => {
  const link = createLink(1, 1);
  const stop = stopWord();
  const port = portOf(link, stop);
  const { serve, log } = listener(link);
  for (let i = 0; i < RING_ENTRIES; i++) port.write(0, 0, 4, i);
  stop[0] = 1;
  port.write(0, 0, 4, 0xdead);
  assert.equal(port.read(0, 0, 4), 0xffffffff);
  serve();
  assert.equal(log.length, RING_ENTRIES);
  stop[0] = 0;
  port.write(0, 8, 4, 1);
  serve();
  assert.equal(log.at(-1), "write4 0:8 1");
  new LinkControl(link).end();
  for (let i = 0; i < 2 * RING_ENTRIES; i++) port.write(0, 0, 4, i);
  for (const [bytes, ones] of [
    [1, 0xff],
    [2, 0xffff],
    [4, 0xffffffff],
  ] as const)
    assert.equal(port.read(0, 0, bytes), ones);
});

ring("the late answer to a read that was given up is not taken for that of the next", async () => {
  const link = createLink(1, 1);
  const stop = stopWord();
  const port = portOf(link, stop);
  // Given up while it waits: the thread that stops it is another one.
  const stopper = new Worker(
    `const { workerData } = require("node:worker_threads");
     Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50);
     Atomics.store(workerData, 0, 1);`,
    { eval: true, workerData: stop },
  );
  assert.equal(port.read(0, 4, 4), 0xffffffff, "stopped");
  await ended(stopper);
  stop[0] = 0;
  const device = worker({ role: "device", link, aside: false });
  port.write(0, 8, 4, 77);
  assert.equal(port.read(0, 8, 4), 77);
  new LinkControl(link).ask(COMMAND_CLOSE);
  await ended(device);
});

for (const aside of [false, true]) {
  const how = aside ? "that has other things to do" : "that sleeps";
  ring(`a read is answered after all that its vCPU wrote, by a device ${how}`, async () => {
    const cpus = 3;
    const link = createLink(cpus, 1);
    const device = worker({ role: "device", link, aside });
    const rounds = sized(20_000, 400_000);
    const writers = Array.from({ length: cpus }, (_, cpu) =>
      worker({ role: "writer", link, cpu, rounds, every: [1, 7, 1000][cpu]! }),
    );
    assert.deepEqual(await Promise.all(writers.map(message)), [0, 0, 0]);
    const port = portOf(link);
    assert.equal(port.read(5, 0, 4), cpus * rounds, "each write once");
    const control = new LinkControl(link);
    port.write(0, 8, 4, 5);
    assert.ok(control.command(COMMAND_RESET));
    assert.equal(port.read(0, 8, 4), 0, "the reset came after the write");
    control.ask(COMMAND_CLOSE);
    await ended(device);
    assert.ok(control.ended);
    assert.equal(control.command(COMMAND_RESET), false, "nobody is there");
    assert.equal(port.read(0, 8, 4), 0xffffffff);
  });
}

ring("vectors signal the eventfds they were given, and no longer when they are taken away", () => {
  const link = createLink(1, 3);
  const control = new LinkControl(link);
  const { device } = listener(link);
  const fds = [eventfd(), eventfd()];
  const count = new Uint8Array(8);
  const signalled = () => fds.map((fd) => (readNow(fd, count) > 0 ? count[0]! : 0));
  device.interrupt(0);
  control.setVectors(0, [fds[0]!, -1]);
  for (const vector of [0, 0, 1, 2]) device.interrupt(vector);
  assert.deepEqual(signalled(), [2, 0]);
  control.setVectors(2, [fds[1]!]);
  device.interrupt(2);
  assert.deepEqual(signalled(), [0, 1]);
  control.setVectors(0, [-1, -1, -1]);
  for (const fd of fds) closeSync(fd);
  for (const vector of [0, 1, 2]) device.interrupt(vector);
  assert.throws(() => control.setVectors(2, [1, 1]), RangeError);
  assert.throws(() => device.interrupt(3), RangeError);
  assert.throws(() => device.interrupt(-1), RangeError);
});

const map = suite("emul: register map");

map("finds what is there, where it is, and nothing else", () => {
  const table = new RegisterMap();
  const lookup = new RegisterLookup(table.memory);
  assert.equal(lookup.find(0xc0000000), false);
  table.add(0xc0000000, 2 ** 20, 0, 0);
  table.add(2 ** 45 + 0x4000, 0x4000, 30, 5);
  const at = (gpa: number) =>
    lookup.find(gpa) && [lookup.device, lookup.bar, lookup.offset, lookup.left].join();
  assert.equal(at(0xc0000000), `0,0,0,${2 ** 20}`);
  assert.equal(at(0xc00fffff), `0,0,${2 ** 20 - 1},1`);
  assert.equal(at(0xc0100000), false);
  assert.equal(at(0xbfffffff), false);
  assert.equal(at(2 ** 45 + 0x4004), `30,5,4,${0x4000 - 4}`);
  assert.equal(at(2 ** 45 + 0x8000), false);
  assert.equal(at(0x4004), false, "not modulo 2^44");
  assert.equal(at(2 ** 44 + 0xc0000000), false, "not modulo 2^44");
  table.remove(0xc0000000);
  assert.equal(at(0xc0000000), false);
  table.add(0xd0000000, 0x1000, 3, 2);
  assert.equal(at(0xd0000010), `3,2,16,${0x1000 - 16}`);
  assert.equal(at(2 ** 45 + 0x4004), `30,5,4,${0x4000 - 4}`);
  assert.equal(at(2 ** 64), false);
});

map("places are used again, and run out", () => {
  const table = new RegisterMap();
  for (let i = 0; i < 1000; i++) {
    table.add(0x1000 * i, 0x1000, 1, 1);
    table.remove(0x1000 * i);
  }
  for (let i = 0; i < 186; i++) table.add(0x1000 * i, 0x1000, 1, 1);
  assert.throws(() => table.add(2 ** 40, 0x1000, 1, 1), RangeError);
});

map("whoever looks while BARs move finds the right device, or none", () => {
  // Something happens to the table between any two of the reader's loads: what a thread that is held up there sees.
  const { load } = Atomics;
  const happenings: readonly ((table: RegisterMap) => void)[] = [
    (table) => {
      table.remove(0xc0000000);
      table.add(2 ** 40, 0x8000, 2, 2);
    },
    (table) => {
      table.remove(0xc0000000);
      table.add(0xbfffe000, 0x8000, 3, 3);
    },
    (table) => {
      for (let i = 0; i < 3; i++) {
        table.remove(0xc0000000);
        table.add(2 ** 41, 0x1000, 4, 4);
        table.remove(2 ** 41);
        table.add(0xc0000000, 0x4000, 1, 1);
      }
    },
  ];
  const seen = new Set<string>();
  for (const [which, happen] of happenings.entries()) {
    for (let at = 0; at < 16; at++) {
      const table = new RegisterMap();
      const lookup = new RegisterLookup(table.memory);
      table.add(0xc0000000, 0x4000, 1, 1);
      let loads = 0;
      try {
        Atomics.load = ((words: Int32Array, index: number) => {
          if (loads++ === at) {
            Atomics.load = load;
            happen(table);
          }
          return load(words, index);
        }) as typeof Atomics.load;
        const found = lookup.find(0xc0000010)
          ? `${lookup.device},${lookup.bar},${lookup.offset},${lookup.left}`
          : "none";
        seen.add(`${which} ${found}`);
      } finally {
        Atomics.load = load;
      }
    }
  }
  // The second range lies over the same address.
  const before = "1,1,16,16368";
  const right = [
    `0 ${before}`,
    "0 none",
    `1 ${before}`,
    "1 none",
    "1 3,3,8208,24560",
    `2 ${before}`,
    "2 none",
  ];
  assert.deepEqual([...seen].sort(), right.sort());
});

const accesses = suite("emul: accesses of a vCPU");

accesses("are cut into aligned pieces of at most 4 bytes, inside the BAR", () => {
  const link = createLink(1, 1);
  const table = new RegisterMap();
  table.add(0xc0000000, 0x1000, 0, 3);
  const control = newVcpuControl();
  const registers = new DeviceRegisters({ registerMap: table.memory, emulated: [link], index: 0, control });
  const { serve, log } = listener(link);
  const write = (offset: number, bytes: number) => {
    assert.ok(registers.find(0xc0000000 + offset));
    registers.write(bytes, 0x44332211, 0x88776655);
    serve();
    return log.splice(0).map((line) => line.replace("write", ""));
  };
  assert.deepEqual(write(0, 8), ["4 3:0 44332211", "4 3:4 88776655"]);
  assert.deepEqual(write(4, 4), ["4 3:4 44332211"]);
  assert.deepEqual(write(6, 2), ["2 3:6 2211"]);
  assert.deepEqual(write(7, 1), ["1 3:7 11"]);
  assert.deepEqual(write(2, 4), ["2 3:2 2211", "2 3:4 4433"]);
  assert.deepEqual(write(1, 4), ["1 3:1 11", "1 3:2 22", "1 3:3 33", "1 3:4 44"]);
  assert.deepEqual(write(4, 7), ["4 3:4 44332211", "2 3:8 6655", "1 3:a 77"]);
  assert.deepEqual(write(0xffc, 8), ["4 3:ffc 44332211"], "the rest is behind the BAR");
  assert.deepEqual(write(0xffe, 4), ["2 3:ffe 2211"]);
  // Every length at every offset: the bytes arrive where they belong, once.
  for (let offset = 0xff0; offset < 0x1000; offset++) {
    for (let bytes = 1; bytes <= 8; bytes++) {
      const seen = new Map<number, number>();
      for (const line of write(offset, bytes)) {
        const [, width, at, value] = /^(\d) 3:(\w+) (\w+)$/
          .exec(line)!
          .map((text) => Number.parseInt(text, 16));
        assert.equal(at! % width!, 0);
        for (let i = 0; i < width!; i++) {
          assert.ok(!seen.has(at! + i));
          seen.set(at! + i, Math.floor(value! / 2 ** (8 * i)) % 256);
        }
      }
      const wanted = Array.from({ length: bytes }, (_, i) => [offset + i, 0x11 * (i + 1)] as const);
      assert.deepEqual(
        [...seen],
        wanted.filter(([at]) => at < 0x1000),
      );
    }
  }
  // A device that is gone.
  Atomics.store(controlWords(control), CONTROL_STOP, 1);
  assert.ok(registers.find(0xc0000001));
  registers.read(7);
  assert.deepEqual([registers.low, registers.high], [0xffffffff, 0xffffff]);
});

for (const each of [ring, map, accesses]) each.run();
