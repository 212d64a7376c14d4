// What the host has to tell about a device beside its interrupts: it failed, or it is wanted back. VFIO signals an
// eventfd for each; they are looked at on a timer, which costs a system call each and no thread that waits.

import { closeSync } from "node:fs";
import { eventfd, readNow } from "../native/libc.js";
import { CONSTANT } from "../sys/vfio.js";
import type { VfioDeviceAccess } from "./device.js";

/**
 * `error`: an uncorrectable PCI Express error, fatal or not, was reported by the device or on the way to it (AER).
 * `request`: somebody unbinds the device from vfio-pci or unplugs it, and waits until it is closed.
 */
export type DeviceEvent = "error" | "request";

const INDEX: Readonly<Record<DeviceEvent, number>> = {
  error: CONSTANT.VFIO_PCI_ERR_IRQ_INDEX,
  request: CONSTANT.VFIO_PCI_REQ_IRQ_INDEX,
};

export class DeviceEvents {
  private readonly fds = new Map<DeviceEvent, number>();
  private readonly counter = new Uint8Array(8);

  /** Listens for what the host offers; `error` is for PCI Express devices only. Throws a SystemError. */
  constructor(device: VfioDeviceAccess) {
    try {
      for (const event of ["error", "request"] as const) {
        if (device.irq(INDEX[event]).count === 0) continue;
        const fd = eventfd();
        this.fds.set(event, fd);
        device.setTriggers(INDEX[event], 0, [fd]);
      }
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** What happened since the last look; a request, which the host repeats, only when there was no error. */
  poll(): DeviceEvent | undefined {
    for (const [event, fd] of this.fds) if (readNow(fd, this.counter) > 0) return event;
    return undefined;
  }

  /** The device may still be open: VFIO keeps its own hold on the eventfds. */
  close(): void {
    for (const fd of this.fds.values()) closeSync(fd);
    this.fds.clear();
  }
}
