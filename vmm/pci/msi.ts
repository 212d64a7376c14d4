// MSI (PCI 3.0, 6.8.1): 1 to 32 vectors that share one message, vector i in the low bits of its data. Only what the
// guest's settings mean for the machine; the capability's registers are the function's configuration space.

import { attempt } from "../errors.js";
import type { PciMachine } from "./machine-interface.js";
import { type IrqSource, type Message, MsiVector } from "./msi-vector.js";

export interface MsiSettings {
  readonly enabled: boolean;
  /** Vectors the guest uses: 1, 2, 4, 8, 16 or 32. */
  readonly count: number;
  readonly message: Message;
  /** A bit per vector, 1 for masked. */
  readonly mask: number;
}

export class Msi {
  private vectors: MsiVector[] = [];

  constructor(
    private readonly source: IrqSource,
    private readonly machine: PciMachine,
    private readonly warn: (line: string) => void,
  ) {}

  /** Brings the machine to the guest's settings; more vectors than the device has are cut to those it has. */
  apply(settings: MsiSettings): void {
    const count = settings.enabled ? Math.min(settings.count, this.source.vectors) : 0;
    if (count !== this.vectors.length) this.stop();
    if (count === 0) return;
    const starting = this.vectors.length === 0;
    if (starting) this.vectors = Array.from({ length: count }, () => new MsiVector(this.machine));
    for (const [index, line] of this.vectors.entries()) {
      const { lo, hi, data } = settings.message;
      const own = { lo, hi, data: ((data & ~(count - 1)) | index) >>> 0 };
      const masked = (settings.mask >>> index) & 1;
      if (masked || !this.attempt(`vector ${index}`, () => line.connect(own))) {
        this.attempt(`vector ${index}`, () => line.disconnect());
      }
    }
    // A device cannot change how many MSI vectors it uses while it is on, so all of them get an eventfd now.
    if (
      starting &&
      !this.attempt(`on, ${count} vectors`, () => this.source.enable(this.vectors.map((v) => v.eventfd)))
    ) {
      for (const line of this.vectors) this.attempt("off", () => line.disconnect());
    }
  }

  /** A bit per vector that was signalled while masked. */
  pending(): number {
    return this.vectors.reduce((bits, line, index) => (line.pending() ? bits | (1 << index) : bits), 0) >>> 0;
  }

  private stop(): void {
    if (this.vectors.length > 0) this.attempt("off", () => this.source.disable());
    const lines = this.vectors;
    this.vectors = [];
    for (const line of lines) this.attempt("off", () => line.close());
  }

  private attempt(what: string, action: () => void): boolean {
    return attempt(action, (message) => this.warn(`MSI ${what}: ${message}`));
  }
}
