// What the tests of recovery share: a disk that is assigned or emulated, a guest that drives it and is told on its console
// what to do, what is done to it, and the questions that are asked in the end: was a byte wrong, did the kernel complain,
// do host and guest agree.

import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { buildGuestImage } from "./guest.js";
import { type Host, must } from "./host.js";
import type { KernelSeries } from "./packages.js";
import { CONSOLE } from "./scripts.js";
import { assertRead, assertViewsAgree, type LabSuite, RunningVmm } from "./support.js";

/** A disk whose driver is tested. */
export interface TestedDisk {
  readonly host: Host;
  /** What --assign is given. */
  readonly assign: string;
  /** What the VMM calls it. */
  readonly name: string;
  /** SHA-256 of what it holds; undefined where guests alone can read it. */
  hash(): Promise<string | undefined>;
}

/** The assigned controller of a suite. */
export const assignedDisk = (lab: LabSuite): TestedDisk => ({
  host: lab.host,
  assign: lab.bdf,
  name: lab.bdf,
  hash: () => lab.diskHash(),
});

/** Disks of random content that the VMM emulates, over files in the host's memory. */
export function emulatedDisks(host: Host, ...bytes: number[]): Promise<TestedDisk[]> {
  const disks = bytes.map(async (size, i): Promise<TestedDisk> => {
    const file = `/tmp/emulated${i}.raw`;
    await must(host, `head -c ${size} /dev/urandom > ${file}`, { timeoutMs: 300_000 });
    return {
      host,
      assign: `emul:nvme,file=${file}`,
      name: i === 0 ? "emul:nvme" : `emul:nvme.${i}`,
      hash: async () => (await must(host, `sha256sum ${file}`, { timeoutMs: 300_000 })).split(" ")[0],
    };
  });
  return Promise.all(disks);
}

/** Has the guest read a whole disk: it is what the disk holds. Returns its hash. */
export async function assertReads(vmm: RunningVmm, disk: TestedDisk, path: string): Promise<string> {
  const hash = await guestHash(vmm, path);
  assertRead(hash, await disk.hash());
  return hash;
}

/** Policies under which a map can fail at any time. */
export const POLICIES = ["strict", "lazy", "cached"] as const;
export type Policy = (typeof POLICIES)[number];

/** In the soak all policies; else the one that tells most. */
export const policies = (short: Policy): readonly Policy[] => (SOAK ? POLICIES : [short]);

/** For one command of the guest: in the soak it may write and verify for long. */
export const commandTimeoutMs = (SOAK ? 60 : 5) * 60_000;

export interface DrivenGuest {
  readonly kernel?: KernelSeries;
  readonly args?: readonly string[];
  /** As RunningVmm.start(). */
  readonly around?: string;
  /** Modules of ours to pack. */
  readonly moduleFiles?: readonly string[];
}

/** Starts a guest with the script CONSOLE and these devices, and waits until it takes commands; pvdma is loaded. */
export async function startDriven(
  host: Host,
  devices: readonly string[],
  { kernel = "6.12", args = [], around, moduleFiles = [] }: DrivenGuest = {},
): Promise<RunningVmm> {
  const image = await buildGuestImage({
    kernel,
    script: CONSOLE,
    tools: ["fio"],
    moduleFiles: [...moduleFiles],
  });
  const assign = devices.flatMap((device) => ["--assign", device]);
  const vmm = await RunningVmm.start(host, [...assign, ...args, image], around);
  await vmm.guestSays("ready");
  await vmm.sh("modprobe pvdma");
  return vmm;
}

/** Loads nvme and waits for the devices' disks; returns their names, such as /dev/nvme0n1, in the order of the devices. */
export async function loadNvme(vmm: RunningVmm, count = 1): Promise<string[]> {
  const disks: string[] = [];
  await vmm.sh("modprobe nvme");
  for (let slot = 1; slot <= count; slot++) {
    const disk = `disk_of 0000:00:${slot.toString(16).padStart(2, "0")}.0`;
    disks.push((await vmm.sh(`until [ -b "$(${disk})" ]; do sleep 0.1; done; ${disk}`)).trim());
  }
  return disks;
}

/** Has fio write to a disk at random and verify what it wrote; `options` are fio's. Returns the number of I/Os. */
export async function verify(vmm: RunningVmm, disk: string, options: string): Promise<number> {
  const [error, ios] = (await vmm.sh(`verify ${disk} ${options}`, commandTimeoutMs)).trim().split(" ");
  assert.is(error, "0", "fio's error");
  return Number(ios);
}

/** The SHA-256 of a whole disk, read from the device. */
async function guestHash(vmm: RunningVmm, disk: string): Promise<string> {
  const command = `echo 3 > /proc/sys/vm/drop_caches; sha256sum ${disk}`;
  return (await vmm.sh(command, commandTimeoutMs)).split(" ")[0]!;
}

export async function assertNoComplaints(vmm: RunningVmm): Promise<void> {
  assert.is(await vmm.sh("complaints"), "", "the guest's kernel log");
}

