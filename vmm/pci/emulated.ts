// An emulated device as the guest sees it on its PCI bus: configuration space made of the device's description, BARs
// whose accesses vCPUs take to the device's thread themselves, MSI or MSI-X, function level reset. Main thread.

import type { EmulatedDeviceAccess } from "../emul/hosted-device.js";
import { isExpected } from "../errors.js";
import type { IoHandler, Width } from "../io-bus.js";
import { allOnes, readAligned, writeAligned } from "./access.js";
import { type AddressDecoder, Bar, type BarPart, type BarSpec } from "./bars.js";
import {
  type Capability,
  linkCapabilities,
  MsiCapability,
  msixFlags,
  setMsix,
  setPm,
} from "./capabilities.js";
import { ConfigSpace } from "./config-space.js";
import type { PciFunction } from "./function.js";
import type { PciMachine } from "./machine-interface.js";
import { Msi } from "./msi.js";
import { Msix } from "./msix.js";
import { PCI } from "./registers.js";

/** COMMAND bits that do something; the others read as zero. There are no I/O ports and no interrupt pin. */
const COMMAND_BITS = PCI.PCI_COMMAND_MEMORY | PCI.PCI_COMMAND_MASTER | PCI.PCI_COMMAND_INTX_DISABLE;
/** Version 2 of both capabilities; nothing optional but what is set beside them. */
const PM_VERSION = 3;
const PCIE_VERSION = 2;
/** Sizes of payloads and of read requests are about a link that is not there: what the guest sets stays set. */
const DEVCTL_BITS = PCI.PCI_EXP_DEVCTL_RELAX_EN | PCI.PCI_EXP_DEVCTL_NOSNOOP_EN | PCI.PCI_EXP_DEVCTL_READRQ;

/** Where the capabilities are. */
const AT = { pm: 0x40, msi: 0x48, msix: 0x48, pcie: 0x60 } as const;

export class EmulatedPciFunction implements PciFunction {
  readonly name: string;
  private readonly config = new ConfigSpace();
  private readonly bars: Bar[];
  private readonly msi: MsiCapability | undefined;
  private readonly msix: Msix | undefined;
  private command = 0;
  /** Configuration space as it is after a reset, BARs aside. */
  private readonly powerOn: Uint8Array;
  private readonly warned = new Set<string>();
  private closed = false;
  private lost = false;

  /** The device is as after power-on. Throws a VmmError for a description that cannot be shown. */
  constructor(
    private readonly device: EmulatedDeviceAccess,
    machine: PciMachine,
    private readonly decoder: AddressDecoder,
    private readonly warnLine: (line: string) => void,
  ) {
    this.name = device.name;
    const { config } = this;
    const { interrupts } = device.description;
    this.setHeader();
    setPm(config, AT.pm, PM_VERSION);
    this.setPcie();
    if (interrupts.kind === "msi") {
      const log2 = Math.floor(Math.log2(Math.min(interrupts.vectors, 32)));
      const msi = new Msi(device.interrupts, machine, (line) => this.warn("MSI", line));
      this.msi = new MsiCapability(config, AT.msi, log2, true, true, msi);
    } else {
      this.msix = new Msix(device.interrupts, machine, (line) => this.warn("MSI-X", line));
      const pba = this.pbaOffset(this.msix);
      setMsix(config, AT.msix, interrupts.vectors, interrupts.bar, pba | interrupts.bar);
    }
    const capabilities: Capability[] = [
      { id: PCI.PCI_CAP_ID_PM, at: AT.pm },
      { id: PCI.PCI_CAP_ID_EXP, at: AT.pcie },
      this.msi ? { id: PCI.PCI_CAP_ID_MSI, at: AT.msi } : { id: PCI.PCI_CAP_ID_MSIX, at: AT.msix },
    ];
    linkCapabilities(config, capabilities);
    this.bars = this.makeBars();
    for (const bar of this.bars) decoder.add(bar);
    this.powerOn = config.save();
  }

