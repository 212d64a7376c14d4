// Failures on demand: rules in shared memory that decide, per call, whether it fails or waits. Any thread makes,
// lists and removes rules while the vCPUs decide. Nothing here touches mappings, guest memory or a file.
//
// Each rule counts the calls that match it, whatever thread makes them, and decides by that count and a generator of
// its own: the same rule strikes at the same places of the same sequence of calls. Rules do not know of each other:
// where several strike, the first one's errno is it, and delays add up.

import { Mutex } from "./lock.js";
import { ERRNO } from "./status.js";

const CALL_KINDS = ["map", "unmap", "is-assigned"] as const;
const ERRNOS = ["ENOSPC", "ENOMEM", "EAGAIN"] as const;

/** A rule, as plain data; whoever makes it has checked it. */
export interface InjectionRule {
  /** map: map and map_list. unmap: unmap, and each entry of unmap_list. is-assigned: of assigned devices. */
  readonly calls: (typeof CALL_KINDS)[number];
  /** Handle of the device; 0: every device. */
  readonly handle: number;
  /** Only calls of more bytes than this; 0: all. (A list map has the bytes of all its entries.) */
  readonly minBytes: number;
  /** Lets the first `skip` matching calls pass. */
  readonly skip: number;
  /**
   * When it strikes, of the matching calls after those. every: each Nth. probability: each with this (0 to 1), by a
   * generator that starts from `seed` (0 to 2^32 - 1). next: the next N, and then never more. forMs: all, for so many
   * ms from when the rule was made.
   */
  readonly when:
    | { readonly every: number }
    | { readonly probability: number; readonly seed: number }
    | { readonly next: number }
    | { readonly forMs: number };
  /** A strike goes on for so many matching calls (1: just the one); these do not count for the next strike. */
  readonly burst: number;
  /**
   * errno: the call fails with it, before anything is done (ENOSPC, ENOMEM: class limit; EAGAIN: class retry).
   * delayMs: it sleeps first, and then is done; at most 10 s.
   */
  readonly effect: { readonly errno: (typeof ERRNOS)[number] } | { readonly delayMs: number };
}

/** A rule that is there. */
export interface ListedRule {
  /** 1 to 16. */
  readonly id: number;
  readonly rule: InjectionRule;
  /** Calls that matched, and those of them that were struck. */
  readonly matched: number;
  readonly struck: number;
}

export const INJECTION_RULES_MAX = 16;
/** A call sleeps no longer than this, however many rules or entries of a list say so. */
const DELAY_MAX_MS = 10_000;

// 32-bit words: the number of rules, the lock, a counter per place that changes to end the sleeps of its rule.
const RULES = 0;
const LOCK = 1;
const GENERATIONS = 2;
const WORDS = 32;

// A rule: doubles, under the lock. KIND 0 is a place that is free.
const KIND = 0;
const HANDLE = 1;
const MIN_BYTES = 2;
const SKIP = 3;
const WHEN = 4;
const AMOUNT = 5;
const SEED = 6;
const BURST = 7;
const EFFECT_ERRNO = 8;
const DELAY_MS = 9;
const MATCHED = 10;
const STRUCK = 11;
/** Calls since the last strike, for every; strikes, for next. */
const COUNT = 12;
const BURST_LEFT = 13;
const RANDOM = 14;
const END_MS = 15;
const FIELDS = 16;

const EVERY = 0;
const PROBABILITY = 1;
const NEXT = 2;
const FOR_MS = 3;

/** The calls that rules are about, as decide takes them. */
export const INJECT = { map: 1, unmap: 2, isAssigned: 3 } as const;

/** Shared memory without a rule. */
export const createInjection = (): SharedArrayBuffer =>
  new SharedArrayBuffer(WORDS * 4 + INJECTION_RULES_MAX * FIELDS * 8);

/** One thread's view of the rules. */
export class Injector {
  /** Milliseconds slept for the call under way; whoever begins a call sets it to 0. */
  sleptMs = 0;

  readonly #words: Int32Array;
  readonly #rules: Float64Array;
  readonly #lock: Mutex;
  readonly #now: () => number;
  /** By rule: how long the call in hand is to sleep, and the generation of the rule that says so. */
  readonly #sleepMs = new Float64Array(INJECTION_RULES_MAX);
  readonly #generation = new Int32Array(INJECTION_RULES_MAX);

