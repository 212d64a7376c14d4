// An assigned device as the guest sees it. Its registers are in three places: the host device's configuration space
// (read once, and forwarded where listed here), our own copy of the fields that are virtual, and its BARs, which are
// mapped into the guest but for the pages that hold the MSI-X table and pending bits. What is not listed is hidden.

import { type Hva, PAGE_BYTES } from "../../hypercalls/addresses.js";
import { isExpected, VmmError } from "../errors.js";
import type { IoHandler, Width } from "../io-bus.js";
import { CONSTANT } from "../sys/vfio.js";
import type { Area, VfioDeviceAccess } from "../vfio/device.js";
import { allOnes, readAligned, writeAligned } from "./access.js";
import { type AddressDecoder, Bar, type BarPart, type BarSpec } from "./bars.js";
import {
  type Capability,
  linkCapabilities,
  MsiCapability,
  msiCapabilityBytes,
  msixFlags,
  setMsix,
  setPm,
} from "./capabilities.js";
import { ConfigSpace } from "./config-space.js";
import type { PciFunction } from "./function.js";
import { Intx } from "./intx.js";
import type { PciMachine } from "./machine-interface.js";
import { Msi } from "./msi.js";
import type { IrqSource } from "./msi-vector.js";
import { Msix } from "./msix.js";
import { BARS, CONFIG_BYTES, PCI } from "./registers.js";

const {
  VFIO_PCI_CONFIG_REGION_INDEX: CONFIG,
  VFIO_PCI_INTX_IRQ_INDEX: INTX,
  VFIO_PCI_MSI_IRQ_INDEX: MSI,
  VFIO_PCI_MSIX_IRQ_INDEX: MSIX,
} = CONSTANT;

/** COMMAND bits that are the guest's. They reach the device only as the guest sets them. */
const COMMAND_BITS =
  PCI.PCI_COMMAND_IO | PCI.PCI_COMMAND_MEMORY | PCI.PCI_COMMAND_MASTER | PCI.PCI_COMMAND_INTX_DISABLE;
/** COMMAND bits that are the host's and stay as they are: whether errors are reported, to the host. */
const COMMAND_HOST_BITS = PCI.PCI_COMMAND_SERR | PCI.PCI_COMMAND_PARITY;
/** DEVCTL bits that are forwarded: they concern this device's own requests only. Payload size and errors are the host's. */
const DEVCTL_BITS = PCI.PCI_EXP_DEVCTL_RELAX_EN | PCI.PCI_EXP_DEVCTL_NOSNOOP_EN | PCI.PCI_EXP_DEVCTL_READRQ;

/** First byte of the device-specific part, where capabilities live. */
const CAPABILITIES = 0x40;

interface MsixPlace {
  readonly at: number;
  readonly tableBar: number;
  readonly table: number;
  readonly pbaBar: number;
  readonly pba: number;
}

type InterruptMode = "intx" | "msi" | "msix";

export class VfioPciFunction implements PciFunction {
  readonly name: string;
  private readonly config = new ConfigSpace();
  private readonly bars: Bar[];
  private readonly mappings: { readonly address: Hva; readonly bytes: number }[] = [];
  private readonly intx: Intx | undefined;
  /** Capabilities the guest sees: where each is, 0 when it is not there. */
  private readonly pm: number = 0;
  private readonly pcie: number = 0;
  private readonly msi: MsiCapability | undefined;
  private readonly msixAt: MsixPlace | undefined;
  private readonly msix: Msix | undefined;
  private mode: InterruptMode = "intx";
  /** COMMAND, the guest's bits and the host's, and DEVCTL as the device has them. */
  private command = 0;
  private readonly hostCommand: number;
  private devctl = 0;
  /** Configuration space as it is after a reset, BARs aside. */
  private readonly powerOn: Uint8Array;
  private readonly warned = new Set<string>();
  private closed = false;
  private lost = false;

