// vmm/pci: configuration accesses, BARs, MSI-X, MSI, INTx and what an assigned device shows, against a machine and a
// device in memory that object to every breach of what KVM, VFIO and PCI ask for.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { CONFIG_DATA_PORT, ConfigPorts, newConfigAddress } from "../../vmm/devices/config-ports.js";
import { VmmError } from "../../vmm/errors.js";
import type { Width } from "../../vmm/io-bus.js";
import { readAligned, writeAligned } from "../../vmm/pci/access.js";
import { decodeEcam, PciBus, type PciLayout } from "../../vmm/pci/bus.js";
import { Msix } from "../../vmm/pci/msix.js";
import { VfioPciFunction } from "../../vmm/pci/vfio-pci.js";
import { AT, Device, endpoint, Machine } from "./support/pci-parts.js";
import { Random, SOAK } from "./support/random.js";

const LAYOUT: PciLayout = {
  ecam: 0xe0000000,
  mmio32: { first: 0xc0000000, last: 0xdfffffff },
  mmio64: { first: 2 ** 36, last: 2 ** 37 - 1 },
  io: { first: 0xc000, last: 0xcfff },
};
const WIDTHS: readonly Width[] = [1, 2, 4];
const SLOT = 3;
const MEM = 2;
const MASTER = 4;

interface Rig {
  readonly machine: Machine;
  readonly device: Device;
  readonly bus: PciBus;
  readonly pciFunction: VfioPciFunction;
  readonly warnings: string[];
  read(register: number, width?: Width): number;
  write(register: number, value: number, width?: Width): void;
}

/** A started bus with one assigned device in slot 3, its configuration space by ECAM. */
function rig(make: (machine: Machine) => Device = endpoint): Rig {
  const machine = new Machine();
  const warnings: string[] = [];
  const bus = new PciBus(machine, LAYOUT, (line) => warnings.push(line));
  const device = make(machine);
  const pciFunction = new VfioPciFunction(device, machine, bus.decoder, SLOT, (line) => warnings.push(line));
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
    read: (register, width = 4) => machine.readMemory(at + register, width),
    write: (register, value, width = 4) => machine.writeMemory(at + register, width, value),
  };
}

// ---- accesses ----

const accesses = suite("pci: accesses");

accesses("any offset and width is cut into aligned pieces that add up", () => {
  for (let offset = 0; offset < 8; offset++) {
    for (const bytes of [1, 2, 3, 4]) {
      const memory = Uint8Array.from({ length: 16 }, (_, i) => 0x90 + i);
      const view = new DataView(memory.buffer);
      let pieces = 0;
      const read = readAligned(offset, bytes, (at, width) => {
        assert.equal(at % width, 0);
        pieces++;
        return width === 4
          ? view.getUint32(at, true)
          : width === 2
            ? view.getUint16(at, true)
            : view.getUint8(at);
      });
      const expected = [...memory.slice(offset, offset + bytes)].reduceRight(
        (value, byte) => value * 256 + byte,
        0,
      );
      assert.equal(read, expected);
      if (offset % bytes === 0 && bytes !== 3) assert.equal(pieces, 1);

      const target = new Uint8Array(16);
      writeAligned(offset, bytes, expected, (at, width, value) => {
        assert.equal(at % width, 0);
        for (let i = 0; i < width; i++) target[at + i] = (value / 2 ** (8 * i)) & 255;
      });
      const written = memory.map((byte, i) => (i >= offset && i < offset + bytes ? byte : 0));
      assert.deepEqual(target, written);
    }
  }
});

accesses("ECAM and port addresses decode to what they were made of", () => {
  const ports = new ConfigPorts(newConfigAddress());
  for (let slot = 0; slot < 32; slot++) {
    for (let fn = 0; fn < 8; fn++) {
      for (const register of [0, 1, 4, 0x3f, 0xfc, 0xff]) {
        const target = { slot, function: fn, register };
        assert.deepEqual(decodeEcam((slot << 15) | (fn << 12) | register), target);
        ports.writeAddress((0x80000000 | (slot << 11) | (fn << 8) | (register & 0xfc)) >>> 0);
        const ecam = ports.ecamAddress(CONFIG_DATA_PORT + (register & 3), 1) - LAYOUT.ecam;
        assert.deepEqual(decodeEcam(ecam), target);
      }
    }
  }
  assert.deepEqual(decodeEcam(0xffc), { slot: 0, function: 0, register: 0xffc });
  assert.equal(decodeEcam(1 << 20), undefined, "bus 1");
  ports.writeAddress(0);
  assert.equal(ports.ecamAddress(CONFIG_DATA_PORT, 4), -1, "not enabled");
  ports.writeAddress(0x80010000);
  assert.equal(ports.ecamAddress(CONFIG_DATA_PORT, 4), -1, "bus 1");
  ports.writeAddress(0x80000000);
  assert.equal(ports.ecamAddress(CONFIG_DATA_PORT + 1, 4), -1, "beyond the data port");
});

