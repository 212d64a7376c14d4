// vmm/boot: image recognition with malformed images, the memory map, Linux's boot structures, ACPI tables (disassembled
// by iasl), CPUID. All images are made here; files go to a directory of their own under the system's temporary one.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { suite } from "uvu";
import { ABI_VERSION, CPUID, FEATURES, LIMITS, PORT } from "../../hypercalls/abi.js";
import { gpa } from "../../hypercalls/addresses.js";
import { ACPI_PORTS, acpiTables, gsiOfPin, IOAPIC_PINS } from "../../vmm/boot/acpi.js";
import * as aml from "../../vmm/boot/aml.js";
import { type CpuidEntry, physicalBits, vcpuCpuid } from "../../vmm/boot/cpuid.js";
import {
  DEFAULT_CMDLINE,
  type FileExtent,
  type ImageSource,
  loadBootImages,
  recogniseImage,
} from "../../vmm/boot/image.js";
import * as layout from "../../vmm/boot/layout.js";
import { type BootWrite, longMode, prepareLinux } from "../../vmm/boot/linux.js";
import { VmmError } from "../../vmm/errors.js";

const MiB = 2 ** 20;
const GiB = 2 ** 30;

// ---- images -------------------------------------------------------------------------------------------------------

interface KernelOptions {
  setupSectors?: number;
  paragraphs?: number;
  protocol?: number;
  xloadflags?: number;
  prefAddress?: bigint;
  initBytes?: number;
  tail?: number;
}

/** A bzImage with nothing but a header and a pattern for a kernel. */
function bzImage(options: KernelOptions = {}): Buffer {
  const setupSectors = options.setupSectors ?? 3;
  const paragraphs = options.paragraphs ?? 0x200;
  const setupBytes = ((setupSectors || 4) + 1) * 512;
  const out = Buffer.alloc(setupBytes + paragraphs * 16 + (options.tail ?? 0), 0x90);
  out.fill(0, 0, setupBytes);
  out[0x1f1] = setupSectors;
  out.writeUInt32LE(paragraphs, 0x1f4);
  out.writeUInt16LE(0xaa55, 0x1fe);
  out.set([0xeb, 0x6a], 0x200);
  out.write("HdrS", 0x202, "latin1");
  out.writeUInt16LE(options.protocol ?? 0x20f, 0x206);
  out[0x211] = 1;
  out.writeUInt32LE(0x7fff_ffff, 0x22c);
  out.writeUInt32LE(0x20_0000, 0x230);
  out[0x234] = 1;
  out.writeUInt16LE(options.xloadflags ?? 0x3f, 0x236);
  out.writeUInt32LE(2047, 0x238);
  out.writeBigUInt64LE(options.prefAddress ?? 0x100_0000n, 0x258);
  out.writeUInt32LE(options.initBytes ?? 0x10_0000, 0x260);
  return out;
}

interface Section {
  name: string;
  data: Buffer;
  virtualBytes?: number;
}

/** A PE32+ file with these sections, raw data aligned to 512 bytes as linkers do. */
function pe(sections: Section[], optionalBytes = 240): Buffer {
  const peOffset = 0x80;
  const tableOffset = peOffset + 24 + optionalBytes;
  const align = (n: number) => Math.ceil(n / 512) * 512;
  let at = align(tableOffset + sections.length * 40);
  const head = Buffer.alloc(at);
  head.write("MZ", 0, "latin1");
  head.writeUInt32LE(peOffset, 0x3c);
  head.write("PE\0\0", peOffset, "latin1");
  head.writeUInt16LE(0x8664, peOffset + 4);
  head.writeUInt16LE(sections.length, peOffset + 6);
  head.writeUInt16LE(optionalBytes, peOffset + 20);
  head.writeUInt16LE(0x20b, peOffset + 24);
  const parts: Buffer[] = [head];
  sections.forEach(({ name, data, virtualBytes }, i) => {
    const entry = tableOffset + i * 40;
    head.write(name, entry, 8, "latin1");
    head.writeUInt32LE(virtualBytes ?? data.length, entry + 8);
    head.writeUInt32LE(align(data.length), entry + 16);
    head.writeUInt32LE(at, entry + 20);
    parts.push(data, Buffer.alloc(align(data.length) - data.length));
    at += align(data.length);
  });
  return Buffer.concat(parts);
}

const INITRD = Buffer.from("070701 this is an initrd");
const uki = (cmdline = "console=ttyS0 quiet\n\0\0"): Buffer =>
  pe([
    { name: ".text", data: Buffer.alloc(700) },
    { name: ".cmdline", data: Buffer.from(cmdline) },
    { name: ".linux", data: bzImage() },
    { name: ".initrd", data: INITRD },
  ]);

const sourceOf = (content: Buffer): ImageSource => ({
  name: "guest image x",
  path: "x",
  bytes: content.length,
  read(offset, bytes) {
    assert.ok(offset >= 0 && bytes >= 0 && offset + bytes <= content.length, `read ${offset}+${bytes}`);
    return Buffer.from(content.subarray(offset, offset + bytes));
  },
});

/** The message of the VmmError that `act` throws; it has to be one line. */
function failure(act: () => unknown): string {
  try {
    act();
  } catch (error) {
    assert.ok(error instanceof VmmError, `not a VmmError: ${error}`);
    assert.ok(!/[\p{Cc}]/u.test(error.message), `not one line: ${JSON.stringify(error.message)}`);
    return error.message;
  }
  return assert.fail("no error");
}
const refused = (content: Buffer): string => failure(() => recogniseImage(sourceOf(content)));

const image = suite("boot/image");
let dir = "";
image.before(() => {
  dir = fs.mkdtempSync(path.join(os.tmpdir(), "pvdma-boot-"));
});
image.after(() => fs.rmSync(dir, { recursive: true }));
function file(name: string, content: Buffer): string {
  const at = path.join(dir, name);
  fs.writeFileSync(at, content);
  return at;
}
const contentOf = ({ path: from, fileOffset, bytes }: FileExtent): Buffer =>
  fs.readFileSync(from).subarray(fileOffset, fileOffset + bytes);

