// Failures on demand while I/O is verified, on assigned controllers. See injected.ts.

import { SOAK } from "../soak.js";
import { scratchDir } from "./cache.js";
import { bindVfio } from "./host.js";
import { DISK_BYTES, RULES, recoversFromInjection } from "./injected.js";
import { l1Bdf } from "./l1.js";
import { assignedDisk, policies, type TestedDisk } from "./recovery.js";
import { LabSuite, MiB, randomDisk, sha256OfFile } from "./support.js";

const files = scratchDir();
const otherFile = randomDisk(files.path, "other.raw", MiB);
const lab = new LabSuite(
  "recovery-inject",
  { diskBytes: DISK_BYTES, nvme1: { file: otherFile }, hugePages: true },
  async () => {
    if (lab.host.kind === "l1") await bindVfio(lab.host, l1Bdf.nvme1);
  },
);

/** A controller that nothing is done to; a real host has but one to spare. */
const other = (): TestedDisk[] =>
  lab.host.kind === "l1"
    ? [{ host: lab.host, assign: l1Bdf.nvme1, name: l1Bdf.nvme1, hash: () => sha256OfFile(otherFile) }]
    : [];

for (const policy of policies("strict"))
  for (const cpus of SOAK ? [1, 4] : [1])
    lab.test(
      `${policy}, maps fail at random and in bursts, ${cpus} vCPUs: verified, and as fast as before when it stops`,
      () =>
        recoversFromInjection(
          policy,
          [assignedDisk(lab), ...other()],
          cpus,
          SOAK ? RULES : RULES.slice(1, 3),
        ),
    );

lab.run();
