// What the thread of an emulated device shares with the vCPUs' threads and the main thread: a ring of register accesses
// (many writers, one reader), a place per vCPU for the answer to its read, commands of the main thread, the eventfds of
// the vectors. Nobody who waits here waits for ever: not for a device that ended, crashed or hangs.

import { writeSync } from "node:fs";
import { Mutex } from "../../hypercalls/lock.js";
import type { AccessBytes } from "../../iommu-emul/device.js";

/** Accesses that can wait: the writes of a driver that fills queues, between two looks of the device. */
export const RING_ENTRIES = 256;
/** How long one sleep is: at most so late is a stop, or a device's end, seen. */
const SLICE_MS = 20;
/**
 * Slices that a vCPU gives a device, 10 s: then a read is all ones and a write is lost, as a root port's time-out ends
 * it, and the device is one that hangs.
 */
const ACCESS_SLICES = 500;
/** Slices that the main thread gives it for a command, 10 s: its pieces of work take a millisecond. */
const COMMAND_SLICES = 500;

// 32-bit words. What different threads write again and again is 64 bytes apart.
const STATE = 0;
const BELL = 16;
const SLEEPING = 17;
const RING_LOCK = 32;
const HEAD = 33;
const ROOM = 48;
const TAIL = 49;
const IRQ_LOCK = 64;
const COMMAND = 65;
const ASKED = 66;
const DONE = 67;
const REPLIES = 80;
const REPLY_WORDS = 16;
const ENTRY_WORDS = 5;

// STATE: from first to last.
const STARTING = 0;
const RUNNING = 1;
/** From here on it answers nobody any more: it ended, or a vCPU found that it hangs. */
const ENDED = 2;
const HANGS = 3;

/** What the main thread can tell a device: to forget everything, as after power-on. */
export const COMMAND_RESET = 1;
/** Gives back files and ends the thread; this one does not wait. */
export const COMMAND_CLOSE = 2;
export type Command = typeof COMMAND_RESET | typeof COMMAND_CLOSE;

// An entry's first word: bytes, BAR, and whether it is a read.
const BAR_SHIFT = 4;
const IS_READ = 0x100;

const ONE = Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0);
/** What a read gives that nobody answers. */
const allOnes = (bytes: AccessBytes): number => 2 ** (8 * bytes) - 1;

/** The shared memory of a device; what a Worker is given to attach to it. */
export interface LinkState {
  readonly memory: SharedArrayBuffer;
  readonly cpus: number;
  readonly vectors: number;
}

export function createLink(cpus: number, vectors: number): LinkState {
  const words = REPLIES + cpus * REPLY_WORDS + vectors + RING_ENTRIES * ENTRY_WORDS;
  const state = { memory: new SharedArrayBuffer(words * 4), cpus, vectors };
  new Int32Array(state.memory).fill(-1, vectorsAt(state), vectorsAt(state) + vectors);
  return state;
}

const vectorsAt = ({ cpus }: LinkState): number => REPLIES + cpus * REPLY_WORDS;
const ringAt = (state: LinkState): number => vectorsAt(state) + state.vectors;

/** Wakes the device's thread, if it sleeps. What it is to see is written before. */
function ring(words: Int32Array): void {
  Atomics.add(words, BELL, 1);
  if (Atomics.load(words, SLEEPING) !== 0) Atomics.notify(words, BELL);
}

/** A vCPU's way to the registers of one device. Allocates nothing, throws nothing. */
export class RegisterPort {
  private readonly words: Int32Array;
  private readonly lock: Mutex;
  private readonly ringAt: number;
  private readonly reply: number;
  private sequence: number;

  /** `stopWords[stopAt]` is not 0 when the vCPU is to stop, and then waits for nothing. */
  constructor(
    state: LinkState,
    private readonly cpu: number,
    private readonly stopWords: Int32Array,
    private readonly stopAt: number,
  ) {
    this.words = new Int32Array(state.memory);
    this.lock = new Mutex(this.words, RING_LOCK);
    this.ringAt = ringAt(state);
    this.reply = REPLIES + cpu * REPLY_WORDS;
    this.sequence = Atomics.load(this.words, this.reply);
  }

  /** Posted, as on PCI: returns before the device has seen it, but nothing of this vCPU overtakes it. */
  write(bar: number, offset: number, bytes: AccessBytes, value: number): void {
    this.post(bytes | (bar << BAR_SHIFT), offset, value, 0);
  }

