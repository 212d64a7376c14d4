// How much the tests do: a short form by `npm test`, the full numbers by `npm run soak`.

/** True for the full numbers. */
export const SOAK = process.env.PVDMA_SOAK === "1";

/** The number for this run. */
export const sized = (short: number, full: number): number => (SOAK ? full : short);
