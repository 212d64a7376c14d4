// A benchmark is a program of its own, so that what one leaves behind (compiled code, garbage) does not change the next.
// Run by itself it prints its figures; run.ts starts them all and gathers what they say.

import { type Section, sectionText } from "./report.js";

/** What a benchmark tells run.ts. */
export interface Measured {
  readonly sections: readonly Section[];
  /** Versions and sizes that its figures depend on, beside the machine's; see Section.measured. */
  readonly measuredOn?: Readonly<Record<string, string>>;
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
