// The guest's one PCI bus (segment 0, bus 0, one function per slot) and the two ways to its configuration space: ECAM
// in memory and the ports CF8/CFC. Main thread.

import { gpa } from "../../hypercalls/addresses.js";
import { allOnes, readAligned, writeAligned } from "./access.js";
import { AddressDecoder, type BarWindows } from "./bars.js";
import type { PciFunction } from "./function.js";
import { HostBridge } from "./host-bridge.js";
import type { IoHandler, PciMachine, Width } from "./machine-interface.js";
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

const ADDRESS_PORT = 0xcf8;
const DATA_PORT = 0xcfc;
const PORT_WIDTH = 4;
const ADDRESS_ENABLE = 0x80000000;

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

/**
 * The target of byte `lane` (0 to 3) of the data port with `address` in the address port (PCI 3.0, 3.2.2.3.2);
 * undefined when the address is disabled or of another bus.
 */
export function decodePorts(address: number, lane: number): ConfigTarget | undefined {
  if (address < ADDRESS_ENABLE || ((address >> 16) & 0xff) !== 0) return undefined;
  return { slot: (address >> 11) & 31, function: (address >> 8) & 7, register: (address & 0xfc) | lane };
}

export class PciBus {
  readonly decoder: AddressDecoder;
  private readonly slots = new Map<number, PciFunction>();
  private portAddress = 0;
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

  /** Firmware's work: places the BARs, and lets the guest reach configuration space. Throws a VmmError. */
  start(): void {
    this.decoder.place();
    this.machine.addMmio(gpa(this.layout.ecam), ECAM_BYTES, this.ecam);
    this.machine.addPio(ADDRESS_PORT, 1, this.addressPort);
    this.machine.addPio(DATA_PORT, PORT_WIDTH, this.dataPort);
    this.started = true;
  }

  /** The guest reboots. */
  reset(): void {
    this.portAddress = 0;
    for (const pciFunction of this.slots.values()) pciFunction.reset();
  }

  /** Closes the functions, which gives the devices back. */
  close(): void {
    for (const pciFunction of this.slots.values()) pciFunction.close();
    this.slots.clear();
    if (!this.started) return;
    this.started = false;
    this.machine.removeMmio(gpa(this.layout.ecam));
    this.machine.removePio(ADDRESS_PORT);
    this.machine.removePio(DATA_PORT);
  }

  private readonly ecam: IoHandler = {
    read: (offset, width) =>
      readAligned(offset, width, (at, piece) => this.readConfig(decodeEcam(at), piece)),
    write: (offset, width, value) =>
      writeAligned(offset, width, value, (at, piece, part) => this.writeConfig(decodeEcam(at), piece, part)),
  };

  /** Only whole dwords are CONFIG_ADDRESS: CF9, one byte in, is something else (reset). */
  private readonly addressPort: IoHandler = {
    read: (_offset, width) => (width === PORT_WIDTH ? this.portAddress : allOnes(width)),
    write: (_offset, width, value) => {
      // Bits 30:24 are reserved, bits 1:0 are zero.
      if (width === PORT_WIDTH) this.portAddress = (value & 0x80fffffc) >>> 0;
    },
  };

  private readonly dataPort: IoHandler = {
    read: (offset, width) =>
      readAligned(offset, width, (lane, piece) => this.readConfig(this.portTarget(lane), piece)),
    write: (offset, width, value) =>
      writeAligned(offset, width, value, (lane, piece, part) =>
        this.writeConfig(this.portTarget(lane), piece, part),
      ),
  };

  private portTarget(lane: number): ConfigTarget | undefined {
    return lane < PORT_WIDTH ? decodePorts(this.portAddress, lane) : undefined;
  }

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