image("a bzImage: the payload starts behind the setup sectors", () => {
  const at = file("bz", bzImage({ setupSectors: 7, tail: 100 }));
  const { kernel, initrd, cmdline } = loadBootImages({ image: at });
  assert.deepEqual(kernel.payload, { path: at, fileOffset: 8 * 512, bytes: 0x2000 });
  assert.equal(initrd, undefined);
  assert.equal(cmdline, DEFAULT_CMDLINE);
  const { setup: _, ...numbers } = kernel.header;
  assert.deepEqual(numbers, {
    protocol: 0x20f,
    prefAddress: 16 * MiB,
    initBytes: MiB,
    initrdAddrMax: 0x7fff_ffff,
    cmdlineBytes: 2047,
  });
});

image("setup_sects 0 means 4", () => {
  const { kernel } = recogniseImage(sourceOf(bzImage({ setupSectors: 0 })));
  assert.equal(kernel.payload.fileOffset, 5 * 512);
});

image("a bzImage with an EFI stub (MZ) is a bzImage", () => {
  const content = bzImage();
  content.write("MZ", 0, "latin1");
  assert.equal(recogniseImage(sourceOf(content)).kind, "bzImage");
});

image("a unified kernel image: kernel, initrd and command line", () => {
  const at = file("uki", uki());
  const { kernel, initrd, cmdline } = loadBootImages({ image: at });
  assert.equal(cmdline, "console=ttyS0 quiet");
  assert.deepEqual(contentOf(initrd!), INITRD);
  assert.deepEqual(contentOf(kernel.payload), bzImage().subarray(4 * 512));
});

image("a unified kernel image needs neither initrd nor command line", () => {
  const { kind, initrd, cmdline } = recogniseImage(sourceOf(pe([{ name: ".linux", data: bzImage() }])));
  assert.deepEqual(
    { kind, initrd, cmdline },
    { kind: "unified kernel image", initrd: undefined, cmdline: undefined },
  );
});

image("the smaller of virtual and raw size counts", () => {
  const sizeWith = (virtualBytes: number) =>
    recogniseImage(
      sourceOf(
        pe([
          { name: ".linux", data: bzImage() },
          { name: ".initrd", data: Buffer.alloc(1000), virtualBytes },
        ]),
      ),
    ).initrd?.bytes;
  assert.deepEqual([sizeWith(900), sizeWith(1024), sizeWith(5000), sizeWith(0)], [900, 1024, 1024, 1024]);
});

image("sections behind .profile are not the default profile's", () => {
  const { cmdline } = recogniseImage(
    sourceOf(
      pe([
        { name: ".linux", data: bzImage() },
        { name: ".cmdline", data: Buffer.from("first") },
        { name: ".profile", data: Buffer.from("ID=other") },
        { name: ".cmdline", data: Buffer.from("second") },
      ]),
    ),
  );
  assert.equal(cmdline, "first");
});

image("--kernel, --initrd and --cmdline replace what the image has, or stand alone", () => {
  const at = file("uki2", uki());
  const kernel = file("bz2", bzImage({ setupSectors: 9 }));
  const initrd = file("rd2", Buffer.from("other"));
  const over = loadBootImages({ image: at, kernel, initrd, cmdline: "" });
  assert.equal(over.kernel.path, kernel);
  assert.deepEqual(over.initrd, { path: initrd, fileOffset: 0, bytes: 5 });
  assert.equal(over.cmdline, "");
  assert.equal(loadBootImages({ image: at, kernel }).initrd?.path, at);
  assert.equal(loadBootImages({ kernel, initrd }).cmdline, DEFAULT_CMDLINE);
  assert.match(
    failure(() => loadBootImages({})),
    /^nothing to boot: give a guest image/,
  );
  assert.match(
    failure(() => loadBootImages({ kernel: at })),
    /is a unified kernel image.*give it without --kernel$/,
  );
});

image("files that cannot be read say why", () => {
  const missing = path.join(dir, "nowhere");
  assert.equal(
    failure(() => loadBootImages({ image: missing })),
    `cannot open guest image ${missing}: no such file; check the path (ENOENT)`,
  );
  const bz = file("bz3", bzImage());
  assert.match(
    failure(() => loadBootImages({ image: path.join(bz, "x") })),
    /\(ENOTDIR\)$/,
  );
  assert.match(
    failure(() => loadBootImages({ image: dir })),
    /is a directory, not a regular file: give the file/,
  );
  assert.match(
    failure(() => loadBootImages({ image: "/dev/null" })),
    /is a character device, not a regular file/,
  );
  const fifo = path.join(dir, "fifo");
  execFileSync("mkfifo", [fifo]);
  assert.match(
    failure(() => loadBootImages({ image: fifo })),
    /is a FIFO, not a regular file/,
  );
  assert.match(
    failure(() => loadBootImages({ image: file("empty", Buffer.alloc(0)) })),
    /is empty \(0 bytes\)/,
  );
  assert.match(
    failure(() => loadBootImages({ image: bz, initrd: file("empty2", Buffer.alloc(0)) })),
    /^initrd .* is empty/,
  );
  assert.match(
    failure(() => loadBootImages({ image: "a\nb" })),
    /guest image a\?b: no such file/,
  );
  assert.match(
    failure(() => loadBootImages({ image: "a\0b" })),
    /guest image a\?b: ERR_INVALID_ARG_VALUE/,
  );
});

image("a file without read permission says so", () => {
  const at = file("secret", bzImage());
  fs.chmodSync(at, 0);
  fs.chmodSync(dir, 0o755);
  const asRoot = process.getuid?.() === 0;
  if (asRoot) process.seteuid!(65534);
  try {
    assert.equal(
      failure(() => loadBootImages({ image: at })),
      `cannot open guest image ${at}: permission denied; let this user read it and enter its directories (EACCES)`,
    );
  } finally {
    if (asRoot) process.seteuid!(0);
  }
});

