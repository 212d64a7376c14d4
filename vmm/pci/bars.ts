// Base address registers: what a function asks of the address space, where the guest put it, and what answers there.
// Memory BARs become memory slots and trapped ranges, I/O BARs trapped ports. Addresses are the guest's (gpa or port).

import { gpa, type Hva } from "../../hypercalls/addresses.js";
import { attempt, VmmError } from "../errors.js";
import type { IoHandler } from "../io-bus.js";
import type { ConfigSpace } from "./config-space.js";
import type { PciMachine, RegisterTarget } from "./machine-interface.js";
import { PCI } from "./registers.js";

/**
 * A stretch of a BAR: memory of this process (whole pages), a handler whose offsets count from the BAR's start, or, and
 * then it is the whole BAR, registers of an emulated device.
 */
export type BarPart = { readonly offset: number; readonly bytes: number } & (
  | { readonly hva: Hva }
  | { readonly registers: RegisterTarget }
  | { readonly handler: IoHandler }
);

export interface BarSpec {
  /** 0 to 5; a mem64 BAR takes the next index too. */
  readonly index: number;
  readonly kind: "mem32" | "mem64" | "io";
  /** A power of two, 16 at least (4 for I/O). */
  readonly bytes: number;
  readonly prefetchable: boolean;
  /** All of the BAR, ascending, without gaps. An I/O BAR has one part with a handler. */
  readonly parts: readonly BarPart[];
}

/** Inclusive on both ends; empty when last < first. */
export interface Window {
  readonly first: number;
  readonly last: number;
}

export interface BarWindows {
  readonly mmio32: Window;
  readonly mmio64: Window;
  readonly io: Window;
}

/** From this size on a 64-bit BAR goes above 4 GiB: the window below is small, and some devices have no choice. */
const LARGE_BAR_BYTES = 16 * 2 ** 20;

/** One BAR of one function. Its address lives in the function's configuration space, as on hardware. */
export class Bar {
  /** Set by the function from COMMAND; AddressDecoder.settle() acts on it. */
  decoding = false;
  /** Where firmware put it; where it is after a reset. */
  home = 0;
  /** Where the machine has it now. */
  mappedAt: number | undefined;
  private readonly mapped: (() => void)[] = [];
  private readonly register: number;

  constructor(
    readonly owner: string,
    readonly spec: BarSpec,
    private readonly config: ConfigSpace,
  ) {
    const { index, kind, bytes, prefetchable } = spec;
    if (!Number.isInteger(Math.log2(bytes)) || bytes < (kind === "io" ? 4 : 16)) {
      throw new VmmError(`${owner}: BAR ${index} has ${bytes} bytes, which is no size of a BAR`);
    }
    this.register = PCI.PCI_BASE_ADDRESS_0 + 4 * index;
    const type =
      kind === "io"
        ? PCI.PCI_BASE_ADDRESS_SPACE_IO
        : (kind === "mem64" ? PCI.PCI_BASE_ADDRESS_MEM_TYPE_64 : 0) |
          (prefetchable ? PCI.PCI_BASE_ADDRESS_MEM_PREFETCH : 0);
    // The address bits below the size stay 0: written with ones, the register then reads as the size (PCI 3.0, 6.2.5.1).
    const highMask = bytes > 2 ** 32 ? 2 ** 32 - bytes / 2 ** 32 : 2 ** 32 - 1;
    config.set(
      this.register,
      4,
      type,
      kind === "io" ? 0xffff & -bytes : bytes < 2 ** 32 ? 2 ** 32 - bytes : 0,
    );
    if (kind === "mem64") config.set(this.register + 4, 4, 0, highMask);
  }

  /** What the registers hold. */
  get address(): number {
    const low = this.config.read(this.register, 4);
    if (this.spec.kind === "io") return (low & ~3) >>> 0;
    const high = this.spec.kind === "mem64" ? this.config.read(this.register + 4, 4) : 0;
    return high * 2 ** 32 + ((low & ~15) >>> 0);
  }

  set address(address: number) {
    const { kind } = this.spec;
    const typeBits = this.config.read(this.register, 4) & (kind === "io" ? 3 : 15);
    this.config.set(this.register, 4, (address % 2 ** 32) + typeBits);
    if (kind === "mem64") this.config.set(this.register + 4, 4, Math.floor(address / 2 ** 32));
  }

  map(machine: PciMachine, address: number): void {
    this.mappedAt = address;
    for (const part of this.spec.parts) {
      const at = address + part.offset;
      if ("hva" in part) {
        const slot = machine.addMemslot(gpa(at), part.bytes, part.hva);
        this.mapped.push(() => machine.removeMemslot(slot));
      } else if ("registers" in part) {
        machine.addRegisters(gpa(at), part.bytes, part.registers);
        this.mapped.push(() => machine.removeRegisters(gpa(at)));
      } else if (this.spec.kind === "io") {
        machine.addPio(at, part.bytes, shifted(part.handler, part.offset));
        this.mapped.push(() => machine.removePio(at));
      } else {
        machine.addMmio(gpa(at), part.bytes, shifted(part.handler, part.offset));
        this.mapped.push(() => machine.removeMmio(gpa(at)));
      }
    }
  }

