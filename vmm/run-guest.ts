// From options to a running guest and back to nothing: the one place that knows the order of things. What can be
// checked is checked before anything is touched, and everything is undone in reverse, however the guest ends.

import { closeSync, openSync } from "node:fs";
import { setImmediate } from "node:timers/promises";
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
import type { DeviceName } from "./device-name.js";
import { DeviceWatch, type WatchedDevice } from "./device-watch.js";
import { Console } from "./devices/console.js";
import { addPowerPorts } from "./devices/power.js";
import { type BackendHandle, openBackend } from "./dma-backend.js";
import { checkEmulated, type EmulatedDevice, OpenEmulated, prepareEmulated } from "./emul/assign.js";
import { attempt, DeviceError, errorMessage, forDevice, isExpected, VmmError } from "./errors.js";
import { createRam, GuestMemory, noLargePages, type RamDescription, ramBytes } from "./guest-memory.js";
import { ruleOf } from "./inject-spec.js";
import { KernelLog, loggedFaults } from "./iommu-faults.js";
import { Kvm } from "./kvm.js";
import { lockableBytes, RAISE, smallRoom } from "./limits.js";
import { KICK_SIGNAL, Machine, type Outcome } from "./machine.js";
import { errnoName, lockedMemoryLimitBytes, raiseOpenFilesLimit } from "./native/libc.js";
import type { Options } from "./options.js";
import { PciBus } from "./pci/bus.js";
import { EmulatedPciFunction } from "./pci/emulated.js";
import { assignSlots } from "./pci/slots.js";
import { VfioPciFunction } from "./pci/vfio-pci.js";
import { defaultStatsDir, StatsDirectory } from "./stats-dir.js";
import { CONSTANT } from "./sys/kvm.js";
import { createTable, openTable, type TableDescription } from "./tracking-table.js";
import { type Assignment, OpenAssignments, prepareAssignments } from "./vfio/assign.js";
import { DeviceEvents } from "./vfio/events.js";
import { assignableGroup } from "./vfio/sysfs.js";

/** Signals that end the guest in good order. */
const END_SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** Granules that are looked at before vCPUs and terminal get their turn. */
const SWEEP_GRANULES = 32;

/** A guest that faults so early, so often in a row, will never do anything else. */
const EARLY_FAULT_MS = 1000;
const EARLY_FAULTS_MAX = 5;

/** An assigned device, of the host or emulated, with the options that are about its DMA. */
interface AssignedDevice {
  readonly name: DeviceName;
  readonly guestSlot: number;
  /** Its domain's label. */
  readonly domain: string;
  readonly options: Options["assignments"][number];
  readonly behind:
    | { readonly kind: "vfio"; readonly assignment: Assignment }
    | { readonly kind: "emulated"; readonly device: EmulatedDevice };
}

/** What stays the same when the guest reboots. */
interface Guest {
  readonly options: Options;
  readonly kvm: Kvm;
  /** In the order of their handles, which are for good: counters and rules of injection know devices by them. */
  readonly devices: readonly AssignedDevice[];
  /** Those that failed or that the host took back. */
  readonly gone: Set<DeviceName>;
  readonly plan: MemoryPlan;
  readonly supportedCpuid: readonly CpuidEntry[];
  readonly ram: RamDescription;
  readonly memory: GuestMemory;
  /** The tracking tables of domains with policy cached, by the domains' labels. */
  readonly tables: ReadonlyMap<string, TableDescription>;
  readonly stats: Statistics;
  readonly ending: Ending;
  /** Rules of failures on demand, with their counts: they go on over a reboot. */
  readonly injection: SharedArrayBuffer;
  readonly hooks: Hooks;
  /** Devices whose limits were looked at: a reboot does not say it again. */
  readonly warned: Set<string>;
}

/** What a life of the machine and who is outside it tell each other. */
interface Hooks {
  injectionChanged: () => void;
  /** All numbers of a machine can be read now, before its console carries anything. */
  figuresThere: () => void;
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
    const devices = prepareDevices(options);
    loadBootImages(options);

