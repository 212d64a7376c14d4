// Builds the freestanding guests: NAME.c each, and NAME_*.c where there is more of it, with start.S, lib.c and the
// portable core of guest-shim, by the system's gcc and ld. What comes out is a bzImage: guest.ld and start.S lay it out, the linker writes it as it is.

import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { repoRoot } from "../lab/cache.js";

const exec = promisify(execFile);

const flags = [
  "-std=gnu11",
  "-O2",
  "-Wall",
  "-Wextra",
  "-Werror",
  "-ffreestanding",
  "-nostdlib",
  "-static",
  "-no-pie",
  "-fno-pie",
  // What compilers of distributions add for programs of an operating system.
  "-fno-stack-protector",
  "-fcf-protection=none",
  "-fno-asynchronous-unwind-tables",
  // Interrupts come on the same stack, and nobody saved the vector registers or switched them on.
  "-mno-red-zone",
  "-mgeneral-regs-only",
  "-Wl,--oformat=binary,--build-id=none,--no-warn-rwx-segments",
];

/**
 * Compiles the guest <name> of test/guest into `directory`; returns the path of the bzImage. Rejects with the compiler's words
 * when that fails, warnings included.
 */
export async function buildTestGuest(name: string, directory: string): Promise<string> {
  const sources = join(repoRoot, "test", "guest");
  const shim = join(repoRoot, "guest-shim");
  const image = join(directory, `${name}.bzImage`);
  const own = readdirSync(sources).filter(
    (file) => file === `${name}.c` || /^(.*)_\w+\.c$/.exec(file)?.[1] === name,
  );
  const files = ["start.S", "lib.c", ...own].map((file) => join(sources, file));
  const args = [...flags, "-I", sources, "-I", shim, "-T", join(sources, "guest.ld"), "-o", image];
  await exec("gcc", [...args, ...files, join(shim, "pvdma_core.c")]);
  return image;
}
