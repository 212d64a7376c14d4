// /dev/kvm: the VM and its vCPUs as objects over ioctls. Main thread; a vCPU's KVM_RUN loop is in vcpu.ts.
// Every failure is a SystemError or a VmmError that names what was asked for.

import { closeSync, openSync } from "node:fs";
import type { Gpa, Hva } from "../hypercalls/addresses.js";
import { ERRNO } from "../hypercalls/status.js";
import { IOAPIC_PINS } from "./boot/acpi.js";
import type { CpuidEntry } from "./boot/cpuid.js";
import { VmmError } from "./errors.js";
import { addressOf, check, ioctl, ioctlStruct } from "./native/libc.js";
import { CONSTANT, IOCTL, STRUCT } from "./sys/kvm.js";
import { newStruct, setU64 } from "./sys/layout.js";

/** Entries KVM_GET_SUPPORTED_CPUID may return: current kernels have about 60. */
const CPUID_ENTRIES = 256;
/** Highest GSI, exclusive (KVM_MAX_IRQ_ROUTES in linux/kvm_host.h). */
const GSI_LIMIT = 4096;
/** More signals than this while a VM is made are not chance. */
const CREATE_VM_TRIES = 100;

/** The KVM device itself: what this host can do. */
export class Kvm {
  private constructor(readonly fd: number) {}

  /** Opens /dev/kvm and checks what this VMM cannot do without. */
  static open(path = "/dev/kvm"): Kvm {
    let fd: number;
    try {
      fd = openSync(path, "r+");
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      if (code === "ENOENT" || code === "ENXIO" || code === "ENODEV") {
        throw new VmmError(
          `${path}: there is no KVM here (${code}); load kvm-intel or kvm-amd and enable virtualization in the firmware`,
        );
      }
      if (code === "EACCES" || code === "EPERM") {
        throw new VmmError(
          `${path}: no permission (${code}); add the user to the group that owns it, usually kvm`,
        );
      }
      throw new VmmError(`${path}: cannot be opened (${code})`);
    }
    const kvm = new Kvm(fd);
    const version = ioctl(fd, IOCTL.KVM_GET_API_VERSION, 0);
    if (version !== 12)
      throw new VmmError(`${path}: KVM API version ${version}, 12 is needed; is this a KVM device?`);
    const needed: readonly (keyof typeof CONSTANT)[] = [
      "KVM_CAP_USER_MEMORY",
      "KVM_CAP_IRQCHIP",
      "KVM_CAP_IRQFD",
      "KVM_CAP_IRQFD_RESAMPLE",
      "KVM_CAP_EXT_CPUID",
      "KVM_CAP_IMMEDIATE_EXIT",
    ];
    for (const name of needed) {
      if (kvm.capability(CONSTANT[name]) <= 0) throw new VmmError(`${path}: this kernel's KVM lacks ${name}`);
    }
    const registers = CONSTANT.KVM_SYNC_X86_REGS | CONSTANT.KVM_SYNC_X86_SREGS;
    if ((kvm.capability(CONSTANT.KVM_CAP_SYNC_REGS) & registers) !== registers) {
      throw new VmmError(`${path}: this kernel's KVM does not share registers (KVM_CAP_SYNC_REGS)`);
    }
    return kvm;
  }

  /** KVM_CHECK_EXTENSION: 0 when unsupported. */
  capability(number: number): number {
    return ioctl(this.fd, IOCTL.KVM_CHECK_EXTENSION, number);
  }

  /** The CPUID leaves KVM can give a guest on this host. */
  supportedCpuid(): CpuidEntry[] {
    const layout = STRUCT.kvm_cpuid_entry2;
    const struct = newStruct(STRUCT.kvm_cpuid2, CPUID_ENTRIES * layout.size);
    struct.setUint32(STRUCT.kvm_cpuid2.nent, CPUID_ENTRIES, true);
    check("KVM_GET_SUPPORTED_CPUID", ioctlStruct(this.fd, IOCTL.KVM_GET_SUPPORTED_CPUID, struct));
    return Array.from({ length: struct.getUint32(STRUCT.kvm_cpuid2.nent, true) }, (_, i) => {
      const at = STRUCT.kvm_cpuid2.entries + i * layout.size;
      const field = (offset: number) => struct.getUint32(at + offset, true);
      return {
        function: field(layout.function),
        index: field(layout.index),
        flags: field(layout.flags),
        eax: field(layout.eax),
        ebx: field(layout.ebx),
        ecx: field(layout.ecx),
        edx: field(layout.edx),
      };
    });
  }

  /** Bytes of a vCPU's shared kvm_run area. */
  runBytes(): number {
    return check("KVM_GET_VCPU_MMAP_SIZE", ioctl(this.fd, IOCTL.KVM_GET_VCPU_MMAP_SIZE, 0));
  }

  createVm(): Vm {
    for (let tries = 1; ; tries++) {
      const fd = ioctl(this.fd, IOCTL.KVM_CREATE_VM, 0);
      // Whatever signal comes meanwhile ends it: a profiler's, for one.
      if (fd === -ERRNO.EINTR && tries < CREATE_VM_TRIES) continue;
      return new Vm(this, check("KVM_CREATE_VM", fd));
    }
  }

