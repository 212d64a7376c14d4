// A VFIO container (one IOMMU domain, type1v2) and the groups in it. Opening is for the main thread; the backend that
// maps and unmaps is for every thread, over the container's file descriptor.

import { closeSync, openSync } from "node:fs";
import { join } from "node:path";
import { type Hva, type Iova, MAX_EXACT } from "../../hypercalls/addresses.js";
import type { BackendLimits, DmaBackend } from "../../hypercalls/backend.js";
import { VmmError } from "../errors.js";
import { check, errnoName, ioctl, ioctlStruct, preparedIoctl } from "../native/libc.js";
import { getU64, newStruct, setU64 } from "../sys/layout.js";
import { CONSTANT, IOCTL, STRUCT } from "../sys/vfio.js";
import { VfioDevice } from "./device.js";
import { capabilities } from "./info-chain.js";

/** Entries type1 takes where the kernel does not say (before 5.10): the module parameter's default. */
const DEFAULT_ENTRIES = 65535;

/** Maps through VFIO. One per thread: its buffers are its own, and a call allocates nothing. */
export class VfioBackend implements DmaBackend {
  private readonly mapArgs = newStruct(STRUCT.vfio_iommu_type1_dma_map);
  private readonly unmapArgs = newStruct(STRUCT.vfio_iommu_type1_dma_unmap);
  private readonly mapDma: () => number;
  private readonly unmapDma: () => number;

  /** `containerFd` stays the container's, which has to outlive the backend. */
  constructor(containerFd: number) {
    this.mapDma = preparedIoctl(containerFd, IOCTL.VFIO_IOMMU_MAP_DMA, this.mapArgs);
    this.unmapDma = preparedIoctl(containerFd, IOCTL.VFIO_IOMMU_UNMAP_DMA, this.unmapArgs);
    this.mapArgs.setUint32(STRUCT.vfio_iommu_type1_dma_map.argsz, this.mapArgs.byteLength, true);
    this.unmapArgs.setUint32(STRUCT.vfio_iommu_type1_dma_unmap.argsz, this.unmapArgs.byteLength, true);
  }

  /** VFIO_IOMMU_MAP_DMA; MAP_FLAG's bits are VFIO's. ENOSPC: no entry left; ENOMEM: locked-memory limit, or no memory. */
  map(iova: Iova, hva: Hva, bytes: number, access: number): number {
    const layout = STRUCT.vfio_iommu_type1_dma_map;
    this.mapArgs.setUint32(layout.flags, access, true);
    setU64(this.mapArgs, layout.vaddr, hva);
    setU64(this.mapArgs, layout.iova, iova);
    setU64(this.mapArgs, layout.size_, bytes);
    const result = this.mapDma();
    return result < 0 ? -result : 0;
  }

  /** VFIO_IOMMU_UNMAP_DMA. EINVAL: an entry would be cut in two. The kernel writes what it did into `size`. */
  unmap(iova: Iova, bytes: number): number {
    const layout = STRUCT.vfio_iommu_type1_dma_unmap;
    setU64(this.unmapArgs, layout.iova, iova);
    setU64(this.unmapArgs, layout.size_, bytes);
    const result = this.unmapDma();
    return result < 0 ? result : getU64(this.unmapArgs, layout.size_);
  }
}

/** Opens a file below /dev/vfio, with the user's errors for what can go wrong. */
function openVfio(path: string, about: string, hints: Readonly<Record<string, string>>): number {
  try {
    return openSync(path, "r+");
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    const hint = hints[code];
    throw new VmmError(`${about}: cannot open ${path} (${code})${hint === undefined ? "" : `: ${hint}`}`);
  }
}

/** An IOMMU domain of our own. Groups are added to it, memory is mapped in it. */
export class VfioContainer {
  private hasIommu = false;

  private constructor(readonly fd: number) {}

  /** Opens `dev`/vfio/vfio and checks that the host speaks our version of VFIO. Throws a VmmError. */
  static open(dev = "/dev"): VfioContainer {
    const path = join(dev, "vfio/vfio");
    const fd = openVfio(path, "VFIO", {
      ENOENT: "VFIO is not loaded; run: modprobe vfio-pci",
      ENODEV: "VFIO is not loaded; run: modprobe vfio-pci",
      EACCES: `no permission; run: chmod 0666 ${path} (it gives access to no device)`,
    });
    const container = new VfioContainer(fd);
    try {
      const version = ioctl(fd, IOCTL.VFIO_GET_API_VERSION, 0);
      if (version < 0) throw new VmmError(`${path}: is not VFIO's container device (${errnoName(-version)})`);
      if (version !== CONSTANT.VFIO_API_VERSION) {
        throw new VmmError(
          `${path}: VFIO API version ${version}, this program speaks ${CONSTANT.VFIO_API_VERSION}`,
        );
      }
      if (ioctl(fd, IOCTL.VFIO_CHECK_EXTENSION, CONSTANT.VFIO_TYPE1v2_IOMMU) <= 0) {
        throw new VmmError(`${path}: no type1v2 IOMMU; run: modprobe vfio_iommu_type1`);
      }
      return container;
    } catch (error) {
      container.close();
      throw error;
    }
  }

