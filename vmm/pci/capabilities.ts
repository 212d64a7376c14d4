// Capabilities as every function of ours shows them, whoever is behind it: the chain, power management, and the
// registers of MSI and MSI-X. Configuration space only; what the settings mean for the machine is in msi.ts and msix.ts.

import type { Width } from "../io-bus.js";
import type { ConfigSpace } from "./config-space.js";
import type { Msi } from "./msi.js";
import { PCI } from "./registers.js";

export interface Capability {
  readonly id: number;
  /** Its first byte; 0: there is none. */
  readonly at: number;
}

/** Chains the capabilities that are there, in ascending order. */
export function linkCapabilities(config: ConfigSpace, capabilities: readonly Capability[]): void {
  let next = 0;
  for (const { id, at } of capabilities.filter((each) => each.at !== 0).sort((a, b) => b.at - a.at)) {
    config.set(at, 1, id);
    config.set(at + PCI.PCI_CAP_LIST_NEXT, 1, next);
    next = at;
  }
  config.set(PCI.PCI_CAPABILITY_LIST, 1, next);
}

/** Power states are the guest's to set, but the device stays in D0: it has to answer at any time. No wake-up. */
export function setPm(config: ConfigSpace, at: number, capabilities: number): void {
  config.set(at + PCI.PCI_PM_PMC, 2, capabilities & ~PCI.PCI_PM_CAP_PME_MASK);
  config.set(at + PCI.PCI_PM_CTRL, 2, PCI.PCI_PM_CTRL_NO_SOFT_RESET, PCI.PCI_PM_CTRL_STATE_MASK);
}

/** A function's MSI-X registers; `table` and `pba` are offset and BAR, as the registers have them. */
export function setMsix(config: ConfigSpace, at: number, vectors: number, table: number, pba: number): void {
  const writable = PCI.PCI_MSIX_FLAGS_ENABLE | PCI.PCI_MSIX_FLAGS_MASKALL;
  config.set(at + PCI.PCI_MSIX_FLAGS, 2, vectors - 1, writable);
  config.set(at + PCI.PCI_MSIX_TABLE, 4, table);
  config.set(at + PCI.PCI_MSIX_PBA, 4, pba);
}

const msiMaskAt = (wide: boolean): number => (wide ? PCI.PCI_MSI_MASK_64 : PCI.PCI_MSI_MASK_32);

/** Bytes of an MSI capability with this layout. */
export const msiCapabilityBytes = (wide: boolean, maskable: boolean): number =>
  msiMaskAt(wide) + (maskable ? 8 : 0);

/** A function's MSI registers, and the settings in them. */
export class MsiCapability {
  private readonly maskAt: number;

  /** `log2`: vectors are 2 to this power, 0 to 5. `wide`: addresses of 64 bits; `maskable`: a mask bit per vector. */
  constructor(
    private readonly config: ConfigSpace,
    readonly at: number,
    log2: number,
    private readonly wide: boolean,
    private readonly maskable: boolean,
    private readonly msi: Msi,
  ) {
    this.maskAt = at + msiMaskAt(wide);
    const layout = (wide ? PCI.PCI_MSI_FLAGS_64BIT : 0) | (maskable ? PCI.PCI_MSI_FLAGS_MASKBIT : 0);
    const writable = PCI.PCI_MSI_FLAGS_ENABLE | PCI.PCI_MSI_FLAGS_QSIZE;
    config.set(at + PCI.PCI_MSI_FLAGS, 2, layout | (log2 << 1), writable);
    config.set(at + PCI.PCI_MSI_ADDRESS_LO, 4, 0, 0xfffffffc);
    if (wide) config.set(at + PCI.PCI_MSI_ADDRESS_HI, 4, 0, 0xffffffff);
    config.set(this.dataAt, 2, 0, 0xffff);
    if (maskable) config.set(this.maskAt, 4, 0, 2 ** (2 ** log2) - 1);
  }

  private get dataAt(): number {
    return this.at + (this.wide ? PCI.PCI_MSI_DATA_64 : PCI.PCI_MSI_DATA_32);
  }

  get enabled(): boolean {
    return (this.config.read(this.at + PCI.PCI_MSI_FLAGS, 2) & PCI.PCI_MSI_FLAGS_ENABLE) !== 0;
  }

  /** Whether a write there may change settings. */
  touchedBy(register: number, width: Width): boolean {
    const end = this.maskAt + (this.maskable ? 4 : 0);
    return register < end && this.at < register + width;
  }

  /** Brings the machine to the settings. */
  apply(): void {
    const flags = this.config.read(this.at + PCI.PCI_MSI_FLAGS, 2);
    this.msi.apply({
      enabled: (flags & PCI.PCI_MSI_FLAGS_ENABLE) !== 0,
      count: 2 ** Math.min((flags & PCI.PCI_MSI_FLAGS_QSIZE) >> 4, 5),
      message: {
        lo: this.config.read(this.at + PCI.PCI_MSI_ADDRESS_LO, 4),
        hi: this.wide ? this.config.read(this.at + PCI.PCI_MSI_ADDRESS_HI, 4) : 0,
        data: this.config.read(this.dataAt, 2),
      },
      mask: this.maskable ? this.config.read(this.maskAt, 4) : 0,
    });
  }

  /** No interrupts, whatever the registers say. */
  off(): void {
    this.msi.apply({ enabled: false, count: 0, message: { lo: 0, hi: 0, data: 0 }, mask: 0 });
  }

  /** Fetches the pending bits, when the read is of them. */
  refresh(register: number, width: Width): void {
    const at = this.maskAt + 4;
    if (this.maskable && register < at + 4 && at < register + width)
      this.config.set(at, 4, this.msi.pending());
  }
}

/** What a function's MSI-X flags say. */
export function msixFlags(config: ConfigSpace, at: number): { enabled: boolean; masked: boolean } {
  const flags = config.read(at + PCI.PCI_MSIX_FLAGS, 2);
  return {
    enabled: (flags & PCI.PCI_MSIX_FLAGS_ENABLE) !== 0,
    masked: (flags & PCI.PCI_MSIX_FLAGS_MASKALL) !== 0,
  };
}
