// An assigned device behind its VFIO file: regions, interrupts, reset. `VfioDeviceAccess` is the seam between what the
// guest sees of a device (vmm/pci) and the kernel. Failures are SystemErrors.

import { closeSync, readSync, writeSync } from "node:fs";
import type { Hva } from "../../hypercalls/addresses.js";
import { SystemError, VmmError } from "../errors.js";
import type { Width } from "../io-bus.js";
import {
  check,
  errnoName,
  ioctl,
  ioctlStruct,
  mmapShared,
  munmap,
  PROT_READ,
  PROT_WRITE,
} from "../native/libc.js";
import { getLe, setLe } from "../pci/config-space.js";
import { getU64, newStruct } from "../sys/layout.js";
import { CONSTANT, IOCTL, STRUCT } from "../sys/vfio.js";
import { capabilities } from "./info-chain.js";

const EAGAIN = 11;

/** A stretch of a region, in bytes from its start. */
export interface Area {
  readonly offset: number;
  readonly bytes: number;
}

export interface RegionInfo {
  /** 0 when the device has no such region. */
  readonly bytes: number;
  /** What may be mapped; empty when nothing may. */
  readonly mappable: readonly Area[];
}

export interface IrqInfo {
  /** 0 when the device has no such interrupt. */
  readonly count: number;
  /** Whether vectors past those that were set first can be set later. */
  readonly growable: boolean;
}

export interface VfioDeviceAccess {
  readonly bdf: string;
  /** Whether the host can reset the device alone. */
  readonly canReset: boolean;
  /** `index` as VFIO numbers them: 0 to 5 the BARs, 7 configuration space. */
  region(index: number): RegionInfo;
  /** `index`: 0 INTx, 1 MSI, 2 MSI-X, 3 errors, 4 requests to give the device back. */
  irq(index: number): IrqInfo;
  /** One access of the device, naturally aligned; `offset` in bytes from the region's start. */
  read(region: number, offset: number, width: Width): number;
  write(region: number, offset: number, width: Width, value: number): void;
  /** Maps whole pages of a region for reading and writing. */
  map(region: number, offset: number, bytes: number): Hva;
  /** The address must not be used afterwards. */
  unmap(address: Hva, bytes: number): void;
  /** Vectors from `start` on signal these eventfds, -1 for none; the first call turns the interrupt on. */
  setTriggers(irq: number, start: number, fds: readonly number[]): void;
  /** The eventfd whose signal unmasks INTx, which the host masks with each interrupt. */
  setUnmask(irq: number, fd: number): void;
  /** Turns an interrupt off as a whole. */
  disableIrq(irq: number): void;
  reset(): void;
  close(): void;
}

/** The real thing. */
export class VfioDevice implements VfioDeviceAccess {
  readonly canReset: boolean;
  private readonly regionCount: number;
  private readonly irqCount: number;
  private readonly regions = new Map<number, RegionInfo & { readonly offset: number }>();
  private readonly scratch = new DataView(new ArrayBuffer(4));
  private open = true;

  /** Takes over `fd`, as VFIO_GROUP_GET_DEVICE_FD gave it. */
  constructor(
    readonly bdf: string,
    private readonly fd: number,
  ) {
    const layout = STRUCT.vfio_device_info;
    const info = newStruct(layout);
    info.setUint32(layout.argsz, layout.size, true);
    check("VFIO_DEVICE_GET_INFO", ioctlStruct(fd, IOCTL.VFIO_DEVICE_GET_INFO, info));
    this.canReset = (info.getUint32(layout.flags, true) & CONSTANT.VFIO_DEVICE_FLAGS_RESET) !== 0;
    this.regionCount = info.getUint32(layout.num_regions, true);
    this.irqCount = info.getUint32(layout.num_irqs, true);
  }

  region(index: number): RegionInfo {
    return this.regionAt(index);
  }

  irq(index: number): IrqInfo {
    if (index >= this.irqCount) return { count: 0, growable: false };
    const layout = STRUCT.vfio_irq_info;
    const info = newStruct(layout);
    info.setUint32(layout.argsz, layout.size, true);
    info.setUint32(layout.index, index, true);
    const result = ioctlStruct(this.fd, IOCTL.VFIO_DEVICE_GET_IRQ_INFO, info);
    // Interrupts of other kinds of devices (AP, CCW) answer EINVAL: not there.
    if (result < 0) return { count: 0, growable: false };
    const flags = info.getUint32(layout.flags, true);
    return {
      count: flags & CONSTANT.VFIO_IRQ_INFO_EVENTFD ? info.getUint32(layout.count, true) : 0,
      growable: (flags & CONSTANT.VFIO_IRQ_INFO_NORESIZE) === 0,
    };
  }

  read(region: number, offset: number, width: Width): number {
    const done = this.transfer("read", () =>
      readSync(this.fd, this.scratch, 0, width, this.at(region, offset)),
    );
    if (done !== width)
      throw new SystemError(`read of region ${region} at 0x${offset.toString(16)}`, 5, "EIO");
    return getLe(this.scratch, 0, width);
  }

  write(region: number, offset: number, width: Width, value: number): void {
    setLe(this.scratch, 0, width, value);
    const done = this.transfer("write", () =>
      writeSync(this.fd, this.scratch, 0, width, this.at(region, offset)),
    );
    if (done !== width)
      throw new SystemError(`write of region ${region} at 0x${offset.toString(16)}`, 5, "EIO");
  }

