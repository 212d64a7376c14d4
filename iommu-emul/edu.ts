// emul:edu, a device to learn driver writing on: the registers of QEMU's edu (QEMU, docs/specs/edu). It inverts a number,
// computes factorials, raises interrupts, and copies between memory and a buffer of its own by DMA. Where QEMU leaves
// open what happens, or ends itself, the comment at the place says what this one does. Registers hold what guests write.

import { z } from "zod";
import type { AccessBytes, DeviceHost, DeviceModel, EmulatedDevice } from "./device.js";

/** Major and minor version, and "edu" in what looks like hexadecimal. */
const IDENTITY = 0x010000ed;
const BUFFER_AT = 0x40000;
const BUFFER_BYTES = 4096;

const REGISTER = {
  identity: 0x00,
  liveness: 0x04,
  factorial: 0x08,
  status: 0x20,
  irqStatus: 0x24,
  irqRaise: 0x60,
  irqAcknowledge: 0x64,
  // Of 64 bits each: written low half first, which clears the high one, so that 4 bytes suffice.
  source: 0x80,
  target: 0x88,
  count: 0x90,
  command: 0x98,
} as const;

const STATUS_COMPUTING = 0x01;
const STATUS_IRQ = 0x80;
const COMMAND_RUN = 0x1;
const COMMAND_TO_MEMORY = 0x2;
const COMMAND_IRQ = 0x4;
const IRQ_FACTORIAL = 0x001;
const IRQ_DMA = 0x100;

/** From here on every n! is a multiple of 2^32. */
const FACTORIAL_ZERO = 34;

/** Bits of a bus address that the device puts on the bus. */
interface EduOptions {
  readonly maskLow: number;
  readonly maskHigh: number;
}

class Edu implements EmulatedDevice {
  readonly #options: EduOptions;
  readonly #host: DeviceHost;
  readonly #buffer = Buffer.alloc(BUFFER_BYTES);
  /** Source, target, count: low and high halves. */
  readonly #dma = new Uint32Array(6);
  #command = 0;
  #liveness = 0;
  #factorial = 0;
  #status = 0;
  #irqStatus = 0;

  constructor(options: EduOptions, host: DeviceHost) {
    this.#options = options;
    this.#host = host;
  }

  /** Whatever is not there, or is written only, reads as ones; so do accesses of less than 4 bytes. */
  read(_bar: number, offset: number, bytes: AccessBytes): number {
    if (bytes !== 4) return 2 ** (8 * bytes) - 1;
    switch (offset) {
      case REGISTER.identity:
        return IDENTITY;
      case REGISTER.liveness:
        return this.#liveness;
      case REGISTER.factorial:
        return this.#factorial;
      case REGISTER.status:
        return this.#status;
      case REGISTER.irqStatus:
        return this.#irqStatus;
      case REGISTER.command:
        return this.#command;
      case REGISTER.command + 4:
        return 0;
      default:
        return isDma(offset) ? this.#dma[(offset - REGISTER.source) / 4]! : 0xffffffff;
    }
  }

