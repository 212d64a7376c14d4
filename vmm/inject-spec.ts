// What people write to have a guest's DMA calls fail, `map,device=02:00.0,p=0.2,errno=ENOMEM`, as a rule of the
// engine, and such a rule as text again. Pure.

import { z } from "zod";
import { LIMITS } from "../hypercalls/abi.js";
import { PAGE_BYTES } from "../hypercalls/addresses.js";
import type { InjectionRule } from "../hypercalls/injection.js";
import { type DeviceName, parseDeviceName } from "./device-name.js";
import { UsageError } from "./errors.js";
import { checkedPairs, positiveNumber, size, sizeText, wholeNumber } from "./schemas.js";

/** A rule whose device still has its name; without one it is for every device. */
export interface InjectSpec extends Omit<InjectionRule, "handle"> {
  readonly device?: DeviceName;
}

const CALLS = ["map", "unmap", "is-assigned"] as const satisfies readonly InjectionRule["calls"][];
const ERRNOS = ["ENOSPC", "ENOMEM", "EAGAIN"] as const;

const COUNT_MAX = 1e9;
/** A vCPU that waits in a call can be stopped only afterwards. */
const DELAY_MS_MAX = 10_000;
const MAP_BYTES_MAX = LIMITS.mapPages * PAGE_BYTES;
/** Fixed, so that two runs with the same text strike the same calls. */
const DEFAULT_SEED = 1;

const count = wholeNumber(1, COUNT_MAX);

const schema = z
  .strictObject({
    device: z
      .string()
      .transform((text, context) => {
        try {
          return parseDeviceName(text);
        } catch (error) {
          context.addIssue((error as Error).message);
          return z.NEVER;
        }
      })
      .optional(),
    above: size(1)
      .refine((bytes) => bytes < MAP_BYTES_MAX, `no call maps more than ${sizeText(MAP_BYTES_MAX)}`)
      .optional(),
    skip: wholeNumber(0, COUNT_MAX).default(0),
    every: count.optional(),
    p: positiveNumber(1).optional(),
    seed: wholeNumber(0, 2 ** 32 - 1).optional(),
    next: count.optional(),
    for: count.optional(),
    burst: count.default(1),
    errno: z.enum(ERRNOS, { error: `not one of ${ERRNOS.join(", ")}` }).optional(),
    delay: positiveNumber(DELAY_MS_MAX).optional(),
  })
  .superRefine(({ every, p, seed, next, for: forMs, errno, delay }, context) => {
    const given = (values: Record<string, unknown>) =>
      Object.keys(values).filter((key) => values[key] !== undefined);
    const when = given({ every, p, next, for: forMs });
    const effect = given({ errno, delay });
    if (when.length > 1) context.addIssue(`${when.join(" and ")}: give one of every, p, next and for`);
    if (effect.length > 1) context.addIssue(`${effect.join(" and ")}: give one of errno and delay`);
    if (seed !== undefined && p === undefined) context.addIssue("seed is for p, and there is none");
  });

/** Reads `text`. Throws a UsageError that begins with `about` and the text. */
export function parseInjectSpec(text: string, about = "--inject"): InjectSpec {
  const [name = "", ...pairs] = text.split(",");
  const calls = CALLS.find((call) => call === name);
  if (calls === undefined) {
    const problem = name === "" ? "names no call" : `${name} is no call that can fail`;
    throw new UsageError(`${about} ${text}: ${problem}; there are map, unmap and is-assigned`);
  }
  const keys = checkedPairs(schema, about, text, pairs);
  if (keys.above !== undefined && calls === "is-assigned") {
    throw new UsageError(`${about} ${text}: above: an is-assigned call has no size`);
  }
  return {
    calls,
    ...(keys.device === undefined ? {} : { device: keys.device }),
    minBytes: keys.above ?? 0,
    skip: keys.skip,
    when:
      keys.p !== undefined
        ? { probability: keys.p, seed: keys.seed ?? DEFAULT_SEED }
        : keys.next !== undefined
          ? { next: keys.next }
          : keys.for !== undefined
            ? { forMs: keys.for }
            : { every: keys.every ?? 1 },
    burst: keys.burst,
    effect: keys.delay === undefined ? { errno: keys.errno ?? "ENOSPC" } : { delayMs: keys.delay },
  };
}

/** The rule for the engine; `assigned` are the devices in the order of their handles. Throws as parseInjectSpec. */
export function ruleOf(spec: InjectSpec, assigned: readonly DeviceName[], about: string): InjectionRule {
  const { device, ...rule } = spec;
  return { ...rule, handle: device === undefined ? 0 : handleOf(device, assigned, about) };
}

/** A device's handle, its place among the assigned ones, from 1. Throws a UsageError that begins with `about`. */
export function handleOf(device: DeviceName, assigned: readonly DeviceName[], about: string): number {
  const index = assigned.indexOf(device);
  if (index >= 0) return index + 1;
  const others = assigned.length === 0 ? "no device is" : `assigned: ${assigned.join(", ")}`;
  throw new UsageError(`${about}: ${device} is not assigned; ${others}`);
}

/** A rule as parseInjectSpec reads it. */
export function ruleText(rule: InjectionRule, assigned: readonly DeviceName[]): string {
  const { calls, handle, minBytes, skip, when, burst, effect } = rule;
  return [
    calls,
    ...(handle === 0 ? [] : [`device=${assigned[handle - 1]}`]),
    ...(minBytes === 0 ? [] : [`above=${sizeText(minBytes)}`]),
    ...(skip === 0 ? [] : [`skip=${skip}`]),
    "every" in when
      ? `every=${when.every}`
      : "next" in when
        ? `next=${when.next}`
        : "forMs" in when
          ? `for=${when.forMs}`
          : `p=${when.probability},seed=${when.seed}`,
    ...(burst === 1 ? [] : [`burst=${burst}`]),
    "errno" in effect ? `errno=${effect.errno}` : `delay=${effect.delayMs}`,
  ].join(",");
}