  /**
   * Takes the device over: resets it and reads what it is. Close it by close(). Throws a VmmError for a device that
   * cannot be presented, a SystemError when the host fails.
   */
  constructor(
    private readonly device: VfioDeviceAccess,
    machine: PciMachine,
    private readonly decoder: AddressDecoder,
    slot: number,
    private readonly warnLine: (line: string) => void,
  ) {
    this.name = device.bdf;
    this.hostCommand = device.read(CONFIG, PCI.PCI_COMMAND, 2) & COMMAND_HOST_BITS;
    this.quiesce();
    if (!device.canReset)
      this.warn("reset", "the host cannot reset it alone: it comes with the state its last user left");

    const headerType = device.read(CONFIG, PCI.PCI_HEADER_TYPE, 1) & 0x7f;
    if (headerType !== 0)
      throw new VmmError(`${this.name}: has header type ${headerType}; only endpoints can be assigned`);
    this.copyHeader();
    for (const { id, at } of this.deviceCapabilities()) {
      // The first of a kind counts. Everything else is hidden: its registers may act on what is not the guest's.
      if (id === PCI.PCI_CAP_ID_PM && !this.pm) this.pm = this.addPm(at);
      else if (id === PCI.PCI_CAP_ID_EXP && !this.pcie) this.pcie = this.addPcie(at);
      else if (id === PCI.PCI_CAP_ID_MSI && !this.msi) this.msi = this.addMsi(at, machine);
      else if (id === PCI.PCI_CAP_ID_MSIX && !this.msix) {
        const vectors = Math.min(
          (this.host(at + PCI.PCI_MSIX_FLAGS, 2) & PCI.PCI_MSIX_FLAGS_QSIZE) + 1,
          device.irq(MSIX).count,
        );
        this.msixAt = this.addMsix(at, vectors);
        if (this.msixAt === undefined) continue;
        this.msix = new Msix(this.irqSource(MSIX, vectors), machine, (line) => this.warn("MSI-X", line));
      }
    }
    const capabilities: Capability[] = [
      { id: PCI.PCI_CAP_ID_PM, at: this.pm },
      { id: PCI.PCI_CAP_ID_MSI, at: this.msi?.at ?? 0 },
      { id: PCI.PCI_CAP_ID_EXP, at: this.pcie },
      { id: PCI.PCI_CAP_ID_MSIX, at: this.msixAt?.at ?? 0 },
    ];
    linkCapabilities(this.config, capabilities);

    if (device.irq(INTX).count > 0) {
      const source = {
        enable: (trigger: number, unmask: number) => {
          device.setTriggers(INTX, 0, [trigger]);
          device.setUnmask(INTX, unmask);
        },
        disable: () => device.disableIrq(INTX),
      };
      this.config.set(PCI.PCI_INTERRUPT_PIN, 1, 1);
      const gsi = machine.intxGsi(slot, 1);
      this.config.set(PCI.PCI_INTERRUPT_LINE, 1, gsi & 0xff, 0xff);
      this.intx = new Intx(source, machine, gsi);
    }

    this.bars = this.makeBars();
    for (const bar of this.bars) decoder.add(bar);
    this.powerOn = this.config.save();
    this.attempt("INTx", () => this.intx?.enable());
  }

  readConfig(register: number, width: Width): number {
    const ones = allOnes(width);
    return (
      this.attempt("configuration", () => {
        this.refresh(register, width);
        return this.config.read(register, width);
      }) ?? ones
    );
  }

  writeConfig(register: number, width: Width, value: number): void {
    const touches = (at: number, bytes: number) => register < at + bytes && at < register + width;
    this.config.write(register, width, value);
    this.attempt("configuration", () => {
      if (touches(PCI.PCI_COMMAND, 2)) this.applyCommand(this.config.read(PCI.PCI_COMMAND, 2));
      if (touches(PCI.PCI_BASE_ADDRESS_0, 4 * BARS)) this.decoder.settle();
      if (this.pcie && touches(this.pcie + PCI.PCI_EXP_DEVCTL, 2)) this.applyDevctl();
      if (this.msi?.touchedBy(register, width)) this.applyInterrupts();
      if (this.msixAt && touches(this.msixAt.at + PCI.PCI_MSIX_FLAGS, 2)) this.applyInterrupts();
    });
  }

  /**
   * As after power-on, with the BARs where firmware placed them: the guest asked for a function level reset. What its
   * driver mapped for the device stays mapped: it is the driver's, who may reset a device in the middle of its work and
   * unmaps when it is done with the memory.
   */
  private reset(): void {
    this.stop();
    this.config.restore(this.powerOn);
    for (const bar of this.bars) bar.address = bar.home;
    // The host brings these registers over a reset as they were.
    if (this.pcie) this.attempt("configuration", () => this.applyDevctl());
    this.attempt("INTx", () => this.intx?.enable());
  }

