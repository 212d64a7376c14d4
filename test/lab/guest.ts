// Makes images for the guest (L2): a unified kernel image of a stock Debian kernel and a small initramfs that runs
// one script and powers off. Images are named by their content and kept in the cache. Nothing here boots anything.

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { cacheDir, makeAtomically, repoRoot, scratchDir } from "./cache.js";
import { CpioArchive } from "./cpio.js";
import { moduleName, parseModulesDep, readModule, resolveModules } from "./modules.js";
import { getKernel, type Kernel, type KernelSeries, sbinPath } from "./packages.js";
import { unpackedKernel } from "./vmlinux.js";

const exec = promisify(execFile);
const execOptions = { maxBuffer: 64 << 20, env: { ...process.env, PATH: sbinPath(), LC_ALL: "C" } };

export interface GuestOptions {
  /**
   * Debian's kernel as it is shipped, which unpacks itself, and with nothing of LAB_CMDLINE. Default false: that takes twice
   * as long in the lab.
   */
  asShipped?: boolean;
  /** Default "6.12". */
  kernel?: KernelSeries;
  /**
   * A shell script (busybox sh). The console shows `guestBegin`, its output, and `guestEnd` with its exit status;
   * then the guest powers off. Kernel modules that the image has are loaded by `modprobe NAME`, none is by itself.
   */
  script: string;
  /** Packs guest-shim/pvdma.ko built for the kernel. Default true. */
  pvdma?: boolean;
  /** Stock modules to pack, with what they need. Default ["nvme"]. */
  modules?: string[];
  /** Further module files (.ko) built for this kernel. */
  moduleFiles?: string[];
  /** Programs of this machine to pack with their libraries: "fio", "nvme". */
  tools?: string[];
  /** Further files: path in the guest → content. */
  files?: Record<string, { content: string | Uint8Array; mode?: number }>;
  /** Kernel command line after the lab's own. Default "quiet". */
  cmdline?: string;
}

const CMDLINE = "console=ttyS0,115200 panic=-1";
/**
 * The lab's processor says that it is a K8, on which Linux looks for an AGP bridge twice at boot, at all 8,192
 * addresses there can be, through ports; and it looks for four serial ports. Nobody needs the kernel's
 * cryptography, whose self-tests and random numbers took another quarter of the boot, nor its keys and the types
 * of its BPF.
 */
const LAB_CMDLINE = [
  "pci=noearly cryptomgr.notests 8250.nr_uarts=1",
  "initcall_blacklist=jent_mod_init,crypto_kdf108_init,init_encrypted,load_system_certificate_list," +
    "bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init",
].join(" ");

/** The line before the script's output. */
export const guestBegin = /^pvdma-guest: begin\r?$/m;
/** The line after the script's output; [1] is its exit status. */
export const guestEnd = /^pvdma-guest: end status=(\d+)\r?$/m;

export interface GuestParts {
  kernel: Kernel;
  initrd: Buffer;
  cmdline: string;
}

/** Builds (or finds in the cache) a guest.img and returns its path. */
export async function buildGuestImage(options: GuestOptions): Promise<string> {
  const parts = await buildGuestParts(options);
  // Its name and the package's version say what is in it.
  const bzImage = options.asShipped ? parts.kernel.vmlinuz : await unpackedKernel(parts.kernel);
  const hash = createHash("sha256").update(
    `${parts.kernel.abi}\n${parts.kernel.version}\n${parts.cmdline}\n`,
  );
  hash.update(readFileSync(stubFile)).update(parts.initrd).update(basename(bzImage));
  const image = join(
    cacheDir("guests"),
    `guest-${parts.kernel.series}-${hash.digest("hex").slice(0, 16)}.img`,
  );
  if (existsSync(image)) {
    utimesSync(image, new Date(), new Date()); // still in use
  } else {
    forgetOldImages();
    await makeAtomically(image, (file) => writeUki(file, parts, bzImage));
  }
  return image;
}