  /** Waits for the device, which has taken all that was written before. Returns an unsigned value. */
  read(bar: number, offset: number, bytes: AccessBytes): number {
    const { words, reply } = this;
    // A late answer to a read that was given up bears an earlier number.
    this.sequence = (this.sequence + 1) | 0;
    const { sequence } = this;
    if (!this.post(bytes | (bar << BAR_SHIFT) | IS_READ, offset, this.cpu, sequence)) return allOnes(bytes);
    for (let slice = 0; slice < ACCESS_SLICES; slice++) {
      const answered = Atomics.load(words, reply);
      if (answered === sequence) return words[reply + 1]! >>> 0;
      if (this.isOver()) break;
      Atomics.wait(words, reply, answered, SLICE_MS);
    }
    return this.isOver() ? allOnes(bytes) : this.giveUp(bytes);
  }

  private giveUp(bytes: AccessBytes): number {
    Atomics.compareExchange(this.words, STATE, RUNNING, HANGS);
    return allOnes(bytes);
  }

  private isOver(): boolean {
    return Atomics.load(this.words, STATE) >= ENDED || Atomics.load(this.stopWords, this.stopAt) !== 0;
  }

  private post(what: number, offset: number, value: number, sequence: number): boolean {
    const { words, lock } = this;
    for (let slice = 0; slice < ACCESS_SLICES; slice++) {
      if (this.isOver()) return false;
      const room = Atomics.load(words, ROOM);
      lock.acquire();
      const head = words[HEAD]!;
      if (((head - Atomics.load(words, TAIL)) | 0) < RING_ENTRIES) {
        const at = this.ringAt + (head & (RING_ENTRIES - 1)) * ENTRY_WORDS;
        words[at] = what;
        words[at + 1] = offset;
        words[at + 2] = value;
        words[at + 3] = sequence;
        Atomics.store(words, HEAD, (head + 1) | 0);
        lock.release();
        ring(words);
        return true;
      }
      lock.release();
      Atomics.wait(words, ROOM, room, SLICE_MS);
    }
    this.giveUp(4);
    return false;
  }
}

/** The main thread's side. */
export class LinkControl {
  private readonly words: Int32Array;
  private readonly irqLock: Mutex;
  private readonly vectorsAt: number;

  constructor(private readonly state: LinkState) {
    this.words = new Int32Array(state.memory);
    this.irqLock = new Mutex(this.words, IRQ_LOCK);
    this.vectorsAt = vectorsAt(state);
  }

  /** Nobody waits for it any more. */
  get ended(): boolean {
    return Atomics.load(this.words, STATE) >= ENDED;
  }

  /** A vCPU has waited for it in vain. */
  get hangs(): boolean {
    return Atomics.load(this.words, STATE) === HANGS;
  }

  /** From now on nobody waits for the device: its thread is gone, or does not answer. */
  end(): void {
    if (!this.ended) Atomics.store(this.words, STATE, ENDED);
    ring(this.words);
  }

  /**
   * Has the device do something, after all that vCPUs wrote before, and waits until it is done: a millisecond or so.
   * False when the device has ended, or does not answer for 10 s.
   */
  command(command: Command): boolean {
    if (this.ended) return false;
    const number = this.ask(command);
    for (let slice = 0; slice < COMMAND_SLICES; slice++) {
      const done = Atomics.load(this.words, DONE);
      if (done === number) return true;
      if (this.ended) return false;
      Atomics.wait(this.words, DONE, done, SLICE_MS);
    }
    return false;
  }

  /** As command(), but waits for nothing. */
  ask(command: Command): number {
    const { words } = this;
    Atomics.store(words, COMMAND, command);
    const number = (Atomics.add(words, ASKED, 1) + 1) | 0;
    ring(words);
    return number;
  }

  /**
   * Sets which eventfds the vectors from `first` on signal, -1 for none. When it returns, those of before are not
   * signalled any more and can be closed.
   */
  setVectors(first: number, fds: readonly number[]): void {
    if (first < 0 || first + fds.length > this.state.vectors) throw new RangeError(`vectors from ${first}`);
    this.irqLock.acquire();
    try {
      for (const [i, fd] of fds.entries()) Atomics.store(this.words, this.vectorsAt + first + i, fd);
    } finally {
      this.irqLock.release();
    }
  }
}

