// The two sides of an assigned device, in memory: the machine, which checks that it is used as KVM wants it, and a
// device behind VFIO's seam, which checks what VFIO and the hardware would.

import { writeSync } from "node:fs";
import { type Hva, hva } from "../../../hypercalls/addresses.js";
import { ConfigPorts, newConfigAddress } from "../../../vmm/devices/config-ports.js";
import { SystemError } from "../../../vmm/errors.js";
import type { IoHandler, Width } from "../../../vmm/io-bus.js";
import type { PciMachine, RegisterTarget } from "../../../vmm/pci/machine-interface.js";
import type { Area, IrqInfo, RegionInfo, VfioDeviceAccess } from "../../../vmm/vfio/device.js";

/** A breach of an interface: never something that the code under test may catch. */
export class Breach extends Error {}

const breachIf = (wrong: boolean, what: string): void => {
  if (wrong) throw new Breach(what);
};

interface Range {
  readonly start: number;
  readonly bytes: number;
  readonly handler: IoHandler;
}

const hit = (ranges: readonly Range[], address: number): Range | undefined =>
  ranges.find(({ start, bytes }) => address >= start && address < start + bytes);

export class Machine implements PciMachine {
  readonly log: string[] = [];
  readonly slots = new Map<number, { readonly gpa: number; readonly bytes: number; readonly hva: number }>();
  readonly mmio: Range[] = [];
  readonly registers = new Map<number, RegisterTarget & { readonly bytes: number }>();
  readonly #config = new ConfigPorts(newConfigAddress());
  readonly pio: Range[] = [];
  readonly gsis = new Set<number>();
  readonly routes = new Map<number, string>();
  /** By GSI. */
  readonly irqfds = new Map<number, { readonly fd: number; readonly resampleFd: number | undefined }>();
  /** Fails the next calls of these names, as many times as given. */
  readonly failures = new Map<string, number>();
  #slot = 0;
  #gsi = 24;

