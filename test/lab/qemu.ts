// QEMU as a VMM inside L1, beside ours: the same guest kernel without our module, the same device by VFIO behind a
// virtual IOMMU, or one that it emulates itself. What it does is shown beside what we do; nothing here judges.

import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { buildGuestParts, type GuestOptions, guestEnd } from "./guest.js";
import { type Host, type HostProcess, shellQuote } from "./host.js";

/** How many have been started. */
let count = 0;

/** A guest under QEMU in L1. */
export class QemuBeside {
  private constructor(readonly process: HostProcess) {}

  /**
   * Starts QEMU on the device `bdf`, which is bound to vfio-pci, with an emulated VT-d that the guest uses in strict
   * mode: every map and unmap of its drivers becomes one of VFIO's, as with ours.
   */
  static strict(host: Host, bdf: string, options: GuestOptions): Promise<QemuBeside> {
    const devices = ["-device", "intel-iommu,intremap=on,caching-mode=on", "-device", `vfio-pci,host=${bdf}`];
    return QemuBeside.start(host, devices, options, "intel_iommu=on iommu.strict=1");
  }

  /** Starts QEMU with a guest without our module, and these options for its devices. */
  static async start(
    host: Host,
    devices: readonly string[],
    options: GuestOptions,
    kernelArgs = "",
  ): Promise<QemuBeside> {
    const { kernel, initrd, cmdline } = await buildGuestParts({ ...options, pvdma: false });
    // A file of its own: a QEMU that still runs has its initrd mapped, and the host would take that for this one.
    const initrdFile = join(host.shareDir, `beside-initrd${count++}`);
    writeFileSync(initrdFile, initrd);
    // biome-ignore format: one option per line
    const command = [
      "qemu-system-x86_64",
      "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
      "-machine", "q35",
      "-accel", "kvm,kernel-irqchip=split",
      "-cpu", "host",
      "-m", "512",
      ...devices,
      "-kernel", kernel.vmlinuz,
      "-initrd", initrdFile,
      "-append", `${cmdline} ${kernelArgs}`.trim(),
      "-serial", "stdio",
    ];
    const process = await host.spawn(`exec ${command.map(shellQuote).join(" ")}`);
    void process.exited.finally(() => rmSync(initrdFile, { force: true })).catch(() => {});
    return new QemuBeside(process);
  }

  /** Lines `WORD …` that the guest said, without the word; none if it said nothing of the kind. */
  said(word: string): string[] {
    const lines = this.process.stdout.matchAll(new RegExp(`^guest: ${word}\\b *(.*?)\\r?$`, "gm"));
    return [...lines].map((line) => line[1]!);
  }

  /** Maps that the host refused, as QEMU logs them: a line each, and the guest is told nothing. */
  get failedMaps(): number {
    return this.process.stderr.match(/vfio_dma_map\([^\n]*= -\d+/g)?.length ?? 0;
  }

  /** Waits until it ends, or ends it. True if the guest's script came to its end. */
  async end(timeoutMs: number): Promise<boolean> {
    const timer = setTimeout(() => this.process.kill("SIGKILL"), timeoutMs);
    await this.process.exited;
    clearTimeout(timer);
    return guestEnd.test(this.process.stdout);
  }
}