  /** `now`: a clock in ms that all threads share. */
  constructor(memory: SharedArrayBuffer, now: () => number = Date.now) {
    this.#words = new Int32Array(memory, 0, WORDS);
    this.#rules = new Float64Array(memory, WORDS * 4);
    this.#lock = new Mutex(this.#words, LOCK);
    this.#now = now;
  }

  /** Adds a rule, from the next call on. Returns its id, 1 to 16, or 0 when there are as many as can be. */
  add(rule: InjectionRule, nowMs = this.#now()): number {
    const { when, effect } = rule;
    this.#lock.acquire();
    try {
      const rules = this.#rules;
      let id = 1;
      while (id <= INJECTION_RULES_MAX && rules[(id - 1) * FIELDS + KIND] !== 0) id++;
      if (id > INJECTION_RULES_MAX) return 0;
      const fields = rules.subarray((id - 1) * FIELDS, id * FIELDS);
      fields.fill(0);
      fields[HANDLE] = rule.handle;
      fields[MIN_BYTES] = rule.minBytes;
      fields[SKIP] = rule.skip;
      fields[BURST] = rule.burst;
      if ("every" in when) setWhen(fields, EVERY, when.every);
      else if ("probability" in when) setWhen(fields, PROBABILITY, when.probability);
      else if ("next" in when) setWhen(fields, NEXT, when.next);
      else setWhen(fields, FOR_MS, when.forMs);
      if ("forMs" in when) fields[END_MS] = nowMs + when.forMs;
      if ("probability" in when) {
        fields[SEED] = when.seed;
        fields[RANDOM] = when.seed | 0;
      }
      if ("errno" in effect) fields[EFFECT_ERRNO] = ERRNO[effect.errno];
      else fields[DELAY_MS] = effect.delayMs;
      fields[KIND] = CALL_KINDS.indexOf(rule.calls) + 1;
      Atomics.add(this.#words, RULES, 1);
      return id;
    } finally {
      this.#lock.release();
    }
  }

  /** Removes a rule, and ends the sleeps it caused; false when there is none of that id. */
  remove(id: number): boolean {
    if (!Number.isInteger(id) || id < 1 || id > INJECTION_RULES_MAX) return false;
    this.#lock.acquire();
    try {
      const at = (id - 1) * FIELDS;
      if (this.#rules[at + KIND] === 0) return false;
      this.#rules[at + KIND] = 0;
      Atomics.sub(this.#words, RULES, 1);
      this.#wakeOf(id - 1);
      return true;
    } finally {
      this.#lock.release();
    }
  }

  /** Removes all rules, and ends the sleeps they caused. */
  clear(): void {
    for (let id = 1; id <= INJECTION_RULES_MAX; id++) this.remove(id);
  }

  /** Ends all sleeps that are under way; rules stay. For whoever ends the machine: a sleep can take seconds. */
  wake(): void {
    for (let index = 0; index < INJECTION_RULES_MAX; index++) this.#wakeOf(index);
  }

  /** Whether there are rules for maps, exhausted ones as well. */
  get hasMapRules(): boolean {
    return this.list().some(({ rule }) => rule.calls === "map");
  }

  /** The rules that there are, exhausted ones as well, by id. */
  list(): ListedRule[] {
    this.#lock.acquire();
    try {
      const listed: ListedRule[] = [];
      for (let id = 1; id <= INJECTION_RULES_MAX; id++) {
        const fields = this.#rules.subarray((id - 1) * FIELDS, id * FIELDS);
        if (fields[KIND] === 0) continue;
        listed.push({ id, rule: ruleOf(fields), matched: fields[MATCHED]!, struck: fields[STRUCK]! });
      }
      return listed;
    } finally {
      this.#lock.release();
    }
  }

  /**
   * Decides about a call: one of INJECT, its device, its bytes. Sleeps here where a rule says so; the caller holds no
   * lock. Returns the errno with which the call is to fail, or 0. Without a rule it costs one load.
   */
  decide(kind: number, handle: number, bytes: number): number {
    // Not an atomic one, which is a call: a call that is under way may miss a rule that was just made.
    return this.#words[RULES] === 0 ? 0 : this.#ask(kind, handle, bytes);
  }

  #wakeOf(index: number): void {
    Atomics.add(this.#words, GENERATIONS + index, 1);
    Atomics.notify(this.#words, GENERATIONS + index);
  }

  #ask(kind: number, handle: number, bytes: number): number {
    const rules = this.#rules;
    let errno = 0;
    let sleeps = false;
    this.#lock.acquire();
    try {
      for (let index = 0; index < INJECTION_RULES_MAX; index++) {
        const at = index * FIELDS;
        this.#sleepMs[index] = 0;
        if (rules[at + KIND] !== kind) continue;
        if (rules[at + HANDLE] !== 0 && rules[at + HANDLE] !== handle) continue;
        if (rules[at + MIN_BYTES] !== 0 && !(bytes > rules[at + MIN_BYTES]!)) continue;
        if (this.#isExhausted(at)) continue;
        rules[at + MATCHED]!++;
        if (!this.#strikes(at)) continue;
        rules[at + STRUCK]!++;
        if (errno === 0) errno = rules[at + EFFECT_ERRNO]!;
        if (rules[at + DELAY_MS] === 0) continue;
        this.#sleepMs[index] = rules[at + DELAY_MS]!;
        this.#generation[index] = Atomics.load(this.#words, GENERATIONS + index);
        sleeps = true;
      }
    } finally {
      this.#lock.release();
    }
    if (sleeps) this.#sleep();
    return errno;
  }

  /** Whether the rule matches nothing any more. A burst that `next` began goes to its end. */
  #isExhausted(at: number): boolean {
    const rules = this.#rules;
    switch (rules[at + WHEN]) {
      case NEXT:
        return rules[at + COUNT]! >= rules[at + AMOUNT]! && rules[at + BURST_LEFT] === 0;
      case FOR_MS:
        return this.#now() >= rules[at + END_MS]!;
      default:
        return false;
    }
  }

  /** Whether the rule strikes at the call that was just counted in MATCHED. */
  #strikes(at: number): boolean {
    const rules = this.#rules;
    if (rules[at + MATCHED]! <= rules[at + SKIP]!) return false;
    if (rules[at + BURST_LEFT]! > 0) {
      rules[at + BURST_LEFT]!--;
      return true;
    }
    if (!this.#begins(at)) return false;
    rules[at + BURST_LEFT] = rules[at + BURST]! - 1;
    return true;
  }

  /** Whether a strike begins here. */
  #begins(at: number): boolean {
    const rules = this.#rules;
    switch (rules[at + WHEN]) {
      case EVERY:
        rules[at + COUNT] = (rules[at + COUNT]! + 1) % rules[at + AMOUNT]!;
        return rules[at + COUNT] === 0;
      case PROBABILITY:
        return this.#random(at) < rules[at + AMOUNT]!;
      case NEXT:
        rules[at + COUNT]!++;
        return true;
      default:
        return true;
    }
  }

  /** The rule's next random number, 0 to 1, exclusive: a Weyl sequence through MurmurHash3's finalizer. */
  #random(at: number): number {
    const state = (this.#rules[at + RANDOM]! + 0x9e3779b9) | 0;
    this.#rules[at + RANDOM] = state;
    let x = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
  }

  /**
   * Sleeps for each rule that says so, until its time is over or the sleep is ended; then the call, which may have more
   * entries, sleeps no more.
   */
  #sleep(): void {
    for (let index = 0; index < INJECTION_RULES_MAX; index++) {
      const ms = Math.min(this.#sleepMs[index]!, DELAY_MAX_MS - this.sleptMs);
      if (ms <= 0) continue;
      this.sleptMs += ms;
      const end = Atomics.wait(this.#words, GENERATIONS + index, this.#generation[index]!, ms);
      if (end !== "timed-out") this.sleptMs = DELAY_MAX_MS;
    }
  }
}

function setWhen(fields: Float64Array, kind: number, amount: number): void {
  fields[WHEN] = kind;
  fields[AMOUNT] = amount;
}

/** What was given to add. */
function ruleOf(fields: Float64Array): InjectionRule {
  const amount = fields[AMOUNT]!;
  const whens: readonly InjectionRule["when"][] = [
    { every: amount },
    { probability: amount, seed: fields[SEED]! },
    { next: amount },
    { forMs: amount },
  ];
  const errno = ERRNOS.find((name) => ERRNO[name] === fields[EFFECT_ERRNO]);
  return {
    calls: CALL_KINDS[fields[KIND]! - 1]!,
    handle: fields[HANDLE]!,
    minBytes: fields[MIN_BYTES]!,
    skip: fields[SKIP]!,
    when: whens[fields[WHEN]!]!,
    burst: fields[BURST]!,
    effect: errno === undefined ? { delayMs: fields[DELAY_MS]! } : { errno },
  };
}