    // 2. KVM, and where everything goes in the guest's address space.
    const kvm = Kvm.open();
    cleanup.add(() => kvm.close());
    const supportedCpuid = kvm.supportedCpuid();
    const cached = cachedDomains(devices);
    const plan = planMemory({
      memoryBytes: options.memoryBytes,
      physicalBits: physicalBits(supportedCpuid),
      tables: cached.length,
    });

    // 3. Guest RAM, and what tracks it. They stay mapped until the process ends.
    const ram = createRam(plan.ram, options.hugePages);
    const without = options.hugePages === "thp" ? noLargePages() : undefined;
    if (without !== undefined) warn(without);
    cleanup.add(() => closeSync(ram.fd));
    const tables = new Map<string, TableDescription>();
    for (const [i, label] of cached.entries()) {
      const table = createTable(plan.tables[i]!);
      cleanup.add(() => closeSync(table.fd));
      tables.set(label, table);
    }

    raiseOpenFilesLimit();
    const stats = new Statistics(ramBytes(ram));
    const injection = createInjection();
    const controlled = { injector: new Injector(injection), assigned: devices.map(({ name }) => name) };
    const hooks: Hooks = { injectionChanged: () => undefined, figuresThere: () => undefined };
    await openFigures(options, stats, controlled, hooks, cleanup);
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
      tables,
      stats,
      ending,
      injection,
      hooks,
      warned: new Set(),
    };
    addInjections(options.injections, controlled);
    let earlyFaults = 0;
    for (let lives = 0; ; ) {
      const outcome = ending.outcome(await live(guest, lives++));
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
    await cleanup.run();
  }
}

/**
 * Looks at every assigned device without touching it. Emulated devices never share a domain with the host's: what maps
 * is another thing. Throws a VmmError or a UsageError for the first that cannot be had.
 */
function prepareDevices({ assignments, cpus }: Options): AssignedDevice[] {
  const slots = assignSlots(assignments);
  const common = assignments.map((options, i) => {
    const label = options.ownDomain ? options.name : options.policy;
    const domain = options.kind === "vfio" ? label : `emulated ${label}`;
    return { name: options.name, guestSlot: slots[i]!, domain, options };
  });
  const hosts = prepareAssignments(
    common.flatMap(({ guestSlot, domain, options }) =>
      options.kind === "vfio" ? [{ bdf: options.name, guestSlot, domain }] : [],
    ),
  );
  const emulated = prepareEmulated(
    common.flatMap(({ guestSlot, domain, options }) =>
      options.kind === "emulated" ? [{ ...options, guestSlot, domain }] : [],
    ),
    { cpus },
  );
  return common.map((each): AssignedDevice => {
    const device = emulated.find(({ name }) => name === each.name);
    return {
      ...each,
      behind:
        device === undefined
          ? { kind: "vfio", assignment: hosts.find(({ bdf }) => bdf === each.name)! }
          : { kind: "emulated", device },
    };
  });
}

/** The labels of the domains that are cached. */
const cachedDomains = (devices: readonly AssignedDevice[]): string[] => [
  ...new Set(devices.filter(({ options }) => options.policy === "cached").map(({ domain }) => domain)),
];

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
  for (const { name, behind } of devices) {
    const look = () => {
      if (behind.kind === "vfio") assignableGroup(behind.assignment.bdf);
      else checkEmulated(behind.device);
    };
    if (!gone.has(name) && !attempt(look, warn)) gone.add(name);
  }
  if (gone.size > 0) warn(`the guest starts again without ${[...gone].join(", ")}`);
}

/**
 * One life of the guest. The host may take a device in the very moment in which the guest starts again: it still looks
 * as if it could be had, but is not opened or not reset any more. Then the start is begun anew without it.
 */
async function live(guest: Guest, livesBefore: number): Promise<Outcome> {
  for (;;) {
    try {
      return await runMachine(guest);
    } catch (error) {
      if (livesBefore === 0 || !(error instanceof DeviceError)) throw error;
      warn(error.message);
      guest.gone.add(error.device as DeviceName);
      warn(`the guest starts again without ${error.device}`);
    }
  }
}

