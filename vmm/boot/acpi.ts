// The ACPI tables that tell the guest about its CPUs, interrupts and PCI: RSDP, XSDT, FADT, FACS, MADT, MCFG, DSDT.
// Pure: a plan in, writes out. Addresses are guest-physical, ports are I/O ports. Source: ACPI specification 6.5.
//
// Full ACPI, not hardware-reduced. In hardware-reduced mode Linux drops the PIC and with it the ISA interrupts that
// the serial driver's built-in ttyS0 takes, and has no timer to calibrate by when the TSC's rate is unknown. The price
// of the full model is two registers of 16 bits that hold what is written (PM1), so it is also the least work. SMI_CMD
// is 0: the machine is in ACPI mode from the start.

import { PORT } from "../../hypercalls/abi.js";
import { type Gpa, gpa } from "../../hypercalls/addresses.js";
import {
  device,
  eisaId,
  integer,
  ioPorts,
  isaIrq,
  memory32Fixed,
  name,
  packageOf,
  resources,
  scope,
  window,
} from "./aml.js";
import { ACPI_TABLES, ECAM, IOAPIC_GPA, LAPIC_GPA, type MemoryPlan } from "./layout.js";
import type { BootWrite } from "./linux.js";

/** Ports that the tables promise, and their meaning: the contract with vmm/devices. */
export const ACPI_PORTS = {
  /** 16 bits, write one to clear. Bit 8: power button pressed. */
  pm1Status: 0x600,
  /** 16 bits. Which status bits raise the SCI. */
  pm1Enable: 0x602,
  /** 16 bits. Bit 0 (SCI_EN) reads one. A write with SLP_EN enters the sleep state SLP_TYP; S5 is power-off. */
  pm1Control: 0x604,
  /** 8 bits, in the middle of the PCI address register. Writing RESET_VALUE resets the machine. */
  reset: 0xcf9,
} as const;
export const RESET_VALUE = 0x06;
export const PM1_CONTROL = {
  sciEn: 1 << 0,
  slpTypShift: 10,
  slpTypMask: 7,
  slpEn: 1 << 13,
  /** SLP_TYP of S5, as \_S5 in the DSDT says. */
  slpTypOff: 5,
} as const;
/** Level-triggered, active high. GSI = IOAPIC pin, as everywhere here. */
export const SCI_GSI = 9;
export const COM1 = { port: 0x3f8, ports: 8, gsi: 4 } as const;
export const IOAPIC_PINS = 24;
/** Where the guest may place I/O BARs; below are the legacy ports and ours. */
export const PCI_IO_WINDOW = { first: 0x1000, last: 0xffff } as const;
const PCI_CONFIG_PORTS = { port: 0xcf8, count: 8 } as const;
const PCI_SLOTS = 32;

/**
 * The GSI of a slot's interrupt pin: 16 to 23, level-triggered. `slot` 0 to 31, `pin` 0 (INTA) to 3 (INTD). Spread so
 * that the pins of one slot, and the INTAs of eight neighbours, do not share.
 */
export const gsiOfPin = (slot: number, pin: number): number => 16 + ((slot + pin) % 8);

export const CPUS_MAX = 16;

/** The tables for `cpus` (1 to 16) CPUs whose APIC ids are 0 to cpus - 1, and where the RSDP is. */
export function acpiTables(
  cpus: number,
  plan: MemoryPlan,
): { readonly rsdp: Gpa; readonly writes: readonly BootWrite[] } {
  const writes: BootWrite[] = [];
  let next = ACPI_TABLES.gpa as number;
  // 64 bytes is what the FACS needs; the rest is content with it.
  const place = (data: Buffer): Gpa => {
    const at = gpa(next);
    writes.push({ gpa: at, data });
    next = Math.ceil((next + data.length) / 64) * 64;
    if (next > ACPI_TABLES.gpa + ACPI_TABLES.bytes) throw new RangeError("ACPI tables do not fit their area");
    return at;
  };
  // The RSDP comes first: its place is then known without building anything else.
  next += 64;
  const facsGpa = place(facs());
  const dsdtGpa = place(dsdt(plan));
  const tables = [place(fadt(facsGpa, dsdtGpa)), place(madt(cpus)), place(mcfg())];
  const xsdtGpa = place(xsdt(tables));
  writes.push({ gpa: ACPI_TABLES.gpa, data: rsdp(xsdtGpa) });
  return { rsdp: ACPI_TABLES.gpa, writes };
}

