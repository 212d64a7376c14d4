// One machine, from power-on to power-off: the KVM VM, its vCPUs' Workers, the bus of trapped accesses, the serial
// port. What is plugged into it (PCI devices) and what it boots come from run-guest.ts. Main thread.

import { closeSync } from "node:fs";
import { Worker } from "node:worker_threads";
import type { Gpa, Hva } from "../hypercalls/addresses.js";
import type { EngineState } from "../hypercalls/engine.js";
import { COM1, gsiOfPin } from "./boot/acpi.js";
import type { CpuidEntry } from "./boot/cpuid.js";
import { KVM_IDENTITY_MAP_GPA, KVM_TSS_GPA } from "./boot/layout.js";
import type { BootRegisters } from "./boot/linux.js";
import { newConfigAddress } from "./devices/config-ports.js";
import { newSerialState, Serial } from "./devices/serial.js";
import type { BackendHandle } from "./dma-backend.js";
import type { LinkState } from "./emul/link.js";
import { RegisterMap } from "./emul/register-map.js";
import { VmmError } from "./errors.js";
import type { RamDescription } from "./guest-memory.js";
import type { IoHandler } from "./io-bus.js";
import { IoBus } from "./io-bus.js";
import { irqLine } from "./irq-line.js";
import type { Kvm, Vm } from "./kvm.js";
import { mmapShared, munmap, PROT_READ, PROT_WRITE, signalThread } from "./native/libc.js";
import type { PciMachine, RegisterTarget } from "./pci/machine-interface.js";
import { RunArea } from "./run-area.js";
import { newSlowExitLane, type SlowAccess, serveSlowExit } from "./slow-exit.js";
import type { TableDescription } from "./tracking-table.js";
import {
  CONTROL_STOP,
  CONTROL_TID,
  controlWords,
  EXIT_KINDS,
  exitCounters,
  newVcpuControl,
  RING_SERIAL,
  RING_SLOW_EXIT,
  type VcpuEnd,
  type VcpuJob,
  type VcpuMessage,
} from "./vcpu-link.js";
import { setBootRegisters, setCpuid, setLocalApicPins, setMsrs } from "./vcpu-state.js";

/** Why the machine stopped. */
export type Outcome =
  | { readonly kind: "power-off" | "reset" | "left" }
  /** This vCPU could not go on, `ranMs` after its start: a CPU then shuts down, and a machine resets. */
  | { readonly kind: "triple-fault"; readonly vcpu: number; readonly ranMs: number }
  | { readonly kind: "signal"; readonly signal: NodeJS.Signals };

/** Sent to a vCPU's thread to bring it out of KVM_RUN. run-guest.ts installs a handler that does nothing. */
export const KICK_SIGNAL = "SIGUSR2";
const KICK_SIGNAL_NUMBER = 12;
/** A signal that found the thread outside of what it is to interrupt is sent again. */
const KICK_PERIOD_MS = 50;

export interface MachineConfig {
  readonly cpus: number;
  readonly ram: RamDescription;
  readonly engine: EngineState;
  /** What is behind each DMA domain. */
  readonly backends: readonly BackendHandle[];
  /** The tracking tables of those that are cached. */
  readonly tables: readonly (TableDescription | undefined)[];
  /** The links of the emulated devices, by their numbers. */
  readonly emulated: readonly LinkState[];
  readonly cpuid: (apicId: number) => readonly CpuidEntry[];
  readonly registers: BootRegisters;
  /** The guest wrote to the serial port. */
  readonly onSerialOutput: () => void;
  /**
   * The vCPUs are to stop: whatever a hypercall waits for is not to be waited for, and output that the terminal takes is not
   * to be in the way. Called again until they have.
   */
  readonly onStop: () => void;
}

interface RunningVcpu {
  readonly run: RunArea;
  readonly runAddress: Hva;
  readonly runBytes: number;
  readonly control: SharedArrayBuffer;
  readonly worker: Worker;
  readonly ended: Promise<void>;
}

