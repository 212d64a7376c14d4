// Undoing things however they end: every step is tried, what fails is reported, and the rest goes on.

import { errorMessage } from "./errors.js";

/** Steps to undo what was done, run in reverse order, each when the one before is done. */
export class Cleanup {
  private readonly steps: (() => void | Promise<void>)[] = [];

  constructor(private readonly warn: (line: string) => void) {}

  add(step: () => void | Promise<void>): void {
    this.steps.push(step);
  }

  async run(): Promise<void> {
    for (let step = this.steps.pop(); step !== undefined; step = this.steps.pop()) {
      try {
        await step();
      } catch (error) {
        this.warn(`while ending: ${errorMessage(error)}`);
      }
    }
  }
}

/** Calls `action` for every item, whatever fails on the way; then throws the first failure. */
export function forEachAnyway<T>(items: Iterable<T>, action: (item: T) => void): void {
  const failures: unknown[] = [];
  for (const item of items) {
    try {
      action(item);
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0) throw failures[0];
}
