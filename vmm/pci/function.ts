// What the bus needs of a PCI function, whoever implements it. Types only.

import type { Width } from "../io-bus.js";

/** Registers are naturally aligned, 0 to 4095. Nothing here throws for what the guest does. */
export interface PciFunction {
  /** For messages: the host's BDF, or what the function is. */
  readonly name: string;
  readConfig(register: number, width: Width): number;
  writeConfig(register: number, width: Width, value: number): void;
  /** Gives back what the function holds of the machine and the host. */
  close(): void;
}
