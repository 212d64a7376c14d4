// Fetches the kernels that the cache lacks, one line per step: so that a test run shows it before it is silent.

import { getKernel, kernelSeries } from "./packages.js";

try {
  for (const series of kernelSeries) await getKernel(series, (line) => console.error(`bootstrap: ${line}`));
} catch (error) {
  console.error(`bootstrap: ${(error as Error).message}`);
  process.exitCode = 1;
}