  close(): void {
    closeSync(this.fd);
  }
}

interface MsiRoute {
  readonly addressLo: number;
  readonly addressHi: number;
  readonly data: number;
}

/** One virtual machine: memory slots, the in-kernel interrupt controllers, interrupt routes. */
export class Vm {
  private readonly freeSlots: number[] = [];
  private nextSlot = 0;
  private readonly slotLimit: number;
  private readonly msiRoutes = new Map<number, MsiRoute>();
  private readonly freeGsis: number[] = [];
  private nextGsi = IOAPIC_PINS;
  private vfioDevice = -1;

  constructor(
    kvm: Kvm,
    readonly fd: number,
  ) {
    this.slotLimit = Math.max(32, kvm.capability(CONSTANT.KVM_CAP_NR_MEMSLOTS));
  }

  /**
   * PIC, IOAPIC, LAPICs and PIT in the kernel. `tssAddress` (3 pages) and `identityMapAddress` (1 page) are guest
   * addresses below 4 GiB outside RAM that KVM uses on Intel CPUs without unrestricted guest mode.
   */
  createInterruptControllers(tssAddress: number, identityMapAddress: number): void {
    const identity = new DataView(new ArrayBuffer(8));
    setU64(identity, 0, identityMapAddress);
    check("KVM_SET_IDENTITY_MAP_ADDR", ioctlStruct(this.fd, IOCTL.KVM_SET_IDENTITY_MAP_ADDR, identity));
    check("KVM_SET_TSS_ADDR", ioctl(this.fd, IOCTL.KVM_SET_TSS_ADDR, tssAddress));
    check("KVM_CREATE_IRQCHIP", ioctl(this.fd, IOCTL.KVM_CREATE_IRQCHIP, 0));
    const pit = newStruct(STRUCT.kvm_pit_config);
    pit.setUint32(STRUCT.kvm_pit_config.flags, CONSTANT.KVM_PIT_SPEAKER_DUMMY, true);
    check("KVM_CREATE_PIT2", ioctlStruct(this.fd, IOCTL.KVM_CREATE_PIT2, pit));
    this.writeRoutes();
  }

  /** Adds guest memory: `bytes` whole pages at `gpa`, backed by this process's memory at `hva`. Returns the slot. */
  addMemslot(gpa: Gpa, bytes: number, hva: Hva): number {
    const slot = this.freeSlots.pop() ?? this.nextSlot++;
    if (slot >= this.slotLimit)
      throw new VmmError(`KVM has only ${this.slotLimit} memory slots; assign fewer devices`);
    try {
      this.setMemslot(slot, gpa, bytes, hva);
    } catch (error) {
      this.freeSlots.push(slot);
      throw error;
    }
    return slot;
  }

  removeMemslot(slot: number): void {
    this.setMemslot(slot, 0, 0, 0);
    this.freeSlots.push(slot);
  }

  private setMemslot(slot: number, gpa: number, bytes: number, hva: number): void {
    const layout = STRUCT.kvm_userspace_memory_region;
    const struct = newStruct(layout);
    struct.setUint32(layout.slot, slot, true);
    setU64(struct, layout.guest_phys_addr, gpa);
    setU64(struct, layout.memory_size, bytes);
    setU64(struct, layout.userspace_addr, hva);
    check(
      `KVM_SET_USER_MEMORY_REGION gpa 0x${gpa.toString(16)}, ${bytes} bytes`,
      ioctlStruct(this.fd, IOCTL.KVM_SET_USER_MEMORY_REGION, struct),
    );
  }

  /** A GSI of its own for a message-signalled interrupt. */
  allocateGsi(): number {
    const gsi = this.freeGsis.pop() ?? this.nextGsi++;
    if (gsi >= GSI_LIMIT)
      throw new VmmError(`KVM has only ${GSI_LIMIT} interrupt routes; assign fewer devices`);
    return gsi;
  }

  freeGsi(gsi: number): void {
    this.freeGsis.push(gsi);
  }

  /** Routes a GSI to the message (address, data) that a device would have written. */
  setMsiRoute(gsi: number, addressLo: number, addressHi: number, data: number): void {
    const before = this.msiRoutes.get(gsi);
    this.msiRoutes.set(gsi, { addressLo, addressHi, data });
    try {
      this.writeRoutes();
    } catch (error) {
      // A route that KVM refuses must not stay in the table: every later one would be refused with it.
      if (before === undefined) this.msiRoutes.delete(gsi);
      else this.msiRoutes.set(gsi, before);
      throw error;
    }
  }

  clearMsiRoute(gsi: number): void {
    if (this.msiRoutes.delete(gsi)) this.writeRoutes();
  }

