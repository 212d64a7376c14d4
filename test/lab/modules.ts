// Finds kernel modules and what they need in modules.dep, and reads them uncompressed for an initramfs.
// Touches only files under a kernel's module directory (…/lib/modules/<abi>).

import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";

/** Module name → its file and the files it needs, as modules.dep lists them (paths relative to the module directory). */
export type ModuleDependencies = Map<string, { path: string; needs: string[] }>;

/** "kernel/drivers/nvme/host/nvme-core.ko.xz" → "nvme_core". The kernel takes "-" and "_" for the same. */
export function moduleName(pathOrName: string): string {
  const base = pathOrName.slice(pathOrName.lastIndexOf("/") + 1);
  return base.replace(/\.ko(\.(xz|zst|gz))?$/, "").replaceAll("-", "_");
}

/** Parses the text of a modules.dep: one "path: path path …" per line. */
export function parseModulesDep(text: string): ModuleDependencies {
  const modules: ModuleDependencies = new Map();
  for (const line of text.split("\n")) {
    const colon = line.indexOf(":");
    if (colon < 0) continue;
    const path = line.slice(0, colon);
    const needs = line
      .slice(colon + 1)
      .split(" ")
      .filter((need) => need !== "");
    modules.set(moduleName(path), { path, needs });
  }
  return modules;
}

/**
 * The files to insmod, in order, for `names` to load. Names in `builtin` need no file. Throws for a name that is
 * neither a module nor built in, and for a dependency loop.
 */
export function insmodOrder(
  modules: ModuleDependencies,
  names: readonly string[],
  builtin: ReadonlySet<string> = new Set(),
): string[] {
  const order: string[] = [];
  const state = new Map<string, "open" | "done">();
  const visit = (name: string): void => {
    const seen = state.get(name);
    if (seen === "done") return;
    if (seen === "open") throw new Error(`kernel module ${name}: needs itself`);
    const module = modules.get(name);
    if (module === undefined) {
      if (builtin.has(name)) return;
      throw new Error(`kernel module ${name}: not in modules.dep and not built in`);
    }
    state.set(name, "open");
    for (const need of module.needs) visit(moduleName(need));
    state.set(name, "done");
    order.push(module.path);
  };
  for (const name of names) visit(moduleName(name));
  return order;
}

/** insmodOrder() for a kernel's module directory on disk. */
export function resolveModules(modulesDir: string, names: readonly string[]): string[] {
  const modules = parseModulesDep(readFileSync(join(modulesDir, "modules.dep"), "utf8"));
  const builtin = new Set(
    readFileSync(join(modulesDir, "modules.builtin"), "utf8").split("\n").filter(Boolean).map(moduleName),
  );
  return insmodOrder(modules, names, builtin);
}

/** The module's bytes, uncompressed: neither insmod nor an early kernel need know xz or zstd. */
export function readModule(file: string): Buffer {
  const raw = readFileSync(file);
  if (file.endsWith(".ko")) return raw;
  const tool = file.endsWith(".xz") ? "xz" : file.endsWith(".zst") ? "zstd" : "gzip";
  const done = spawnSync(tool, ["-dc"], { input: raw, maxBuffer: 256 << 20 });
  if (done.error !== undefined || done.status !== 0) {
    throw new Error(`${file}: ${tool} -dc failed: ${done.error?.message ?? done.stderr.toString().trim()}`);
  }
  return done.stdout;
}
