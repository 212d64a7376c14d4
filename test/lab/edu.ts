// The test of the DMA API (test/modules/edudma_*.c) in a guest: its image, the complete list of its checks, and the whole
// of it: in success, by mistake, and with a host that fails on demand. After each group of checks the guest's and the
// host's figures are compared. The device may be an assigned edu or any other with the same registers.

import * as assert from "uvu/assert";
import { buildGuestImage, buildModule } from "./guest.js";
import { getKernel, type KernelSeries } from "./packages.js";
import { assertSettles, type Policy } from "./recovery.js";
import { CONSOLE } from "./scripts.js";
import { assertViewsAgree, type RunningVmm } from "./support.js";

/** For each kind of mapping and allocation whose undoing can be repeated. */
const KINDS = [
  "single",
  "page",
  "sg_1",
  "sg_64",
  "sg_1000",
  "sgtable",
  "coherent",
  "attrs",
  "pages",
  "noncoherent",
];
const eachKind = (group: string, more: string[] = []) =>
  [...KINDS, ...more].map((kind) => `${group}_${kind}`);

/** The checks by the groups in which they are run: what edudma_good.c and edudma_bad.c have. */
export const EDU_CHECKS = {
  registers: ["identity", "liveness", "factorial", "factorial_irq", "raised_irq", "polled"],
  streaming: [
    "single_to_device",
    "single_from_device",
    "single_bidirectional",
    "page_last_byte",
    "page_crossing",
    "page_long",
    "sync_single",
    "attributes",
    "atomic",
    "twice",
    "many",
    "resource",
  ],
  lists: ["sg_1", "sg_64", "sg_1000", "sg_merged", "sg_limited", "sg_part", "sgtable"],
  coherent: [
    "coherent_64",
    "coherent_4K",
    "coherent_12K",
    "coherent_64K",
    "coherent_1M",
    "alloc_attrs",
    "alloc_atomic",
    "managed",
    "pages",
    "noncoherent",
    "noncontiguous",
    "pool",
    "get_sgtable",
    "mmap_coherent",
  ],
  limits: [
    "sizes",
    "too_long",
    "mask_24",
    "mask_28",
    "mask_32",
    "mask_40",
    "mask_64",
    "mask_too_small",
    "no_room",
    "sg_no_room",
  ],
  permissions: ["write_to_read_only", "read_of_write_only", "after_unmap", "after_unmap_sg", "neighbours"],
  misuse: [
    "double_unmap",
    "wrong_size",
    "wrong_start",
    "never_mapped",
    "unmap_zero",
    "double_unmap_sg",
    "wrong_nents",
    "coherent_wrong_free",
    "coherent_double_free",
  ],
  refused: eachKind("refused", ["noncontiguous", "pool", "many"]),
  retried: eachKind("retried", ["noncontiguous", "pool"]),
  kept: eachKind("kept"),
  again: eachKind("again"),
  delayed: ["delayed"],
} as const satisfies Record<string, readonly string[]>;

export type EduGroup = keyof typeof EDU_CHECKS;

/**
 * Runs a group, or a check, and prints its lines. Nothing of the kernel's may come between them: it is told to be quiet,
 * and what it would have said is looked at in the end.
 */
const SCRIPT = `
edu() {
  echo $1 1<>$(echo /dev/edudma-*) && sed 's/^/guest: edu /' /dev/edudma-*
}
dmesg -n 1
${CONSOLE}
`;

/** A guest that runs the checks on whatever edu it has, once it has loaded pvdma and edudma. */
export async function eduImage(kernel: KernelSeries): Promise<string> {
  const { file } = await buildModule(await getKernel(kernel), "test/modules", "edudma");
  return buildGuestImage({ kernel, script: SCRIPT, modules: [], moduleFiles: [file] });
}

/**
 * Runs a group, or one check of it, in a guest of an eduImage. Asserts that every check came; returns those that are not
 * ok, each with the reason.
 */
export async function runChecks(
  vmm: RunningVmm,
  group: EduGroup,
  check?: string,
): Promise<Record<string, string>> {
  const output = await vmm.sh(`edu ${check ?? group}`);
  const verdicts = [...output.matchAll(/^guest: edu (\S+) (.*)$/gm)].map((m) => [m[1]!, m[2]!] as const);
  assert.equal(
    verdicts.map(([name]) => name),
    check === undefined ? EDU_CHECKS[group] : [check],
    `the checks of ${check ?? group}`,
  );
  return Object.fromEntries(verdicts.filter(([, verdict]) => verdict !== "ok"));
}

/** What the guest's module counts, and by how much checks change it; 0 for what is not named. */
const COUNTED = [
  "outstanding",
  "retries",
  "errors/retry",
  "errors/limit",
  "errors/invalid",
  "errors/gone",
] as const;
type Changes = Partial<Record<(typeof COUNTED)[number], number>>;
const NO_CHANGES = Object.fromEntries(COUNTED.map((name) => [name, 0]));

