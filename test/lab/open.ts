// Opens the host that tests run on: a fresh L1, or this machine when PVDMA_HOST_BDF names one of its devices.

import { bindVfio, type Host, pciDriver } from "./host.js";
import { bootL1, type L1Options, l1Bdf } from "./l1.js";
import { LocalHost } from "./local.js";

/**
 * The host and the NVMe controller to assign in it, bound to vfio-pci. With PVDMA_HOST_BDF=0000:02:00.0 in the
 * environment it is this machine and that device, whose content tests may overwrite, and `options` are not looked
 * at; otherwise an L1 with `options`, which must have an nvme0.
 */
export async function openHost(options: L1Options): Promise<{ host: Host; bdf: string }> {
  const bdf = process.env.PVDMA_HOST_BDF;
  if (bdf === undefined || bdf === "") {
    if (options.nvme0 === undefined) throw new Error("openHost: no nvme0 in the options");
    const host = await bootL1(options);
    await bindVfio(host, l1Bdf.nvme0);
    return { host, bdf: l1Bdf.nvme0 };
  }
  const host = new LocalHost();
  try {
    const driver = await pciDriver(host, bdf);
    if (driver !== "vfio-pci") {
      // On somebody's machine a device in use is not ours to take.
      throw new Error(`PVDMA_HOST_BDF=${bdf}: its driver is ${driver ?? "none"}, bind it to vfio-pci first`);
    }
  } catch (error) {
    await host.close();
    throw error;
  }
  return { host, bdf };
}
