// The README's example of an emulated device works, over the real IOMMU and real memory, and is the one in the README.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import { hva, iova } from "../../hypercalls/addresses.js";
import { type DeviceHost, DMA_FAULT } from "../../iommu-emul/device.js";
import { SoftDmaPort } from "../../iommu-emul/dma-port.js";
import { copier } from "../../iommu-emul/example.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import { createRam } from "../../vmm/guest-memory.js";
import { memoryWindow } from "../../vmm/native/memory-window.js";
import { repoRoot } from "../lab/cache.js";

const test = suite("example device");

test("copies what is mapped, says what was refused, interrupts", () => {
  const ram = createRam([{ gpa: 0, bytes: 4 * 4096 }]);
  const base = ram.slots[0]!.hva;
  const memory = memoryWindow(base, 4 * 4096);
  const shared = SoftIommu.create({ memory: [{ hva: base, bytes: 4 * 4096 }], lanes: 1 });
  const iommu = new SoftIommu(shared);
  iommu.setBusMaster(0, true);
  iommu.map(iova(0x10000), hva(base + 4096), 4096, MAP_FLAG.read);
  iommu.map(iova(0x20000), hva(base + 2 * 4096), 4096, MAP_FLAG.write);
  let interrupts = 0;
  const host: DeviceHost = {
    dma: new SoftDmaPort(shared, 0, memoryWindow),
    natives: {},
    interrupt: () => {
      interrupts++;
    },
    later: () => assert.fail(),
    warn: () => assert.fail(),
  };
  const device = copier.create(copier.parse({}), host, { cpus: 1 });
  const copy = (source: number, target: number, bytes: number) => {
    for (const [i, value] of [source, target, bytes].entries()) device.write(0, 4 * i, 4, value);
    while (device.work());
    assert.equal(device.read(0, 8, 4), 0, "done");
    return device.read(0, 12, 4);
  };
  memory.write("forty lines", 4096 + 5);
  assert.equal(copy(0x10005, 0x20100, 11), DMA_FAULT.none);
  assert.equal(memory.toString("latin1", 2 * 4096 + 0x100, 2 * 4096 + 0x10c), "forty lines\0");
  assert.equal(copy(0x10000, 0x10010, 4), DMA_FAULT.access);
  assert.equal(copy(0x10000, 0x30000, 4), DMA_FAULT.notMapped);
  assert.equal(copy(0x10000, 0x20001, 0xffffffff), DMA_FAULT.notMapped, "no more than it has room for");
  assert.equal(interrupts, 4);
  device.write(0, 12, 4, 9);
  device.write(0, 4, 1, 9);
  assert.equal(device.read(0, 12, 4), DMA_FAULT.notMapped);
  assert.equal(device.read(0, 0x800, 4), 0xffffffff);
  device.reset();
  assert.equal(device.read(0, 12, 4), 0);
});

test("is in the README as it is in its file", () => {
  const readme = readFileSync(join(repoRoot, "README.md"), "utf8");
  const file = readFileSync(join(repoRoot, "iommu-emul/example.ts"), "utf8");
  const begin = readme.indexOf(file.slice(0, file.indexOf("\n")));
  assert.ok(begin >= 0, "its first line");
  assert.equal(readme.slice(begin, readme.indexOf("```\n", begin)), file);
});

test.run();
