// The guest module as far as a host can test it: its portable core, compiled freestanding and run against a scripted
// host (guest-shim/test/core_test.c), and the module's build for both of Debian's kernels.

import { execFile, execFileSync, spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { repoRoot } from "../lab/cache.js";
import { getKernel, type Kernel, kernelSeries } from "../lab/packages.js";

const SHIM = join(repoRoot, "guest-shim");
const scratch = mkdtempSync(join(tmpdir(), "pvdma-guest-shim-"));
const exec = promisify(execFile);

const WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"];

const core = suite("guest-shim core");

core("compiles freestanding, needs nothing but memory functions, and makes its calls by out", () => {
  const object = join(scratch, "core.o");
  execFileSync("gcc", [
    ...["-ffreestanding", "-mgeneral-regs-only", "-O2", ...WARNINGS],
    ...["-c", join(SHIM, "pvdma_core.c"), "-o", object],
  ]);
  const undefinedSymbols = execFileSync("nm", ["-u", object], { encoding: "utf8" })
    .split("\n")
    .map((line) => line.trim().replace(/^U /, ""))
    .filter((name) => name !== "" && !/^mem(cpy|set|move|cmp)$/.test(name));
  assert.equal(undefinedSymbols, []);
  assert.match(execFileSync("objdump", ["-d", object], { encoding: "utf8" }), /\bout\s+%eax,\(%dx\)/);
});

const harness = join(scratch, "core_test");
execFileSync("gcc", [
  ...["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", ...WARNINGS],
  ...["-I", SHIM, '-DPVDMA_TRANSPORT="test/scripted.h"', "-o", harness],
  ...[join(SHIM, "test", "core_test.c"), join(SHIM, "pvdma_core.c"), join(SHIM, "pvdma_lazy.c")],
]);
const names = execFileSync(harness, { encoding: "utf8" }).trim().split("\n");
for (const name of names) {
  core(name.replaceAll("_", " "), () => {
    const result = spawnSync(harness, [name], { encoding: "utf8" });
    assert.is(result.status, 0, result.stderr);
  });
}
core("all of the core's functions have a test", () => {
  assert.ok(names.length >= 25, `only ${names.length} tests`);
});
core.after(() => rmSync(scratch, { recursive: true }));
core.run();

/** Builds a copy of the module; resolves with whether it was made, everything make said, and what is in it. */
async function build(
  kernel: Kernel,
  ...settings: string[]
): Promise<{ ok: boolean; output: string; sections: string }> {
  const copy = mkdtempSync(join(tmpdir(), "pvdma-module-"));
  try {
    for (const file of readdirSync(SHIM)) {
      if (/^(probe|Makefile|Kbuild|pvdma\w*\.[ch])$/.test(file))
        cpSync(join(SHIM, file), join(copy, file), { recursive: true });
    }
    writeFileSync(
      join(copy, "without-ops.h"),
      "#undef CONFIG_DMA_OPS\n#undef CONFIG_ARCH_HAS_DMA_OPS\n#define get_arch_dma_ops(...) NULL\n",
    );
    const args = ["-C", copy, `KDIR=${kernel.headersDir}`, ...settings.map((s) => s.replace("COPY", copy))];
    const { stdout, stderr } = await exec("make", args);
    const module = join(copy, "pvdma.ko");
    const ok = existsSync(module);
    const sections = ok ? (await exec("objdump", ["-h", module])).stdout : "";
    return { ok, output: stdout + stderr, sections };
  } catch (error) {
    const { stdout = "", stderr = "" } = error as { stdout?: string; stderr?: string };
    return { ok: false, output: stdout + stderr, sections: "" };
  } finally {
    rmSync(copy, { recursive: true });
  }
}

const module = suite("guest-shim module");
for (const series of kernelSeries) {
  module(`builds for Debian's ${series} kernel without a warning, sparse's neither`, async () => {
    const { ok, output, sections } = await build(await getKernel(series), "W=1", "C=2");
    assert.ok(ok, output);
    assert.match(output, /CHECK /, "sparse ran");
    assert.not.match(output, /warning|error/i);
    // It shares the tracking table with the host's CPUs: no lock prefix may go where the guest has one CPU.
    assert.match(sections, /\.text/);
    assert.not.match(sections, /\.smp_locks/, "the kernel patches these out on one CPU");
  });
}
module("refuses to build for a kernel without DMA ops", async () => {
  const { ok, output } = await build(await getKernel("6.12"), "KCFLAGS=-include COPY/without-ops.h");
  assert.not.ok(ok);
  assert.match(output, /#error "pvdma: a kernel without CONFIG_DMA_OPS or CONFIG_ARCH_HAS_DMA_OPS cannot/);
});
module.run();
