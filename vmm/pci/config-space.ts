// A function's first 256 bytes of configuration space: bytes, and which of their bits the guest may write. Extended
// configuration space (PCIe, from 256 on) reads as zero: no extended capability is shown. Pure.

import type { Width } from "../io-bus.js";
import { CONFIG_BYTES } from "./registers.js";

export class ConfigSpace {
  private readonly bytes = new DataView(new ArrayBuffer(CONFIG_BYTES));
  private readonly writable = new DataView(new ArrayBuffer(CONFIG_BYTES));

  /** The guest's read: naturally aligned, any register from 0. */
  read(register: number, width: Width): number {
    return register < CONFIG_BYTES ? getLe(this.bytes, register, width) : 0;
  }

  /** The guest's write: bits that are not writable keep their value. */
  write(register: number, width: Width, value: number): void {
    if (register >= CONFIG_BYTES) return;
    const mask = getLe(this.writable, register, width);
    const old = getLe(this.bytes, register, width);
    setLe(this.bytes, register, width, (old & ~mask) | (value & mask));
  }

  /** Our own write: sets what the guest reads. `mask`, when given, sets which bits the guest may write from now on. */
  set(register: number, width: Width, value: number, mask?: number): void {
    setLe(this.bytes, register, width, value);
    if (mask !== undefined) setLe(this.writable, register, width, mask);
  }

  /** The current values; `restore` puts them back. Which bits are writable does not change. */
  save(): Uint8Array {
    return new Uint8Array(this.bytes.buffer.slice(0));
  }

  restore(saved: Uint8Array): void {
    new Uint8Array(this.bytes.buffer).set(saved);
  }
}

/** Reads an unsigned little-endian number. */
export function getLe(view: DataView, offset: number, width: Width): number {
  if (width === 4) return view.getUint32(offset, true);
  return width === 2 ? view.getUint16(offset, true) : view.getUint8(offset);
}

export function setLe(view: DataView, offset: number, width: Width, value: number): void {
  if (width === 4) view.setUint32(offset, value, true);
  else if (width === 2) view.setUint16(offset, value, true);
  else view.setUint8(offset, value);
}
