// From options to a running guest and back to nothing: the one place that knows the order of things. What can be
// checked is checked before anything is touched, and everything is undone in reverse, however the guest ends.

import { closeSync, openSync } from "node:fs";
import { MAX_EXACT } from "../hypercalls/addresses.js";
import {
  createEngineState,
  DOMAIN_KINDS,
  type DomainConfig,
  Engine,
  type EngineConfig,
  type EngineState,
} from "../hypercalls/engine.js";
import { createInjection, Injector } from "../hypercalls/injection.js";
import { acpiTables, PCI_IO_WINDOW } from "./boot/acpi.js";
import { type CpuidEntry, physicalBits, vcpuCpuid } from "./boot/cpuid.js";
import { loadBootImages } from "./boot/image.js";
import { ECAM, type GpaRange, type MemoryPlan, planMemory } from "./boot/layout.js";
import { type BootWrite, prepareLinux } from "./boot/linux.js";
import { Cleanup } from "./cleanup.js";
import { answer, type Controlled, ControlSocket, isInUse } from "./control.js";
import { DeviceWatch, type WatchedDevice } from "./device-watch.js";
import { Console } from "./devices/console.js";
import { addPowerPorts } from "./devices/power.js";
import { attempt, errorMessage, isExpected, VmmError } from "./errors.js";
import { createRam, GuestMemory, type RamDescription, ramBytes } from "./guest-memory.js";
import { ruleOf } from "./inject-spec.js";
import { KernelLog } from "./iommu-faults.js";
import { Kvm } from "./kvm.js";
import { lockableBytes, smallRoom } from "./limits.js";
import { KICK_SIGNAL, Machine, type Outcome } from "./machine.js";
import { errnoName, lockedMemoryLimitBytes, raiseOpenFilesLimit } from "./native/libc.js";
import type { Options } from "./options.js";
import { PciBus } from "./pci/bus.js";
import { VfioPciFunction } from "./pci/vfio-pci.js";
import { defaultStatsDir, StatsDirectory } from "./stats-dir.js";
import { CONSTANT } from "./sys/kvm.js";
import { type Assignment, OpenAssignments, prepareAssignments } from "./vfio/assign.js";
import { VfioBackend } from "./vfio/container.js";
import { DeviceEvents } from "./vfio/events.js";
import { assignableGroup, type Bdf } from "./vfio/sysfs.js";

/** Signals that end the guest in good order. */
const END_SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** A guest that faults so early, so often in a row, will never do anything else. */
const EARLY_FAULT_MS = 1000;
const EARLY_FAULTS_MAX = 5;

/** An assigned device with the options that are about its DMA. */
interface AssignedDevice {
  readonly assignment: Assignment;
  readonly options: Options["assignments"][number];
}

/** What stays the same when the guest reboots. */
interface Guest {
  readonly options: Options;
  readonly kvm: Kvm;
  /** In the order of their handles, which are for good: counters and rules of injection know devices by them. */
  readonly devices: readonly AssignedDevice[];
  /** Those that failed or that the host took back. */
  readonly gone: Set<Bdf>;
  readonly plan: MemoryPlan;
  readonly supportedCpuid: readonly CpuidEntry[];
  readonly ram: RamDescription;
  readonly memory: GuestMemory;
  readonly stats: Statistics;
  readonly ending: Ending;
  /** Rules of failures on demand, with their counts: they go on over a reboot. */
  readonly injection: SharedArrayBuffer;
  /** Devices whose limits were looked at: a reboot does not say it again. */
  readonly warned: Set<string>;
}

/** Wishes to end, from outside the guest: they outlive a reboot, and come at any time. */
class Ending {
  private asked: Outcome | Error | undefined;
  private machine: Machine | undefined;

  /** The first wish counts. */
  ask(outcome: Outcome | Error): void {
    this.asked ??= outcome;
    this.machine?.stop(this.asked);
  }

  /** The machine that a wish is to stop from now on. */
  watch(machine: Machine): void {
    this.machine = machine;
    if (this.asked !== undefined) machine.stop(this.asked);
  }

