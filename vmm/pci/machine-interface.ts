// What the PCI code asks of the machine around it: memory slots, trapped ranges, interrupt routes. Types only.
// Everything here runs on the main thread; vCPUs forward their exits to it.

import type { Gpa, Hva } from "../../hypercalls/addresses.js";
import type { IoHandler } from "../io-bus.js";

/** Registers of an emulated device: its number among them, and which of its BARs. */
export interface RegisterTarget {
  readonly device: number;
  readonly bar: number;
}

/** Every function that fails throws a SystemError or a VmmError. Lengths of slots are whole pages. */
export interface PciMachine {
  /** Puts memory of this process into the guest's address space (KVM_SET_USER_MEMORY_REGION). Returns the slot. */
  addMemslot(gpa: Gpa, bytes: number, hva: Hva): number;
  /** When it returns no vCPU reaches the memory through this slot any more. */
  removeMemslot(slot: number): void;

  addMmio(gpa: Gpa, bytes: number, handler: IoHandler): void;
  removeMmio(gpa: Gpa): void;

  /** Whole pages that are registers of an emulated device: vCPUs take accesses there to its thread themselves. */
  addRegisters(gpa: Gpa, bytes: number, target: RegisterTarget): void;
  removeRegisters(gpa: Gpa): void;

  addPio(port: number, count: number, handler: IoHandler): void;
  removePio(port: number): void;

  /** A GSI for one message-signalled interrupt. */
  allocateGsi(): number;
  freeGsi(gsi: number): void;
  /** Sets or replaces the message of a GSI. The machine keeps the table that KVM_SET_GSI_ROUTING replaces as a whole. */
  setMsiRoute(gsi: number, addressLo: number, addressHi: number, data: number): void;
  clearRoute(gsi: number): void;
  /** Connects an eventfd to a GSI, or disconnects it. `resampleFd`: level-triggered, signalled at the guest's EOI. */
  irqfd(gsi: number, eventfd: number, assign: boolean, resampleFd?: number): void;
  /** The GSI that a slot's interrupt pin (1 to 4 for A to D) is wired to. */
  intxGsi(slot: number, pin: number): number;
}
