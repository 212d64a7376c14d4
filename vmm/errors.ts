// Errors that reach the user: one line each, no stack. Anything else that escapes is a bug of ours.

/** The command line is wrong: exit code 2. */
export class UsageError extends Error {}

/**
 * Something outside the program is not as it has to be: exit code 1. The message is one line that says what failed,
 * on what, why, and what to do.
 */
export class VmmError extends Error {}

/** A system call failed. `errno` is positive. Callers that know more wrap it in a VmmError. */
export class SystemError extends Error {
  constructor(
    readonly call: string,
    readonly errno: number,
    readonly code: string,
  ) {
    super(`${call}: ${code}`);
  }
}