image("what is known but not booted is named", () => {
  const elf = Buffer.alloc(4096);
  elf.write("\x7fELF", 0, "latin1");
  elf[4] = 2;
  elf.writeUInt16LE(62, 18);
  assert.match(refused(elf), /is an ELF kernel \(vmlinux, PVH\), 64-bit.*give the bzImage/);
  const disk = Buffer.alloc(4096);
  disk.writeUInt16LE(0xaa55, 510);
  assert.match(refused(disk), /is a disk image \(MBR\), .*give them by --kernel and --initrd/);
  disk.write("EFI PART", 512, "latin1");
  assert.match(refused(disk), /disk image \(GPT\)/);
  assert.match(refused(Buffer.from("QFI\xfb\0\0\0\x03", "latin1")), /disk image \(qcow2\)/);
  const ext4 = Buffer.alloc(4096);
  ext4.writeUInt16LE(0xef53, 1080);
  assert.match(refused(ext4), /ext2\/3\/4/);
  const iso = Buffer.alloc(40960);
  iso.write("CD001", 32769, "latin1");
  assert.match(refused(iso), /ISO 9660/);
  assert.equal(
    refused(Buffer.from([0x1f, 0x8b, 8, 0, 1, 2, 3, 4, 5])),
    "guest image x is of unknown kind (9 bytes, the first are 1f 8b 08 00 01 02 03 04): give a unified kernel image or a bzImage for x86-64",
  );
  assert.match(refused(Buffer.from([7])), /\(1 bytes, the first are 07\)/);
});

image("a 32-bit only or too old kernel is refused", () => {
  assert.equal(
    refused(bzImage({ xloadflags: 0x2 })),
    "guest image x is a 32-bit only bzImage (xloadflags 0x2, no XLF_KERNEL_64): give an x86-64 kernel",
  );
  assert.match(refused(bzImage({ protocol: 0x20a })), /boot protocol 2\.10, a 64-bit entry needs 2\.12/);
  assert.match(
    refused(pe([{ name: ".linux", data: bzImage({ xloadflags: 0 }) }])),
    /^guest image x, section \.linux is a 32-bit only/,
  );
});

image("truncated images say where they should end", () => {
  const bz = bzImage();
  assert.equal(
    refused(bz.subarray(0, bz.length - 1)),
    `guest image x is truncated: the kernel ends at byte ${bz.length}, there are ${bz.length - 1}; copy or make it again`,
  );
  assert.match(refused(bz.subarray(0, 0x220)), /truncated: its setup header ends at byte 612, there are 544/);
  const unified = uki();
  // The padding behind the last section is not needed.
  const end = unified.length - 512 + INITRD.length;
  for (let bytes = 2; bytes < end; bytes++) {
    const message = failure(() => recogniseImage(sourceOf(unified.subarray(0, bytes))));
    assert.match(message, /is truncated: /, `${bytes} of ${end}: ${message}`);
  }
  assert.match(refused(unified.subarray(0, end - 1)), /section \.initrd ends at byte/);
});

image("malformed headers are named with their values", () => {
  assert.match(refused(bzImage({ prefAddress: 0x1_0100_0000n })), /at 0x101000000 \(pref_address\)/);
  assert.match(refused(bzImage({ prefAddress: 0x8000n })), /at 0x8000 \(pref_address\)/);
  assert.match(refused(bzImage({ initBytes: 16 })), /8192 bytes of kernel but an init_size of 16/);
  assert.match(refused(bzImage({ paragraphs: 0 })), /a kernel of 0 bytes/);
  const longHeader = bzImage();
  longHeader[0x201] = 0xff;
  assert.match(refused(longHeader), /setup header ends at 0x301/);
  const noKernel = pe([{ name: ".text", data: Buffer.alloc(10) }]);
  assert.match(refused(noKernel), /PE file without a \.linux section/);
  assert.match(
    refused(pe([{ name: ".linux", data: Buffer.alloc(9000, 1) }])),
    /section \.linux is not a bzImage: no "HdrS"/,
  );
  const twice = { name: ".linux", data: bzImage() };
  assert.match(refused(pe([twice, twice])), /has two \.linux sections/);
  const arm = uki();
  arm.writeUInt16LE(0xaa64, 0x84);
  assert.match(refused(arm), /PE file for machine 0xaa64/);
  const many = uki();
  many.writeUInt16LE(0xffff, 0x86);
  assert.match(refused(many), /65535 sections/);
  const dos = uki();
  dos.writeUInt32LE(0x40, 0x3c);
  assert.match(refused(dos), /DOS program/);
  assert.match(
    refused(
      pe([
        { name: ".linux", data: bzImage() },
        { name: ".cmdline", data: Buffer.alloc(70000, 65) },
      ]),
    ),
    /\.cmdline section of 70000 bytes/,
  );
});

/** Marsaglia's xorshift32: the same images on every run. */
function generator(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}

image("mutated images: a VmmError or extents inside the file, nothing else", () => {
  const random = generator(0x5eed1);
  const bases = [
    bzImage(),
    bzImage({ setupSectors: 0, tail: 37 }),
    uki(),
    pe([{ name: ".linux", data: bzImage() }]),
  ];
  const edges = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
  let accepted = 0;
  for (let round = 0; round < 40_000; round++) {
    const base = bases[random(bases.length)]!;
    const mutant = Buffer.from(base.subarray(0, random(8) === 0 ? 1 + random(base.length) : base.length));
    const peMutant = base.length > 8 && base[0] === 0x4d;
    for (let i = random(4); i >= 0; i--) {
      // Where the headers are: DOS and PE header with the section table, or the setup header.
      const at = (peMutant ? random(0x80 + 24 + 240 + 160) : 0x1f0 + random(0x80)) % mutant.length;
      const value = random(3) === 0 ? random(2 ** 32) : edges[random(edges.length)]!;
      const width = Math.min([1, 2, 4][random(3)]!, mutant.length - at);
      mutant.writeUIntLE(value % 2 ** (8 * width), at, width);
    }
    try {
      const { kernel, initrd } = recogniseImage(sourceOf(mutant));
      accepted++;
      for (const extent of [kernel.payload, initrd]) {
        if (extent === undefined) continue;
        assert.ok(
          extent.bytes > 0 && extent.fileOffset + extent.bytes <= mutant.length,
          JSON.stringify(extent),
        );
      }
      // What passes here must also be safe to prepare: no write outside RAM.
      const plan = layout.planMemory({ memoryBytes: 64 * MiB, physicalBits: 40 });
      const images = { kernel, cmdline: "", ...(initrd && { initrd }) };
      for (const write of prepareLinux(images, plan, gpa(0xe0000)).writes) {
        const bytes = "data" in write ? write.data.length : write.extent.bytes;
        assert.ok(write.gpa >= 0 && write.gpa + bytes <= 64 * MiB, `write at ${write.gpa}`);
      }
    } catch (error) {
      if (!(error instanceof VmmError)) throw error;
      assert.ok(!error.message.includes("\n"));
    }
  }
  // A test whose mutants are all refused, or all pass, tests nothing.
  assert.ok(accepted > 5_000 && accepted < 35_000, `${accepted} accepted`);
});

