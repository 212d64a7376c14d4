// What may happen to assigned devices while the guest runs, and ends nothing but them: the IOMMU refuses an access, a
// device fails, the host wants one back. Main thread, on a timer; without news a look costs a system call for the
// kernel's log and two per device of VFIO.

import type { DeviceName } from "./device-name.js";
import { attempt } from "./errors.js";
import { type FaultSource, FaultWatch } from "./iommu-faults.js";
import type { DeviceEvent } from "./vfio/events.js";

/** What happened to a device: one of VFIO's events, or whatever `why` says. */
type News = DeviceEvent | { readonly why: string };

/** How old news may be. An unbind on the host waits for as long. */
const PERIOD_MS = 250;

/** An assigned device, with what takes it from the guest. */
export interface WatchedDevice {
  readonly name: DeviceName;
  /** The engine's. */
  readonly handle: number;
  readonly events: { poll(): News | undefined };
  /** Unplugs it from the guest and makes it quiet. */
  unplug(): void;
  /** Unmaps what is mapped for it; calls are answered `gone` from now on. */
  unmap(): void;
  /** Closes its file, and its group's after the last device of the group; ends its thread. */
  giveBack(): void;
  /** It does not come back, not even with a reboot. */
  forget(): void;
}

const WHY: Readonly<Record<DeviceEvent, string>> = {
  error: "an uncorrectable PCI Express error, see the host's kernel log",
  request: "the host wants it back",
};

export class DeviceWatch {
  private readonly devices: Map<string, WatchedDevice>;
  private readonly faults: FaultWatch;
  private readonly timer: NodeJS.Timeout;

  /** Devices and sources stay the caller's. `countFaults` is told the handle, and how many. */
  constructor(
    devices: readonly WatchedDevice[],
    sources: readonly FaultSource[],
    countFaults: (handle: number, times: number) => void,
    private readonly say: (line: string) => void,
  ) {
    this.devices = new Map(devices.map((device) => [device.name, device]));
    this.faults = new FaultWatch(sources, this.devices, countFaults, say);
    this.timer = setInterval(() => this.look(), PERIOD_MS);
    this.timer.unref();
  }

  /** Looks at once. */
  look(): void {
    // Faults first: one that the device caused before it went is still its own.
    this.faults.look(performance.now());
    for (const device of this.devices.values()) {
      const event = device.events.poll();
      if (event !== undefined) this.lose(device, event);
    }
  }

  close(): void {
    clearInterval(this.timer);
    this.faults.look(performance.now());
    this.faults.close();
  }

  /**
   * Takes a device from the guest, which sees it as pulled out: registers read as ones, nothing interrupts, calls are
   * answered `gone`. An error ends the same way as a request: the host recovers by resetting the link, and with it what
   * the guest's driver has programmed, of which the guest would not be told (it is shown no AER); a device that works on
   * with half a state is worse than none. The order is that of the machine's end: quiet before unmapped, unmapped before
   * closed. Then the host's unbind, which has waited for the file, goes on. Each step is taken, whatever the one before
   * it met.
   */
  private lose(device: WatchedDevice, event: News): void {
    const { name } = device;
    this.devices.delete(name);
    const why = typeof event === "string" ? WHY[event] : event.why;
    this.say(`${name}: ${why}: it is taken from the guest, which goes on without it`);
    const steps = [
      () => device.unplug(),
      () => device.unmap(),
      () => device.giveBack(),
      () => device.forget(),
    ];
    for (const step of steps)
      attempt(step, (message) => this.say(`${name}: while it was taken away: ${message}`));
  }
}
