// The emulated devices that there are. To add one: a file with a DeviceModel (device.ts), and a line here.

import type { DeviceModel } from "./device.js";
import { edu } from "./edu.js";
import { nvme } from "./nvme/model.js";

/** What a model's options are is between its own functions. */
export const MODELS: readonly DeviceModel<unknown>[] = [edu, nvme];

export const modelNamed = (name: string): DeviceModel<unknown> | undefined =>
  MODELS.find((model) => model.name === name);