accesses("the probe for configuration mechanism 1 works, and CF9 is not part of it", () => {
  const { machine } = rig();
  machine.out(0xcfb, 1, 1);
  machine.out(0xcf9, 1, 6);
  machine.out(0xcf8, 4, 0x80000000);
  assert.equal(machine.in(0xcf8, 4), 0x80000000);
  machine.out(0xcf8, 2, 0x1234);
  assert.equal(machine.in(0xcf8, 4), 0x80000000, "a word is not the address register");
  assert.equal(machine.in(0xcfc, 4), 0x00081b36);
  machine.out(0xcf8, 4, 0x80000008);
  assert.equal(machine.in(0xcfc, 4), 0x06000000, "class: host bridge");
});

accesses("both ways show the same bytes, in every width at every offset", () => {
  const { machine, read } = rig();
  for (let register = 0; register < 256; register++) {
    for (const width of WIDTHS) {
      machine.out(0xcf8, 4, (0x80000000 | (SLOT << 11) | (register & 0xfc)) >>> 0);
      const lane = register & 3;
      const byEcam = read(register, width);
      const byPort = machine.in(0xcfc + lane, width);
      // An access that runs past the data port is nobody's.
      const expected = lane + width <= 4 ? byEcam : 2 ** (8 * width) - 1;
      assert.equal(byPort, expected, `0x${register.toString(16)} width ${width}`);
    }
  }
});

accesses("what is not there reads as ones and takes writes", () => {
  const { machine } = rig();
  for (const offset of [1 << 15, (SLOT << 15) | (1 << 12), (SLOT << 15) | (7 << 12), 31 << 15]) {
    for (const width of WIDTHS) {
      machine.writeMemory(LAYOUT.ecam + offset, width, 0);
      assert.equal(machine.readMemory(LAYOUT.ecam + offset, width), 2 ** (8 * width) - 1);
    }
  }
  machine.out(0xcf8, 4, 0x80010000);
  assert.equal(machine.in(0xcfc, 4), 0xffffffff, "bus 1");
  machine.out(0xcf8, 4, 0);
  assert.equal(machine.in(0xcfc, 2), 0xffff, "disabled");
  assert.equal(machine.readMemory(LAYOUT.ecam + 0x100, 4), 0, "the bridge's extended space is empty");
});

// ---- BARs ----

const bars = suite("pci: BARs");

bars("sizing by all ones gives size and type of each kind", () => {
  const { read, write } = rig();
  const size = (register: number) => {
    const old = read(register);
    write(register, 0xffffffff);
    const answer = read(register);
    write(register, old);
    assert.equal(read(register), old);
    return answer;
  };
  assert.equal(size(0x10), 0xffffc004, "64-bit, 16 KiB");
  assert.equal(size(0x14), 0xffffffff);
  assert.equal(size(0x18), 0xffe1, "I/O, 32 ports of 64 Ki");
  assert.equal(size(0x1c), 0xffffff00, "32-bit, 256 bytes");
  assert.equal(size(0x20), 0xfe00000c, "64-bit prefetchable, 32 MiB");
  assert.equal(size(0x24), 0xffffffff);
  assert.equal(size(0x30), 0, "no expansion ROM");
});

bars("a BAR above 4 GiB has its size in the upper half", () => {
  const { read, write } = rig(
    (machine) => new Device(machine, { bars: [{ index: 0, bytes: 2 ** 34, flags: 0xc }] }),
  );
  write(0x10, 0xffffffff);
  write(0x14, 0xffffffff);
  assert.equal(read(0x10), 0xc);
  assert.equal(read(0x14), 0xfffffffc);
});

bars("firmware's placement is aligned, in the windows, disjoint; large 64-bit BARs go high", () => {
  const { read, machine } = rig();
  const homes = [
    [read(0x10) - 4 + read(0x14) * 2 ** 32, 0x4000],
    [read(0x1c), 256],
    [read(0x20) - 12 + read(0x24) * 2 ** 32, 2 ** 25],
  ] as const;
  for (const [at, bytes] of homes) assert.equal(at % bytes, 0);
  assert.ok(homes[0][0] >= LAYOUT.mmio32.first && homes[0][0] + 0x3fff <= LAYOUT.mmio32.last);
  assert.ok(homes[1][0] >= homes[0][0] + 0x4000 || homes[1][0] + 256 <= homes[0][0]);
  assert.equal(homes[2][0], LAYOUT.mmio64.first);
  assert.equal(read(0x18) - 1, LAYOUT.io.first);
  assert.equal(machine.slots.size, 0, "nothing decodes before COMMAND says so");
});

