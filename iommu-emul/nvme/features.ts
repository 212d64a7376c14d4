// Features (5.21.1): what the guest set and gets back, checked. Values are a feature's word 11. Those that have an
// effect elsewhere are asked for by name. Nothing here does DMA; the timestamp's 8 bytes go through the caller.

import { FEATURE, NSID, NSID_ALL, STATUS, TEMPERATURE } from "./spec.js";

/** Bits of each feature that exist here; others are reserved and must be 0. Those not listed are set elsewhere. */
const BITS: Readonly<Record<number, number>> = {
  [FEATURE.arbitration]: 0xffff_ff07,
  [FEATURE.powerManagement]: 0xff,
  [FEATURE.temperatureThreshold]: 0x003f_ffff,
  [FEATURE.errorRecovery]: 0x0001_ffff,
  [FEATURE.writeCache]: 1,
  [FEATURE.interruptCoalescing]: 0xffff,
  [FEATURE.interruptVector]: 0x0001_ffff,
  [FEATURE.writeAtomicity]: 1,
  [FEATURE.asyncEvents]: 0x7fff,
};

const DEFAULTS: Readonly<Record<number, number>> = {
  [FEATURE.arbitration]: 4,
  [FEATURE.powerManagement]: 0,
  [FEATURE.errorRecovery]: 0,
  [FEATURE.writeCache]: 1,
  [FEATURE.interruptCoalescing]: 0,
  [FEATURE.writeAtomicity]: 0,
  [FEATURE.asyncEvents]: 0,
};

/** THSEL, bits 21:20. */
const THRESHOLD = { over: 0, under: 1 } as const;
/** SEL of Get Features (figure 177). */
const SELECT = { current: 0, default: 1, saved: 2, capabilities: 3 } as const;
const CHANGEABLE = 4;
const PER_NAMESPACE = 2;

export interface FeatureAnswer {
  readonly status: number;
  readonly result: number;
}
const failed = (status: number): FeatureAnswer => ({ status, result: 0 });

export class Features {
  readonly #ioQueues: number;
  readonly #values = new Map<number, number>();
  /** Vectors whose interrupts are not to be coalesced. */
  readonly #uncoalesced = new Set<number>();
  #over: number = TEMPERATURE.warning;
  #under = 0;
  #timestampMs = 0;
  #timestampSetAt = 0;
  #timestampByHost = false;

  constructor(ioQueues: number) {
    this.#ioQueues = ioQueues;
    this.reset();
  }

  reset(): void {
    for (const [feature, value] of Object.entries(DEFAULTS)) this.#values.set(Number(feature), value);
    this.#uncoalesced.clear();
    this.#over = TEMPERATURE.warning;
    this.#under = 0;
    this.#timestampMs = 0;
    this.#timestampSetAt = performance.now();
    this.#timestampByHost = false;
  }

  /** Writes may stay in the page cache until a flush. */
  get writeCache(): boolean {
    return this.#values.get(FEATURE.writeCache) === 1;
  }

  /** Temperature is outside of the thresholds. */
  get temperatureWarning(): boolean {
    return TEMPERATURE.composite >= this.#over || TEMPERATURE.composite <= this.#under;
  }

  /** Critical warnings of which the guest wants an event. */
  get eventWarnings(): number {
    return this.#values.get(FEATURE.asyncEvents)! & 0xff;
  }

