// Reproducible randomness for tests: a failure names the seed, the seed repeats the failure.

export { SOAK } from "../../soak.js";

/** The seeds of a randomized test: 0 to count - 1, or the one that PVDMA_SEED names, to repeat a failure. */
export function seeds(count: number): number[] {
  const { PVDMA_SEED } = process.env;
  return PVDMA_SEED === undefined ? Array.from({ length: count }, (_, seed) => seed) : [Number(PVDMA_SEED)];
}

/** A 32-bit xorshift generator (Marsaglia 2003); good enough to stumble over bugs. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = Math.imul(seed + 1, 0x9e3779b1) | 1;
  }

  /** 0 to 2^32 - 1. */
  next(): number {
    let x = this.#state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#state = x;
    return x >>> 0;
  }

  /** 0 to n - 1. */
  below(n: number): number {
    return this.next() % n;
  }

  /** One of `n`. */
  oneIn(n: number): boolean {
    return this.below(n) === 0;
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.below(items.length)];
    if (item === undefined) throw new RangeError("nothing to pick from");
    return item;
  }
}
