// Runs in the lab's host, as root without CAP_IPC_LOCK: the conformance suite on a VFIO container with QEMU's edu behind
// it, which is driven from here, without a VM. Prints {limits, answers} per scene as JSON.
// usage: node vfio.js BDF

import { ftruncateSync, readFileSync, writeFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { BackendLimits } from "../../hypercalls/backend.js";
import { MAP_NORESERVE, memfdCreate, mmapShared, PROT_READ, PROT_WRITE } from "../../vmm/native/libc.js";
import { memoryWindow } from "../../vmm/native/memory-window.js";
import { VfioBackend, VfioContainer, VfioGroup } from "../../vmm/vfio/container.js";
import type { VfioDevice } from "../../vmm/vfio/device.js";
import { assignableGroup, parseBdf } from "../../vmm/vfio/sysfs.js";
import {
  DMA_BYTES,
  type DmaDevice,
  MEMORY_BYTES,
  runScene,
  SCENES,
  SCRATCH_AT,
  SCRATCH_IOVA,
} from "./steps.js";

export interface SceneReport {
  readonly memory: number;
  readonly limits: BackendLimits;
  readonly answers: readonly number[];
}

/** Read by the kernel when a container is opened. */
const ENTRY_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

const CONFIG = 7;
const COMMAND = 4;
const COMMAND_MEMORY = 2;
const COMMAND_MASTER = 4;
const BAR0 = 0;

/** QEMU's edu (docs/specs/edu): it copies up to 4 KiB between memory and a buffer of its own. */
class Edu implements DmaDevice {
  private static readonly SOURCE = 0x80;
  private static readonly TARGET = 0x88;
  private static readonly BYTES = 0x90;
  private static readonly COMMAND = 0x98;
  private static readonly BUFFER = 0x40000;
  private static readonly RUN = 1;
  private static readonly TO_MEMORY = 2;

  constructor(
    private readonly device: VfioDevice,
    private readonly scratch: Buffer,
  ) {}

  async write(iova: number, data: Buffer, master: boolean): Promise<void> {
    data.copy(this.scratch);
    await this.fetch(SCRATCH_IOVA, data.length, true);
    await this.store(iova, data.length, master);
  }

  async read(iova: number, bytes: number, poison: number, master: boolean): Promise<Buffer> {
    this.scratch.fill(poison);
    await this.fetch(SCRATCH_IOVA, bytes, true);
    await this.fetch(iova, bytes, master);
    this.scratch.fill(0);
    await this.store(SCRATCH_IOVA, bytes, true);
    return Buffer.from(this.scratch.subarray(0, bytes));
  }

  private fetch(from: number, bytes: number, master: boolean): Promise<void> {
    return this.copy(from, Edu.BUFFER, bytes, Edu.RUN, master);
  }

  private store(to: number, bytes: number, master: boolean): Promise<void> {
    return this.copy(Edu.BUFFER, to, bytes, Edu.RUN | Edu.TO_MEMORY, master);
  }

  private async copy(
    from: number,
    to: number,
    bytes: number,
    command: number,
    master: boolean,
  ): Promise<void> {
    this.device.write(CONFIG, COMMAND, 2, COMMAND_MEMORY | (master ? COMMAND_MASTER : 0));
    this.device.write(BAR0, Edu.SOURCE, 4, from);
    this.device.write(BAR0, Edu.TARGET, 4, to);
    this.device.write(BAR0, Edu.BYTES, 4, bytes);
    this.device.write(BAR0, Edu.COMMAND, 4, command);
    while (this.device.read(BAR0, Edu.COMMAND, 4) & Edu.RUN) await sleep(10);
  }
}

async function run(bdf: string): Promise<SceneReport[]> {
  // The file is shorter than its mapping: what lies behind the memory is none, and stays so.
  const memfd = memfdCreate("conformance");
  ftruncateSync(memfd, MEMORY_BYTES);
  const memory = mmapShared(memfd, 2 * MEMORY_BYTES, 0, PROT_READ | PROT_WRITE, MAP_NORESERVE);
  const bytes = memoryWindow(memory, DMA_BYTES);
  const number = assignableGroup(parseBdf(bdf));
  const entriesBefore = readFileSync(ENTRY_LIMIT, "utf8");
  const reports: SceneReport[] = [];
  try {
    for (const scene of SCENES) {
      writeFileSync(ENTRY_LIMIT, String(scene.entries));
      const container = VfioContainer.open();
      const group = VfioGroup.open(number, bdf);
      container.attach(group.fd, bdf);
      const limits = container.limits();
      const device = group.openDevice(bdf);
      const backend = new VfioBackend(container.fd);
      const edu = new Edu(device, bytes.subarray(SCRATCH_AT));
      const answers = await runScene(scene, { backend, limits, memory, bytes, device: edu });
      for (const each of [device, group, container]) each.close();
      reports.push({ memory, limits, answers });
    }
  } finally {
    writeFileSync(ENTRY_LIMIT, entriesBefore);
  }
  return reports;
}

if (process.argv[1] === import.meta.filename) {
  console.log(JSON.stringify(await run(process.argv[2]!)));
}
