// The main job with a stock 6.1 kernel in the guest.

import { runAssignTests } from "./assign.js";

runAssignTests("6.1", 2);