// Of pvdma_core.h: how often a call is made while the host says EAGAIN.
const MAP_TRIES = 16;
const UNMAP_TRIES = 256;
/** Calls that fail when every map does: one for each check of `refused`, and 300 for refused_many. */
const REFUSED = EDU_CHECKS.refused.length - 1 + 300;
/**
 * Mistakes of `misuse` under policy cached, where each page of a mapping, or entry of a list, has a count: 1 of
 * double_unmap, 2 each of wrong_size, wrong_start and never_mapped, 1 of unmap_zero, 300 of double_unmap_sg, 63 of
 * wrong_nents, 2 of coherent_wrong_free, 1 of coherent_double_free.
 */
const MISUSE_CACHED = 374;
/** Mappings that stay when no unmap is done: one for each check of `kept`, but four ranges for 1,000 entries. */
const KEPT = EDU_CHECKS.kept.length + 3;

export interface EduDevice {
  /** Its address in the guest, and its name in the host's statistics. */
  guest: string;
  host: string;
  /** strict unless told otherwise. */
  policy?: Policy;
  /** Checks that its IOMMU or its policy makes fail, each with the reason. */
  notOk?: Record<string, string>;
}

/**
 * Checks that expect an address to be one mapping's alone, good one way alone, and dead when it is unmapped: under policy
 * cached it is the page's, both ways, for as long as the page stays mapped. A page can be unmapped by itself, so that what follows wrong_size and
 * wrong_start is not what they expect either.
 */
const NOT_CACHED: readonly string[] = [
  "twice",
  "many",
  "sg_merged",
  "sg_limited",
  "pages",
  "get_sgtable",
  "wrong_size",
  "wrong_start",
  "coherent_double_free",
];

/**
 * Uses and misuses every operation of the DMA API in a guest of an eduImage that is `ready`, with this device and no
 * other; ends the guest. Prints how long each step took. Under policy lazy some mistakes are found without a call, and a
 * call that meets a limit may be made again; under cached there are no unmaps that could fail, and nothing is out of
 * reach at once.
 */
