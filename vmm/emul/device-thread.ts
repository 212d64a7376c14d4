// One emulated device: the code of its Worker. Serves the guest's register accesses, lets the device work, and sleeps
// when there is nothing to do. Bus addresses are the device's business; they go through its port of the software IOMMU.

import { parentPort, workerData } from "node:worker_threads";
import type { DeviceHost, DmaPort, EmulatedDevice, MachineFacts } from "../../iommu-emul/device.js";
import { modelNamed } from "../../iommu-emul/models.js";
import { errorMessage } from "../errors.js";
import { type DmaLane, openDmaPort } from "./iommu.js";
import {
  COMMAND_CLOSE,
  COMMAND_RESET,
  type Command,
  LinkDevice,
  type LinkServer,
  type LinkState,
} from "./link.js";
import { natives } from "./natives.js";

/** Everything the Worker needs; structured-cloneable. */
export interface DeviceJob {
  /** Of the model in models.ts, and what its parse() returned. */
  readonly model: string;
  readonly options: unknown;
  readonly machine: MachineFacts;
  readonly link: LinkState;
  readonly dma: DmaLane;
}

/** What the Worker says: a line for the user, that it is ready, how it failed. */
export type DeviceMessage =
  | { readonly kind: "warning"; readonly line: string }
  | { readonly kind: "ready" }
  /** `atStart`: the device could not be made; `atWork`: it is gone; `atClose`: what it had may not be stored. */
  | { readonly kind: "failed"; readonly when: "atStart" | "atWork" | "atClose"; readonly why: string };

/** Different lines that a device may say: guests can make some devices say many. */
const LINES_MAX = 20;

class DeviceThread implements DeviceHost, LinkServer {
  readonly dma: DmaPort;
  readonly natives = natives;
  private readonly link: LinkDevice;
  private readonly device: EmulatedDevice;
  /** Operations of later() under way. */
  private outstanding = 0;
  private closing = false;
  private readonly said = new Set<string>();
  private wake: () => void = () => undefined;
  private failure: unknown;

  constructor(
    job: DeviceJob,
    private readonly say: (message: DeviceMessage) => void,
  ) {
    this.link = new LinkDevice(job.link);
    this.dma = openDmaPort(job.dma);
    this.device = modelNamed(job.model)!.create(job.options, this, job.machine);
  }

  /** Until the machine ends. Rejects when the device does what no device does: it throws. */
  async run(): Promise<void> {
    const { link, device } = this;
    link.started();
    this.say({ kind: "ready" });
    try {
      while (!this.closing && !link.ended) {
        const bellCount = link.bellCount;
        link.serve(this);
        const busy = !this.closing && device.work();
        if (this.failure !== undefined) throw this.failure;
        if (this.closing) break;
        if (this.outstanding > 0) await (busy ? this.turn() : this.sleepAside(bellCount));
        else if (!busy) link.sleep(bellCount);
      }
    } finally {
      // Whoever waits for an answer gets none, and nobody is to wait for one again.
      link.end();
    }
  }

  close(): Promise<void> {
    return this.device.close();
  }

  /** Lets what has come in of later() be told to the device. */
  private turn(): Promise<void> {
    return new Promise((resolve) => setImmediate(resolve));
  }

  /** Until there is a register access or a command, or something of later() has come in. */
  private sleepAside(bellCount: number): Promise<void> {
    return new Promise<void>((resolve) => {
      this.wake = resolve;
      if (this.link.sleepAside(bellCount, resolve)) resolve();
    }).then(() => this.link.awake());
  }

  // What the device is given.

  interrupt(vector: number): void {
    this.link.interrupt(vector);
  }

  later<T>(operation: Promise<T>, then: (result: T) => void, failed: (error: Error) => void): void {
    this.outstanding++;
    const settle = (tell: () => void) => {
      this.outstanding--;
      try {
        tell();
      } catch (error) {
        this.failure ??= error;
      }
      this.wake();
    };
    operation.then(
      (result) => settle(() => then(result)),
      (error: unknown) => settle(() => failed(error instanceof Error ? error : new Error(String(error)))),
    );
  }

  warn(line: string): void {
    if (this.said.has(line) || this.said.size > LINES_MAX) return;
    this.said.add(line);
    const more = this.said.size > LINES_MAX;
    this.say({ kind: "warning", line: more ? "there is more to say about it than is worth a line" : line });
  }

  // What comes by the link.

  read(bar: number, offset: number, bytes: 1 | 2 | 4): number {
    return this.device.read(bar, offset, bytes);
  }

  write(bar: number, offset: number, bytes: 1 | 2 | 4, value: number): void {
    this.device.write(bar, offset, bytes, value);
  }

  /** All accesses of before are served, and no DMA is under way: that happens on this thread. */
  command(command: Command): void {
    if (command === COMMAND_RESET) this.device.reset();
    if (command === COMMAND_CLOSE) this.closing = true;
  }
}

async function main(job: DeviceJob, say: (message: DeviceMessage) => void): Promise<void> {
  const failed = (when: "atStart" | "atWork" | "atClose", error: unknown) =>
    say({ kind: "failed", when, why: errorMessage(error) });
  let thread: DeviceThread;
  try {
    thread = new DeviceThread(job, say);
  } catch (error) {
    failed("atStart", error);
    return;
  }
  await thread.run().catch((error: unknown) => failed("atWork", error));
  // A device that failed still gives back its files.
  await thread.close().catch((error: unknown) => failed("atClose", error));
}

if (parentPort !== null) {
  const port = parentPort;
  void main(workerData as DeviceJob, (message) => port.postMessage(message));
}
