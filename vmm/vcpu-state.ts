// A vCPU's state before its first instruction: CPUID, a few MSRs, the local APIC's pins, and the boot registers.

import type { CpuidEntry } from "./boot/cpuid.js";
import type { BootRegisters, Segment } from "./boot/linux.js";
import { VmmError } from "./errors.js";
import { check, ioctlStruct } from "./native/libc.js";
import { IOCTL, STRUCT } from "./sys/kvm.js";
import { newStruct, setU64 } from "./sys/layout.js";

export function setCpuid(vcpuFd: number, entries: readonly CpuidEntry[]): void {
  const layout = STRUCT.kvm_cpuid_entry2;
  const struct = newStruct(STRUCT.kvm_cpuid2, entries.length * layout.size);
  struct.setUint32(STRUCT.kvm_cpuid2.nent, entries.length, true);
  entries.forEach((entry, i) => {
    const at = STRUCT.kvm_cpuid2.entries + i * layout.size;
    for (const field of ["function", "index", "flags", "eax", "ebx", "ecx", "edx"] as const) {
      struct.setUint32(at + layout[field], entry[field] >>> 0, true);
    }
  });
  check("KVM_SET_CPUID2", ioctlStruct(vcpuFd, IOCTL.KVM_SET_CPUID2, struct));
}

const MSR_IA32_MISC_ENABLE = 0x1a0;
const MISC_ENABLE_FAST_STRING = 1;
const MSR_MTRR_DEF_TYPE = 0x2ff;
/** MTRRs on, write-back by default (Intel SDM 3A, 12.11.2.1). */
const MTRR_ON_WRITE_BACK = (1 << 11) | 6;

/**
 * MSRs that firmware would have set. A device whose DMA is not coherent makes KVM honour the guest's MTRRs; with the
 * reset value, uncached, a boot of one second takes twenty.
 */
export function setMsrs(vcpuFd: number): void {
  const msrs = [
    [MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING],
    [MSR_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK],
  ] as const;
  const layout = STRUCT.kvm_msr_entry;
  const struct = newStruct(STRUCT.kvm_msrs, msrs.length * layout.size);
  struct.setUint32(STRUCT.kvm_msrs.nmsrs, msrs.length, true);
  msrs.forEach(([index, value], i) => {
    const at = STRUCT.kvm_msrs.entries + i * layout.size;
    struct.setUint32(at + layout.index, index, true);
    setU64(struct, at + layout.data, value);
  });
  const done = check("KVM_SET_MSRS", ioctlStruct(vcpuFd, IOCTL.KVM_SET_MSRS, struct));
  if (done < msrs.length) throw new VmmError(`KVM does not take MSR 0x${msrs[done]![0].toString(16)}`);
}

const LVT_LINT0 = 0x350;
const LVT_LINT1 = 0x360;
const DELIVERY_NMI = 4 << 8;
const DELIVERY_EXTINT = 7 << 8;

/** LINT0 takes the PIC's interrupts and LINT1 NMIs, as firmware sets them (MultiProcessor Specification 1.4, 3.6.1). */
export function setLocalApicPins(vcpuFd: number): void {
  const struct = newStruct(STRUCT.kvm_lapic_state);
  check("KVM_GET_LAPIC", ioctlStruct(vcpuFd, IOCTL.KVM_GET_LAPIC, struct));
  struct.setUint32(STRUCT.kvm_lapic_state.regs + LVT_LINT0, DELIVERY_EXTINT, true);
  struct.setUint32(STRUCT.kvm_lapic_state.regs + LVT_LINT1, DELIVERY_NMI, true);
  check("KVM_SET_LAPIC", ioctlStruct(vcpuFd, IOCTL.KVM_SET_LAPIC, struct));
}

/** Puts the boot processor where the boot protocol wants it; other vCPUs wait for its start-up interrupts. */
export function setBootRegisters(vcpuFd: number, boot: BootRegisters): void {
  const layout = STRUCT.kvm_sregs;
  const sregs = newStruct(layout);
  check("KVM_GET_SREGS", ioctlStruct(vcpuFd, IOCTL.KVM_GET_SREGS, sregs));
  writeSegment(sregs, layout.cs, boot.cs);
  for (const name of ["ds", "es", "fs", "gs", "ss"] as const) writeSegment(sregs, layout[name], boot.ds);
  setU64(sregs, layout.gdt + STRUCT.kvm_dtable.base, boot.gdt.base);
  sregs.setUint16(layout.gdt + STRUCT.kvm_dtable.limit, boot.gdt.limit, true);
  for (const name of ["cr0", "cr3", "cr4", "efer"] as const) setU64(sregs, layout[name], boot[name]);
  check("KVM_SET_SREGS", ioctlStruct(vcpuFd, IOCTL.KVM_SET_SREGS, sregs));

  const regs = newStruct(STRUCT.kvm_regs);
  for (const name of ["rip", "rsi", "rsp", "rflags"] as const)
    setU64(regs, STRUCT.kvm_regs[name], boot[name]);
  check("KVM_SET_REGS", ioctlStruct(vcpuFd, IOCTL.KVM_SET_REGS, regs));
}

function writeSegment(sregs: DataView, at: number, segment: Segment): void {
  const layout = STRUCT.kvm_segment;
  setU64(sregs, at + layout.base, segment.base);
  sregs.setUint32(at + layout.limit, segment.limit, true);
  sregs.setUint16(at + layout.selector, segment.selector, true);
  for (const name of ["type", "present", "dpl", "db", "s", "l", "g"] as const) {
    sregs.setUint8(at + layout[name], segment[name]);
  }
  sregs.setUint8(at + layout.unusable, 0);
}
