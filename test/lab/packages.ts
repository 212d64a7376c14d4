// Gets the two stock Debian kernels (image, modules, headers) that the lab uses, without installing any of them:
// resolves their names, downloads the packages with apt and unpacks them into the cache.
// ABI names change every few weeks; none is written here.

import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { cacheDir, makeAtomically } from "./cache.js";

const exec = promisify(execFile);

export type KernelSeries = "6.1" | "6.12";
export const kernelSeries: readonly KernelSeries[] = ["6.1", "6.12"];

/** A kernel unpacked in the cache. Paths are absolute. */
export interface Kernel {
  readonly series: KernelSeries;
  /** As uname -r says it, "6.1.0-56-amd64". */
  readonly abi: string;
  /** The Debian package version. */
  readonly version: string;
  /** The directory that stands for "/": modprobe -d takes it. */
  readonly root: string;
  readonly vmlinuz: string;
  /** …/lib/modules/<abi> */
  readonly modulesDir: string;
  /** What `make KDIR=` takes. */
  readonly headersDir: string;
}

/** The packages of one kernel. */
export interface KernelPackages {
  abi: string;
  image: string;
  headers: string;
}

/** Takes the 6.1 kernel from what `apt-cache depends linux-image-amd64` prints. */
export function choose61(dependsText: string): KernelPackages | undefined {
  const found = /Depends:\s*(linux-image-(6\.1\.\S*-amd64))(-unsigned)?\s*$/m.exec(dependsText);
  if (found === null) return undefined;
  return { abi: found[2]!, image: found[1]! + (found[3] ?? ""), headers: `linux-headers-${found[2]}` };
}

/**
 * The 6.12 kernels among package names, newest first: the plain amd64 flavour (no -rt, no -cloud), signed before
 * unsigned, and only those whose headers are on offer too.
 */
export function choose612(imageNames: readonly string[], headerNames: readonly string[]): KernelPackages[] {
  const headers = new Set(headerNames);
  const found: KernelPackages[] = [];
  for (const image of imageNames) {
    const match = /^linux-image-(6\.12\.[^-]*(?:-\d+)?-amd64)(-unsigned)?$/.exec(image);
    if (match === null || !headers.has(`linux-headers-${match[1]}`)) continue;
    found.push({ abi: match[1]!, image, headers: `linux-headers-${match[1]}` });
  }
  return found.sort((a, b) => compareNumbers(b.abi, a.abi) || a.image.length - b.image.length);
}

/** Orders version strings by the numbers in them: 6.12.9 < 6.12.107. */
function compareNumbers(a: string, b: string): number {
  const [left, right] = [a, b].map((text) => (text.match(/\d+/g) ?? []).map(Number)) as [number[], number[]];
  for (let i = 0; i < Math.max(left.length, right.length); i++) {
    const difference = (left[i] ?? -1) - (right[i] ?? -1);
    if (difference !== 0) return difference;
  }
  return 0;
}

const updateCommand = "apt-get update";

/**
 * The kernel of a series. From the cache when it is there (no network is touched then); else resolved, downloaded
 * and unpacked. Remove the cache directory to go for newer kernels.
 */
export async function getKernel(
  series: KernelSeries,
  say: (line: string) => void = () => {},
): Promise<Kernel> {
  const cached = cachedKernel(series);
  if (cached !== undefined) return cached;
  try {
    return await fetchKernel(series, say);
  } catch (first) {
    // Package lists that are absent or older than the archive: renew them once, if we may.
    if (process.getuid?.() !== 0) {
      throw new Error(
        `${(first as Error).message}; renew the package lists and try again: sudo ${updateCommand}`,
      );
    }
    say(`kernel ${series}: ${(first as Error).message}; running ${updateCommand}`);
    await exec("apt-get", ["update", "-qq"]);
    return await fetchKernel(series, say);
  }
}

/** The kernel of a series if the cache has it. */
export function cachedKernel(series: KernelSeries): Kernel | undefined {
  try {
    const { abi, version } = JSON.parse(
      readFileSync(join(cacheDir("kernels"), `${series}.json`), "utf8"),
    ) as Kernel;
    const kernel = kernelAt(series, abi, version);
    return existsSync(kernel.vmlinuz) && existsSync(kernel.headersDir) ? kernel : undefined;
  } catch {
    return undefined;
  }
}