  addMemslot(gpa: number, bytes: number, address: Hva): number {
    this.#fail("addMemslot");
    breachIf(
      gpa % 4096 !== 0 || bytes % 4096 !== 0 || bytes === 0 || address % 4096 !== 0,
      "slot is not whole pages",
    );
    for (const slot of this.slots.values()) {
      if (gpa < slot.gpa + slot.bytes && slot.gpa < gpa + bytes)
        throw new SystemError("addMemslot", 17, "EEXIST");
    }
    this.slots.set(++this.#slot, { gpa, bytes, hva: address });
    this.log.push(`slot 0x${gpa.toString(16)}+0x${bytes.toString(16)}`);
    return this.#slot;
  }

  removeMemslot(slot: number): void {
    breachIf(!this.slots.has(slot), "no such slot");
    this.log.push(`unslot 0x${this.slots.get(slot)!.gpa.toString(16)}`);
    this.slots.delete(slot);
  }

  addMmio(gpa: number, bytes: number, handler: IoHandler): void {
    breachIf(
      this.mmio.some((r) => gpa < r.start + r.bytes && r.start < gpa + bytes),
      "MMIO ranges overlap",
    );
    this.mmio.push({ start: gpa, bytes, handler });
  }

  removeMmio(gpa: number): void {
    this.#remove(this.mmio, gpa);
  }

  addRegisters(gpa: number, bytes: number, { device, bar }: RegisterTarget): void {
    breachIf(gpa % 4096 !== 0 || bytes % 4096 !== 0, "registers are not whole pages");
    breachIf(this.registers.has(gpa), "registers twice at one place");
    this.registers.set(gpa, { bytes, device, bar });
  }

  removeRegisters(gpa: number): void {
    breachIf(!this.registers.delete(gpa), `no registers at 0x${gpa.toString(16)}`);
  }

  addPio(port: number, count: number, handler: IoHandler): void {
    this.pio.push({ start: port, bytes: count, handler });
  }

  removePio(port: number): void {
    this.#remove(this.pio, port);
  }

  allocateGsi(): number {
    this.#fail("allocateGsi");
    this.gsis.add(++this.#gsi);
    return this.#gsi;
  }

  freeGsi(gsi: number): void {
    breachIf(!this.gsis.has(gsi) || this.routes.has(gsi) || this.irqfds.has(gsi), `GSI ${gsi} is in use`);
    this.gsis.delete(gsi);
  }

  setMsiRoute(gsi: number, addressLo: number, addressHi: number, data: number): void {
    this.#fail("setMsiRoute");
    breachIf(!this.gsis.has(gsi), `route of GSI ${gsi}`);
    breachIf(addressLo >>> 20 !== 0xfee || (addressHi & 0xff) !== 0, "route to no interrupt");
    breachIf(
      [addressLo, addressHi, data].some((n) => n !== n >>> 0),
      "message is not unsigned",
    );
    this.routes.set(gsi, `${addressLo.toString(16)}/${addressHi.toString(16)}/${data.toString(16)}`);
    this.log.push(`route ${this.routes.get(gsi)}`);
  }

  clearRoute(gsi: number): void {
    breachIf(!this.routes.delete(gsi), `no route of GSI ${gsi}`);
    breachIf(this.irqfds.has(gsi), "route cleared under its irqfd");
    this.log.push("unroute");
  }

  irqfd(gsi: number, fd: number, assign: boolean, resampleFd?: number): void {
    if (assign) {
      this.#fail("irqfd");
      breachIf(gsi >= 24 && !this.routes.has(gsi), "irqfd without a route");
      breachIf(gsi < 24 && resampleFd === undefined, "level interrupt without a resample eventfd");
      breachIf(this.irqfds.has(gsi), `GSI ${gsi} has an irqfd`);
      this.irqfds.set(gsi, { fd, resampleFd });
    } else {
      breachIf(this.irqfds.get(gsi)?.fd !== fd, `GSI ${gsi} has no such irqfd`);
      this.irqfds.delete(gsi);
    }
    this.log.push(`irqfd ${gsi < 24 ? "INTx " : ""}${assign ? "on" : "off"}`);
  }

  intxGsi(slot: number, pin: number): number {
    return 16 + ((slot + pin - 1) % 8);
  }

  /** A guest's access; what no range holds reads as ones. */
  readMemory(address: number, width: Width): number {
    const range = hit(this.mmio, address);
    return range ? range.handler.read(address - range.start, width) : 2 ** (8 * width) - 1;
  }

  writeMemory(address: number, width: Width, value: number): void {
    const range = hit(this.mmio, address);
    range?.handler.write(address - range.start, width, value);
  }

  /** A guest's access to a port; the configuration ports lead to ECAM, as on a vCPU's thread. */
  in(port: number, width: Width): number {
    if (this.#config.isAddress(port, width)) return this.#config.readAddress();
    if (this.#config.isData(port)) {
      const address = this.#config.ecamAddress(port, width);
      return address < 0 ? 2 ** (8 * width) - 1 : this.readMemory(address, width);
    }
    const range = hit(this.pio, port);
    return range ? range.handler.read(port - range.start, width) : 2 ** (8 * width) - 1;
  }

  out(port: number, width: Width, value: number): void {
    if (this.#config.isAddress(port, width)) {
      this.#config.writeAddress(value);
      return;
    }
    if (this.#config.isData(port)) {
      const address = this.#config.ecamAddress(port, width);
      if (address >= 0) this.writeMemory(address, width, value);
      return;
    }
    const range = hit(this.pio, port);
    range?.handler.write(port - range.start, width, value);
  }

  /** The log since the last call. */
  news(): string[] {
    return this.log.splice(0);
  }

  #remove(ranges: Range[], start: number): void {
    const index = ranges.findIndex((range) => range.start === start);
    breachIf(index < 0, `no range at 0x${start.toString(16)}`);
    ranges.splice(index, 1);
  }

  #fail(call: string): void {
    const left = this.failures.get(call) ?? 0;
    if (left === 0) return;
    this.failures.set(call, left - 1);
    throw new SystemError(call, 28, "ENOSPC");
  }
}

export const CONFIG_REGION = 7;
/** By VFIO's index. */
const IRQ_NAMES = ["INTx", "MSI", "MSI-X", "errors", "requests"];

interface DeviceOptions {
  readonly bars?: readonly {
    readonly index: number;
    readonly bytes: number;
    readonly flags: number;
    readonly areas?: readonly Area[];
  }[];
  readonly config?: (config: DataView) => void;
  /** How many of each, by VFIO's index. */
  readonly irqs?: readonly number[];
  readonly growable?: boolean;
  readonly canReset?: boolean;
}

/** A device as memory. Logs into the machine's log, so that the order across both is seen. */
export class Device implements VfioDeviceAccess {
  readonly bdf = "0000:02:00.0";
  readonly canReset: boolean;
  readonly config = new DataView(new ArrayBuffer(256));
  readonly memory = new Map<number, DataView>();
  readonly maps = new Map<number, number>();
  /** Eventfds by interrupt kind and vector. */
  readonly triggers: (number[] | undefined)[] = [undefined, undefined, undefined];
  unmaskFd = -1;
  resets = 0;
  closed = false;
  failEnable = false;
  /** Every write of a register fails; so does a reset. */
  failWrites = false;
  failReset = false;
  readonly #options: DeviceOptions;
  #hva = 0x7f0000000000;

