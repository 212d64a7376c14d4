// From --assign emul:… to devices at work, in three steps, as for those of VFIO: look (prepareEmulated), make the IOMMU
// domains (open), start the devices. Main thread.

import type { BackendLimits } from "../../hypercalls/backend.js";
import type { DeviceModel, MachineFacts, PciDescription } from "../../iommu-emul/device.js";
import { modelNamed } from "../../iommu-emul/models.js";
import type { EmulatedName } from "../device-name.js";
import type { BackendHandle } from "../dma-backend.js";
import { errorMessage, VmmError } from "../errors.js";
import type { RamDescription } from "../guest-memory.js";
import type { Fault, FaultSource } from "../iommu-faults.js";
import type { SoftIommuLimits } from "../options.js";
import { HostedDevice } from "./hosted-device.js";
import { SoftDomain } from "./iommu.js";
import { createLink, type LinkState } from "./link.js";

export interface EmulatedRequest {
  readonly name: EmulatedName;
  readonly guestSlot: number;
  /** Devices with the same label share an IOMMU domain. */
  readonly domain: string;
  readonly model: string;
  readonly modelOptions: unknown;
}

/** A request that can be met, as far as looking tells. */
export interface EmulatedDevice extends EmulatedRequest {
  readonly description: PciDescription;
}

/** Checks all requests before anything is touched. Throws a VmmError for the first that cannot be met. */
export function prepareEmulated(
  requests: readonly EmulatedRequest[],
  machine: MachineFacts,
): EmulatedDevice[] {
  return requests.map((request) => {
    const model = modelOf(request);
    try {
      model.check(request.modelOptions);
    } catch (error) {
      throw new VmmError(`${request.name}: ${errorMessage(error)}`);
    }
    return { ...request, description: model.describe(request.modelOptions, machine) };
  });
}

/** Whether a device can still be had, before the guest starts again. Throws a VmmError. */
export function checkEmulated(device: EmulatedDevice): void {
  try {
    modelOf(device).check(device.modelOptions);
  } catch (error) {
    throw new VmmError(`${device.name}: ${errorMessage(error)}`);
  }
}

function modelOf({ model }: EmulatedRequest): DeviceModel<unknown> {
  const found = modelNamed(model);
  if (found === undefined) throw new RangeError(`no model ${model}`);
  return found;
}

interface Member {
  readonly device: EmulatedDevice;
  readonly domain: SoftDomain;
  readonly lane: number;
  readonly link: LinkState;
}

export class OpenEmulated implements FaultSource {
  /** Every access that is refused is told, or counted as one that was not. */
  readonly complete = true;
  private readonly byLabel = new Map<string, SoftDomain>();
  private readonly members: Member[] = [];
  private readonly hosted: HostedDevice[] = [];

  private constructor() {}

  /** Makes the IOMMU domains over guest RAM, with nothing mapped, but starts no device yet. */
  static open(
    devices: readonly EmulatedDevice[],
    ram: RamDescription,
    limits: SoftIommuLimits,
    machine: MachineFacts,
  ): OpenEmulated {
    const opened = new OpenEmulated();
    for (const device of devices) {
      const { domain: label, description } = device;
      if (!opened.byLabel.has(label)) {
        const names = devices.filter((each) => each.domain === label).map(({ name }) => name);
        opened.byLabel.set(label, SoftDomain.create(ram, names, limits));
      }
      const domain = opened.byLabel.get(label)!;
      const lane = domain.names.indexOf(device.name);
      const link = createLink(machine.cpus, description.interrupts.vectors);
      opened.members.push({ device, domain, lane, link });
    }
    return opened;
  }

  /** By domain label. */
  get domains(): ReadonlyMap<string, { readonly handle: BackendHandle; readonly limits: BackendLimits }> {
    return this.byLabel;
  }

  /** For the vCPUs: the links, in the order of the devices, whose numbers are their places in it. */
  get links(): readonly LinkState[] {
    return this.members.map(({ link }) => link);
  }

  /** Starts a thread per device. Rejects with a VmmError; close() then still has to be called. */
  async startDevices(machine: MachineFacts, warn: (line: string) => void): Promise<readonly HostedDevice[]> {
    const starting = this.members.map(async ({ device, domain, lane, link }, number) => {
      const { name, model, modelOptions: options, description } = device;
      const dma = { memory: domain.handle.memory, lane };
      const job = { model, options, machine, link, dma };
      const hosted = await HostedDevice.start(name, number, description, job, domain.switchOf(lane), warn);
      this.hosted.push(hosted);
      return hosted;
    });
    const outcomes = await Promise.allSettled(starting);
    return outcomes.map((outcome) => {
      if (outcome.status === "rejected") throw outcome.reason;
      return outcome.value;
    });
  }

  /** What the IOMMUs refused since the last call. */
  read(each: (fault: Fault) => void): void {
    for (const domain of this.byLabel.values()) domain.readFaults(each);
  }

  /** Ends the devices' threads; resolves when all they were given is stored. They are quiet by now. */
  async close(): Promise<void> {
    await Promise.all(this.hosted.map((device) => device.close()));
  }
}
