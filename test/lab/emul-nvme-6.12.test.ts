import { runEmulatedNvmeTests } from "./emul-nvme.js";

runEmulatedNvmeTests("6.12");
