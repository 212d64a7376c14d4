// What the tests of recovery share: a guest that drives the device and is told on its console what to do, and the
// questions that are asked in the end: was a byte wrong, did the kernel complain, do host and guest agree.

import * as assert from "uvu/assert";
import { SOAK } from "../soak.js";
import { buildGuestImage } from "./guest.js";
import type { Host } from "./host.js";
import type { KernelSeries } from "./packages.js";
import { CONSOLE } from "./scripts.js";
import { assertViewsAgree, RunningVmm } from "./support.js";

/** For one command of the guest: in the soak it may write and verify for long. */
export const commandTimeoutMs = (SOAK ? 60 : 5) * 60_000;

export interface DrivenGuest {
  readonly kernel?: KernelSeries;
  readonly args?: readonly string[];
  /** As RunningVmm.start(). */
  readonly around?: string;
}

/** Starts a guest with the script CONSOLE and these devices, and waits until it takes commands; pvdma is loaded. */
export async function startDriven(
  host: Host,
  bdfs: readonly string[],
  { kernel = "6.12", args = [], around }: DrivenGuest = {},
): Promise<RunningVmm> {
  const image = await buildGuestImage({ kernel, script: CONSOLE, tools: ["fio"] });
  const assign = bdfs.flatMap((bdf) => ["--assign", bdf]);
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
export async function guestHash(vmm: RunningVmm, disk: string): Promise<string> {
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