  close(): void {
    try {
      this.leave();
    } finally {
      // Mappings are undone after this; a device that is closed the kernel has taken off the bus, whatever failed here.
      this.device.close();
    }
  }

  /**
   * The device failed, or the host takes it away: takes it out of the guest and makes it quiet, as far as it still
   * answers; what it does no more is not worth a line. Its file stays open, for the host waits for it: closed before
   * what is mapped for the device is unmapped, the host may take the device, and with the last one of a container all
   * its mappings, while ours are still in the books.
   */
  lose(): void {
    this.lost = true;
    this.leave();
  }

  private leave(): void {
    if (this.closed) return;
    this.closed = true;
    this.stop();
    this.decoder.remove(this.bars);
    for (const { address, bytes } of this.mappings)
      this.attempt("munmap", () => this.device.unmap(address, bytes));
  }

  /**
   * Nothing of the device reaches the guest, and the device reaches nothing. At the end and when a device is lost this
   * comes before anything is unmapped. Unmapping waits until the IOMMU has forgotten the mapping, so even a device that
   * does not obey reaches no page that was given back; this keeps one that does from running into faults.
   */
  private stop(): void {
    // No more DMA; but the device goes on decoding until no vCPU reaches its BARs: an access would fault in KVM_RUN.
    this.attempt("bus mastering", () => {
      this.setCommand(this.command & ~PCI.PCI_COMMAND_MASTER);
    });
    for (const bar of this.bars) bar.decoding = false;
    this.attempt("BARs", () => this.decoder.settle());
    this.attempt("MSI-X", () => this.msix?.reset());
    this.attempt("MSI", () => this.msi?.off());
    this.attempt("INTx", () => this.intx?.disable());
    this.mode = "intx";
    this.attempt("reset", () => this.quiesce());
  }

  /**
   * Bus mastering off first: not every device survives a reset in the middle of its DMA. A lost device that no longer
   * answers is not reset: the host would wait for it for a minute. While the host unbinds a device it refuses to reset
   * it (EAGAIN); bus mastering is off all the same.
   */
  private quiesce(): void {
    this.command = 0;
    try {
      this.setCommand(0);
    } finally {
      if (this.device.canReset && !(this.lost && this.isSilent())) this.device.reset();
    }
  }

  /** Whether the device is gone from the bus: reads are all ones then, which is no class. */
  private isSilent(): boolean {
    return this.host(PCI.PCI_CLASS_REVISION, 4) === allOnes(4);
  }

  // ---- configuration space ----

  /** Reads the host's configuration space. */
  private host(register: number, width: Width): number {
    return this.device.read(CONFIG, register, width);
  }

  private copyHeader(): void {
    for (let register = 0; register < CAPABILITIES; register += 4) {
      const kept =
        register <= PCI.PCI_CLASS_REVISION ||
        register === PCI.PCI_CARDBUS_CIS ||
        register === PCI.PCI_SUBSYSTEM_VENDOR_ID;
      if (kept) this.config.set(register, 4, this.host(register, 4));
    }
    // The rest is ours: header type 0 without BIST, no expansion ROM, BARs and interrupt pin as set up later.
    this.config.set(PCI.PCI_COMMAND, 2, 0, COMMAND_BITS);
    this.config.set(PCI.PCI_CACHE_LINE_SIZE, 1, 0, 0xff);
    this.config.set(PCI.PCI_LATENCY_TIMER, 1, 0, 0xff);
  }

  /** The device's own capability list; a list that loops or leaves the configuration space just ends. */
  private *deviceCapabilities(): Generator<{ readonly id: number; readonly at: number }> {
    if ((this.host(PCI.PCI_STATUS, 2) & PCI.PCI_STATUS_CAP_LIST) === 0) return;
    const seen = new Set<number>();
    let at = this.host(PCI.PCI_CAPABILITY_LIST, 1) & ~3;
    while (at >= CAPABILITIES && !seen.has(at)) {
      seen.add(at);
      yield { id: this.host(at, 1), at };
      at = this.host(at + PCI.PCI_CAP_LIST_NEXT, 1) & ~3;
    }
  }

  private addPm(at: number): number {
    if (at + PCI.PCI_PM_SIZEOF > CONFIG_BYTES) return 0;
    setPm(this.config, at, this.host(at + PCI.PCI_PM_PMC, 2));
    return at;
  }

