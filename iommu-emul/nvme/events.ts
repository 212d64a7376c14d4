// Asynchronous events (5.2): requests of the guest that wait for something to tell, and what waits for a request.
// An event's type is reported once, and then not again until the guest has read the log page that belongs to it.

import { ASYNC_REQUESTS_MAX, EVENT, STATUS } from "./spec.js";

const TYPE_MASK = 7;
/** One pending event of each kind is enough: the log says the rest. */
const KINDS = Object.values(EVENT);

export interface EventAnswer {
  readonly commandId: number;
  readonly status: number;
  readonly result: number;
}

export class AsyncEvents {
  readonly #requests: number[] = [];
  readonly #aborted: number[] = [];
  readonly #pending = new Set<number>();
  /** A bit per event type that was reported and whose log page was not read since. */
  #masked = 0;

  /** A request came; false when there are too many. */
  request(commandId: number): boolean {
    if (this.#requests.length >= ASYNC_REQUESTS_MAX) return false;
    this.#requests.push(commandId);
    return true;
  }

  /** Takes a request back: it is answered as aborted. False when there is none with that id. */
  abort(commandId: number): boolean {
    const at = this.#requests.indexOf(commandId);
    if (at < 0) return false;
    this.#requests.splice(at, 1);
    this.#aborted.push(commandId);
    return true;
  }

  /** Something happened: one of EVENT. */
  raise(event: number): void {
    this.#pending.add(event);
  }

  /** A log page was read with Retain Asynchronous Event clear. */
  logRead(page: number): void {
    for (const event of KINDS) {
      if (event >>> 16 !== page) continue;
      this.#masked &= ~(1 << (event & TYPE_MASK));
      this.#pending.delete(event);
    }
  }

  /** Takes the next answer to a request; undefined when there is nothing to say, or nobody asks. */
  take(): EventAnswer | undefined {
    const aborted = this.#aborted.shift();
    if (aborted !== undefined) return { commandId: aborted, status: STATUS.abortRequested, result: 0 };
    if (this.#requests.length === 0) return undefined;
    for (const event of this.#pending) {
      if ((this.#masked & (1 << (event & TYPE_MASK))) !== 0) continue;
      this.#pending.delete(event);
      this.#masked |= 1 << (event & TYPE_MASK);
      return { commandId: this.#requests.shift()!, status: STATUS.ok, result: event };
    }
    return undefined;
  }

  /** take() may have something. */
  get waiting(): boolean {
    return this.#aborted.length > 0 || (this.#pending.size > 0 && this.#requests.length > 0);
  }

  clear(): void {
    this.#requests.length = 0;
    this.#aborted.length = 0;
    this.#pending.clear();
    this.#masked = 0;
  }
}
