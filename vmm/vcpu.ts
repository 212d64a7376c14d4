// One vCPU: the code of its Worker. Runs the guest, serves hypercalls and the serial port on the spot, hands
// everything else to the main thread, and ends when told to or when the guest cannot go on.

import { type MessagePort, parentPort, workerData } from "node:worker_threads";
import { Dispatcher } from "../hypercalls/dispatcher.js";
import { Engine } from "../hypercalls/engine.js";
import { ERRNO } from "../hypercalls/status.js";
import { COM1 } from "./boot/acpi.js";
import { ConfigPorts } from "./devices/config-ports.js";
import { Serial } from "./devices/serial.js";
import { openBackend } from "./dma-backend.js";
import { DeviceRegisters } from "./emul/registers.js";
import { errorMessage } from "./errors.js";
import { GuestMemory } from "./guest-memory.js";
import { irqLine } from "./irq-line.js";
import { errnoName, gettid, preparedIoctl } from "./native/libc.js";
import { REGISTER, RunArea } from "./run-area.js";
import { MMIO_READ, MMIO_WRITE, PIO_READ, PIO_WRITE, SlowExitCaller } from "./slow-exit.js";
import { CONSTANT, IOCTL } from "./sys/kvm.js";
import { openTable } from "./tracking-table.js";
import { PioTransport } from "./transport-pio.js";
import {
  CONTROL_STOP,
  CONTROL_TID,
  controlWords,
  EXIT_INDEX,
  exitCounters,
  RING_SERIAL,
  type VcpuEnd,
  type VcpuJob,
} from "./vcpu-link.js";

class Vcpu {
  private readonly run: RunArea;
  private readonly control: Int32Array;
  private readonly exits: Float64Array;
  private readonly calls: PioTransport;
  private readonly serial: Serial;
  private readonly config: ConfigPorts;
  private readonly slow: SlowExitCaller;
  private readonly registers: DeviceRegisters;

  constructor(
    private readonly job: VcpuJob,
    port: MessagePort,
  ) {
    this.run = new RunArea(job.runAddress, job.runBytes);
    this.control = controlWords(job.control);
    this.exits = exitCounters(job.control);
    const engine = new Engine(
      job.engine,
      (domain) => openBackend(job.backends[domain]!),
      job.index,
      (domain) => openTable(job.tables[domain]!),
    );
    this.calls = new PioTransport(this.run, new Dispatcher(engine, new GuestMemory(job.ram)));
    this.serial = new Serial(job.serial, irqLine(job.vmFd, COM1.gsi), () => port.postMessage(RING_SERIAL));
    this.config = new ConfigPorts(job.configAddress);
    this.slow = new SlowExitCaller(job.slowExits, port);
    this.registers = new DeviceRegisters(job);
  }

  /** Runs the guest until this vCPU ends. */
  loop(): VcpuEnd {
    const { run, control, exits } = this;
    Atomics.store(control, CONTROL_TID, gettid());
    const begun = performance.now();
    const enter = preparedIoctl(this.job.vcpuFd, IOCTL.KVM_RUN, 0);
    for (;;) {
      const result = enter();
      if (result < 0) {
        if (result !== -ERRNO.EINTR && result !== -ERRNO.EAGAIN)
          return { kind: "failed", why: `KVM_RUN: ${errnoName(-result)}` };
        // Before the stop word immediate_exit was set, and a signal follows: neither an entry just under way nor a
        // halted guest delays the stop, and whatever came last, the next entry ends in EINTR.
        if (Atomics.load(control, CONTROL_STOP) !== 0) return { kind: "stopped" };
        exits[EXIT_INDEX.interrupted]!++;
        continue;
      }
      switch (run.exitReason) {
        case CONSTANT.KVM_EXIT_IO:
          if (this.calls.isCall()) {
            exits[EXIT_INDEX.hypercall]!++;
            this.calls.service();
          } else this.portIo();
          break;
        case CONSTANT.KVM_EXIT_MMIO:
          exits[EXIT_INDEX.mmio]!++;
          this.mmio();
          break;
        case CONSTANT.KVM_EXIT_INTR:
          exits[EXIT_INDEX.interrupted]!++;
          break;
        case CONSTANT.KVM_EXIT_SHUTDOWN:
          // Where it happened is lost: on AMD, KVM has reset the vCPU by now.
          return { kind: "triple-fault", ranMs: performance.now() - begun };
        default: {
          const end = this.unusualExit();
          if (end !== undefined) return end;
          exits[EXIT_INDEX.other]!++;
        }
      }
    }
  }