  readConfig(register: number, width: Width): number {
    this.attempt("configuration", () => this.msi?.refresh(register, width));
    return this.config.read(register, width);
  }

  writeConfig(register: number, width: Width, value: number): void {
    const touches = (at: number, bytes: number) => register < at + bytes && at < register + width;
    this.config.write(register, width, value);
    this.attempt("configuration", () => {
      if (touches(PCI.PCI_COMMAND, 2)) this.applyCommand(this.config.read(PCI.PCI_COMMAND, 2));
      if (touches(PCI.PCI_BASE_ADDRESS_0, 4 * 6)) this.decoder.settle();
      if (this.msi?.touchedBy(register, width)) this.msi.apply();
      if (this.msix && touches(AT.msix + PCI.PCI_MSIX_FLAGS, 2)) this.applyMsix();
      // Last, for it undoes what the same write did to others.
      if (touches(AT.pcie + PCI.PCI_EXP_DEVCTL, 2)) this.applyDevctl();
    });
  }

  /** As after power-on, with the BARs where firmware placed them. What is mapped for the device is its driver's. */
  private reset(): void {
    this.stop();
    this.config.restore(this.powerOn);
    for (const bar of this.bars) bar.address = bar.home;
  }

  close(): void {
    if (this.closed) return;
    this.closed = true;
    this.stop();
    this.decoder.remove(this.bars);
  }

  /** The device is gone, and the guest is to see it so. What it does no more is not worth a line. */
  lose(): void {
    this.lost = true;
    this.close();
  }

  /** No DMA, no registers, no interrupts, in this order; and then it forgets everything. */
  private stop(): void {
    this.command = 0;
    this.attempt("bus mastering", () => this.device.setBusMaster(false));
    for (const bar of this.bars) bar.decoding = false;
    this.attempt("BARs", () => this.decoder.settle());
    this.attempt("MSI-X", () => this.msix?.reset());
    this.attempt("MSI", () => this.msi?.off());
    this.attempt("reset", () => this.device.reset());
  }

  // ---- configuration space ----

  private setHeader(): void {
    const { config } = this;
    const { vendorId, deviceId, subsystemVendorId, subsystemId, revision, classCode } =
      this.device.description;
    config.set(PCI.PCI_VENDOR_ID, 2, vendorId);
    config.set(PCI.PCI_DEVICE_ID, 2, deviceId);
    config.set(PCI.PCI_COMMAND, 2, 0, COMMAND_BITS);
    config.set(PCI.PCI_STATUS, 2, PCI.PCI_STATUS_CAP_LIST);
    config.set(PCI.PCI_CLASS_REVISION, 4, classCode * 256 + revision);
    config.set(PCI.PCI_CACHE_LINE_SIZE, 1, 0, 0xff);
    config.set(PCI.PCI_LATENCY_TIMER, 1, 0, 0xff);
    config.set(PCI.PCI_SUBSYSTEM_VENDOR_ID, 2, subsystemVendorId);
    config.set(PCI.PCI_SUBSYSTEM_VENDOR_ID + 2, 2, subsystemId);
    config.set(PCI.PCI_INTERRUPT_LINE, 1, 0, 0xff);
  }

  /** A root complex integrated endpoint: what may stand on the guest's root bus, and has no link (PCIe 5.0, 7.5.3). */
  private setPcie(): void {
    const at = AT.pcie;
    this.config.set(at + PCI.PCI_EXP_FLAGS, 2, PCIE_VERSION | (PCI.PCI_EXP_TYPE_RC_END << 4));
    this.config.set(at + PCI.PCI_EXP_DEVCAP, 4, PCI.PCI_EXP_DEVCAP_FLR | PCI.PCI_EXP_DEVCAP_RBER);
    const readRequest = 0x2000; // 512 bytes, as after power-on
    this.config.set(
      at + PCI.PCI_EXP_DEVCTL,
      2,
      readRequest | PCI.PCI_EXP_DEVCTL_RELAX_EN | PCI.PCI_EXP_DEVCTL_NOSNOOP_EN,
      DEVCTL_BITS | PCI.PCI_EXP_DEVCTL_BCR_FLR,
    );
  }

