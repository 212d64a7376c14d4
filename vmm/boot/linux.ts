// Linux's 64-bit boot protocol: what has to be in guest memory and in the registers when the first instruction runs.
// Pure: images and a memory plan in, writes and register values out. Addresses are guest-physical.
// Source: Documentation/arch/x86/boot.rst ("64-bit BOOT PROTOCOL"), zero-page.rst, <asm/bootparam.h>.

import { type Gpa, gpa, PAGE_BYTES } from "../../hypercalls/addresses.js";
import { VmmError } from "../errors.js";
import type { BootImages, FileExtent, KernelImage } from "./image.js";
import {
  CMDLINE,
  type E820Entry,
  GDT_GPA,
  type MemoryPlan,
  PAGE_TABLES_GPA,
  placeKernel,
  ZERO_PAGE_GPA,
} from "./layout.js";

/** Something to put into guest memory: bytes we made, or a piece of a file that is copied without passing through here. */
export type BootWrite =
  | { readonly gpa: Gpa; readonly data: Buffer }
  | { readonly gpa: Gpa; readonly extent: FileExtent };

/** A segment register, field for field as struct kvm_segment has it. */
export interface Segment {
  readonly base: number;
  readonly limit: number;
  readonly selector: number;
  readonly type: number;
  readonly present: number;
  readonly dpl: number;
  readonly db: number;
  readonly s: number;
  readonly l: number;
  readonly g: number;
}

/** Registers of the boot processor that differ from their reset values. TR and LDT stay as KVM resets them. */
export interface BootRegisters {
  readonly rip: Gpa;
  readonly rsi: number;
  readonly rsp: number;
  readonly rflags: number;
  readonly cr0: number;
  readonly cr3: Gpa;
  readonly cr4: number;
  readonly efer: number;
  readonly gdt: { readonly base: Gpa; readonly limit: number };
  readonly cs: Segment;
  /** For DS, ES, FS, GS and SS. */
  readonly ds: Segment;
}

export interface GuestStart {
  readonly writes: readonly BootWrite[];
  readonly registers: BootRegisters;
}

/** The 64-bit entry is this far into the protected-mode part. */
const ENTRY_64_OFFSET = 0x200;

const CR0_PE = 1 << 0;
const CR0_ET = 1 << 4;
const CR0_NE = 1 << 5;
const CR0_PG = 2 ** 31;
const CR4_PAE = 1 << 5;
const EFER_LME = 1 << 8;
const EFER_LMA = 1 << 10;
/** Bit 1 always reads one; interrupts are off, as the protocol demands. */
const RFLAGS = 1 << 1;

const PTE_PRESENT_WRITE = 3;
const PTE_LARGE = 1 << 7;
const LARGE_PAGE_BYTES = 2 ** 21;
/** Top level, next level, and four directories of 1 GiB in 2 MiB pages: 4 GiB, all that the protocol asks for. */
const PAGE_TABLE_PAGES = 6;

const CODE: Segment = {
  base: 0,
  limit: 0xffff_ffff,
  selector: 0x10,
  type: 11, // execute, read, accessed
  present: 1,
  dpl: 0,
  db: 0,
  s: 1,
  l: 1,
  g: 1,
};
const DATA: Segment = { ...CODE, selector: 0x18, type: 3, db: 1, l: 0 };

/** Zero page offsets: zero-page.rst, and boot.rst for those of the setup header, which starts at 0x1f1. */
const BOOT_PARAMS = {
  acpiRsdpAddr: 0x070,
  e820Entries: 0x1e8,
  setupHeader: 0x1f1,
  typeOfLoader: 0x210,
  code32Start: 0x214,
  ramdiskImage: 0x218,
  ramdiskBytes: 0x21c,
  cmdLinePtr: 0x228,
  setupData: 0x250,
  e820Table: 0x2d0,
  e820EntryBytes: 20,
} as const;
const LOADER_UNDEFINED = 0xff;
const E820_TYPE = { ram: 1, reserved: 2 } as const;

/**
 * Long mode with the first 4 GiB mapped one to one and flat segments, for any 64-bit code at `entry`, with `rsi` as
 * its argument. The stack pointer is 0: Linux brings its own stack.
 */
export function longMode(entry: Gpa, rsi: number): GuestStart {
  const gdt = Buffer.alloc(4 * 8);
  gdt.writeBigUInt64LE(descriptor(CODE), CODE.selector);
  gdt.writeBigUInt64LE(descriptor(DATA), DATA.selector);
  return {
    writes: [
      { gpa: GDT_GPA, data: gdt },
      { gpa: PAGE_TABLES_GPA, data: identityMap() },
    ],
    registers: {
      rip: entry,
      rsi,
      rsp: 0,
      rflags: RFLAGS,
      cr0: CR0_PG + CR0_NE + CR0_ET + CR0_PE,
      cr3: PAGE_TABLES_GPA,
      cr4: CR4_PAE,
      efer: EFER_LME | EFER_LMA,
      gdt: { base: GDT_GPA, limit: gdt.length - 1 },
      cs: CODE,
      ds: DATA,
    },
  };
}