bars("a BAR that fits nowhere is an error that names it", () => {
  const machine = new Machine();
  const bus = new PciBus(machine, LAYOUT, () => {});
  const device = new Device(machine, { bars: [{ index: 1, bytes: 2 ** 31, flags: 0 }] });
  bus.add(1, new VfioPciFunction(device, machine, bus.decoder, 1, () => {}));
  assert.throws(() => bus.start(), /^Error: 0000:02:00\.0: no room for BAR 1 \(mem32, 2147483648 bytes\)/);
});

bars("COMMAND maps: the device answers first, slots go around the MSI-X pages", () => {
  const { write, read, machine } = rig();
  const home = read(0x10) - 4;
  write(4, MEM, 2);
  const high = LAYOUT.mmio64.first.toString(16);
  assert.deepEqual(machine.news(), [
    "config 0x4=0x2",
    `slot 0x${home.toString(16)}+0x2000`,
    `slot 0x${high}+0x2000000`,
  ]);
  const trapped = machine.mmio
    .filter(({ start }) => start !== LAYOUT.ecam)
    .map(({ start, bytes }) => [start, bytes]);
  assert.deepEqual(trapped, [
    [home + 0x2000, 0x2000],
    [read(0x1c), 256],
  ]);
  write(4, 0, 2);
  assert.deepEqual(machine.news(), [`unslot 0x${home.toString(16)}`, `unslot 0x${high}`, "config 0x4=0x0"]);
  assert.equal(machine.mmio.length, 1, "ECAM is left");
});

bars("only the guest's COMMAND bits reach the device", () => {
  const { write, read, device } = rig();
  write(4, 0xffff, 2);
  assert.equal(read(4, 2), 0x407);
  assert.equal(device.config.getUint16(4, true), 0x407);
  write(5, 0, 1);
  assert.equal(device.config.getUint16(4, true), 0x007);
  write(6, 0xffff, 2);
  assert.equal(device.config.getUint16(4, true), 0x007);
});

bars("relocation moves it; outside the windows or over another it answers nowhere, and comes back", () => {
  const { write, read, machine, warnings } = rig();
  write(4, MEM, 2);
  const home = read(0x10) - 4;
  const slotOf = (bytes: number) => [...machine.slots.values()].find((slot) => slot.bytes === bytes)?.gpa;
  write(0x10, 0xd0000000);
  assert.equal(slotOf(0x2000), 0xd0000000);
  write(0x14, 0x10);
  assert.equal(slotOf(0x2000), 0x10d0000000, "into the upper window");
  write(0x14, 0x40);
  assert.equal(slotOf(0x2000), undefined, "beyond it");
  write(0x14, 0);
  write(0x10, 0);
  assert.equal(slotOf(0x2000), undefined, "over RAM");
  assert.deepEqual(warnings, []);
  write(0x14, 0x10);
  assert.equal(slotOf(0x2000), undefined, "over its own large BAR");
  assert.equal(slotOf(2 ** 25), LAYOUT.mmio64.first);
  assert.match(
    warnings.join("\n"),
    /^0000:02:00\.0: BAR 0 does not answer at 0x1000000000: lies over BAR 4 of 0000:02:00\.0$/,
  );
  write(0x20, 0x20000000);
  assert.equal(slotOf(0x2000), 0x1000000000, "as soon as there is room");
  write(0x14, 0);
  write(0x10, home);
  assert.equal(slotOf(0x2000), home);
});

bars("sizing while it decodes does not put it at the top of the address space", () => {
  const { write, machine } = rig();
  write(4, MEM, 2);
  write(0x10, 0xffffffff);
  assert.ok([...machine.slots.values()].every(({ bytes }) => bytes !== 0x2000));
});

bars("a machine that cannot take a slot costs a warning, not the guest", () => {
  const { write, machine, warnings } = rig();
  machine.failures.set("addMemslot", 1);
  write(4, MEM, 2);
  assert.deepEqual(warnings.length, 1);
  assert.match(warnings[0]!, /BAR 0 does not answer at 0xc0000000: addMemslot: ENOSPC/);
  write(4, 0, 2);
  write(4, MEM, 2);
  assert.equal(machine.slots.size, 2);
});

bars("I/O BARs and small BARs are forwarded access by access", () => {
  const { write, read, machine, device } = rig();
  write(4, 3, 2);
  const port = read(0x18) - 1;
  machine.out(port + 4, 4, 0xcafe1234);
  assert.equal(device.memory.get(2)!.getUint32(4, true), 0xcafe1234);
  assert.equal(machine.in(port + 6, 2), 0xcafe);
  assert.equal(machine.in(port + 30, 4) >>> 16, 0xffff, "past the end");
  const small = read(0x1c);
  machine.writeMemory(small + 255, 1, 0x77);
  assert.equal(device.memory.get(3)!.getUint8(255), 0x77);
  write(4, MEM, 2);
  assert.equal(machine.in(port + 4, 4), 0xffffffff, "I/O space is off");
});