  unmap(): void {
    for (let undo = this.mapped.at(-1); undo !== undefined; undo = this.mapped.at(-1)) {
      undo();
      this.mapped.pop();
    }
    this.mappedAt = undefined;
  }
}

/** A handler that counts from the start of the BAR where the machine counts from the start of the part. */
const shifted = (handler: IoHandler, by: number): IoHandler => ({
  read: (offset, width) => handler.read(offset + by, width),
  write: (offset, width, value) => handler.write(offset + by, width, value),
});

/** All BARs of the bus: places them as firmware does, and keeps the machine's ranges as the guest's registers say. */
export class AddressDecoder {
  private readonly bars: Bar[] = [];
  private readonly warned = new Set<string>();

  constructor(
    private readonly machine: PciMachine,
    private readonly windows: BarWindows,
    private readonly warn: (line: string) => void,
  ) {}

  add(bar: Bar): void {
    this.bars.push(bar);
  }

  /** Takes a function's BARs out; they must not be decoding. */
  remove(bars: readonly Bar[]): void {
    for (const bar of bars) this.bars.splice(this.bars.indexOf(bar), 1);
  }

  /** Gives every BAR its home, naturally aligned, the largest first so that nothing is lost to alignment. */
  place(): void {
    const { mmio32, mmio64, io } = this.windows;
    const next = new Map([mmio32, mmio64, io].map((window) => [window, window.first]));
    for (const bar of [...this.bars].sort((a, b) => b.spec.bytes - a.spec.bytes)) {
      const { kind, bytes, index } = bar.spec;
      const choice =
        kind === "io"
          ? [io]
          : kind === "mem32"
            ? [mmio32]
            : bytes < LARGE_BAR_BYTES
              ? [mmio32, mmio64]
              : [mmio64, mmio32];
      const fits = choice
        .map((window) => ({ window, at: Math.ceil(next.get(window)! / bytes) * bytes }))
        .find(({ window, at }) => at + bytes - 1 <= window.last);
      if (fits === undefined) {
        throw new VmmError(
          `${bar.owner}: no room for BAR ${index} (${kind}, ${bytes} bytes); assign fewer devices`,
        );
      }
      next.set(fits.window, fits.at + bytes);
      bar.home = fits.at;
      bar.address = fits.at;
    }
  }

  /**
   * Makes the machine's ranges what the registers say: first all that have to go, then all that have to come. A BAR
   * outside the windows or over another one answers nowhere until it is moved; that is the guest's doing. Never throws
   * for it.
   */
  settle(): void {
    for (const bar of this.bars) {
      if (bar.mappedAt !== undefined && bar.mappedAt !== this.wanted(bar))
        this.attempt(bar, () => bar.unmap());
    }
    for (const bar of this.bars) {
      const address = this.wanted(bar);
      if (address === undefined || bar.mappedAt !== undefined) continue;
      const other = this.bars.find((b) => overlaps(b, bar, address));
      if (other !== undefined) {
        this.warnOnce(bar, `lies over BAR ${other.spec.index} of ${other.owner}`, address);
      } else if (!this.attempt(bar, () => bar.map(this.machine, address))) {
        this.attempt(bar, () => bar.unmap());
      }
    }
  }

  private wanted(bar: Bar): number | undefined {
    if (!bar.decoding) return undefined;
    const { address } = bar;
    const { mmio32, mmio64, io } = this.windows;
    const last = address + bar.spec.bytes - 1;
    const inside = (window: Window) => address >= window.first && last <= window.last;
    return (bar.spec.kind === "io" ? inside(io) : inside(mmio32) || inside(mmio64)) ? address : undefined;
  }

  private attempt(bar: Bar, action: () => void): boolean {
    return attempt(action, (message) => this.warnOnce(bar, message, bar.address));
  }

  private warnOnce(bar: Bar, why: string, address: number): void {
    const key = `${bar.owner} ${bar.spec.index}`;
    if (this.warned.has(key)) return;
    this.warned.add(key);
    this.warn(`${bar.owner}: BAR ${bar.spec.index} does not answer at 0x${address.toString(16)}: ${why}`);
  }
}

const overlaps = (placed: Bar, bar: Bar, address: number): boolean =>
  placed.mappedAt !== undefined &&
  (placed.spec.kind === "io") === (bar.spec.kind === "io") &&
  placed.mappedAt < address + bar.spec.bytes &&
  address < placed.mappedAt + placed.spec.bytes;
