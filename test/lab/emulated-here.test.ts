// Emulated devices on this very machine, where it has /dev/kvm: see emulated.ts.

import { emulatedTests } from "./emulated.js";
import { localTest } from "./support.js";

for (const [name, body] of emulatedTests) localTest("emulated, this machine", name, body);
