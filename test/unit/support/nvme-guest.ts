// A guest's side of an NVMe controller, without a machine: memory behind the software IOMMU, queues, doorbells. Every
// second page of the memory is never mapped and holds a pattern that must not change. Addresses are IOVAs, not those of
// the memory.

import assert from "node:assert/strict";
import fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import koffi from "koffi";
import { MAP_FLAG } from "../../../hypercalls/abi.js";
import { hva, iova } from "../../../hypercalls/addresses.js";
import type { DeviceHost, DmaPort, EmulatedDevice, FileNatives } from "../../../iommu-emul/device.js";
import { SoftDmaPort } from "../../../iommu-emul/dma-port.js";
import { SoftIommu } from "../../../iommu-emul/iommu.js";
import { type NvmeOptions, nvme } from "../../../iommu-emul/nvme/model.js";
import {
  addressOf,
  lockFile,
  punchHole,
  readCached,
  readCachedInto,
  writeAt,
} from "../../../vmm/native/libc.js";

export const PAGE = 4096;
/** Mappings begin above 4 GiB, so that both halves of an address count. */
const IOVA = 2 ** 33;
const RW = MAP_FLAG.read | MAP_FLAG.write;

/** What the machine injects. */
export const NATIVES: FileNatives = {
  addressOf: (buffer) => addressOf(buffer),
  readCached,
  readCachedInto,
  write: writeAt,
  punchHole,
  lock: lockFile,
};

const libc = koffi.load("libc.so.6");
const pread = libc.func("pread", "int64_t", ["int", "uintptr_t", "size_t", "int64_t"]);
const preadv = libc.func("preadv", "int64_t", ["int", "uintptr_t", "int", "int64_t"]);
/** Reads into memory, of the guest too, that do not depend on what happens to be cached: they wait for the disk. */
export const ALWAYS_CACHED: FileNatives = {
  ...NATIVES,
  readCached: (...how) => Number(pread(...how)),
  readCachedInto: (...how) => Number(preadv(...how)),
};

export interface Completion {
  /** Status code and type, without More and Do Not Retry. */
  readonly status: number;
  readonly doNotRetry: boolean;
  readonly result: number;
  readonly id: number;
  readonly queue: number;
  readonly head: number;
}

/** Fields of a submission queue entry; those left out are 0. */
export interface Fields {
  readonly opcode: number;
  readonly id?: number;
  readonly nsid?: number;
  /** FUSE and PSDT: bits 8 to 15 of word 0. */
  readonly flags?: number;
  readonly prp1?: number;
  readonly prp2?: number;
  /** Words 6 to 9 as an SGL descriptor, instead of PRPs. */
  readonly sgl?: readonly [address: number, bytes: number, type: number];
  readonly cdw10?: number;
  readonly cdw11?: number;
  readonly cdw12?: number;
  readonly cdw13?: number;
  readonly cdw14?: number;
  readonly cdw15?: number;
}

export class NvmeGuest {
  readonly memory: Buffer;
  /** Where it really is: system calls reach it too. */
  readonly #hva: number;
  readonly #before: Buffer;
  readonly iommu: SoftIommu;
  readonly #iommuMemory: SharedArrayBuffer;
  readonly path: string;
  readonly directory: string;
  readonly device: EmulatedDevice;
  readonly dma: DmaPort;
  readonly interrupts: number[] = [];
  readonly warnings: string[] = [];
  /** Pages of memory by IOVA page, for those that are mapped. */
  readonly #pages = new Map<number, number>();
  #nextMemoryPage = 0;
  #nextIovaPage = IOVA / PAGE;
  #nextId = 0;
  #later = 0;
  /** While set, results of file operations are kept back. */
  #held: { readonly order: number; readonly done: () => void }[] | undefined;
  #operations = 0;
  #wake: (() => void) | undefined;
  admin!: GuestQueue;