image.run();

// ---- layout -------------------------------------------------------------------------------------------------------

const map = suite("boot/layout");

const overlap = (a: layout.GpaRange, b: layout.GpaRange): boolean =>
  a.gpa < b.gpa + b.bytes && b.gpa < a.gpa + a.bytes;

map("RAM, windows and reserved ranges never overlap, for any size and width", () => {
  for (const physicalBits of [36, 39, 40, 46, 48, 52]) {
    for (const memoryBytes of [2, 64, 512, 3071, 3072, 3073, 4096, 8192, 48128].map((n) => n * MiB)) {
      const plan = layout.planMemory({ memoryBytes, physicalBits });
      const devices: layout.GpaRange[] = [
        plan.mmio32,
        plan.mmio64,
        layout.ECAM,
        { gpa: layout.IOAPIC_GPA, bytes: 4096 },
        { gpa: layout.LAPIC_GPA, bytes: 4096 },
        { gpa: layout.KVM_IDENTITY_MAP_GPA, bytes: 4096 },
        { gpa: layout.KVM_TSS_GPA, bytes: 3 * 4096 },
      ];
      const all = [...plan.ram, ...devices];
      all.forEach((a, i) => {
        assert.ok(a.gpa + a.bytes <= 2 ** physicalBits, `${a.gpa} is beyond ${physicalBits} bits`);
        for (const b of all.slice(i + 1)) assert.ok(!overlap(a, b), `${a.gpa} ${b.gpa}`);
      });
      assert.equal(
        plan.ram.reduce((sum, range) => sum + range.bytes, 0),
        memoryBytes,
      );
      assert.equal(plan.mmio64.gpa % plan.mmio64.bytes, 0);
      plan.e820.forEach((a, i) => {
        for (const b of plan.e820.slice(i + 1)) assert.ok(!overlap(a, b) && a.gpa < b.gpa);
        if (a.type === "ram") {
          assert.ok(plan.ram.some((r) => r.gpa <= a.gpa && a.gpa + a.bytes <= r.gpa + r.bytes));
          for (const b of [...devices, layout.ACPI_TABLES]) assert.ok(!overlap(a, b), `${a.gpa} ${b.gpa}`);
        }
      });
      const reserved = plan.e820.filter((entry) => entry.type === "reserved");
      const isReserved = (at: number) => reserved.some((e) => e.gpa <= at && at < e.gpa + e.bytes);
      for (const at of [
        layout.ACPI_TABLES.gpa,
        layout.ECAM.gpa,
        layout.KVM_IDENTITY_MAP_GPA,
        layout.KVM_TSS_GPA,
      ]) {
        assert.ok(isReserved(at), `${at} is not reserved`);
      }
    }
  }
});

map("RAM beyond 3 GiB goes above 4 GiB and keeps its offsets", () => {
  const plan = layout.planMemory({ memoryBytes: 8 * GiB, physicalBits: 40 });
  assert.deepEqual(plan.ram, [
    { gpa: 0, offset: 0, bytes: 3 * GiB },
    { gpa: 4 * GiB, offset: 3 * GiB, bytes: 5 * GiB },
  ]);
  assert.equal(plan.lowRamEnd, 3 * GiB);
  assert.deepEqual(plan.e820.at(-1), { gpa: 4 * GiB, bytes: 5 * GiB, type: "ram" });
});

map("tracking tables have an entry for each page up to RAM's end, and lie behind it", () => {
  for (const memoryBytes of [64 * MiB, 3 * GiB, 8 * GiB]) {
    const plan = layout.planMemory({ memoryBytes, physicalBits: 40, tables: 3 });
    const last = plan.ram.at(-1)!;
    assert.equal(plan.tables.length, 3);
    const all: layout.GpaRange[] = [...plan.ram, ...plan.tables, plan.mmio32, plan.mmio64, layout.ECAM];
    for (const [i, table] of plan.tables.entries()) {
      assert.ok(table.bytes >= ((last.gpa + last.bytes) / 4096) * 4);
      assert.equal(table.gpa % (2 * MiB), 0);
      assert.equal(table.bytes % 4096, 0);
      assert.ok(plan.e820.some((entry) => entry.gpa === table.gpa && entry.type === "reserved"));
      for (const other of all) if (other !== table) assert.ok(!overlap(other, table), `table ${i}`);
    }
  }
  // What is advised is possible.
  const advice = (memoryBytes: number, physicalBits: number): string => {
    try {
      layout.planMemory({ memoryBytes, physicalBits, tables: 2 });
      return "";
    } catch (error) {
      assert.ok(error instanceof VmmError);
      return error.message;
    }
  };
  const most = /give --memory (\d+)M or less/.exec(advice(48128 * MiB, 36))!;
  assert.equal(advice(Number(most[1]) * MiB, 36), "");
  assert.match(
    advice(2048 * GiB, 46),
    /more than policy cached can keep track of: use --dma strict or pinned/,
  );
});

map("the structures below 1 MiB do not overlap and lie in usable RAM", () => {
  const places: layout.GpaRange[] = [
    { gpa: layout.GDT_GPA, bytes: 32 },
    { gpa: layout.ZERO_PAGE_GPA, bytes: 4096 },
    { gpa: layout.PAGE_TABLES_GPA, bytes: 6 * 4096 },
    layout.CMDLINE,
    layout.LOW_RESERVED,
  ];
  places.forEach((a, i) => {
    for (const b of places.slice(i + 1)) assert.ok(!overlap(a, b));
  });
});