  /** KVM_SET_GSI_ROUTING replaces the whole table, so the controllers' own pins are in it every time. */
  private writeRoutes(): void {
    const { kvm_irq_routing: head, kvm_irq_routing_entry: entry } = STRUCT;
    const picPins = 16;
    const count = picPins + IOAPIC_PINS + this.msiRoutes.size;
    const struct = newStruct(head, count * entry.size);
    struct.setUint32(head.nr, count, true);
    let at: number = head.entries;
    const next = (gsi: number, type: number): number => {
      const start = at;
      struct.setUint32(start + entry.gsi, gsi, true);
      struct.setUint32(start + entry.type, type, true);
      at += entry.size;
      return start;
    };
    for (let pin = 0; pin < picPins; pin++) {
      const start = next(pin, CONSTANT.KVM_IRQ_ROUTING_IRQCHIP);
      const chip = pin < 8 ? CONSTANT.KVM_IRQCHIP_PIC_MASTER : CONSTANT.KVM_IRQCHIP_PIC_SLAVE;
      struct.setUint32(start + entry["u.irqchip.irqchip"], chip, true);
      struct.setUint32(start + entry["u.irqchip.pin"], pin % 8, true);
    }
    for (let pin = 0; pin < IOAPIC_PINS; pin++) {
      const start = next(pin, CONSTANT.KVM_IRQ_ROUTING_IRQCHIP);
      struct.setUint32(start + entry["u.irqchip.irqchip"], CONSTANT.KVM_IRQCHIP_IOAPIC, true);
      struct.setUint32(start + entry["u.irqchip.pin"], pin, true);
    }
    for (const [gsi, route] of this.msiRoutes) {
      const start = next(gsi, CONSTANT.KVM_IRQ_ROUTING_MSI);
      struct.setUint32(start + entry["u.msi.address_lo"], route.addressLo, true);
      struct.setUint32(start + entry["u.msi.address_hi"], route.addressHi, true);
      struct.setUint32(start + entry["u.msi.data"], route.data, true);
    }
    check("KVM_SET_GSI_ROUTING", ioctlStruct(this.fd, IOCTL.KVM_SET_GSI_ROUTING, struct));
  }

  /**
   * Connects an eventfd to a GSI, or disconnects it. With `resampleFd` the GSI is level-triggered: the line falls and
   * `resampleFd` is signalled when the guest acknowledges it.
   */
  irqfd(gsi: number, fd: number, assign: boolean, resampleFd?: number): void {
    const layout = STRUCT.kvm_irqfd;
    const struct = newStruct(layout);
    struct.setUint32(layout.fd, fd, true);
    struct.setUint32(layout.gsi, gsi, true);
    let flags = assign ? 0 : CONSTANT.KVM_IRQFD_FLAG_DEASSIGN;
    if (resampleFd !== undefined && assign) {
      flags |= CONSTANT.KVM_IRQFD_FLAG_RESAMPLE;
      struct.setUint32(layout.resamplefd, resampleFd, true);
    }
    struct.setUint32(layout.flags, flags, true);
    check(`KVM_IRQFD gsi ${gsi}`, ioctlStruct(this.fd, IOCTL.KVM_IRQFD, struct));
  }

  /** Tells KVM of a VFIO group, so that it keeps CPU caches and the device coherent. Before its device is opened. */
  addVfioGroup(groupFd: number): void {
    this.setVfioGroup("KVM_DEV_VFIO_GROUP_ADD", groupFd);
  }

  /** KVM lets go of a group's file, which it holds open. After its devices are closed. */
  removeVfioGroup(groupFd: number): void {
    this.setVfioGroup("KVM_DEV_VFIO_GROUP_DEL", groupFd);
  }

  private setVfioGroup(what: "KVM_DEV_VFIO_GROUP_ADD" | "KVM_DEV_VFIO_GROUP_DEL", groupFd: number): void {
    if (this.vfioDevice < 0) {
      const layout = STRUCT.kvm_create_device;
      const struct = newStruct(layout);
      struct.setUint32(layout.type, CONSTANT.KVM_DEV_TYPE_VFIO, true);
      check("KVM_CREATE_DEVICE vfio", ioctlStruct(this.fd, IOCTL.KVM_CREATE_DEVICE, struct));
      this.vfioDevice = struct.getUint32(layout.fd, true);
    }
    const layout = STRUCT.kvm_device_attr;
    // The value, a 32-bit file number, is read through a pointer: it follows the structure in the same buffer.
    const struct = newStruct(layout, 4);
    struct.setInt32(layout.size, groupFd, true);
    struct.setUint32(layout.group, CONSTANT.KVM_DEV_VFIO_GROUP, true);
    setU64(struct, layout.attr, CONSTANT[what]);
    setU64(struct, layout.addr, addressOf(struct) + layout.size);
    check(what, ioctlStruct(this.vfioDevice, IOCTL.KVM_SET_DEVICE_ATTR, struct));
  }

  createVcpu(id: number): number {
    return check(`KVM_CREATE_VCPU ${id}`, ioctl(this.fd, IOCTL.KVM_CREATE_VCPU, id));
  }

  /** Closes the VM. Its memory is freed when the last vCPU is closed too. */
  close(): void {
    if (this.vfioDevice >= 0) closeSync(this.vfioDevice);
    closeSync(this.fd);
  }
}