  /** BARs leave the guest before bus mastering changes, and come after it has. */
  private applyCommand(command: number): void {
    const decoding = (command & PCI.PCI_COMMAND_MEMORY) !== 0;
    for (const bar of this.bars) bar.decoding &&= decoding;
    this.decoder.settle();
    const changed = command ^ this.command;
    this.command = command;
    if (changed & PCI.PCI_COMMAND_MASTER) this.device.setBusMaster((command & PCI.PCI_COMMAND_MASTER) !== 0);
    for (const bar of this.bars) bar.decoding = decoding;
    this.decoder.settle();
  }

  private applyMsix(): void {
    const { enabled, masked } = msixFlags(this.config, AT.msix);
    this.msix!.control(enabled, masked);
  }

  private applyDevctl(): void {
    if (this.config.read(AT.pcie + PCI.PCI_EXP_DEVCTL, 2) & PCI.PCI_EXP_DEVCTL_BCR_FLR) this.reset();
  }

  // ---- BARs ----

  /** Where the pending bits are in the BAR that the table begins. */
  private pbaOffset(msix: Msix): number {
    return Math.ceil(msix.tableBytes / 4096) * 4096;
  }

  private makeBars(): Bar[] {
    const { bars, interrupts } = this.device.description;
    const make = (index: number, kind: BarSpec["kind"], part: BarPart): Bar => {
      const spec = { index, kind, bytes: part.bytes, prefetchable: false, parts: [part] };
      return new Bar(this.name, spec, this.config);
    };
    const own = bars.map(({ index, bytes, bits }) => {
      const registers = { device: this.device.number, bar: index };
      return make(index, bits === 64 ? "mem64" : "mem32", { offset: 0, bytes, registers });
    });
    if (interrupts.kind === "msi") return own;
    // Two pages at least, and a power of two.
    const bytes = 2 ** Math.ceil(Math.log2(this.pbaOffset(this.msix!) + this.msix!.pbaBytes));
    const handler = this.msixHandler(this.msix!);
    return [...own, make(interrupts.bar, "mem32", { offset: 0, bytes, handler })];
  }

  /** The table and, from a page of their own on, the pending bits. */
  private msixHandler(msix: Msix): IoHandler {
    const pba = this.pbaOffset(msix);
    const read = (offset: number, width: Width): number => {
      if (offset < pba) return msix.readTable(offset, width);
      const first = (offset - pba) & ~3;
      if (first >= msix.pbaBytes) return allOnes(width);
      return Math.floor(msix.pending(first * 8) / 2 ** (8 * (offset & 3))) % 2 ** (8 * width);
    };
    const write = (offset: number, width: Width, value: number): void => {
      if (offset < pba) msix.writeTable(offset, width, value);
    };
    return {
      read: (offset, width) =>
        this.attempt("MSI-X", () => readAligned(offset, width, read)) ?? allOnes(width),
      write: (offset, width, value) => this.attempt("MSI-X", () => writeAligned(offset, width, value, write)),
    };
  }

  // ---- messages ----

  /** What the guest or the host does wrong is said once per kind, and the guest goes on. */
  private attempt<T>(what: string, action: () => T): T | undefined {
    try {
      return action();
    } catch (error) {
      if (!isExpected(error)) throw error;
      this.warn(what, `${what}: ${error.message}`);
      return undefined;
    }
  }

  private warn(kind: string, line: string): void {
    if (this.lost || this.warned.has(kind)) return;
    this.warned.add(kind);
    this.warnLine(`${this.name}: ${line}`);
  }
}
