// A stock kernel, unpacked beforehand: to unpack itself takes a guest in the lab as long as to boot from there on. What runs
// is the same kernel, byte for byte, where it would have unpacked itself to (but for KASLR).

import { execFileSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { makeAtomically } from "./cache.js";
import type { Kernel } from "./packages.js";

/** Fields of the setup header, as offsets. Source: Documentation/arch/x86/boot.rst. */
const SETUP_SECTORS = 0x1f1;
const SYSSIZE = 0x1f4;
const PAYLOAD_OFFSET = 0x248;
const PAYLOAD_LENGTH = 0x24c;
const PREF_ADDRESS = 0x258;
const INIT_SIZE = 0x260;
/** The 64-bit entry, from the start of the protected-mode part. */
const ENTRY_64 = 0x200;

const PAGE = 4096;
/** ELF64, "Program Header". */
const PT_LOAD = 1;

/** What a kernel may be packed with, by its first bytes, and what unpacks it. */
const UNPACKERS: readonly (readonly [magic: string, command: string])[] = [
  ["fd377a585a00", "xz"],
  ["28b52ffd", "zstd"],
];

/** Returns the path of a bzImage of this kernel whose 64-bit entry leads right into it; made once, in the cache. */
export async function unpackedKernel({ vmlinuz }: Kernel): Promise<string> {
  // The number is to be changed with what unpack() makes.
  const target = join(dirname(vmlinuz), "unpacked-1.bzImage");
  if (!existsSync(target)) await makeAtomically(target, async (file) => unpack(vmlinuz, file));
  return target;
}

function unpack(vmlinuz: string, file: string): void {
  const packed = readFileSync(vmlinuz);
  const setupBytes = (packed[SETUP_SECTORS]! + 1) * 512;
  const at = setupBytes + packed.readUInt32LE(PAYLOAD_OFFSET);
  // The length of what is unpacked follows the payload, within it.
  const payload = packed.subarray(at, at + packed.readUInt32LE(PAYLOAD_LENGTH) - 4);
  const unpacker = UNPACKERS.find(([magic]) => payload.toString("hex", 0, 8).startsWith(magic));
  if (unpacker === undefined)
    throw new Error(`${vmlinuz}: packed with something else (${payload.toString("hex", 0, 8)})`);
  const memory = flat(runThrough(unpacker[1], payload, vmlinuz));

  // A page in front of the kernel has the 64-bit entry, which jumps over the rest of it: jmp rel32.
  const front = Buffer.alloc(PAGE);
  front[ENTRY_64] = 0xe9;
  front.writeInt32LE(PAGE + memory.entry - (ENTRY_64 + 5), ENTRY_64 + 1);
  const setup = Buffer.from(packed.subarray(0, setupBytes));
  const bytes = PAGE + Math.ceil(memory.content.length / 16) * 16;
  setup.writeUInt32LE(bytes / 16, SYSSIZE);
  setup.writeBigUInt64LE(BigInt(memory.address - PAGE), PREF_ADDRESS);
  setup.writeUInt32LE(Math.max(setup.readUInt32LE(INIT_SIZE), memory.bytes) + PAGE, INIT_SIZE);
  const rest = Buffer.alloc(bytes - PAGE - memory.content.length);
  writeFileSync(file, Buffer.concat([setup, front, memory.content, rest]));
}

/** What a command makes of its standard input. */
function runThrough(command: string, input: Buffer, vmlinuz: string): Buffer {
  try {
    return execFileSync(command, ["-dc"], { input, maxBuffer: 1 << 28 });
  } catch (error) {
    throw new Error(`${vmlinuz}: ${command} cannot unpack it: ${(error as Error).message}`);
  }
}

/** The memory that an ELF kernel fills, by physical addresses, without the zeros at its end; where in it it begins. */
function flat(elf: Buffer): { address: number; content: Buffer; bytes: number; entry: number } {
  const headers = Number(elf.readBigUInt64LE(0x20));
  const size = elf.readUInt16LE(0x36);
  const segments = Array.from({ length: elf.readUInt16LE(0x38) }, (_, i) => headers + i * size)
    .filter((at) => elf.readUInt32LE(at) === PT_LOAD)
    .map((at) => {
      const [offset, , address, fileBytes, bytes] = [8, 16, 24, 32, 40].map((field) =>
        Number(elf.readBigUInt64LE(at + field)),
      ) as [number, number, number, number, number];
      return { address, bytes, content: elf.subarray(offset, offset + fileBytes) };
    });
  const address = Math.min(...segments.map((segment) => segment.address));
  const bytes = Math.max(...segments.map((segment) => segment.address + segment.bytes)) - address;
  const memory = Buffer.alloc(bytes);
  for (const segment of segments) segment.content.copy(memory, segment.address - address);
  let end = bytes;
  while (end > 0 && memory[end - 1] === 0) end--;
  return {
    address,
    content: memory.subarray(0, end),
    bytes,
    entry: Number(elf.readBigUInt64LE(0x18)) - address,
  };
}