  /** What was wished, or how the machine ended by itself. */
  outcome(machines: Outcome): Outcome {
    if (this.asked instanceof Error) throw this.asked;
    return this.asked ?? machines;
  }
}

const warn = (line: string): void => {
  process.stderr.write(`vmm: ${line}\n`);
};

/** The numbers of the machine that runs now; they outlive it, so that the last values can be read. */
class Statistics {
  private engine: Engine | undefined;
  private machine: Machine | undefined;
  /** Counters of calls go on over a reboot; those of exits begin anew. */
  lanes: SharedArrayBuffer | undefined;

  constructor(private readonly guestRamBytes: number) {}

  show(engine: Engine, state: EngineState, machine: Machine): void {
    this.engine = engine;
    this.lanes = state.lanes;
    this.machine = machine;
  }

  *read(): Iterable<readonly [string, number]> {
    yield ["memory/ram_bytes", this.guestRamBytes];
    if (this.engine !== undefined) yield* this.engine.stats();
    if (this.machine !== undefined) yield* this.machine.exitStatistics();
  }
}

/** How it ended for good. */
export interface GuestEnd {
  /** Exit status. */
  readonly status: number;
  /** Somebody wants it gone: output that nobody takes is not waited for. */
  readonly atOnce: boolean;
}

/** Runs the guest that the options describe until it ends for good, and gives everything back. */
export async function runGuest(options: Options): Promise<GuestEnd> {
  const cleanup = new Cleanup(warn);
  const ending = new Ending();
  cleanup.add(handleProcessEvents(ending));
  try {
    // 1. Look at everything that can be wrong without touching it.
    const assignments = prepareAssignments(
      options.assignments.map((each) => ({
        bdf: each.bdf,
        ...(each.guestSlot === undefined ? {} : { guestSlot: each.guestSlot }),
        domain: each.ownDomain ? each.bdf : each.policy,
      })),
    );
    const devices = assignments.map((assignment, i) => ({ assignment, options: options.assignments[i]! }));
    loadBootImages(options);

    // 2. KVM, and where everything goes in the guest's address space.
    const kvm = Kvm.open();
    cleanup.add(() => kvm.close());
    const supportedCpuid = kvm.supportedCpuid();
    const plan = planMemory({ memoryBytes: options.memoryBytes, physicalBits: physicalBits(supportedCpuid) });

    // 3. Guest RAM. It stays mapped until the process ends.
    const ram = createRam(plan.ram);
    cleanup.add(() => closeSync(ram.fd));

    raiseOpenFilesLimit();
    const stats = new Statistics(ramBytes(ram));
    const injection = createInjection();
    const controlled = { injector: new Injector(injection), assigned: assignments.map(({ bdf }) => bdf) };
    await openFigures(options, stats, controlled, cleanup);
    if (options.stats) cleanup.add(() => printStatistics(stats));

    const memory = new GuestMemory(ram);
    const guest: Guest = {
      options,
      kvm,
      devices,
      gone: new Set(),
      plan,
      supportedCpuid,
      ram,
      memory,
      stats,
      ending,
      injection,
      warned: new Set(),
    };
    addInjections(options.injections, controlled);
    let earlyFaults = 0;
    for (;;) {
      const outcome = ending.outcome(await runMachine(guest));
      if (outcome.kind === "signal") {
        warn(`ended by ${outcome.signal}`);
        return { status: 1, atOnce: true };
      }
      if (outcome.kind === "triple-fault") {
        earlyFaults = outcome.ranMs < EARLY_FAULT_MS ? earlyFaults + 1 : 0;
        afterTripleFault(outcome.vcpu, earlyFaults, options);
      } else if (outcome.kind === "reset" && options.reboot) earlyFaults = 0;
      else return { status: 0, atOnce: false };
      memory.clear();
      leaveOutGone(guest);
    }
  } finally {
    cleanup.run();
  }
}

/** Rules of the command line: there are no others yet, so there is room for them. */
function addInjections(specs: Options["injections"], { injector, assigned }: Controlled): void {
  for (const spec of specs) injector.add(ruleOf(spec, assigned, "--inject"));
}