  map(region: number, offset: number, bytes: number): Hva {
    return mmapShared(this.fd, bytes, this.at(region, offset), PROT_READ | PROT_WRITE);
  }

  unmap(address: Hva, bytes: number): void {
    munmap(address, bytes);
  }

  setTriggers(irq: number, start: number, fds: readonly number[]): void {
    const { VFIO_IRQ_SET_DATA_EVENTFD: eventfds, VFIO_IRQ_SET_ACTION_TRIGGER: trigger } = CONSTANT;
    this.setIrqs(irq, eventfds | trigger, start, fds);
  }

  setUnmask(irq: number, fd: number): void {
    this.setIrqs(irq, CONSTANT.VFIO_IRQ_SET_DATA_EVENTFD | CONSTANT.VFIO_IRQ_SET_ACTION_UNMASK, 0, [fd]);
  }

  disableIrq(irq: number): void {
    this.setIrqs(irq, CONSTANT.VFIO_IRQ_SET_DATA_NONE | CONSTANT.VFIO_IRQ_SET_ACTION_TRIGGER, 0, []);
  }

  reset(): void {
    const result = ioctl(this.fd, IOCTL.VFIO_DEVICE_RESET, 0);
    // The kernel does not wait for the device's lock, which whoever unbinds it holds.
    if (result === -EAGAIN) {
      throw new VmmError(
        `${this.bdf}: cannot be reset: the host is just taking it from vfio-pci; bind it again`,
      );
    }
    check("VFIO_DEVICE_RESET", result);
  }

  close(): void {
    if (this.open) closeSync(this.fd);
    this.open = false;
  }

  private setIrqs(index: number, flags: number, start: number, fds: readonly number[]): void {
    const layout = STRUCT.vfio_irq_set;
    const set = newStruct(layout, 4 * fds.length);
    set.setUint32(layout.argsz, set.byteLength, true);
    set.setUint32(layout.flags, flags, true);
    set.setUint32(layout.index, index, true);
    set.setUint32(layout.start, start, true);
    set.setUint32(layout.count, fds.length, true);
    for (const [i, fd] of fds.entries()) set.setInt32(layout.data + 4 * i, fd, true);
    const result = ioctlStruct(this.fd, IOCTL.VFIO_DEVICE_SET_IRQS, set);
    // A positive answer is how many vectors the host could have given.
    if (result !== 0)
      check(`VFIO_DEVICE_SET_IRQS (host has ${Math.max(result, 0)} vectors)`, result < 0 ? result : -28);
  }

  /** Where byte `offset` of a region is in the device's file. */
  private at(region: number, offset: number): number {
    const { bytes, offset: start } = this.regionAt(region);
    if (offset >= bytes)
      throw new SystemError(`region ${region} has no offset 0x${offset.toString(16)}`, 22, "EINVAL");
    return start + offset;
  }

  private regionAt(index: number): RegionInfo & { readonly offset: number } {
    const known = this.regions.get(index);
    if (known !== undefined) return known;
    const info = index < this.regionCount ? this.queryRegion(index) : { bytes: 0, mappable: [], offset: 0 };
    this.regions.set(index, info);
    return info;
  }

  private queryRegion(index: number): RegionInfo & { readonly offset: number } {
    const layout = STRUCT.vfio_region_info;
    let info = newStruct(layout);
    for (;;) {
      info.setUint32(layout.argsz, info.byteLength, true);
      info.setUint32(layout.index, index, true);
      const result = ioctlStruct(this.fd, IOCTL.VFIO_DEVICE_GET_REGION_INFO, info);
      // The VGA region of a device that is no VGA device answers EINVAL: not there.
      if (result === -22) return { bytes: 0, mappable: [], offset: 0 };
      check(`VFIO_DEVICE_GET_REGION_INFO ${index}`, result);
      const needed = info.getUint32(layout.argsz, true);
      if (needed <= info.byteLength) break;
      info = newStruct(layout, needed - layout.size);
    }
    const flags = info.getUint32(layout.flags, true);
    const bytes = getU64(info, layout.size_);
    let mappable: Area[] = flags & CONSTANT.VFIO_REGION_INFO_FLAG_MMAP ? [{ offset: 0, bytes }] : [];
    // With a sparse capability only its areas may be mapped. MSIX_MAPPABLE says that the pages of the MSI-X table are
    // not among the holes; this VMM traps them either way, so it makes no difference here.
    if (flags & CONSTANT.VFIO_REGION_INFO_FLAG_CAPS) {
      for (const { id, at } of capabilities(info, info.getUint32(layout.cap_offset, true))) {
        if (id === CONSTANT.VFIO_REGION_INFO_CAP_SPARSE_MMAP && mappable.length > 0)
          mappable = sparseAreas(info, at);
      }
    }
    return { bytes, mappable, offset: getU64(info, layout.offset) };
  }

  /** Node throws errors of its own for what read and write answer. */
  private transfer(call: string, action: () => number): number {
    try {
      return action();
    } catch (error) {
      const { errno } = error as NodeJS.ErrnoException;
      if (errno === undefined) throw error;
      throw new SystemError(call, -errno, errnoName(-errno));
    }
  }
}

function sparseAreas(info: DataView, at: number): Area[] {
  const { vfio_region_info_cap_sparse_mmap: sparse, vfio_region_sparse_mmap_area: area } = STRUCT;
  return Array.from({ length: info.getUint32(at + sparse.nr_areas, true) }, (_, i) => {
    const start = at + sparse.areas + i * area.size;
    return { offset: getU64(info, start + area.offset), bytes: getU64(info, start + area.size_) };
  });
}