  /** One exit may stand for many accesses: string instructions. */
  private portIo(): void {
    const { run, serial } = this;
    const { ioPort: port, ioWidth: width, ioCount: count, ioIsOut: isOut } = run;
    const serialRegister = port - COM1.port;
    const isSerial = width === 1 && serialRegister >= 0 && serialRegister < COM1.ports;
    this.exits[isSerial ? EXIT_INDEX.serial : EXIT_INDEX.pio]!++;
    for (let i = 0, at = run.ioDataOffset; i < count; i++, at += width) {
      if (isSerial && isOut) serial.write(serialRegister, run.read(at, 1));
      else if (isSerial) run.write(at, 1, serial.read(serialRegister));
      else if (isOut) this.portWrite(port, width, run.read(at, width));
      else run.write(at, width, this.portRead(port, width));
    }
  }

  private portRead(port: number, width: number): number {
    const { config, slow } = this;
    if (config.isAddress(port, width)) return config.readAddress();
    if (config.isData(port)) {
      const address = config.ecamAddress(port, width);
      if (address < 0) return 0xffffffff;
      slow.access(MMIO_READ, address, width, 0, 0);
    } else slow.access(PIO_READ, port, width, 0, 0);
    return slow.low;
  }

  private portWrite(port: number, width: number, value: number): void {
    const { config, slow } = this;
    if (config.isAddress(port, width)) config.writeAddress(value);
    else if (config.isData(port)) {
      const address = config.ecamAddress(port, width);
      if (address >= 0) slow.access(MMIO_WRITE, address, width, value, 0);
    } else slow.access(PIO_WRITE, port, width, value, 0);
  }

  private mmio(): void {
    const { run, registers } = this;
    const at = run.mmioDataOffset;
    const bytes = run.mmioBytes;
    if (registers.find(run.mmioAddress)) {
      if (run.mmioIsWrite) registers.write(bytes, run.read(at, 4), run.read(at + 4, 4));
      else {
        registers.read(bytes);
        run.write(at, 4, registers.low);
        run.write(at + 4, 4, registers.high);
      }
    } else if (run.mmioIsWrite) {
      // Bytes beyond the access's length are stale; the device looks at `bytes` only.
      this.slow.access(MMIO_WRITE, run.mmioAddress, bytes, run.read(at, 4), run.read(at + 4, 4));
    } else {
      this.slow.access(MMIO_READ, run.mmioAddress, bytes, 0, 0);
      run.write(at, 4, this.slow.low);
      run.write(at + 4, 4, this.slow.high);
    }
  }

  private unusualExit(): VcpuEnd | undefined {
    const { run } = this;
    const rip = `rip 0x${run.u64(REGISTER.rip).toString(16)}`;
    switch (run.exitReason) {
      case CONSTANT.KVM_EXIT_HLT:
        return undefined;
      case CONSTANT.KVM_EXIT_FAIL_ENTRY:
        return {
          kind: "failed",
          why: `the CPU refused to enter the guest, hardware reason 0x${run.failEntryReason.toString(16)}`,
        };
      case CONSTANT.KVM_EXIT_INTERNAL_ERROR:
        return {
          kind: "failed",
          why: `KVM could not go on (internal error ${run.internalSuberror}) at ${rip}`,
        };
      default:
        return {
          kind: "failed",
          why: `exit reason ${run.exitReason} at ${rip}, which this VMM does not know`,
        };
    }
  }
}

if (parentPort !== null) {
  const port = parentPort;
  let end: VcpuEnd;
  try {
    end = new Vcpu(workerData as VcpuJob, port).loop();
  } catch (error) {
    end = { kind: "failed", why: errorMessage(error) };
  }
  port.postMessage(end);
}
