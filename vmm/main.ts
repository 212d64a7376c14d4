#!/usr/bin/env node
// The command: reads the command line, runs the guest, turns whatever goes wrong into one line and an exit status.

import { readFileSync } from "node:fs";
import { tell } from "./control.js";
import { errorMessage, isExpected, UsageError } from "./errors.js";
import { type Command, HELP, type Options, parseCommandLine } from "./options.js";
import { type GuestEnd, runGuest } from "./run-guest.js";

/** Runs the command with the arguments after its name. */
async function main(args: readonly string[]): Promise<GuestEnd> {
  const command = parseCommandLine(args);
  if ("run" in command) return runGuest(command.run);
  process.stdout.write(await textOf(command));
  return { status: 0, atOnce: false };
}

/** What the commands that run no guest print. */
async function textOf(command: Exclude<Command, { run: Options }>): Promise<string> {
  if ("tell" in command) return tell(command.tell.directory, command.tell.line);
  return command.print === "help" ? HELP : `vmm ${version()}\n`;
}

function version(): string {
  const text = readFileSync(new URL("../package.json", import.meta.url), "utf8");
  return (JSON.parse(text) as { version: string }).version;
}

/** One line for the user, and the exit status. */
function report(error: unknown): number {
  const message = errorMessage(error);
  const expected = isExpected(error);
  process.stderr.write(`vmm: ${expected ? "" : "internal error: "}${message.replaceAll("\n", " ")}\n`);
  if (!expected && process.env.PVDMA_DEBUG !== undefined) console.error(error);
  return error instanceof UsageError ? 2 : 1;
}

// Until main() says otherwise: a promise that is never kept must not look like success.
process.exitCode = 1;
main(process.argv.slice(2)).then(
  ({ status, atOnce }) => {
    process.exitCode = status;
    // Otherwise the process ends when its output is written, which a reader that has stopped reading would prevent.
    if (atOnce) process.exit();
  },
  (error: unknown) => {
    process.exitCode = report(error);
  },
);