export async function exerciseEdu(vmm: RunningVmm, device: EduDevice): Promise<void> {
  const { policy = "strict" } = device;
  const isCached = policy === "cached";
  /** Under policy lazy: mistakes that the guest's module found while what it was about was idle. */
  let foundEarly = 0;
  let figures = { guest: new Map<string, number>(), host: new Map<string, number>() };
  const ofDevice = (view: ReadonlyMap<string, number>, name: string) =>
    view.get(`${device.guest}/${name}`) ?? 0;

  /** By how much the figures of guest and host, which agree, changed since the last look. */
  const look = async (): Promise<{ changes: Record<string, number>; injected: number; mapLists: number }> => {
    const before = figures;
    if (policy === "lazy") await assertSettles(vmm);
    figures = await assertViewsAgree(vmm, foundEarly);
    const change = (name: string) => ofDevice(figures.guest, name) - ofDevice(before.guest, name);
    return {
      changes: Object.fromEntries(COUNTED.map((name) => [name, change(name)])),
      injected: figures.host.get("dma/injected")! - (before.host.get("dma/injected") ?? 0),
      mapLists: change("map_lists"),
    };
  };
  /** Runs a group, or a check of it: all is as it has to be, and the figures change by `changes`. Returns the others. */
  const run = async (group: EduGroup, changes: Changes | "any" = {}, check?: string) => {
    const begun = Date.now();
    const found = await runChecks(vmm, group, check);
    const isKnown = ([name]: [string, string]) => !(isCached && NOT_CACHED.includes(name));
    const notOk = Object.entries(device.notOk ?? {}).filter(([name]) =>
      (EDU_CHECKS[group] as readonly string[]).includes(name),
    );
    assert.equal(
      Object.fromEntries(Object.entries(found).filter(isKnown)),
      Object.fromEntries(notOk),
      `${check ?? group}: not ok`,
    );
    const looked = await look();
    console.log(`    ${check ?? group}: ${((Date.now() - begun) / 1000).toFixed(1)} s`);
    if (changes === "any") return looked;
    const { retries } = looked.changes;
    const again = policy === "lazy" && changes.retries === undefined ? { retries: retries! } : {};
    assert.equal(looked.changes, { ...NO_CHANGES, ...changes, ...again }, `what ${check ?? group} changed`);
    return looked;
  };

  await vmm.sh("modprobe pvdma && modprobe edudma");
  await look();

  // A host that does what it is asked for.
  await run("registers");
  await run("streaming", { "errors/invalid": 1 });
  await run("lists");
  await run("coherent");
  // Under policy cached a mask below the end of RAM is refused, and everything has its address already.
  if (!isCached) {
    await run("limits", { "errors/invalid": 1, "errors/limit": 9 });
    await run("permissions");
  }
  if (policy === "lazy") foundEarly = 3; // double_unmap, and the two ranges of double_unmap_sg
  const misuse = await run("misuse", isCached ? "any" : { "errors/invalid": 14 });
  // Of a list that is unmapped in two calls, wrong_nents, each counts as a mapping. And what wrong_size leaves counted may
  // be a page that wrong_start gets, whose last unmap is no mistake then.
  const more = misuse.changes.outstanding!;
  if (isCached) assert.is(misuse.changes["errors/invalid"]! - more, MISUSE_CACHED + 1);
  assert.is(await vmm.sh("dmesg | grep -c 'never freed'"), "3\n", "frees that were refused");
  const counted = (name: string) => figures.host.get(name);
  assert.is(
    counted("hypercalls/status/invalid"),
    isCached ? 0 : 16 - foundEarly,
    "mistakes that the host counted",
  );
  const [told, again] = ["errors/limit", "retries"].map((name) => ofDevice(figures.guest, name));
  assert.is(counted("dma/limit_hits"), told! + again!);
  assert.is(told, isCached ? 0 : 9);
  assert.is(counted("dma/injected"), 0);

  // One that is told to fail.
  const control = await vmm.control();
  /** Runs `body` while the rules are there. */
  const under = async (rules: string[], body: () => Promise<void>) => {
    for (const rule of rules) assert.match(await control.ask(`inject ${rule}`), /^ok rule \d+\n$/);
    await body();
    assert.match(await control.ask("uninject all"), new RegExp(`^ok ${rules.length} rules removed\n$`));
  };

  for (const errno of ["ENOSPC", "ENOMEM"])
    await under([`map,errno=${errno}`], async () => {
      const { injected } = await run("refused", { "errors/limit": REFUSED });
      assert.is(injected, REFUSED);
    });
  await under(["map,errno=EAGAIN"], async () => {
    const { injected } = await run("refused", {
      "errors/retry": REFUSED,
      retries: REFUSED * (MAP_TRIES - 1),
    });
    assert.is(injected, REFUSED * MAP_TRIES);
  });
  await under(["map,every=2,errno=EAGAIN", "unmap,every=2,errno=EAGAIN"], async () => {
    assert.equal(await runChecks(vmm, "retried"), {});
    const { changes, injected } = await look();
    assert.ok(
      injected >= EDU_CHECKS.retried.length,
      `${injected} of twice as many calls were to be repeated`,
    );
    assert.equal(changes, { ...NO_CHANGES, retries: injected });
  });

  // 1,000 entries are four calls: the second or the last fails, and what the others did is undone.
  for (const skip of [1, 3])
    await under([`map,skip=${skip},next=1`], async () => {
      const { injected, mapLists } = await run("refused", { "errors/limit": 1 }, "refused_sg_1000");
      assert.is(injected, 1);
      assert.is(mapLists, isCached ? 0 : skip, "ranges that were mapped first");
    });
  await under(["map,skip=1,next=1,errno=EAGAIN"], async () => {
    await run("retried", { retries: 1 }, "retried_sg_1000");
  });

  // Unmaps that fail leave everything as it is, and can be repeated.
  if (!isCached) {
    await under(["unmap"], async () => {
      const { injected } = await run("kept", { "errors/limit": KEPT, outstanding: KEPT });
      assert.is(injected, KEPT);
    });
    await run("again", { outstanding: -KEPT });
    await under(["unmap,errno=EAGAIN"], async () => {
      const changes = { "errors/retry": 4, outstanding: 4, retries: 4 * (UNMAP_TRIES - 1) };
      const { injected } = await run("kept", changes, "kept_sg_1000");
      assert.is(injected, 4 * UNMAP_TRIES);
    });
    await run("again", { outstanding: -4 }, "again_sg_1000");
    // The last of four ranges: the three others are unmapped, and doing that again is the driver's mistake.
    await under(["unmap,skip=3,next=1"], async () => {
      await run("kept", { "errors/limit": 1, outstanding: 1 }, "kept_sg_1000");
    });
    await run("again", { "errors/invalid": 3, outstanding: -1 }, "again_sg_1000");
  }

  if (policy === "strict")
    await under(["map,delay=50", "unmap,delay=50"], async () => {
      const { injected } = await run("delayed");
      assert.is(injected, 0, "a delay is no failure");
    });
  await run("streaming", { "errors/invalid": 1 }); // as if nothing had been

  await vmm.sh("modprobe -r edudma");
  const own = { outstanding: -2 - more };
  assert.equal((await look()).changes, { ...NO_CHANGES, ...own }, "the driver's own two pages go");
  assert.is(ofDevice(figures.guest, "outstanding"), 0);
  const left = ["mapped_bytes", "pinned_bytes", "entries", "stuck_mappings", "released_mappings"];
  assert.equal(
    left.filter((name) => counted(`dma/${name}`) !== 0),
    [],
    "what the driver left",
  );
  await vmm.sh("modprobe -r pvdma");
  assert.is(await vmm.sh("complaints"), "");
  vmm.process.write("exit\n");
  const { status, script } = await vmm.end();
  assert.is(status, 0, "the VMM's exit status");
  assert.is(script, 0, "the script's exit status");
}