function kernelAt(series: KernelSeries, abi: string, version: string): Kernel {
  const root = join(cacheDir("kernels"), `${abi}_${version.replaceAll(":", "_")}`);
  return {
    series,
    abi,
    version,
    root,
    vmlinuz: join(root, "boot", `vmlinuz-${abi}`),
    modulesDir: join(root, "lib", "modules", abi),
    headersDir: join(root, "usr", "src", `linux-headers-${abi}`),
  };
}

async function fetchKernel(series: KernelSeries, say: (line: string) => void): Promise<Kernel> {
  const packages = await resolvePackages(series);
  const { version } = packages;
  const kernel = kernelAt(series, packages.abi, version);
  // The headers of a flavour are links into, and an include of, two more packages.
  const depends = (await exec("apt-cache", ["depends", packages.headers])).stdout;
  const more = depends.match(/(?<=Depends: )linux-(headers-\S+-common|kbuild-\S+)$/gm) ?? [];
  const names = [packages.image, packages.headers, ...more];

  if (!existsSync(kernel.vmlinuz) || !existsSync(kernel.headersDir)) {
    await makeAtomically(kernel.root, async (root) => {
      const downloads = join(root, "..", "deb");
      mkdirSync(downloads);
      mkdirSync(root);
      const asRoot = process.getuid?.() === 0 ? ["-o", "APT::Sandbox::User=root"] : [];
      const options = { cwd: downloads, maxBuffer: 16 << 20 };
      const uris = (await exec("apt-get", [...asRoot, "download", "--print-uris", ...names], options)).stdout;
      for (const line of uris.trim().split("\n")) {
        const [, file, bytes] = line.split(" ");
        say(`kernel ${series}: downloading ${file} (${(Number(bytes) / 1e6).toFixed(1)} MB)`);
      }
      await exec("apt-get", [...asRoot, "download", "-qq", ...names], options);
      const files = (await readdir(downloads)).filter((file) => file.endsWith(".deb"));
      if (files.length !== names.length)
        throw new Error(`apt-get download gave ${files.length} of ${names.length} files`);
      say(`kernel ${series}: unpacking into ${kernel.root}`);
      for (const file of files) await exec("dpkg-deb", ["-x", join(downloads, file), root]);
      await exec("depmod", ["-b", root, packages.abi], { env: { ...process.env, PATH: sbinPath() } });
      // Debian's headers name their other half by an absolute path.
      const makefile = join(root, "usr", "src", `linux-headers-${packages.abi}`, "Makefile");
      const text = readFileSync(makefile, "utf8");
      writeFileSync(makefile, text.replace(/^include \/usr\/src\//m, `include ${kernel.root}/usr/src/`));
    });
  }
  const note = join(cacheDir("kernels"), `${series}.json`);
  await makeAtomically(note, async (file) => {
    writeFileSync(file, `${JSON.stringify({ abi: packages.abi, version, packages: names })}\n`);
  });
  return kernel;
}

async function resolvePackages(series: KernelSeries): Promise<KernelPackages & { version: string }> {
  const candidates: KernelPackages[] = [];
  if (series === "6.1") {
    const chosen = choose61((await exec("apt-cache", ["depends", "linux-image-amd64"])).stdout);
    if (chosen !== undefined) candidates.push(chosen);
  } else {
    const names = async (prefix: string): Promise<string[]> =>
      (await exec("apt-cache", ["pkgnames", prefix], { maxBuffer: 16 << 20 })).stdout.split("\n");
    candidates.push(...choose612(await names("linux-image-6.12"), await names("linux-headers-6.12")));
  }
  for (const chosen of candidates) {
    const version = await candidateVersion(chosen.image);
    if (version !== undefined && (await candidateVersion(chosen.headers)) !== undefined)
      return { ...chosen, version };
  }
  throw new Error(`kernel ${series}: apt knows no linux-image of it for amd64 with its headers`);
}

/** The version apt would take; undefined for a name that is only mentioned by others. */
async function candidateVersion(name: string): Promise<string | undefined> {
  const { stdout } = await exec("apt-cache", ["policy", name]);
  const version = /Candidate: (\S+)/.exec(stdout)?.[1];
  return version === "(none)" ? undefined : version;
}

/** depmod and the like live in sbin, which an ordinary user's PATH leaves out. */
export function sbinPath(): string {
  return `${process.env.PATH ?? "/usr/bin:/bin"}:/usr/sbin:/sbin`;
}
