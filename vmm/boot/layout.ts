// The guest's physical memory map, in one place. Pure: numbers in, plans out. All addresses are guest-physical (gpa),
// a range is {gpa, bytes}, `last` is inclusive.
//
//   2^physicalBits ┬──────────────────────────────┐
//                  │ unused                       │
//                  ├──────────────────────────────┤
//                  │ 64-bit PCI window            │ a quarter of the space, at most 1 TiB, aligned to its size
//                  ├──────────────────────────────┤
//                  │ unused                       │
//                  ├──────────────────────────────┤
//                  │ tracking tables              │ of policy cached: 4 bytes per page, on 2 MiB
//                  ├──────────────────────────────┤
//                  │ high RAM                     │ what --memory has beyond 3 GiB
//      1_0000_0000 ├──────────────────────────────┤ 4 GiB
//        FEFF_C000 │ KVM: identity map, TSS       │ 4 pages, Intel only but always set aside
//        FEE0_0000 │ local APIC                   │ 1 page
//        FEC0_0000 │ IOAPIC                       │ 1 page
//        E000_0000 │ ECAM, bus 0                  │ 1 MiB
//        C000_0000 │ 32-bit PCI window            │ 512 MiB
//                  ├──────────────────────────────┤ 3 GiB
//                  │ unused, when RAM is smaller  │
//                  ├──────────────────────────────┤
//                  │ low RAM                      │ initrd at its end, kernel at 16 MiB
//          10_0000 ├──────────────────────────────┤ 1 MiB
//           E_0000 │ ACPI tables                  │ RAM, but reserved in e820 from 9_FC00 on
//           9_FC00 ├──────────────────────────────┤
//           2_0000 │ command line                 │
//             9000 │ page tables                  │ 6 pages
//             7000 │ zero page (boot_params)      │
//             6000 │ GDT                          │
//                0 └──────────────────────────────┘

import { type Gpa, gpa, PAGE_BYTES } from "../../hypercalls/addresses.js";
import { VmmError } from "../errors.js";

const KiB = 2 ** 10;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const TiB = 2 ** 40;

export interface GpaRange {
  readonly gpa: Gpa;
  readonly bytes: number;
}

/** Where a start-up structure goes. Everything here is RAM; the guest reuses it once it has read it. */
export const GDT_GPA = gpa(0x6000);
export const ZERO_PAGE_GPA = gpa(0x7000);
export const PAGE_TABLES_GPA = gpa(0x9000);
export const CMDLINE: GpaRange = { gpa: gpa(0x2_0000), bytes: 64 * KiB };
/** Where old firmware keeps its data: RAM that the guest must leave alone starts here and ends at 1 MiB. */
export const LOW_RESERVED: GpaRange = { gpa: gpa(0x9_fc00), bytes: MiB - 0x9_fc00 };
/** Also the range in which a guest without boot_params.acpi_rsdp_addr looks for the RSDP. */
export const ACPI_TABLES: GpaRange = { gpa: gpa(0xe_0000), bytes: 128 * KiB };

export const LOW_RAM_MAX_BYTES = 3 * GiB;
export const HIGH_RAM_GPA = gpa(4 * GiB);
export const MMIO32: GpaRange = { gpa: gpa(0xc000_0000), bytes: 512 * MiB };
/** Configuration space of bus 0, the only one: 32 slots × 8 functions × 4 KiB. */
export const ECAM: GpaRange = { gpa: gpa(0xe000_0000), bytes: MiB };
export const IOAPIC_GPA = gpa(0xfec0_0000);
export const LAPIC_GPA = gpa(0xfee0_0000);
/** KVM_SET_IDENTITY_MAP_ADDR: one page. */
export const KVM_IDENTITY_MAP_GPA = gpa(0xfeff_c000);
/** KVM_SET_TSS_ADDR: three pages. */
export const KVM_TSS_GPA = gpa(0xfeff_d000);
const KVM_PRIVATE: GpaRange = { gpa: KVM_IDENTITY_MAP_GPA, bytes: 4 * PAGE_BYTES };

