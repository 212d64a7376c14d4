// A guest that does everything wrong: registers, doorbells, queue entries, PRP lists and SGLs at random, most of them
// nearly right, with memory that comes and goes under the controller. PVDMA_SEED=n repeats one seed: with even ones file
// operations are done when they begin, so that all is the same again; with odd ones they are done by Node's threads, and
// what two of them at one place leave in the file is chance.

import assert from "node:assert/strict";
import fs from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import type { FileNatives } from "../../iommu-emul/device.js";
import { sized } from "../soak.js";
import type { Fields } from "./support/nvme-guest.js";
import { Random, seeds } from "./support/random.js";

let atOnce = false;
/** The function's promise form, or the synchronous function while `atOnce`. */
function choose(name: "read" | "write" | "fdatasync", sync: (...how: never[]) => unknown): void {
  const pooled = promisify(fs[name]) as (...how: never[]) => Promise<unknown>;
  const either = async (...how: never[]) => (atOnce ? sync(...how) : pooled(...how));
  Object.defineProperty(fs[name], promisify.custom, { value: either });
}
type Place = [fd: number, buffer: Buffer, at: number, bytes: number, offset: number];
choose("read", (...how: Place) => ({ bytesRead: fs.readSync(...how) }));
choose("write", (...how: Place) => ({ bytesWritten: fs.writeSync(...how) }));
choose("fdatasync", (fd: number) => fs.fdatasyncSync(fd));

// After the functions were replaced: the file takes them when it is loaded.
const { NvmeController } = await import("../../iommu-emul/nvme/controller.js");
const { ALWAYS_CACHED, CC_ENABLE, GuestQueue, NATIVES, NvmeGuest, PAGE } = await import(
  "./support/nvme-guest.js"
);
type NvmeController = InstanceType<typeof NvmeController>;
type NvmeGuest = InstanceType<typeof NvmeGuest>;
type GuestQueue = InstanceType<typeof GuestQueue>;

/** Commands in all, over all seeds. */
const COMMANDS = sized(16_000, 1_200_000);
const SEEDS = sized(4, 12);
const DISK_BYTES = 2 ** 20;
const BLOCKS = DISK_BYTES / 512;
const POOL_PAGES = 48;
const IO_OPCODES = [0, 1, 1, 1, 2, 2, 2, 5, 8, 9, 12];
const ADMIN_OPCODES = [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 0x7c];

const { readCached: _, readCachedInto: __, ...BUFFERED } = NATIVES;

class Fuzz {
  readonly guest: NvmeGuest;
  readonly #random: Random;
  readonly #pool: number;
  readonly #readOnly: number;
  readonly #writeOnly: number;
  readonly #readOnlyBefore: Buffer;
  /** Pages that are unmapped and mapped again. */
  readonly #flickering: number;
  #queues: GuestQueue[];
  readonly controller: NvmeController;
  resets = 0;
  fatal = 0;
  /** Completions by status, for those the fuzzer looks at. */
  readonly statuses = new Map<number, number>();

  constructor(seed: number) {
    this.#random = new Random(seed);
    atOnce = seed % 2 === 0;
    // Nothing that differs from run to run may get into guest memory, where it could become a command: so a serial
    // number of its own, a clock that counts, and reads that do not depend on what happens to be cached.
    let clock = 0;
    performance.now = () => clock++;
    const natives: FileNatives = (seed & 2) === 0 ? ALWAYS_CACHED : BUFFERED;
    this.guest = new NvmeGuest({ bytes: DISK_BYTES, cpus: 3, memoryPages: 512, serial: "fuzz", natives });
    const { guest } = this;
    assert.ok(guest.device instanceof NvmeController);
    this.controller = guest.device;
    fs.writeFileSync(join(guest.directory, "neighbour"), Buffer.alloc(65536, 0x5a));
    this.#pool = guest.map(POOL_PAGES);
    this.#readOnly = guest.map(2, MAP_FLAG.read);
    this.#readOnlyBefore = guest.peek(this.#readOnly, 2 * PAGE);
    this.#writeOnly = guest.map(2, MAP_FLAG.write);
    this.#flickering = guest.map(1);
    guest.start();
    this.#queues = [1, 2, 3].map((id) => new GuestQueue(guest, id, 32, 32));
    guest.hold();
  }