bars("what VFIO leaves out of its sparse areas is trapped", () => {
  const areas = [
    { offset: 0x8000, bytes: 0x7800 },
    { offset: 0x1000, bytes: 0x3000 },
  ];
  const { write, machine } = rig(
    (m) => new Device(m, { bars: [{ index: 0, bytes: 0x10000, flags: 0, areas }] }),
  );
  write(4, MEM, 2);
  const base = LAYOUT.mmio32.first;
  assert.deepEqual(
    [...machine.slots.values()].map(({ gpa, bytes }) => [gpa - base, bytes]),
    [
      [0x1000, 0x3000],
      [0x8000, 0x7000],
    ],
  );
  assert.deepEqual(
    machine.mmio
      .filter(({ start }) => start !== LAYOUT.ecam)
      .map(({ start, bytes }) => [start - base, bytes]),
    [
      [0, 0x1000],
      [0x4000, 0x4000],
      [0xf000, 0x1000],
    ],
  );
});

// ---- what is shown ----

const shown = suite("pci: the assigned device");

shown("identity comes from the device, the rest of the header is ours", () => {
  const { read } = rig();
  assert.equal(read(0), 0x00101b36);
  assert.equal(read(8), 0x01080202);
  assert.equal(read(0x2c), 0x11001af4);
  assert.equal(read(4), 0x00100000, "COMMAND 0, a capability list");
  assert.equal(read(0x0e, 1), 0, "one function");
  assert.equal(read(0x30), 0, "no ROM");
  assert.equal(read(0x3d, 1), 1, "INTA");
});

shown("the capability list is PM, MSI, MSI-X, PCIe and nothing else", () => {
  const { read } = rig();
  const list: [number, number][] = [];
  for (let at = read(0x34, 1); at !== 0 && list.length < 10; at = read(at + 1, 1))
    list.push([at, read(at, 1)]);
  assert.deepEqual(list, [
    [AT.pm, 0x01],
    [AT.msi, 0x05],
    [AT.msix, 0x11],
    [AT.pcie, 0x10],
  ]);
  for (const hidden of [AT.vendor, AT.vendor + 4, AT.af, 0xfc])
    assert.equal(read(hidden), 0, `0x${hidden.toString(16)}`);
  for (let register = 0x100; register < 0x1000; register += 4) assert.equal(read(register), 0);
});

shown("PM: power states are ours alone, no wake-up", () => {
  const { read, write, device } = rig();
  assert.equal(read(AT.pm + 2, 2), 0x0003);
  write(AT.pm + 4, 0xffff, 2);
  assert.equal(read(AT.pm + 4, 2), 0x000b, "D3hot, NoSoftReset");
  assert.equal(device.config.getUint16(AT.pm + 4, true), 0x0103, "the device is left alone");
});

shown("PCIe: an integrated endpoint without link, device control by allow-list", () => {
  const { read, write, device } = rig();
  assert.equal(read(AT.pcie + 2, 2), 0x0092);
  assert.equal(read(AT.pcie + 4), 0x10008fe0, "payload 128, FLR");
  for (let at = AT.pcie + 0xc; at < AT.pcie + 0x3c; at += 4) assert.equal(read(at), 0);
  write(AT.pcie + 8, 0x70ff, 2);
  assert.equal(read(AT.pcie + 8, 2), 0x7110);
  assert.equal(device.config.getUint16(AT.pcie + 8, true), 0x7110);
  device.config.setUint16(AT.pcie + 10, 0x0009, true);
  assert.equal(read(AT.pcie + 8), 0x00097110, "device status is live");
});

shown("a function level reset is the host's reset", () => {
  const { read, write, device, machine } = rig();
  const home = read(0x10);
  write(4, MEM | MASTER, 2);
  write(0x10, 0xd0000000);
  assert.equal(device.resets, 1);
  write(AT.pcie + 8, 0x8000 | read(AT.pcie + 8, 2), 2);
  assert.equal(device.resets, 2);
  assert.equal(machine.slots.size, 0);
  assert.equal(read(4, 2), 0);
  assert.equal(read(0x10), home);
  assert.equal(read(AT.pcie + 8, 2), 0x2910);
});

shown("a device that cannot be reset says so and offers no FLR", () => {
  const { read, write, warnings } = rig((machine) => endpoint(machine, { canReset: false }));
  assert.match(warnings.join("\n"), /^0000:02:00\.0: the host cannot reset it alone/);
  assert.equal(read(AT.pcie + 4) & 0x10000000, 0);
  write(AT.pcie + 8, 0x8000, 2);
  assert.equal(read(AT.pcie + 8, 2) & 0x8000, 0);
});

shown("a bridge cannot be assigned", () => {
  assert.throws(
    () => rig((machine) => new Device(machine, { config: (view) => view.setUint8(0x0e, 1) })),
    (error: unknown) => error instanceof VmmError && /0000:02:00\.0: has header type 1/.test(error.message),
  );
});