/** The GDT entry that says the same as the segment register. Source: Intel SDM vol. 3, "Segment Descriptors". */
function descriptor(segment: Segment): bigint {
  const limit = segment.g ? Math.floor(segment.limit / PAGE_BYTES) : segment.limit;
  const access = segment.type | (segment.s << 4) | (segment.dpl << 5) | (segment.present << 7);
  const flags = (segment.l << 1) | (segment.db << 2) | (segment.g << 3);
  return (
    BigInt(limit & 0xffff) |
    (BigInt(access) << 40n) |
    (BigInt((limit >> 16) & 0xf) << 48n) |
    (BigInt(flags) << 52n)
  );
}

function identityMap(): Buffer {
  const tables = Buffer.alloc(PAGE_TABLE_PAGES * PAGE_BYTES);
  const tableGpa = (page: number): number => PAGE_TABLES_GPA + page * PAGE_BYTES;
  tables.writeUInt32LE(tableGpa(1) | PTE_PRESENT_WRITE, 0);
  for (let directory = 0; directory < 4; directory++) {
    tables.writeUInt32LE(tableGpa(2 + directory) | PTE_PRESENT_WRITE, PAGE_BYTES + directory * 8);
  }
  for (let page = 0; page < 4 * 512; page++) {
    tables.writeUInt32LE(page * LARGE_PAGE_BYTES + PTE_LARGE + PTE_PRESENT_WRITE, 2 * PAGE_BYTES + page * 8);
  }
  return tables;
}

/**
 * Everything for a Linux guest but the ACPI tables, which are found through `rsdp`. Throws a VmmError when the command
 * line is too long for the kernel, or kernel and initrd do not fit the memory.
 */
export function prepareLinux(images: BootImages, plan: MemoryPlan, rsdp: Gpa): GuestStart {
  const { kernel, initrd } = images;
  const place = placeKernel(plan, { kernel: kernel.header, initrdBytes: initrd?.bytes ?? 0 });
  const start = longMode(gpa(place.kernel + ENTRY_64_OFFSET), ZERO_PAGE_GPA);
  const writes: BootWrite[] = [
    ...start.writes,
    { gpa: CMDLINE.gpa, data: encodeCmdline(images.cmdline, kernel) },
    { gpa: place.kernel, extent: kernel.payload },
  ];
  const zeroPage = Buffer.alloc(PAGE_BYTES);
  kernel.header.setup.copy(zeroPage, BOOT_PARAMS.setupHeader);
  zeroPage.writeUInt8(LOADER_UNDEFINED, BOOT_PARAMS.typeOfLoader);
  zeroPage.writeUInt32LE(place.kernel, BOOT_PARAMS.code32Start);
  zeroPage.writeUInt32LE(CMDLINE.gpa, BOOT_PARAMS.cmdLinePtr);
  // The file's header may hold anything here, and the kernel would follow it.
  zeroPage.fill(0, BOOT_PARAMS.setupData, BOOT_PARAMS.setupData + 8);
  zeroPage.writeBigUInt64LE(BigInt(rsdp), BOOT_PARAMS.acpiRsdpAddr);
  zeroPage.writeUInt32LE(place.initrd ?? 0, BOOT_PARAMS.ramdiskImage);
  zeroPage.writeUInt32LE(initrd?.bytes ?? 0, BOOT_PARAMS.ramdiskBytes);
  if (initrd !== undefined && place.initrd !== undefined) writes.push({ gpa: place.initrd, extent: initrd });
  writeE820(zeroPage, plan.e820);
  writes.push({ gpa: ZERO_PAGE_GPA, data: zeroPage });
  return { writes, registers: start.registers };
}

function encodeCmdline(cmdline: string, kernel: KernelImage): Buffer {
  const data = Buffer.from(`${cmdline}\0`, "utf8");
  const bytes = data.length - 1;
  const most = Math.min(kernel.header.cmdlineBytes, CMDLINE.bytes - 1);
  if (bytes > most) {
    throw new VmmError(
      `command line of ${bytes} bytes is too long for kernel ${kernel.path.replace(/\p{Cc}/gu, "?")}, which takes ${most}: shorten it (--cmdline)`,
    );
  }
  return data;
}

function writeE820(zeroPage: Buffer, entries: readonly E820Entry[]): void {
  zeroPage.writeUInt8(entries.length, BOOT_PARAMS.e820Entries);
  entries.forEach((entry, i) => {
    const at = BOOT_PARAMS.e820Table + i * BOOT_PARAMS.e820EntryBytes;
    zeroPage.writeBigUInt64LE(BigInt(entry.gpa), at);
    zeroPage.writeBigUInt64LE(BigInt(entry.bytes), at + 8);
    zeroPage.writeUInt32LE(E820_TYPE[entry.type], at + 16);
  });
}
