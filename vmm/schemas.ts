// What people write on the command line and to the control socket: sizes, numbers, KEY=VALUE lists. zod schemas over
// text, and mistakes as a UsageError of one line that names the option, the text and the key. Pure.

import { z } from "zod";
import { UsageError } from "./errors.js";

const UNITS: Readonly<Record<string, number>> = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** A number of bytes such as 512M; `plainUnit`: what a number without a letter counts, in bytes. */
export const size = (plainUnit: number) =>
  z.string().transform((text, context) => {
    const match = /^(\d+)(?:([KMGT])i?)?(B?)$/i.exec(text);
    if (match === null) {
      context.addIssue("not a size; give a number with K, M, G or T, such as 512M");
      return z.NEVER;
    }
    const [, number, unit, bytes] = match;
    return (
      Number(number) * (unit === undefined && bytes === "" ? plainUnit : UNITS[(unit ?? "").toUpperCase()]!)
    );
  });

/** Bytes as `size` reads them, with the largest unit that keeps them whole. */
export function sizeText(bytes: number): string {
  const unit = ["T", "G", "M", "K"].find((letter) => bytes > 0 && bytes % UNITS[letter]! === 0);
  return unit === undefined ? String(bytes) : `${bytes / UNITS[unit]!}${unit}`;
}

/** A whole number in decimal from `first` to `last`, inclusive. */
export const wholeNumber = (first: number, last: number) => {
  const message = `not a whole number from ${first} to ${last}`;
  return z
    .string()
    .regex(/^\d+$/, message)
    .transform(Number)
    .refine((value) => value >= first && value <= last, message);
};

/** A number above 0, up to `last`, with a decimal point if need be. */
export const positiveNumber = (last: number) => {
  const message = `not a number above 0, up to ${last}`;
  return z
    .string()
    .regex(/^(\d+\.?\d*|\.\d+)(e-?\d+)?$/i, message)
    .transform(Number)
    .refine((value) => value > 0 && value <= last, message);
};

/** Checks `text`; the error begins with `option` and what was `shown` to it. */
export function checked<S extends z.ZodType>(
  schema: S,
  option: string,
  text: unknown,
  shown: string,
): z.output<S> {
  const result = schema.safeParse(text);
  if (result.success) return result.data;
  throw new UsageError(`${option} ${shown}:${issueText(result.error)}`);
}

/** The first mistake that zod found, as it follows what it is about. */
export function issueText({ issues }: z.ZodError): string {
  const issue = issues[0]!;
  if (issue.code === "unrecognized_keys") return ` unknown key ${issue.keys[0]}; see --help`;
  const where = issue.path.length > 0 ? ` ${issue.path.join(".")}:` : "";
  return `${where} ${issue.message}`;
}

/** Reads KEY=VALUE pairs, each key once. `text` is the whole that they are a part of. */
export function readPairs(option: string, text: string, pairs: readonly string[]): Map<string, string> {
  const keys = new Map<string, string>();
  for (const pair of pairs) {
    const [key = "", value] = pair.split(/=(.*)/s);
    if (value === undefined) throw new UsageError(`${option} ${text}: ${pair} is not KEY=VALUE; see --help`);
    if (keys.has(key)) throw new UsageError(`${option} ${text}: ${key} is given twice`);
    keys.set(key, value);
  }
  return keys;
}

/** Reads KEY=VALUE pairs, each key once and one of the schema's. */
export function checkedPairs<S extends z.ZodObject>(
  schema: S,
  option: string,
  text: string,
  pairs: readonly string[],
): z.output<S> {
  const keys = readPairs(option, text, pairs);
  for (const key of keys.keys()) {
    if (Object.hasOwn(schema.shape, key)) continue;
    const known = Object.keys(schema.shape).join(", ");
    throw new UsageError(`${option} ${text}: unknown key ${key}; there are ${known}`);
  }
  return checked(schema, option, Object.fromEntries(keys), text);
}