/** Says that the guest starts anew, as a PC does after a triple fault; throws a VmmError when it is not to. */
function afterTripleFault(vcpu: number, earlyFaults: number, options: Options): void {
  const what = `guest: triple fault on vCPU ${vcpu}`;
  if (!options.reboot) throw new VmmError(`${what}: it ends`);
  if (earlyFaults === EARLY_FAULTS_MAX) {
    const often = `the ${earlyFaults}th in a row within ${EARLY_FAULT_MS} ms of a start`;
    throw new VmmError(
      `${what}, ${often}: given up; its console may say why (earlyprintk=serial on its command line)`,
    );
  }
  warn(`${what}: it starts anew`);
}

/**
 * The devices the guest starts again without. Between two lives it has none open and is told of no request: the host may
 * have taken one then. That is no reason not to start again with the others. One that is gone stays away: the host may
 * give it to somebody else.
 */
function leaveOutGone({ devices, gone }: Guest): void {
  for (const { assignment } of devices) {
    if (!gone.has(assignment.bdf) && !attempt(() => assignableGroup(assignment.bdf), warn))
      gone.add(assignment.bdf);
  }
  if (gone.size > 0) warn(`the guest starts again without ${[...gone].join(", ")}`);
}

/** The statistics directory, where there is one, and the control socket in it. */
async function openFigures(
  options: Options,
  stats: Statistics,
  controlled: Controlled,
  cleanup: Cleanup,
): Promise<void> {
  const path = options.statsDir ?? defaultStatsDir(process.env, process.pid);
  if (path === undefined) return;
  const asked = options.statsDir !== undefined;
  if (await isInUse(path)) {
    throw new VmmError(`statistics directory ${path}: another VMM uses it; name another with --stats-dir`);
  }
  try {
    const directory = new StatsDirectory(path, asked, () => stats.read(), warn);
    cleanup.add(() => directory.close());
  } catch (error) {
    // Who asked for the files wants them; who did not, wants the guest.
    if (asked || !isExpected(error)) throw error;
    warn(error.message);
    return;
  }
  try {
    const control = await ControlSocket.open(path, (line) => answer(line, controlled));
    cleanup.add(() => control.close());
  } catch (error) {
    // Figures and guest do without it; not every file system has sockets.
    if (!isExpected(error)) throw error;
    warn(`${error.message}; --tell does not reach this guest`);
  }
}

function printStatistics(stats: Statistics): void {
  for (const [name, value] of stats.read()) process.stderr.write(`${name} ${value}\n`);
}

