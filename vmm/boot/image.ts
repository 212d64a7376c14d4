// Opens what the user gives to boot and tells by content what it is: a unified kernel image (PE with .linux, .initrd,
// .cmdline) or a bzImage. Reads files by node:fs, touches nothing else. Image files are untrusted: every offset and
// size is checked against the file before use. Offsets are bytes from the start of the file; lengths are bytes.

import fs from "node:fs";
import { VmmError } from "../errors.js";

/** Bytes of a file that go into guest memory as they are. The range lies inside the file as it was when opened. */
export interface FileExtent {
  readonly path: string;
  readonly fileOffset: number;
  readonly bytes: number;
}

/** What the loader needs of a bzImage's setup header. Source: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". */
export interface KernelHeader {
  /** Boot protocol, major << 8 | minor. At least 0x20c. */
  readonly protocol: number;
  /** The setup header as it is in the file, from 0x1f1 to its end: it is copied into the zero page. */
  readonly setup: Buffer;
  /** Where the kernel wants to be, a guest-physical address of 1 MiB to 4 GiB, page-aligned. */
  readonly prefAddress: number;
  /** Bytes it uses from its load address before it has read the memory map. */
  readonly initBytes: number;
  /** Highest address an initrd's last byte may have. */
  readonly initrdAddrMax: number;
  /** Longest command line in bytes, without its terminating NUL. */
  readonly cmdlineBytes: number;
}

export interface KernelImage {
  readonly path: string;
  readonly header: KernelHeader;
  /** The protected-mode part, which is what goes into guest memory. */
  readonly payload: FileExtent;
}

export interface BootImages {
  readonly kernel: KernelImage;
  readonly initrd?: FileExtent;
  readonly cmdline: string;
}

/** Used when neither the image nor the user gives a command line: whoever boots a bare kernel wants to see it. */
export const DEFAULT_CMDLINE = "console=ttyS0";

/** A file as the recogniser sees it. `read` returns exactly the bytes asked for or throws a VmmError. */
export interface ImageSource {
  /** How messages name it, for example "guest image /tmp/guest.img". */
  readonly name: string;
  readonly path: string;
  readonly bytes: number;
  read(offset: number, bytes: number): Buffer;
}

/** What an image holds. A bzImage has a kernel only. */
export interface ImageParts {
  readonly kind: "bzImage" | "unified kernel image";
  readonly kernel: KernelImage;
  readonly initrd?: FileExtent;
  readonly cmdline?: string;
}

const WANTED = "give a unified kernel image or a bzImage for x86-64";
const HEADER_START = 0x1f1;
/** The header's end is a byte in it; boot_params leaves room up to here. */
const HEADER_END_MAX = 0x290;
/** init_size, the last field used here, ends at this offset. */
const HEADER_END_MIN = 0x264;
const XLF_KERNEL_64 = 1 << 0;
const LOADED_HIGH = 1 << 0;
/** Protocol 2.12 (Linux 3.8) is the first with xloadflags and so with a 64-bit entry that a loader may use. */
const PROTOCOL_MIN = 0x20c;
const PE_MACHINE_X86_64 = 0x8664;
const PE32_PLUS = 0x20b;
/** The PE loader's own limit on sections. */
const PE_SECTIONS_MAX = 96;
const PE_SECTION_BYTES = 40;
/** Far above any kernel's cmdline_size; keeps a forged section from being read whole. */
const CMDLINE_SECTION_MAX = 64 * 1024;

/** A name from outside on one line of ASCII-safe text: control characters would break a one-line message. */
const printable = (text: string): string => text.replace(/\p{Cc}/gu, "?");
const hex = (value: number): string => `0x${value.toString(16)}`;

/**
 * Collects kernel, initrd and command line. `image` is a unified kernel image or a bzImage; `kernel` (a bzImage),
 * `initrd` (any file) and `cmdline` replace what the image has of them, or stand alone. Throws a VmmError of one line
 * for everything that cannot be booted.
 */
export function loadBootImages(given: {
  readonly image?: string | undefined;
  readonly kernel?: string | undefined;
  readonly initrd?: string | undefined;
  readonly cmdline?: string | undefined;
}): BootImages {
  const image = given.image === undefined ? undefined : withFile("guest image", given.image, recogniseImage);
  const kernel = given.kernel === undefined ? image?.kernel : withFile("kernel", given.kernel, bzImageOnly);
  if (kernel === undefined)
    throw new VmmError("nothing to boot: give a guest image, or a bzImage by --kernel");
  const initrd = given.initrd === undefined ? image?.initrd : withFile("initrd", given.initrd, wholeFile);
  const cmdline = given.cmdline ?? image?.cmdline ?? DEFAULT_CMDLINE;
  return initrd === undefined ? { kernel, cmdline } : { kernel, initrd, cmdline };
}