shown("function level reset: quiet first, then the host's reset, then firmware's placement", () => {
  const { read, write, device, machine } = rig();
  const home = read(0x10);
  write(4, MEM | MASTER, 2);
  write(0x10, 0xd0000000);
  write(AT.msix + 2, 0x8000, 2);
  machine.news();
  write(AT.pcie + 8, 0x8000, 2);
  assert.deepEqual(machine.news(), [
    "config 0x4=0x2",
    "unslot 0xd0000000",
    "unslot 0x1000000000",
    "disable MSI-X",
    "config 0x4=0x0",
    "reset",
    "irqfd INTx on",
    "set INTx 0: fd",
  ]);
  assert.equal(read(0x10), home);
  assert.equal(read(4, 2), 0);
  assert.equal(read(AT.msix + 2, 2), 4);
  assert.equal(device.closed, false);
});

shown("close gives everything back", () => {
  const { write, device, machine, bus } = rig();
  write(4, 7, 2);
  write(AT.msix + 2, 0x8000, 2);
  bus.close();
  assert.equal(machine.slots.size + machine.mmio.length + machine.pio.length, 0);
  assert.equal(machine.gsis.size + machine.routes.size + machine.irqfds.size, 0);
  assert.equal(device.maps.size, 0);
  assert.equal(device.resets, 2);
  assert.equal(device.config.getUint16(4, true), 0);
  assert.deepEqual(device.triggers, [undefined, undefined, undefined]);
  assert.ok(device.closed);
});

shown("close goes on when the device takes no writes any more: it is reset all the same", () => {
  const { write, device, machine, bus, warnings } = rig();
  write(4, 7, 2);
  device.failWrites = true;
  bus.close();
  assert.equal(device.resets, 2);
  assert.equal(machine.slots.size + device.maps.size, 0);
  assert.ok(device.closed);
  assert.match(warnings.join("\n"), /^0000:02:00\.0: bus mastering: write: EIO$/m);
});

shown("close goes on when the reset fails: bus mastering is off, and it is said", () => {
  const { write, device, bus, warnings } = rig();
  write(4, 7, 2);
  device.failReset = true;
  bus.close();
  assert.equal(device.config.getUint16(4, true), 0);
  assert.ok(device.closed);
  assert.match(warnings.join("\n"), /^0000:02:00\.0: reset: VFIO_DEVICE_RESET: EAGAIN$/m);
});

shown("close gives the device back even when a bug of ours comes in its way", () => {
  const { write, device, bus } = rig();
  write(4, 7, 2);
  device.unmap = () => {
    throw new TypeError("a bug");
  };
  assert.throws(() => bus.close(), /a bug/);
  assert.ok(device.closed);
});

/** Takes the rig's device away in the middle of its work, as the host does. */
function lose({ bus, pciFunction }: Rig): void {
  bus.remove(SLOT);
  pciFunction.lose();
}

shown(
  "a lost device is gone from the guest's sight, quiet, and still open: what is mapped for it comes next",
  () => {
    const it = rig();
    const { read, write, device, machine, bus } = it;
    write(4, 7, 2);
    write(AT.msix + 2, 0x8000, 2);
    const home = read(0x10) - 4;
    machine.news();
    lose(it);
    assert.deepEqual(machine.news(), [
      "config 0x4=0x3",
      "unslot 0xc0000000",
      "unslot 0x1000000000",
      "disable MSI-X",
      "config 0x4=0x0",
      "reset",
    ]);
    assert.equal(device.closed, false);
    assert.equal(device.maps.size, 0);
    assert.equal(machine.slots.size + machine.pio.length + machine.irqfds.size + machine.gsis.size, 0);
    for (const width of WIDTHS) {
      for (const register of [0, 4, 0x10, AT.msix + 2, 0x100]) {
        write(register, 0, width);
        assert.equal(read(register, width), 2 ** (8 * width) - 1);
      }
      machine.writeMemory(home + 0x2000, width, 0);
      assert.equal(machine.readMemory(home + 0x2000, width), 2 ** (8 * width) - 1, "its BAR");
    }
    assert.deepEqual(machine.news(), []);
    // The bus is as alive as before, and its end has nothing left to do for the lost one.
    assert.equal(machine.readMemory(LAYOUT.ecam, 4), 0x00081b36);
    device.close();
    bus.close();
  },
);

shown(
  "what a lost device does no more is not worth a line, and does not keep the rest from being done",
  () => {
    const refused = rig();
    refused.device.failReset = true;
    lose(refused);
    assert.deepEqual(refused.warnings, []);
    assert.equal(refused.device.maps.size, 0);
    assert.equal(refused.device.config.getUint16(4, true), 0, "bus mastering is off");

    const dead = rig();
    const resets = dead.device.resets;
    dead.device.config.setUint32(8, 0xffffffff, true);
    lose(dead);
    assert.equal(dead.device.resets, resets, "a device that does not answer is not waited for");
    assert.equal(dead.machine.slots.size + dead.machine.irqfds.size, 0);
  },
);