export class Machine implements PciMachine {
  readonly ports = new IoBus();
  private readonly mmio = new IoBus();
  private readonly registers = new RegisterMap();
  private readonly serialState = newSerialState();
  private readonly configAddress = newConfigAddress();
  readonly serial: Serial;
  private readonly vcpuFds: number[] = [];
  private readonly vcpus: RunningVcpu[] = [];
  private readonly end: Promise<Outcome | Error>;
  /** A vCPU's thread ended without its last word (out of memory, say) and may have left a lock held. */
  threadLost = false;
  private settle: (outcome: Outcome | Error) => void = () => undefined;

  constructor(
    private readonly kvm: Kvm,
    readonly vm: Vm,
  ) {
    vm.createInterruptControllers(KVM_TSS_GPA, KVM_IDENTITY_MAP_GPA);
    this.serial = new Serial(this.serialState, irqLine(vm.fd, COM1.gsi), () => undefined);
    this.end = new Promise((resolve) => {
      this.settle = resolve;
    });
  }

  // What PCI devices ask of the machine.
  addMemslot(gpa: Gpa, bytes: number, hva: Hva): number {
    return this.vm.addMemslot(gpa, bytes, hva);
  }
  removeMemslot(slot: number): void {
    this.vm.removeMemslot(slot);
  }
  addMmio(gpa: Gpa, bytes: number, handler: IoHandler): void {
    this.mmio.add(gpa, bytes, handler);
  }
  removeMmio(gpa: Gpa): void {
    this.mmio.remove(gpa);
  }
  addRegisters(gpa: Gpa, bytes: number, { device, bar }: RegisterTarget): void {
    this.registers.add(gpa, bytes, device, bar);
  }
  removeRegisters(gpa: Gpa): void {
    this.registers.remove(gpa);
  }
  addPio(port: number, count: number, handler: IoHandler): void {
    this.ports.add(port, count, handler);
  }
  removePio(port: number): void {
    this.ports.remove(port);
  }
  allocateGsi(): number {
    return this.vm.allocateGsi();
  }
  freeGsi(gsi: number): void {
    this.vm.freeGsi(gsi);
  }
  setMsiRoute(gsi: number, addressLo: number, addressHi: number, data: number): void {
    this.vm.setMsiRoute(gsi, addressLo, addressHi, data);
  }
  clearRoute(gsi: number): void {
    this.vm.clearMsiRoute(gsi);
  }
  irqfd(gsi: number, eventfd: number, assign: boolean, resampleFd?: number): void {
    this.vm.irqfd(gsi, eventfd, assign, resampleFd);
  }
  intxGsi(slot: number, pin: number): number {
    return gsiOfPin(slot, pin - 1);
  }

  /**
   * Runs the guest until it powers off, resets, or stop() is called; then no vCPU runs any more. Throws a VmmError
   * when the guest cannot go on. Once per machine.
   */
  async run(config: MachineConfig): Promise<Outcome> {
    try {
      // All vCPUs exist before the first runs: the guest's first look at the others finds them there.
      for (let index = 0; index < config.cpus; index++) this.vcpuFds.push(this.createVcpu(index, config));
      for (const [index, fd] of this.vcpuFds.entries()) this.vcpus.push(this.startVcpu(index, fd, config));
      const outcome = await this.end;
      if (outcome instanceof Error) throw outcome;
      return outcome;
    } finally {
      await this.stopVcpus(config.onStop);
    }
  }

  /** Ends run(), also one that has not begun, with this outcome or by throwing the error. The first call wins. */
  stop(outcome: Outcome | Error): void {
    this.settle(outcome);
  }

  /** Exits to this program so far: vcpus/N/exits/KIND. */
  *exitStatistics(): Iterable<readonly [string, number]> {
    for (const [index, { control }] of this.vcpus.entries()) {
      const counters = exitCounters(control);
      for (const [kind, name] of EXIT_KINDS.entries())
        yield [`vcpus/${index}/exits/${name}`, counters[kind]!];
    }
  }

