// The README's example of an emulated device: copies up to 4 KiB of memory when its third register is written.

import { z } from "zod";
import type { DeviceHost, DeviceModel, EmulatedDevice } from "./device.js";

class Copier implements EmulatedDevice {
  readonly #buffer = Buffer.alloc(4096);
  /** Bus addresses to copy from and to, bytes (0: nothing to do), and how it went (a DMA_FAULT). */
  readonly #registers = new Uint32Array(4);
  readonly #host: DeviceHost;
  constructor(host: DeviceHost) {
    this.#host = host;
  }
  read(_bar: number, offset: number): number {
    return this.#registers[offset / 4] ?? 0xffffffff;
  }
  write(_bar: number, offset: number, bytes: number, value: number): void {
    if (bytes === 4 && offset <= 8) this.#registers[offset / 4] = value;
  }
  work(): boolean {
    const [source, target, wanted] = this.#registers as unknown as [number, number, number];
    if (wanted === 0) return false;
    const bytes = Math.min(wanted, this.#buffer.length);
    const { dma } = this.#host;
    this.#registers[3] =
      dma.read(source, this.#buffer, 0, bytes) || dma.write(target, this.#buffer, 0, bytes);
    this.#registers[2] = 0;
    this.#host.interrupt(0);
    return false;
  }
  reset(): void {
    this.#registers.fill(0);
  }
  async close(): Promise<void> {}
}

const ids = { vendorId: 0x1234, deviceId: 0xc0b1, subsystemVendorId: 0, subsystemId: 0, revision: 0 };
export const copier: DeviceModel<object> = {
  name: "copy",
  help: ["copies memory by DMA"],
  parse: (keys) => z.strictObject({}).parse(keys),
  check() {},
  describe: () => ({
    ...ids,
    classCode: 0xff0000,
    bars: [{ index: 0, bytes: 4096, bits: 32 }],
    interrupts: { kind: "msi", vectors: 1 },
  }),
  create: (_options, host) => new Copier(host),
};
