// What assigned devices are called in options, messages and statistics: a device of this host by its PCI address, an
// emulated one by its model, and from the second of a model on with a number: emul:edu, emul:edu.1, emul:edu.2. Pure.

import { UsageError } from "./errors.js";
import { type Bdf, parseBdf } from "./vfio/sysfs.js";

declare const emulatedBrand: unique symbol;
/** "emul:edu", "emul:edu.1". */
export type EmulatedName = string & { readonly [emulatedBrand]: true };
export type DeviceName = Bdf | EmulatedName;

/** What the name of every emulated device begins with. */
export const EMULATED = "emul:";

/** The name of the device of this model that has `before` others before it. */
export const emulatedName = (model: string, before: number): EmulatedName =>
  `${EMULATED}${model}${before === 0 ? "" : `.${before}`}` as EmulatedName;

/** Reads a device's name; a BDF may be short. Whether there is such a device is not looked at. Throws a UsageError. */
export function parseDeviceName(text: string): DeviceName {
  if (!text.startsWith(EMULATED)) return parseBdf(text);
  if (!/^emul:[a-z][a-z0-9-]*(\.[1-9]\d*)?$/.test(text)) {
    throw new UsageError(
      `"${text}" names no emulated device; they are called emul:edu, emul:edu.1, and so on`,
    );
  }
  return text as EmulatedName;
}