/** The same guest in parts, for a VMM's --kernel, --initrd and --cmdline. */
export async function buildGuestParts(options: GuestOptions): Promise<GuestParts> {
  const kernel = await getKernel(options.kernel ?? "6.12");
  const archive = new CpioArchive();
  for (const dir of ["bin", "sbin", "lib", "lib64"]) {
    archive.directory(`usr/${dir}`);
    archive.symlink(dir, `usr/${dir}`);
  }
  for (const dir of ["proc", "sys", "tmp", "root", "run", "mnt", "etc"]) archive.directory(dir);
  archive.charDevice("dev/console", 5, 1);
  archive.file("usr/bin/busybox", readFileSync("/usr/bin/busybox"), 0o755);
  const applets = (await exec("/usr/bin/busybox", ["--list"])).stdout.trim().split("\n");
  const tools = options.tools ?? [];
  for (const applet of applets) {
    if (applet !== "busybox" && !tools.includes(applet)) archive.symlink(`usr/bin/${applet}`, "busybox");
  }
  archive.symlink("usr/sbin/modprobe", "../bin/busybox"); // where the kernel itself looks for it

  const moduleFiles = [...(options.moduleFiles ?? [])];
  if (options.pvdma ?? true) moduleFiles.unshift((await buildGuestModule(kernel)).file);
  await packModules(archive, kernel, options.modules ?? ["nvme"], moduleFiles);
  for (const tool of tools) await packProgram(archive, tool);
  for (const [path, { content, mode }] of Object.entries(options.files ?? {}))
    archive.file(path, content, mode);

  archive.file("script", options.script.endsWith("\n") ? options.script : `${options.script}\n`, 0o755);
  archive.file("etc/fstab", fstab);
  archive.file("init", init, 0o755);
  const lab = options.asShipped ? "" : LAB_CMDLINE;
  const cmdline = [CMDLINE, lab, options.cmdline ?? "quiet"].filter((words) => words !== "").join(" ");
  return { kernel, initrd: archive.bytes(), cmdline };
}

/** One program mounts them all: to start one takes a tenth of a second in the lab. */
const fstab = `
proc /proc proc
sysfs /sys sysfs
dev /dev devtmpfs
debugfs /sys/kernel/debug debugfs
`;

// The stty waits until the serial port has sent everything: power-off does not.
const init = `#!/bin/sh
export PATH=/usr/bin:/usr/sbin HOME=/root
mount -a
echo "pvdma-guest: begin"
sh /script </dev/console
echo "pvdma-guest: end status=$?"
stty onlcr </dev/console
poweroff -f
`;

/** Puts modules under lib/modules/<abi> with a modules.dep that busybox's modprobe reads. */
async function packModules(
  archive: CpioArchive,
  kernel: Kernel,
  names: string[],
  files: string[],
): Promise<void> {
  const dir = `usr/lib/modules/${kernel.abi}`;
  const stock = new Set<string>();
  const dep: string[] = [];
  const known = parseModulesDep(readFileSync(join(kernel.modulesDir, "modules.dep"), "utf8"));
  const add = (module: string): void => {
    for (const path of resolveModules(kernel.modulesDir, [module])) {
      if (stock.has(path)) continue;
      stock.add(path);
      const needs = known.get(moduleName(path))!.needs.map(plain);
      archive.file(`${dir}/${plain(path)}`, readModule(join(kernel.modulesDir, path)));
      dep.push(`${plain(path)}: ${needs.join(" ")}`);
    }
  };
  names.forEach(add);
  for (const file of files) {
    const depends = (await exec("modinfo", ["-F", "depends", file], execOptions)).stdout.trim();
    const direct = depends.split(",").filter(Boolean);
    direct.forEach(add);
    const needs = direct
      .flatMap((name) => resolveModules(kernel.modulesDir, [name]))
      .reverse()
      .map(plain);
    archive.file(`${dir}/extra/${basename(file)}`, await withoutDebugInfo(file));
    dep.push(`extra/${basename(file)}: ${needs.join(" ")}`);
  }
  archive.file(`${dir}/modules.dep`, `${dep.join("\n")}\n`);
}