function bzImageOnly(source: ImageSource): KernelImage {
  const parts = recogniseImage(source);
  if (parts.kind === "bzImage") return parts.kernel;
  throw new VmmError(
    `${source.name} is a ${parts.kind}, which has more than a kernel: give it without --kernel`,
  );
}

function wholeFile(source: ImageSource): FileExtent {
  return { path: source.path, fileOffset: 0, bytes: source.bytes };
}

/** Opens a regular, non-empty file for `use`. `role` is how messages call it. */
function withFile<T>(role: string, path: string, use: (source: ImageSource) => T): T {
  const name = `${role} ${printable(path)}`;
  let fd: number;
  try {
    // O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever. It means nothing for a regular file.
    fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
  } catch (error) {
    throw new VmmError(`cannot open ${name}: ${openFailure(error)}`);
  }
  try {
    const stat = fs.fstatSync(fd);
    if (!stat.isFile())
      throw new VmmError(`${name} is ${fileKind(stat)}, not a regular file: give the file itself`);
    if (stat.size === 0) throw new VmmError(`${name} is empty (0 bytes): make or copy it again`);
    return use({
      name,
      path,
      bytes: stat.size,
      read: (offset, bytes) => readExactly(fd, name, offset, bytes),
    });
  } finally {
    fs.closeSync(fd);
  }
}

function openFailure(error: unknown): string {
  const code = (error as NodeJS.ErrnoException).code;
  if (code === "ENOENT") return "no such file; check the path (ENOENT)";
  if (code === "ENOTDIR") return "a part of the path is not a directory; check the path (ENOTDIR)";
  if (code === "EACCES") return "permission denied; let this user read it and enter its directories (EACCES)";
  return `${code ?? "unknown error"}; check the path`;
}

function fileKind(stat: fs.Stats): string {
  if (stat.isDirectory()) return "a directory";
  if (stat.isBlockDevice()) return "a block device";
  if (stat.isCharacterDevice()) return "a character device";
  if (stat.isFIFO()) return "a FIFO";
  return "a socket";
}

function readExactly(fd: number, name: string, offset: number, bytes: number): Buffer {
  const buffer = Buffer.alloc(bytes);
  for (let done = 0; done < bytes; ) {
    let got: number;
    try {
      got = fs.readSync(fd, buffer, done, bytes - done, offset + done);
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code ?? "unknown error";
      throw new VmmError(`cannot read ${name} at offset ${offset + done}: ${code}; check the disk it is on`);
    }
    if (got === 0)
      throw new VmmError(`${name} became shorter while it was read: try again when it is complete`);
    done += got;
  }
  return buffer;
}

/**
 * Tells what a file is. Throws a VmmError for whatever cannot be booted: unknown, truncated, malformed, 32-bit,
 * or of a kind that is known but not supported (ELF kernel, disk image).
 */
export function recogniseImage(source: ImageSource): ImageParts {
  const head = source.read(0, Math.min(source.bytes, 2048));
  // A bzImage with an EFI stub is a PE file too, so HdrS goes first.
  if (isBzImage(head)) return { kind: "bzImage", kernel: parseBzImage(source, 0, source.bytes, "") };
  if (startsWith(head, "MZ")) return parseUnifiedKernelImage(source, head);
  throw new VmmError(`${source.name} is ${refusal(source, head)}`);
}

const startsWith = (head: Buffer, text: string, offset = 0): boolean =>
  head.length >= offset + text.length && head.toString("latin1", offset, offset + text.length) === text;

const isBzImage = (head: Buffer): boolean =>
  startsWith(head, "HdrS", 0x202) && head.readUInt16LE(0x1fe) === 0xaa55;

/** What an image is that we do not boot, and what to give in its place. */
function refusal(source: ImageSource, head: Buffer): string {
  const fromDisk = "take the kernel and initrd out of it and give them by --kernel and --initrd";
  if (startsWith(head, "\x7fELF")) {
    const bits = head[4] === 2 ? "64-bit" : "32-bit";
    const machine = head.length >= 20 ? head.readUInt16LE(18) : 0;
    const kernel = machine === 62 || machine === 3 ? "an ELF kernel (vmlinux, PVH)" : "an ELF file";
    return `${kernel}, ${bits}, machine ${machine}, which is not booted here: give the bzImage (vmlinuz) of the same kernel`;
  }
  const disk = diskKind(source, head);
  if (disk !== undefined) return `a disk image (${disk}), which is not booted here: ${fromDisk}`;
  const first = head
    .subarray(0, 8)
    .toString("hex")
    .replace(/..(?=.)/g, "$& ");
  return `of unknown kind (${source.bytes} bytes, the first are ${first}): ${WANTED}`;
}

