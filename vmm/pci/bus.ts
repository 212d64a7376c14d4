// The guest's one PCI bus (segment 0, bus 0, one function per slot) and its configuration space in memory, ECAM. The
// ports 0xcf8 and 0xcfc lead there, too (devices/config-ports.ts). Main thread.

import { gpa } from "../../hypercalls/addresses.js";
import { forEachAnyway } from "../cleanup.js";
import type { IoHandler, Width } from "../io-bus.js";
import { allOnes, readAligned, writeAligned } from "./access.js";
import { AddressDecoder, type BarWindows } from "./bars.js";
import type { PciFunction } from "./function.js";
import { HostBridge } from "./host-bridge.js";
import type { PciMachine } from "./machine-interface.js";
import { EXTENDED_CONFIG_BYTES } from "./registers.js";

/** Windows for BARs hold nothing else. In _CRS none of them is to be marked prefetchable: all kinds of BARs go there. */
export interface PciLayout extends BarWindows {
  /** Guest-physical address of bus 0's configuration space, 1 MiB. */
  readonly ecam: number;
}

/** Slots of a bus; 0 is the host bridge. */
export const SLOTS = 32;
const FUNCTIONS = 8;
export const ECAM_BYTES = SLOTS * FUNCTIONS * EXTENDED_CONFIG_BYTES;

/** Where a configuration access goes. */
export interface ConfigTarget {
  readonly slot: number;
  readonly function: number;
  readonly register: number;
}

/** The target of an ECAM offset (PCIe 5.0, 7.2.2); undefined outside bus 0. */
export function decodeEcam(offset: number): ConfigTarget | undefined {
  if (offset < 0 || offset >= ECAM_BYTES) return undefined;
  return { slot: offset >> 15, function: (offset >> 12) & 7, register: offset & 0xfff };
}

export class PciBus {
  readonly decoder: AddressDecoder;
  private readonly slots = new Map<number, PciFunction>();
  private started = false;

  constructor(
    private readonly machine: PciMachine,
    private readonly layout: PciLayout,
    warn: (line: string) => void,
  ) {
    this.decoder = new AddressDecoder(machine, layout, warn);
    this.add(0, new HostBridge());
  }

  /** Puts a function at `slot` (1 to 31), function 0. Before start(). */
  add(slot: number, pciFunction: PciFunction): void {
    if (slot < 0 || slot >= SLOTS || this.slots.has(slot))
      throw new RangeError(`PCI slot ${slot} cannot be used`);
    this.slots.set(slot, pciFunction);
  }

  /** Unplugs a slot: from now on reads there are ones and writes go nowhere. The function is the caller's to close. */
  remove(slot: number): void {
    this.slots.delete(slot);
  }

  /** Firmware's work: places the BARs, and lets the guest reach configuration space. Throws a VmmError. */
  start(): void {
    this.decoder.place();
    this.machine.addMmio(gpa(this.layout.ecam), ECAM_BYTES, this.ecam);
    this.started = true;
  }

  /** Closes the functions, which gives the devices back. */
  close(): void {
    if (this.started) this.machine.removeMmio(gpa(this.layout.ecam));
    this.started = false;
    const all = [...this.slots.values()];
    this.slots.clear();
    forEachAnyway(all, (each) => each.close());
  }

  private readonly ecam: IoHandler = {
    read: (offset, width) =>
      readAligned(offset, width, (at, piece) => this.readConfig(decodeEcam(at), piece)),
    write: (offset, width, value) =>
      writeAligned(offset, width, value, (at, piece, part) => this.writeConfig(decodeEcam(at), piece, part)),
  };

  /** An absent function reads as ones, which is how guests see that there is none. */
  private readConfig(target: ConfigTarget | undefined, width: Width): number {
    const pciFunction = this.functionAt(target);
    return pciFunction === undefined ? allOnes(width) : pciFunction.readConfig(target!.register, width);
  }

  private writeConfig(target: ConfigTarget | undefined, width: Width, value: number): void {
    this.functionAt(target)?.writeConfig(target!.register, width, value);
  }

  private functionAt(target: ConfigTarget | undefined): PciFunction | undefined {
    return target?.function === 0 ? this.slots.get(target.slot) : undefined;
  }
}
