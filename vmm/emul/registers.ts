// A vCPU's accesses to the registers of emulated devices: finds the device by the address, cuts the access into pieces
// that are naturally aligned, and takes each to the device's thread. No allocation, no exceptions.

import type { AccessBytes } from "../../iommu-emul/device.js";
import { CONTROL_STOP, controlWords, type VcpuJob } from "../vcpu-link.js";
import { RegisterPort } from "./link.js";
import { RegisterLookup } from "./register-map.js";

export class DeviceRegisters {
  /** After a read: the value's words. */
  low = 0;
  high = 0;
  private readonly lookup: RegisterLookup;
  private readonly ports: readonly RegisterPort[];

  constructor(job: Pick<VcpuJob, "registerMap" | "emulated" | "index" | "control">) {
    this.lookup = new RegisterLookup(job.registerMap);
    const stop = controlWords(job.control);
    this.ports = job.emulated.map((link) => new RegisterPort(link, job.index, stop, CONTROL_STOP));
  }

  /** Whether the address is a register of an emulated device: of which, read() and write() then know. */
  find(gpa: number): boolean {
    return this.lookup.find(gpa);
  }

  /** Reads 1 to 8 bytes; those behind the BAR's end are ones. */
  read(bytes: number): void {
    const { device, bar, offset, left } = this.lookup;
    const port = this.ports[device]!;
    this.low = 0;
    this.high = 0;
    for (let done = 0; done < bytes; ) {
      const width = pieceAt(offset + done, done, bytes - done);
      const value = done + width <= left ? port.read(bar, offset + done, width) : 2 ** (8 * width) - 1;
      if (done < 4) this.low = (this.low | (value << (8 * done))) >>> 0;
      else this.high = (this.high | (value << (8 * (done - 4)))) >>> 0;
      done += width;
    }
  }

  /** Writes 1 to 8 bytes, given as two words; those behind the BAR's end are lost. */
  write(bytes: number, low: number, high: number): void {
    const { device, bar, offset, left } = this.lookup;
    const port = this.ports[device]!;
    for (let done = 0; done < bytes; ) {
      const width = pieceAt(offset + done, done, bytes - done);
      const value = done < 4 ? low >>> (8 * done) : high >>> (8 * (done - 4));
      if (done + width <= left) port.write(bar, offset + done, width, value);
      done += width;
    }
  }
}

/** The largest piece at an offset that is aligned, no longer than what is left, and within one of the value's words. */
function pieceAt(offset: number, done: number, left: number): AccessBytes {
  if (left >= 4 && offset % 4 === 0 && done % 4 === 0) return 4;
  return left >= 2 && offset % 2 === 0 && done % 2 === 0 ? 2 : 1;
}