  constructor(
    private readonly machine: Machine,
    options: DeviceOptions = {},
  ) {
    this.#options = options;
    this.canReset = options.canReset ?? true;
    options.config?.(this.config);
    for (const { index, bytes, flags } of options.bars ?? []) {
      this.memory.set(index, new DataView(new ArrayBuffer(Math.min(bytes, 2 ** 20))));
      this.config.setUint32(0x10 + 4 * index, flags, true);
    }
  }

  region(index: number): RegionInfo {
    const bar = this.#options.bars?.find((b) => b.index === index);
    if (bar === undefined) return { bytes: index === CONFIG_REGION ? 256 : 0, mappable: [] };
    return { bytes: bar.bytes, mappable: bar.areas ?? [{ offset: 0, bytes: bar.bytes }] };
  }

  irq(index: number): IrqInfo {
    return { count: this.#options.irqs?.[index] ?? 0, growable: this.#options.growable ?? false };
  }

  read(region: number, offset: number, width: Width): number {
    const view = this.#view(region, offset, width);
    return width === 4
      ? view.getUint32(offset, true)
      : width === 2
        ? view.getUint16(offset, true)
        : view.getUint8(offset);
  }

  write(region: number, offset: number, width: Width, value: number): void {
    const view = this.#view(region, offset, width);
    if (this.failWrites) throw new SystemError("write", 5, "EIO");
    breachIf(value !== value >>> 0 || value > 2 ** (8 * width) - 1, `value ${value} of width ${width}`);
    if (region === CONFIG_REGION) {
      this.machine.log.push(`config 0x${offset.toString(16)}=0x${value.toString(16)}`);
      breachIf(offset !== 4 && offset !== 0x88, `write to configuration register 0x${offset.toString(16)}`);
    }
    if (width === 4) view.setUint32(offset, value, true);
    else if (width === 2) view.setUint16(offset, value, true);
    else view.setUint8(offset, value);
  }

  map(region: number, offset: number, bytes: number): Hva {
    const info = this.region(region);
    breachIf(offset % 4096 !== 0 || bytes % 4096 !== 0 || bytes <= 0, "mmap of no whole pages");
    breachIf(
      !info.mappable.some((area) => offset >= area.offset && offset + bytes <= area.offset + area.bytes),
      "mmap of what may not be mapped",
    );
    this.#hva += 2 ** 32;
    this.maps.set(this.#hva, bytes);
    return hva(this.#hva);
  }

  unmap(address: Hva, bytes: number): void {
    breachIf(this.maps.get(address) !== bytes, "munmap of no mapping");
    breachIf(
      [...this.machine.slots.values()].some((slot) => slot.hva === address),
      "munmap under a memory slot",
    );
    this.maps.delete(address);
  }

  setTriggers(irq: number, start: number, fds: readonly number[]): void {
    breachIf(
      start < 0 || fds.length === 0 || start + fds.length > this.irq(irq).count,
      `vectors ${start}+${fds.length}`,
    );
    breachIf(
      irq < 3 && this.triggers.some((other, kind) => kind < 3 && kind !== irq && other !== undefined),
      "two kinds of interrupts at once",
    );
    if (this.failEnable) throw new SystemError("VFIO_DEVICE_SET_IRQS", 28, "ENOSPC");
    const set = this.triggers[irq];
    if (set !== undefined && !this.irq(irq).growable && start + fds.length > set.length)
      throw new Breach("not growable");
    const now = set ?? [];
    for (const [i, fd] of fds.entries()) now[start + i] = fd;
    this.triggers[irq] = now;
    const shown = fds.map((fd) => (fd < 0 ? "-" : "fd")).join("");
    this.machine.log.push(`set ${IRQ_NAMES[irq]} ${start}: ${shown}`);
  }

  setUnmask(irq: number, fd: number): void {
    breachIf(irq !== 0 || this.triggers[0] === undefined, "unmask eventfd without INTx");
    this.unmaskFd = fd;
  }

  disableIrq(irq: number): void {
    this.triggers[irq] = undefined;
    this.machine.log.push(`disable ${IRQ_NAMES[irq]}`);
  }

  reset(): void {
    breachIf(!this.canReset, "reset of a device that has none");
    breachIf((this.config.getUint16(4, true) & 4) !== 0 && !this.failWrites, "reset with bus mastering on");
    if (this.failReset) throw new SystemError("VFIO_DEVICE_RESET", 11, "EAGAIN");
    this.resets++;
    this.machine.log.push("reset");
  }

  close(): void {
    this.closed = true;
  }

  /** The device raises an interrupt. */
  signal(irq: number, vector: number): void {
    const fd = this.triggers[irq]?.[vector] ?? -1;
    if (fd >= 0) writeSync(fd, Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
  }

  #view(region: number, offset: number, width: Width): DataView {
    breachIf(this.closed, "access after close");
    breachIf(
      offset % width !== 0 || offset < 0 || offset + width > this.region(region).bytes,
      `access ${region}:${offset}`,
    );
    return region === CONFIG_REGION ? this.config : this.memory.get(region)!;
  }
}

/** Capability offsets of `endpoint`. */
export const AT = { pm: 0x40, msi: 0x50, msix: 0x70, pcie: 0x80, vendor: 0xc0, af: 0xd0 } as const;

/**
 * A PCIe endpoint with about everything: a 16 KiB BAR with MSI-X table (0x2000) and pending bits (0x3000) and registers
 * behind both, an I/O BAR, a BAR smaller than a page, a large prefetchable one.
 */
export function endpoint(
  machine: Machine,
  options: Omit<DeviceOptions, "bars" | "config"> & { vectors?: number } = {},
): Device {
  const vectors = options.vectors ?? 5;
  return new Device(machine, {
    irqs: [1, 8, vectors],
    ...options,
    bars: [
      { index: 0, bytes: 0x4000, flags: 0x4 },
      { index: 2, bytes: 32, flags: 0x1 },
      { index: 3, bytes: 256, flags: 0x0 },
      { index: 4, bytes: 2 ** 25, flags: 0xc },
    ],
    config: (view) => {
      view.setUint32(0x00, 0x00101b36, true);
      view.setUint32(0x04, 0x00100006, true);
      view.setUint32(0x08, 0x01080202, true);
      view.setUint8(0x0e, 0x80);
      view.setUint32(0x2c, 0x11001af4, true);
      view.setUint32(0x30, 0xfff00001, true);
      view.setUint8(0x34, AT.pm);
      view.setUint8(0x3c, 0x0b);
      view.setUint8(0x3d, 3);
      for (let at = 0x44; at < 0x100; at++) view.setUint8(at, 0xee);
      const capability = (at: number, id: number, next: number) => view.setUint16(at, id | (next << 8), true);
      capability(AT.pm, 0x01, AT.msi);
      view.setUint32(AT.pm + 2, 0xc803, true);
      view.setUint16(AT.pm + 4, 0x0103, true);
      capability(AT.msi, 0x05, AT.vendor);
      view.setUint16(AT.msi + 2, 0x0186, true);
      capability(AT.vendor, 0x09, AT.msix);
      capability(AT.msix, 0x11, AT.pcie);
      view.setUint16(AT.msix + 2, 0xc000 | (vectors - 1), true);
      view.setUint32(AT.msix + 4, 0x2000, true);
      view.setUint32(AT.msix + 8, 0x3000, true);
      capability(AT.pcie, 0x10, AT.af);
      view.setUint16(AT.pcie + 2, 0x0002, true);
      view.setUint32(AT.pcie + 4, 0x10008fe2, true);
      view.setUint16(AT.pcie + 8, 0x2910, true);
      view.setUint16(AT.pcie + 10, 0x0020, true);
      // The last one points back to the first: a list that never ends.
      capability(AT.af, 0x13, AT.pm);
    },
  });
}