function diskKind(source: ImageSource, head: Buffer): string | undefined {
  if (startsWith(head, "QFI\xfb")) return "qcow2";
  if (startsWith(head, "EFI PART", 512)) return "GPT";
  if (head.length >= 512 && head.readUInt16LE(0x1fe) === 0xaa55) return "MBR";
  if (head.length >= 1082 && head.readUInt16LE(1080) === 0xef53) return "ext2/3/4 file system";
  if (source.bytes >= 32774 && source.read(32769, 5).toString("latin1") === "CD001") return "ISO 9660";
  return undefined;
}

/**
 * Reads the setup header of the bzImage that occupies `bytes` bytes from `start`. `where` is put behind the file's
 * name in messages (", section .linux").
 */
function parseBzImage(source: ImageSource, start: number, bytes: number, where: string): KernelImage {
  const name = `${source.name}${where}`;
  if (bytes < HEADER_END_MIN) throw truncated(name, "its setup header", HEADER_END_MIN, bytes);
  const head = source.read(start, Math.min(bytes, HEADER_END_MAX));
  if (!isBzImage(head)) {
    throw new VmmError(
      `${name} is not a bzImage: no "HdrS" at offset 0x202 of it (${head.toString("hex", 0x202, 0x206)}); build the image again with a vmlinuz`,
    );
  }
  const protocol = head.readUInt16LE(0x206);
  if (protocol < PROTOCOL_MIN) {
    throw new VmmError(
      `${name} speaks boot protocol ${protocol >> 8}.${protocol & 0xff}, a 64-bit entry needs 2.12: give an x86-64 kernel of Linux 3.8 or later`,
    );
  }
  const xloadflags = head.readUInt16LE(0x236);
  if ((xloadflags & XLF_KERNEL_64) === 0) {
    throw new VmmError(
      `${name} is a 32-bit only bzImage (xloadflags ${hex(xloadflags)}, no XLF_KERNEL_64): give an x86-64 kernel`,
    );
  }
  if ((head[0x211]! & LOADED_HIGH) === 0)
    throw malformed(name, "is a zImage that loads below 1 MiB (loadflags)");
  const headerEnd = 0x202 + head[0x201]!;
  if (headerEnd < HEADER_END_MIN || headerEnd > HEADER_END_MAX) {
    throw malformed(name, `says its setup header ends at ${hex(headerEnd)}`);
  }
  if (head.length < headerEnd) throw truncated(name, "its setup header", headerEnd, head.length);

  const setupSectors = head[HEADER_START]! || 4;
  const payloadOffset = (setupSectors + 1) * 512;
  const payloadBytes = head.readUInt32LE(0x1f4) * 16;
  if (payloadBytes < 0x1000) throw malformed(name, `has a kernel of ${payloadBytes} bytes (syssize)`);
  if (payloadOffset + payloadBytes > bytes) {
    throw truncated(name, "the kernel", payloadOffset + payloadBytes, bytes);
  }

  const prefAddress = head.readUInt32LE(0x258);
  const prefAddressHigh = head.readUInt32LE(0x25c);
  if (prefAddressHigh !== 0 || prefAddress < 2 ** 20 || prefAddress % 4096 !== 0) {
    const shown = hex(prefAddressHigh * 2 ** 32 + prefAddress);
    throw malformed(
      name,
      `wants to be loaded at ${shown} (pref_address), not a page between 1 MiB and 4 GiB`,
    );
  }
  const initBytes = head.readUInt32LE(0x260);
  if (initBytes < payloadBytes) {
    throw malformed(name, `has ${payloadBytes} bytes of kernel but an init_size of ${initBytes}`);
  }
  return {
    path: source.path,
    header: {
      protocol,
      setup: Buffer.from(head.subarray(HEADER_START, headerEnd)),
      prefAddress,
      initBytes,
      initrdAddrMax: head.readUInt32LE(0x22c),
      cmdlineBytes: head.readUInt32LE(0x238),
    },
    payload: { path: source.path, fileOffset: start + payloadOffset, bytes: payloadBytes },
  };
}

