// The few AML and resource encodings that the DSDT needs: plain functions from values to bytes, composed by nesting.
// Pure. Source: ACPI specification 6.5, chapter 20 (AML) and 6.4 (resource data types).

const ZERO_OP = 0x00;
const ONE_OP = 0x01;
const NAME_OP = 0x08;
const BYTE_PREFIX = 0x0a;
const WORD_PREFIX = 0x0b;
const DWORD_PREFIX = 0x0c;
const SCOPE_OP = 0x10;
const BUFFER_OP = 0x11;
const PACKAGE_OP = 0x12;
const EXT_OP = 0x5b;
const DEVICE_OP = 0x82;

/** PkgLength (20.2.4): counts itself and the body. One byte below 64, else a lead byte with the low 4 bits. */
function withLength(body: Buffer): Buffer {
  if (body.length + 1 < 0x40) return Buffer.concat([Buffer.of(body.length + 1), body]);
  const more = body.length + 2 < 2 ** 12 ? 1 : 2;
  const length = body.length + 1 + more;
  if (length >= 2 ** 20) throw new RangeError(`AML package of ${length} bytes`);
  const lead = [(more << 6) | (length & 0xf), (length >> 4) & 0xff, (length >> 12) & 0xff];
  return Buffer.concat([Buffer.from(lead.slice(0, 1 + more)), body]);
}

/** An integer of 0 to 2^32 - 1 in its shortest form. */
export function integer(value: number): Buffer {
  if (value === 0) return Buffer.of(ZERO_OP);
  if (value === 1) return Buffer.of(ONE_OP);
  if (value < 2 ** 8) return Buffer.of(BYTE_PREFIX, value);
  const wide = value >= 2 ** 16;
  const out = Buffer.alloc(wide ? 5 : 3);
  out[0] = wide ? DWORD_PREFIX : WORD_PREFIX;
  if (wide) out.writeUInt32LE(value, 1);
  else out.writeUInt16LE(value, 1);
  return out;
}

/** A name of one segment: up to four of A-Z, 0-9 and _, filled up with _. */
function nameSegment(path: string): Buffer {
  const segment = path.padEnd(4, "_");
  if (!/^[A-Z_][A-Z0-9_]{3}$/.test(segment)) throw new RangeError(`AML name ${path}`);
  return Buffer.from(segment, "latin1");
}

export const name = (path: string, value: Buffer): Buffer =>
  Buffer.concat([Buffer.of(NAME_OP), nameSegment(path), value]);

export const scope = (path: string, ...terms: Buffer[]): Buffer =>
  Buffer.concat([Buffer.of(SCOPE_OP), withLength(Buffer.concat([nameSegment(path), ...terms]))]);

export const device = (path: string, ...terms: Buffer[]): Buffer =>
  Buffer.concat([Buffer.of(EXT_OP, DEVICE_OP), withLength(Buffer.concat([nameSegment(path), ...terms]))]);

/** A package of up to 255 elements. */
export function packageOf(...elements: Buffer[]): Buffer {
  if (elements.length > 255) throw new RangeError(`AML package of ${elements.length} elements`);
  const body = Buffer.concat([Buffer.of(elements.length), ...elements]);
  return Buffer.concat([Buffer.of(PACKAGE_OP), withLength(body)]);
}

/** "PNP0A08" as the 32-bit number that _HID and _CID hold (19.3.4): three letters of 5 bits, four hex digits. */
export function eisaId(id: string): Buffer {
  if (!/^[A-Z]{3}[0-9A-F]{4}$/.test(id)) throw new RangeError(`EISA id ${id}`);
  const letter = (i: number): number => id.charCodeAt(i) - 0x40;
  const vendor = (letter(0) << 10) | (letter(1) << 5) | letter(2);
  const number = Number.parseInt(id.slice(3), 16);
  // Both halves are big-endian in a little-endian integer.
  return Buffer.of(DWORD_PREFIX, vendor >> 8, vendor & 0xff, number >> 8, number & 0xff);
}

/** A _CRS value: the descriptors in a buffer, closed by an end tag whose checksum 0 means "not checked". */
export function resources(...descriptors: Buffer[]): Buffer {
  const bytes = Buffer.concat([...descriptors, Buffer.of(0x79, 0)]);
  return Buffer.concat([Buffer.of(BUFFER_OP), withLength(Buffer.concat([integer(bytes.length), bytes]))]);
}

/** I/O port descriptor (6.4.2.5), 16-bit decode, fixed address. */
export function ioPorts(port: number, count: number): Buffer {
  const out = Buffer.of(0x47, 0x01, 0, 0, 0, 0, 1, count);
  out.writeUInt16LE(port, 2);
  out.writeUInt16LE(port, 4);
  return out;
}

/** IRQ descriptor without flags (6.4.2.1): edge-triggered, active high, as ISA has it. */
export const isaIrq = (irq: number): Buffer => Buffer.of(0x22, (1 << irq) & 0xff, (1 << irq) >> 8);

/** 32-bit fixed memory range (6.4.3.4), read-write. */
export function memory32Fixed(base: number, bytes: number): Buffer {
  const out = Buffer.alloc(12);
  out.set([0x86, 9, 0, 1]);
  out.writeUInt32LE(base, 4);
  out.writeUInt32LE(bytes, 8);
  return out;
}

const ADDRESS_SPACE = { memory: 0, io: 1, bus: 2 } as const;
/** A bridge's window: what it passes on, with both ends fixed. */
const PRODUCED_FIXED = 0x0c;
/** Memory: read-write, not cacheable. I/O: ISA and non-ISA ports. */
const SPACE_FLAGS = { memory: 0x01, io: 0x03, bus: 0 } as const;

/**
 * A range that a bridge passes on (6.4.3.5), in the smallest descriptor that holds it: word, dword or qword fields
 * granularity, minimum, maximum, translation, length. `last` is inclusive.
 */
export function window(space: keyof typeof ADDRESS_SPACE, first: number, last: number): Buffer {
  const width = space !== "memory" ? 2 : last < 2 ** 32 ? 4 : 8;
  const tag = { 2: 0x88, 4: 0x87, 8: 0x8a }[width];
  const out = Buffer.alloc(6 + 5 * width);
  out[0] = tag;
  out.writeUInt16LE(out.length - 3, 1);
  out.set([ADDRESS_SPACE[space], PRODUCED_FIXED, SPACE_FLAGS[space]], 3);
  [0, first, last, 0, last - first + 1].forEach((value, i) => {
    const at = 6 + i * width;
    if (width === 8) out.writeBigUInt64LE(BigInt(value), at);
    else out.writeUIntLE(value, at, width);
  });
  return out;
}