/** The structures below 1 MiB and a first page to run on. Linux wants far more and is asked separately. */
const MEMORY_MIN_BYTES = 2 * MiB;

/** Where tracking tables begin: a guest maps them by large pages then. */
const TABLE_ALIGN_BYTES = 2 * MiB;
/** What the view of a table can hold (see native/memory-window.ts): an entry for each page of 1 TiB. */
const TABLE_MAX_BYTES = GiB;

/** A piece of guest RAM: `bytes` bytes at `gpa`, which are those from `offset` on in the memory the VMM allocates. */
export interface RamRange extends GpaRange {
  readonly offset: number;
}

export interface E820Entry extends GpaRange {
  readonly type: "ram" | "reserved";
}

export interface MemoryPlan {
  readonly memoryBytes: number;
  readonly physicalBits: number;
  /** One or two ranges, from gpa 0 and from 4 GiB; their bytes add up to memoryBytes. */
  readonly ram: readonly RamRange[];
  /** End (exclusive) of the RAM that starts at 0: where a 32-bit address can still be used. */
  readonly lowRamEnd: Gpa;
  readonly mmio32: GpaRange;
  readonly mmio64: GpaRange;
  /** As many as were asked for, each with an entry for every page frame up to RAM's end. */
  readonly tables: readonly GpaRange[];
  readonly e820: readonly E820Entry[];
}

/**
 * Places `memoryBytes` of RAM (a multiple of 4 KiB) in a guest whose addresses have `physicalBits` bits (see
 * cpuid.ts). Throws a VmmError when the memory is too small for any guest, not whole pages, does not fit the width, or
 * is more than tracking tables can have entries for.
 */
export function planMemory(want: {
  readonly memoryBytes: number;
  readonly physicalBits: number;
  /** Tracking tables; default none. */
  readonly tables?: number;
}): MemoryPlan {
  const { memoryBytes, physicalBits } = want;
  if (!(memoryBytes >= MEMORY_MIN_BYTES)) {
    throw new VmmError(
      `memory of ${memoryBytes} bytes is too small for any guest: give --memory ${inMiB(MEMORY_MIN_BYTES)} or more`,
    );
  }
  if (memoryBytes % PAGE_BYTES !== 0) {
    const rounded = Math.ceil(memoryBytes / MiB) * MiB;
    throw new VmmError(
      `memory of ${memoryBytes} bytes is not whole pages of 4 KiB: give --memory ${inMiB(rounded)}`,
    );
  }
  const lowBytes = Math.min(memoryBytes, LOW_RAM_MAX_BYTES);
  const highBytes = memoryBytes - lowBytes;

  const ramEnd = highBytes > 0 ? HIGH_RAM_GPA + highBytes : lowBytes;
  const tableBytes = roundUp((ramEnd / PAGE_BYTES) * 4, PAGE_BYTES);
  const tableStep = roundUp(tableBytes, TABLE_ALIGN_BYTES);
  const tablesStart = roundUp(HIGH_RAM_GPA + highBytes, TABLE_ALIGN_BYTES);
  const tables = Array.from(
    { length: want.tables ?? 0 },
    (_, i): GpaRange => ({ gpa: gpa(tablesStart + i * tableStep), bytes: tableBytes }),
  );
  if (tables.length > 0 && tableBytes > TABLE_MAX_BYTES) {
    throw new VmmError(
      `memory of ${inMiB(memoryBytes)} is more than policy cached can keep track of: use --dma strict or pinned for assigned devices`,
    );
  }

  const addressEnd = 2 ** physicalBits;
  const windowBytes = Math.min(addressEnd / 4, TiB);
  const windowStart = roundUp(tablesStart + tables.length * tableStep, windowBytes);
  if (windowStart + windowBytes > addressEnd) {
    const most = addressEnd - windowBytes - tables.length * tableStep - HIGH_RAM_GPA + LOW_RAM_MAX_BYTES;
    throw new VmmError(
      `memory of ${inMiB(memoryBytes)} does not fit the ${physicalBits}-bit physical addresses of this CPU: give --memory ${inMiB(most)} or less`,
    );
  }

  const ram: RamRange[] = [{ gpa: gpa(0), offset: 0, bytes: lowBytes }];
  if (highBytes > 0) ram.push({ gpa: HIGH_RAM_GPA, offset: lowBytes, bytes: highBytes });
  const e820: E820Entry[] = [
    { gpa: gpa(0), bytes: LOW_RESERVED.gpa, type: "ram" },
    { ...LOW_RESERVED, type: "reserved" },
    { gpa: gpa(MiB), bytes: lowBytes - MiB, type: "ram" },
    { ...ECAM, type: "reserved" },
    { ...KVM_PRIVATE, type: "reserved" },
  ];
  if (highBytes > 0) e820.push({ gpa: HIGH_RAM_GPA, bytes: highBytes, type: "ram" });
  for (const table of tables) e820.push({ ...table, type: "reserved" });
  return {
    memoryBytes,
    physicalBits,
    ram,
    lowRamEnd: gpa(lowBytes),
    mmio32: MMIO32,
    mmio64: { gpa: gpa(windowStart), bytes: windowBytes },
    tables,
    e820,
  };
}

