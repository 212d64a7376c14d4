// What sysfs says about a PCI device of the host: its driver, its IOMMU group, and who else is in it. Reads files only.

import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { basename, join } from "node:path";
import { UsageError, VmmError } from "../errors.js";

declare const bdfBrand: unique symbol;
/** A host PCI address in full, lower case: "0000:02:00.0". */
export type Bdf = string & { readonly [bdfBrand]: true };

/** Reads "0000:02:00.0" or "02:00.0" (domain 0). Throws a UsageError. */
export function parseBdf(text: string): Bdf {
  const parts = /^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$/i.exec(text);
  if (parts === null) {
    throw new UsageError(`"${text}" is no PCI address; it looks like 0000:02:00.0 or 02:00.0 (see lspci -D)`);
  }
  const [, domain = "0000", bus, device, fn] = parts;
  return `${domain}:${bus}:${device}.${fn}`.toLowerCase() as Bdf;
}

/** vfio-pci itself, and the drivers for certain devices that stand in for it (mlx5_vfio_pci, nvgrace-gpu-vfio-pci …). */
const isVfioDriver = (driver: string | undefined): boolean =>
  driver !== undefined && /vfio[-_]pci$/.test(driver);
const BRIDGE_CLASS = /^0x0604/;
const NOIOMMU_GROUP = "vfio-noiommu";

const linkName = (path: string): string | undefined => {
  try {
    return basename(readlinkSync(path));
  } catch {
    return undefined;
  }
};

const text = (path: string): string => (existsSync(path) ? readFileSync(path, "utf8").trim() : "");

/**
 * The IOMMU group of a device, if it can be assigned: it exists, has a group, is on vfio-pci, and so is every other
 * device of the group that has a driver at all, bridges aside. Throws a VmmError that says what to do. `sysfs` is /sys.
 */
export function assignableGroup(bdf: Bdf, sysfs = "/sys"): number {
  const device = join(sysfs, "bus/pci/devices", bdf);
  if (!existsSync(device)) throw new VmmError(`${bdf}: no such PCI device; see lspci -D`);
  if (BRIDGE_CLASS.test(text(join(device, "class")))) {
    throw new VmmError(`${bdf}: is a PCI bridge; assign the devices behind it`);
  }

  const group = linkName(join(device, "iommu_group"));
  if (group === undefined) {
    throw new VmmError(
      `${bdf}: has no IOMMU group, so no IOMMU is on; boot with intel_iommu=on or amd_iommu=on, and enable VT-d or AMD-Vi in the firmware`,
    );
  }
  if (text(join(device, "iommu_group/name")) === NOIOMMU_GROUP) {
    throw new VmmError(
      `${bdf}: its group has no IOMMU behind it (noiommu), so the device could reach all memory; boot with intel_iommu=on or amd_iommu=on`,
    );
  }

  const driver = linkName(join(device, "driver"));
  if (!isVfioDriver(driver)) throw new VmmError(`${bdf}: ${notBound(bdf, driver)}`);

  const others = readdirSync(join(device, "iommu_group/devices"))
    .filter((other) => other !== bdf)
    .map((other) => ({ other, driver: linkName(join(sysfs, "bus/pci/devices", other, "driver")) }))
    .filter(({ other, driver: name }) => !harmless(join(sysfs, "bus/pci/devices", other), name));
  if (others.length > 0) {
    const list = others.map(({ other, driver: name }) => `${other} (${name})`).join(", ");
    throw new VmmError(
      `${bdf}: its IOMMU group ${group} is not viable: ${list} on host drivers; bind them to vfio-pci too, or to no driver`,
    );
  }
  return Number(group);
}

/** Drivers that do no DMA leave a group viable, as vfio in the kernel has it. */
const harmless = (device: string, driver: string | undefined): boolean =>
  driver === undefined ||
  driver === "pcieport" ||
  driver === "pci-stub" ||
  isVfioDriver(driver) ||
  BRIDGE_CLASS.test(text(join(device, "class")));

function notBound(bdf: Bdf, driver: string | undefined): string {
  const devices = `/sys/bus/pci/devices/${bdf}`;
  const commands = [
    "modprobe vfio-pci",
    `echo vfio-pci > ${devices}/driver_override`,
    ...(driver === undefined ? [] : [`echo ${bdf} > ${devices}/driver/unbind`]),
    `echo ${bdf} > /sys/bus/pci/drivers_probe`,
  ];
  const state = driver === undefined ? "has no driver" : `is bound to ${driver}, not to vfio-pci`;
  return `${state}; as root: ${commands.join("; ")}`;
}
