// The conformance suite on the software IOMMU: any thread, no kernel, no memory but what it is given.

import { hva } from "../../hypercalls/addresses.js";
import type { BackendLimits } from "../../hypercalls/backend.js";
import { SoftDmaPort } from "../../iommu-emul/dma-port.js";
import { FaultReader, type FaultRecord } from "../../iommu-emul/faults.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import { DMA_BYTES, LOCKED_BYTES_MAX, MEMORY_BYTES, runScene, type Scene } from "./steps.js";

/** Runs a scene; `memory` is where the addresses of the steps say that the memory is. */
export async function runOnSoftware(
  scene: Scene,
  memory: number,
  ranges: BackendLimits["ranges"],
): Promise<{ answers: number[]; faults: FaultRecord[]; limits: BackendLimits }> {
  const shared = SoftIommu.create({
    memory: [{ hva: hva(memory), bytes: MEMORY_BYTES }],
    lanes: 1,
    ranges,
    entries: scene.entries,
    lockedBytesMax: LOCKED_BYTES_MAX,
  });
  const iommu = new SoftIommu(shared);
  const bytes = Buffer.alloc(MEMORY_BYTES);
  const port = new SoftDmaPort(shared, 0, (at, size) => bytes.subarray(at - memory, at - memory + size));
  const device = {
    async write(iova: number, data: Buffer, master: boolean): Promise<void> {
      iommu.setBusMaster(0, master);
      port.write(iova, data, 0, data.length);
    },
    async read(iova: number, length: number, poison: number, master: boolean): Promise<Buffer> {
      const data = Buffer.alloc(length, poison);
      iommu.setBusMaster(0, master);
      port.read(iova, data, 0, length);
      return data;
    },
  };
  const limits = iommu.limits();
  const stage = { backend: iommu, limits, memory, bytes: bytes.subarray(0, DMA_BYTES), device };
  const answers = await runScene(scene, stage);
  const faults: FaultRecord[] = [];
  new FaultReader(shared).drain((fault) => faults.push(fault));
  return { answers, faults, limits };
}