/** Source: UAPI group's UKI specification; PE format specification, "COFF File Header" and "Section Table". */
function parseUnifiedKernelImage(source: ImageSource, head: Buffer): ImageParts {
  const { name } = source;
  if (source.bytes < 0x40) throw truncated(name, "its DOS header", 0x40, source.bytes);
  const peOffset = head.readUInt32LE(0x3c);
  if (peOffset + 26 > source.bytes) throw truncated(name, "its PE header", peOffset + 26, source.bytes);
  const pe = source.read(peOffset, 26);
  if (!startsWith(pe, "PE\0\0")) {
    throw new VmmError(`${name} is a DOS program (MZ, but no PE header at offset ${peOffset}): ${WANTED}`);
  }
  const machine = pe.readUInt16LE(4);
  const magic = pe.readUInt16LE(24);
  if (machine !== PE_MACHINE_X86_64 || magic !== PE32_PLUS) {
    throw new VmmError(
      `${name} is a PE file for machine ${hex(machine)}, magic ${hex(magic)}; 64-bit x86 is ${hex(PE_MACHINE_X86_64)}, ${hex(PE32_PLUS)}: ${WANTED}`,
    );
  }
  const sectionCount = pe.readUInt16LE(6);
  if (sectionCount > PE_SECTIONS_MAX) {
    throw malformed(name, `says it has ${sectionCount} sections, at most ${PE_SECTIONS_MAX} are allowed`);
  }
  const tableOffset = peOffset + 24 + pe.readUInt16LE(20);
  const tableEnd = tableOffset + sectionCount * PE_SECTION_BYTES;
  if (tableEnd > source.bytes) throw truncated(name, "its section table", tableEnd, source.bytes);
  const sections = peSections(source, source.read(tableOffset, tableEnd - tableOffset));

  const linux = sections.get(".linux");
  if (linux === undefined) {
    throw new VmmError(
      `${name} is a PE file without a .linux section, not a unified kernel image: ${WANTED}`,
    );
  }
  const kernel = parseBzImage(source, linux.fileOffset, linux.bytes, ", section .linux");
  const initrd = sections.get(".initrd");
  const cmdline = sections.get(".cmdline");
  return {
    kind: "unified kernel image",
    kernel,
    ...(initrd !== undefined && initrd.bytes > 0 && { initrd }),
    ...(cmdline !== undefined && { cmdline: readCmdline(source, cmdline) }),
  };
}

/** The sections of a UKI that we use, checked against the file. Those behind a .profile belong to that profile. */
function peSections(source: ImageSource, table: Buffer): Map<string, FileExtent> {
  const sections = new Map<string, FileExtent>();
  for (let at = 0; at < table.length; at += PE_SECTION_BYTES) {
    const section = table.toString("latin1", at, at + 8).replace(/\0+$/, "");
    if (section === ".profile") break;
    if (section !== ".linux" && section !== ".initrd" && section !== ".cmdline") continue;
    if (sections.has(section)) throw malformed(source.name, `has two ${section} sections`);
    const virtualBytes = table.readUInt32LE(at + 8);
    const rawBytes = table.readUInt32LE(at + 16);
    const fileOffset = table.readUInt32LE(at + 20);
    // The raw size is rounded up to the file alignment, the virtual size is the true one. A larger virtual size
    // means zeros that are not in the file, and none of these three needs them.
    const bytes = Math.min(virtualBytes || rawBytes, rawBytes);
    if (fileOffset + bytes > source.bytes) {
      throw truncated(source.name, `section ${section}`, fileOffset + bytes, source.bytes);
    }
    sections.set(section, { path: source.path, fileOffset, bytes });
  }
  return sections;
}

function readCmdline(source: ImageSource, section: FileExtent): string {
  if (section.bytes > CMDLINE_SECTION_MAX) {
    throw malformed(
      source.name,
      `has a .cmdline section of ${section.bytes} bytes, at most ${CMDLINE_SECTION_MAX} make sense`,
    );
  }
  const text = source.read(section.fileOffset, section.bytes).toString("utf8");
  // Tools end it in a newline, NULs or both; the kernel would stop at the first NUL, so we do too.
  return text
    .replace(/\0.*$/s, "")
    .replace(/\p{Cc}+/gu, " ")
    .trim();
}

const truncated = (name: string, what: string, needed: number, has: number): VmmError =>
  new VmmError(
    `${name} is truncated: ${what} ends at byte ${needed}, there are ${has}; copy or make it again`,
  );

const malformed = (name: string, how: string): VmmError =>
  new VmmError(`${name} ${how}: the file is damaged, copy or make it again`);
