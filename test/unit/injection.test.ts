// Failures on demand: which calls a rule strikes, for every kind of rule, the same for the same seed, whatever thread
// makes the calls; and what the engine makes of it.

import assert from "node:assert/strict";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import { CALLS, MAP_FLAG, STATUS } from "../../hypercalls/abi.js";
import { Dispatcher, FRAME_WORDS } from "../../hypercalls/dispatcher.js";
import {
  createInjection,
  INJECT,
  INJECTION_RULES_MAX,
  type InjectionRule,
  Injector,
} from "../../hypercalls/injection.js";
import { ERRNO, status } from "../../hypercalls/status.js";
import { entryWords, FakeGuestMemory, MiB, makeEngine, PAGE, reach, stat } from "./support/engine-fixture.js";
import type { InjectionJob } from "./support/injection-worker.js";

const RW = MAP_FLAG.read | MAP_FLAG.write;
const ANY = 2 ** 64;
const BASE: InjectionRule = {
  calls: "map",
  handle: 0,
  minBytes: 0,
  skip: 0,
  when: { every: 1 },
  burst: 1,
  effect: { errno: "ENOSPC" },
};

/** Which of `calls` map calls of one page a rule strikes: x, or . for those that pass. */
function pattern(change: Partial<InjectionRule>, calls: number): string {
  const injector = new Injector(createInjection());
  injector.add({ ...BASE, ...change });
  return strikes(injector, calls);
}

function strikes(injector: Injector, calls: number): string {
  let text = "";
  for (let call = 0; call < calls; call++) text += injector.decide(INJECT.map, 1, PAGE) === 0 ? "." : "x";
  return text;
}

const rules = suite("injection: rules");

rules("every Nth, from the first; skip lets some pass; a burst goes on and does not count", () => {
  assert.equal(pattern({}, 5), "xxxxx");
  assert.equal(pattern({ when: { every: 3 } }, 9), "..x..x..x");
  assert.equal(pattern({ when: { every: 3 }, skip: 2 }, 9), "....x..x.");
  assert.equal(pattern({ when: { every: 3 }, burst: 2 }, 9), "..xx..xx.");
  assert.equal(pattern({ when: { every: 2 }, burst: 5 }, 13), ".xxxxx.xxxxx.");
});

rules("the next N, each with its burst, and then it is exhausted and counts no more", () => {
  assert.equal(pattern({ when: { next: 3 } }, 6), "xxx...");
  assert.equal(pattern({ when: { next: 1 }, skip: 4 }, 6), "....x.");
  assert.equal(pattern({ when: { next: 2 }, burst: 2 }, 6), "xxxx..");
  const injector = new Injector(createInjection());
  const id = injector.add({ ...BASE, when: { next: 2 }, skip: 1 });
  strikes(injector, 10);
  assert.deepEqual(injector.list(), [
    { id, rule: { ...BASE, when: { next: 2 }, skip: 1 }, matched: 3, struck: 2 },
  ]);
});

rules("for the first T ms, on any clock", () => {
  let now = 1000;
  const injector = new Injector(createInjection(), () => now);
  injector.add({ ...BASE, when: { forMs: 50 }, skip: 1 });
  assert.equal(strikes(injector, 3), ".xx");
  now = 1049;
  assert.equal(strikes(injector, 1), "x");
  now = 1050;
  assert.equal(strikes(injector, 2), "..");
  assert.deepEqual(
    injector.list().map(({ matched, struck }) => [matched, struck]),
    [[4, 3]],
  );
  injector.add({ ...BASE, when: { forMs: 50 } }, 1001);
  assert.equal(strikes(injector, 1), "x");
  now = 1051;
  assert.equal(strikes(injector, 1), ".");
});

rules("with a probability: the same for a seed, another for another, and about as often as it says", () => {
  const chance = (probability: number, seed: number, calls: number, burst = 1) =>
    pattern({ when: { probability, seed }, burst }, calls);
  assert.equal(chance(0.3, 7, 500), chance(0.3, 7, 500));
  assert.notEqual(chance(0.3, 7, 500), chance(0.3, 8, 500));
  assert.equal(chance(0, 7, 100), ".".repeat(100));
  assert.equal(chance(1, 7, 100), "x".repeat(100));
  for (const [probability, seed] of [
    [0.01, 0],
    [0.2, 1],
    [0.5, 2 ** 32 - 1],
  ] as const) {
    const calls = 200_000;
    const struck = chance(probability, seed, calls).replaceAll(".", "").length;
    const deviation = Math.sqrt(calls * probability * (1 - probability));
    assert.ok(
      Math.abs(struck - calls * probability) < 5 * deviation,
      `${struck} of ${calls} at ${probability}`,
    );
  }
  const bursts = chance(0.02, 3, 20_000, 100)
    .split(/\.+/)
    .filter((each) => each !== "");
  assert.ok(bursts.length > 50);
  for (const burst of bursts.slice(0, -1)) assert.equal(burst.length % 100, 0);
});

