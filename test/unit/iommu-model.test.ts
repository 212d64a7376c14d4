// The software IOMMU against a model that is a list of mappings and nothing else: random maps, unmaps and accesses, of
// pages and of superpages, with limits and few tables; every answer, every byte of memory, every fault.

import assert from "node:assert/strict";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import { hva, iova } from "../../hypercalls/addresses.js";
import { ERRNO } from "../../hypercalls/status.js";
import { DMA_FAULT } from "../../iommu-emul/device.js";
import { SoftDmaPort } from "../../iommu-emul/dma-port.js";
import { FaultReader } from "../../iommu-emul/faults.js";
import { SoftIommu } from "../../iommu-emul/iommu.js";
import { sized } from "../soak.js";
import { Random, seeds } from "./support/random.js";

const PAGE = 4096;
const MiB = 2 ** 20;
const { read, write } = MAP_FLAG;
/** Two pieces, not aligned to each other: room for leaves of 2 MiB in the first. */
const PARTS = [
  { hva: hva(0x7000_0000_0000), bytes: 7 * MiB },
  { hva: hva(0x7000_1000_3000), bytes: MiB },
];
const MEMORY_PAGES = PARTS.reduce((sum, { bytes }) => sum + bytes / PAGE, 0);
const RANGES = [
  { first: 0, last: 0xfedf_ffff },
  { first: 0xfef0_0000, last: 2 ** 48 - 1 },
];
/** Where things are mapped: a small region each, so that they meet. */
const REGIONS = [0, 2 ** 30 - 3 * MiB, 0xfee0_0000 - 4 * MiB, 2 ** 39 - 2 * MiB, 2 ** 48 - 6 * MiB];

interface Mapping {
  readonly page: number;
  readonly pages: number;
  readonly hva: number;
  readonly access: number;
}

const seen = new Map<string, number>();
const see = (what: string): void => void seen.set(what, (seen.get(what) ?? 0) + 1);

class History {
  readonly trace: string[] = [];
  readonly #random: Random;
  readonly #entries: number;
  readonly #lockedPages: number;
  readonly #fewTables: boolean;
  readonly #iommu: SoftIommu;
  readonly #ports: readonly SoftDmaPort[];
  readonly #faults: FaultReader;
  /** Two device's fault records that are to come. */
  #expectedFaults: [lane: number, iova: number, access: string, reason: number][] = [];
  readonly #parts = PARTS.map(({ bytes }) => Buffer.alloc(bytes));
  readonly #expected = PARTS.map(({ bytes }) => Buffer.alloc(bytes));
  #mappings: Mapping[] = [];

  constructor(seed: number) {
    this.#random = new Random(seed);
    this.#entries = this.#random.pick([5, 40, 1000]);
    this.#lockedPages = this.#random.pick([MEMORY_PAGES / 2, MEMORY_PAGES * 2, Number.POSITIVE_INFINITY]);
    this.#fewTables = this.#random.oneIn(3);
    const shared = SoftIommu.create({
      memory: PARTS,
      lanes: 2,
      ranges: RANGES,
      entries: this.#entries,
      lockedBytesMax: this.#lockedPages * PAGE,
      tables: this.#fewTables ? 12 : 100,
    });
    this.#iommu = new SoftIommu(shared);
    const window = (at: number) => this.#parts[PARTS.findIndex((part) => part.hva === at)]!;
    this.#ports = [0, 1].map((lane) => new SoftDmaPort(shared, lane, window));
    for (const lane of [0, 1]) this.#iommu.setBusMaster(lane, true);
    this.#faults = new FaultReader(shared);
  }

  run(steps: number): void {
    for (let step = 0; step < steps; step++) {
      const kind = this.#random.below(10);
      if (kind < 3) this.#map();
      else if (kind < 5) this.#unmap();
      else this.#access();
      if (step % 50 === 0) this.#compare();
    }
    this.#compare();
    this.trace.push("unmap everything");
    const pages = this.#mappings.reduce((sum, each) => sum + each.pages, 0);
    assert.equal(this.#iommu.unmap(iova(0), 2 ** 48), pages * PAGE);
    const { tablesUsed, entriesUsed, lockedBytes } = this.#iommu;
    assert.deepEqual([tablesUsed, entriesUsed, lockedBytes], [0, 0, 0]);
  }

  /** IOVA page, near others. */
  #page(): number {
    const random = this.#random;
    const region = random.pick(REGIONS) / PAGE;
    if (random.oneIn(8)) return 2 ** 36 - random.below(4);
    return region + (random.oneIn(2) ? 512 * random.below(4) : random.below(2000));
  }

