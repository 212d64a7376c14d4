// A benchmark is a program of its own, so that what one leaves behind (compiled code, garbage) does not change the next.
// Run by itself it prints its figures; run.ts starts them all and gathers what they say.

import { execFileSync } from "node:child_process";
import { type Section, sectionText } from "./report.js";

/** What a benchmark tells run.ts. */
export interface Measured {
  readonly sections: readonly Section[];
}

/** Sections whose figures are of the lab: they depend on its hardware, too, which is QEMU's. */
export function inLab(sections: readonly Section[]): Section[] {
  const version = execFileSync("qemu-system-x86_64", ["--version"], { encoding: "utf8" });
  const measured = { QEMU: /version ([\d.]+)/.exec(version)![1]! };
  return sections.map((section) => ({ ...section, measured }));
}

/** Progress, for whoever waits. */
export function progress(line: string): void {
  console.error(line);
}

/** Hands a benchmark's figures to run.ts, or prints them. */
export function present(measured: Measured): void {
  if (process.send) process.send(measured);
  else for (const section of measured.sections) console.log(sectionText(section));
}
