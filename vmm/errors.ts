// Errors that reach the user: one line each, no stack. Anything else that escapes is a bug of ours.

/** The command line is wrong: exit code 2. */
export class UsageError extends Error {}

/**
 * Something outside the program is not as it has to be: exit code 1. The message is one line that says what failed,
 * on what, why, and what to do.
 */
export class VmmError extends Error {}

/** Whether an error is a message for the user; anything else is a bug. */
export const isExpected = (error: unknown): error is Error =>
  error instanceof UsageError || error instanceof VmmError || error instanceof SystemError;

/** The text of whatever was thrown. */
export const errorMessage = (error: unknown): string =>
  error instanceof Error ? error.message : String(error);

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

/** A device cannot be had, or not any more. */
export class DeviceError extends VmmError {
  constructor(
    /** As the user names it. */
    readonly device: string,
    message: string,
  ) {
    super(message);
  }
}

/** Does what is done for one device: every expected error becomes a DeviceError whose message names it. */
export function forDevice<Result>(device: string, action: () => Result): Result {
  try {
    return action();
  } catch (error) {
    if (!isExpected(error)) throw error;
    const named = error.message.startsWith(`${device}: `);
    throw new DeviceError(device, named ? error.message : `${device}: ${error.message}`);
  }
}

/** Does `action` and returns true; an expected error goes to `report` instead and gives false. A bug is thrown on. */
export function attempt(action: () => void, report: (message: string) => void): boolean {
  try {
    action();
    return true;
  } catch (error) {
    if (!isExpected(error)) throw error;
    report(error.message);
    return false;
  }
}
