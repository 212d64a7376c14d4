// The controller (3, 7): registers, queues, and the order in which things are done. Commands are in admin-commands.ts
// and io-commands.ts. Guest memory is reached by the DmaPort only; the one file by BackingFile only.
//
// What a guest can get wrong ends in a status, an asynchronous event, or CSTS.CFS, and never here. A queue that cannot be
// read or written is fatal to the controller (9.5): the guest sees CFS, and resets it.

import type { AccessBytes, DeviceHost, DmaPort, EmulatedDevice } from "../device.js";
import { AdminCommands } from "./admin-commands.js";
import type { BackingFile } from "./backing-file.js";
import { type Command, CommandPool, PENDING } from "./command.js";
import type { ControllerCore } from "./core.js";
import { DoorbellBuffer } from "./doorbell-buffer.js";
import { AsyncEvents } from "./events.js";
import { Features } from "./features.js";
import { Health } from "./health.js";
import type { DiskIdentity } from "./identify.js";
import { IoCommands } from "./io-commands.js";
import { CompletionQueue, SubmissionQueue } from "./queues.js";
import {
  BAR0_BYTES,
  CAP_HIGH,
  CAP_LOW,
  CC,
  CQES_LOG2,
  CSTS,
  EVENT,
  MORE,
  PAGE,
  REG,
  SQE_BYTES,
  SQES_LOG2,
  STATUS,
  u64,
  VERSION,
} from "./spec.js";
import { Transfer } from "./transfer.js";

/** Commands fetched in one piece, at most. */
const FETCH_MAX = 16;
/** What one call of work() does: a command is 1, and 1 more for each of its 16 KiB. About a millisecond. */
const WORK_UNITS = 64;
const UNIT_SHIFT = 14;
/** A queue whose last burst moved more than this fetches its commands one at a time. */
const HEAVY_BYTES = 128 * 1024;
const EIO = 5;

export interface ControllerOptions {
  readonly disk: BackingFile;
  readonly identity: DiskIdentity;
  readonly blockBytes: number;
  /** Pairs, 1 to 511. */
  readonly ioQueues: number;
  readonly addressOf?: ((buffer: Buffer) => number) | undefined;
}

export class NvmeController implements EmulatedDevice, ControllerCore {
  readonly dma: DmaPort;
  readonly disk: BackingFile;
  readonly blockBytes: number;
  readonly ioQueues: number;
  readonly health = new Health();
  readonly events = new AsyncEvents();
  readonly features: Features;
  readonly transfer: Transfer;
  readonly doorbells: DoorbellBuffer;
  readonly submissionQueues: (SubmissionQueue | undefined)[];
  readonly completionQueues: (CompletionQueue | undefined)[];
  readonly #host: DeviceHost;
  readonly #pool: CommandPool;
  readonly #admin: AdminCommands;
  readonly #io: IoCommands;
  readonly #fetched = Buffer.alloc(FETCH_MAX * SQE_BYTES);
  readonly #fetchedWords = new Uint32Array(this.#fetched.buffer, this.#fetched.byteOffset, FETCH_MAX * 16);
  #cc = 0;
  #csts = 0;
  #aqa = 0;
  #asqLow = 0;
  #asqHigh = 0;
  #acqLow = 0;
  #acqHigh = 0;
  #interruptMask = 0;
  /** CC.EN was set; ready when the file operations of before are done. */
  #enabling = false;
  /** Of a shutdown: nothing more is fetched, what is under way ends, the file is stored. */
  #shutdown: "none" | "draining" | "storing" = "none";
  /** File operations under way, also those of commands whose controller was reset. */
  #operations = 0;
  /** Counts resets: a file operation that comes back to another one has nobody to tell. */
  #life = 0;
  #units = 0;
  /** Resolved when no operation is under way any more. */
  #drained: (() => void) | undefined;