/** The statistics directory, where there is one, and the control socket in it. */
async function openFigures(
  options: Options,
  stats: Statistics,
  controlled: Controlled,
  hooks: Hooks,
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
    hooks.figuresThere = () => directory.refresh();
    cleanup.add(() => directory.close());
  } catch (error) {
    // Who asked for the files wants them; who did not, wants the guest.
    if (asked || !isExpected(error)) throw error;
    warn(error.message);
    return;
  }
  try {
    const control = await ControlSocket.open(path, (line) => {
      const said = answer(line, controlled);
      hooks.injectionChanged();
      return said;
    });
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
  const devices = guest.devices.filter(({ name }) => !guest.gone.has(name));
  const facts = { cpus: options.cpus };
  const cleanup = new Cleanup(warn);
  try {
    // 4. The VM, its memory, its interrupt controllers.
    const vm = kvm.createVm();
    cleanup.add(() => vm.close());
    const machine = new Machine(kvm, vm);
    guest.ending.watch(machine);
    for (const piece of [...ram.slots, ...guest.tables.values()]) {
      vm.addMemslot(piece.gpa, piece.bytes, piece.hva);
    }
    addPowerPorts(
      machine,
      () => machine.stop({ kind: "power-off" }),
      () => machine.stop({ kind: "reset" }),
    );

    // 5. The IOMMU: containers and groups. KVM is told before a device is opened.
    const assignments = devices.flatMap(({ behind }) => (behind.kind === "vfio" ? [behind.assignment] : []));
    const opened = OpenAssignments.open(assignments);
    cleanup.add(() => opened.close());
    for (const group of opened.groups) vm.addVfioGroup(group.fd);
    const emulated = OpenEmulated.open(
      devices.flatMap(({ behind }) => (behind.kind === "emulated" ? [behind.device] : [])),
      ram,
      options.softIommu,
      facts,
    );
    cleanup.add(() => emulated.close());

    // 6. The mapping engine over them. Nothing is mapped, but for devices that get all of RAM.
    const domains = openDomains(opened, emulated);
    const config = engineConfig(guest, domains);
    const fresh = createEngineState(config);
    const lanes = guest.stats.lanes ?? fresh.lanes;
    const state = { ...fresh, lanes, injection: guest.injection };
    const backends = config.domains.map((_, index) => domains[index]?.handle ?? NO_CONTAINER);
    const tables = config.domains.map((_, index) => guest.tables.get(domains[index]?.label ?? ""));
    const engine = new Engine(
      state,
      (domain) => openBackend(backends[domain]!),
      options.cpus,
      (domain) => openTable(tables[domain]!),
    );
    cleanup.add(() => {
      // Nobody can take a lock that a lost thread held; the containers' end undoes every mapping as well.
      if (machine.threadLost) return;
      const stuck = engine.close();
      if (stuck > 0) warn(`${stuck} mappings could not be undone; they end with their IOMMU domain`);
    });
    guest.stats.show(engine, state, machine);
    for (const name of guest.gone) engine.removeDevice(handleOf(guest, name));
    checkCachedReach(guest, config);
    warnOfSmallRoom(guest, config);
    mapPinned(engine);
    engine.injectionChanged();
    guest.hooks.injectionChanged = () => {
      if (!machine.threadLost) engine.injectionChanged();
    };
    cleanup.add(() => {
      guest.hooks.injectionChanged = () => undefined;
    });

    // 7. The devices, reset, on the guest's PCI bus.
    const bus = new PciBus(machine, pciLayout(plan), warn);
    // Undone before the engine is: devices are quiet before anything is unmapped.
    cleanup.add(() => bus.close());
    const plug = (name: DeviceName, pciFunction: VfioPciFunction | EmulatedPciFunction) => {
      const { guestSlot } = devices.find((device) => device.name === name)!;
      const handle = handleOf(guest, name);
      bus.add(guestSlot, pciFunction);
      return {
        name,
        handle,
        unplug: () => {
          bus.remove(guestSlot);
          pciFunction.lose();
        },
        unmap: () => engine.removeDevice(handle),
        forget: () => guest.gone.add(name),
      };
    };
    const hosts = opened.openDevices().map((device, i): WatchedDevice => {
      const { bdf, guestSlot } = assignments[i]!;
      const pciFunction = forDevice(
        bdf,
        () => new VfioPciFunction(device, machine, bus.decoder, guestSlot, warn),
      );
      const watched = plug(bdf, pciFunction);
      const events = new DeviceEvents(device);
      cleanup.add(() => events.close());
      const giveBack = () => opened.giveBack(bdf, (group) => vm.removeVfioGroup(group.fd));
      return { ...watched, events, giveBack };
    });
    const hosted = (await emulated.startDevices(facts, warn)).map((device): WatchedDevice => {
      const watched = plug(device.name, new EmulatedPciFunction(device, machine, bus.decoder, warn));
      // Its thread ends by and by; the machine's end waits for it.
      return { ...watched, events: device, giveBack: () => void device.close() };
    });
    bus.start();
    const watched = [...hosts, ...hosted];
    if (watched.length > 0) {
      const log = hosts.length > 0 ? KernelLog.open() : undefined;
      if (log !== undefined) cleanup.add(() => log.close());
      const sources = [...(log === undefined ? [] : [loggedFaults(log)]), emulated];
      const count = (handle: number, times: number) => engine.countFaults(handle, times);
      const watch = new DeviceWatch(watched, sources, count, warn);
      cleanup.add(() => watch.close());
    }

    // 8. Kernel, initrd and tables into memory; looked at anew, for the files may have been replaced since.
    const images = loadBootImages(options);
    const acpi = acpiTables(options.cpus, plan);
    const start = prepareLinux(images, plan, acpi.rsdp);
    for (const write of [...start.writes, ...acpi.writes]) load(guest.memory, write);

    const sweeper = new IdleSweeper(engine, options.idleSeconds, () => machine.threadLost);
    cleanup.add(() => sweeper.stop());

    // 9. The vCPUs run, the terminal is the guest's.
    const terminal = new Console(process.stdin, process.stdout, () => guest.ending.ask({ kind: "left" }));
    terminal.attach(machine.serial);
    cleanup.add(() => terminal.detach());
    const tscDeadline = kvm.capability(CONSTANT.KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    const end = machine.run({
      cpus: options.cpus,
      ram,
      engine: state,
      backends,
      tables,
      emulated: emulated.links,
      cpuid: (apicId) => vcpuCpuid(guest.supportedCpuid, { apicId, cpus: options.cpus, tscDeadline }),
      registers: start.registers,
      onSerialOutput: () => terminal.pump(),
      onStop: () => {
        terminal.carry();
        engine.injector.wake();
      },
    });
    // run() has started the vCPUs when it first waits; what they write comes by events, so not before this.
    guest.hooks.figuresThere();
    return await end;
  } finally {
    await cleanup.run();
  }
}

/** Looks every so often at what is cached, and gives back what has been idle since the last time. */
class IdleSweeper {
  private readonly timer: NodeJS.Timeout | undefined;
  private sweeping: Promise<void> | undefined;
  private stopped = false;

  /** 0 seconds: never. Once a thread is lost, which may have held a lock, it takes none any more. */
  constructor(engine: Engine, seconds: number, threadLost: () => boolean) {
    if (seconds === 0) return;
    const pause = async () => {
      await setImmediate();
      return !this.stopped && !threadLost();
    };
    this.timer = setInterval(() => {
      this.sweeping ??= engine.sweep(SWEEP_GRANULES, pause).finally(() => {
        this.sweeping = undefined;
      });
    }, seconds * 1000);
  }

  async stop(): Promise<void> {
    this.stopped = true;
    clearInterval(this.timer);
    await this.sweeping;
  }
}

/** The engine's handle of an assigned device: its place in the list, from 1. */
const handleOf = ({ devices }: Guest, name: DeviceName): number =>
  1 + devices.findIndex((device) => device.name === name);

/** The domain of devices that are gone: nothing can be mapped in it, and no container is behind it. */
const NOWHERE: DomainConfig = {
  kind: "translated",
  limits: { ranges: [{ first: 0, last: MAX_EXACT }], pageSizeMask: MAX_EXACT, entries: 0 },
};

/** A file number that is none: whatever is asked of it fails. */
const NO_CONTAINER: BackendHandle = { kind: "vfio", fd: -1 };

/** What is behind a DMA domain: a container of VFIO, or a software IOMMU. */
interface OpenDomain {
  readonly label: string;
  readonly handle: BackendHandle;
  readonly limits: DomainConfig["limits"];
}

const openDomains = (opened: OpenAssignments, emulated: OpenEmulated): OpenDomain[] => [
  ...[...opened.containers].map(([label, container]): OpenDomain => {
    return { label, handle: { kind: "vfio", fd: container.fd }, limits: container.limits() };
  }),
  ...[...emulated.domains].map(([label, { handle, limits }]) => ({ label, handle, limits })),
];

function engineConfig(guest: Guest, open: readonly OpenDomain[]): EngineConfig {
  const labels = open.map(({ label }) => label);
  const domains = open.map(({ label, limits }): DomainConfig => {
    const { policy } = guest.devices.find((device) => device.domain === label)!.options;
    const kind = DOMAIN_KINDS[policy];
    const tableGpa = guest.tables.get(label)?.gpa;
    if (tableGpa === undefined) return { kind, limits };
    return { kind, limits, cached: { tableGpa, granuleBytes: guest.options.granuleBytes } };
  });
  return {
    ram: guest.ram.slots.map(({ gpa, bytes, hva }) => ({ gpa, bytes, hva })),
    domains: [...domains, ...(guest.gone.size > 0 ? [NOWHERE] : [])],
    devices: guest.devices.map((device) => {
      const { name, guestSlot, domain: label, options } = device;
      const gone = guest.gone.has(name);
      const domain = gone ? domains.length : labels.indexOf(label);
      return {
        name,
        bdf: guestSlot << 3,
        policy: gone ? "strict" : options.policy,
        domain,
        addressBits: addressBits((domains[domain] ?? NOWHERE).limits.ranges),
        quotaBytes: options.limitBytes,
        lockableBytes: lockableFor(device, guest.options),
      };
    }),
    quotaBytes: guest.options.limitBytes,
    lanes: guest.options.cpus + 1,
  };
}

/** What a device's IOMMU lets be locked, in bytes; 0 for no limit. The software IOMMU locks nothing by itself. */
const lockableFor = ({ behind }: AssignedDevice, { softIommu }: Options): number =>
  behind.kind === "vfio" ? lockableBytes() : (softIommu.lockedBytesMax ?? 0);

/** Policy cached maps RAM at its own addresses, so the IOMMU has to have them all. Throws a VmmError otherwise. */
function checkCachedReach(guest: Guest, { ram, domains, devices }: EngineConfig): void {
  for (const [i, { domain }] of devices.entries()) {
    const { kind, limits } = domains[domain]!;
    if (kind !== "cached") continue;
    const outside = ram.find(
      ({ gpa, bytes }) => !limits.ranges.some(({ first, last }) => first <= gpa && gpa + bytes - 1 <= last),
    );
    if (outside === undefined) continue;
    throw new VmmError(
      `${guest.devices[i]!.name}: its IOMMU does not translate all of RAM from gpa 0x${outside.gpa.toString(16)}, ` +
        `${outside.bytes} bytes, as policy cached needs; use dma=strict for it`,
    );
  }
}

/** Says, once, which devices have so little room for mappings that their drivers will hardly probe. */
function warnOfSmallRoom(guest: Guest, { devices, domains, quotaBytes: vmQuotaBytes }: EngineConfig): void {
  for (const [i, { domain, quotaBytes, lockableBytes }] of devices.entries()) {
    const { name, behind } = guest.devices[i]!;
    const { kind, limits, cached } = domains[domain]!;
    if (kind === "identity" || guest.warned.has(name) || guest.gone.has(name)) continue;
    guest.warned.add(name);
    const { entries } = limits;
    const mappingBytes = cached?.granuleBytes;
    const room = { entries, quotaBytes, vmQuotaBytes, lockableBytes, mappingBytes, ...RAISE[behind.kind] };
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
