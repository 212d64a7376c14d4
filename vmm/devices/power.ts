// Power-off and reset, as the ACPI tables promise them (boot/acpi.ts), and the old ways to reset that kernels try:
// the reset port and the keyboard controller. Main thread.

import { ACPI_PORTS, PM1_CONTROL } from "../boot/acpi.js";
import type { IoHandler } from "../io-bus.js";

const KEYBOARD_PORT = 0x64;
/** Keyboard controller command that pulses the CPU's reset line. */
const KEYBOARD_RESET = 0xfe;
const RESET_CPU = 1 << 2;

interface PortBus {
  addPio(port: number, count: number, handler: IoHandler): void;
}

/** Registers the ports; `off` and `reset` are called when the guest asks for them. */
export function addPowerPorts(bus: PortBus, off: () => void, reset: () => void): void {
  const pm1 = { enable: 0, control: 0 };
  bus.addPio(ACPI_PORTS.pm1Status, 4, {
    // Status and enable are two 16-bit registers side by side; nothing here ever raises a status bit.
    read: (offset) => (offset < 2 ? pm1.enable << 16 : pm1.enable) >>> 0,
    write: (offset, width, value) => {
      if (offset === 2) pm1.enable = value & 0xffff;
      else if (offset === 0 && width === 4) pm1.enable = value >>> 16;
    },
  });
  bus.addPio(ACPI_PORTS.pm1Control, 2, {
    read: () => (pm1.control & ~PM1_CONTROL.slpEn) | PM1_CONTROL.sciEn,
    write: (offset, _width, value) => {
      if (offset !== 0) return;
      pm1.control = value & 0xffff;
      const type = (value >> PM1_CONTROL.slpTypShift) & PM1_CONTROL.slpTypMask;
      if ((value & PM1_CONTROL.slpEn) !== 0 && type === PM1_CONTROL.slpTypOff) off();
    },
  });
  bus.addPio(ACPI_PORTS.reset, 1, {
    read: () => 0,
    write: (_offset, width, value) => {
      if (width === 1 && (value & RESET_CPU) !== 0) reset();
    },
  });
  bus.addPio(KEYBOARD_PORT, 1, {
    read: () => 0xff,
    write: (_offset, _width, value) => {
      if (value === KEYBOARD_RESET) reset();
    },
  });
}
