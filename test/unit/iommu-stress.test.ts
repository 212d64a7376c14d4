// The invariant of the project, under load: when unmap has returned, no access of a device that could reach what was
// mapped is under way, and none sees it later. What is checked stands in support/iommu-worker.ts.

import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { Worker } from "node:worker_threads";
import { suite } from "uvu";
import { hva, iova } from "../../hypercalls/addresses.js";
import { FaultReader } from "../../iommu-emul/faults.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import { sized } from "../soak.js";
import {
  CHUNK_BYTES,
  CHUNKS_PER_MAPPER,
  CONTROL,
  OWN_PAGES_AT,
  POISON,
  SLOTS_AT,
  SLOTS_PER_MAPPER,
  type StressJob,
} from "./support/iommu-worker.js";
import { seeds } from "./support/random.js";

const PAGE = 4096;
const MAPPERS = 2;
const DEVICES = 2;

const stress = suite("iommu-emul: stress");

stress("devices do DMA while what they use is unmapped and mapped elsewhere", async () => {
  for (const seed of seeds(sized(1, 20))) await run(seed, sized(8_000, 100_000));
});

async function run(seed: number, rounds: number): Promise<void> {
  const chunksBytes = MAPPERS * CHUNKS_PER_MAPPER * CHUNK_BYTES;
  const memory = new SharedArrayBuffer(chunksBytes + DEVICES * PAGE);
  const shared = SoftIommu.create({
    memory: [{ hva: hva(0), bytes: memory.byteLength }],
    lanes: DEVICES,
    tables: 16,
  });
  const iommu = new SoftIommu(shared);
  const ownPage = (device: number) => new Int32Array(memory, chunksBytes + device * PAGE, PAGE / 4);
  for (let device = 0; device < DEVICES; device++) {
    const at = iova(OWN_PAGES_AT + device * PAGE);
    assert.equal(iommu.map(at, hva(chunksBytes + device * PAGE), PAGE, 3), 0);
    iommu.setBusMaster(device, true);
  }
  const control = new SharedArrayBuffer(64);
  const words = new Int32Array(control);
  words[CONTROL.mappersLeft] = MAPPERS;
  const job: Omit<StressJob, "kind" | "index" | "seed"> = {
    iommu: shared,
    memory,
    current: new SharedArrayBuffer(MAPPERS * SLOTS_PER_MAPPER * 4),
    control,
    mappers: MAPPERS,
    rounds,
  };
  const file = fileURLToPath(new URL("./support/iommu-worker.js", import.meta.url));
  const workers = [
    ...Array.from({ length: MAPPERS }, (_, index) => ({ kind: "mapper", index }) as const),
    ...Array.from({ length: DEVICES }, (_, index) => ({ kind: "device", index }) as const),
  ].map((each, number) => {
    const worker = new Worker(file, { workerData: { ...job, ...each, seed: seed * 16 + number } });
    return new Promise<void>((resolve, reject) => worker.once("error", reject).once("exit", () => resolve()));
  });
  const all = Promise.allSettled(workers);

  // Meanwhile: records are read, and bus mastering goes off and on.
  const faults = new FaultReader(shared);
  let records = 0;
  let pauses = 0;
  const drain = () =>
    faults.drain(({ iova, reason }) => {
      records++;
      const inSlots = iova >= SLOTS_AT && iova < SLOTS_AT + MAPPERS * SLOTS_PER_MAPPER * CHUNK_BYTES;
      assert.ok(inSlots && reason === 1, `fault ${reason} at ${iova}`);
    });
  const wait = new Int32Array(new SharedArrayBuffer(4));
  let ended = false;
  void all.then(() => {
    ended = true;
  });
  for (let device = 0; !ended; device = (device + 1) % DEVICES) {
    drain();
    iommu.setBusMaster(device, false);
    const page = ownPage(device).fill(POISON);
    Atomics.wait(wait, 0, 0, 1);
    assert.ok(
      page.every((word) => word === POISON),
      "DMA without bus mastering",
    );
    iommu.setBusMaster(device, true);
    pauses++;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  for (const { reason } of (await all).filter((each) => each.status === "rejected")) {
    throw new Error(`PVDMA_SEED=${seed}: ${(reason as Error).message}`, { cause: reason });
  }
  drain();
  const lanes = Array.from({ length: DEVICES }, (_, lane) => faults.counts(lane));
  const sum = (field: "faults" | "lost" | "noBusMaster") => lanes.reduce((all, each) => all + each[field], 0);
  assert.equal(records + sum("lost"), sum("faults"), "each fault is recorded or counted as lost");
  const [done, refused, hits] = [CONTROL.accesses, CONTROL.faults, CONTROL.hits].map((at) => words[at]!);
  assert.ok(
    done! > 0 && records > 0 && hits! > 0 && pauses > 0 && sum("noBusMaster") > 0,
    "all of it happened",
  );
  assert.equal(iommu.unmap(iova(0), 2 ** 48), DEVICES * PAGE, "what is left are the devices' own pages");
  assert.deepEqual([iommu.tablesUsed, iommu.entriesUsed, iommu.lockedBytes], [0, 0, 0]);
  console.log(
    `  stress: ${MAPPERS * rounds} maps and unmaps, ${done} accesses, ${refused} refused, ${hits} IOTLB hits, ${pauses} pauses`,
  );
}

stress.run();