rules("a rule is about a kind of call, a device, and calls above a size", () => {
  const kinds = [INJECT.map, INJECT.unmap, INJECT.isAssigned];
  for (const [index, calls] of (["map", "unmap", "is-assigned"] as const).entries()) {
    const injector = new Injector(createInjection());
    injector.add({ ...BASE, calls });
    assert.deepEqual(
      kinds.map((kind) => injector.decide(kind, 1, PAGE) !== 0),
      kinds.map((_, i) => i === index),
    );
  }
  const injector = new Injector(createInjection());
  injector.add({ ...BASE, handle: 2, minBytes: PAGE, when: { every: 2 } });
  const ask = (handle: number, bytes: number) => injector.decide(INJECT.map, handle, bytes) !== 0;
  assert.equal(ask(2, PAGE + 1), false);
  for (const [handle, bytes] of [
    [1, 2 * PAGE],
    [2, PAGE],
    [2, 1],
  ] as const) {
    assert.equal(ask(handle, bytes), false, "no match, and not counted");
  }
  assert.equal(ask(2, PAGE + 1), true);
});

rules("several rules: the first one's errno, and each counts for itself", () => {
  const injector = new Injector(createInjection());
  const two = injector.add({ ...BASE, when: { every: 2 }, effect: { errno: "ENOMEM" } });
  const three = injector.add({ ...BASE, when: { every: 3 }, effect: { errno: "EAGAIN" } });
  const answers = Array.from({ length: 6 }, () => injector.decide(INJECT.map, 1, PAGE));
  assert.deepEqual(answers, [0, ERRNO.ENOMEM, ERRNO.EAGAIN, ERRNO.ENOMEM, 0, ERRNO.ENOMEM]);
  assert.deepEqual(
    injector.list().map(({ id, matched, struck }) => [id, matched, struck]),
    [
      [two, 6, 3],
      [three, 6, 2],
    ],
  );
});

rules(
  "16 rules and no more; what is listed is what was added; a place is used again with nothing left in it",
  () => {
    const memory = createInjection();
    const injector = new Injector(memory);
    const whens: InjectionRule["when"][] = [
      { every: 3 },
      { probability: 0.25, seed: 2 ** 32 - 1 },
      { next: 5 },
      { forMs: 100 },
    ];
    const effects: InjectionRule["effect"][] = [
      { errno: "ENOSPC" },
      { errno: "ENOMEM" },
      { errno: "EAGAIN" },
      { delayMs: 1.5 },
    ];
    const made = Array.from(
      { length: INJECTION_RULES_MAX },
      (_, i): InjectionRule => ({
        calls: (["map", "unmap", "is-assigned"] as const)[i % 3]!,
        handle: i,
        minBytes: 2 ** 30 + i,
        skip: i,
        when: whens[i % 4]!,
        burst: 1 + i,
        effect: effects[Math.floor(i / 4)]!,
      }),
    );
    made.forEach((rule, index) => {
      assert.equal(injector.add(rule), index + 1);
    });
    assert.equal(injector.add(BASE), 0);
    // Another thread's view is the same.
    assert.deepEqual(
      new Injector(memory).list(),
      made.map((rule, index) => ({ id: index + 1, rule, matched: 0, struck: 0 })),
    );
    for (const id of [0, 17, -1, 1.5, Number.NaN]) assert.equal(injector.remove(id), false);
    injector.clear();
    assert.deepEqual(injector.list(), []);
    assert.equal(injector.remove(1), false);
    assert.equal(injector.add({ ...BASE, when: { every: 2 } }), 1);
    assert.equal(strikes(injector, 4), ".x.x");
    assert.equal(injector.remove(1), true);
    assert.equal(injector.add({ ...BASE, when: { every: 2 } }), 1);
    assert.equal(strikes(injector, 4), ".x.x");
    injector.clear();
    assert.equal(strikes(injector, 4), "....");
  },
);

/** Makes calls on that many Workers, all at once; resolves with the strikes that each saw. */
function onThreads(threads: number, memory: SharedArrayBuffer, calls: number): Promise<number[]> {
  const file = new URL("./support/injection-worker.js", import.meta.url);
  const gate = new SharedArrayBuffer(4);
  new Int32Array(gate)[0] = threads;
  const workerData: InjectionJob = { memory, calls, gate };
  const strikesOf = () =>
    new Promise<number>((resolve, reject) => {
      const worker = new Worker(file, { workerData });
      worker.once("message", resolve);
      worker.once("error", reject);
    });
  return Promise.all(Array.from({ length: threads }, strikesOf));
}

