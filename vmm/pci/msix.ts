// MSI-X (PCI 3.0, 6.8.2): the table and the pending bits as the guest sees them, and what its writes mean for the
// machine. The device's own table is never the guest's: the host programs it. Everything the guest writes is untrusted.

import { attempt } from "../errors.js";
import type { Width } from "../io-bus.js";
import { allOnes } from "./access.js";
import type { PciMachine } from "./machine-interface.js";
import { type IrqSource, type Message, MsiVector } from "./msi-vector.js";
import { PCI } from "./registers.js";

const ENTRY_WORDS = PCI.PCI_MSIX_ENTRY_SIZE / 4;
const ADDRESS_LO = 0;
const ADDRESS_HI = 1;
const DATA = 2;
const CONTROL = 3;

export class Msix {
  /** Bytes of the table and of the pending bit array. */
  readonly tableBytes: number;
  readonly pbaBytes: number;
  private readonly table: Uint32Array;
  private readonly vectors: MsiVector[];
  /** Vectors whose eventfd the device has. */
  private readonly triggered: boolean[];
  private enabled = false;
  /** The device is really in MSI-X mode: false when turning it on failed. */
  private running = false;
  private functionMask = false;

  constructor(
    private readonly source: IrqSource,
    machine: PciMachine,
    private readonly warn: (line: string) => void,
  ) {
    const count = source.vectors;
    this.tableBytes = count * PCI.PCI_MSIX_ENTRY_SIZE;
    this.pbaBytes = Math.ceil(count / 64) * 8;
    this.table = new Uint32Array(count * ENTRY_WORDS);
    this.vectors = Array.from({ length: count }, () => new MsiVector(machine));
    this.triggered = new Array<boolean>(count).fill(false);
    this.clearTable();
  }

  /** The enable and function mask bits of the capability changed, or may have. */
  control(enabled: boolean, functionMask: boolean): void {
    const masked = this.functionMask !== functionMask;
    this.functionMask = functionMask;
    if (enabled !== this.enabled) {
      this.enabled = enabled;
      if (enabled) this.start();
      else this.stop();
    } else if (masked && this.running) {
      for (let vector = 0; vector < this.vectors.length; vector++) this.refresh(vector);
    }
  }

  /** A guest's read of the table, naturally aligned. */
  readTable(offset: number, width: Width): number {
    if (offset + width > this.tableBytes) return allOnes(width);
    return Math.floor(this.table[offset >> 2]! / 2 ** (8 * (offset & 3))) % 2 ** (8 * width);
  }

  writeTable(offset: number, width: Width, value: number): void {
    if (offset + width > this.tableBytes) return;
    const word = offset >> 2;
    const shift = 8 * (offset & 3);
    const mask = allOnes(width) * 2 ** shift;
    const merged = (this.table[word]! & ~mask) | ((value * 2 ** shift) & mask);
    const field = word % ENTRY_WORDS;
    this.table[word] =
      field === ADDRESS_LO
        ? merged & ~3
        : field === CONTROL
          ? merged & PCI.PCI_MSIX_ENTRY_CTRL_MASKBIT
          : merged;
    if (this.running) this.refresh(Math.floor(word / ENTRY_WORDS));
  }

  /** 32 pending bits from vector `first` on. */
  pending(first: number): number {
    let bits = 0;
    for (let bit = 0; bit < 32; bit++) {
      if (this.vectors[first + bit]?.pending()) bits |= 1 << bit;
    }
    return bits >>> 0;
  }

  /** Off, and the table as at power-on: everything masked. */
  reset(): void {
    this.control(false, false);
    this.clearTable();
  }

  private clearTable(): void {
    this.table.fill(0);
    for (let word = CONTROL; word < this.table.length; word += ENTRY_WORDS) this.table[word] = 1;
  }

  private open(vector: number): boolean {
    const masked = this.table[vector * ENTRY_WORDS + CONTROL]! & PCI.PCI_MSIX_ENTRY_CTRL_MASKBIT;
    return !this.functionMask && !masked;
  }

  private message(vector: number): Message {
    const at = vector * ENTRY_WORDS;
    return {
      lo: this.table[at + ADDRESS_LO]!,
      hi: this.table[at + ADDRESS_HI]!,
      data: this.table[at + DATA]!,
    };
  }

  private connect(vector: number): boolean {
    return this.attempt(`vector ${vector}`, () => this.vectors[vector]!.connect(this.message(vector)));
  }

  private attempt(what: string, action: () => void): boolean {
    return attempt(action, (message) => this.warn(`MSI-X ${what}: ${message}`));
  }

  /**
   * Connects what is unmasked already and then has the device signal it. Guests usually enable with everything masked;
   * the device still has to be in MSI-X mode, so VFIO is given the vectors without a signal (-1). A host that cannot
   * add vectors later gets all of them now: resizing would lose the interrupts of those in use.
   */
  private start(): void {
    const fds = this.vectors.map((line, vector) =>
      this.open(vector) && this.connect(vector) ? line.eventfd : -1,
    );
    const inUse = fds.reduce((end, fd, vector) => (fd >= 0 ? vector + 1 : end), 1);
    const count = this.source.growable ? inUse : fds.length;
    this.running = this.attempt(`on, ${count} vectors`, () => this.source.enable(fds.slice(0, count)));
    if (!this.running) for (const line of this.vectors) this.attempt("off", () => line.close());
    else for (const [vector, fd] of fds.entries()) this.triggered[vector] = fd >= 0;
  }

  private stop(): void {
    if (this.running) this.attempt("off", () => this.source.disable());
    this.running = false;
    this.triggered.fill(false);
    for (const line of this.vectors) this.attempt("off", () => line.close());
  }

  private refresh(vector: number): void {
    const line = this.vectors[vector]!;
    if (!this.open(vector) || !this.connect(vector))
      this.attempt(`vector ${vector}`, () => line.disconnect());
    else if (!this.triggered[vector]) {
      this.triggered[vector] = this.attempt(`vector ${vector}`, () =>
        this.source.setTrigger(vector, line.eventfd),
      );
    }
  }
}
