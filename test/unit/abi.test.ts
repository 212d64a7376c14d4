// The contract: that the checked-in C header is the generated one, that a C compiler takes it, and that the numbers
// do not contradict each other.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { suite } from "uvu";
import {
  ABI_VERSION,
  CALL_NAMES,
  CALLS,
  type CallSpec,
  CPUID,
  FRAME_REGISTERS,
  LIMITS,
  MAP_FLAG,
  PORT,
  STATUS,
} from "../../hypercalls/abi.js";
import { cHeader } from "../../hypercalls/cheader.js";
import { ERRNO, status, statusClassOf, statusErrnoOf, statusOfHostErrno } from "../../hypercalls/status.js";

function repositoryRoot(): string {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(directory, "package.json"))) directory = dirname(directory);
  return directory;
}
const HEADER = join(repositoryRoot(), "guest-shim", "pvdma_abi.h");

const abi = suite("abi");

abi("guest-shim/pvdma_abi.h is what abi.ts says; `npm run abi` writes it", () => {
  assert.equal(readFileSync(HEADER, "utf8"), cHeader());
});

abi("a C compiler reads the same numbers out of the header", () => {
  const expected: Record<string, number> = {
    PVDMA_ABI_VERSION: ABI_VERSION,
    PVDMA_PORT: PORT,
    PVDMA_CPUID_FIRST: CPUID.first,
    PVDMA_CALL_PAGE_BYTES: LIMITS.callPageBytes,
    PVDMA_LIST_ENTRIES: LIMITS.listEntries,
    PVDMA_MAP_PAGES_MAX: LIMITS.mapPages,
    PVDMA_MAP_ALIGN: MAP_FLAG.align,
    PVDMA_STATUS_GONE: STATUS.gone,
    "PVDMA_STATUS_CLASS(0x2203u)": statusClassOf(0x2203),
    "PVDMA_STATUS_ERRNO(0x2203u)": statusErrnoOf(0x2203),
  };
  for (const name of CALL_NAMES) expected[`PVDMA_CALL_${name.toUpperCase()}`] = CALLS[name].number;
  const signature = Buffer.from(CPUID.signature);
  ["EBX", "ECX", "EDX"].forEach((register, i) => {
    expected[`PVDMA_CPUID_SIGNATURE_${register}`] = signature.readUInt32LE(4 * i);
  });
  const source = [
    '#include "pvdma_abi.h"',
    ...Object.entries(expected).map(([name, value]) => `_Static_assert(${name} == ${value}u, "${name}");`),
  ].join("\n");
  const result = spawnSync(
    "gcc",
    ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", dirname(HEADER), "-x", "c", "-"],
    { input: source, encoding: "utf8" },
  );
  assert.equal(result.status, 0, result.stderr || String(result.error));
});

abi("calls have numbers of their own from 1 on, and use the frame's registers", () => {
  const numbers = CALL_NAMES.map((name) => CALLS[name].number);
  assert.deepEqual(
    numbers,
    numbers.map((_, index) => index + 1),
  );
  for (const name of CALL_NAMES) {
    const { in: input, out }: CallSpec = CALLS[name];
    for (const register of [...Object.keys(input), ...Object.keys(out)]) {
      assert.ok((FRAME_REGISTERS as readonly string[]).includes(register), `${name}: ${register}`);
    }
  }
});

abi("limits agree with each other", () => {
  assert.equal(LIMITS.listEntries * LIMITS.entryBytes, LIMITS.callPageBytes);
  assert.equal(CPUID.signature.length, 12);
  assert.equal(CPUID.first % CPUID.step, 0);
  const flags = Object.values(MAP_FLAG);
  assert.equal(
    flags.reduce((all, flag) => all | flag, 0),
    flags.reduce((sum, flag) => sum + flag, 0),
  );
});

abi("a status holds a class and an errno; host errnos are limits but for two", () => {
  for (const statusClass of Object.values(STATUS)) {
    for (const errno of [0, 1, 122, 4095]) {
      const word = status(statusClass, errno);
      assert.equal(statusClassOf(word), statusClass);
      assert.equal(statusErrnoOf(word), errno);
    }
  }
  for (const errno of Object.values(ERRNO)) {
    const expected =
      errno === ERRNO.EINTR ? STATUS.retry : errno === ERRNO.ENODEV ? STATUS.gone : STATUS.limit;
    assert.equal(statusOfHostErrno(errno), status(expected, errno));
  }
});

abi.run();
