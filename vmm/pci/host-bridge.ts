// The function at 00.0: guests take a host bridge there for the sign that configuration accesses work at all.

import type { Width } from "../io-bus.js";
import { ConfigSpace } from "./config-space.js";
import type { PciFunction } from "./function.js";
import { PCI } from "./registers.js";

/** "PCIe Host bridge" of Red Hat's range for virtual devices: guests know it and attach no quirk to it. */
const VENDOR = 0x1b36;
const DEVICE = 0x0008;
const CLASS_BRIDGE_HOST = 0x0600;

export class HostBridge implements PciFunction {
  readonly name = "host bridge";
  private readonly config = new ConfigSpace();

  constructor() {
    this.config.set(PCI.PCI_VENDOR_ID, 2, VENDOR);
    this.config.set(PCI.PCI_DEVICE_ID, 2, DEVICE);
    this.config.set(PCI.PCI_CLASS_DEVICE, 2, CLASS_BRIDGE_HOST);
  }

  readConfig(register: number, width: Width): number {
    return this.config.read(register, width);
  }

  writeConfig(): void {}
  close(): void {}
}
