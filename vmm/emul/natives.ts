// What emulated devices need of the system and Node has no function for.

import type { FileNatives } from "../../iommu-emul/device.js";
import { addressOf, lockFile, punchHole, readCached, readCachedInto, writeAt } from "../native/libc.js";

export const natives: FileNatives = {
  addressOf,
  readCached,
  readCachedInto,
  write: writeAt,
  punchHole,
  lock: lockFile,
};
