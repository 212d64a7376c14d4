// Generates the guest's C header from abi.ts: `node build/hypercalls/cheader.js [FILE]` writes it (standard output
// without FILE). Constants and comments only; the header needs nothing but a C preprocessor.

import { writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import {
  ABI_MAJOR,
  ABI_MINOR,
  CALLS,
  type CallSpec,
  CPUID,
  DEVICE_FLAG,
  FEATURE,
  FRAME_REGISTERS,
  LIMITS,
  MAP_FLAG,
  POLICY,
  PORT,
  STATUS,
  TABLE,
} from "./abi.js";

const hex = (value: number): string => `0x${value.toString(16)}u`;
const upper = (name: string): string => name.replace(/[A-Z]/g, (letter) => `_${letter}`).toUpperCase();

function define(name: string, value: string): string {
  const macro = `#define PVDMA_${name}`;
  return macro + "\t".repeat(Math.max(1, 5 - Math.floor(macro.length / 8))) + value;
}

function defines(prefix: string, values: Record<string, number>, format = hex): string[] {
  return Object.entries(values).map(([name, value]) => define(`${prefix}_${upper(name)}`, format(value)));
}

/** Breaks text into lines of a C comment, at most 80 columns. */
function commentLines(text: string, indent: string): string[] {
  const lines: string[] = [];
  let line = indent;
  for (const word of text.split(" ")) {
    if (line.length + word.length > 76 && line.trim()) {
      lines.push(line.trimEnd());
      line = indent;
    }
    line += `${word} `;
  }
  return [...lines, line.trimEnd()].map((each) => ` * ${each}`);
}

function callComment(name: string, call: CallSpec): string[] {
  const fields = (direction: string, registers: CallSpec["in"]) =>
    FRAME_REGISTERS.flatMap((register) => {
      const text = registers[register];
      if (text === undefined) return [];
      const [first, ...rest] = commentLines(text, "               ");
      return [` *   ${direction.padEnd(4)}${register.padEnd(4)} ${first?.slice(3).trim()}`, ...rest];
    });
  return [
    "/*",
    ...commentLines(`${name}: ${call.about}`, ""),
    ...fields("IN", call.in),
    ...fields("OUT", call.out),
    " */",
  ];
}

/** The whole header as text. */
export function cHeader(): string {
  const signature = new DataView(new TextEncoder().encode(CPUID.signature).buffer);
  return [
    "/* SPDX-License-Identifier: MIT OR GPL-2.0 */",
    "/*",
    " * The pvdma hypercall contract. Generated from hypercalls/abi.ts by `npm run abi`;",
    " * edit that file, not this one.",
    " */",
    "#ifndef PVDMA_ABI_H",
    "#define PVDMA_ABI_H",
    "",
    define("ABI_MAJOR", `${ABI_MAJOR}u`),
    define("ABI_MINOR", `${ABI_MINOR}u`),
    define("ABI_VERSION", "(PVDMA_ABI_MAJOR << 16 | PVDMA_ABI_MINOR)"),
    "",
    "/* Discovery: CPUID leaves, relative to the base at which the signature is found */",
    define("CPUID_FIRST", hex(CPUID.first)),
    define("CPUID_LAST", hex(CPUID.last)),
    define("CPUID_STEP", hex(CPUID.step)),
    ...[0, 1, 2].map((i) =>
      define(`CPUID_SIGNATURE_${["EBX", "ECX", "EDX"][i]}`, `${hex(signature.getUint32(4 * i, true))}`),
    ),
    "/* EAX: highest leaf; EBX, ECX, EDX: signature */",
    define("CPUID_LEAF_SIGNATURE", `${CPUID.leafSignature}u`),
    "/* EAX: ABI version; EBX: features; ECX 15:0: port; EDX: entries per call page */",
    define("CPUID_LEAF_INTERFACE", `${CPUID.leafInterface}u`),
    "/* EAX: most pages one call maps */",
    define("CPUID_LEAF_LIMITS", `${CPUID.leafLimits}u`),
    "",
    "/* A call is one 32-bit out: EAX the call, DX the port (this one unless CPUID says otherwise) */",
    define("PORT", hex(PORT)),
    "",
    ...defines("FEATURE", FEATURE),
    "",
    define("CALL_PAGE_BYTES", `${LIMITS.callPageBytes}u`),
    define("ENTRY_BYTES", `${LIMITS.entryBytes}u`),
    define("LIST_ENTRIES", `${LIMITS.listEntries}u`),
    define("MAP_PAGES_MAX", hex(LIMITS.mapPages)),
    define("DEVICES_MAX", `${LIMITS.devices}u`),
    "",
    "/* map and map_list, r10 */",
    ...defines("MAP", MAP_FLAG),
    "",
    "/* an entry of the tracking table; how it is used: hypercalls/abi.ts */",
    ...defines("TABLE", TABLE),
    "",
    "/* is_assigned, rsi */",
    define("DEVICE_POLICY_MASK", hex(DEVICE_FLAG.policyMask)),
    define("DEVICE_IDENTITY", hex(DEVICE_FLAG.identity)),
    ...defines("POLICY", POLICY, (value) => `${value}u`),
    "",
    "/* RAX after a call: bits 7:0 the class, bits 31:8 an errno that says more */",
    define("STATUS_CLASS(status)", "((status) & 0xffu)"),
    define("STATUS_ERRNO(status)", "((status) >> 8 & 0xffffffu)"),
    ...defines("STATUS", STATUS, (value) => `${value}u`),
    "",
    "/*",
    " * The calls. IN rax: the call; OUT rax: the status. Registers not named OUT keep",
    " * their value. OUT registers are valid with status ok, `entries done' always.",
    " */",
    ...Object.entries(CALLS).flatMap(([name, call]) => [
      "",
      ...callComment(name, call),
      define(`CALL_${name.toUpperCase()}`, `${call.number}u`),
    ]),
    "",
    "#endif /* PVDMA_ABI_H */",
    "",
  ].join("\n");
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const file = process.argv[2];
  if (file === undefined) process.stdout.write(cHeader());
  else writeFileSync(file, cHeader());
}
