// vmm/pci/emulated.ts: what an emulated device shows of itself, against a machine that objects to every breach of what
// KVM and PCI ask for, and a device that logs what is asked of it.

import assert from "node:assert/strict";
import { writeSync } from "node:fs";
import { suite } from "uvu";
import type { PciDescription } from "../../iommu-emul/device.js";
import { emulatedName } from "../../vmm/device-name.js";
import type { EmulatedDeviceAccess } from "../../vmm/emul/hosted-device.js";
import type { Width } from "../../vmm/io-bus.js";
import { PciBus, type PciLayout } from "../../vmm/pci/bus.js";
import { EmulatedPciFunction } from "../../vmm/pci/emulated.js";
import { sized } from "../soak.js";
import { Machine } from "./support/pci-parts.js";
import { Random } from "./support/random.js";

const LAYOUT: PciLayout = {
  ecam: 0xe0000000,
  mmio32: { first: 0xc0000000, last: 0xdfffffff },
  mmio64: { first: 2 ** 36, last: 2 ** 37 - 1 },
  io: { first: 0xc000, last: 0xcfff },
};
const SLOT = 3;
const MEM = 2;
const MASTER = 4;

const ONE_MSI: PciDescription = {
  vendorId: 0x1234,
  deviceId: 0x11e8,
  subsystemVendorId: 0x1af4,
  subsystemId: 0x1100,
  revision: 0x10,
  classCode: 0x010802,
  bars: [{ index: 0, bytes: 2 ** 20, bits: 32 }],
  interrupts: { kind: "msi", vectors: 4 },
};
const VECTORS = 70;
const WITH_MSIX: PciDescription = {
  ...ONE_MSI,
  bars: [{ index: 0, bytes: 0x4000, bits: 64 }],
  interrupts: { kind: "msix", vectors: VECTORS, bar: 4 },
};

class Device implements EmulatedDeviceAccess {
  readonly name = emulatedName("edu", 1);
  readonly number = 7;
  fds: number[];
  readonly interrupts;

  constructor(
    readonly description: PciDescription,
    private readonly machine: Machine,
  ) {
    const { vectors } = description.interrupts;
    this.fds = new Array<number>(vectors).fill(-1);
    this.interrupts = {
      vectors,
      growable: true,
      enable: (fds: readonly number[]) => {
        for (const [vector, fd] of fds.entries()) this.fds[vector] = fd;
        this.machine.log.push(`enable ${fds.map((fd) => (fd < 0 ? "-" : "+")).join("")}`);
      },
      setTrigger: (vector: number, fd: number) => {
        this.fds[vector] = fd;
        this.machine.log.push(`trigger ${vector}`);
      },
      disable: () => {
        this.fds.fill(-1);
        this.machine.log.push("disable");
      },
    };
  }

  setBusMaster(on: boolean): void {
    this.machine.log.push(`master ${on ? "on" : "off"}`);
  }

  reset(): void {
    this.machine.log.push("reset");
  }

