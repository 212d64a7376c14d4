// The tracking table's protocol as a model that spin explores (test/model/tracking.pml): every order of the steps of two
// vCPUs and a reclaimer. And what the model would be worth if it found nothing: with one thing taken out, it has to.

import { execFileSync, spawnSync } from "node:child_process";
import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { repoRoot, scratchDir } from "../lab/cache.js";

const MODEL = join(repoRoot, "test/model/tracking.pml");
/** Steps on one path; the longest has less than 1.8 million. */
const DEPTH = 2_000_000;

/** Explores the model with these macros defined; returns the states it stored, and the first error's words. */
function explore(...macros: string[]): { states: number; error: string | undefined } {
  const scratch = scratchDir();
  const options = { cwd: scratch.path, encoding: "utf8" } as const;
  try {
    execFileSync("spin", [...macros.map((macro) => `-D${macro}`), "-a", MODEL], options);
    execFileSync(
      "gcc",
      ["-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=4000", "-o", "pan", "pan.c"],
      options,
    );
    const { stdout, stderr, status } = spawnSync("./pan", [`-m${DEPTH}`], options);
    assert.is(status, 0, stderr + stdout);
    const states = Number(/^ *(\d+) states, stored/m.exec(stdout)?.[1]);
    const errors = Number(/ errors: (\d+)/.exec(stdout)?.[1]);
    const error = /^pan:1: (.*)$/m.exec(stdout)?.[1];
    assert.is(errors > 0, error !== undefined, stdout);
    // What was cut short proves nothing; it is at the first error, too.
    if (error === undefined) assert.not.match(stdout, /search depth too small|out of memory|not completed/i);
    return { states, error };
  } finally {
    scratch.remove();
  }
}

const test = suite("protocol of the tracking table");

for (const [entries, about] of [
  [1, "the host has one entry too few"],
  [2, "the host has entries enough"],
] as const) {
  test(`no page is lost, none is unmapped under a driver, nobody waits for ever: ${about}`, () => {
    const { states, error } = explore(`ENTRIES=${entries}`);
    assert.is(error, undefined);
    assert.ok(states > 1_000_000, `${states} states`);
    console.log(`${states} states`);
  });
}

for (const [macro, what] of [
  ["MUTATE_NO_COMPARE", "reclaim does not compare before it swaps"],
  ["MUTATE_UNMAP_FIRST", "reclaim unmaps before it takes PINNED away"],
  ["MUTATE_NO_ROLLBACK", "reclaim does not put back what it took"],
  ["MUTATE_PINNED_FIRST", "a map call sets PINNED before it maps"],
  ["MUTATE_TWO_STEPS", "the guest's add is not one atomic step"],
  ["MUTATE_LOOK_FIRST", "the guest looks for PINNED before it counts"],
  ["MUTATE_NO_LOCK", "calls and reclaim do not exclude each other"],
] as const) {
  test(`spin finds what goes wrong when ${what}`, () => {
    assert.match(explore(macro).error ?? "nothing", /^assertion violated/);
  });
}

test.run();