const OEM_ID = "PVDMA ";
const OEM_TABLE_ID = "PVDMAVMM";
const CREATOR_ID = "PVDM";
const HEADER_BYTES = 36;

/** System description table (5.2.6): header and body, with the checksum that makes all bytes add up to 0. */
function table(signature: string, revision: number, body: Buffer): Buffer {
  const out = Buffer.alloc(HEADER_BYTES + body.length);
  out.write(signature, 0, "latin1");
  out.writeUInt32LE(out.length, 4);
  out[8] = revision;
  out.write(OEM_ID, 10, "latin1");
  out.write(OEM_TABLE_ID, 16, "latin1");
  out.writeUInt32LE(1, 24);
  out.write(CREATOR_ID, 28, "latin1");
  out.writeUInt32LE(1, 32);
  body.copy(out, HEADER_BYTES);
  out[9] = checksum(out);
  return out;
}

const checksum = (bytes: Uint8Array): number => -bytes.reduce((sum, byte) => sum + byte, 0) & 0xff;

/** 5.2.5.3, revision 2. */
function rsdp(xsdtGpa: Gpa): Buffer {
  const out = Buffer.alloc(36);
  out.write("RSD PTR ", 0, "latin1");
  out.write(OEM_ID, 9, "latin1");
  out[15] = 2;
  out.writeUInt32LE(out.length, 20);
  out.writeBigUInt64LE(BigInt(xsdtGpa), 24);
  out[8] = checksum(out.subarray(0, 20));
  out[32] = checksum(out);
  return out;
}

/** 5.2.8. */
function xsdt(tables: readonly Gpa[]): Buffer {
  const body = Buffer.alloc(tables.length * 8);
  tables.forEach((address, i) => {
    body.writeBigUInt64LE(BigInt(address), i * 8);
  });
  return table("XSDT", 1, body);
}

/** 5.2.10, version 2: no waking vector, no global lock. */
function facs(): Buffer {
  const out = Buffer.alloc(64);
  out.write("FACS", 0, "latin1");
  out.writeUInt32LE(out.length, 4);
  out[32] = 2;
  return out;
}

/** 5.2.9, revision 6. Offsets are those of the specification, from the start of the table. */
function fadt(facsGpa: Gpa, dsdtGpa: Gpa): Buffer {
  const out = Buffer.alloc(276);
  out.writeUInt32LE(facsGpa, 36); // FIRMWARE_CTRL
  out.writeUInt32LE(dsdtGpa, 40); // DSDT
  out[45] = 4; // Preferred_PM_Profile: enterprise server, no battery and no idle tricks
  out.writeUInt16LE(SCI_GSI, 46);
  out.writeUInt32LE(ACPI_PORTS.pm1Status, 56); // PM1a_EVT_BLK: status, then enable
  out.writeUInt32LE(ACPI_PORTS.pm1Control, 64); // PM1a_CNT_BLK
  out[88] = 4; // PM1_EVT_LEN
  out[89] = 2; // PM1_CNT_LEN
  out.writeUInt16LE(0xffff, 96); // P_LVL2_LAT: no C2
  out.writeUInt16LE(0xffff, 98); // P_LVL3_LAT: no C3
  // IAPC_BOOT_ARCH: bit 0 (devices on ISA) for COM1; bit 1 clear: no 8042 to wait for; bit 2: no VGA; bit 4: leave
  // ASPM alone, the physical link is the host's; bit 5: no CMOS clock, the time comes from KVM's clock.
  out.writeUInt16LE((1 << 0) | (1 << 2) | (1 << 4) | (1 << 5), 109);
  // Flags: WBINVD works; C1 on all; no sleep button and no RTC wake in PM1 (the power button is there); RESET_REG.
  out.writeUInt32LE((1 << 0) | (1 << 2) | (1 << 5) | (1 << 6) | (1 << 10), 112);
  ioAddress(8, 1, ACPI_PORTS.reset).copy(out, 116); // RESET_REG
  out[128] = RESET_VALUE;
  out.writeBigUInt64LE(BigInt(dsdtGpa), 140); // X_DSDT
  ioAddress(32, 2, ACPI_PORTS.pm1Status).copy(out, 148); // X_PM1a_EVT_BLK
  ioAddress(16, 2, ACPI_PORTS.pm1Control).copy(out, 172); // X_PM1a_CNT_BLK
  out.write(OEM_TABLE_ID, 268, "latin1"); // Hypervisor Vendor Identity
  return table("FACP", 6, out.subarray(HEADER_BYTES));
}

