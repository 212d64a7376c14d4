// The terminal behind COM1: carries bytes between the serial port's queues and standard input and output. Main
// thread. Ctrl-A X leaves, as in QEMU.

import type { Readable, Writable } from "node:stream";
import type { ReadStream } from "node:tty";
import type { Serial } from "./serial.js";

const CTRL_A = 0x01;
const LEAVE = new Set(["x", "X"].map((key) => key.charCodeAt(0)));

/**
 * How long output waits for more of it, in milliseconds: nobody sees it, and a guest that prints does not wake this thread,
 * and whoever reads behind it, for every byte. A line of 115200 baud carries 115 bytes in that time. Input does not wait.
 */
const GATHER_MS = 10;

export class Console {
  private afterEscape = false;
  /** Typed bytes that did not fit the serial port's queue; offered again when the guest has taken some. */
  private waiting: Buffer = Buffer.alloc(0);
  private blocked = false;
  private serial: Serial | undefined;
  private timer: NodeJS.Timeout | undefined;
  private readonly onData = (typed: Buffer) => this.typed(typed);
  /** There is room again, or nobody reads any more. */
  private readonly onDrain = () => {
    this.blocked = false;
    this.carry();
  };

  /** `leave` is called when Ctrl-A X was typed. */
  constructor(
    private readonly input: Readable & Partial<Pick<ReadStream, "isTTY" | "setRawMode">>,
    private readonly output: Writable,
    private readonly leave: () => void,
  ) {}

  /** Starts carrying for this serial port; the terminal is raw until detach(). */
  attach(serial: Serial): void {
    this.serial = serial;
    if (this.input.isTTY) this.input.setRawMode?.(true);
    this.input.on("data", this.onData).resume();
    this.output.on("drain", this.onDrain).on("close", this.onDrain);
  }

  /** Carries what is left to the terminal and gives it back. */
  detach(): void {
    this.blocked = false;
    this.carry();
    this.serial = undefined;
    this.waiting = Buffer.alloc(0);
    this.input.off("data", this.onData).pause();
    this.output.off("drain", this.onDrain).off("close", this.onDrain);
    if (this.input.isTTY) this.input.setRawMode?.(false);
  }

  /** The guest wrote, or took input. */
  pump(): void {
    if (this.waiting.length > 0) this.offer(Buffer.alloc(0));
    this.timer ??= setTimeout(() => this.carry(), GATHER_MS);
  }

  /** Carries output on at once, but takes none while the terminal is behind; the guest waits in time. */
  carry(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
    // Output that nobody reads any more (`vmm … | head`) is dropped: the guest goes on.
    const { writable } = this.output;
    if (this.serial === undefined || (this.blocked && writable)) return;
    const bytes = this.serial.takeOutput();
    if (bytes.length > 0 && writable && !this.output.write(bytes)) this.blocked = true;
  }

  private typed(typed: Buffer): void {
    const forGuest: number[] = [];
    for (const byte of typed) {
      if (this.afterEscape) {
        this.afterEscape = false;
        if (LEAVE.has(byte)) {
          this.leave();
          return;
        }
        if (byte === CTRL_A) forGuest.push(byte);
      } else if (byte === CTRL_A) this.afterEscape = true;
      else forGuest.push(byte);
    }
    this.offer(Buffer.from(forGuest));
  }

  private offer(bytes: Buffer): void {
    const all = this.waiting.length > 0 ? Buffer.concat([this.waiting, bytes]) : bytes;
    this.waiting = all.subarray(this.serial?.pushInput(all) ?? all.length);
    // Nobody types megabytes: a pipe does, and it can wait until the guest reads.
    if (this.waiting.length > 2 ** 16) this.input.pause();
    else if (this.input.isPaused()) this.input.resume();
  }
}
