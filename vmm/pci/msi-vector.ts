// One message-signalled interrupt on its way from a device into the guest: the device signals an eventfd, an irqfd
// turns that into a GSI, the GSI's route holds the message that the guest wrote. The kernel does all of it; this only
// connects and disconnects.

import { closeSync, readSync, writeSync } from "node:fs";
import { VmmError } from "../errors.js";
import { eventfd } from "../native/libc.js";
import type { PciMachine } from "./machine-interface.js";

/** Where a device's interrupts come from: VFIO, or an emulated device. Failures are SystemErrors. */
export interface IrqSource {
  /** Vectors the device has. */
  readonly vectors: number;
  /** Whether vectors past those given to enable() can be set later. */
  readonly growable: boolean;
  /** Turns message-signalled interrupts on: vector i signals fds[i], -1 leaves it without a signal. */
  enable(fds: readonly number[]): void;
  setTrigger(vector: number, fd: number): void;
  disable(): void;
}

/** What the guest programmed: writing `data` to the address is the interrupt. */
export interface Message {
  readonly lo: number;
  readonly hi: number;
  readonly data: number;
}

const ONE = Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0);

export class MsiVector {
  private fd = -1;
  private gsi = -1;
  private routed: Message | undefined;
  private connected = false;

  constructor(private readonly machine: PciMachine) {}

  /** The eventfd that the device signals; made on first use. */
  get eventfd(): number {
    if (this.fd < 0) this.fd = eventfd();
    return this.fd;
  }

  /**
   * Lets the vector interrupt the guest: first the route, then the irqfd. A signal that came while the vector was
   * masked is delivered now. Throws when the message is none or something runs out; the vector then stays as it was.
   */
  connect(message: Message): void {
    const { lo, hi, data } = message;
    // Anything else would be a write to memory, and KVM would still take it for an interrupt (SDM vol. 3, 11.11.1).
    if (lo >>> 20 !== 0xfee || (hi & 0xff) !== 0) {
      throw new VmmError(`message address 0x${(hi * 2 ** 32 + lo).toString(16)} is not that of an interrupt`);
    }
    const fd = this.eventfd;
    if (this.gsi < 0) this.gsi = this.machine.allocateGsi();
    const { routed } = this;
    if (routed === undefined || routed.lo !== lo || routed.hi !== hi || routed.data !== data) {
      this.machine.setMsiRoute(this.gsi, lo, hi, data);
      this.routed = { lo, hi, data };
    }
    if (this.connected) return;
    // KVM would deliver what waits in the eventfd, but leave it there to be delivered again after the next mask.
    const waiting = this.take();
    this.machine.irqfd(this.gsi, fd, true);
    this.connected = true;
    if (waiting) this.signal();
  }

  /** Masks: signals stay in the eventfd. The route stays too: changing the table is slow, and nothing uses it. */
  disconnect(): void {
    if (!this.connected) return;
    this.machine.irqfd(this.gsi, this.fd, false);
    this.connected = false;
  }

  /** Whether the device signalled while the vector was disconnected: the pending bit. */
  pending(): boolean {
    if (this.connected || this.fd < 0 || !this.take()) return false;
    this.signal();
    return true;
  }

  private take(): boolean {
    try {
      return readSync(this.fd, new Uint8Array(8)) === 8;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return false;
      throw error;
    }
  }

  private signal(): void {
    writeSync(this.fd, ONE);
  }

  /** Gives everything back. The device must not signal the eventfd any more. */
  close(): void {
    this.disconnect();
    if (this.routed !== undefined) this.machine.clearRoute(this.gsi);
    this.routed = undefined;
    if (this.gsi >= 0) this.machine.freeGsi(this.gsi);
    this.gsi = -1;
    if (this.fd >= 0) closeSync(this.fd);
    this.fd = -1;
  }
}
