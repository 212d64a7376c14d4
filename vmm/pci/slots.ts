// Which device number on the guest's PCI bus each assigned device gets. Pure.

import { UsageError, VmmError } from "../errors.js";
import { SLOTS } from "./bus.js";

/**
 * The slots of the devices, in their order: those asked for, the others the lowest that are free. Throws a UsageError
 * when a device is named twice or two want the same slot, a VmmError when the bus is full.
 */
export function assignSlots(
  devices: readonly { readonly name: string; readonly guestSlot?: number }[],
  takenSlots: ReadonlySet<number> = new Set(),
): number[] {
  const owner = new Map<number, string>([...takenSlots].map((slot) => [slot, "another device"]));
  const seen = new Set<string>();
  for (const { name, guestSlot } of devices) {
    if (seen.has(name)) throw new UsageError(`${name}: assigned twice; name each device once`);
    seen.add(name);
    if (guestSlot === undefined) continue;
    if (!Number.isInteger(guestSlot) || guestSlot < 1 || guestSlot >= SLOTS) {
      throw new VmmError(`${name}: guest slot ${guestSlot} is out of range; use 1 to ${SLOTS - 1}`);
    }
    const other = owner.get(guestSlot);
    if (other !== undefined)
      throw new UsageError(`${name}: guest slot ${guestSlot} is taken by ${other}; use another`);
    owner.set(guestSlot, name);
  }
  return devices.map(({ name, guestSlot }) => {
    const slot = guestSlot ?? freeSlot(owner, name);
    owner.set(slot, name);
    return slot;
  });
}

function freeSlot(owner: ReadonlyMap<number, string>, name: string): number {
  for (let slot = 1; slot < SLOTS; slot++) if (!owner.has(slot)) return slot;
  throw new VmmError(`${name}: the guest's PCI bus is full (${SLOTS - 1} devices); assign fewer`);
}
