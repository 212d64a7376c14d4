// Every kernel number the VMM uses against the system's own headers: a C program is generated from the tables in
// vmm/sys, compiled, and must print the same. A wrong offset here would be a silent corruption there.

import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import * as kvm from "../../vmm/sys/kvm.js";
import type { StructLayout } from "../../vmm/sys/layout.js";
import * as vfio from "../../vmm/sys/vfio.js";

interface KernelTables {
  readonly IOCTL: Readonly<Record<string, number>>;
  readonly CONSTANT: Readonly<Record<string, number>>;
  readonly STRUCT: Readonly<Record<string, StructLayout>>;
}

/** What each C expression has to be, by the tables. */
function expected(tables: KernelTables): Map<string, number> {
  const expressions = new Map<string, number>();
  for (const [name, value] of Object.entries({ ...tables.IOCTL, ...tables.CONSTANT }))
    expressions.set(name, value);
  for (const [struct, layout] of Object.entries(tables.STRUCT)) {
    for (const [member, value] of Object.entries(layout)) {
      // A member that is itself called size is written size_, because size is the structure's.
      const name = member.replace(/_$/, "");
      expressions.set(
        member === "size" ? `sizeof(struct ${struct})` : `offsetof(struct ${struct}, ${name})`,
        value,
      );
    }
  }
  return expressions;
}

/** What the headers say, by compiling and running a program that prints each expression. */
function actual(header: string, expressions: Iterable<string>): Map<string, number> {
  const directory = mkdtempSync(join(tmpdir(), "pvdma-layout-"));
  try {
    const lines = [...expressions].map(
      (text) => `  printf("%s\\t%llu\\n", "${text}", (unsigned long long)(${text}));`,
    );
    const source = `#include <stddef.h>\n#include <stdio.h>\n#include <${header}>\nint main(void)\n{\n${lines.join("\n")}\n  return 0;\n}\n`;
    const file = join(directory, "probe.c");
    writeFileSync(file, source);
    execFileSync("gcc", ["-o", join(directory, "probe"), file], { stdio: ["ignore", "inherit", "inherit"] });
    const output = execFileSync(join(directory, "probe"), { encoding: "utf8" });
    return new Map(
      output
        .trim()
        .split("\n")
        .map((line) => line.split("\t") as [string, string])
        .map(([text, value]) => [text, Number(value)]),
    );
  } finally {
    rmSync(directory, { recursive: true });
  }
}

const test = suite("layout");
for (const [header, tables] of [
  ["linux/kvm.h", kvm],
  ["linux/vfio.h", vfio],
] as const satisfies readonly (readonly [string, KernelTables])[]) {
  test(`vmm/sys agrees with <${header}>`, () => {
    const want = expected(tables);
    assert.ok(want.size > 50, `only ${want.size} numbers to compare`);
    const got = actual(header, want.keys());
    const wrong = [...want].filter(([text, value]) => got.get(text) !== value);
    assert.equal(
      wrong.map(([text, value]) => `${text}: ours ${value}, the header's ${got.get(text)}`),
      [],
    );
  });
}
test.run();