/** A module of ours as distributions ship theirs: what only a debugger reads is nine tenths of the file. */
async function withoutDebugInfo(file: string): Promise<Buffer> {
  const { path, remove } = scratchDir();
  try {
    const stripped = join(path, basename(file));
    await exec("objcopy", ["--strip-debug", file, stripped], execOptions);
    return readFileSync(stripped);
  } finally {
    remove();
  }
}

/** modules are packed uncompressed */
function plain(path: string): string {
  return path.replace(/\.ko\.\w+$/, ".ko");
}

/**
 * Libraries of fio's engines for storage over a network and for persistent memory, which nothing here uses;
 * with all that they need in turn they are 80 of fio's 85 MB, some seven seconds of every boot. Stubs stand in for
 * them.
 */
const STUBBED = /^lib(gfapi|nbd|rados|rbd|ibverbs|rdmacm|pmem|pmemblk)\.so/;

/** Packs a program and the libraries it needs, each by the path the loader looks for it. */
async function packProgram(archive: CpioArchive, name: string): Promise<void> {
  const found = (await exec("sh", ["-c", 'command -v "$1"', "sh", name], execOptions)).stdout.trim();
  archive.file(`usr/bin/${name}`, readFileSync(found), 0o755);
  /** By the names they are asked for. */
  const libraries = async (file: string) => {
    const ldd = (await exec("ldd", [file], execOptions).catch(() => ({ stdout: "" }))).stdout; // a static one has none
    return new Map([...ldd.matchAll(/(\S+) (?:=> (\S+) )?\(0x/g)].map((m) => [m[1]!, m[2] ?? m[1]!]));
  };
  const pack = (path: string, content: () => Buffer) => {
    const inGuest = path.replace(/^\/lib/, "/usr/lib");
    if (!archive.has(inGuest)) archive.file(inGuest, content(), 0o755);
  };
  const all = await libraries(found);
  const needed = (await exec("objdump", ["-p", found], execOptions)).stdout.matchAll(/NEEDED +(\S+)/g);
  for (const [, soname] of needed) {
    const path = all.get(soname!)!;
    if (STUBBED.test(soname!)) {
      const stub = await makeStub(found, path);
      pack(path, () => stub);
      continue;
    }
    pack(path, () => readFileSync(path));
    for (const below of (await libraries(path)).values())
      if (below.startsWith("/")) pack(below, () => readFileSync(below));
  }
}

/** A library with the functions that `program` wants of `library`, by version; to call one ends the program. */
async function makeStub(program: string, library: string): Promise<Buffer> {
  /** Names, and the versions of those that have one. */
  const symbols = async (which: string, file: string) =>
    [
      ...(await exec("nm", ["-D", which, file], execOptions)).stdout.matchAll(/ [TU] (\w+)(?:@+(\S+))?$/gm),
    ].map((match) => [match[1]!, match[2]] as const);
  const defined = new Set((await symbols("--defined-only", library)).map(([name]) => name));
  const wanted = (await symbols("--undefined-only", program)).filter(([name]) => defined.has(name));
  const versions = new Set(wanted.flatMap(([, version]) => version ?? []));
  const script = [...versions].map(
    (version) =>
      `${version} { ${wanted.flatMap(([name, of]) => (of === version ? `${name};` : "")).join(" ")} };\n`,
  );
  const { path, remove } = scratchDir();
  try {
    const [source, map, stub] = ["stub.c", "stub.map", "stub.so"].map((name) => join(path, name)) as [
      string,
      string,
      string,
    ];
    writeFileSync(source, wanted.map(([name]) => `void ${name}(void) { __builtin_trap(); }\n`).join(""));
    writeFileSync(map, script.join(""));
    const options = ["-shared", "-nostdlib", "-O1", `-Wl,-soname,${basename(library)}`];
    if (versions.size > 0) options.push(`-Wl,--version-script=${map}`);
    await exec("gcc", [...options, "-o", stub, source], execOptions);
    return readFileSync(stub);
  } finally {
    remove();
  }
}

/**
 * Builds a kernel module from a directory of the tree (guest-shim, test/modules) in a copy of its own, so that both
 * kernels' modules exist side by side. Nothing is built when sources and kernel are the same as before. Rejects with
 * make's output when it fails.
 */
export async function buildModule(
  kernel: Kernel,
  directory: string,
  name: string,
): Promise<{ file: string; log: string }> {
  const source = join(repoRoot, directory);
  // Node 20's recursive listing: paths below the directory. Only sources: a build in the tree must not leak in.
  const sources = (readdirSync(source, { recursive: true }) as string[])
    .filter((file) => /(\.[chS]|(^|\/)(Makefile|Kbuild))$/.test(file) && !/\.mod\.c$/.test(file))
    .sort();
  const hash = createHash("sha256").update(kernel.root);
  for (const file of sources) hash.update(`\0${file}\0`).update(readFileSync(join(source, file)));
  const dir = join(cacheDir("modules"), `${name}-${kernel.abi}-${hash.digest("hex").slice(0, 16)}`);
  if (!existsSync(dir)) {
    await makeAtomically(dir, async (made) => {
      mkdirSync(made);
      for (const file of sources) cpSync(join(source, file), join(made, file));
      const { stdout, stderr } = await exec(
        "make",
        ["-C", made, `KDIR=${kernel.headersDir}`],
        execOptions,
      ).catch((error: Error & { stdout?: string; stderr?: string }) => {
        throw new Error(
          `${directory} does not build for ${kernel.abi}:\n${error.stdout ?? ""}${error.stderr ?? error.message}`,
        );
      });
      if (!existsSync(join(made, `${name}.ko`)))
        throw new Error(`${directory}: make made no ${name}.ko for ${kernel.abi}`);
      writeFileSync(join(made, "make.log"), stdout + stderr);
    });
  }
  return { file: join(dir, `${name}.ko`), log: readFileSync(join(dir, "make.log"), "utf8") };
}

/** guest-shim/pvdma.ko for a kernel. */
export const buildGuestModule = (kernel: Kernel) => buildModule(kernel, "guest-shim", "pvdma");

const stubFile = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";

/**
 * Writes a unified kernel image: systemd's stub and our sections behind its own, in ascending order, .linux last
 * (UAPI group, "Unified Kernel Image"; the order is ukify's).
 */
async function writeUki(
  file: string,
  { kernel, initrd, cmdline }: GuestParts,
  bzImage: string,
): Promise<void> {
  const sections: [name: string, content: Uint8Array][] = [
    [".osrel", Buffer.from(`NAME="pvdma lab guest"\nID=pvdma-lab\nVERSION_ID="${kernel.version}"\n`)],
    [".cmdline", Buffer.from(cmdline)],
    [".uname", Buffer.from(kernel.abi)],
    [".initrd", initrd],
    [".linux", readFileSync(bzImage)],
  ];
  const headers = (await exec("objdump", ["-h", stubFile], execOptions)).stdout;
  let vma = 0;
  for (const match of headers.matchAll(/^ *\d+ \S+ +([0-9a-f]+) +([0-9a-f]+) /gm)) {
    vma = Math.max(vma, Number.parseInt(match[1]!, 16) + Number.parseInt(match[2]!, 16));
  }
  if (vma === 0) throw new Error(`${stubFile}: objdump shows no sections`);
  const parts = `${file}.parts`;
  mkdirSync(parts);
  const args: string[] = [];
  for (const [name, content] of sections) {
    const part = join(parts, name);
    writeFileSync(part, content);
    vma = Math.ceil(vma / 4096) * 4096;
    args.push("--add-section", `${name}=${part}`, "--change-section-vma", `${name}=0x${vma.toString(16)}`);
    vma += content.length;
  }
  await exec("objcopy", [...args, stubFile, file], execOptions);
}

/** Images that no run asked for in a day go. */
function forgetOldImages(): void {
  const dir = cacheDir("guests");
  for (const name of readdirSync(dir)) {
    const file = join(dir, name);
    const age = Date.now() - (statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? Date.now());
    if (name.endsWith(".img") && age > 24 * 3600_000) rmSync(file, { force: true });
  }
}
