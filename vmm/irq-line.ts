// Drives a pin of the in-kernel interrupt controllers, from any thread.

import { check, ioctlStruct } from "./native/libc.js";
import { IOCTL, STRUCT } from "./sys/kvm.js";
import { newStruct } from "./sys/layout.js";

/** A function that sets the level of pin `gsi` (0 to 23) of the VM behind `vmFd`. Throws a SystemError. */
export function irqLine(vmFd: number, gsi: number): (level: 0 | 1) => void {
  const struct = newStruct(STRUCT.kvm_irq_level);
  struct.setUint32(STRUCT.kvm_irq_level.irq, gsi, true);
  return (level) => {
    struct.setUint32(STRUCT.kvm_irq_level.level, level, true);
    check("KVM_IRQ_LINE", ioctlStruct(vmFd, IOCTL.KVM_IRQ_LINE, struct));
  };
}