  constructor(host: DeviceHost, options: ControllerOptions) {
    this.#host = host;
    this.dma = host.dma;
    this.disk = options.disk;
    this.blockBytes = options.blockBytes;
    this.ioQueues = options.ioQueues;
    this.features = new Features(options.ioQueues);
    this.transfer = new Transfer(host.dma);
    this.doorbells = new DoorbellBuffer(host.dma, options.ioQueues + 1);
    this.submissionQueues = new Array(options.ioQueues + 1).fill(undefined);
    this.completionQueues = new Array(options.ioQueues + 1).fill(undefined);
    this.#pool = new CommandPool(options.addressOf);
    this.#admin = new AdminCommands(this, options.identity);
    this.#io = new IoCommands(this);
  }

  get entrySizesSet(): boolean {
    return (
      ((this.#cc >>> CC.iosqesShift) & 0xf) === SQES_LOG2 &&
      ((this.#cc >>> CC.iocqesShift) & 0xf) === CQES_LOG2
    );
  }

  get commands(): readonly Command[] {
    return this.#pool.all;
  }

  // Registers (3.1).

  read(bar: number, offset: number, bytes: AccessBytes): number {
    if (bar !== 0) return 0;
    const word = this.#register(offset & ~3) >>> ((offset & 3) * 8);
    return bytes === 4 ? word >>> 0 : word & (2 ** (bytes * 8) - 1);
  }

  #register(offset: number): number {
    switch (offset) {
      case REG.capLow:
        return CAP_LOW;
      case REG.capHigh:
        return CAP_HIGH;
      case REG.version:
        return VERSION;
      case REG.intms:
      case REG.intmc:
        return this.#interruptMask;
      case REG.cc:
        return this.#cc;
      case REG.csts:
        return this.#csts;
      case REG.aqa:
        return this.#aqa;
      case REG.asqLow:
        return this.#asqLow;
      case REG.asqHigh:
        return this.#asqHigh;
      case REG.acqLow:
        return this.#acqLow;
      case REG.acqHigh:
        return this.#acqHigh;
      default:
        // Reserved, and doorbells, which read as nothing in particular.
        return 0;
    }
  }

  /** Registers are written by whole words (3.1); other accesses have no effect. */
  write(bar: number, offset: number, bytes: AccessBytes, value: number): void {
    if (bar !== 0 || bytes !== 4 || offset % 4 !== 0) return;
    if (offset >= REG.doorbells) {
      if (offset < BAR0_BYTES) this.#doorbell((offset - REG.doorbells) >>> 2, value >>> 0);
      return;
    }
    switch (offset) {
      case REG.intms:
        // For pin-based interrupts and MSI: with MSI-X it is only remembered (3.1.3).
        this.#interruptMask = (this.#interruptMask | value) >>> 0;
        return;
      case REG.intmc:
        this.#interruptMask = (this.#interruptMask & ~value) >>> 0;
        return;
      case REG.cc:
        this.#configure(value >>> 0);
        return;
      case REG.aqa:
        this.#aqa = value & 0x0fff_0fff;
        return;
      case REG.asqLow:
        this.#asqLow = (value & ~(PAGE - 1)) >>> 0;
        return;
      case REG.asqHigh:
        this.#asqHigh = value >>> 0;
        return;
      case REG.acqLow:
        this.#acqLow = (value & ~(PAGE - 1)) >>> 0;
        return;
      case REG.acqHigh:
        this.#acqHigh = value >>> 0;
        return;
    }
  }

  #configure(value: number): void {
    const before = this.#cc;
    this.#cc = (value & CC.all) >>> 0;
    if ((value & CC.enable) !== 0 && (before & CC.enable) === 0) this.#enable();
    else if ((value & CC.enable) === 0 && (before & CC.enable) !== 0) this.#stop();
    const shutdown = (value >>> CC.shnShift) & 3;
    if (shutdown === 1 || shutdown === 2) {
      if ((this.#csts & CSTS.shutdownMask) !== 0) return;
      this.#csts |= CSTS.shutdownBusy;
      this.#shutdown = "draining";
    }
  }

  /** 7.6.1. */
  #enable(): void {
    this.#csts = 0;
    this.#shutdown = "none";
    const entries = (this.#aqa & 0xfff) + 1;
    const completionEntries = (this.#aqa >>> 16) + 1;
    if ((this.#cc & CC.mustBeZero) !== 0 || entries < 2 || completionEntries < 2) {
      this.#csts = CSTS.fatal;
      return;
    }
    const completions = new CompletionQueue(0, u64(this.#acqLow, this.#acqHigh), completionEntries, 0, true);
    completions.users = 1;
    this.completionQueues[0] = completions;
    this.submissionQueues[0] = new SubmissionQueue(0, u64(this.#asqLow, this.#asqHigh), entries, completions);
    this.#enabling = true;
    this.#becomeReady();
  }

  /** A write of before the reset must not land on what the guest writes after it. */
  #becomeReady(): void {
    if (!this.#enabling || this.#operations > 0) return;
    this.#enabling = false;
    this.#csts |= CSTS.ready;
  }

  /** Controller reset (7.3.2): everything but the admin queues' registers. */
  #stop(): void {
    this.#life++;
    this.#enabling = false;
    this.#shutdown = "none";
    this.#csts = 0;
    this.#interruptMask = 0;
    this.submissionQueues.fill(undefined);
    this.completionQueues.fill(undefined);
    this.doorbells.disable();
    this.events.clear();
    this.features.reset();
    for (const command of this.#pool.all) {
      if (command.queue !== undefined && !command.waiting) this.#pool.give(command);
    }
  }

  reset(): void {
    if ((this.#csts & (CSTS.ready | CSTS.shutdownMask)) === CSTS.ready) this.health.unsafeShutdowns++;
    this.#stop();
    this.#cc = 0;
    this.#aqa = 0;
    this.#asqLow = 0;
    this.#asqHigh = 0;
    this.#acqLow = 0;
    this.#acqHigh = 0;
  }

  async close(): Promise<void> {
    this.reset();
    if (this.#operations > 0) {
      await new Promise<void>((resolve) => {
        this.#drained = resolve;
      });
    }
    await this.disk.close();
  }

  // Doorbells (3.1.24, 3.1.25, 7.13).

  get #running(): boolean {
    return (this.#csts & (CSTS.ready | CSTS.fatal)) === CSTS.ready;
  }

  #doorbell(index: number, value: number): void {
    if (!this.#running) return;
    const id = index >>> 1;
    const completion = (index & 1) !== 0;
    const queue = completion ? this.completionQueues[id] : this.submissionQueues[id];
    if (queue === undefined) {
      this.#doorbellError(EVENT.invalidDoorbell);
      return;
    }
    // Once its shadow was used, the register only says that there is something new, and may be older than the shadow.
    // Linux keeps no shadow for the admin queue.
    if (queue.shadowed) return;
    if (queue instanceof SubmissionQueue) this.#tailMoved(queue, value);
    else this.#headMoved(queue, value);
  }

  #tailMoved(queue: SubmissionQueue, tail: number): void {
    if (!queue.moveTail(tail)) this.#doorbellError(EVENT.invalidDoorbellValue);
  }

  #headMoved(queue: CompletionQueue, head: number): void {
    if (!queue.moveHead(head)) this.#doorbellError(EVENT.invalidDoorbellValue);
  }

  #doorbellError(event: number): void {
    this.health.failedAlone(STATUS.invalidField);
    this.events.raise(event);
  }

  adoptShadow(submission: SubmissionQueue | undefined, completion: CompletionQueue | undefined): void {
    if (!this.doorbells.enabled) return;
    if (submission !== undefined) {
      submission.shadowSeen = this.doorbells.tailOf(submission.id);
      submission.shadowed = false;
      submission.eventIndex = -1;
    }
    if (completion !== undefined) {
      completion.shadowSeen = this.doorbells.headOf(completion.id);
      completion.shadowed = false;
      completion.eventIndex = -1;
    }
  }

  /** Takes over what the guest wrote to the shadow doorbells. False when they cannot be read, which is fatal. */
  #lookAtShadow(): boolean {
    if (!this.doorbells.look()) {
      this.#fail();
      return false;
    }
    for (const queue of this.submissionQueues) {
      if (queue === undefined) continue;
      const tail = this.doorbells.tailOf(queue.id);
      if (tail === queue.shadowSeen) continue;
      queue.shadowSeen = tail;
      queue.shadowed = true;
      this.#tailMoved(queue, tail);
    }
    for (const queue of this.completionQueues) {
      if (queue === undefined) continue;
      const head = this.doorbells.headOf(queue.id);
      if (head === queue.shadowSeen) continue;
      queue.shadowSeen = head;
      queue.shadowed = true;
      this.#headMoved(queue, head);
    }
    return true;
  }

  /**
   * Before resting: the guest is to write the register from here on. What it wrote while it did not know is seen by a
   * second look. True when there is something after all.
   */
  #armDoorbells(): boolean {
    if (!this.doorbells.enabled) return false;
    let armed = false;
    for (const queue of this.submissionQueues) {
      if (queue === undefined || queue.eventIndex === queue.tail) continue;
      queue.eventIndex = queue.tail;
      armed = true;
      if (!this.doorbells.setTailEvent(queue.id, queue.tail)) return this.#fail();
    }
    for (const queue of this.completionQueues) {
      // A head is of interest only where there is no place for a completion.
      if (queue === undefined || queue.room > 0 || queue.eventIndex === queue.head) continue;
      queue.eventIndex = queue.head;
      armed = true;
      if (!this.doorbells.setHeadEvent(queue.id, queue.head)) return this.#fail();
    }
    if (!armed) return false;
    this.doorbells.fence();
    return this.#lookAtShadow() && this.#somethingToFetch();
  }

  // Work.

  work(): boolean {
    this.#becomeReady();
    if (this.#shutdown !== "none") this.#goOnWithShutdown();
    if (!this.#running) return false;
    const started = performance.now();
    if (this.doorbells.enabled && !this.#lookAtShadow()) return false;
    this.#units = WORK_UNITS;
    let more = false;
    do {
      more = false;
      for (const queue of this.submissionQueues) {
        if (queue === undefined || !this.#fetchable(queue)) continue;
        more = true;
        this.#serve(queue);
        if (!this.#running) return false;
        if (this.#units <= 0) break;
      }
    } while (more && this.#units > 0);
    this.#answerEvents();
    this.#flush();
    if (!this.#running) return false;
    this.health.busyMs += performance.now() - started;
    return more || this.#armDoorbells();
  }

  #fetchable(queue: SubmissionQueue): boolean {
    return (
      queue.head !== queue.tail &&
      queue.deletion === undefined &&
      this.#shutdown === "none" &&
      queue.completions.room > 0 &&
      this.#pool.free > 0
    );
  }

  #somethingToFetch(): boolean {
    return this.submissionQueues.some((queue) => queue !== undefined && this.#fetchable(queue));
  }

  /** Fetches commands of one queue, as many as there is room for, and begins them. */
  #serve(queue: SubmissionQueue): void {
    const completions = queue.completions;
    const count = Math.min(
      queue.waiting,
      queue.entries - queue.head,
      completions.room,
      this.#pool.free,
      queue.burst,
    );
    const from = queue.iova + queue.head * SQE_BYTES;
    if (this.dma.read(from, this.#fetched, 0, count * SQE_BYTES) !== 0) {
      this.#fail();
      return;
    }
    queue.head = (queue.head + count) % queue.entries;
    queue.underWay += count;
    this.health.commands += count;
    completions.reserved += count;
    let moved = 0;
    for (let i = 0; i < count; i++) {
      const command = this.#pool.take(queue);
      for (let word = 0; word < 16; word++) command.words[word] = this.#fetchedWords[i * 16 + word]!;
      const status = queue.id === 0 ? this.#admin.run(command) : this.#io.run(command);
      moved += command.bytes;
      if (status !== PENDING) this.complete(command, status);
      if (!this.#running) return;
    }
    queue.burst = moved > HEAVY_BYTES ? 1 : FETCH_MAX;
    this.#units -= count + (moved >>> UNIT_SHIFT);
  }

  complete(command: Command, status: number): void {
    const queue = command.queue!;
    if (status !== STATUS.ok) {
      this.health.failed(command, status | MORE);
      status |= MORE;
    }
    queue.underWay--;
    queue.completions.reserved--;
    if (!queue.completions.post(this.dma, command.result, queue, command.id, status)) this.#fail();
    if (command.waiting) command.aborted = true;
    else this.#pool.give(command);
    if (queue.deletion !== undefined && queue.underWay === 0) this.#admin.deleted(queue);
  }

  drop(command: Command): void {
    const queue = command.queue!;
    queue.underWay--;
    queue.completions.reserved--;
    this.#pool.give(command);
  }

  later(
    command: Command,
    operation: Promise<number>,
    then: (command: Command, errno: number) => number,
  ): number {
    const life = this.#life;
    command.waiting = true;
    this.#operations++;
    const ended = (errno: number): number => {
      this.#operations--;
      if (this.#operations === 0) this.#drained?.();
      return errno;
    };
    const settled = (errno: number): void => {
      command.waiting = false;
      if (life !== this.#life || command.aborted || !this.#running) {
        this.#pool.give(command);
        return;
      }
      const status = then(command, errno);
      if (status !== PENDING) this.complete(command, status);
    };
    const counted = operation.then(ended, () => ended(EIO));
    this.#host.later(counted, settled, () => settled(EIO));
    return PENDING;
  }

  /** Answers to event requests need a place of their own in the admin completion queue; they wait for it. */
  #answerEvents(): void {
    const queue = this.submissionQueues[0]!;
    while (this.events.waiting && queue.completions.room > 0) {
      const answer = this.events.take();
      if (answer === undefined) return;
      if (!queue.completions.post(this.dma, answer.result, queue, answer.commandId, answer.status)) {
        this.#fail();
        return;
      }
    }
  }

  /** The admin queue last: what it says of an I/O queue comes after what that queue said. */
  #flush(): void {
    for (let id = this.ioQueues; id >= 0; id--) {
      const queue = this.completionQueues[id];
      if (queue?.dirty) this.flush(queue);
    }
  }

  flush(queue: CompletionQueue): void {
    if (!queue.flush(this.dma)) this.#fail();
    else if (queue.interrupts) this.#host.interrupt(queue.vector);
  }

  /** CSTS.CFS (9.5): nothing more is done until the guest resets the controller. It is told if it can be. */
  #fail(): false {
    if ((this.#csts & CSTS.fatal) !== 0) return false;
    this.#csts |= CSTS.fatal;
    this.health.failedAlone(STATUS.internalError);
    this.events.raise(EVENT.persistentError);
    this.#answerEvents();
    const completions = this.completionQueues[0];
    if (completions?.dirty && completions.flush(this.dma)) this.#host.interrupt(0);
    return false;
  }

  /** 7.6.2. Commands that were fetched end first; then all that was written is stored. */
  #goOnWithShutdown(): void {
    if (this.#shutdown !== "draining" || this.#operations > 0) return;
    this.#shutdown = "storing";
    const life = this.#life;
    const done = (errno: number): void => {
      if (life !== this.#life) return;
      if (errno !== 0) this.health.mediaErrors++;
      if (errno !== 0) this.#host.warn(`errno ${errno} while the disk was stored for the guest's shutdown`);
      this.#csts = (this.#csts & ~CSTS.shutdownMask) | CSTS.shutdownDone;
    };
    if (this.disk.clean) done(0);
    else this.#host.later(this.disk.sync(), done, () => done(EIO));
  }
}
