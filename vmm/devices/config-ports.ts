// PCI configuration by ports 0xcf8 and 0xcfc (PCI Local Bus Specification 3.0, 3.2.2.3.2), on the vCPU's thread: the
// address register is shared memory, and an access to bus 0 becomes one to ECAM. Other buses do not exist, which
// Linux finds out by 32,000 accesses on an AMD CPU when it looks for AGP bridges: those never leave the thread.

import { ECAM } from "../boot/layout.js";

export const CONFIG_ADDRESS_PORT = 0xcf8;
export const CONFIG_DATA_PORT = 0xcfc;
const ENABLE = 0x80000000;

export const newConfigAddress = (): SharedArrayBuffer => new SharedArrayBuffer(4);

export class ConfigPorts {
  private readonly address: Int32Array;

  constructor(shared: SharedArrayBuffer) {
    this.address = new Int32Array(shared);
  }

  /** Only accesses of 32 bits reach the address register; 0xcf9 beside it is the reset port. */
  isAddress(port: number, width: number): boolean {
    return port === CONFIG_ADDRESS_PORT && width === 4;
  }
  isData(port: number): boolean {
    return port >= CONFIG_DATA_PORT && port < CONFIG_DATA_PORT + 4;
  }

  readAddress(): number {
    return Atomics.load(this.address, 0) >>> 0;
  }
  writeAddress(value: number): void {
    Atomics.store(this.address, 0, value & 0x80fffffc);
  }

  /**
   * Where in ECAM an access of `width` bytes to a data port goes; -1 when nothing answers there (another bus, the
   * enable bit off, or bytes beyond the register).
   */
  ecamAddress(port: number, width: number): number {
    const address = this.readAddress();
    const byte = port - CONFIG_DATA_PORT;
    const bus = (address >>> 16) & 0xff;
    if (address < ENABLE || bus !== 0 || byte + width > 4) return -1;
    const device = (address >>> 8) & 0xff;
    return ECAM.gpa + device * 4096 + (address & 0xfc) + byte;
  }
}