  /** Set Features with word 11 `value`. `queuesExist`: I/O queues were made. */
  set(feature: number, namespace: number, value: number, queuesExist: boolean): FeatureAnswer {
    if (feature === FEATURE.errorRecovery) {
      if (namespace !== NSID && namespace !== NSID_ALL) return failed(STATUS.invalidNamespace);
    } else if (namespace === NSID) {
      return failed(this.#exists(feature) ? STATUS.notPerNamespace : STATUS.invalidField);
    } else if (namespace !== 0 && namespace !== NSID_ALL) {
      return failed(STATUS.invalidNamespace);
    }
    if (feature === FEATURE.queues) {
      if (queuesExist) return failed(STATUS.commandSequence);
      if ((value & 0xffff) === 0xffff || value >>> 16 === 0xffff) return failed(STATUS.invalidField);
      return { status: STATUS.ok, result: this.#queueCounts() };
    }
    const bits = BITS[feature];
    if (bits === undefined || (value & ~bits) !== 0) return failed(STATUS.invalidField);
    switch (feature) {
      case FEATURE.powerManagement:
        // Power state 0 is the only one; a workload hint is a hint.
        if ((value & 0x1f) !== 0) return failed(STATUS.invalidField);
        break;
      case FEATURE.temperatureThreshold:
        return failed(this.#setThreshold(value));
      case FEATURE.errorRecovery:
        // DULBE: no error for deallocated blocks (NSFEAT says so).
        if (value >>> 16 !== 0) return failed(STATUS.invalidField);
        break;
      case FEATURE.interruptVector: {
        const vector = value & 0xffff;
        if (vector > this.#ioQueues) return failed(STATUS.invalidField);
        if (value >>> 16 === 1) this.#uncoalesced.add(vector);
        else this.#uncoalesced.delete(vector);
        return failed(STATUS.ok);
      }
    }
    this.#values.set(feature, value);
    return failed(STATUS.ok);
  }

  /** Get Features: SEL, and word 11. */
  get(feature: number, namespace: number, select: number, argument: number): FeatureAnswer {
    if (!this.#exists(feature) || select > SELECT.capabilities) return failed(STATUS.invalidField);
    const perNamespace = feature === FEATURE.errorRecovery;
    if (perNamespace && namespace !== NSID && (namespace !== NSID_ALL || select !== SELECT.capabilities)) {
      return failed(STATUS.invalidNamespace);
    }
    if (!perNamespace && namespace > NSID && namespace !== NSID_ALL) return failed(STATUS.invalidNamespace);
    if (select === SELECT.capabilities) {
      return { status: STATUS.ok, result: CHANGEABLE | (perNamespace ? PER_NAMESPACE : 0) };
    }
    const current = select === SELECT.current;
    switch (feature) {
      case FEATURE.queues:
        return { status: STATUS.ok, result: this.#queueCounts() };
      case FEATURE.timestamp:
        return failed(STATUS.ok);
      case FEATURE.temperatureThreshold: {
        const which = (argument >>> 20) & 3;
        // Sensors 1 to 8 are not there; the composite is 0.
        if (which > THRESHOLD.under || ((argument >>> 16) & 0xf) !== 0) return failed(STATUS.invalidField);
        if (which === THRESHOLD.under) return { status: STATUS.ok, result: current ? this.#under : 0 };
        return { status: STATUS.ok, result: current ? this.#over : TEMPERATURE.warning };
      }
      case FEATURE.interruptVector: {
        const vector = argument & 0xffff;
        if (vector > this.#ioQueues) return failed(STATUS.invalidField);
        return {
          status: STATUS.ok,
          result: vector | (current && this.#uncoalesced.has(vector) ? 1 << 16 : 0),
        };
      }
    }
    return { status: STATUS.ok, result: current ? this.#values.get(feature)! : DEFAULTS[feature]! };
  }

  /** Timestamp (5.21.1.14): milliseconds since 1970, 48 bits. */
  setTimestamp(bytes: Buffer): void {
    this.#timestampMs = bytes.readUIntLE(0, 6);
    this.#timestampSetAt = performance.now();
    this.#timestampByHost = true;
  }
  timestamp(into: Buffer): void {
    const now = this.#timestampMs + Math.floor(performance.now() - this.#timestampSetAt);
    into.writeUIntLE(now % 2 ** 48, 0, 6);
    // Origin, bits 3:1 of byte 6: cleared by a reset, or set by the host.
    into[6] = this.#timestampByHost ? 1 << 1 : 0;
    into[7] = 0;
  }

  #exists(feature: number): boolean {
    return BITS[feature] !== undefined || feature === FEATURE.queues || feature === FEATURE.timestamp;
  }

  /** As many as there are, whatever was asked for; 0's based, completion queues in the high half. */
  #queueCounts(): number {
    return (this.#ioQueues - 1) | ((this.#ioQueues - 1) << 16);
  }

  #setThreshold(value: number): number {
    const sensor = (value >>> 16) & 0xf;
    const which = (value >>> 20) & 3;
    // Sensor Fh is all that are there.
    if ((sensor !== 0 && sensor !== 0xf) || which > THRESHOLD.under) return STATUS.invalidField;
    if (which === THRESHOLD.over) this.#over = value & 0xffff;
    else this.#under = value & 0xffff;
    return STATUS.ok;
  }
}
