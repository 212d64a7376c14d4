// How much the tests do: a short form by `npm test`, the full numbers by `npm run soak`.

/** True for the full numbers. */
export const SOAK = process.env.PVDMA_SOAK === "1";

/** The number for this run. */
export const sized = (short: number, full: number): number => (SOAK ? full : short);

/** Whether a test of this name is to run: PVDMA_TESTS is a part of the names of those that are wanted. */
export const isWanted = (name: string): boolean => name.includes(process.env.PVDMA_TESTS ?? "");