// ---- interrupts ----

const interrupts = suite("pci: interrupts");

const MESSAGE = 0xfee01000;

/** A rig with memory on, and writes to the MSI-X table. */
function msixRig(options: Parameters<typeof endpoint>[1] = {}) {
  const it = rig((machine) => endpoint(machine, options));
  it.write(4, MEM, 2);
  it.machine.news();
  const table = it.read(0x10) - 4 + 0x2000;
  const entry = (vector: number, field: number) => table + 16 * vector + 4 * field;
  return {
    ...it,
    table,
    set: (vector: number, field: number, value: number, width: Width = 4) =>
      it.machine.writeMemory(entry(vector, field), width, value),
    get: (vector: number, field: number, width: Width = 4) =>
      it.machine.readMemory(entry(vector, field), width),
    program: (vector: number) => {
      it.machine.writeMemory(entry(vector, 0), 4, MESSAGE);
      it.machine.writeMemory(entry(vector, 2), 4, 0x40 + vector);
    },
    pba: () => it.machine.readMemory(table + 0x1000, 4),
  };
}

interrupts("at start the pin is connected, with resampling", () => {
  const { machine, device } = rig();
  const pin = machine.irqfds.get(19);
  assert.equal(pin?.fd, device.triggers[0]?.[0]);
  assert.equal(pin?.resampleFd, device.unmaskFd);
});

interrupts("MSI-X as Linux enables it: on with all masked, then vector by vector", () => {
  const { write, machine, set, program, device } = msixRig();
  write(AT.msix + 2, 0xc000, 2);
  assert.deepEqual(machine.news(), ["disable INTx", "irqfd INTx off", "set MSI-X 0: -----"]);
  program(2);
  write(AT.msix + 2, 0x8000, 2);
  assert.deepEqual(machine.news(), []);
  set(2, 3, 0);
  assert.deepEqual(machine.news(), ["route fee01000/0/42", "irqfd on", "set MSI-X 2: fd"]);
  set(2, 3, 1);
  assert.deepEqual(machine.news(), ["irqfd off"], "masking leaves the route, which nothing uses");
  set(2, 3, 0);
  assert.deepEqual(machine.news(), ["irqfd on"], "the device has the eventfd already");
  set(2, 3, 1);
  set(2, 2, 0x99);
  machine.news();
  set(2, 3, 0);
  assert.deepEqual(machine.news(), ["route fee01000/0/99", "irqfd on"]);
  assert.equal([...machine.irqfds.values()][0]?.fd, device.triggers[2]?.[2]);
  write(AT.msix + 2, 0, 2);
  assert.deepEqual(machine.news(), [
    "disable MSI-X",
    "irqfd off",
    "unroute",
    "irqfd INTx on",
    "set INTx 0: fd",
  ]);
  assert.equal(machine.gsis.size, 0);
});

interrupts(
  "MSI-X with vectors unmasked before: all routes and irqfds first, then one call to the host",
  () => {
    const { write, machine, set, program } = msixRig();
    for (const vector of [0, 3]) {
      program(vector);
      set(vector, 3, 0);
    }
    assert.deepEqual(machine.news(), [], "the table alone does nothing");
    write(AT.msix + 3, 0x80, 1);
    assert.deepEqual(machine.news().slice(2), [
      "route fee01000/0/40",
      "irqfd on",
      "route fee01000/0/43",
      "irqfd on",
      "set MSI-X 0: fd--fd-",
    ]);
  },
);

interrupts("a host that can add vectors is asked for no more than are in use", () => {
  const { write, machine, set, program } = msixRig({ growable: true });
  write(AT.msix + 2, 0x8000, 2);
  assert.deepEqual(machine.news().slice(2), ["set MSI-X 0: -"]);
  program(4);
  set(4, 3, 0);
  assert.deepEqual(machine.news(), ["route fee01000/0/44", "irqfd on", "set MSI-X 4: fd"]);
});

interrupts("the function mask takes all vectors off and brings back those that are unmasked", () => {
  const { write, machine, set, program } = msixRig();
  write(AT.msix + 2, 0x8000, 2);
  for (const vector of [1, 2]) {
    program(vector);
    set(vector, 3, 0);
  }
  machine.news();
  write(AT.msix + 2, 0xc000, 2);
  assert.deepEqual(machine.news(), ["irqfd off", "irqfd off"]);
  set(1, 3, 1);
  write(AT.msix + 2, 0x8000, 2);
  assert.deepEqual(machine.news(), ["irqfd on"]);
});

