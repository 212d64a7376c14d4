// Rules of failures on demand as people write them: what they become, what is refused and how, and the way back.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { createInjection, Injector } from "../../hypercalls/injection.js";
import { UsageError } from "../../vmm/errors.js";
import { parseInjectSpec, ruleOf, ruleText } from "../../vmm/inject-spec.js";
import { parseBdf } from "../../vmm/vfio/sysfs.js";

const test = suite("inject spec");
const assigned = [parseBdf("0000:02:00.0"), parseBdf("0000:03:00.0")];
const read = (text: string) => ruleOf(parseInjectSpec(text), assigned, `--inject ${text}`);
const rule = { calls: "map", handle: 0, minBytes: 0, skip: 0, burst: 1, when: { every: 1 } } as const;

test("what is not said has a default", () => {
  assert.equal(read("map"), { ...rule, effect: { errno: "ENOSPC" } });
  assert.equal(read("unmap"), { ...rule, calls: "unmap", effect: { errno: "ENOSPC" } });
  assert.equal(read("is-assigned"), { ...rule, calls: "is-assigned", effect: { errno: "ENOSPC" } });
});

test("every key", () => {
  assert.equal(read("map,device=03:00.0,above=64K,skip=7,next=3,burst=100,errno=ENOMEM"), {
    calls: "map",
    handle: 2,
    minBytes: 65536,
    skip: 7,
    when: { next: 3 },
    burst: 100,
    effect: { errno: "ENOMEM" },
  });
  assert.equal(read("map,p=0.25,seed=9").when, { probability: 0.25, seed: 9 });
  assert.equal(read("map,p=1e-3").when, { probability: 0.001, seed: 1 });
  assert.equal(read("map,every=5").when, { every: 5 });
  assert.equal(read("unmap,for=1500,errno=EAGAIN"), {
    ...rule,
    calls: "unmap",
    when: { forMs: 1500 },
    effect: { errno: "EAGAIN" },
  });
  assert.equal(read("map,delay=2.5").effect, { delayMs: 2.5 });
});

const wrong: readonly (readonly [text: string, message: string])[] = [
  ["", "names no call; there are map, unmap and is-assigned"],
  ["mop", "mop is no call that can fail; there are map, unmap and is-assigned"],
  ["map,p", "p is not KEY=VALUE; see --help"],
  [
    "map,often=1",
    "unknown key often; there are device, above, skip, every, p, seed, next, for, burst, errno, delay",
  ],
  ["map,p=0.1,p=0.2", "p is given twice"],
  ["map,p=0", "p: not a number above 0, up to 1"],
  ["map,p=1.5", "p: not a number above 0, up to 1"],
  ["map,p=NaN", "p: not a number above 0, up to 1"],
  ["map,every=0", "every: not a whole number from 1 to 1000000000"],
  ["map,next=-1", "next: not a whole number from 1 to 1000000000"],
  ["map,burst=0", "burst: not a whole number from 1 to 1000000000"],
  ["map,skip=1.5", "skip: not a whole number from 0 to 1000000000"],
  ["map,p=0.5,seed=4294967296", "seed: not a whole number from 0 to 4294967295"],
  ["map,errno=EIO", "errno: not one of ENOSPC, ENOMEM, EAGAIN"],
  ["map,delay=10001", "delay: not a number above 0, up to 10000"],
  ["map,above=2G", "above: no call maps more than 1G"],
  ["map,above=lots", "above: not a size; give a number with K, M, G or T, such as 512M"],
  ["is-assigned,above=4K", "above: an is-assigned call has no size"],
  ["map,every=2,p=0.5", "every and p: give one of every, p, next and for"],
  ["map,errno=ENOMEM,delay=5", "errno and delay: give one of errno and delay"],
  ["map,every=2,seed=5", "seed is for p, and there is none"],
  [
    "map,device=nvme0",
    'device: "nvme0" is no PCI address; it looks like 0000:02:00.0 or 02:00.0 (see lspci -D)',
  ],
  ["map,device=09:00.0", "0000:09:00.0 is not assigned; assigned: 0000:02:00.0, 0000:03:00.0"],
];
for (const [text, message] of wrong) {
  test(`refused: ${text === "" ? "nothing" : text}`, () => {
    try {
      read(text);
    } catch (error) {
      assert.instance(error, UsageError);
      assert.is((error as Error).message.replace(/^--inject [^ ]*: /, ""), message);
      return;
    }
    assert.unreachable("it was taken");
  });
}

test("a rule as text is the rule again, also when it comes from the engine", () => {
  const texts = [
    "map,every=1,errno=ENOSPC",
    "map,device=0000:02:00.0,above=64K,skip=7,next=3,burst=100,errno=ENOMEM",
    "unmap,p=0.125,seed=7,errno=EAGAIN",
    "is-assigned,for=250,delay=12.5",
  ];
  const injector = new Injector(createInjection());
  for (const text of texts) {
    assert.is(ruleText(read(text), assigned), text);
    injector.add(read(text));
  }
  assert.equal(
    injector.list().map((listed) => ruleText(listed.rule, assigned)),
    texts,
  );
});

test.run();