  #pages(): number {
    const random = this.#random;
    return random.pick([1, 1, 1, 2, 3, 1 + random.below(30), 512, 1024, 500 + random.below(600)]);
  }

  #map(): void {
    const random = this.#random;
    const page = this.#page();
    const pages = this.#pages();
    const part = random.pick(PARTS);
    const offset = random.oneIn(2) ? 512 * random.below(3) : random.below(part.bytes / PAGE + 2) - 1;
    const from = part.hva + offset * PAGE;
    const access = random.pick([read, write, read | write, read | write]);
    const errno = this.#iommu.map(iova(page * PAGE), hva(from), pages * PAGE, access);
    this.trace.push(`map ${page} ${from.toString(16)} ${pages} ${access}: ${errno}`);

    const first = page * PAGE;
    const last = first + pages * PAGE - 1;
    const locked = this.#mappings.reduce((sum, each) => sum + each.pages, 0);
    const there = offset < 0 || offset * PAGE >= part.bytes ? 0 : Math.min(pages, part.bytes / PAGE - offset);
    let expected = 0;
    if (this.#mappings.some((each) => each.page < page + pages && page < each.page + each.pages)) {
      expected = ERRNO.EEXIST;
    } else if (this.#mappings.length >= this.#entries) expected = ERRNO.ENOSPC;
    else if (!RANGES.some((range) => range.first <= first && last <= range.last)) expected = ERRNO.EINVAL;
    else if (there < pages && there <= this.#lockedPages - locked) expected = ERRNO.EFAULT;
    else if (locked + pages > this.#lockedPages) expected = ERRNO.ENOMEM;
    if (expected === 0 && errno === ERRNO.ENOMEM) {
      assert.ok(this.#fewTables, "tables suffice");
      see("map: out of tables");
    } else assert.equal(errno, expected);
    see(`map: ${errno}`);
    if (errno === 0) this.#mappings.push({ page, pages, hva: from, access });
  }

  #unmap(): void {
    const random = this.#random;
    const { page, pages } =
      this.#mappings.length > 0 && !random.oneIn(4)
        ? random.pick(this.#mappings)
        : { page: this.#page(), pages: this.#pages() };
    const change = random.pick([0, 0, 0, 0, 1, -1, 512, 5000, 2 ** 30]);
    const first = Math.max(0, page - random.pick([0, 0, 0, 1, 100, 2 ** 20]));
    const last = Math.max(first, page + pages - 1 + change);
    const bytes = this.#iommu.unmap(iova(first * PAGE), (last - first + 1) * PAGE);
    this.trace.push(`unmap ${first} to ${last}: ${bytes}`);
    const cuts = (at: number) => this.#mappings.some((each) => each.page < at && at < each.page + each.pages);
    if (cuts(first) || cuts(last + 1)) {
      assert.equal(bytes, -ERRNO.EINVAL);
      see("unmap: cut");
      return;
    }
    const inside = this.#mappings.filter((each) => first <= each.page && each.page <= last);
    const unmapped = inside.reduce((sum, each) => sum + each.pages, 0);
    assert.equal(bytes, unmapped * PAGE);
    see(`unmap: ${["nothing", "one", "several"][Math.min(inside.length, 2)]}`);
    this.#mappings = this.#mappings.filter((each) => !inside.includes(each));
  }

  #access(): void {
    const random = this.#random;
    const mapping =
      this.#mappings.length > 0 && !random.oneIn(6)
        ? random.pick(this.#mappings)
        : { page: this.#page(), pages: 1 };
    const at = Math.max(
      0,
      (mapping.page + random.below(mapping.pages)) * PAGE + random.below(PAGE) - random.pick([0, 0, 10]),
    );
    const bytes = random.pick([1, 4, 8, 16, 64, 65, 512, PAGE, 3 * PAGE, 1 + random.below(5 * PAGE)]);
    const aligned = random.oneIn(2) ? at - (at % 4) : at;
    const lane = random.below(2);
    const isWrite = random.oneIn(2);
    const data = Buffer.alloc(bytes + 8);
    for (let i = 0; i < data.length; i++) data[i] = random.next();
    const given = Buffer.from(data);
    const port = this.#ports[lane]!;
    const fault = isWrite ? port.write(aligned, data, 3, bytes) : port.read(aligned, data, 3, bytes);
    this.trace.push(`${isWrite ? "write" : "read"} ${lane} ${aligned.toString(16)} ${bytes}: ${fault}`);
    see(`${isWrite ? "write" : "read"}: ${fault}`);

    // Byte by byte, but page-wise looked up.
    let expected: number = DMA_FAULT.none;
    let done = 0;
    while (done < bytes) {
      const position = aligned + done;
      const page = Math.floor(position / PAGE);
      const found = this.#mappings.find((each) => each.page <= page && page < each.page + each.pages);
      if (position >= 2 ** 48) expected = DMA_FAULT.range;
      else if (found === undefined) expected = DMA_FAULT.notMapped;
      else if ((found.access & (isWrite ? write : read)) === 0) expected = DMA_FAULT.access;
      if (found === undefined || expected !== DMA_FAULT.none) {
        this.#expectedFaults.push([lane, position, isWrite ? "write" : "read", expected]);
        break;
      }
      const count = Math.min(bytes - done, PAGE - (position % PAGE));
      const memory = found.hva + position - found.page * PAGE;
      const part = PARTS.findIndex((each) => each.hva <= memory && memory < each.hva + each.bytes);
      const offset = memory - PARTS[part]!.hva;
      if (isWrite) given.copy(this.#expected[part]!, offset, 3 + done, 3 + done + count);
      else this.#expected[part]!.copy(given, 3 + done, offset, offset + count);
      done += count;
    }
    assert.equal(fault, expected);
    assert.ok(data.equals(given), "the device's buffer");
  }

  #compare(): void {
    for (const [index, part] of this.#parts.entries()) {
      assert.ok(part.equals(this.#expected[index]!), `memory of part ${index}`);
    }
    const { entriesUsed, lockedBytes } = this.#iommu;
    const pages = this.#mappings.reduce((sum, each) => sum + each.pages, 0);
    assert.deepEqual([entriesUsed, lockedBytes], [this.#mappings.length, pages * PAGE]);
    for (const { page, pages, hva: from, access } of this.#mappings) {
      for (const at of [0, Math.floor(pages / 2), pages - 1]) {
        const to = this.#iommu.translate(iova((page + at) * PAGE), access);
        assert.equal(to, from + at * PAGE, `page ${page + at}`);
      }
    }
    const faults: unknown[] = [];
    this.#faults.drain(({ lane, iova, access, reason }) => faults.push([lane, iova, access, reason]));
    assert.deepEqual(faults, this.#expectedFaults);
    this.#expectedFaults = [];
  }
}

const model = suite("iommu-emul: model");

model("random maps, unmaps and accesses are as a list of mappings says", () => {
  const steps = 1000;
  const all = seeds(sized(25, 1000));
  for (const seed of all) {
    const history = new History(seed);
    try {
      history.run(steps);
    } catch (error) {
      const trace = history.trace.slice(-25).join("\n    ");
      throw new Error(`PVDMA_SEED=${seed}: ${(error as Error).message}\n    ${trace}`, { cause: error });
    }
  }
  console.log(`model: ${all.length * steps} steps, seeds ${all[0]} to ${all.at(-1)}`);
  if (all.length === 1) return;
  const { EEXIST, ENOSPC, EINVAL, EFAULT, ENOMEM } = ERRNO;
  const wanted = [
    ...[0, EEXIST, ENOSPC, EINVAL, EFAULT, ENOMEM, "out of tables"].map((answer) => `map: ${answer}`),
    ...["cut", "nothing", "one", "several"].map((answer) => `unmap: ${answer}`),
    ...[0, 1, 2, 3].flatMap((fault) => [`read: ${fault}`, `write: ${fault}`]),
  ];
  assert.deepEqual(
    wanted.filter((what) => !seen.has(what)),
    [],
    "never happened",
  );
});

model.run();
