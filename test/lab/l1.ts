// The virtual host L1: a stock Debian kernel on an emulated q35 machine with VT-d, SVM and PCI devices to assign.
// QEMU is its hardware and nothing else. Its root is the outer file system, read-only, by the same paths; /run and
// /tmp are its own. How the parts are laid out is lab-wide knowledge: see l1Bdf.

import { type ChildProcess, spawn as spawnChild } from "node:child_process";
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  realpathSync,
  writeFileSync,
} from "node:fs";
import type { Socket } from "node:net";
import { constants } from "node:os";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { atExit, cacheDir, repoRoot, scratchDir } from "./cache.js";
import { CpioArchive } from "./cpio.js";
import {
  type Host,
  type HostProcess,
  must,
  type RunOptions,
  type RunResult,
  runToEnd,
  type SpawnOptions,
  shellQuote,
  TrackedProcess,
  tail,
} from "./host.js";
import { moduleName, readModule, resolveModules } from "./modules.js";
import { getKernel, type Kernel, type KernelSeries, sbinPath } from "./packages.js";
import { LineReader, portName, type Report, type Request } from "./wire.js";

/** Root ports that every L1 has. */
const PORTS = 6;

/**
 * Where the devices are in L1. Each sits behind a root port of its own (0000:00:11.0 and up), so each has an IOMMU
 * group of its own; the two functions of `pair` share one.
 */
export const l1Bdf = {
  nvme0: "0000:02:00.0",
  nvme1: "0000:03:00.0",
  /** QEMU's teaching device: a DMA engine with a 28-bit mask. */
  edu: "0000:04:00.0",
  e1000e: "0000:05:00.0",
  /** An NVMe controller and, in the same group, an e1000e network card. */
  pair: ["0000:06:00.0", "0000:06:00.1"],
  /** The n-th of `moreNvme`, from 0. */
  moreNvme: (n: number) => `0000:${(PORTS + 1 + n).toString(16).padStart(2, "0")}:00.0`,
} as const;

/** An NVMe controller over a raw file. Writes are in the file when the guest's write is done (host page cache). */
export interface NvmeDisk {
  file: string;
  /** More properties of QEMU's device, for example "sriov_max_vfs=2". */
  properties?: string;
  /**
   * Commands per second at the most. Guests are slow here and the device is not: only a device held back has as many
   * commands in flight as its driver has given it.
   */
  iops?: number;
}

export interface L1Options {
  /** Default "6.12". */
  kernel?: KernelSeries;
  /** Default 3072. */
  memoryMiB?: number;
  /** Default 1; see the comment at -smp. */
  cpus?: number;
  nvme0?: NvmeDisk;
  nvme1?: NvmeDisk;
  edu?: boolean;
  e1000e?: boolean;
  /** The NVMe half of the two-function device. */
  pair?: NvmeDisk;
  /** For tests with many guests: up to 8. */
  moreNvme?: readonly NvmeDisk[];
  /**
   * Shared memory, which is what guests' RAM is of, has pages of 2 MiB, which hosts have to be told. Guests boot faster
   * then, nested page faults being slow here: for tests that are not about memory.
   */
  hugePages?: boolean;
  /** vfio_iommu_type1.dma_entry_limit: mappings per container before MAP_DMA fails with ENOSPC. */
  entryLimit?: number;
  /** Modules with options, beside kvm-amd, vfio-pci and vfio_iommu_type1: ["nvme poll_queues=1"]. */
  modules?: string[];
  /** Appended to L1's kernel command line. */
  kernelArgs?: string;
  /** Appended to QEMU's command line. */
  qemuArgs?: string[];
  /** Names the console log when it is kept. Default "l1". */
  name?: string;
  /** Gets a line about each step. */
  say?: (line: string) => void;
}

const bootTimeoutMs = 120_000;
const startTimeoutMs = 60_000;

