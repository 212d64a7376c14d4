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

/** Takes the driver away: nothing may be mapped then, on either side. */
export async function assertNothingLeft(vmm: RunningVmm): Promise<void> {
  await vmm.sh("modprobe -r nvme");
  const { host, guest } = await assertViewsAgree(vmm);
  for (const [path, value] of guest) if (path.endsWith("/outstanding")) assert.is(value, 0, path);
  assert.is(host.get("dma/mapped_bytes"), 0, "mapped after the driver was unloaded");
  assert.is(host.get("dma/pinned_bytes"), 0, "pinned after the driver was unloaded");
}

/** Ends the guest in good order. */
export async function endDriven(vmm: RunningVmm): Promise<void> {
  vmm.process.write("exit 0\n");
  const { status, script } = await vmm.end();
  assert.is(script, 0, "the script's exit status");
  assert.is(status, 0, "the VMM's exit status");
}

/**
 * A guest whose host has room for less than what its driver would like to have mapped: it reads the whole disk, writes and
 * verifies, with these options of fio's, and reads again. The driver is told of every map that fails, and not a byte is
 * wrong.
 */
export async function recoversFromLimits(
  disk: TestedDisk,
  guest: DrivenGuest,
  fioOptions: string,
): Promise<void> {
  const vmm = await startDriven(disk.host, [disk.assign], guest);
  const [path] = await loadNvme(vmm);
  const hash = await assertReads(vmm, disk, path!);

  const begun = Date.now();
  const ios = await verify(vmm, path!, fioOptions);
  const seconds = (Date.now() - begun) / 1000;
  assert.is.not(await assertReads(vmm, disk, path!), hash, "fio changed the disk");

  const { host, guest: inGuest } = await assertViewsAgree(vmm);
  const told = [...inGuest].find(([name]) => name.endsWith("/errors/limit"))![1];
  assert.ok(told > 0, "the guest counted errors");
  assert.is(host.get("dma/limit_hits"), told, "the host counted the same");
  assert.is(host.get("hypercalls/map/errors")! + host.get("hypercalls/map_list/errors")!, told);
  await assertNoComplaints(vmm);
  await assertNothingLeft(vmm);
  await endDriven(vmm);
  console.log(
    `    the whole disk is right; ${ios} I/Os verified in ${seconds.toFixed(1)} s; ` +
      `${told} of ${inGuest.get("hypercall_map")} maps failed, and the driver was told of each`,
  );
}

/** A queue so deep, filled in batches so large, that a host with few mappings never has enough. */
export const DEEP_QUEUE = "--iodepth=128 --iodepth_batch=64";