/** Generic address structure (5.2.3.2) in I/O space. `access`: 1 byte, 2 word. */
function ioAddress(bits: number, access: number, port: number): Buffer {
  const out = Buffer.alloc(12);
  out.set([1, bits, 0, access]);
  out.writeBigUInt64LE(BigInt(port), 4);
  return out;
}

/** 5.2.12. */
function madt(cpus: number): Buffer {
  if (!(Number.isInteger(cpus) && cpus >= 1 && cpus <= CPUS_MAX)) throw new RangeError(`${cpus} CPUs`);
  const head = Buffer.alloc(8);
  head.writeUInt32LE(LAPIC_GPA, 0);
  head.writeUInt32LE(1, 4); // PCAT_COMPAT: the in-kernel irqchip has two 8259s, which the guest is to mask
  const entries: Buffer[] = [];
  for (let id = 0; id < cpus; id++) {
    entries.push(Buffer.of(0, 8, id, id, 1, 0, 0, 0)); // local APIC: ACPI processor id, APIC id, enabled
  }
  const ioapic = Buffer.from([1, 12, cpus, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // from GSI 0
  ioapic.writeUInt32LE(IOAPIC_GPA, 4);
  entries.push(ioapic);
  // ISA interrupts are GSIs of the same number, the timer included: that is KVM's default routing, pin by pin. The
  // SCI is the exception in kind: level-triggered, active high.
  entries.push(Buffer.of(2, 10, 0, SCI_GSI, SCI_GSI, 0, 0, 0, 0x0d, 0));
  entries.push(Buffer.of(4, 6, 0xff, 0, 0, 1)); // NMI on LINT1 of every local APIC
  return table("APIC", 5, Buffer.concat([head, ...entries]));
}

/** PCI firmware specification 3.3, 4.1.2: segment 0, bus 0 only. */
function mcfg(): Buffer {
  const body = Buffer.alloc(8 + 16);
  body.writeBigUInt64LE(BigInt(ECAM.gpa), 8);
  return table("MCFG", 1, body);
}

/**
 * PCI's root with its windows and interrupt pins, COM1, what is taken, and how to power off. No _OSC: Linux then
 * leaves hot-plug, AER and ASPM alone, which belong to the host's ports.
 */
function dsdt(plan: MemoryPlan): Buffer {
  const { mmio32, mmio64 } = plan;
  const prt: Buffer[] = [];
  for (let slot = 0; slot < PCI_SLOTS; slot++) {
    for (let pin = 0; pin < 4; pin++) {
      const everyFunction = slot * 2 ** 16 + 0xffff;
      prt.push(packageOf(integer(everyFunction), integer(pin), integer(0), integer(gsiOfPin(slot, pin))));
    }
  }
  const body = Buffer.concat([
    name("_S5", packageOf(integer(PM1_CONTROL.slpTypOff), integer(0), integer(0), integer(0))),
    scope(
      "_SB",
      device(
        "PCI0",
        name("_HID", eisaId("PNP0A08")),
        name("_CID", eisaId("PNP0A03")),
        name("_UID", integer(0)),
        name("_SEG", integer(0)),
        name("_BBN", integer(0)),
        name(
          "_CRS",
          resources(
            window("bus", 0, 0),
            ioPorts(PCI_CONFIG_PORTS.port, PCI_CONFIG_PORTS.count),
            window("io", PCI_IO_WINDOW.first, PCI_IO_WINDOW.last),
            window("memory", mmio32.gpa, mmio32.gpa + mmio32.bytes - 1),
            window("memory", mmio64.gpa, mmio64.gpa + mmio64.bytes - 1),
          ),
        ),
        name("_PRT", packageOf(...prt)),
      ),
      // Linux trusts the MCFG only when ACPI has reserved its range here too.
      device(
        "RES0",
        name("_HID", eisaId("PNP0C02")),
        name("_UID", integer(0)),
        name("_CRS", resources(memory32Fixed(ECAM.gpa, ECAM.bytes), ioPorts(PORT, 4))),
      ),
      device(
        "COM1",
        name("_HID", eisaId("PNP0501")),
        name("_UID", integer(1)),
        name("_CRS", resources(ioPorts(COM1.port, COM1.ports), isaIrq(COM1.gsi))),
      ),
    ),
  ]);
  return table("DSDT", 2, body);
}