  /** Adds a group; the first one makes the domain. Throws a VmmError that starts with `about`. */
  attach(groupFd: number, about: string): void {
    const fd = Int32Array.of(this.fd);
    const attached = ioctlStruct(groupFd, IOCTL.VFIO_GROUP_SET_CONTAINER, fd);
    if (attached < 0) {
      throw new VmmError(
        `${about}: its group cannot join the VFIO container (VFIO_GROUP_SET_CONTAINER: ${errnoName(-attached)})`,
      );
    }
    if (this.hasIommu) return;
    const set = ioctl(this.fd, IOCTL.VFIO_SET_IOMMU, CONSTANT.VFIO_TYPE1v2_IOMMU);
    if (set < 0) {
      const hint =
        set === -1
          ? "; the platform does not remap interrupts: enable it (firmware, intremap), or load vfio_iommu_type1 with allow_unsafe_interrupts=1 if the guest is trusted"
          : "";
      throw new VmmError(
        `${about}: no IOMMU domain for it (VFIO_SET_IOMMU type1v2: ${errnoName(-set)})${hint}`,
      );
    }
    this.hasIommu = true;
  }

  /** What the domain can map. After the first group. Bus addresses above 2^53 are left out. */
  limits(): BackendLimits {
    const layout = STRUCT.vfio_iommu_type1_info;
    let info = newStruct(layout);
    for (;;) {
      info.setUint32(layout.argsz, info.byteLength, true);
      check("VFIO_IOMMU_GET_INFO", ioctlStruct(this.fd, IOCTL.VFIO_IOMMU_GET_INFO, info));
      const needed = info.getUint32(layout.argsz, true);
      if (needed <= info.byteLength) break;
      info = newStruct(layout, needed - layout.size);
    }
    const flags = info.getUint32(layout.flags, true);
    const limits = {
      ranges: [] as { first: number; last: number }[],
      pageSizeMask: flags & CONSTANT.VFIO_IOMMU_INFO_PGSIZES ? getU64(info, layout.iova_pgsizes) : 4096,
      entries: DEFAULT_ENTRIES,
    };
    const capabilitiesAt =
      flags & CONSTANT.VFIO_IOMMU_INFO_CAPS ? info.getUint32(layout.cap_offset, true) : 0;
    for (const { id, at } of capabilities(info, capabilitiesAt)) {
      if (id === CONSTANT.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) limits.ranges = iovaRanges(info, at);
      if (id === CONSTANT.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL) {
        limits.entries = info.getUint32(at + STRUCT.vfio_iommu_type1_info_dma_avail.avail, true);
      }
    }
    if (limits.ranges.length === 0) {
      // Guessing would hand out the MSI window, where a device's write is an interrupt and no memory access.
      throw new VmmError("VFIO does not say which bus addresses can be mapped; Linux 5.4 or later is needed");
    }
    return limits;
  }

  /** Every mapping and pin of the domain goes with it, once its groups are closed too. */
  close(): void {
    closeSync(this.fd);
  }
}

function iovaRanges(info: DataView, at: number): { first: number; last: number }[] {
  const { vfio_iommu_type1_info_cap_iova_range: head, vfio_iova_range: range } = STRUCT;
  return Array.from({ length: info.getUint32(at + head.nr_iovas, true) }, (_, i) => {
    const start = at + head.iova_ranges + i * range.size;
    return {
      first: getU64(info, start + range.start),
      last: Math.min(getU64(info, start + range.end), MAX_EXACT),
    };
  }).filter(({ first, last }) => first < last);
}

/** An IOMMU group: the devices that the IOMMU cannot tell apart, given to one user as a whole. */
export class VfioGroup {
  private constructor(
    readonly number: number,
    /** For KVM's VFIO device (KVM_DEV_VFIO_GROUP_ADD), before a device is opened. */
    readonly fd: number,
  ) {}

  /** Opens `dev`/vfio/`number` and sees that it may be used. `about` is the device it is for, in messages. */
  static open(number: number, about: string, dev = "/dev"): VfioGroup {
    const path = join(dev, "vfio", String(number));
    const fd = openVfio(path, about, {
      EBUSY: `another process uses its group; find it with: fuser -v ${path}`,
      EACCES: `no permission; run: chown $USER ${path} (or a udev rule: SUBSYSTEM=="vfio", OWNER="user")`,
      EPERM: "no permission; the group has no IOMMU behind it (noiommu), which is not supported",
      ENOENT: "the group has no device file; is /dev/vfio complete here (container, chroot)?",
    });
    const group = new VfioGroup(number, fd);
    try {
      const layout = STRUCT.vfio_group_status;
      const status = newStruct(layout);
      status.setUint32(layout.argsz, layout.size, true);
      check("VFIO_GROUP_GET_STATUS", ioctlStruct(fd, IOCTL.VFIO_GROUP_GET_STATUS, status));
      const flags = status.getUint32(layout.flags, true);
      if ((flags & CONSTANT.VFIO_GROUP_FLAGS_VIABLE) === 0) {
        throw new VmmError(
          `${about}: IOMMU group ${number} is not viable: another device of it has a host driver; bind all of /sys/kernel/iommu_groups/${number}/devices to vfio-pci`,
        );
      }
      return group;
    } catch (error) {
      group.close();
      throw error;
    }
  }

  /** Takes the group out of its container, whose mappings its devices reach no more. After they are closed. */
  detach(): void {
    const result = ioctl(this.fd, IOCTL.VFIO_GROUP_UNSET_CONTAINER, 0);
    // EINVAL: it is in none. The kernel takes out a group whose last device the host unbinds.
    if (result !== -22) check("VFIO_GROUP_UNSET_CONTAINER", result);
  }

  /** Opens a device of the group, which has to be in a container. */
  openDevice(bdf: string): VfioDevice {
    const fd = ioctlStruct(this.fd, IOCTL.VFIO_GROUP_GET_DEVICE_FD, Buffer.from(`${bdf}\0`));
    if (fd < 0)
      throw new VmmError(
        `${bdf}: VFIO does not give the device (VFIO_GROUP_GET_DEVICE_FD: ${errnoName(-fd)})`,
      );
    try {
      return new VfioDevice(bdf, fd);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  close(): void {
    closeSync(this.fd);
  }
}