  /**
   * On the guest's root bus there is no port above the device, so it is presented as what may stand there: a root
   * complex integrated endpoint, which has no link (PCIe 5.0, 1.3.2.3 and 7.5.3). Of the registers, device
   * capabilities, control and status are shown; link, slot and the second set read as zero: "not implemented".
   */
  private addPcie(at: number): number {
    if (at + PCI.PCI_EXP_DEVSTA + 2 > CONFIG_BYTES) return 0;
    const version = this.host(at + PCI.PCI_EXP_FLAGS, 2) & PCI.PCI_EXP_FLAGS_VERS;
    this.config.set(at + PCI.PCI_EXP_FLAGS, 2, version | (PCI.PCI_EXP_TYPE_RC_END << 4));
    this.devctl = this.host(at + PCI.PCI_EXP_DEVCTL, 2) & ~PCI.PCI_EXP_DEVCTL_BCR_FLR;
    // The largest payload offered is the one the host has set, so that the guest has nothing to change.
    const payload = (this.devctl & PCI.PCI_EXP_DEVCTL_PAYLOAD) >> 5;
    const hidden =
      PCI.PCI_EXP_DEVCAP_PAYLOAD |
      PCI.PCI_EXP_DEVCAP_PHANTOM |
      (this.device.canReset ? 0 : PCI.PCI_EXP_DEVCAP_FLR);
    this.config.set(at + PCI.PCI_EXP_DEVCAP, 4, (this.host(at + PCI.PCI_EXP_DEVCAP, 4) & ~hidden) | payload);
    this.config.set(at + PCI.PCI_EXP_DEVCTL, 2, this.devctl, DEVCTL_BITS | PCI.PCI_EXP_DEVCTL_BCR_FLR);
    return at;
  }

  /** Undefined when no vectors can be had. */
  private addMsi(at: number, machine: PciMachine): MsiCapability | undefined {
    const flags = this.host(at + PCI.PCI_MSI_FLAGS, 2);
    const available = this.device.irq(MSI).count;
    const wide = (flags & PCI.PCI_MSI_FLAGS_64BIT) !== 0;
    const maskable = (flags & PCI.PCI_MSI_FLAGS_MASKBIT) !== 0;
    if (available === 0 || at + msiCapabilityBytes(wide, maskable) > CONFIG_BYTES) return undefined;
    const log2 = Math.min((flags & PCI.PCI_MSI_FLAGS_QMASK) >> 1, 5, Math.floor(Math.log2(available)));
    const msi = new Msi(this.irqSource(MSI, 2 ** log2), machine, (line) => this.warn("MSI", line));
    return new MsiCapability(this.config, at, log2, wide, maskable, msi);
  }

  /** Undefined, with a warning, when the table or the pending bits do not lie in a BAR as they have to. */
  private addMsix(at: number, vectors: number): MsixPlace | undefined {
    if (vectors === 0 || at + PCI.PCI_CAP_MSIX_SIZEOF > CONFIG_BYTES) return undefined;
    const table = this.host(at + PCI.PCI_MSIX_TABLE, 4);
    const pba = this.host(at + PCI.PCI_MSIX_PBA, 4);
    const place = {
      at,
      tableBar: table & PCI.PCI_MSIX_TABLE_BIR,
      table: (table & ~PCI.PCI_MSIX_TABLE_BIR) >>> 0,
      pbaBar: pba & PCI.PCI_MSIX_TABLE_BIR,
      pba: (pba & ~PCI.PCI_MSIX_TABLE_BIR) >>> 0,
    };
    const fits = (bar: number, offset: number, bytes: number) =>
      bar < BARS && offset + bytes <= this.device.region(bar).bytes;
    if (
      !fits(place.tableBar, place.table, vectors * PCI.PCI_MSIX_ENTRY_SIZE) ||
      !fits(place.pbaBar, place.pba, Math.ceil(vectors / 64) * 8)
    ) {
      this.warn("MSI-X", "its MSI-X table is not inside its BARs: MSI-X is hidden");
      return undefined;
    }
    setMsix(this.config, at, vectors, table, pba);
    return place;
  }

