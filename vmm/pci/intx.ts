// A function's interrupt pin: level-triggered, so that the kernel has to be told twice. An irqfd raises the line when
// the device signals; when the guest acknowledges it, KVM signals the resample eventfd, which unmasks the device.

import { closeSync } from "node:fs";
import { eventfd } from "../native/libc.js";
import type { PciMachine } from "./machine-interface.js";

/** Where the pin's interrupts come from. Failures are SystemErrors. */
export interface PinSource {
  /** From now on the device signals `trigger` once and is quiet until `unmask` is signalled. */
  enable(trigger: number, unmask: number): void;
  disable(): void;
}

export class Intx {
  private trigger = -1;
  private unmask = -1;
  private connected = false;

  constructor(
    private readonly source: PinSource,
    private readonly machine: PciMachine,
    private readonly gsi: number,
  ) {}

  /** Throws when the host refuses; the pin is then off. */
  enable(): void {
    if (this.trigger >= 0) return;
    try {
      this.trigger = eventfd();
      this.unmask = eventfd();
      this.machine.irqfd(this.gsi, this.trigger, true, this.unmask);
      this.connected = true;
      this.source.enable(this.trigger, this.unmask);
    } catch (error) {
      this.release();
      throw error;
    }
  }

  disable(): void {
    if (this.trigger < 0) return;
    try {
      this.source.disable();
    } finally {
      this.release();
    }
  }

  private release(): void {
    if (this.connected) this.machine.irqfd(this.gsi, this.trigger, false);
    this.connected = false;
    if (this.trigger >= 0) closeSync(this.trigger);
    if (this.unmask >= 0) closeSync(this.unmask);
    this.trigger = -1;
    this.unmask = -1;
  }
}
