// The software IOMMU (iommu-emul/) as the machine uses it: a domain over guest RAM, each thread's view of it, and what it
// refused. Everything of it is in one piece of shared memory.

import type { BackendLimits, DmaBackend } from "../../hypercalls/backend.js";
import { DMA_FAULT, type DmaFault, type DmaPort } from "../../iommu-emul/device.js";
import { SoftDmaPort } from "../../iommu-emul/dma-port.js";
import { FaultReader } from "../../iommu-emul/faults.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import type { RamDescription } from "../guest-memory.js";
import type { Fault } from "../iommu-faults.js";
import { addressOf } from "../native/libc.js";
import { memoryWindow } from "../native/memory-window.js";
import type { SoftIommuLimits } from "../options.js";
import type { DmaSwitch } from "./hosted-device.js";

/** A device's place in its IOMMU; what its thread is given. */
export interface DmaLane {
  readonly memory: SharedArrayBuffer;
  readonly lane: number;
}

/** The port of the device whose thread this is. */
export const openDmaPort = ({ memory, lane }: DmaLane): DmaPort =>
  new SoftDmaPort(memory, lane, memoryWindow, addressOf);

export const openSoftBackend = (memory: SharedArrayBuffer): DmaBackend => new SoftIommu(memory);

const WHY: Readonly<Record<DmaFault, string>> = {
  [DMA_FAULT.none]: "",
  [DMA_FAULT.notMapped]: "not mapped",
  [DMA_FAULT.access]: "mapped, but not for that",
  [DMA_FAULT.range]: "beyond the addresses that the IOMMU translates",
  [DMA_FAULT.noBusMaster]: "bus mastering is off",
};

/** A domain, on the main thread. */
export class SoftDomain {
  readonly handle: { readonly kind: "soft"; readonly memory: SharedArrayBuffer };
  private readonly iommu: SoftIommu;
  private readonly faults: FaultReader;
  /** By lane: faults that were not recorded, as far as they were told, and the last that was. */
  private readonly lost: number[];
  private readonly last: (Fault | undefined)[];

  private constructor(
    memory: SharedArrayBuffer,
    /** Of the devices, by lane. */
    readonly names: readonly string[],
  ) {
    this.handle = { kind: "soft", memory };
    this.iommu = new SoftIommu(memory);
    this.faults = new FaultReader(memory);
    this.lost = names.map(() => 0);
    this.last = names.map(() => undefined);
  }

  /** A domain over guest RAM for these devices, with nothing mapped. */
  static create(ram: RamDescription, names: readonly string[], limits: SoftIommuLimits): SoftDomain {
    const memory = ram.slots.map(({ hva, bytes }) => ({ hva, bytes }));
    return new SoftDomain(SoftIommu.create({ memory, lanes: names.length, ...limits }), names);
  }

  get limits(): BackendLimits {
    return this.iommu.limits();
  }

  switchOf(lane: number): DmaSwitch {
    return {
      setBusMaster: (on) => this.iommu.setBusMaster(lane, on),
      abandon: () => this.iommu.markDead(lane),
    };
  }

  /** What was refused since the last call. */
  readFaults(each: (fault: Fault, more?: number) => void): void {
    this.faults.drain(({ lane, iova, access, reason }) => {
      const fault = { device: this.names[lane]!, access, iova: iova.toString(16), why: WHY[reason] };
      this.last[lane] = fault;
      each(fault);
    });
    for (const [lane, fault] of this.last.entries()) {
      const { lost } = this.faults.counts(lane);
      const more = lost - this.lost[lane]!;
      if (fault === undefined || more === 0) continue;
      this.lost[lane] = lost;
      each(fault, more - 1);
    }
  }
}
