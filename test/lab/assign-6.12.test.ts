// The main job with a stock 6.12 kernel in the guest.

import { runAssignTests } from "./assign.js";

runAssignTests("6.12", 1);