  /** Fetches the fields of a register that change by themselves. */
  private refresh(register: number, width: Width): void {
    const touches = (at: number, bytes: number) => register < at + bytes && at < register + width;
    if (touches(PCI.PCI_STATUS, 2)) {
      const list = this.config.read(PCI.PCI_CAPABILITY_LIST, 1) === 0 ? 0 : PCI.PCI_STATUS_CAP_LIST;
      this.config.set(PCI.PCI_STATUS, 2, (this.host(PCI.PCI_STATUS, 2) & ~PCI.PCI_STATUS_CAP_LIST) | list);
    }
    if (this.pcie && touches(this.pcie + PCI.PCI_EXP_DEVSTA, 2)) {
      this.config.set(this.pcie + PCI.PCI_EXP_DEVSTA, 2, this.host(this.pcie + PCI.PCI_EXP_DEVSTA, 2));
    }
    this.msi?.refresh(register, width);
  }

  /** BARs leave the guest before the device stops answering, and come after it has started to. */
  private applyCommand(command: number): void {
    for (const bar of this.bars) bar.decoding &&= decodes(bar, command);
    this.decoder.settle();
    if (command !== this.command) this.setCommand(command);
    for (const bar of this.bars) bar.decoding = decodes(bar, command);
    this.decoder.settle();
  }

  private setCommand(command: number): void {
    this.device.write(CONFIG, PCI.PCI_COMMAND, 2, command | this.hostCommand);
    this.command = command;
  }

  private applyDevctl(): void {
    const at = this.pcie + PCI.PCI_EXP_DEVCTL;
    const wanted = this.config.read(at, 2);
    if (wanted & PCI.PCI_EXP_DEVCTL_BCR_FLR) {
      const offered = this.config.read(this.pcie + PCI.PCI_EXP_DEVCAP, 4) & PCI.PCI_EXP_DEVCAP_FLR;
      if (offered) {
        this.reset();
        return;
      }
      this.config.set(at, 2, wanted & ~PCI.PCI_EXP_DEVCTL_BCR_FLR);
    }
    const devctl = (this.devctl & ~DEVCTL_BITS) | (wanted & DEVCTL_BITS);
    if (devctl === this.devctl) return;
    this.device.write(CONFIG, at, 2, devctl);
    this.devctl = devctl;
  }

  // ---- interrupts ----

  private irqSource(irq: number, vectors: number): IrqSource {
    const { device } = this;
    return {
      vectors,
      growable: device.irq(irq).growable,
      enable: (fds) => device.setTriggers(irq, 0, fds),
      setTrigger: (vector, fd) => device.setTriggers(irq, vector, [fd]),
      disable: () => device.disableIrq(irq),
    };
  }

  /**
   * Brings the interrupts to what the capabilities say. A device has one kind at a time, and VFIO insists on it: the
   * old kind goes before the new one comes. The host sets the device's own enable bits.
   */
  private applyInterrupts(): void {
    const msix = this.msixAt ? msixFlags(this.config, this.msixAt.at) : undefined;
    const mode = msix?.enabled ? "msix" : this.msi?.enabled ? "msi" : "intx";
    if (mode !== this.mode) {
      if (this.mode === "msix") this.msix!.control(false, false);
      else if (this.mode === "msi") this.msi!.off();
      else this.attempt("INTx", () => this.intx?.disable());
      this.mode = mode;
      if (mode === "intx") this.attempt("INTx", () => this.intx?.enable());
    }
    if (mode === "msix") this.msix!.control(true, msix!.masked);
    if (mode === "msi") this.msi!.apply();
  }

  // ---- BARs ----

  private makeBars(): Bar[] {
    const bars: Bar[] = [];
    for (let index = 0; index < BARS; index++) {
      const { bytes } = this.device.region(index);
      if (bytes === 0) continue;
      const flags = this.host(PCI.PCI_BASE_ADDRESS_0 + 4 * index, 4);
      const isIo = (flags & PCI.PCI_BASE_ADDRESS_SPACE_IO) !== 0;
      const is64 = (flags & PCI.PCI_BASE_ADDRESS_MEM_TYPE_MASK) === PCI.PCI_BASE_ADDRESS_MEM_TYPE_64;
      const spec: BarSpec = {
        index,
        kind: isIo ? "io" : is64 ? "mem64" : "mem32",
        bytes,
        prefetchable: !isIo && (flags & PCI.PCI_BASE_ADDRESS_MEM_PREFETCH) !== 0,
        parts: this.barParts(index, bytes, isIo),
      };
      bars.push(new Bar(this.name, spec, this.config));
      if (spec.kind === "mem64") index++;
    }
    return bars;
  }

