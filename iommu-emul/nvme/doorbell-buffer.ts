// Doorbells in guest memory (5.7, 7.13): the guest writes a queue's new tail or head to the shadow page, and the register
// only when the value passes the event index, which the controller puts into a second page. While the controller is at
// work it leaves the indexes as they are and looks at the shadow page by itself; before it rests it moves them.

import type { DmaPort } from "../device.js";

export class DoorbellBuffer {
  readonly #dma: DmaPort;
  readonly #shadow: Buffer;
  readonly #words: Uint32Array;
  readonly #index = Buffer.alloc(4);
  readonly #fence = new Int32Array(new SharedArrayBuffer(4));
  #shadowIova = 0;
  #indexIova = 0;
  enabled = false;

  /** `queues`: pairs with the admin pair, 1 to 512, so that all are in one page. */
  constructor(dma: DmaPort, queues: number) {
    this.#dma = dma;
    this.#shadow = Buffer.alloc(queues * 8);
    this.#words = new Uint32Array(this.#shadow.buffer, this.#shadow.byteOffset, queues * 2);
  }

  /** Takes both pages into use. False when the shadow page cannot be read. */
  enable(shadowIova: number, indexIova: number): boolean {
    this.#shadowIova = shadowIova;
    this.#indexIova = indexIova;
    this.enabled = this.look();
    return this.enabled;
  }

  disable(): void {
    this.enabled = false;
  }

  /** Copies the shadow page. False when it cannot be read. */
  look(): boolean {
    return this.#dma.read(this.#shadowIova, this.#shadow, 0, this.#shadow.length) === 0;
  }

  /** What look() saw. */
  tailOf(queue: number): number {
    return this.#words[queue * 2]!;
  }
  headOf(queue: number): number {
    return this.#words[queue * 2 + 1]!;
  }

  /** The guest is to write the register when it passes `value`. False when the page cannot be written. */
  setTailEvent(queue: number, value: number): boolean {
    return this.#setEvent(queue * 8, value);
  }
  setHeadEvent(queue: number, value: number): boolean {
    return this.#setEvent(queue * 8 + 4, value);
  }

  #setEvent(offset: number, value: number): boolean {
    this.#index.writeUInt32LE(value, 0);
    return this.#dma.write(this.#indexIova + offset, this.#index, 0, 4) === 0;
  }

  /**
   * Between writing an event index and looking at the shadow page again. x86 lets a load pass an earlier store; then
   * neither side would see the other's. An atomic operation is a full barrier there, whatever memory it is on.
   */
  fence(): void {
    Atomics.exchange(this.#fence, 0, 0);
  }
}