interrupts(
  "what comes while a vector is masked is pending, stays so when looked at, and is delivered",
  () => {
    const { write, set, program, device, pba, machine } = msixRig();
    write(AT.msix + 2, 0x8000, 2);
    program(1);
    set(1, 3, 0);
    set(1, 3, 1);
    assert.equal(pba(), 0);
    device.signal(2, 1);
    assert.equal(pba(), 2);
    assert.equal(pba(), 2);
    machine.writeMemory(LAYOUT.mmio32.first + 0x3000, 4, 0xffffffff);
    assert.equal(pba(), 2, "read-only");
    device.memory.get(0)!.setUint32(0x3000, 0x10, true);
    assert.equal(pba(), 0x12, "and the device's own bits");
    set(1, 3, 0);
    assert.equal(pba(), 0x10);
    set(1, 3, 1);
    assert.equal(pba(), 0x12, "nobody took the signal: there is no KVM here");
  },
);

interrupts("the table reads back as written, but for what is reserved", () => {
  const { set, get } = msixRig();
  assert.equal(get(0, 3), 1, "masked at power-on");
  set(0, 0, 0xffffffff);
  assert.equal(get(0, 0), 0xfffffffc);
  set(0, 3, 0xfffffffe);
  assert.equal(get(0, 3), 0);
  set(0, 2, 0x11223344);
  set(0, 2, 0xee, 1);
  assert.equal(get(0, 2), 0x112233ee);
  assert.equal(get(0, 2, 2), 0x33ee);
  set(4, 3, 0);
  assert.equal(get(4, 3), 0, "the last vector");
});

interrupts("a table has no entry past its last", () => {
  const machine = new Machine();
  const source = { vectors: 5, growable: true, enable: () => {}, setTrigger: () => {}, disable: () => {} };
  const msix = new Msix(source, machine, (line) => assert.fail(line));
  msix.control(true, false);
  for (const offset of [5 * 16, 5 * 16 + 12, 2 ** 31]) {
    msix.writeTable(offset, 4, 0);
    assert.equal(msix.readTable(offset, 4), 0xffffffff);
  }
  assert.equal(msix.pbaBytes, 8);
  assert.equal(msix.pending(32), 0);
});

interrupts("registers that share a page with the table are the device's; the table is not", () => {
  const { device, machine, table } = msixRig();
  machine.writeMemory(table + 0x800, 4, 0x12345678);
  assert.equal(device.memory.get(0)!.getUint32(0x2800, true), 0x12345678);
  assert.equal(machine.readMemory(table + 0x802, 2), 0x1234);
  machine.writeMemory(table, 4, MESSAGE);
  assert.equal(device.memory.get(0)!.getUint32(0x2000, true), 0);
});

interrupts(
  "a message that is no interrupt is refused, with a warning, and works when it is put right",
  () => {
    const { write, machine, set, warnings } = msixRig();
    write(AT.msix + 2, 0x8000, 2);
    machine.news();
    set(0, 3, 0);
    assert.deepEqual(machine.news(), []);
    assert.match(
      warnings.join("\n"),
      /^0000:02:00\.0: MSI-X vector 0: message address 0x0 is not that of an interrupt$/,
    );
    set(0, 0, MESSAGE);
    assert.deepEqual(machine.news(), ["route fee01000/0/0", "irqfd on", "set MSI-X 0: fd"]);
  },
);

interrupts("a host without vectors costs a warning; turning MSI-X off and on tries again", () => {
  const { write, machine, device, warnings, set, program } = msixRig();
  program(0);
  set(0, 3, 0);
  device.failEnable = true;
  write(AT.msix + 2, 0x8000, 2);
  assert.match(warnings.join("\n"), /MSI-X on, 5 vectors: VFIO_DEVICE_SET_IRQS: ENOSPC/);
  assert.equal(machine.gsis.size, 0);
  set(0, 3, 1);
  set(0, 3, 0);
  device.failEnable = false;
  write(AT.msix + 2, 0, 2);
  write(AT.msix + 2, 0x8000, 2);
  assert.deepEqual(
    device.triggers[2]!.map((fd) => fd >= 0),
    [true, false, false, false, false],
  );
});

interrupts("MSI: as many vectors as the guest enables, data counted up, masked by bit", () => {
  const { write, read, machine, device } = rig();
  assert.equal(read(AT.msi + 2, 2), 0x0186, "8 vectors, 64-bit, maskable");
  write(AT.msi + 4, MESSAGE);
  write(AT.msi + 8, 0);
  write(AT.msi + 12, 0x4043, 2);
  write(AT.msi + 16, 0b1010);
  machine.news();
  write(AT.msi + 2, 0x21, 2);
  assert.deepEqual(machine.news(), [
    "disable INTx",
    "irqfd INTx off",
    "route fee01000/0/4040",
    "irqfd on",
    "route fee01000/0/4042",
    "irqfd on",
    "set MSI 0: fdfdfdfd",
  ]);
  device.signal(1, 1);
  assert.equal(read(AT.msi + 20), 0b0010, "pending");
  write(AT.msi + 16, 0b0101);
  assert.deepEqual(machine.news(), [
    "irqfd off",
    "route fee01000/0/4041",
    "irqfd on",
    "irqfd off",
    "route fee01000/0/4043",
    "irqfd on",
  ]);
  write(AT.msi + 2, 0x01, 2);
  assert.deepEqual(
    machine.news().filter((line) => line.startsWith("set") || line.startsWith("disable")),
    ["disable MSI", "set MSI 0: fd"],
  );
  write(AT.msi + 2, 0, 2);
  assert.equal(machine.gsis.size, 0);
  assert.ok(machine.irqfds.has(19), "the pin again");
});