  constructor(
    options: Partial<NvmeOptions> & {
      readonly cpus?: number;
      readonly natives?: FileNatives;
      readonly memoryPages?: number;
      readonly dma?: (port: DmaPort) => DmaPort;
    } = {},
  ) {
    const bytes = (options.memoryPages ?? 4096) * PAGE;
    const room = Buffer.allocUnsafeSlow(bytes + PAGE);
    const start = PAGE - (addressOf(room) % PAGE);
    this.memory = room.subarray(start, start + bytes);
    const words = new Uint32Array(room.buffer, room.byteOffset + start, bytes / 4);
    for (let i = 0; i < words.length; i++) words[i] = Math.imul(i + 1, 0x9e3779b1);
    this.#before = Buffer.from(this.memory);
    this.#hva = addressOf(this.memory);
    this.#iommuMemory = SoftIommu.create({ memory: [{ hva: hva(this.#hva), bytes }], lanes: 1 });
    this.iommu = new SoftIommu(this.#iommuMemory);
    this.iommu.setBusMaster(0, true);
    const natives = options.natives ?? NATIVES;
    const window = (at: number, length: number) =>
      this.memory.subarray(at - this.#hva, at - this.#hva + length);
    const port = new SoftDmaPort(this.#iommuMemory, 0, window, natives.addressOf);
    this.dma = options.dma?.(port) ?? port;
    this.directory = fs.mkdtempSync(join(tmpdir(), "pvdma-nvme-"));
    this.path = options.file ?? join(this.directory, "disk.img");
    const machine = { cpus: options.cpus ?? 4 };
    const settings: NvmeOptions = {
      bytes: options.file === undefined ? 16 * 2 ** 20 : undefined,
      readonly: false,
      blockBytes: 512,
      serial: undefined,
      ...options,
      file: this.path,
    };
    nvme.check(settings);
    this.device = nvme.create(settings, this.#host(natives), machine);
  }

  #host(natives: FileNatives): DeviceHost {
    return {
      dma: this.dma,
      natives,
      interrupt: (vector) => this.interrupts.push(vector),
      later: (operation, then, failed) => {
        this.#later++;
        const order = this.#operations++;
        const deliver = (run: () => void) => {
          const done = () => {
            this.#later--;
            run();
            this.#wake?.();
          };
          if (this.#held === undefined) done();
          else this.#held.push({ order, done });
        };
        operation.then(
          (result) => deliver(() => then(result)),
          (error: Error) => deliver(() => failed(error)),
        );
      },
      warn: (line) => this.warnings.push(line),
    };
  }

  /** Ends the device and removes its file's directory. */
  async close(): Promise<void> {
    await this.device.close();
    fs.rmSync(this.directory, { recursive: true });
  }

  // Memory.

  /** Maps `pages` pages that follow each other as IOVAs and not in memory. */
  map(pages: number, access = RW): number {
    const at = this.#nextIovaPage * PAGE;
    for (let i = 0; i < pages; i++) {
      const memoryPage = this.#nextMemoryPage;
      this.#nextMemoryPage += 2;
      assert.ok(this.#nextMemoryPage * PAGE <= this.memory.length, "the test's memory is used up");
      const page = this.#nextIovaPage++;
      assert.equal(this.iommu.map(iova(page * PAGE), hva(this.#hva + memoryPage * PAGE), PAGE, access), 0);
      this.#pages.set(page, memoryPage);
    }
    // What follows is not mapped.
    this.#nextIovaPage += 3;
    return at;
  }

  /** The device reaches the pages no more; the test still does. */
  unmap(at: number, pages: number): void {
    assert.equal(this.iommu.unmap(iova(at), pages * PAGE), pages * PAGE);
  }

  /** A page that was unmapped, at its old address. */
  remap(at: number): void {
    const memoryPage = this.#pages.get(at / PAGE)!;
    assert.equal(this.iommu.map(iova(at), hva(this.#hva + memoryPage * PAGE), PAGE, RW), 0);
  }

  setBusMaster(on: boolean): void {
    this.iommu.setBusMaster(0, on);
  }

  #memoryAt(at: number): number {
    const page = this.#pages.get(Math.floor(at / PAGE));
    assert.ok(page !== undefined, `the test's address ${at.toString(16)} is not mapped`);
    return page * PAGE + (at % PAGE);
  }

  poke(at: number, bytes: Buffer): void {
    for (let done = 0; done < bytes.length; ) {
      const piece = Math.min(PAGE - ((at + done) % PAGE), bytes.length - done);
      bytes.copy(this.memory, this.#memoryAt(at + done), done, done + piece);
      done += piece;
    }
  }

  peek(at: number, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const piece = Math.min(PAGE - ((at + done) % PAGE), length - done);
      const from = this.#memoryAt(at + done);
      this.memory.copy(bytes, done, from, from + piece);
      done += piece;
    }
    return bytes;
  }

  poke64(at: number, ...values: number[]): void {
    const bytes = Buffer.alloc(values.length * 8);
    values.forEach((value, i) => {
      bytes.writeUInt32LE(value % 2 ** 32, i * 8);
      bytes.writeUInt32LE(Math.floor(value / 2 ** 32), i * 8 + 4);
    });
    this.poke(at, bytes);
  }

  /** SGL descriptors side by side. */
  pokeSgl(at: number, ...list: (readonly [address: number, bytes: number, type: number])[]): void {
    list.forEach(([address, bytes, type], i) => {
      this.poke64(at + i * 16, address);
      const half = Buffer.alloc(8);
      half.writeUInt32LE(bytes, 0);
      half[7] = type;
      this.poke(at + i * 16 + 8, half);
    });
  }

  /** Memory that was never mapped is as it was. */
  checkCanaries(): void {
    for (let page = 0; page < this.memory.length / PAGE; page++) {
      if (page % 2 === 0 && page < this.#nextMemoryPage) continue;
      const at = page * PAGE;
      if (this.memory.compare(this.#before, at, at + PAGE, at, at + PAGE) !== 0) {
        throw new Error(`memory page ${page}, which is not mapped, was written`);
      }
    }
  }

  // The device.

  reg(offset: number): number {
    return this.device.read(0, offset, 4);
  }
  setReg(offset: number, value: number): void {
    this.device.write(0, offset, 4, value);
  }

  /** Work until there is none, without waiting for file operations. */
  runNow(): void {
    for (let calls = 0; this.device.work(); calls++) assert.ok(calls < 100_000, "work() never ends");
  }

  /** Work until there is none and no file operation is under way. */
  async run(): Promise<void> {
    for (;;) {
      this.runNow();
      if (this.#later === 0) return;
      await this.#nextEvent();
    }
  }

  /** Work until `done`, across file operations. */
  async runUntil(done: () => boolean): Promise<void> {
    for (;;) {
      this.runNow();
      if (done()) return;
      assert.ok(this.#later > 0, "nothing is under way that could bring it about");
      await this.#nextEvent();
    }
  }

  #nextEvent(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }

  get filesBusy(): number {
    return this.#later;
  }

  /** Keeps results of file operations back until release(). */
  hold(): void {
    this.#held = [];
  }
  /** As many operations are done, and their results are kept back. */
  async heldCount(count: number): Promise<void> {
    while (this.#held!.length < count) await new Promise(setImmediate);
  }
  /** Results come in the order in which their operations began. */
  release(): void {
    const held = this.#held ?? [];
    this.#held = undefined;
    held.sort((a, b) => a.order - b.order);
    for (const { done } of held) done();
  }

  /** While results are held back: all operations end, and their results come, in an order that is always the same. */
  async settle(): Promise<void> {
    while (this.#later > 0) {
      await this.heldCount(this.#later);
      this.release();
      this.hold();
      this.runNow();
    }
  }

  /** CC.EN with the admin queues of `entries`, as Linux does it. */
  start(entries = 32): void {
    this.setReg(0x14, 0);
    assert.equal(this.reg(0x1c) & 1, 0, "CSTS.RDY follows CC.EN");
    if (this.admin?.entries === entries) this.admin.restart();
    else this.admin = new GuestQueue(this, 0, entries, entries);
    this.setReg(0x24, ((entries - 1) << 16) | (entries - 1));
    this.setReg(0x28, this.admin.sq % 2 ** 32);
    this.setReg(0x2c, Math.floor(this.admin.sq / 2 ** 32));
    this.setReg(0x30, this.admin.cq % 2 ** 32);
    this.setReg(0x34, Math.floor(this.admin.cq / 2 ** 32));
    this.setReg(0x14, CC_ENABLE);
    this.runNow();
  }

  nextId(): number {
    this.#nextId = (this.#nextId + 1) % 0x10000;
    return this.#nextId;
  }

  /** Makes an I/O queue pair with interrupts. */
  async createQueue(id: number, entries = 64, vector = id): Promise<GuestQueue> {
    const queue = new GuestQueue(this, id, entries, entries);
    const size = ((entries - 1) << 16) | id;
    const cq = { opcode: 5, prp1: queue.cq, cdw10: size, cdw11: (vector << 16) | 3 };
    assert.equal((await this.admin.do(cq)).status, 0);
    const sq = { opcode: 1, prp1: queue.sq, cdw10: size, cdw11: (id << 16) | 1 };
    assert.equal((await this.admin.do(sq)).status, 0);
    return queue;
  }

  /** start(), and one I/O queue pair. */
  async ready(entries = 64): Promise<GuestQueue> {
    this.start();
    assert.equal(this.reg(0x1c), 1);
    return this.createQueue(1, entries);
  }
}

/** IOCQES 4, IOSQES 6, EN. */
export const CC_ENABLE = 0x0046_0001;

/** A pair of queues, from the guest's side. */
export class GuestQueue {
  readonly sq: number;
  readonly cq: number;
  tail = 0;
  head = 0;
  phase = 1;
  /** Doorbell registers written. */
  rings = 0;
  /** Shadow doorbell and event index pages. */
  shadow: { readonly doorbells: number; readonly events: number } | undefined;
  readonly #guest: NvmeGuest;
  readonly id: number;
  readonly entries: number;
  readonly #cqEntries: number;

  constructor(guest: NvmeGuest, id: number, entries: number, cqEntries: number) {
    this.#guest = guest;
    this.id = id;
    this.entries = entries;
    this.#cqEntries = cqEntries;
    this.sq = guest.map(Math.ceil((entries * 64) / PAGE));
    this.cq = guest.map(Math.ceil((cqEntries * 16) / PAGE));
    this.restart();
  }

  /** To the state in which a controller begins with it: phase tags are 0. */
  restart(): void {
    this.tail = 0;
    this.head = 0;
    this.phase = 1;
    this.shadow = undefined;
    this.#guest.poke(this.cq, Buffer.alloc(this.#cqEntries * 16));
  }

  /** Puts a command into the queue, without telling the controller. Its id. */
  put(fields: Fields): number {
    const entry = Buffer.alloc(64);
    const id = fields.id ?? this.#guest.nextId();
    entry.writeUInt32LE((fields.opcode | ((fields.flags ?? 0) << 8) | (id << 16)) >>> 0, 0);
    entry.writeUInt32LE(fields.nsid ?? 0, 4);
    const u64 = (at: number, value: number) => {
      entry.writeUInt32LE(value % 2 ** 32, at);
      entry.writeUInt32LE(Math.floor(value / 2 ** 32), at + 4);
    };
    if (fields.sgl === undefined) {
      u64(24, fields.prp1 ?? 0);
      u64(32, fields.prp2 ?? 0);
    } else {
      u64(24, fields.sgl[0]);
      entry.writeUInt32LE(fields.sgl[1], 32);
      entry[39] = fields.sgl[2];
    }
    const { cdw10, cdw11, cdw12, cdw13, cdw14, cdw15 } = fields;
    [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15].forEach((word, i) => {
      entry.writeUInt32LE((word ?? 0) >>> 0, 40 + i * 4);
    });
    this.#guest.poke(this.sq + this.tail * 64, entry);
    this.tail = (this.tail + 1) % this.entries;
    return id;
  }

  /** Tells the controller of the tail. */
  ring(): void {
    this.#tell(0, this.tail);
  }

  /** As Linux does it with shadow doorbells: the register only when the value passes the event index. */
  #tell(which: 0 | 1, value: number): void {
    const offset = this.id * 8 + which * 4;
    if (this.shadow !== undefined) {
      const word = Buffer.alloc(4);
      const old = this.#guest.peek(this.shadow.doorbells + offset, 4).readUInt32LE(0);
      word.writeUInt32LE(value, 0);
      this.#guest.poke(this.shadow.doorbells + offset, word);
      const event = this.#guest.peek(this.shadow.events + offset, 4).readUInt32LE(0);
      if (((value - event - 1) & 0xffff) >= ((value - old) & 0xffff)) return;
    }
    this.rings++;
    this.#guest.setReg(0x1000 + offset, value);
  }

  /** The completion at the head, if there is one. */
  peek(): Completion | undefined {
    const entry = this.#guest.peek(this.cq + this.head * 16, 16);
    const word = entry.readUInt32LE(12);
    if (((word >>> 16) & 1) !== this.phase) return undefined;
    return {
      status: (word >>> 17) & 0x7ff,
      doNotRetry: word >>> 31 === 1,
      result: entry.readUInt32LE(0),
      id: word & 0xffff,
      queue: entry.readUInt16LE(10),
      head: entry.readUInt16LE(8),
    };
  }

  /** Takes the completion at the head, without telling the controller. */
  next(): Completion | undefined {
    const completion = this.peek();
    if (completion === undefined) return undefined;
    this.head++;
    if (this.head === this.#cqEntries) {
      this.head = 0;
      this.phase ^= 1;
    }
    return completion;
  }

  /** Takes all there are, or so many, and tells the controller. */
  take(most = Number.POSITIVE_INFINITY): Completion[] {
    const taken: Completion[] = [];
    while (taken.length < most) {
      const next = this.next();
      if (next === undefined) break;
      taken.push(next);
    }
    if (taken.length > 0) this.#tell(1, this.head);
    return taken;
  }

  /** Puts commands in, rings once, and runs until they are completed: in their order. */
  async doAll(commands: readonly Fields[]): Promise<Completion[]> {
    const ids = commands.map((fields) => this.put(fields));
    this.ring();
    const got = new Map<number, Completion>();
    await this.#guest.runUntil(() => {
      for (const completion of this.take()) got.set(completion.id, completion);
      return ids.every((id) => got.has(id));
    });
    return ids.map((id) => got.get(id)!);
  }

  async do(fields: Fields): Promise<Completion> {
    return (await this.doAll([fields]))[0]!;
  }
}
