// The kvm_run area that the kernel and a vCPU's thread share: why the guest stopped, and its registers
// (KVM_CAP_SYNC_REGS: linux/Documentation/virt/kvm/api.rst, 5.). Plain loads and stores, nothing allocated per exit.

import type { Hva } from "../hypercalls/addresses.js";
import { memoryWindow } from "./native/memory-window.js";
import { CONSTANT, STRUCT } from "./sys/kvm.js";

const RUN = STRUCT.kvm_run;
const REGS = STRUCT.kvm_regs;
const REGISTERS = RUN["s.regs"];
const CPL = REGISTERS + STRUCT.kvm_sync_regs.sregs + STRUCT.kvm_sregs.ss + STRUCT.kvm_segment.dpl;

/** Byte offsets of the registers that calls use, in kvm_run. */
export const REGISTER = {
  rax: REGISTERS + REGS.rax,
  rsi: REGISTERS + REGS.rsi,
  rdi: REGISTERS + REGS.rdi,
  r8: REGISTERS + REGS.r8,
  r9: REGISTERS + REGS.r9,
  r10: REGISTERS + REGS.r10,
  rip: REGISTERS + REGS.rip,
} as const;

export class RunArea {
  private readonly bytes: Uint8Array;
  private readonly words: Uint32Array;
  private readonly view: DataView;

  /** `address` is where `bytes` bytes of the vCPU's file are mapped; they stay mapped while this object is used. */
  constructor(address: Hva, bytes: number) {
    const window = memoryWindow(address, bytes);
    this.bytes = new Uint8Array(window.buffer, window.byteOffset, bytes);
    this.words = new Uint32Array(window.buffer, window.byteOffset, bytes / 4);
    this.view = new DataView(window.buffer, window.byteOffset, bytes);
    // The registers come with every exit, segments included: a call is refused unless CPL is 0, and asking for it
    // by an ioctl of its own would cost more than the copy.
    this.words[RUN.kvm_valid_regs / 4] = CONSTANT.KVM_SYNC_X86_REGS | CONSTANT.KVM_SYNC_X86_SREGS;
  }

  /** With 1, KVM_RUN returns -EINTR before it enters the guest. */
  set immediateExit(value: 0 | 1) {
    this.bytes[RUN.immediate_exit] = value;
  }
  get exitReason(): number {
    return this.words[RUN.exit_reason / 4]!;
  }

  // KVM_EXIT_IO
  get ioIsOut(): boolean {
    return this.bytes[RUN["io.direction"]] === CONSTANT.KVM_EXIT_IO_OUT;
  }
  /** Bytes per access: 1, 2 or 4. */
  get ioWidth(): number {
    return this.bytes[RUN["io.size"]]!;
  }
  get ioPort(): number {
    return this.view.getUint16(RUN["io.port"], true);
  }
  /** Accesses in this exit; more than 1 for string instructions. */
  get ioCount(): number {
    return this.words[RUN["io.count"] / 4]!;
  }
  /** Where in this area the data of the accesses is. */
  get ioDataOffset(): number {
    return this.words[RUN["io.data_offset"] / 4]!;
  }

  // KVM_EXIT_MMIO
  /** Guest-physical address; above 2^53 rounded, which no range here reaches. */
  get mmioAddress(): number {
    return this.u64(RUN["mmio.phys_addr"]);
  }
  /** Bytes: 1 to 8. */
  get mmioBytes(): number {
    return this.words[RUN["mmio.len"] / 4]!;
  }
  get mmioIsWrite(): boolean {
    return this.bytes[RUN["mmio.is_write"]] !== 0;
  }
  /** Where in this area the data of the access is. */
  readonly mmioDataOffset = RUN["mmio.data"];

  // KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR
  get failEntryReason(): number {
    return this.u64(RUN["fail_entry.hardware_entry_failure_reason"]);
  }
  get internalSuberror(): number {
    return this.words[RUN["internal.suberror"] / 4]!;
  }

  /** The privilege level the guest was at. */
  get cpl(): number {
    return this.bytes[CPL]!;
  }

  /** Reads a little-endian number of 1, 2 or 4 bytes. */
  read(offset: number, bytes: number): number {
    if (bytes === 1) return this.bytes[offset]!;
    return bytes === 2 ? this.view.getUint16(offset, true) : this.view.getUint32(offset, true);
  }
  write(offset: number, bytes: number, value: number): void {
    if (bytes === 1) this.bytes[offset] = value;
    else if (bytes === 2) this.view.setUint16(offset, value, true);
    else this.view.setUint32(offset, value, true);
  }

  /** A 64-bit register; exact below 2^53. `offset` is one of REGISTER. */
  u64(offset: number): number {
    const at = offset >> 2;
    return this.words[at]! + this.words[at + 1]! * 2 ** 32;
  }
  setU64(offset: number, value: number): void {
    // A Uint32Array takes values modulo 2^32.
    const at = offset >> 2;
    this.words[at] = value;
    this.words[at + 1] = value / 2 ** 32;
  }
  /** The next KVM_RUN takes the general registers from here. */
  markRegistersDirty(): void {
    this.words[RUN.kvm_dirty_regs / 4] = CONSTANT.KVM_SYNC_X86_REGS;
  }
}