  /**
   * Cuts a BAR into what the guest reaches directly and what is trapped: I/O ports, pages of the MSI-X table and
   * pending bits, what the host does not let be mapped, and BARs smaller than a page (a memory slot is whole pages).
   */
  private barParts(index: number, bytes: number, isIo: boolean): BarPart[] {
    const handler = this.barHandler(index, bytes);
    const trapped = this.msixAreas(index).map(({ offset, bytes: length }) => ({
      offset,
      end: offset + length,
    }));
    const parts: BarPart[] = [];
    let done = 0;
    const trapTo = (end: number) => {
      if (end > done) parts.push({ offset: done, bytes: end - done, handler });
      done = Math.max(done, end);
    };
    const areas = isIo ? [] : [...this.device.region(index).mappable].sort((a, b) => a.offset - b.offset);
    for (const area of areas) {
      const end = floorPage(Math.min(area.offset + area.bytes, bytes));
      let start = Math.max(done, ceilPage(area.offset));
      while (start < end) {
        const hole = trapped.find((h) => floorPage(h.offset) <= start && start < ceilPage(h.end));
        if (hole !== undefined) {
          start = ceilPage(hole.end);
          continue;
        }
        const stop = Math.min(end, ...trapped.map((h) => floorPage(h.offset)).filter((at) => at > start));
        const address = this.attempt(`mmap of BAR ${index}`, () =>
          this.device.map(index, start, stop - start),
        );
        if (address !== undefined) {
          this.mappings.push({ address, bytes: stop - start });
          trapTo(start);
          parts.push({ offset: start, bytes: stop - start, hva: address });
          done = stop;
        }
        start = stop;
      }
    }
    trapTo(bytes);
    return parts;
  }

  /** The MSI-X table and pending bits in a BAR. */
  private msixAreas(bar: number): (Area & { readonly what: "table" | "pba" })[] {
    const { msix, msixAt: place } = this;
    if (msix === undefined || place === undefined) return [];
    const areas: (Area & { readonly what: "table" | "pba" })[] = [];
    if (place.tableBar === bar) areas.push({ offset: place.table, bytes: msix.tableBytes, what: "table" });
    if (place.pbaBar === bar) areas.push({ offset: place.pba, bytes: msix.pbaBytes, what: "pba" });
    return areas;
  }

  /** Trapped accesses: to the guest's own MSI-X table, or one by one to the device. */
  private barHandler(index: number, bytes: number): IoHandler {
    const areas = this.msixAreas(index);
    const areaAt = (offset: number) =>
      areas.find((area) => offset >= area.offset && offset < area.offset + area.bytes);
    const read = (offset: number, width: Width): number => {
      // An access may start in a small BAR and end behind it.
      if (offset >= bytes) return allOnes(width);
      const area = areaAt(offset);
      if (area?.what === "table") return this.msix!.readTable(offset - area.offset, width);
      const value =
        this.attempt(`BAR ${index}`, () => this.device.read(index, offset, width)) ?? allOnes(width);
      return area?.what === "pba" ? this.withPending(value, offset - area.offset, width) : value;
    };
    const write = (offset: number, width: Width, value: number): void => {
      if (offset >= bytes) return;
      const area = areaAt(offset);
      if (area?.what === "table") this.msix!.writeTable(offset - area.offset, width, value);
      // Pending bits are read-only.
      else if (area === undefined)
        this.attempt(`BAR ${index}`, () => this.device.write(index, offset, width, value));
    };
    return {
      read: (offset, width) => readAligned(offset, width, read),
      write: (offset, width, value) => writeAligned(offset, width, value, write),
    };
  }

  /** Vectors that were never unmasked are pending in the device, the others in their eventfd. */
  private withPending(device: number, offset: number, width: Width): number {
    const ours = this.msix!.pending((offset & ~3) * 8);
    return ((device | (ours >>> (8 * (offset & 3)))) & allOnes(width)) >>> 0;
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

const decodes = (bar: Bar, command: number): boolean =>
  (command & (bar.spec.kind === "io" ? PCI.PCI_COMMAND_IO : PCI.PCI_COMMAND_MEMORY)) !== 0;

const floorPage = (offset: number): number => Math.floor(offset / PAGE_BYTES) * PAGE_BYTES;
const ceilPage = (offset: number): number => Math.ceil(offset / PAGE_BYTES) * PAGE_BYTES;