map("sizes that cannot be are refused with what to give", () => {
  const plan = (memoryBytes: number, physicalBits: number) => () =>
    layout.planMemory({ memoryBytes, physicalBits });
  assert.match(failure(plan(MiB, 40)), /too small for any guest: give --memory 2M or more/);
  assert.match(failure(plan(Number.NaN, 40)), /too small/);
  assert.match(failure(plan(64 * MiB + 1, 40)), /not whole pages of 4 KiB: give --memory 65M/);
  assert.equal(
    failure(plan(64 * GiB, 36)),
    "memory of 65536M does not fit the 36-bit physical addresses of this CPU: give --memory 48128M or less",
  );
  layout.planMemory({ memoryBytes: 48128 * MiB, physicalBits: 36 });
  assert.match(failure(plan(48129 * MiB, 36)), /give --memory 48128M or less/);
});

map("kernel at its address, initrd as high as allowed", () => {
  const kernel = { prefAddress: 16 * MiB, initBytes: 40 * MiB, initrdAddrMax: 0x7fff_ffff };
  const at = (memoryBytes: number, initrdBytes: number, more = {}) =>
    layout.placeKernel(layout.planMemory({ memoryBytes, physicalBits: 40 }), {
      kernel: { ...kernel, ...more },
      initrdBytes,
    });
  assert.deepEqual(at(512 * MiB, 5000), { kernel: 16 * MiB, initrd: 512 * MiB - 8192 });
  assert.deepEqual(at(8 * GiB, 4096), { kernel: 16 * MiB, initrd: 2 * GiB - 4096 });
  assert.deepEqual(at(8 * GiB, 4096, { initrdAddrMax: 0xffff_ffff }), {
    kernel: 16 * MiB,
    initrd: 3 * GiB - 4096,
  });
  assert.deepEqual(at(56 * MiB, 0), { kernel: 16 * MiB });
  assert.equal(
    failure(() => at(56 * MiB, 1)),
    "memory of 56M is too small for a kernel that needs 40M at 16M and an initrd of 1M: give --memory 57M or more",
  );
  at(57 * MiB, 1);
  assert.match(
    failure(() => at(32 * MiB, 0)),
    /a kernel that needs 40M at 16M: give --memory 56M or more/,
  );
  assert.match(
    failure(() => at(8 * GiB, 2 * GiB)),
    /^no amount of memory holds .*an initrd of 2048M: .*below 2048M/,
  );
  assert.match(
    failure(() => at(8 * GiB, 0, { prefAddress: 3 * GiB })),
    /^no amount of memory/,
  );
});

map.run();

// ---- linux --------------------------------------------------------------------------------------------------------

const linux = suite("boot/linux");
const plan512 = layout.planMemory({ memoryBytes: 512 * MiB, physicalBits: 40 });
const images = (cmdline = "console=ttyS0") => {
  const { kernel, initrd } = recogniseImage(sourceOf(uki()));
  return { kernel, initrd: initrd!, cmdline };
};
const dataAt = (writes: readonly BootWrite[], at: number): Buffer => {
  const found = writes.find((write) => write.gpa === at);
  assert.ok(found !== undefined && "data" in found, `no data at ${at}`);
  return found.data;
};

linux("the zero page has header, memory map, command line, initrd and RSDP", () => {
  const { writes } = prepareLinux(images(), plan512, gpa(0xe0000));
  const zeroPage = dataAt(writes, layout.ZERO_PAGE_GPA);
  assert.equal(zeroPage.length, 4096);
  assert.equal(zeroPage.toString("latin1", 0x202, 0x206), "HdrS");
  assert.equal(zeroPage[0x210], 0xff);
  assert.equal(zeroPage[0x1ef], 0, "sentinel");
  assert.equal(zeroPage.readBigUInt64LE(0x070), 0xe0000n);
  assert.equal(zeroPage.readUInt32LE(0x228), layout.CMDLINE.gpa);
  assert.equal(zeroPage.readUInt32LE(0x218), 512 * MiB - 4096);
  assert.equal(zeroPage.readUInt32LE(0x21c), INITRD.length);
  assert.equal(zeroPage[0x1e8], plan512.e820.length);
  plan512.e820.forEach((entry, i) => {
    const at = 0x2d0 + 20 * i;
    assert.equal(zeroPage.readBigUInt64LE(at), BigInt(entry.gpa));
    assert.equal(zeroPage.readBigUInt64LE(at + 8), BigInt(entry.bytes));
    assert.equal(zeroPage.readUInt32LE(at + 16), entry.type === "ram" ? 1 : 2);
  });
  // Nothing of the file beyond its setup header, and nothing it says about setup_data.
  assert.ok(zeroPage.subarray(0x26c, 0x2d0).every((byte) => byte === 0));
  assert.equal(dataAt(writes, layout.CMDLINE.gpa).toString(), "console=ttyS0\0");
  const extents = writes.filter((write) => "extent" in write).map((write) => [write.gpa, write.extent.bytes]);
  assert.deepEqual(extents, [
    [16 * MiB, 0x2000],
    [512 * MiB - 4096, INITRD.length],
  ]);
});

linux("setup_data of the file is not followed", () => {
  const content = bzImage();
  content.fill(0xff, 0x250, 0x258);
  const { kernel } = recogniseImage(sourceOf(content));
  const zeroPage = dataAt(
    prepareLinux({ kernel, cmdline: "" }, plan512, gpa(0)).writes,
    layout.ZERO_PAGE_GPA,
  );
  assert.equal(zeroPage.readBigUInt64LE(0x250), 0n);
  assert.equal(zeroPage.readUInt32LE(0x218), 0);
});

linux("the page tables map every address below 4 GiB to itself", () => {
  const { writes, registers } = longMode(gpa(0x100_0200), 0x7000);
  const tables = dataAt(writes, registers.cr3);
  const entry = (table: number, index: number): number => {
    const value = tables.readBigUInt64LE(table - registers.cr3 + index * 8);
    assert.equal(value & 3n, 3n, "present, writable");
    return Number(value);
  };
  for (const address of [0, 0x7000, 0x100_0200, 0x8000_0000, 0xfee0_0000, 0xffff_ffff]) {
    const directories = entry(registers.cr3, 0) & ~0xfff;
    const directory = entry(directories, Math.floor(address / GiB)) & ~0xfff;
    const page = entry(directory, Math.floor(address / (2 * MiB)) % 512);
    assert.equal(page & 0x80, 0x80, "2 MiB page");
    assert.equal(page - (page % (2 * MiB)) + (address % (2 * MiB)), address);
  }
});

