// What a vCPU's thread and the main thread share: the job it is given, the word that stops it, counters of its exits,
// and the messages it sends.

import type { Hva } from "../hypercalls/addresses.js";
import type { EngineState } from "../hypercalls/engine.js";
import type { BackendHandle } from "./dma-backend.js";
import type { LinkState } from "./emul/link.js";
import type { RamDescription } from "./guest-memory.js";
import type { TableDescription } from "./tracking-table.js";

/** Everything a Worker needs to run one vCPU; structured-cloneable. */
export interface VcpuJob {
  readonly index: number;
  readonly vmFd: number;
  readonly vcpuFd: number;
  /** Where the kvm_run area is mapped, and its size. */
  readonly runAddress: Hva;
  readonly runBytes: number;
  readonly ram: RamDescription;
  readonly engine: EngineState;
  /** What is behind each DMA domain, by domain id. */
  readonly backends: readonly BackendHandle[];
  /** The tracking tables of those that are cached, by domain id. */
  readonly tables: readonly (TableDescription | undefined)[];
  /** Which addresses are registers of emulated devices, and the devices by their numbers. */
  readonly registerMap: SharedArrayBuffer;
  readonly emulated: readonly LinkState[];
  readonly serial: SharedArrayBuffer;
  /** The PCI address register, which all vCPUs share. */
  readonly configAddress: SharedArrayBuffer;
  readonly slowExits: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
}

// The control block: two words, then a counter per kind of exit.
export const CONTROL_STOP = 0;
/** The thread's id, once it runs: where to send the signal that brings it out of KVM_RUN. */
export const CONTROL_TID = 1;
const CONTROL_BYTES = 8;

/** Kinds of exits to this program, as the statistics name them. */
export const EXIT_KINDS = ["hypercall", "serial", "pio", "mmio", "interrupted", "other"] as const;
export type ExitKind = (typeof EXIT_KINDS)[number];
export const EXIT_INDEX = Object.fromEntries(EXIT_KINDS.map((kind, index) => [kind, index])) as Record<
  ExitKind,
  number
>;

export const newVcpuControl = (): SharedArrayBuffer =>
  new SharedArrayBuffer(CONTROL_BYTES + EXIT_KINDS.length * 8);
export const controlWords = (control: SharedArrayBuffer): Int32Array => new Int32Array(control, 0, 2);
/** Written by the vCPU alone; an aligned double does not tear on x86-64. */
export const exitCounters = (control: SharedArrayBuffer): Float64Array =>
  new Float64Array(control, CONTROL_BYTES);

/** Why a vCPU's thread ended. */
export type VcpuEnd =
  | { readonly kind: "stopped" }
  /** `ranMs` after it entered the guest for the first time. */
  | { readonly kind: "triple-fault"; readonly ranMs: number }
  | { readonly kind: "failed"; readonly why: string };

/** Messages from a vCPU: it waits for a slow exit, it wrote to the serial port, or it ended. */
export const RING_SLOW_EXIT = 0;
export const RING_SERIAL = 1;
export type VcpuMessage = typeof RING_SLOW_EXIT | typeof RING_SERIAL | VcpuEnd;