  #word(): number {
    return this.#random.next();
  }

  #address(): number {
    const random = this.#random;
    switch (random.below(12)) {
      case 0:
        return this.#readOnly + random.below(2 * PAGE);
      case 1:
        return this.#writeOnly + random.below(2 * PAGE);
      case 2:
        return this.#flickering;
      case 3:
        return this.#pool + (POOL_PAGES - 1 + random.below(4)) * PAGE;
      case 4:
        return this.#word() * 2 ** random.below(33);
      case 5:
        return this.#pool + random.below(POOL_PAGES * PAGE);
      case 6:
        return this.#pool + random.below((POOL_PAGES * PAGE) / 8) * 8;
      default:
        return this.#pool + random.below(POOL_PAGES) * PAGE;
    }
  }

  /** Fills a page of the pool with PRPs, SGL descriptors, dataset ranges, or anything. Its address. */
  #list(): number {
    const random = this.#random;
    const page = this.#pool + random.below(POOL_PAGES) * PAGE;
    // Some are as long as the largest transfer, and longer.
    const entries = random.oneIn(8) ? 100 + random.below(412) : 1 + random.below(24);
    const first = random.oneIn(3) ? 512 - entries : 0;
    const at = page + first * 8;
    switch (random.below(4)) {
      case 0:
        this.guest.poke64(at, ...Array.from({ length: entries }, () => this.#address()));
        break;
      case 1:
        for (let i = 0; i < entries; i++) {
          this.guest.poke64(at + i * 8, this.#pool + random.below(POOL_PAGES) * PAGE);
        }
        break;
      case 2:
        for (let i = 0; i < entries >> 1; i++) {
          const type = random.oneIn(4) ? random.pick([0x20, 0x30, 0x10, random.below(256)]) : 0;
          const bytes = random.oneIn(4) ? random.below(16) * 16 : 512;
          this.guest.pokeSgl(at + i * 16, [this.#address(), bytes, type]);
        }
        break;
      default:
        for (let i = 0; i < entries >> 1; i++) {
          this.guest.poke64(at + i * 16, random.below(16) * 2 ** 32, random.below(BLOCKS + 8));
        }
    }
    return at;
  }

  #io(): Fields {
    const random = this.#random;
    // Few and many; about as many as one transfer may be; anything.
    const most = random.pick([8, 8, 8, 8, 256, 256, 1400, 65536]);
    const blocks = most === 1400 ? 900 + random.below(500) : random.below(most);
    const first = random.oneIn(12)
      ? this.#word() * 2 ** random.below(33)
      : most === 1400
        ? random.below(8)
        : random.below(BLOCKS + 2);
    const flags = random.oneIn(6) ? random.pick([0x40, 0x80, random.below(256)]) : 0;
    const base: Fields = {
      opcode: random.oneIn(20) ? random.below(256) : random.pick(IO_OPCODES),
      nsid: random.oneIn(20) ? random.pick([0, 2, this.#word(), 0xffff_ffff]) : 1,
      flags,
      id: random.below(64),
      cdw10: first % 2 ** 32,
      cdw11: random.oneIn(4) ? 4 : Math.floor(first / 2 ** 32) % 2 ** 32,
      cdw12: (blocks | (random.oneIn(30) ? this.#word() & 0xffff_0000 : 0)) >>> 0,
      cdw13: random.oneIn(10) ? this.#word() : 0,
    };
    if ((flags & 0xc0) === 0 || random.oneIn(8)) {
      const list = blocks > 15 || random.oneIn(8);
      return { ...base, prp1: this.#address(), prp2: list ? this.#list() : this.#address() };
    }
    const type = random.pick([0x00, 0x00, 0x20, 0x30, 0x30, random.below(256)]);
    const bytes = type === 0 ? (blocks + 1) * 512 : random.below(20) * 16;
    return { ...base, sgl: [type === 0 ? this.#address() : this.#list(), bytes, type] };
  }

  #admin(): Fields {
    const random = this.#random;
    const id = random.below(5);
    const entries = random.oneIn(6) ? random.below(65536) : 31;
    const queue = this.#queues[id - 1];
    const opcode = random.oneIn(20) ? random.below(256) : random.pick(ADMIN_OPCODES);
    const base = { opcode, id: random.below(64), flags: random.oneIn(20) ? random.below(256) : 0 };
    const more = {
      nsid: random.pick([0, 1, 1, 0xffff_ffff, this.#word()]),
      cdw12: random.oneIn(8) ? this.#word() : random.below(4096),
      cdw13: random.oneIn(16) ? this.#word() : 0,
    };
    const make = random.oneIn(8) ? this.#word() : ((entries << 16) | id) >>> 0;
    switch (opcode) {
      case 1: {
        const cdw11 = random.oneIn(8) ? this.#word() : (id << 16) | 1;
        return { ...base, ...more, prp1: queue?.sq ?? this.#address(), cdw10: make, cdw11 };
      }
      case 5: {
        const cdw11 = random.oneIn(8) ? this.#word() : (random.below(5) << 16) | 3;
        return { ...base, ...more, prp1: queue?.cq ?? this.#address(), cdw10: make, cdw11 };
      }
      case 0:
      case 4:
        return { ...base, ...more, cdw10: random.oneIn(4) ? this.#word() : id };
      case 8:
        return { ...base, cdw10: ((random.below(64) << 16) | random.below(4)) >>> 0 };
      default: {
        const small = random.below(16) | (random.below(2048) << 16);
        const data = { prp1: this.#address(), prp2: random.oneIn(2) ? this.#address() : this.#list() };
        const cdw10 = random.oneIn(8) ? this.#word() : small >>> 0;
        const cdw11 = random.oneIn(2) ? this.#word() : random.below(8);
        return { ...base, ...more, ...data, cdw10, cdw11 };
      }
    }
  }

  /** Puts up to 16 commands in, and says so: mostly the truth. */
  #submit(): void {
    const random = this.#random;
    const queue = random.oneIn(6) ? this.guest.admin : random.pick(this.#queues);
    const count = 1 + random.below(16);
    for (let i = 0; i < count; i++) {
      if (random.oneIn(40)) {
        // The entry as it is: an old command, or whatever this makes of it.
        this.guest.poke64(queue.sq + queue.tail * 64 + random.below(8) * 8, this.#word() * 2 ** 21);
        queue.tail = (queue.tail + 1) % queue.entries;
      } else queue.put(queue.id === 0 ? this.#admin() : this.#io());
    }
    if (random.oneIn(50)) this.guest.setReg(0x1000 + queue.id * 8, this.#word() >>> random.below(32));
    else queue.ring();
  }

  #register(): void {
    const random = this.#random;
    const bytes = random.pick([1, 2, 4] as const);
    const offset = random.oneIn(2) ? random.below(16) * 4 : random.below(0x4000 / bytes) * bytes;
    this.guest.device.read(0, offset - (offset % bytes), bytes);
    const value = random.oneIn(2) ? this.#word() : random.below(64);
    // CC comes from #control, or the controller would be off most of the time.
    if (offset - (offset % bytes) !== 0x14 || random.oneIn(20)) {
      this.guest.device.write(
        0,
        offset - (offset % bytes),
        bytes,
        bytes === 4 ? value : value % 2 ** (bytes * 8),
      );
    }
    if (random.oneIn(4)) {
      const doorbell = 0x1000 + random.below(10) * 4;
      this.guest.setReg(doorbell, random.oneIn(4) ? this.#word() : random.below(33));
    }
  }

  #control(): void {
    const random = this.#random;
    switch (random.below(8)) {
      case 0:
        this.guest.setReg(0x14, random.oneIn(2) ? this.#word() : CC_ENABLE | (random.below(4) << 14));
        break;
      case 1:
        this.guest.device.reset();
        break;
      case 2: {
        this.guest.setBusMaster(false);
        this.#submit();
        this.guest.runNow();
        this.guest.setBusMaster(true);
        break;
      }
      case 3:
        this.guest.unmap(this.#flickering, 1);
        this.#submit();
        this.guest.runNow();
        this.guest.remap(this.#flickering);
        break;
      default:
        this.guest.device.work();
    }
  }

  /** As a driver would come back from anything. */
  async restart(): Promise<void> {
    const { guest } = this;
    this.resets++;
    guest.setReg(0x14, 0);
    await guest.settle();
    guest.start();
    assert.equal(guest.reg(0x1c), 1, "ready after a reset");
    for (const queue of this.#queues) queue.restart();
    if (this.#random.oneIn(8)) return;
    for (const { id, sq, cq } of this.#queues) {
      guest.admin.put({ opcode: 5, prp1: cq, cdw10: (31 << 16) | id, cdw11: (id << 16) | 3 });
      guest.admin.put({ opcode: 1, prp1: sq, cdw10: (31 << 16) | id, cdw11: (id << 16) | 1 });
    }
    if (this.#random.oneIn(2)) {
      const prp1 = this.#pool;
      guest.admin.put({ opcode: 0x7c, prp1, prp2: prp1 + PAGE });
    }
    guest.admin.ring();
    guest.runNow();
    for (const { status } of guest.admin.take()) assert.equal(status, 0);
  }

  /** One thing after the other, until `commands` were fetched. */
  async run(commands: number): Promise<void> {
    const { guest } = this;
    const random = this.#random;
    let checked = 0;
    await this.restart();
    while (this.controller.health.commands < commands) {
      if (random.oneIn(30)) this.#register();
      if (random.oneIn(150)) this.#control();
      this.#submit();
      if (!random.oneIn(4)) guest.runNow();
      if (random.oneIn(6)) await guest.settle();
      for (const queue of [guest.admin, ...this.#queues]) {
        if (random.oneIn(12)) continue;
        // What a queue's memory holds was written by the fuzzer as well: at most all of it is taken.
        for (let i = 0; i < queue.entries; i++) {
          const completion = queue.next();
          if (completion === undefined) break;
          this.statuses.set(completion.status, (this.statuses.get(completion.status) ?? 0) + 1);
        }
        guest.setReg(0x1004 + queue.id * 8, queue.head);
      }
      if ((guest.reg(0x1c) & 2) !== 0) this.fatal++;
      if (guest.reg(0x1c) !== 1 || random.oneIn(100)) await this.restart();
      if (this.controller.health.commands - checked > 20_000) {
        checked = this.controller.health.commands;
        this.check();
      }
    }
    await guest.settle();
    this.check();
  }

  /** Nothing was touched that was not the controller's to touch. */
  check(): void {
    const { guest } = this;
    guest.checkCanaries();
    assert.ok(
      guest.peek(this.#readOnly, 2 * PAGE).equals(this.#readOnlyBefore),
      "read-only memory was written",
    );
    assert.equal(fs.statSync(guest.path).size, DISK_BYTES);
    assert.deepEqual(fs.readdirSync(guest.directory).sort(), ["disk.img", "neighbour"]);
    assert.ok(fs.readFileSync(join(guest.directory, "neighbour")).equals(Buffer.alloc(65536, 0x5a)));
    assert.deepEqual(guest.warnings, []);
  }

  /** After a reset it is a disk like any other. */
  async use(): Promise<void> {
    const { guest } = this;
    guest.setReg(0x14, 0);
    await guest.settle();
    guest.release();
    guest.start();
    const io = await guest.createQueue(1);
    const data = guest.map(2);
    for (let first = 0; first < BLOCKS; first += 64) {
      guest.poke(data, Buffer.alloc(PAGE, first + 1));
      assert.equal((await io.do({ opcode: 1, nsid: 1, prp1: data, cdw10: first, cdw12: 7 })).status, 0);
      assert.equal(
        (await io.do({ opcode: 2, nsid: 1, prp1: data + PAGE, cdw10: first, cdw12: 7 })).status,
        0,
      );
      assert.ok(guest.peek(data + PAGE, PAGE).equals(Buffer.alloc(PAGE, first + 1)));
    }
    assert.equal((await io.do({ opcode: 0, nsid: 1 })).status, 0);
  }
}

const fuzz = suite("nvme: a guest that does everything wrong");

const all = seeds(SEEDS);
for (const seed of all) {
  fuzz(`seed ${seed}: no crash, nothing touched that is not its own, usable after a reset`, async () => {
    const one = new Fuzz(seed);
    try {
      await one.run(Math.ceil(COMMANDS / all.length));
      await one.use();
      one.check();
    } catch (error) {
      throw new Error(`PVDMA_SEED=${seed} repeats this: ${(error as Error).stack}`);
    }
    const { commands } = one.controller.health;
    const seen = [...one.statuses].sort(([a], [b]) => a - b);
    console.log(
      `seed ${seed}: ${commands} commands, ${one.resets} resets, ${one.fatal} times fatal, statuses ` +
        seen.map(([status, count]) => `${status.toString(16)}:${count}`).join(" "),
    );
    // A fuzzer that gets nowhere finds nothing.
    assert.ok((one.statuses.get(0) ?? 0) > commands / 50, "commands that succeed");
    assert.ok(one.statuses.size > 20, "statuses of all kinds");
    await one.guest.close();
  });
}

fuzz.run();