linux("registers and descriptors are those of the 64-bit protocol", () => {
  const { registers, writes } = prepareLinux(images(), plan512, gpa(0xe0000));
  const { cs, ds, gdt, ...plain } = registers;
  assert.deepEqual(plain, {
    rip: 0x100_0200,
    rsi: layout.ZERO_PAGE_GPA,
    rsp: 0,
    rflags: 2,
    cr0: 0x8000_0031,
    cr3: layout.PAGE_TABLES_GPA,
    cr4: 0x20,
    efer: 0x500,
  });
  const table = dataAt(writes, gdt.base);
  assert.equal(table.length - 1, gdt.limit);
  // The flat 64-bit code and data descriptors as the SDM's formats give them, accessed.
  assert.equal(table.readBigUInt64LE(cs.selector), 0x00af_9b00_0000_ffffn);
  assert.equal(table.readBigUInt64LE(ds.selector), 0x00cf_9300_0000_ffffn);
  assert.deepEqual([cs.selector, ds.selector], [0x10, 0x18]);
});

linux("a command line as long as the kernel takes passes, one byte more does not", () => {
  prepareLinux(images("x".repeat(2047)), plan512, gpa(0));
  assert.equal(
    failure(() => prepareLinux(images("x".repeat(2048)), plan512, gpa(0))),
    "command line of 2048 bytes is too long for kernel x, which takes 2047: shorten it (--cmdline)",
  );
  assert.match(
    failure(() => prepareLinux(images("ü".repeat(1024)), plan512, gpa(0))),
    /of 2048 bytes/,
  );
});

linux.run();

// ---- acpi ---------------------------------------------------------------------------------------------------------

const acpi = suite("boot/acpi");
const plan8G = layout.planMemory({ memoryBytes: 8 * GiB, physicalBits: 40 });
const sum = (bytes: Uint8Array): number => bytes.reduce((total, byte) => (total + byte) & 0xff, 0);

/** Follows the pointers as a guest does. */
function walk(cpus: number, plan = plan8G): Map<string, Buffer> {
  const { rsdp, writes } = acpiTables(cpus, plan);
  const found = new Map<string, Buffer>();
  const root = dataAt(writes, rsdp);
  assert.equal(root.toString("latin1", 0, 8), "RSD PTR ");
  assert.equal(sum(root.subarray(0, 20)), 0);
  assert.equal(sum(root), 0);
  const take = (at: number): Buffer => {
    const data = dataAt(writes, at);
    found.set(data.toString("latin1", 0, 4), data);
    assert.equal(data.readUInt32LE(4), data.length);
    return data;
  };
  const xsdt = take(Number(root.readBigUInt64LE(24)));
  for (let at = 36; at < xsdt.length; at += 8) take(Number(xsdt.readBigUInt64LE(at)));
  const fadt = found.get("FACP")!;
  take(Number(fadt.readBigUInt64LE(140)));
  take(fadt.readUInt32LE(36));
  return found;
}

acpi("RSDP leads to all tables, their checksums are right, they fit their area", () => {
  for (const cpus of [1, 4, 16]) {
    const tables = walk(cpus);
    assert.deepEqual([...tables.keys()].sort(), ["APIC", "DSDT", "FACP", "FACS", "MCFG", "XSDT"]);
    for (const [signature, data] of tables) if (signature !== "FACS") assert.equal(sum(data), 0, signature);
    const { rsdp, writes } = acpiTables(cpus, plan8G);
    assert.equal(rsdp % 16, 0, "found by a scan");
    const ranges = writes.map((write) => ({
      gpa: write.gpa,
      bytes: "data" in write ? write.data.length : 0,
    }));
    ranges.forEach((a, i) => {
      assert.ok(a.gpa >= 0xe0000 && a.gpa + a.bytes <= 0x100000);
      for (const b of ranges.slice(i + 1)) assert.ok(!overlap(a, b));
    });
  }
});

acpi("FADT: not hardware-reduced, PM1 and reset where the devices are", () => {
  const fadt = walk(1).get("FACP")!;
  assert.equal(fadt.length, 276);
  assert.equal(fadt.readUInt32LE(56), ACPI_PORTS.pm1Status);
  assert.equal(fadt.readUInt32LE(64), ACPI_PORTS.pm1Control);
  assert.equal(fadt.readUInt32LE(112) & (1 << 20), 0, "HW_REDUCED_ACPI");
  assert.equal(fadt.readUInt32LE(112) & (1 << 10), 1 << 10, "RESET_REG_SUP");
  assert.equal(Number(fadt.readBigUInt64LE(120)), ACPI_PORTS.reset);
  assert.equal(Number(fadt.readBigUInt64LE(152)), ACPI_PORTS.pm1Status);
  assert.equal(Number(fadt.readBigUInt64LE(176)), ACPI_PORTS.pm1Control);
  assert.equal(fadt.readUInt32LE(36) % 64, 0, "FACS alignment");
});

