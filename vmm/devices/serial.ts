// COM1: a 16550A UART (National Semiconductor PC16550D data sheet) whose registers and queues are shared memory, so
// that the vCPU that touches it serves it at once; the main thread only carries bytes to and from the terminal.

import { Mutex } from "../../hypercalls/lock.js";

/** Bytes the guest may be ahead of the terminal before its writes wait, and typed bytes that are kept for it. */
export const TX_BYTES = 1 << 14;
const RX_BYTES = 1 << 12;

// Words of the shared state.
const LOCK = 0;
const IER = 1;
const LCR = 2;
const MCR = 3;
const SCR = 4;
const DLL = 5;
const DLM = 6;
const FIFO_ON = 7;
/** 1: the transmitter went empty and the guest has not been told yet. */
const TX_EMPTY_PENDING = 8;
const IRQ_LEVEL = 9;
/** Queues: counts of bytes ever put in and taken out, modulo 2^32. */
const RX_IN = 10;
const RX_OUT = 11;
const TX_IN = 12;
const TX_OUT = 13;
/** 1: the main thread was told that there is output and has not looked yet. */
const TX_RUNG = 14;
/** 1: typed bytes wait outside for room in the receive queue. */
const RX_SHORT = 15;
const STATE_WORDS = 16;

const IER_RX = 1;
const IER_TX = 2;
const LCR_DLAB = 0x80;
const MCR_LOOP = 0x10;
const IIR_NONE = 0x01;
const IIR_TX = 0x02;
const IIR_RX = 0x04;
const IIR_FIFOS = 0xc0;
const LSR_DATA = 0x01;
const LSR_TX_EMPTY = 0x60;
const MSR_CTS_DSR_DCD = 0xb0;

export const newSerialState = (): SharedArrayBuffer =>
  new SharedArrayBuffer(STATE_WORDS * 4 + TX_BYTES + RX_BYTES);

/** Any thread's view of the UART. */
export class Serial {
  private readonly state: Int32Array;
  private readonly tx: Uint8Array;
  private readonly rx: Uint8Array;
  private readonly lock: Mutex;

  /**
   * `setIrq` drives the interrupt line; `ring` tells the main thread that there is output, or room for input. Both
   * are called by the thread that caused it.
   */
  constructor(
    shared: SharedArrayBuffer,
    private readonly setIrq: (level: 0 | 1) => void,
    private readonly ring: () => void,
  ) {
    this.state = new Int32Array(shared, 0, STATE_WORDS);
    this.tx = new Uint8Array(shared, STATE_WORDS * 4, TX_BYTES);
    this.rx = new Uint8Array(shared, STATE_WORDS * 4 + TX_BYTES, RX_BYTES);
    this.lock = new Mutex(this.state, LOCK);
  }

  /** Guest reads register 0 to 7. */
  read(register: number): number {
    this.lock.acquire();
    try {
      const value = this.readLocked(register);
      this.updateIrq();
      return value;
    } finally {
      this.lock.release();
    }
  }

  /** Guest writes register 0 to 7. Waits while the terminal is TX_BYTES behind. */
  write(register: number, value: number): void {
    this.lock.acquire();
    try {
      this.writeLocked(register, value);
      this.updateIrq();
    } finally {
      this.lock.release();
    }
  }

  private writeLocked(register: number, value: number): void {
    const { state } = this;
    const divisor = (state[LCR]! & LCR_DLAB) !== 0;
    if (register === 0 && !divisor) {
      if ((state[MCR]! & MCR_LOOP) !== 0) this.putRx(value);
      else this.putTx(value);
      state[TX_EMPTY_PENDING] = 1;
    } else if (register === 0) state[DLL] = value;
    else if (register === 1 && divisor) state[DLM] = value;
    else if (register === 1) {
      if ((value & ~state[IER]! & IER_TX) !== 0) state[TX_EMPTY_PENDING] = 1;
      state[IER] = value & 0x0f;
    } else if (register === 2) {
      state[FIFO_ON] = value & 1;
      if ((value & 2) !== 0) state[RX_OUT] = state[RX_IN]!;
    } else if (register === 3) state[LCR] = value;
    else if (register === 4) state[MCR] = value & 0x1f;
    else if (register === 7) state[SCR] = value;
  }