rules("two threads share one sequence: together they are struck exactly as one is", async () => {
  for (const when of [{ every: 7 }, { probability: 0.1, seed: 42 }, { next: 12_345 }] as const) {
    const calls = 40_000;
    const alone = pattern({ when }, 2 * calls);
    const memory = createInjection();
    const injector = new Injector(memory);
    injector.add({ ...BASE, when });
    const struck = await onThreads(2, memory, calls);
    const [listed] = injector.list();
    const expected = alone.replaceAll(".", "").length;
    assert.equal(struck[0]! + struck[1]!, expected);
    assert.equal(listed!.struck, expected);
  }
});

rules(
  "a delay sleeps, adds up to 10 s at most, and ends when its rule goes or somebody wakes it",
  async () => {
    const injector = new Injector(createInjection());
    const sleep = () => {
      injector.sleptMs = 0;
      const start = performance.now();
      assert.equal(injector.decide(INJECT.map, 1, PAGE), 0);
      return performance.now() - start;
    };
    const id = injector.add({ ...BASE, effect: { delayMs: 30 } });
    const other = injector.add({ ...BASE, effect: { delayMs: 20 } });
    const both = sleep();
    assert.ok(both >= 49 && both < 5000, `${both} ms`);
    assert.equal(injector.sleptMs, 50);
    injector.remove(other);
    injector.sleptMs = 9_990;
    injector.decide(INJECT.map, 1, PAGE);
    injector.decide(INJECT.map, 1, PAGE);
    assert.equal(injector.sleptMs, 10_000);
    injector.remove(id);
    assert.ok(sleep() < 20);

    for (const end of ["remove", "wake"] as const) {
      const memory = createInjection();
      const main = new Injector(memory);
      const long = main.add({ ...BASE, effect: { delayMs: 5_000 } });
      const start = performance.now();
      // Two entries of one call: the second does not sleep any more.
      const done = onThreads(1, memory, 2);
      while (main.list()[0]!.struck === 0) await new Promise((resolve) => setTimeout(resolve, 5));
      if (end === "remove") main.remove(long);
      else main.wake();
      await done;
      assert.ok(performance.now() - start < 4_000, end);
      assert.equal(main.list().length, end === "remove" ? 0 : 1);
    }
  },
);

rules.run();

// ---- in the engine --------------------------------------------------------------------------------------------------

const inEngine = suite("injection: in the engine");

inEngine("a map that is struck maps nothing, and is counted apart from real failures", () => {
  const { engine, backends, pinCount } = makeEngine();
  const backend = backends[0]!;
  for (const [errno, expected] of [
    ["ENOSPC", status(STATUS.limit, ERRNO.ENOSPC)],
    ["ENOMEM", status(STATUS.limit, ERRNO.ENOMEM)],
    ["EAGAIN", status(STATUS.retry, ERRNO.EAGAIN)],
  ] as const) {
    const id = engine.injector.add({ ...BASE, effect: { errno } });
    assert.equal(engine.map(1, 0, PAGE, ANY, RW), expected);
    assert.equal(engine.injected, true);
    const list = entryWords([
      [0, PAGE],
      [9 * PAGE, PAGE],
    ]);
    assert.equal(engine.mapList(1, list, 2, ANY, RW), expected);
    assert.deepEqual([engine.out[1], engine.pages, backend.maps, pinCount(0)], [0, 0, 0, 0]);
    // What is no call to be tried is not struck, and does not count.
    assert.equal(engine.map(9, 0, PAGE, ANY, RW), status(STATUS.invalid, ERRNO.ENODEV));
    assert.equal(engine.map(1, 48 * PAGE, PAGE, ANY, RW), status(STATUS.invalid, ERRNO.EFAULT));
    assert.equal(engine.injected, false);
    assert.equal(engine.injector.list()[0]!.matched, 2);
    engine.injector.remove(id);
    assert.equal(engine.map(1, 0, PAGE, ANY, RW), 0);
    assert.equal(engine.release(1), 0);
    backend.maps = 0;
  }
});

inEngine("a list counts with the bytes of all its entries; a page that is touched twice does not", () => {
  const { engine } = makeEngine();
  engine.injector.add({ ...BASE, minBytes: PAGE });
  assert.equal(engine.map(1, 100, PAGE, ANY, RW), 0, "two pages, but not more than 4096 bytes");
  assert.notEqual(engine.map(1, 0, PAGE + 1, ANY, RW), 0);
  const list = (bytes: number) =>
    entryWords([
      [0, PAGE / 2],
      [9 * PAGE, bytes],
    ]);
  assert.equal(engine.mapList(1, list(PAGE / 2), 2, ANY, RW), 0);
  assert.notEqual(engine.mapList(1, list(PAGE / 2 + 1), 2, ANY, RW), 0);
});