/**
 * Takes the driver away: nothing may be mapped or counted then, on either side. `before` is what the host had counted when
 * the guest booted, if it was not its first boot.
 */
export async function assertNothingLeft(
  vmm: RunningVmm,
  before?: ReadonlyMap<string, number>,
): Promise<void> {
  await vmm.sh("modprobe -r nvme");
  const { host, guest } = await assertViewsAgree(vmm, 0, before);
  for (const [path, value] of guest)
    if (/\/(outstanding|idle|leaked|stuck)$/.test(path)) assert.is(value, 0, path);
  for (const name of ["mapped_bytes", "pinned_bytes", "entries"])
    assert.is(host.get(`dma/${name}`), 0, `${name} after the driver was unloaded`);
}

/** Ends the guest in good order. */
export async function endDriven(vmm: RunningVmm): Promise<void> {
  vmm.process.write("exit 0\n");
  const { status, script } = await vmm.end();
  assert.is(script, 0, "the script's exit status");
  assert.is(status, 0, "the VMM's exit status");
}

/** Policy lazy: sets how long what was unmapped stays mapped, in milliseconds. */
export const setLazy = (vmm: RunningVmm, ms: number) =>
  vmm.sh(`echo ${ms} > /sys/module/pvdma/parameters/lazy_ms`);

/** Policy lazy: waits until nothing is idle any more, and fails when that takes longer than it may. */
export async function assertSettles(vmm: RunningVmm): Promise<void> {
  const idle = "cat /sys/kernel/debug/pvdma/*/idle | grep -qv '^0$'";
  await vmm.sh(`for i in $(seq 50); do ${idle} || break; sleep 0.1; done; ! ${idle}`);
}

/**
 * A guest whose host has room for less than what its driver would like to have mapped: it reads the whole disk, writes and
 * verifies, with these options of fio's, again and again for so many seconds, and reads again. Not a byte is wrong.
 * Under policy strict the driver is told of every map that fails; under lazy the host is asked again when something was
 * idle; under cached it gives back what is not in use, and seldom has to fail.
 */
export async function recoversFromLimits(
  policy: Policy,
  disk: TestedDisk,
  { args = [], ...guest }: DrivenGuest,
  fioOptions: string,
  seconds = 0,
): Promise<void> {
  const vmm = await startDriven(disk.host, [disk.assign], { args: ["--dma", policy, ...args], ...guest });
  const [path] = await loadNvme(vmm);
  // So much stays idle that it is in the way.
  if (policy === "lazy") await setLazy(vmm, 1000);
  let hash = await assertReads(vmm, disk, path!);

  const begun = Date.now();
  const elapsed = () => (Date.now() - begun) / 1000;
  let ios = 0;
  let round = 0;
  do {
    // With other content each time, which what was there before is not taken for.
    ios += await verify(vmm, path!, `${fioOptions} --randseed=${++round}`);
    const before = hash;
    hash = await assertReads(vmm, disk, path!);
    assert.is.not(hash, before, "fio changed the disk");
  } while (elapsed() < seconds);
  const took = elapsed();

  if (policy === "lazy") {
    await setLazy(vmm, 10);
    await assertSettles(vmm);
  }
  const { host, guest: inGuest } = await assertViewsAgree(vmm);
  const counted = (name: string) => [...inGuest].find(([path]) => path.endsWith(`/${name}`))![1];
  const [told, again] = [counted("errors/limit"), counted("retries")];
  const evicted = host.get("dma/evicted")!;
  console.log(
    `    ${policy}: ${ios} I/Os in ${round} rounds verified in ${took.toFixed(1)} s, and the whole disk is right each time; ` +
      `${inGuest.get("hypercall_map")} map calls, ${again} made again, the driver was told of ${told} limits; ` +
      `${evicted} granules reclaimed`,
  );
  assert.is(host.get("dma/limit_hits"), told + again, "the host counted the same");
  assert.is(host.get("hypercalls/map/errors")! + host.get("hypercalls/map_list/errors")!, told + again);
  assert.ok({ strict: told, lazy: again, cached: told + evicted }[policy] > 0, "the limit was met");
  const quota = host.get("dma/quota_bytes")!;
  assert.ok(quota === 0 || host.get("dma/peak_pinned_bytes")! <= quota, "more pinned than the quota");
  assert.is(host.get("dma/faults"), 0, "accesses that were refused");
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
}

/** Read when a container is opened, so it holds for a VMM that starts after it was set. */
const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/** Does something while the host allows each container so many mappings. */
export async function withEntryLimit(host: Host, limit: number, body: () => Promise<void>): Promise<void> {
  const before = (await must(host, `cat ${ENTRY_LIMIT}; echo ${limit} > ${ENTRY_LIMIT}`)).trim();
  try {
    await body();
  } finally {
    await must(host, `echo ${before} > ${ENTRY_LIMIT}`);
  }
}

/** A queue so deep, filled in batches so large, that a host with few mappings never has enough. */
export const DEEP_QUEUE = "--iodepth=128 --iodepth_batch=64";