interrupts("MSI with more vectors than there are is cut; MSI-X goes before MSI", () => {
  const { write, machine, device } = rig();
  write(AT.msi + 4, MESSAGE);
  write(AT.msi + 2, 0x71, 2);
  assert.equal(device.triggers[1]?.length, 8);
  write(AT.msix + 2, 0x8000, 2);
  assert.deepEqual(
    device.triggers.map((fds) => fds?.length),
    [undefined, undefined, 5],
  );
  write(AT.msix + 2, 0, 2);
  assert.deepEqual(
    device.triggers.map((fds) => fds?.length),
    [undefined, 8, undefined],
  );
  assert.equal(machine.gsis.size, 8);
});

interrupts("a device without any interrupt has no pin", () => {
  const { read, machine } = rig((m) => endpoint(m, { irqs: [0, 0, 0] }));
  assert.equal(read(0x3d, 1), 0);
  assert.equal(read(0x34, 1), AT.pm);
  assert.equal(read(AT.pm + 1, 1), AT.pcie, "neither MSI nor MSI-X");
  assert.equal(machine.irqfds.size, 0);
});

interrupts("an MSI-X table outside its BAR hides MSI-X", () => {
  const { read, warnings } = rig((machine) => endpoint(machine, { vectors: 2048, irqs: [1, 0, 2048] }));
  assert.equal(read(AT.pm + 1, 1), AT.pcie);
  assert.match(
    warnings.join("\n"),
    /^0000:02:00\.0: its MSI-X table is not inside its BARs: MSI-X is hidden$/,
  );
});

// ---- hostile guests ----

const hostile = suite("pci: hostile guests");

hostile("no sequence of accesses breaks an interface, throws, or leaves something behind", () => {
  const rounds = SOAK ? 2000 : 60;
  for (let seed = 0; seed < rounds; seed++) {
    const random = new Random(seed);
    const it = rig((machine) => endpoint(machine, { growable: random.oneIn(2), canReset: !random.oneIn(4) }));
    const { machine, device, bus } = it;
    const interesting = [
      4,
      5,
      6,
      0x10,
      0x14,
      0x18,
      0x1c,
      0x20,
      0x24,
      AT.msix + 2,
      AT.msix + 3,
      AT.msi + 2,
      AT.msi + 4,
    ];
    const values = [
      0,
      0xffffffff,
      0xffff,
      0x8000,
      0xc000,
      MESSAGE,
      0xc0000000,
      0xd0000004,
      0x10,
      7,
      2,
      1,
      0x21,
      0x71,
    ];
    try {
      for (let step = 0; step < 400; step++) {
        const width = random.pick(WIDTHS);
        const value = (random.oneIn(3) ? random.next() : random.pick(values)) % 2 ** (8 * width);
        if (random.oneIn(30))
          machine.failures.set(random.pick(["addMemslot", "allocateGsi", "setMsiRoute", "irqfd"]), 1);
        device.failEnable = random.oneIn(20);
        switch (random.below(8)) {
          case 0:
          case 1:
            it.write(random.pick(interesting), value, width);
            break;
          case 2:
            it.write(random.below(4096), value, width);
            break;
          case 3:
            it.read(random.below(4096), width);
            break;
          case 4:
            machine.out(0xcf8, 4, (0x80000000 | (SLOT << 11) | random.below(256)) >>> 0);
            machine.out(0xcfc + random.below(4), width, value);
            break;
          case 5:
          case 6: {
            const range = random.pick(machine.mmio);
            machine.writeMemory(range.start + random.below(Math.min(range.bytes, 0x1100)), width, value);
            break;
          }
          case 7:
            device.signal(2, random.below(5));
            machine.readMemory(it.read(0x10) - 4 + 0x3000 + random.below(16), width);
            break;
        }
      }
      machine.failures.clear();
      device.failEnable = false;
      bus.close();
      assert.equal(machine.slots.size, 0);
      assert.equal(machine.gsis.size, 0);
      assert.equal(machine.mmio.length + machine.pio.length + machine.irqfds.size + machine.routes.size, 0);
      assert.equal(device.maps.size, 0);
    } catch (error) {
      throw new Error(`seed ${seed}: ${(error as Error).stack}`);
    }
  }
});

for (const each of [accesses, bars, shown, interrupts, hostile]) each.run();