  /** Puts typed bytes into the receive queue; returns how many fitted. When not all did, a ring says when to go on. */
  pushInput(bytes: Uint8Array): number {
    this.lock.acquire();
    try {
      let count = 0;
      while (count < bytes.length && this.putRx(bytes[count]!)) count++;
      this.state[RX_SHORT] = count < bytes.length ? 1 : 0;
      this.updateIrq();
      return count;
    } finally {
      this.lock.release();
    }
  }

  /** Takes what the guest wrote since the last time; a copy. */
  takeOutput(): Buffer {
    const { state, tx } = this;
    Atomics.store(state, TX_RUNG, 0);
    const first = Atomics.load(state, TX_OUT);
    const count = (Atomics.load(state, TX_IN) - first) >>> 0;
    const output = Buffer.alloc(count);
    for (let i = 0; i < count; i++) output[i] = tx[(first + i) & (TX_BYTES - 1)]!;
    Atomics.store(state, TX_OUT, (first + count) | 0);
    Atomics.notify(state, TX_OUT);
    return output;
  }

  /** Throws output away when a vCPU waits for room: it is to stop, and nobody takes any. */
  dropIfFull(): void {
    const { state } = this;
    if ((Atomics.load(state, TX_IN) - Atomics.load(state, TX_OUT)) >>> 0 >= TX_BYTES) this.takeOutput();
  }

  private readLocked(register: number): number {
    const { state } = this;
    const divisor = (state[LCR]! & LCR_DLAB) !== 0;
    switch (register) {
      case 0:
        if (divisor) return state[DLL]!;
        if (this.rxCount() === 0) return 0;
        state[RX_OUT] = (state[RX_OUT]! + 1) | 0;
        if (state[RX_SHORT] === 1 && this.rxCount() <= RX_BYTES / 2) {
          state[RX_SHORT] = 0;
          this.ring();
        }
        return this.rx[(state[RX_OUT]! - 1) & (RX_BYTES - 1)]!;
      case 1:
        return divisor ? state[DLM]! : state[IER]!;
      case 2: {
        const identity = this.pendingInterrupt();
        if (identity === IIR_TX) state[TX_EMPTY_PENDING] = 0;
        return identity | (state[FIFO_ON] === 1 ? IIR_FIFOS : 0);
      }
      case 3:
        return state[LCR]!;
      case 4:
        return state[MCR]!;
      case 5:
        return LSR_TX_EMPTY | (this.rxCount() > 0 ? LSR_DATA : 0);
      case 6: {
        const mcr = state[MCR]!;
        if ((mcr & MCR_LOOP) === 0) return MSR_CTS_DSR_DCD;
        // Loopback: RTS, DTR, OUT1, OUT2 appear as CTS, DSR, RI, DCD.
        return ((mcr & 2) << 3) | ((mcr & 1) << 5) | ((mcr & 4) << 4) | ((mcr & 8) << 4);
      }
      default:
        return state[SCR]!;
    }
  }

  private rxCount(): number {
    return (this.state[RX_IN]! - this.state[RX_OUT]!) >>> 0;
  }

  private putRx(value: number): boolean {
    if (this.rxCount() === RX_BYTES) return false;
    this.rx[this.state[RX_IN]! & (RX_BYTES - 1)] = value;
    this.state[RX_IN] = (this.state[RX_IN]! + 1) | 0;
    return true;
  }

  /** Called with the lock held; gives it up while it waits, because who takes output may also bring input. */
  private putTx(value: number): void {
    const { state } = this;
    for (;;) {
      const taken = Atomics.load(state, TX_OUT);
      if ((state[TX_IN]! - taken) >>> 0 < TX_BYTES) break;
      this.lock.release();
      Atomics.wait(state, TX_OUT, taken, 100);
      this.lock.acquire();
    }
    this.tx[state[TX_IN]! & (TX_BYTES - 1)] = value;
    Atomics.store(state, TX_IN, (state[TX_IN]! + 1) | 0);
    if (Atomics.exchange(state, TX_RUNG, 1) === 0) this.ring();
  }

  private pendingInterrupt(): number {
    const { state } = this;
    if ((state[IER]! & IER_RX) !== 0 && this.rxCount() > 0) return IIR_RX;
    if ((state[IER]! & IER_TX) !== 0 && state[TX_EMPTY_PENDING] === 1) return IIR_TX;
    return IIR_NONE;
  }

  private updateIrq(): void {
    const level = this.pendingInterrupt() === IIR_NONE ? 0 : 1;
    if (level !== this.state[IRQ_LEVEL]) {
      this.state[IRQ_LEVEL] = level;
      this.setIrq(level);
    }
  }
}