  write(_bar: number, offset: number, bytes: AccessBytes, value: number): void {
    if (bytes !== 4) return;
    switch (offset) {
      case REGISTER.liveness:
        this.#liveness = ~value >>> 0;
        return;
      case REGISTER.factorial:
        if (this.#status & STATUS_COMPUTING) return;
        this.#factorial = value;
        this.#status |= STATUS_COMPUTING;
        return;
      case REGISTER.status:
        this.#status = (this.#status & STATUS_COMPUTING) | (value & STATUS_IRQ);
        return;
      case REGISTER.irqRaise:
        this.#raise(value);
        return;
      case REGISTER.irqAcknowledge:
        this.#irqStatus = (this.#irqStatus & ~value) >>> 0;
        return;
      default:
        // A copy under way does not see that its registers change: they do not.
        if (this.#command & COMMAND_RUN) return;
        if (offset === REGISTER.command && value & COMMAND_RUN) this.#command = value;
        if (isDma(offset)) this.#writeDma((offset - REGISTER.source) / 4, value);
    }
  }

  #writeDma(half: number, value: number): void {
    this.#dma[half] = value;
    if (half % 2 === 0) this.#dma[half + 1] = 0;
  }

  #raise(bits: number): void {
    this.#irqStatus = (this.#irqStatus | bits) >>> 0;
    if (this.#irqStatus !== 0) this.#host.interrupt(0);
  }

  /** QEMU takes 100 ms for a copy and some time for a factorial; this one does both as soon as it gets to it. */
  work(): boolean {
    if (this.#status & STATUS_COMPUTING) {
      this.#factorial = factorial(this.#factorial);
      this.#status &= ~STATUS_COMPUTING;
      if (this.#status & STATUS_IRQ) this.#raise(IRQ_FACTORIAL);
    }
    if (this.#command & COMMAND_RUN) {
      this.#copy();
      this.#command = (this.#command & ~COMMAND_RUN) >>> 0;
      if (this.#command & COMMAND_IRQ) this.#raise(IRQ_DMA);
    }
    return false;
  }

  /**
   * Memory that the IOMMU refuses stays as it is, and so does the part of the buffer that was to come from there. A
   * range that is not inside the buffer copies nothing (QEMU before 9 ends itself, later ones overrun their buffer). All
   * that the guest sees of either is data that did not come: the device has no bit for it, and the command ends as ever.
   */
  #copy(): void {
    const { dma } = this.#host;
    const toMemory = (this.#command & COMMAND_TO_MEMORY) !== 0;
    const at = this.#wide(toMemory ? 0 : 2) - BUFFER_AT;
    const count = this.#wide(4);
    if (at < 0 || at + count > BUFFER_BYTES) {
      const range = `${count} bytes at 0x${(at + BUFFER_AT).toString(16)}`;
      this.#host.warn(`the guest copies ${range}, which is not in its buffer: nothing is copied`);
      return;
    }
    const iova = this.#busAddress(toMemory ? 2 : 0);
    if (toMemory) dma.write(iova, this.#buffer, at, count);
    else dma.read(iova, this.#buffer, at, count);
  }

  /** What of an address the device puts on the bus: as in QEMU, the rest is cut off. */
  #busAddress(half: number): number {
    const { maskLow, maskHigh } = this.#options;
    const low = (this.#dma[half]! & maskLow) >>> 0;
    const high = (this.#dma[half + 1]! & maskHigh) >>> 0;
    const address = high * 2 ** 32 + low;
    if (low !== this.#dma[half] || high !== this.#dma[half + 1]) {
      const wanted = this.#wide(half).toString(16);
      this.#host.warn(
        `bus address 0x${wanted} is beyond its DMA mask: it takes 0x${address.toString(16)}; ` +
          "has the driver set its mask (dma_set_mask)?",
      );
    }
    return address;
  }

  #wide(half: number): number {
    return this.#dma[half]! + this.#dma[half + 1]! * 2 ** 32;
  }

  reset(): void {
    this.#buffer.fill(0);
    this.#dma.fill(0);
    this.#command = 0;
    this.#liveness = 0;
    this.#factorial = 0;
    this.#status = 0;
    this.#irqStatus = 0;
  }

  async close(): Promise<void> {}
}

const isDma = (offset: number): boolean => offset >= REGISTER.source && offset < REGISTER.command;

/** In 32 bits, as a C program on unsigned int has it. */
function factorial(n: number): number {
  if (n >= FACTORIAL_ZERO) return 0;
  let product = 1;
  for (let factor = 2; factor <= n; factor++) product = Math.imul(product, factor);
  return product >>> 0;
}

const keys = z.strictObject({
  dma_mask: z
    .string()
    .regex(/^(0x[0-9a-f]{1,16}|\d{1,20})$/i, "not a mask; give a number such as 0xfffffff")
    .transform(BigInt)
    .refine((mask) => mask < 1n << 64n, "it has more than 64 bits")
    .default((1n << 28n) - 1n),
});

export const edu: DeviceModel<EduOptions> = {
  name: "edu",
  // Identity addresses are not for it: 28 bits are less than a guest's RAM.
  policy: "strict",
  help: [
    "a device for learning, as QEMU's edu: inverts, computes factorials, interrupts (MSI), copies by DMA",
    "dma_mask=MASK  bits of bus addresses that it can emit (default 0xfffffff, 28 bits)",
  ],
  parse(text) {
    const { dma_mask: mask } = keys.parse(text);
    return { maskLow: Number(mask & 0xffffffffn), maskHigh: Number(mask >> 32n) };
  },
  check() {},
  describe: () => ({
    vendorId: 0x1234,
    deviceId: 0x11e8,
    // What QEMU gives to devices that have none of their own.
    subsystemVendorId: 0x1af4,
    subsystemId: 0x1100,
    revision: 0x10,
    classCode: 0x00ff00,
    bars: [{ index: 0, bytes: 2 ** 20, bits: 32 }],
    interrupts: { kind: "msi", vectors: 1 },
  }),
  create: (options, host) => new Edu(options, host),
};