acpi("MADT lists the CPUs, the IOAPIC and the NMI", () => {
  const madt = walk(4).get("APIC")!;
  const entries: number[][] = [];
  for (let at = 44; at < madt.length; at += madt[at + 1]!)
    entries.push([...madt.subarray(at, at + madt[at + 1]!)]);
  assert.deepEqual(
    entries.filter(([type]) => type === 0).map((entry) => [entry[2], entry[3], entry[4]]),
    [0, 1, 2, 3].map((id) => [id, id, 1]),
  );
  assert.deepEqual(
    entries.map(([type]) => type),
    [0, 0, 0, 0, 1, 2, 4],
  );
  assert.deepEqual(entries[4], [1, 12, 4, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
  assert.throws(() => acpiTables(17, plan8G), RangeError);
});

acpi("every pin of every slot has a GSI of its own kind", () => {
  const seen = new Set<number>();
  for (let slot = 0; slot < 32; slot++) {
    const pins = [0, 1, 2, 3].map((pin) => gsiOfPin(slot, pin));
    assert.equal(new Set(pins).size, 4);
    for (const gsi of pins) {
      assert.ok(gsi >= 16 && gsi < IOAPIC_PINS);
      seen.add(gsi);
    }
  }
  assert.equal(seen.size, 8);
});

acpi("package lengths have the three forms of the specification", () => {
  const lengthOf = (bytes: number) => [...aml.packageOf(...Array(bytes).fill(aml.integer(0))).subarray(1, 4)];
  // Body: the element count and one byte each. 62 + itself = 63; then two bytes; 0x3f is the one-byte limit.
  assert.deepEqual(lengthOf(61).slice(0, 2), [0x3f, 61]);
  assert.deepEqual(lengthOf(62), [0x41, 0x04, 62]);
  const big = aml.scope("_SB", Buffer.alloc(5000));
  assert.deepEqual([...big.subarray(1, 4)], [0x80 | (5007 & 0xf), (5007 >> 4) & 0xff, 5007 >> 12]);
  assert.throws(() => aml.name("TOOLONG", aml.integer(1)), RangeError);
});

/** Each table disassembled, then compiled again: what iasl warns of is an error here. */
function disassemble(cpus: number, plan: layout.MemoryPlan): Map<string, string> {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), "pvdma-acpi-"));
  const run = (...args: string[]) =>
    execFileSync("iasl", args, { cwd: dir, encoding: "utf8", stdio: "pipe" });
  const texts = new Map<string, string>();
  try {
    for (const [signature, data] of walk(cpus, plan)) {
      fs.writeFileSync(path.join(dir, `${signature}.dat`), data);
      run("-d", `${signature}.dat`);
      const text = fs.readFileSync(path.join(dir, `${signature}.dsl`), "utf8");
      assert.doesNotMatch(text, /error|warning|invalid|unknown/i, signature);
      texts.set(signature, text);
      const compiled = run("-f", `${signature}.dsl`);
      assert.match(
        compiled,
        signature === "DSDT" ? /0 Errors, 0 Warnings, 0 Remarks/ : /Table Compilation successful|0 Errors/i,
      );
      const again = fs.readFileSync(path.join(dir, `${signature}.aml`));
      // iasl writes its own compiler id into the header's last 8 bytes (and so another checksum).
      const same = signature === "FACS" ? 0 : 36;
      assert.ok(again.subarray(same).equals(data.subarray(same)), `${signature} compiled again differs`);
    }
  } finally {
    fs.rmSync(dir, { recursive: true });
  }
  return texts;
}