inEngine("an unmap that is struck leaves the mapping; a list stops there", () => {
  const { engine, backends } = makeEngine();
  const at = [1, 2, 3].map((page) => {
    engine.map(1, page * PAGE, PAGE, ANY, RW);
    return engine.out[0]!;
  });
  engine.injector.add({ ...BASE, calls: "unmap", skip: 1, when: { next: 2 }, effect: { errno: "EAGAIN" } });
  const list = entryWords(at.map((each) => [each, PAGE]));
  const retry = status(STATUS.retry, ERRNO.EAGAIN);
  assert.equal(engine.unmapList(1, list, 3), retry);
  assert.deepEqual([engine.out[0], engine.out[1], engine.pages], [PAGE, 1, 1]);
  assert.equal(engine.unmap(1, at[1]!, PAGE), retry);
  assert.deepEqual(
    at.map((each) => reach(backends[0]!, each, MAP_FLAG.read) !== -1),
    [false, true, true],
  );
  assert.equal(stat(engine, "dma/stuck_mappings"), 0);
  assert.equal(engine.unmapList(1, entryWords([at[1]!, at[2]!].map((each) => [each, PAGE])), 2), 0);
  assert.equal(engine.mappedBytes(1), 0);
});

inEngine("is-assigned: of assigned devices, by their handle", () => {
  const { engine } = makeEngine();
  engine.injector.add({ ...BASE, calls: "is-assigned", handle: 2 });
  assert.equal(engine.isAssigned(0x10), 0);
  assert.equal(engine.out[0], 1);
  assert.equal(engine.isAssigned(0x18), status(STATUS.limit, ERRNO.ENOSPC));
  assert.equal(engine.out[0], 0);
  engine.injector.add({ ...BASE, calls: "is-assigned", effect: { errno: "EAGAIN" } });
  assert.equal(engine.isAssigned(0x77), 0, "no device of ours");
  assert.equal(engine.isAssigned(0x10), status(STATUS.retry, ERRNO.EAGAIN));
  engine.removeDevice(1);
  assert.equal(engine.isAssigned(0x10), status(STATUS.gone, ERRNO.ENODEV), "gone is gone");
});

inEngine(
  "statistics keep injected and real failures apart, per call and per device; delays count as neither",
  () => {
    const { engine, backends } = makeEngine();
    const memory = new FakeGuestMemory();
    const dispatcher = new Dispatcher(engine, memory);
    const frame = new Float64Array(FRAME_WORDS);
    const call = (...words: number[]) => {
      frame.set(words);
      dispatcher.dispatch(frame, 0);
      return frame[0]!;
    };
    const map = (handle: number) => call(CALLS.map.number, handle, 0, PAGE, ANY, RW);
    engine.injector.add({ ...BASE, handle: 1, when: { next: 2 } });
    engine.injector.add({ ...BASE, handle: 2, effect: { delayMs: 3 }, when: { next: 2 } });
    for (let i = 0; i < 2; i++) assert.notEqual(map(1), 0);
    backends[0]!.mapFault = () => ({ errno: ERRNO.ENOMEM });
    assert.notEqual(map(1), 0);
    backends[0]!.mapFault = () => undefined;
    assert.equal(map(1), 0);
    assert.equal(map(2), 0);
    assert.notEqual(call(CALLS.map.number, 77, 0, PAGE, ANY, RW), 0);
    engine.injector.add({ ...BASE, calls: "unmap" });
    memory.page(MiB).set(entryWords([[2 ** 30, PAGE]]));
    assert.notEqual(call(CALLS.unmap_list.number, 2, MiB, 1), 0);

    const numbers = Object.fromEntries(engine.stats());
    const first = "devices/0000:01:00.0";
    const second = "devices/0000:02:00.0";
    const expected: Record<string, number> = {
      hypercall_map: 6,
      hypercall_unmap: 1,
      "hypercalls/map/calls": 6,
      "hypercalls/map/errors": 2,
      "hypercalls/map/injected": 2,
      "hypercalls/unmap_list/errors": 0,
      "hypercalls/unmap_list/injected": 1,
      "hypercalls/status/limit": 4,
      "dma/limit_hits": 1,
      "dma/injected": 3,
      "dma/delayed": 1,
      [`${first}/hypercalls/map/calls`]: 4,
      [`${first}/hypercalls/map/errors`]: 1,
      [`${first}/hypercalls/map/injected`]: 2,
      [`${first}/dma/limit_hits`]: 1,
      [`${first}/dma/injected`]: 2,
      [`${second}/hypercalls/map/calls`]: 1,
      [`${second}/hypercalls/map/errors`]: 0,
      [`${second}/dma/limit_hits`]: 0,
      [`${second}/dma/injected`]: 1,
    };
    const got = Object.fromEntries(Object.keys(expected).map((name) => [name, numbers[name]]));
    assert.deepEqual(got, expected);
  },
);

inEngine.run();
