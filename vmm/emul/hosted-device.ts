// An emulated device as the main thread has it: its Worker, and what the PCI code and the watch over devices ask of it.
// The registers are the vCPUs' threads' business (link.ts).

import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import type { PciDescription } from "../../iommu-emul/device.js";
import type { EmulatedName } from "../device-name.js";
import { DeviceError } from "../errors.js";
import type { IrqSource } from "../pci/msi-vector.js";
import type { DeviceJob, DeviceMessage } from "./device-thread.js";
import { COMMAND_CLOSE, COMMAND_RESET, LinkControl } from "./link.js";

/** What a PCI function of an emulated device needs of it. */
export interface EmulatedDeviceAccess {
  readonly name: string;
  readonly description: PciDescription;
  /** The number by which vCPUs know its registers. */
  readonly number: number;
  readonly interrupts: IrqSource;
  /** Bus mastering: whether its DMA gets anywhere. After turning it off, none is under way. */
  setBusMaster(on: boolean): void;
  /** Function level reset; when it returns, it is done. */
  reset(): void;
}

/** What the software IOMMU has for one device. Turning bus mastering off waits for the access that is under way. */
export interface DmaSwitch {
  setBusMaster(on: boolean): void;
  /** The device's thread is gone; it may have been in the middle of an access. */
  abandon(): void;
}

/** How long the end waits for a thread that has not answered a register's read for as long. */
const GRACE_MS = 10_000;

export class HostedDevice implements EmulatedDeviceAccess {
  readonly interrupts: IrqSource;
  private readonly link: LinkControl;
  private readonly worker: Worker;
  private readonly exited: Promise<void>;
  private why: string | undefined;
  private ending = false;
  private hangs = false;

  private constructor(
    readonly name: EmulatedName,
    readonly number: number,
    readonly description: PciDescription,
    job: DeviceJob,
    private readonly dma: DmaSwitch,
    private readonly warn: (line: string) => void,
    onReady: (failure: string | undefined) => void,
  ) {
    this.link = new LinkControl(job.link);
    const { vectors } = job.link;
    this.interrupts = {
      vectors,
      growable: true,
      enable: (fds) => this.link.setVectors(0, fds),
      setTrigger: (vector, fd) => this.link.setVectors(vector, [fd]),
      disable: () => this.link.setVectors(0, new Array<number>(vectors).fill(-1)),
    };
    this.worker = new Worker(new URL("./device-thread.js", import.meta.url), { workerData: job });
    this.worker.on("message", (message: DeviceMessage) => {
      if (message.kind === "ready") onReady(undefined);
      else if (message.kind === "warning") warn(`${name}: ${message.line}`);
      else if (message.when === "atStart") onReady(message.why);
      else if (message.when === "atClose")
        warn(`${name}: what it was given may not be stored: ${message.why}`);
      else this.fail(message.why);
    });
    this.worker.on("error", (error) => this.fail(error.message));
    this.exited = new Promise((resolve) => {
      this.worker.on("exit", () => {
        if (!this.ending) this.fail("its thread ended without a word");
        this.link.end();
        // Only now: until it is gone it may be in the middle of an access.
        dma.abandon();
        onReady(this.why ?? "its thread ended without a word");
        resolve();
      });
    });
  }

  /** Resolves when the device is there, with its thread at work; rejects with a DeviceError when it cannot be had. */
  static async start(
    name: EmulatedName,
    number: number,
    description: PciDescription,
    job: DeviceJob,
    dma: DmaSwitch,
    warn: (line: string) => void,
  ): Promise<HostedDevice> {
    let started: (failure: string | undefined) => void = () => undefined;
    const ready = new Promise<string | undefined>((resolve) => {
      started = resolve;
    });
    const device = new HostedDevice(name, number, description, job, dma, warn, started);
    const failure = await ready;
    if (failure === undefined) return device;
    await device.exited;
    throw new DeviceError(name, `${name}: ${failure}`);
  }

  /** Why the device is of no use any more, once it is not. */
  poll(): { readonly why: string } | undefined {
    if (this.link.hangs) this.hang();
    return this.why === undefined ? undefined : { why: this.why };
  }

  setBusMaster(on: boolean): void {
    this.dma.setBusMaster(on);
  }

  reset(): void {
    if (!this.link.command(COMMAND_RESET) && !this.link.ended) this.hang();
  }

  /** Ends its thread, once the device has stored what it was given and has given back its files. */
  async close(): Promise<void> {
    if (!this.ending) {
      this.ending = true;
      this.link.ask(COMMAND_CLOSE);
      if (!this.hangs && this.link.hangs) await this.awaitGivenUp();
      if (this.hangs) await this.worker.terminate();
    }
    await this.exited;
  }

  /** A vCPU gave it up and nobody has polled since: it may have been slow, and be storing what it was given. */
  private async awaitGivenUp(): Promise<void> {
    const ended = this.exited.then(() => true);
    if (await Promise.race([ended, sleep(GRACE_MS, false, { ref: false })])) return;
    this.warn(`${this.name}: its thread does not answer: what it was given may not be stored`);
    this.hang();
  }

  private hang(): void {
    this.hangs = true;
    this.fail("its thread does not answer");
  }

  private fail(why: string): void {
    this.why ??= why;
    this.link.end();
  }
}