  private createVcpu(index: number, config: MachineConfig): number {
    const fd = this.vm.createVcpu(index);
    setCpuid(fd, config.cpuid(index));
    setMsrs(fd);
    setLocalApicPins(fd);
    if (index === 0) setBootRegisters(fd, config.registers);
    return fd;
  }

  private startVcpu(index: number, fd: number, config: MachineConfig): RunningVcpu {
    const runBytes = this.kvm.runBytes();
    const runAddress = mmapShared(fd, runBytes, 0, PROT_READ | PROT_WRITE);
    const control = newVcpuControl();
    const slowExits = newSlowExitLane();
    const job: VcpuJob = {
      index,
      vmFd: this.vm.fd,
      vcpuFd: fd,
      runAddress,
      runBytes,
      ram: config.ram,
      engine: config.engine,
      backends: config.backends,
      tables: config.tables,
      registerMap: this.registers.memory,
      emulated: config.emulated,
      serial: this.serialState,
      configAddress: this.configAddress,
      slowExits,
      control,
    };
    // Mapped until the Worker has ended; kick() is the only other user.
    const run = new RunArea(runAddress, runBytes);
    const worker = new Worker(new URL("./vcpu.js", import.meta.url), { workerData: job });
    const ended = new Promise<void>((resolve) => {
      let lastWord = false;
      let why = "its thread ended without a word";
      worker.on("message", (message: VcpuMessage) => {
        if (message === RING_SLOW_EXIT) this.serveSlowExit(slowExits);
        else if (message === RING_SERIAL) config.onSerialOutput();
        else {
          lastWord = true;
          this.vcpuEnded(index, message);
        }
      });
      worker.on("error", (error) => {
        why = error.message;
      });
      worker.on("exit", () => {
        if (!lastWord) {
          this.threadLost = true;
          this.vcpuEnded(index, { kind: "failed", why });
        }
        resolve();
      });
    });
    return { run, runAddress, runBytes, control, worker, ended };
  }

  private vcpuEnded(index: number, end: VcpuEnd): void {
    if (end.kind === "triple-fault") this.stop({ kind: "triple-fault", vcpu: index, ranMs: end.ranMs });
    else if (end.kind === "failed") this.stop(new VmmError(`vCPU ${index}: ${end.why}`));
  }

  private serveSlowExit(lane: SharedArrayBuffer): void {
    try {
      serveSlowExit(lane, (kind: SlowAccess, address, bytes, low, high) => {
        const bus = kind === "pio-read" || kind === "pio-write" ? this.ports : this.mmio;
        if (kind === "pio-read" || kind === "mmio-read") return bus.read(address, bytes);
        bus.write(address, bytes, low, high);
        return [0, 0];
      });
    } catch (error) {
      this.stop(error instanceof Error ? error : new Error(String(error)));
    }
  }

  /** Brings every vCPU out of the guest and its thread to an end, whatever the vCPU does. */
  private async stopVcpus(onStop: () => void): Promise<void> {
    let byForce = false;
    const kick = () => {
      for (const { control, run } of this.vcpus) {
        const words = controlWords(control);
        // First: whoever acts on the stop word, by a made-up answer of a device, must not get into the guest with it.
        run.immediateExit = 1;
        Atomics.store(words, CONTROL_STOP, 1);
        const tid = Atomics.load(words, CONTROL_TID);
        if (tid !== 0) signalThread(tid, KICK_SIGNAL_NUMBER);
      }
      onStop();
      this.serial.dropIfFull();
      if (this.threadLost && !byForce) {
        // Who waits for a lock that the lost thread held waits for ever, and looks at no word.
        byForce = true;
        for (const { worker } of this.vcpus) void worker.terminate();
      }
    };
    kick();
    const again = setInterval(kick, KICK_PERIOD_MS);
    await Promise.all(this.vcpus.map((vcpu) => vcpu.ended));
    clearInterval(again);
    // The mapping holds the vCPU's file, and that the VM: kept, every reboot would leave a whole VM behind.
    for (const { runAddress, runBytes } of this.vcpus) munmap(runAddress, runBytes);
    for (const fd of this.vcpuFds) closeSync(fd);
  }
}