export interface LoadRequest {
  readonly kernel: {
    readonly prefAddress: number;
    readonly initBytes: number;
    readonly initrdAddrMax: number;
  };
  /** 0 for none. */
  readonly initrdBytes: number;
}

/**
 * Places kernel and initrd: the kernel where it prefers to be (then it need not move itself), the initrd as high in
 * low RAM as the kernel allows, page-aligned, so that it is out of the way while the kernel unpacks. Throws a VmmError
 * that names both sizes and the least --memory with which they fit.
 */
export function placeKernel(
  plan: MemoryPlan,
  load: LoadRequest,
): { readonly kernel: Gpa; readonly initrd?: Gpa } {
  const { prefAddress, initBytes, initrdAddrMax } = load.kernel;
  const kernelEnd = roundUp(prefAddress + initBytes, PAGE_BYTES);
  const initrdBytes = roundUp(load.initrdBytes, PAGE_BYTES);
  const sizes =
    `a kernel that needs ${inMiB(initBytes)} at ${inMiB(prefAddress)}` +
    (initrdBytes > 0 ? ` and an initrd of ${inMiB(load.initrdBytes)}` : "");

  const initrdLimit = Math.min(LOW_RAM_MAX_BYTES, roundDown(initrdAddrMax + 1, PAGE_BYTES));
  const end = kernelEnd + initrdBytes;
  if (end > (initrdBytes > 0 ? initrdLimit : LOW_RAM_MAX_BYTES)) {
    throw new VmmError(
      `no amount of memory holds ${sizes}: they have to lie below ${inMiB(initrdBytes > 0 ? initrdLimit : LOW_RAM_MAX_BYTES)}; give smaller ones`,
    );
  }
  if (end > plan.lowRamEnd) {
    throw new VmmError(
      `memory of ${inMiB(plan.memoryBytes)} is too small for ${sizes}: give --memory ${inMiB(end)} or more`,
    );
  }
  const kernel = gpa(prefAddress);
  if (initrdBytes === 0) return { kernel };
  return { kernel, initrd: gpa(roundDown(Math.min(initrdLimit, plan.lowRamEnd), PAGE_BYTES) - initrdBytes) };
}

const roundUp = (value: number, unit: number): number => Math.ceil(value / unit) * unit;
const roundDown = (value: number, unit: number): number => Math.floor(value / unit) * unit;
/** As --memory takes it; rounded up, so that what a message asks for is enough. */
const inMiB = (bytes: number): string => `${Math.ceil(bytes / MiB)}M`;