acpi("iasl takes the tables apart and together again without a remark", () => {
  disassemble(1, plan512);
  const text = disassemble(16, plan8G)
    .get("DSDT")!
    .replace(/\/\/.*/g, "")
    .replace(/\s+/g, " ");
  for (const part of [
    /Name \(_S5, Package \(0x04\) \{ 0x05,/,
    /Name \(_HID, EisaId \("PNP0A08"\)/,
    /WordIO \(ResourceProducer, [^)]* 0x0000, 0x1000, 0xFFFF, 0x0000, 0xF000,/,
    /DWordMemory \(ResourceProducer, [^)]* 0x00000000, 0xC0000000, 0xDFFFFFFF, 0x00000000, 0x20000000,/,
    /QWordMemory \(ResourceProducer, [^)]* 0x0000004000000000, 0x0000007FFFFFFFFF, 0x0000000000000000, 0x0000004000000000,/,
    /Memory32Fixed \(ReadWrite, 0xE0000000, 0x00100000,/,
    /Package \(0x04\) \{ 0x001FFFFF, 0x03, Zero, 0x12 \}/,
    /IO \(Decode16, 0x03F8, 0x03F8, 0x01, 0x08, \) IRQNoFlags \(\) \{4\}/,
  ]) {
    assert.ok(part.test(text), `the DSDT has no ${part}`);
  }
});

acpi.run();

// ---- cpuid --------------------------------------------------------------------------------------------------------

const cpuid = suite("boot/cpuid");
const cpu = (fn: number, index: number, flags: number, eax = 0, ebx = 0, ecx = 0, edx = 0): CpuidEntry => ({
  function: fn,
  index,
  flags,
  eax,
  ebx,
  ecx,
  edx,
});
const intel: CpuidEntry[] = [
  cpu(0, 0, 0, 0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
  cpu(1, 0, 0, 0x806ec, 0x7710_0800, 0x7ffa_3203, 0x0f8b_fbff),
  cpu(4, 0, 1, 0x1c00_4121, 0x01c0_003f, 63, 0),
  cpu(4, 3, 1, 0x1c03_c163, 0x03c0_003f, 8191, 6),
  cpu(4, 4, 1, 0, 0, 0, 0),
  cpu(7, 0, 1, 2, 0x1234, 0, 0),
  cpu(0xb, 0, 1, 1, 2, 0x100, 99),
  cpu(0xb, 1, 1, 4, 16, 0x201, 99),
  cpu(0xd, 1, 1, 0xf, 0, 0, 0),
  cpu(0x4000_0000, 0, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
  cpu(0x4000_0001, 0, 0, 0x0100_7efb),
  cpu(0x4000_0100, 0, 0, 1, 2, 3, 4),
  cpu(0x8000_0001, 0, 0, 0, 0, 0x121, 0x2c10_0800),
  cpu(0x8000_0008, 0, 0, 0x3027, 0, 0x1007, 0),
];
const amd: CpuidEntry[] = [
  cpu(0, 0, 0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
  cpu(1, 0, 0, 0x800f12, 0x0002_0800, 0, 1 << 28),
  cpu(0x8000_0001, 0, 0, 0, 0, 0x0040_0003, 0),
  cpu(0x8000_0008, 0, 0, 0x30_3034, 0, 0x0003_701f, 0),
  cpu(0x8000_001d, 0, 1, 0x4121),
  cpu(0x8000_001d, 2, 1, 0x4143),
  cpu(0x8000_001d, 3, 1, 0x1c163),
  cpu(0x8000_001d, 4, 1, 0),
  cpu(0x8000_001e, 0, 0, 77, 0x177, 0x301, 5),
];
const leaf = (entries: CpuidEntry[], fn: number, index = 0): CpuidEntry => {
  const found = entries.filter((entry) => entry.function === fn && entry.index === index);
  assert.equal(found.length, 1, `leaf ${fn.toString(16)}.${index}`);
  return found[0]!;
};

cpuid("every vCPU has its APIC id where guests look for it", () => {
  for (const cpus of [1, 3, 4, 16]) {
    for (let apicId = 0; apicId < cpus; apicId++) {
      const entries = vcpuCpuid(intel, { apicId, cpus, tscDeadline: true });
      const one = leaf(entries, 1);
      assert.deepEqual([one.ebx >>> 24, (one.ebx >>> 16) & 0xff, one.ebx & 0xffff], [apicId, cpus, 0x0800]);
      assert.equal(one.edx & (1 << 28), cpus > 1 ? 1 << 28 : 0);
      for (const topology of [0xb, 0x1f]) {
        const [smt, core, end] = [0, 1, 2].map((index) => leaf(entries, topology, index));
        assert.deepEqual([smt!.eax, smt!.ebx, smt!.ecx, smt!.edx], [0, 1, 0x100, apicId]);
        assert.deepEqual([core!.ebx, core!.ecx, core!.edx], [cpus, 0x201, apicId]);
        assert.ok(2 ** core!.eax >= cpus && 2 ** core!.eax < 2 * cpus);
        assert.equal(end!.ecx, 2);
      }
      const amdEntries = vcpuCpuid(amd, { apicId, cpus, tscDeadline: true });
      assert.deepEqual(
        [leaf(amdEntries, 0x8000_001e).eax, leaf(amdEntries, 0x8000_001e).ebx],
        [apicId, apicId],
      );
    }
  }
});

cpuid("hypervisor bit always, TSC deadline when KVM has it", () => {
  const withTimer = leaf(vcpuCpuid(intel, { apicId: 0, cpus: 1, tscDeadline: true }), 1).ecx;
  assert.equal(withTimer, 0xfffa_3203);
  const without = leaf(vcpuCpuid(intel, { apicId: 0, cpus: 1, tscDeadline: false }), 1).ecx;
  assert.equal(without, 0xfefa_3203);
});

cpuid("caches: a core's own, and the package's", () => {
  const entries = vcpuCpuid(intel, { apicId: 1, cpus: 4, tscDeadline: true });
  assert.equal(leaf(entries, 4, 0).eax, 0x0c00_0121);
  assert.equal(leaf(entries, 4, 3).eax, 0x0c00_c163);
  assert.equal(leaf(entries, 4, 4).eax, 0);
  const second = vcpuCpuid(amd, { apicId: 1, cpus: 4, tscDeadline: true });
  assert.equal(leaf(second, 0x8000_001d, 0).eax, 0x121);
  assert.equal(leaf(second, 0x8000_001d, 2).eax, 0x143);
  assert.equal(leaf(second, 0x8000_001d, 3).eax, 0xc163);
});

cpuid("core counts in AMD's leaves, for AMD only", () => {
  const four = vcpuCpuid(amd, { apicId: 0, cpus: 4, tscDeadline: true });
  assert.equal(leaf(four, 0x8000_0008).ecx, 0x0003_2003);
  assert.equal(leaf(four, 0x8000_0001).ecx, 0x0040_0003);
  const one = vcpuCpuid(amd, { apicId: 0, cpus: 1, tscDeadline: true });
  assert.equal(leaf(one, 0x8000_0008).ecx, 0x0003_0000);
  assert.equal(leaf(one, 0x8000_0001).ecx, 0x0040_0001);
  const other = vcpuCpuid(intel, { apicId: 0, cpus: 4, tscDeadline: true });
  assert.equal(leaf(other, 0x8000_0001).ecx, 0x121);
  assert.equal(leaf(other, 0x8000_0008).ecx, 0x1007);
});

cpuid("no topology leaf where the CPU has none; everything else stays, flags included", () => {
  const entries = vcpuCpuid(amd, { apicId: 0, cpus: 2, tscDeadline: true });
  assert.equal(entries.filter((entry) => entry.function === 0x1f).length, 0);
  const kept = vcpuCpuid(intel, { apicId: 0, cpus: 2, tscDeadline: true });
  for (const [fn, index] of [
    [7, 0],
    [0xd, 1],
    [0x4000_0000, 0],
    [0x4000_0001, 0],
  ] as const) {
    assert.deepEqual(leaf(kept, fn, index), leaf(intel, fn, index));
  }
  for (const entry of kept) {
    for (const register of [entry.eax, entry.ebx, entry.ecx, entry.edx]) {
      assert.ok(Number.isInteger(register) && register >= 0 && register < 2 ** 32);
    }
  }
});

cpuid("the discovery block is what the contract says, and replaces what was there", () => {
  const entries = vcpuCpuid(intel, { apicId: 0, cpus: 1, tscDeadline: true });
  const first = leaf(entries, CPUID.first);
  const text = Buffer.alloc(12);
  [first.ebx, first.ecx, first.edx].forEach((value, i) => {
    text.writeUInt32LE(value, i * 4);
  });
  assert.equal(text.toString("latin1"), CPUID.signature);
  assert.equal(first.eax, CPUID.first + 2);
  const second = leaf(entries, CPUID.first + 1);
  assert.deepEqual(
    [second.eax, second.ebx, second.ecx, second.edx],
    [ABI_VERSION, FEATURES, PORT, LIMITS.listEntries],
  );
  assert.equal(leaf(entries, CPUID.first + 2).eax, LIMITS.mapPages);
  const fewer = vcpuCpuid(intel, { apicId: 0, cpus: 1, tscDeadline: true, features: 0 });
  assert.equal(leaf(fewer, CPUID.first + 1).ebx, 0);
});

cpuid("physical address width, and the narrower one of nested paging", () => {
  assert.equal(physicalBits(intel), 39);
  assert.equal(physicalBits(amd), 48);
  assert.equal(physicalBits([cpu(0x8000_0008, 0, 0, 0x3034)]), 52);
  assert.equal(physicalBits([]), 36);
});

cpuid.run();