/** What the device's thread does with register accesses and commands. */
export interface LinkServer {
  read(bar: number, offset: number, bytes: AccessBytes): number;
  write(bar: number, offset: number, bytes: AccessBytes, value: number): void;
  command(command: Command): void;
}

/** The device's thread's side. */
export class LinkDevice {
  private readonly words: Int32Array;
  private readonly irqLock: Mutex;
  private readonly vectorsAt: number;
  private readonly ringAt: number;
  /** A sleep that is still under way although its sleeper was woken by something else. */
  private bell: Promise<unknown> | undefined;
  private onBell: (() => void) | undefined;

  constructor(private readonly state: LinkState) {
    this.words = new Int32Array(state.memory);
    this.irqLock = new Mutex(this.words, IRQ_LOCK);
    this.vectorsAt = vectorsAt(state);
    this.ringAt = ringAt(state);
  }

  started(): void {
    Atomics.compareExchange(this.words, STATE, STARTING, RUNNING);
  }

  /** Nobody waits for this device any more. */
  end(): void {
    if (!this.ended) Atomics.store(this.words, STATE, ENDED);
  }

  get ended(): boolean {
    return Atomics.load(this.words, STATE) >= ENDED;
  }

  /** To be read before serve(): what comes after it changes it, and then sleep() returns at once. */
  get bellCount(): number {
    return Atomics.load(this.words, BELL);
  }

  /** Serves the accesses that wait now, one ring at most, and then the command that came, if one did. */
  serve(server: LinkServer): void {
    const { words } = this;
    const asked = Atomics.load(words, ASKED);
    const head = Atomics.load(words, HEAD);
    let tail = words[TAIL]!;
    if (tail !== head) {
      while (tail !== head) {
        const at = this.ringAt + (tail & (RING_ENTRIES - 1)) * ENTRY_WORDS;
        const what = words[at]!;
        const offset = words[at + 1]!;
        const value = words[at + 2]!;
        const sequence = words[at + 3]!;
        tail = (tail + 1) | 0;
        Atomics.store(words, TAIL, tail);
        const bytes = (what & 7) as AccessBytes;
        const bar = (what >> BAR_SHIFT) & 7;
        if (what & IS_READ) this.answer(value, sequence, server.read(bar, offset, bytes));
        else server.write(bar, offset, bytes, bytes === 4 ? value >>> 0 : value & allOnes(bytes));
      }
      Atomics.add(words, ROOM, 1);
      Atomics.notify(words, ROOM);
    }
    if (asked === Atomics.load(words, DONE)) return;
    server.command(Atomics.load(words, COMMAND) as Command);
    Atomics.store(words, DONE, asked);
    Atomics.notify(words, DONE);
  }

  private answer(cpu: number, sequence: number, value: number): void {
    const { words } = this;
    const reply = REPLIES + cpu * REPLY_WORDS;
    words[reply + 1] = value;
    Atomics.store(words, reply, sequence);
    Atomics.notify(words, reply);
  }

  /** Signals a vector's eventfd, if it has one. */
  interrupt(vector: number): void {
    if (!(vector >= 0 && vector < this.state.vectors)) throw new RangeError(`vector ${vector}`);
    this.irqLock.acquire();
    try {
      const fd = Atomics.load(this.words, this.vectorsAt + vector);
      if (fd >= 0) writeSync(fd, ONE);
    } finally {
      this.irqLock.release();
    }
  }

  /** Sleeps until somebody rings after `bellCount` was read. The thread does nothing else meanwhile. */
  sleep(bellCount: number): void {
    const { words } = this;
    Atomics.store(words, SLEEPING, 1);
    Atomics.wait(words, BELL, bellCount);
    Atomics.store(words, SLEEPING, 0);
  }

  /**
   * The same for a thread that has other things to do: calls `wake` when somebody rings. True when somebody has
   * already, and then `wake` is not called. The last `wake` counts.
   */
  sleepAside(bellCount: number, wake: () => void): boolean {
    const { words } = this;
    Atomics.store(words, SLEEPING, 1);
    this.onBell = wake;
    if (this.bell !== undefined) return Atomics.load(words, BELL) !== bellCount;
    const { async, value } = Atomics.waitAsync(words, BELL, bellCount);
    if (!async) return true;
    this.bell = value.then(() => {
      this.bell = undefined;
      this.onBell?.();
    });
    return false;
  }

  /** Awake again, for whatever reason. */
  awake(): void {
    Atomics.store(this.words, SLEEPING, 0);
    this.onBell = undefined;
  }
}