/** Boots an L1 and waits for its agent. Rejects with the end of its console when it does not come up. */
export async function bootL1(options: L1Options = {}): Promise<L1> {
  const say = options.say ?? (() => {});
  const kernel = await getKernel(options.kernel ?? "6.12", say);
  const l1 = new L1(kernel, options);
  try {
    await l1.ready;
    // All at once: each command costs the lab a quarter of a second.
    const commands = (options.modules ?? []).map((module) => `modprobe ${module}`);
    if (options.hugePages) commands.push("echo always > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
    if (commands.length > 0) await must(l1, commands.join(" && "));
  } catch (error) {
    l1.saveLog();
    await l1.close();
    throw error;
  }
  return l1;
}

export class L1 implements Host {
  readonly kind = "l1";
  readonly kernel: Kernel;
  readonly shareDir: string;
  /** Milliseconds from QEMU's start to the agent's first word; 0 until then. */
  bootMs = 0;
  readonly ready: Promise<void>;

  readonly #name: string;
  readonly #scratch = scratchDir();
  readonly #consoleFile: string;
  readonly #qemu: ChildProcess;
  readonly #gone: Promise<void>;
  readonly #port: Socket;
  readonly #processes = new Map<number, L1Process>();
  readonly #starting = new Map<number, (report: Report) => void>();
  readonly #forget: () => void;
  #nextId = 1;
  #dead: Error | undefined;
  #closing = false;

  constructor(kernel: Kernel, options: L1Options) {
    this.kernel = kernel;
    this.#name = options.name ?? "l1";
    this.shareDir = join(this.#scratch.path, "share");
    mkdirSync(this.shareDir);
    this.#consoleFile = join(this.#scratch.path, "console.log");
    const initrd = join(this.#scratch.path, "initrd");
    writeFileSync(initrd, initramfs(kernel, this.shareDir, options));

    // setpriv: when this process is gone, even by SIGKILL, the kernel kills QEMU.
    const argv = [
      "--pdeathsig",
      "KILL",
      "--",
      "qemu-system-x86_64",
      ...qemuArgs(kernel, options, initrd, this.shareDir, this.#consoleFile),
    ];
    const log = openSync(join(this.#scratch.path, "qemu.log"), "w");
    const started = Date.now();
    this.#qemu = spawnChild("setpriv", argv, { stdio: ["ignore", log, log, "pipe"] });
    closeSync(log);
    this.#forget = atExit(() => this.#qemu.kill("SIGKILL"));
    this.#port = this.#qemu.stdio[3] as unknown as Socket; // a socket both ways, which the types do not know

    this.#gone = new Promise((resolve) => {
      this.#qemu.on("exit", (code, signal) => {
        this.#die(`L1's QEMU ended (${signal ?? `exit status ${code}`})`);
        resolve();
      });
      this.#qemu.on("error", (error) => {
        this.#die(`cannot run QEMU: ${error.message}`);
        resolve();
      });
    });
    this.ready = new Promise((resolve, reject) => {
      const timer = setTimeout(() => this.#die(`L1 did not come up in ${bootTimeoutMs} ms`), bootTimeoutMs);
      this.#starting.set(0, (report) => {
        clearTimeout(timer);
        this.#starting.delete(0);
        this.bootMs = Date.now() - started;
        if (report.event === "ready") resolve();
        else reject(this.#dead);
      });
    });
    this.#receive();
  }

  run(command: string, options?: RunOptions): Promise<RunResult> {
    return runToEnd(this, command, options);
  }

  spawn(command: string, options: SpawnOptions = {}): Promise<HostProcess> {
    if (this.#dead !== undefined) return Promise.reject(this.#dead);
    const id = this.#nextId++;
    const child = new L1Process(
      id,
      (request) => this.#send(request),
      (why) => this.#die(why),
      command,
      options,
    );
    this.#processes.set(id, child);
    const { env, cwd, pty } = options;
    this.#send({ op: "spawn", id, command, cwd: cwd ?? repoRoot, ...(env && { env }), ...(pty && { pty }) });
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => this.#die(`L1 did not start a command in ${startTimeoutMs} ms: ${command}`),
        startTimeoutMs,
      );
      this.#starting.set(id, (report) => {
        clearTimeout(timer);
        this.#starting.delete(id);
        if (report.event === "started") {
          child.pid = report.pid;
          resolve(child);
        } else {
          this.#processes.delete(id);
          reject(
            report.event === "failed" && this.#dead === undefined ? new Error(report.message) : this.#dead,
          );
        }
      });
    });
  }

  kernelLog(): Promise<string> {
    return must(this, "dmesg");
  }

  /** The process that is L1's hardware: for tests that stop or kill it. */
  get qemuPid(): number {
    return this.#qemu.pid!;
  }

  /** What L1's kernel wrote to its serial console so far. Can be read after its death, too. */
  console(): string {
    return existsSync(this.#consoleFile) ? readFileSync(this.#consoleFile, "latin1") : "";
  }

  /** Copies the console to lab-logs/ and returns the copy's path: for a test that failed. */
  saveLog(): string {
    const dir = join(repoRoot, "lab-logs");
    mkdirSync(dir, { recursive: true });
    const file = join(dir, `${this.#name.replace(/[^\w.-]+/g, "_")}-${process.pid}.log`);
    if (existsSync(this.#consoleFile)) copyFileSync(this.#consoleFile, file);
    return file;
  }

  async close(): Promise<void> {
    if (this.#closing) return this.#gone;
    this.#closing = true;
    this.#qemu.kill("SIGTERM"); // QEMU flushes its disks
    const killer = setTimeout(() => this.#qemu.kill("SIGKILL"), 5000);
    await this.#gone;
    clearTimeout(killer);
    this.#forget();
    this.#scratch.remove();
  }

  #receive(): void {
    const lines = new LineReader<Report>();
    this.#port.setEncoding("utf8");
    this.#port.on("error", () => {}); // QEMU's end is told by its exit
    this.#port.on("data", (chunk: string) => {
      for (const report of lines.read(chunk)) {
        switch (report.event) {
          case "ready":
            this.#starting.get(0)?.(report);
            break;
          case "started":
          case "failed":
            this.#starting.get(report.id)?.(report);
            break;
          case "output":
            this.#processes.get(report.id)?.feed(report.stream, Buffer.from(report.data, "base64"));
            break;
          case "exit":
            this.#processes.get(report.id)?.finish({ status: report.status });
            this.#processes.delete(report.id);
            break;
        }
      }
    });
  }

  #send(request: Request): void {
    if (this.#dead === undefined) this.#port.write(`${JSON.stringify(request)}\n`);
  }

  /** L1 is lost: everything that waits for it gets an error that says so. */
  #die(why: string): void {
    if (this.#dead !== undefined) return;
    if (this.#closing) {
      this.#dead = new Error("L1 is closed");
    } else {
      const file = this.saveLog();
      const qemuLog = readFileSync(join(this.#scratch.path, "qemu.log"), "utf8").trim();
      this.#dead = new Error(
        `${why}\n${qemuLog && `QEMU says: ${qemuLog}\n`}the end of L1's console (all of it: ${file}):\n${tail(this.console(), 30)}`,
      );
    }
    this.#qemu.kill("SIGKILL");
    for (const settle of [...this.#starting.values()]) settle({ event: "failed", id: 0, message: why });
    for (const child of this.#processes.values()) child.finish({ error: this.#dead });
    this.#processes.clear();
  }
}

const killTimeoutMs = 20_000;

class L1Process extends TrackedProcess {
  pid = 0;

  constructor(
    private readonly id: number,
    private readonly send: (request: Request) => void,
    private readonly hostLost: (why: string) => void,
    private readonly command: string,
    options: SpawnOptions,
  ) {
    super(command, options.onOutput);
  }

  write(data: string | Buffer): void {
    const bytes = Buffer.from(data as string);
    for (let from = 0; from < bytes.length; from += 48 << 10) {
      this.send({ op: "stdin", id: this.id, data: bytes.toString("base64", from, from + (48 << 10)) });
    }
  }

  end(): void {
    this.send({ op: "end", id: this.id });
  }

  kill(signal: NodeJS.Signals = "SIGTERM"): void {
    if (this.ended) return;
    if (!(signal in constants.signals)) throw new Error(`${signal}: no such signal`);
    this.send({ op: "kill", id: this.id, signal });
    if (signal !== "SIGKILL") return;
    // Nothing in a healthy L1 outlives this for long: a process that does hangs in L1's kernel, or all of L1 does.
    const timer = setTimeout(
      () => this.hostLost(`L1: a killed command was still there after ${killTimeoutMs} ms: ${this.command}`),
      killTimeoutMs,
    );
    void this.exited.catch(() => {}).then(() => clearTimeout(timer));
  }
}

const firstPort = 0x10;

function qemuArgs(
  kernel: Kernel,
  options: L1Options,
  initrd: string,
  shareDir: string,
  consoleFile: string,
): string[] {
  const cpus = options.cpus ?? 1;
  const cmdline = [
    "console=ttyS0,115200 panic=-1 intel_iommu=on log_buf_len=4M random.trust_cpu=on",
    // On a busy machine the boot-time timer test sees too few ticks and panics; the TSC is the outer one's and good.
    "no_timer_check tsc=reliable",
    // A tick that QEMU repeats by itself. Now and then a timer interrupt gets lost under QEMU 7.2, and a kernel that
    // arms its timer for each event waits for that one for good: it goes on by other interrupts, with no timer left, and
    // guests hang once they sleep ("soft lockup" in swapper). What a lost tick should have done the next one does.
    // (Tried with a QEMU that leaves some out: a single one hangs the guests of a host with highres; one in every
    // hundred leaves those of a host without unharmed. Guests of a wrong TSC hang alike: see AWAIT_TSC.)
    "highres=off nohz=off",
    // No more, though there may be; see the comment at -smp.
    `nr_cpus=${cpus}`,
    // X86_FEATURE_REP_GOOD, 3 * 32 + 16: without it pages are cleared by plain stores, 64 bytes a turn, of which TCG
    // makes better code than of REP STOSQ. What is cleared is most of what a larger guest's start costs.
    "clearcpuid=112",
    // Nobody needs the kernel's cryptography tested, its random numbers and keys, and the types of its BPF.
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init,load_system_certificate_list," +
      "bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init",
    options.kernelArgs ?? "",
  ];
  const devices: string[] = [];
  const moreNvme = options.moreNvme ?? [];
  // The root ports, at 0000:00:10.0 and up, get the buses 01, 02, … in this order.
  for (let bus = 1; bus <= PORTS + moreNvme.length; bus++) {
    devices.push("-device", `pcie-root-port,id=port${bus},chassis=${bus},addr=${hex(firstPort + bus - 1)}`);
  }
  const nvme = (disk: NvmeDisk, port: string, serial: string, more = ""): void => {
    const properties = disk.properties === undefined ? "" : `,${disk.properties}`;
    const throttle = disk.iops === undefined ? "" : `,throttling.iops-total=${disk.iops}`;
    devices.push(
      "-drive",
      `if=none,id=${serial},format=raw,cache=writeback,discard=unmap${throttle},file=${comma(realpathSync(disk.file))}`,
      "-device",
      `nvme,bus=${port},drive=${serial},serial=${serial}${more}${properties}`,
    );
  };
  if (options.nvme0) nvme(options.nvme0, "port2", "nvme0");
  if (options.nvme1) nvme(options.nvme1, "port3", "nvme1");
  if (options.edu) devices.push("-device", "edu,bus=port4");
  const e1000e = (id: string, where: string): void => {
    devices.push("-netdev", `hubport,id=${id},hubid=0`, "-device", `e1000e,${where},netdev=${id},romfile=`);
  };
  if (options.e1000e) e1000e("net0", "bus=port5");
  if (options.pair) {
    e1000e("net1", "bus=port6,addr=0.1");
    nvme(options.pair, "port6", "pair", ",addr=0.0,multifunction=on");
  }
  for (const [n, disk] of moreNvme.entries()) nvme(disk, `port${PORTS + 1 + n}`, `more${n}`);
  // One processor: with two, each its own thread, QEMU 7.2 may run one over code that the other has just patched, and
  // kernels patch themselves (L1 died of a stale int3 in __schedule when KVM switched its static keys; guests with
  // several vCPUs died likewise). Two processors on one thread hang a nested guest. Guests have as many vCPUs as they
  // like. No extended states: SVM in TCG does not intercept XSETBV, so KVM would not know what its guest enabled.
  // No ERMS: with it, kernels and the C library clear and copy memory by REP STOSB and MOVSB, which TCG does byte by byte,
  // at half the speed of eight at a time. (L1's kernel goes without REP STOSQ, too: clearcpuid above.)
  // Seldom (twice in some fifteen hours) a guest dies in its kernel's entry code, where GS and the stack are not yet the
  // kernel's: QEMU 7.2's VMRUN leaves the number of an interrupt it has injected in exception_index, and when another
  // thread's request comes between two looks of cpu_handle_interrupt(), the interrupt is delivered once more, with IF=0.
  // With a pause between the two looks QEMU's guests die as ours do, within a minute; with the number cleared none does.
  // There may be two processors, though one there is: for a machine that can have but one, QEMU 7.2 leaves the memory
  // barriers out of its code (tcg_gen_mb(): CF_PARALLEL), and the devices are threads of their own. A driver of nvme's
  // then read from which entry on the controller wants to be rung before its new tail could be seen, while the
  // controller looked for it; neither told the other, and the queue stood until commands timed out.
  // biome-ignore format: one option per line
  return [
    "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
    "-machine", "q35",
    "-accel", "tcg",
    "-cpu", "max,-xsave,-erms",
    "-smp", `${cpus},maxcpus=${Math.max(cpus, 2)}`,
    "-m", String(options.memoryMiB ?? 3072),
    "-device", "intel-iommu,intremap=on",
    "-kernel", kernel.vmlinuz,
    "-initrd", initrd,
    "-append", cmdline.join(" "),
    "-chardev", `file,id=console,path=${comma(consoleFile)}`,
    "-serial", "chardev:console",
    "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
    "-device", "virtio-9p-pci,fsdev=root,mount_tag=root,addr=0x2",
    "-fsdev", `local,id=share,path=${comma(shareDir)},security_model=none,multidevs=remap`,
    "-device", "virtio-9p-pci,fsdev=share,mount_tag=share,addr=0x3",
    "-device", "virtio-serial-pci,addr=0x4",
    "-chardev", "socket,id=agent,fd=3",
    "-device", `virtserialport,chardev=agent,name=${portName}`,
    "-device", "virtio-rng-pci,addr=0x5",
    ...devices,
    ...(options.qemuArgs ?? []),
  ];
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}

/** QEMU's option syntax doubles a comma inside a value. */
function comma(value: string): string {
  return value.replaceAll(",", ",,");
}

/** Directories that L1 has of its own; what is needed of the outer ones' contents is mounted back into them. */
const ownDirs = ["/run", "/tmp"];

/** Modules that every L1 has. */
const MODULES = ["virtio_pci", "9p", "9pnet_virtio", "virtio_console", "virtio_rng"];
const VFIO_MODULES = ["vfio_iommu_type1", "vfio-pci"];

/**
 * Shell, before KVM is loaded: waits until L1's kernel has measured its TSC for the second time (tsc-early is the clock until
 * then). On a busy machine the first measure is off by 0.06 %; the second corrects it. A KVM that was loaded in between
 * gives vCPUs the first frequency, finds it below the host's by more than tsc_tolerance_ppm ("user requested TSC rate
 * below hardware speed"), and leaves their multiplier 0: it takes the guest's TSC for a constant, every timer of the
 * guest's comes later than the one before, and the guest hangs ("soft lockup" in swapper). A second measure that is
 * disturbed is taken again every second. Who waits no longer has KVM (kvm.ko is there, kvm-amd is not) take what may still
 * be corrected, 1 % at the most, for the same frequency.
 */
const AWAIT_TSC = `tries=0
while [ "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" = tsc-early ]; do
  if [ $((tries += 1)) -gt 200 ]; then
    echo "lab: the TSC's frequency is still the one measured first"
    echo 20000 > /sys/module/kvm/parameters/tsc_tolerance_ppm
    break
  fi
  sleep 0.05
done`;

/** Those of busybox that init uses: to install them all takes half a second. */
const APPLETS = "cat chmod chroot dirname insmod ip ln mkdir mount poweroff sleep touch".split(" ");

/**
 * L1's initramfs: loads modules, mounts the outer file system, makes the few places L1 may write, and starts
 * the agent in it. The modules are unpacked already and in order; modprobe took four seconds for the VMM's
 * three.
 */
function initramfs(kernel: Kernel, shareDir: string, { entryLimit }: L1Options): Buffer {
  const archive = new CpioArchive();
  archive.charDevice("dev/console", 5, 1);
  archive.file("bin/busybox", readFileSync("/usr/bin/busybox"), 0o755);
  for (const applet of APPLETS) archive.symlink(`bin/${applet}`, "busybox");
  for (const dir of ["proc", "sys", "outer", "lower"]) archive.directory(dir);

  const parameters: Record<string, string> = {
    kvm_amd: "nested=1",
    ...(entryLimit !== undefined && { vfio_iommu_type1: `dma_entry_limit=${entryLimit}` }),
  };
  const modules = resolveModules(kernel.modulesDir, [...MODULES, ...VFIO_MODULES, "kvm-amd"]);
  const inserts = modules.map((file, index) => {
    archive.file(`modules/${index}.ko`, readModule(join(kernel.modulesDir, file)));
    return `insmod /modules/${index}.ko ${parameters[moduleName(file)] ?? ""}`;
  });
  const insertKvm = inserts.pop()!;

  const agent = fileURLToPath(new URL("agent.js", import.meta.url));
  const wanted = [
    repoRoot,
    realpathSync(agent).replace(/\/test\/lab\/agent\.js$/, ""),
    cacheDir(),
    process.execPath,
  ];
  const hidden = [...new Set(wanted)].filter((path) => ownDirs.some((dir) => path.startsWith(dir + sep)));
  const show = hidden.map((path) => {
    const inner = shellQuote(join("/outer", path));
    return `if [ -d ${shellQuote(join("/lower", path))} ]; then mkdir -p ${inner}; else mkdir -p "$(dirname ${inner})"; touch ${inner}; fi
mount -o bind ${shellQuote(join("/lower", path))} ${inner}`;
  });
  const share = shellQuote(join("/outer", relative("/", shareDir)));
  const environment = {
    PATH: sbinPath(),
    HOME: process.env.HOME ?? "/root",
    LANG: "C.UTF-8",
    TERM: process.env.TERM ?? "dumb",
    XDG_RUNTIME_DIR: "/run/user/0",
    ...(process.env.XDG_CACHE_HOME ? { XDG_CACHE_HOME: process.env.XDG_CACHE_HOME } : {}),
    // Nothing is installed under /lib/modules for this kernel: kmod's tools find it in the cache.
    MODPROBE_OPTIONS: `-d ${kernel.root}`,
    UV_THREADPOOL_SIZE: "8",
  };
  const env = Object.entries(environment).map(([name, value]) => shellQuote(`${name}=${value}`));

  archive.file(
    "init",
    `#!/bin/busybox sh
export PATH=/bin
set -e
trap 'echo "lab: init failed"; poweroff -f' EXIT
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
${inserts.join("\n")}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose root /outer
mount -o bind /outer /lower
${ownDirs.map((dir) => `mount -t tmpfs -o mode=1777 tmpfs /outer${dir}`).join("\n")}
mount -t proc proc /outer/proc
mount -t sysfs sysfs /outer/sys
mount -t debugfs debugfs /outer/sys/kernel/debug
mount -t devtmpfs dev /outer/dev
mkdir -p /outer/dev/pts /outer/dev/shm /outer/run/user/0 /outer/run/lock
chmod 700 /outer/run/user/0
mount -t devpts -o mode=620,ptmxmode=666 devpts /outer/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /outer/dev/shm
ln -sf pts/ptmx /outer/dev/ptmx
ln -sf /proc/self/fd /outer/dev/fd
${show.join("\n")}
mkdir -p ${share}
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=mmap share ${share}
ip link set lo up
port=
for each in /sys/class/virtio-ports/*; do
  if [ "$(cat $each/name)" = ${portName} ]; then port=/dev/\${each##*/}; fi
done
${AWAIT_TSC}
${insertKvm}
echo "lab: starting the agent on $port"
set +e
chroot /outer /usr/bin/env -i ${env.join(" ")} ${shellQuote(process.execPath)} ${shellQuote(agent)} $port
echo "lab: the agent ended with status $?"
`,
    0o755,
  );
  return archive.bytes();
}