  signal(vector: number): void {
    const fd = this.fds[vector]!;
    if (fd >= 0) writeSync(fd, Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
  }
}

function rig(description: PciDescription) {
  const machine = new Machine();
  const warnings: string[] = [];
  const warn = (line: string) => warnings.push(line);
  const bus = new PciBus(machine, LAYOUT, warn);
  const device = new Device(description, machine);
  const pciFunction = new EmulatedPciFunction(device, machine, bus.decoder, warn);
  bus.add(SLOT, pciFunction);
  bus.start();
  machine.news();
  const at = LAYOUT.ecam + (SLOT << 15);
  return {
    machine,
    device,
    bus,
    pciFunction,
    warnings,
    read: (register: number, width: Width = 4) => machine.readMemory(at + register, width),
    write: (register: number, value: number, width: Width = 4) =>
      machine.writeMemory(at + register, width, value),
  };
}

type Rig = ReturnType<typeof rig>;

/** Where a capability is. */
function capability({ read }: Rig, id: number): number {
  for (let at = read(0x34, 1); at !== 0; at = read(at + 1, 1)) if (read(at, 1) === id) return at;
  return assert.fail(`no capability ${id}`);
}

const test = suite("pci: emulated");

test("the header is that of the description; there are no ports, no ROM and no interrupt pin", () => {
  const { read, write } = rig(ONE_MSI);
  assert.equal(read(0), 0x11e81234);
  assert.equal(read(8), 0x01080210);
  assert.equal(read(0x2c), 0x11001af4);
  assert.equal(read(0x0e, 1), 0);
  assert.equal(read(0x3d, 1), 0);
  assert.equal(read(6, 2), 0x10, "a list of capabilities");
  write(0x30, 0xffffffff);
  assert.equal(read(0x30), 0);
  write(4, 0xffff, 2);
  assert.equal(read(4, 2), MEM | MASTER | 0x400);
  write(0, 0);
  assert.equal(read(0), 0x11e81234);
});

test("capabilities: PCIe as an endpoint of the root complex with function level reset, power states, MSI", () => {
  const it = rig(ONE_MSI);
  const pcie = capability(it, 0x10);
  assert.equal(it.read(pcie + 2, 2), 0x92);
  assert.equal(it.read(pcie + 4) & 0x10000000, 0x10000000);
  const pm = capability(it, 0x01);
  it.write(pm + 4, 3, 2);
  assert.equal(it.read(pm + 4, 2), 0x0b, "D3hot, in name");
  assert.equal(it.read(capability(it, 0x05) + 2, 2), 0x184, "4 vectors, 64 bits, maskable");
});

test("a BAR's registers are the device's where the guest puts them, and only while memory is decoded", () => {
  const { machine, read, write } = rig(ONE_MSI);
  assert.equal(machine.registers.size, 0);
  const home = read(0x10);
  write(4, MEM, 2);
  assert.deepEqual([...machine.registers], [[home, { bytes: 2 ** 20, device: 7, bar: 0 }]]);
  write(0x10, 0xffffffff);
  assert.equal(read(0x10), 0xfff00000);
  assert.equal(machine.registers.size, 0, "outside the windows");
  write(0x10, 0xc5500000);
  assert.deepEqual([...machine.registers.keys()], [0xc5500000]);
  write(4, MASTER, 2);
  assert.equal(machine.registers.size, 0);
  assert.deepEqual(machine.news(), ["master on"]);
  write(4, 0, 2);
  assert.deepEqual(machine.news(), ["master off"]);
});

test("function level reset: no DMA, no registers, no interrupts, then the device; and all is as at first", () => {
  const it = rig(ONE_MSI);
  const { machine, device, read, write } = it;
  const msi = capability(it, 0x05);
  const devctl = capability(it, 0x10) + 8;
  const initial = Array.from({ length: 64 }, (_, i) => read(4 * i));
  write(4, MEM | MASTER, 2);
  write(msi + 4, 0xfee00000);
  write(msi + 12, 0x41, 2);
  write(msi + 2, 0x21, 2); // 4 vectors, on
  assert.deepEqual(machine.news(), [
    "master on",
    ...[0, 1, 2, 3].flatMap((vector) => [`route fee00000/0/${(0x40 + vector).toString(16)}`, "irqfd on"]),
    "enable ++++",
  ]);
  write(0x10, 0xc5500000);
  write(devctl, 0x8000, 2);
  const log = machine.news();
  assert.equal(log[0], "master off");
  assert.equal(log.at(-1), "reset");
  assert.ok(log.indexOf("disable") < log.indexOf("irqfd off"), "silenced before it is disconnected");
  assert.deepEqual(device.fds, [-1, -1, -1, -1]);
  assert.equal(machine.registers.size, 0);
  assert.equal(machine.gsis.size, 0);
  assert.deepEqual(
    Array.from({ length: 64 }, (_, i) => read(4 * i)),
    initial,
  );
});

test("MSI-X: the table and the pending bits are in their BAR, and vectors signal when they are unmasked", () => {
  const it = rig(WITH_MSIX);
  const { machine, device, read, write } = it;
  const msix = capability(it, 0x11);
  assert.equal(read(msix + 2, 2), VECTORS - 1);
  assert.equal(read(msix + 4), 4, "table: BAR 4, offset 0");
  assert.equal(read(msix + 8), 0x1004, "pending bits: BAR 4, offset 4096");
  write(4, MEM | MASTER, 2);
  const table = read(0x20);
  const entry = (vector: number, words: readonly number[]) => {
    for (const [i, word] of words.entries()) machine.writeMemory(table + 16 * vector + 4 * i, 4, word);
  };
  assert.equal(machine.readMemory(table + 16 * 69 + 12, 4), 1, "masked at first");
  write(msix + 2, 0x8000, 2);
  machine.news();
  entry(65, [0xfee01000, 0, 0x55, 0]);
  assert.deepEqual(machine.news(), ["route fee01000/0/55", "irqfd on", "trigger 65"]);
  const [irqfd] = [...machine.irqfds.values()];
  assert.equal(irqfd!.fd, device.fds[65]);
  // Masked: what comes is pending, and comes when it is unmasked.
  entry(65, [0xfee01000, 0, 0x55, 1]);
  assert.equal(machine.readMemory(table + 0x1008, 4), 0);
  device.signal(65);
  assert.equal(machine.readMemory(table + 0x1008, 4), 1 << 1);
  assert.equal(machine.readMemory(table + 0x1008, 1), 1 << 1);
  assert.equal(machine.readMemory(table + 0x1000, 4), 0);
  machine.writeMemory(table + 0x1008, 4, 0);
  assert.equal(machine.readMemory(table + 0x1008, 4), 1 << 1, "read-only");
  entry(65, [0xfee01000, 0, 0x55, 0]);
  assert.equal(machine.readMemory(table + 0x1008, 4), 0);
  assert.equal(machine.readMemory(table + 0x1ffc, 4), 0xffffffff, "nothing is there");
  // The other BAR is the device's.
  assert.deepEqual([...machine.registers.values()], [{ bytes: 0x4000, device: 7, bar: 0 }]);
});

test("the end is quiet first; a lost device says nothing more", () => {
  const { machine, bus, pciFunction, write, read, warnings } = rig(ONE_MSI);
  write(4, MEM | MASTER, 2);
  machine.news();
  bus.remove(SLOT);
  pciFunction.lose();
  assert.deepEqual(machine.news(), ["master off", "reset"]);
  assert.equal(machine.registers.size, 0);
  assert.equal(read(0), 0xffffffff);
  bus.close();
  pciFunction.close();
  assert.deepEqual(machine.news(), []);
  assert.deepEqual(warnings, []);
});

test("random accesses to configuration space and table break nothing, and leave nothing", () => {
  const random = new Random(41);
  for (const description of [ONE_MSI, WITH_MSIX]) {
    const { machine, bus, read, write } = rig(description);
    for (let i = 0; i < sized(20_000, 1_000_000); i++) {
      const width = ([1, 2, 4] as const)[random.below(3)]!;
      const at = random.below(256 / width) * width;
      const value = random.below(4) === 0 ? 0xfee00000 + random.below(2 ** 20) : random.below(2 ** 32);
      if (random.below(3) > 0) write(at, value % 2 ** (8 * width), width);
      else read(at, width);
      const trapped = machine.mmio.find(({ start }) => start !== LAYOUT.ecam);
      if (trapped !== undefined) {
        const where = trapped.start + random.below(trapped.bytes / width) * width;
        machine.writeMemory(where, width, value % 2 ** (8 * width));
        machine.readMemory(where, width);
      }
    }
    bus.close();
    assert.equal(machine.registers.size, 0);
    assert.equal(machine.mmio.length, 0);
    assert.equal(machine.gsis.size, 0);
    assert.equal(machine.irqfds.size, 0);
  }
});

test.run();
