// From --assign to open devices, in three steps: validate everything (sysfs only), open containers and groups, open the
// devices. KVM has to be told of the groups between the last two. A failure closes whatever was open.

import { forEachAnyway } from "../cleanup.js";
import { forDevice, VmmError } from "../errors.js";
import { assignSlots } from "../pci/slots.js";
import { VfioContainer, VfioGroup } from "./container.js";
import type { VfioDevice } from "./device.js";
import { assignableGroup, type Bdf } from "./sysfs.js";

export interface AssignRequest {
  readonly bdf: Bdf;
  /** 1 to 31; the lowest that is free when absent. */
  readonly guestSlot?: number;
  /** Devices with the same label share an IOMMU domain. For one of its own, use the BDF. */
  readonly domain?: string;
}

/** A request that can be met, as far as sysfs knows. */
export interface Assignment {
  readonly bdf: Bdf;
  /** IOMMU group. */
  readonly group: number;
  readonly guestSlot: number;
  readonly domain: string;
}

const SHARED_DOMAIN = "shared";

/** Checks all requests before anything is touched. Throws a VmmError for the first that cannot be met, a
 * UsageError for requests that contradict each other. */
export function prepareAssignments(
  requests: readonly AssignRequest[],
  options: { readonly sysfs?: string; readonly takenSlots?: ReadonlySet<number> } = {},
): Assignment[] {
  const slots = assignSlots(
    requests.map(({ bdf, guestSlot }) => ({ name: bdf, ...(guestSlot === undefined ? {} : { guestSlot }) })),
    options.takenSlots,
  );
  const domainOf = new Map<number, { readonly bdf: Bdf; readonly domain: string }>();
  return requests.map(({ bdf, domain = SHARED_DOMAIN }, index) => {
    const group = assignableGroup(bdf, options.sysfs);
    const first = domainOf.get(group) ?? { bdf, domain };
    domainOf.set(group, first);
    if (first.domain !== domain) {
      throw new VmmError(
        `${bdf}: shares IOMMU group ${group} with ${first.bdf}, so both have to be in one domain; give them the same policy, and neither domain=own`,
      );
    }
    return { bdf, group, guestSlot: slots[index]!, domain };
  });
}

export class OpenAssignments {
  private readonly byLabel = new Map<string, VfioContainer>();
  private readonly byNumber = new Map<number, VfioGroup>();
  private readonly devices = new Map<Bdf, VfioDevice>();

  private constructor(private readonly assignments: readonly Assignment[]) {}

  /** Opens the containers and groups below `dev` (/dev), but no device yet. Throws a VmmError; a DeviceError for a group. */
  static open(assignments: readonly Assignment[], options: { readonly dev?: string } = {}): OpenAssignments {
    const opened = new OpenAssignments(assignments);
    try {
      for (const { bdf, group: number, domain } of assignments) {
        if (opened.byNumber.has(number)) continue;
        const container = opened.byLabel.get(domain) ?? VfioContainer.open(options.dev);
        opened.byLabel.set(domain, container);
        forDevice(bdf, () => {
          const group = VfioGroup.open(number, bdf, options.dev);
          opened.byNumber.set(number, group);
          container.attach(group.fd, bdf);
        });
      }
      return opened;
    } catch (error) {
      opened.close();
      throw error;
    }
  }

  /** By domain label. */
  get containers(): ReadonlyMap<string, VfioContainer> {
    return this.byLabel;
  }

  /** Each once; KVM wants their fds. */
  get groups(): readonly VfioGroup[] {
    return [...this.byNumber.values()];
  }

  /** Opens the devices, in the order of the assignments. Throws a DeviceError; close() then still has to be called. */
  openDevices(): readonly VfioDevice[] {
    return this.assignments.map(({ bdf, group }) => {
      const device = forDevice(bdf, () => this.byNumber.get(group)!.openDevice(bdf));
      this.devices.set(bdf, device);
      return device;
    });
  }

  /**
   * Gives one device back to the host while the others stay: nothing of it is used any more, and what was mapped for it
   * alone is unmapped. With the last of its IOMMU group the group leaves the container: from then on nothing of that
   * group reaches what is mapped for others (all of RAM, in an identity domain). While another device of the group is
   * assigned, the IOMMU cannot tell the two apart, and what keeps this one quiet is that the kernel turns off bus
   * mastering, and where it can resets it, when its file is closed. `letGo` is called before the group is closed: a
   * kernel of 6.1 lets the host's unbind wait until everybody who holds the group's file, KVM too, has closed it.
   * The container stays open, for vCPUs' threads know its file by number.
   */
  giveBack(bdf: Bdf, letGo: (group: VfioGroup) => void): void {
    this.devices.get(bdf)?.close();
    this.devices.delete(bdf);
    const number = this.assignments.find((assignment) => assignment.bdf === bdf)!.group;
    const group = this.byNumber.get(number);
    const shared = this.assignments.some((other) => other.group === number && this.devices.has(other.bdf));
    if (group === undefined || shared) return;
    this.byNumber.delete(number);
    forEachAnyway([() => letGo(group), () => group.detach(), () => group.close()], (step) => step());
  }

  /** Closes devices that are still open, then groups and containers, and with them every mapping. */
  close(): void {
    const all = [...this.devices.values(), ...this.byNumber.values(), ...this.byLabel.values()];
    this.devices.clear();
    this.byNumber.clear();
    this.byLabel.clear();
    forEachAnyway(all, (each) => each.close());
  }
}
