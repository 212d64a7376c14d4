// A mutex in shared memory for the threads of one process: one 32-bit word, sleeping by Atomics.wait (a futex).
// Works in Workers and on Node's main thread. Not recursive, not fair; a thread that is terminated while it holds
// the lock leaves it held, so threads that use one are asked to stop, never terminated.

const FREE = 0;
const HELD = 1;
/** Held, and somebody may sleep: the holder has to wake one. */
const CONTENDED = 2;

/** Looks at the word this often before it sleeps: some hundred ns, less than a sleep and a wake cost. */
const SPINS = 40;

/**
 * Three-state mutex (Ulrich Drepper, "Futexes Are Tricky", 2011, mutex 2): without contention an acquire and a
 * release are one atomic operation each. A fresh, zeroed word is a free lock.
 */
export class Mutex {
  readonly #words: Int32Array;
  readonly #at: number;

  /** `words` is a view of a SharedArrayBuffer, `at` the index of the lock's word in it. */
  constructor(words: Int32Array, at: number) {
    this.#words = words;
    this.#at = at;
  }

  /** Returns when the lock is held. Release it in a `finally`. */
  acquire(): void {
    const words = this.#words;
    const at = this.#at;
    for (let spin = 0; spin < SPINS; spin++) {
      if (Atomics.compareExchange(words, at, FREE, HELD) === FREE) return;
    }
    // Whoever slept cannot know whether others still do, so it takes the lock as contended: one wake too many at most.
    while (Atomics.exchange(words, at, CONTENDED) !== FREE) Atomics.wait(words, at, CONTENDED);
  }

  release(): void {
    if (Atomics.exchange(this.#words, this.#at, FREE) === CONTENDED) Atomics.notify(this.#words, this.#at, 1);
  }
}