/** One life of the machine, from power-on to power-off or reset. Nothing of it is left afterwards. */
async function runMachine(guest: Guest): Promise<Outcome> {
  const { options, kvm, plan, ram } = guest;
  const devices = guest.devices.filter(({ assignment }) => !guest.gone.has(assignment.bdf));
  const cleanup = new Cleanup(warn);
  try {
    // 4. The VM, its memory, its interrupt controllers.
    const vm = kvm.createVm();
    cleanup.add(() => vm.close());
    const machine = new Machine(kvm, vm);
    guest.ending.watch(machine);
    for (const piece of ram.slots) vm.addMemslot(piece.gpa, piece.bytes, piece.hva);
    addPowerPorts(
      machine,
      () => machine.stop({ kind: "power-off" }),
      () => machine.stop({ kind: "reset" }),
    );

    // 5. The IOMMU: containers and groups. KVM is told before a device is opened.
    const opened = OpenAssignments.open(devices.map((device) => device.assignment));
    cleanup.add(() => opened.close());
    for (const group of opened.groups) vm.addVfioGroup(group.fd);

    // 6. The mapping engine over them. Nothing is mapped, but for devices that get all of RAM.
    const config = engineConfig(guest, opened);
    const fresh = createEngineState(config);
    const lanes = guest.stats.lanes ?? fresh.lanes;
    const state = { ...fresh, lanes, injection: guest.injection };
    const containers = [...opened.containers.values()];
    const containerFds = config.domains.map((_, index) => containers[index]?.fd ?? -1);
    const engine = new Engine(state, (domain) => new VfioBackend(containerFds[domain]!), options.cpus);
    cleanup.add(() => {
      // Nobody can take a lock that a lost thread held; the containers' end undoes every mapping as well.
      if (machine.threadLost) return;
      const stuck = engine.close();
      if (stuck > 0) warn(`${stuck} mappings could not be undone; they end with their IOMMU domain`);
    });
    guest.stats.show(engine, state, machine);
    for (const bdf of guest.gone) engine.removeDevice(handleOf(guest, bdf));
    warnOfSmallRoom(guest, config);
    mapPinned(engine);

    // 7. The devices, reset, on the guest's PCI bus.
    const bus = new PciBus(machine, pciLayout(plan), warn);
    // Undone before the engine is: devices are quiet before anything is unmapped.
    cleanup.add(() => bus.close());
    const watched = opened.openDevices().map((device, i): WatchedDevice => {
      const { bdf, guestSlot } = devices[i]!.assignment;
      const handle = handleOf(guest, bdf);
      const pciFunction = new VfioPciFunction(device, machine, bus.decoder, guestSlot, warn);
      bus.add(guestSlot, pciFunction);
      const events = new DeviceEvents(device);
      cleanup.add(() => events.close());
      return {
        bdf,
        handle,
        events,
        unplug: () => {
          bus.remove(guestSlot);
          pciFunction.lose();
        },
        unmap: () => engine.removeDevice(handle),
        giveBack: () => opened.giveBack(bdf, (group) => vm.removeVfioGroup(group.fd)),
        forget: () => guest.gone.add(bdf),
      };
    });
    bus.start();
    if (watched.length > 0) {
      const watch = new DeviceWatch(watched, KernelLog.open(), (handle) => engine.countFault(handle), warn);
      cleanup.add(() => watch.close());
    }

    // 8. Kernel, initrd and tables into memory; looked at anew, for the files may have been replaced since.
    const images = loadBootImages(options);
    const acpi = acpiTables(options.cpus, plan);
    const start = prepareLinux(images, plan, acpi.rsdp);
    for (const write of [...start.writes, ...acpi.writes]) load(guest.memory, write);

    // 9. The vCPUs run, the terminal is the guest's.
    const terminal = new Console(process.stdin, process.stdout, () => guest.ending.ask({ kind: "left" }));
    terminal.attach(machine.serial);
    cleanup.add(() => terminal.detach());
    const tscDeadline = kvm.capability(CONSTANT.KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    return await machine.run({
      cpus: options.cpus,
      ram,
      engine: state,
      containerFds,
      cpuid: (apicId) => vcpuCpuid(guest.supportedCpuid, { apicId, cpus: options.cpus, tscDeadline }),
      registers: start.registers,
      onSerialOutput: () => terminal.pump(),
      onStop: () => engine.injector.wake(),
    });
  } finally {
    cleanup.run();
  }
}

/** The engine's handle of an assigned device: its place in the list, from 1. */
const handleOf = ({ devices }: Guest, bdf: Bdf): number =>
  1 + devices.findIndex(({ assignment }) => assignment.bdf === bdf);

/** The domain of devices that are gone: nothing can be mapped in it, and no container is behind it. */
const NOWHERE: DomainConfig = {
  kind: "translated",
  limits: { ranges: [{ first: 0, last: MAX_EXACT }], pageSizeMask: MAX_EXACT, entries: 0 },
};

function engineConfig(guest: Guest, opened: OpenAssignments): EngineConfig {
  const labels = [...opened.containers.keys()];
  const policyOf = (label: string) =>
    guest.devices.find((device) => device.assignment.domain === label)!.options.policy;
  const domains = [...opened.containers].map(
    ([label, container]): DomainConfig => ({
      kind: DOMAIN_KINDS[policyOf(label)]!,
      limits: container.limits(),
    }),
  );
  return {
    ram: guest.ram.slots.map(({ gpa, bytes, hva }) => ({ gpa, bytes, hva })),
    domains: [...domains, ...(guest.gone.size > 0 ? [NOWHERE] : [])],
    devices: guest.devices.map(({ assignment, options }) => {
      const gone = guest.gone.has(assignment.bdf);
      const domain = gone ? domains.length : labels.indexOf(assignment.domain);
      return {
        name: assignment.bdf,
        bdf: assignment.guestSlot << 3,
        policy: gone ? "strict" : options.policy,
        domain,
        addressBits: addressBits((domains[domain] ?? NOWHERE).limits.ranges),
        quotaBytes: options.limitBytes,
      };
    }),
    quotaBytes: guest.options.limitBytes,
    lockableBytes: lockableBytes(),
    lanes: guest.options.cpus + 1,
  };
}

/** Says, once, which devices have so little room for mappings that their drivers will hardly probe. */
function warnOfSmallRoom(guest: Guest, { devices, domains, quotaBytes, lockableBytes }: EngineConfig): void {
  for (const { name, domain, quotaBytes: own } of devices) {
    const { kind, limits } = domains[domain]!;
    if (kind !== "translated" || guest.warned.has(name)) continue;
    guest.warned.add(name);
    const room = { entries: limits.entries, quotaBytes: own, vmQuotaBytes: quotaBytes, lockableBytes };
    for (const line of smallRoom(room, guest.options.cpus)) warn(`${name}: ${line}`);
  }
}

/** Bits of an IOVA: those of the last address the IOMMU translates. */
function addressBits(ranges: readonly { readonly last: number }[]): number {
  const last = Math.max(0, ...ranges.map((range) => range.last));
  return Math.ceil(Math.log2(last + 1));
}

/** Pins and maps all of RAM for the devices whose policy says so. */
function mapPinned(engine: Engine): void {
  const failure = engine.mapIdentity();
  if (failure === undefined) return;
  const limit = lockedMemoryLimitBytes();
  const advice =
    errnoName(failure.errno) === "ENOMEM" && Number.isFinite(limit)
      ? `the limit of locked memory is ${limit} bytes: raise it (ulimit -l) or use --dma strict`
      : "use --dma strict, which pins only what is in use";
  throw new VmmError(
    `--dma pinned: ${failure.bytes} bytes of RAM at gpa 0x${failure.gpa.toString(16)} cannot be pinned and mapped ` +
      `(${errnoName(failure.errno)}); ${advice}`,
  );
}

function pciLayout(plan: MemoryPlan): ConstructorParameters<typeof PciBus>[1] {
  const window = ({ gpa, bytes }: GpaRange) => ({ first: gpa, last: gpa + bytes - 1 });
  return { ecam: ECAM.gpa, mmio32: window(plan.mmio32), mmio64: window(plan.mmio64), io: PCI_IO_WINDOW };
}

function load(memory: GuestMemory, write: BootWrite): void {
  if ("data" in write) {
    memory.write(write.gpa, write.data);
    return;
  }
  const { path, fileOffset, bytes } = write.extent;
  const file = openSync(path, "r");
  try {
    memory.load(write.gpa, file, fileOffset, bytes);
  } catch (error) {
    throw new VmmError(`${path}: cannot be copied to guest memory: ${errorMessage(error)}`);
  } finally {
    closeSync(file);
  }
}

/**
 * What can come from outside at any time: signals that ask to end, the kick of vCPUs (it only needs a handler), a
 * terminal that goes away, and, should there be a bug, an exception nobody caught: the devices are given back all the
 * same. Returns what undoes it.
 */
function handleProcessEvents(ending: Ending): () => void {
  const nothing = () => undefined;
  const onSignal = (signal: NodeJS.Signals) => ending.ask({ kind: "signal", signal });
  const onException = (error: Error) => ending.ask(error);
  process.on(KICK_SIGNAL, nothing).on("uncaughtException", onException);
  for (const signal of END_SIGNALS) process.on(signal, onSignal);
  for (const stream of [process.stdin, process.stdout, process.stderr]) stream.on("error", nothing);
  return () => {
    process.off(KICK_SIGNAL, nothing).off("uncaughtException", onException);
    for (const signal of END_SIGNALS) process.off(signal, onSignal);
  };
}
