// The rules of a VFIO type1v2 domain as a table of steps with the answers expected, and what runs them: on VFIO in the
// lab (vfio.ts, with a real IOMMU and a device behind it), on the software IOMMU anywhere. Answers are errnos of map
// (0: done), bytes or -errno of unmap, and for DMA the bytes that arrived.

import { MAP_FLAG } from "../../hypercalls/abi.js";
import { hva, iova } from "../../hypercalls/addresses.js";
import type { BackendLimits, DmaBackend } from "../../hypercalls/backend.js";
import { ERRNO } from "../../hypercalls/status.js";

const { EINVAL, EEXIST, ENOSPC, ENOMEM, EFAULT } = ERRNO;
const { read: R, write: W } = MAP_FLAG;
const RW = R | W;
const PAGE = 4096;
const MiB = 2 ** 20;

/** Memory that the steps map. What follows it in the address space is no memory. */
export const MEMORY_BYTES = 16 * MiB;
/** What the process may lock (RLIMIT_MEMLOCK), in every scene. */
export const LOCKED_BYTES_MAX = 8 * MiB;
/** Front of the memory that a scene's DMA may touch; all of it is compared after every step. */
export const DMA_BYTES = 64 * PAGE;
/** The device's own page, for data to come from and go to: IOVA, and offset in the memory. */
export const SCRATCH_IOVA = 0x8000;
export const SCRATCH_AT = DMA_BYTES - PAGE;

/** The window where writes are interrupts: x86, both vendors. */
const MSI_FIRST = 0xfee0_0000;
const MSI_END = 0xfef0_0000;

/** A device that does DMA, and nothing else. At most 4095 bytes, IOVAs below 2^28: what QEMU's edu can. */
export interface DmaDevice {
  /** Without `master` the device is no bus master meanwhile. */
  write(iova: number, data: Buffer, master: boolean): Promise<void>;
  /** What it read: `poison` where nothing came. */
  read(iova: number, bytes: number, poison: number, master: boolean): Promise<Buffer>;
}

/** What a scene runs on: a fresh domain. `memory` is where MEMORY_BYTES are in this process. */
export interface Stage {
  readonly backend: DmaBackend;
  readonly limits: BackendLimits;
  readonly memory: number;
  /** DMA_BYTES of it. */
  readonly bytes: Buffer;
  readonly device: DmaDevice;
}

export type Step = { readonly what: string; readonly answer: number } & (
  | {
      readonly op: "map";
      readonly iova: number;
      readonly hva: number;
      readonly bytes: number;
      readonly access: number;
    }
  | { readonly op: "unmap"; readonly iova: number; readonly bytes: number }
  | {
      readonly op: "write" | "read";
      readonly iova: number;
      readonly bytes: number;
      /** Pieces of the memory, [offset, bytes], that the IOVAs would be if all were mapped and allowed. */
      readonly pieces: readonly (readonly [number, number])[];
      readonly master: boolean;
      /** The answer of VT-d under Linux with edu behind it, where it is not the software IOMMU's. Two steps have one. */
      readonly vtd?: number;
    }
);

export interface Scene {
  readonly name: string;
  /** Mappings that the host allows: dma_entry_limit. */
  readonly entries: number;
  /** `memory` as in Stage; `end` is the first IOVA above the last range. */
  steps(memory: number, end: number): readonly Step[];
}

const map = (
  what: string,
  iova: number,
  hva: number,
  bytes: number,
  access: number,
  answer: number,
): Step => ({
  ...{ what: `map: ${what}`, answer, op: "map", iova, hva, bytes, access },
});
const unmap = (what: string, iova: number, bytes: number, answer: number): Step => ({
  ...{ what: `unmap: ${what}`, answer, op: "unmap", iova, bytes },
});
const dma = (
  op: "read" | "write",
  what: string,
  iova: number,
  pieces: readonly (readonly [number, number])[],
  answer: number,
  more: { vtd?: number; master?: boolean } = {},
): Step => {
  const bytes = pieces.reduce((sum, [, each]) => sum + each, 0);
  return { what: `${op}: ${what}`, answer, op, iova, bytes, pieces, master: true, ...more };
};

const DEFAULT_ENTRIES = 65535;
const AT = 16 * MiB;

export const SCENES: readonly Scene[] = [
  {
    name: "arguments",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("no access", AT, memory, PAGE, 0, EINVAL),
      map("unknown access bits", AT, memory, PAGE, 8 | RW, EINVAL),
      map("no bytes", AT, memory, 0, RW, EINVAL),
      map("half a page", AT, memory, PAGE / 2, RW, EINVAL),
      map("a page and a byte", AT, memory, PAGE + 1, RW, EINVAL),
      map("IOVA within a page", AT + 0x800, memory, PAGE, RW, EINVAL),
      map("memory within a page", AT, memory + 0x800, PAGE, RW, EINVAL),
      map("IOVA wraps", 2 ** 64 - PAGE, memory, 2 * PAGE, RW, EINVAL),
      map("memory wraps", AT, 2 ** 64 - PAGE, 2 * PAGE, RW, EINVAL),
      map("all there is", 0, memory, 2 ** 64 - PAGE, RW, EINVAL),
      unmap("no bytes", AT, 0, -EINVAL),
      unmap("half a page", AT, PAGE / 2, -EINVAL),
      unmap("IOVA within a page", AT + 0x800, PAGE, -EINVAL),
      unmap("wraps", 2 ** 64 - PAGE, 2 * PAGE, -EINVAL),
      unmap("nothing is there", AT, PAGE, 0),
      unmap("nothing is anywhere", 0, 2 ** 47, 0),
      unmap("nothing at the very end", 2 ** 64 - PAGE, PAGE, 0),
      map("for reading", AT, memory, PAGE, R, 0),
      map("for writing", AT + PAGE, memory, PAGE, W, 0),
      map("for both", AT + 2 * PAGE, memory, PAGE, RW, 0),
      unmap("all three", AT, 3 * PAGE, 3 * PAGE),
    ],
  },
  {
    name: "overlaps",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("four pages", AT, memory, 4 * PAGE, RW, 0),
      map("the same", AT, memory, 4 * PAGE, RW, EEXIST),
      map("the same, other memory", AT, memory + MiB, 4 * PAGE, RW, EEXIST),
      map("the first page", AT, memory, PAGE, RW, EEXIST),
      map("a page in the middle", AT + PAGE, memory, PAGE, RW, EEXIST),
      map("the last page", AT + 3 * PAGE, memory, PAGE, RW, EEXIST),
      map("from before into it", AT - PAGE, memory, 2 * PAGE, RW, EEXIST),
      map("from it to behind", AT + 3 * PAGE, memory, 2 * PAGE, RW, EEXIST),
      map("around it", AT - PAGE, memory, 6 * PAGE, RW, EEXIST),
      map("around it, and into the hole", AT - PAGE, memory, MSI_END - AT, RW, EEXIST),
      map("over it, no access", AT, memory, PAGE, 0, EINVAL),
      map("over it, no memory", AT, memory + MEMORY_BYTES, PAGE, RW, EEXIST),
      map("right before", AT - PAGE, memory, PAGE, RW, 0),
      map("right behind", AT + 4 * PAGE, memory, PAGE, RW, 0),
      map("the same memory elsewhere", AT + 8 * PAGE, memory, 4 * PAGE, RW, 0),
      unmap("the one before", AT - PAGE, PAGE, PAGE),
      unmap("the one behind", AT + 4 * PAGE, PAGE, PAGE),
      unmap("the first", AT, 4 * PAGE, 4 * PAGE),
      map("where it was", AT, memory, PAGE, RW, 0),
      unmap("everything", 0, 2 ** 39, 5 * PAGE),
    ],
  },
  {
    name: "unmaps",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("four pages", AT, memory, 4 * PAGE, RW, 0),
      map("four right behind", AT + 4 * PAGE, memory + 4 * PAGE, 4 * PAGE, RW, 0),
      map("one further on", AT + 12 * PAGE, memory, PAGE, RW, 0),
      unmap("the beginning of one", AT, PAGE, -EINVAL),
      unmap("the middle of one", AT + PAGE, 2 * PAGE, -EINVAL),
      unmap("the end of one", AT + 3 * PAGE, PAGE, -EINVAL),
      unmap("one and the beginning of the next", AT, 5 * PAGE, -EINVAL),
      unmap("the end of one and the next", AT + 3 * PAGE, 5 * PAGE, -EINVAL),
      unmap("from before into one", AT - 4 * PAGE, 5 * PAGE, -EINVAL),
      unmap("from the middle of one to behind all", AT + 5 * PAGE, 16 * PAGE, -EINVAL),
      unmap("a gap", AT + 8 * PAGE, 4 * PAGE, 0),
      unmap("before all", 0, AT, 0),
      unmap("one, from before to behind", AT + 9 * PAGE, 16 * PAGE, PAGE),
      unmap("that one again", AT + 9 * PAGE, 16 * PAGE, 0),
      unmap("two at once, from before to behind", AT - 4 * PAGE, 32 * PAGE, 8 * PAGE),
      unmap("two again", AT, 8 * PAGE, 0),
      ...Array.from({ length: 32 }, (_, i) =>
        map(`page ${i} of 32 with gaps`, AT + 64 * MiB * i, memory + PAGE * i, PAGE, RW, 0),
      ),
      unmap("the middle 16", AT + 8 * 64 * MiB, 16 * 64 * MiB, 16 * PAGE),
      unmap("the others", 0, 2 ** 38, 16 * PAGE),
    ],
  },
  {
    name: "large pages",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => {
      // Memory aligned as superpages want it, whether the host makes one or not.
      const large = Math.ceil(memory / (2 * MiB)) * 2 * MiB;
      return [
        map("2 MiB, aligned", AT, large, 2 * MiB, RW, 0),
        unmap("a page of it", AT, PAGE, -EINVAL),
        unmap("the half of it", AT + MiB, MiB, -EINVAL),
        unmap("all but a page", AT, 2 * MiB - PAGE, -EINVAL),
        map("a page in it", AT + MiB, memory, PAGE, RW, EEXIST),
        unmap("all of it", AT, 2 * MiB, 2 * MiB),
        map("2 MiB, IOVA not aligned", AT + PAGE, large, 2 * MiB, RW, 0),
        map("up to it", AT, large, PAGE, RW, 0),
        unmap("from its middle", AT + MiB, 2 * MiB, -EINVAL),
        unmap("both", AT, 2 * MiB + PAGE, 2 * MiB + PAGE),
        map(
          "2 MiB and pages on both sides",
          AT - 3 * PAGE,
          large - 3 * PAGE + 2 * MiB,
          2 * MiB + 5 * PAGE,
          RW,
          0,
        ),
        unmap("the 2 MiB", AT, 2 * MiB, -EINVAL),
        unmap("the pages in front", AT - 3 * PAGE, 3 * PAGE, -EINVAL),
        unmap("all of it", AT - 3 * PAGE, 2 * MiB + 5 * PAGE, 2 * MiB + 5 * PAGE),
        map("two of 2 MiB, the first", AT, large, 2 * MiB, RW, 0),
        map("two of 2 MiB, the second", AT + 2 * MiB, large + 2 * MiB, 2 * MiB, RW, 0),
        unmap("the first", AT, 2 * MiB, 2 * MiB),
        map("a page where the first was", AT + MiB, memory, PAGE, RW, 0),
        unmap("everything", 0, 2 ** 39, 2 * MiB + PAGE),
      ];
    },
  },
  {
    name: "ranges",
    entries: DEFAULT_ENTRIES,
    steps: (memory, end) => [
      map("the first page", 0, memory, PAGE, RW, 0),
      map("the last page before the hole", MSI_FIRST - PAGE, memory, PAGE, RW, 0),
      map("the first page behind the hole", MSI_END, memory, PAGE, RW, 0),
      map("the last page", end - PAGE, memory, PAGE, RW, 0),
      map("the first page of the hole", MSI_FIRST, memory, PAGE, RW, EINVAL),
      map("the last page of the hole", MSI_END - PAGE, memory, PAGE, RW, EINVAL),
      map("into the hole", MSI_FIRST - 2 * PAGE, memory, 2 * PAGE, RW, EEXIST),
      map("out of the hole", MSI_END - PAGE, memory, 2 * PAGE, RW, EEXIST),
      map("above the ranges", end, memory, PAGE, RW, EINVAL),
      map("out of the ranges", end - PAGE, memory, 2 * PAGE, RW, EEXIST),
      map("the last page of all", 2 ** 64 - PAGE, memory, PAGE, RW, EINVAL),
      unmap("the hole", MSI_FIRST, MSI_END - MSI_FIRST, 0),
      unmap("above the ranges", end, PAGE, 0),
      unmap("over the hole", MSI_FIRST - PAGE, MSI_END - MSI_FIRST + 2 * PAGE, 2 * PAGE),
      map("into the hole, nothing there", MSI_FIRST - PAGE, memory, 2 * PAGE, RW, EINVAL),
      map("out of the hole, nothing there", MSI_END - PAGE, memory, 2 * PAGE, RW, EINVAL),
      map("over the hole", MSI_FIRST - PAGE, memory, MSI_END - MSI_FIRST + 2 * PAGE, RW, EINVAL),
      unmap("the last page, to beyond the ranges", end - PAGE, 16 * PAGE, PAGE),
      map("out of the ranges, nothing there", end - PAGE, memory, 2 * PAGE, RW, EINVAL),
      unmap("everything", 0, end, PAGE),
    ],
  },
  {
    name: "entries",
    entries: 3,
    steps: (memory) => [
      map("the first", AT, memory, PAGE, RW, 0),
      map("the second", AT + 2 * PAGE, memory, PAGE, RW, 0),
      map("the third, larger", AT + 4 * PAGE, memory, 4 * PAGE, RW, 0),
      map("the fourth", AT + 16 * PAGE, memory, PAGE, RW, ENOSPC),
      map("over another", AT, memory, PAGE, RW, EEXIST),
      map("into the hole", MSI_FIRST, memory, PAGE, RW, ENOSPC),
      map("no memory", AT + 16 * PAGE, memory + MEMORY_BYTES, PAGE, RW, ENOSPC),
      map("too much memory", AT + 16 * PAGE, memory, LOCKED_BYTES_MAX + PAGE, RW, ENOSPC),
      map("no access", AT + 16 * PAGE, memory, PAGE, 0, EINVAL),
      unmap("a gap", AT + PAGE, PAGE, 0),
      map("the fourth, still", AT + 16 * PAGE, memory, PAGE, RW, ENOSPC),
      unmap("the second", AT + 2 * PAGE, PAGE, PAGE),
      map("no memory, with an entry", AT + 16 * PAGE, memory + MEMORY_BYTES, PAGE, RW, EFAULT),
      map("the fourth, after one that failed", AT + 16 * PAGE, memory, PAGE, RW, 0),
      map("the fifth", AT + 2 * PAGE, memory, PAGE, RW, ENOSPC),
      unmap("everything", 0, 2 ** 39, 6 * PAGE),
      map("after everything", AT, memory, PAGE, RW, 0),
    ],
  },
  {
    name: "locked memory",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("a page more than may be locked", AT, memory, LOCKED_BYTES_MAX + PAGE, RW, ENOMEM),
      unmap("nothing came of it", AT, LOCKED_BYTES_MAX + PAGE, 0),
      map("as much as may be", AT, memory, LOCKED_BYTES_MAX, RW, 0),
      map("a page more", AT - PAGE, memory, PAGE, R, ENOMEM),
      map("over what is there", AT, memory, PAGE, RW, EEXIST),
      map("into the hole", MSI_FIRST, memory, PAGE, RW, EINVAL),
      map("no memory", AT - PAGE, memory + MEMORY_BYTES, PAGE, RW, EFAULT),
      unmap("it", AT, LOCKED_BYTES_MAX, LOCKED_BYTES_MAX),
      map("half of it", AT, memory, LOCKED_BYTES_MAX / 2, RW, 0),
      map("the same memory again", AT + 16 * MiB, memory, LOCKED_BYTES_MAX / 2 - PAGE, RW, 0),
      map("once more, two pages", AT + 32 * MiB, memory, 2 * PAGE, RW, ENOMEM),
      map(
        "a page that is there, one that is not",
        AT + 32 * MiB,
        memory + MEMORY_BYTES - PAGE,
        2 * PAGE,
        RW,
        EFAULT,
      ),
      map(
        "two that are, one that is not",
        AT + 32 * MiB,
        memory + MEMORY_BYTES - 2 * PAGE,
        3 * PAGE,
        RW,
        ENOMEM,
      ),
      map("once more, a page", AT + 32 * MiB, memory, PAGE, RW, 0),
      map("a page too many", AT + 33 * MiB, memory, PAGE, RW, ENOMEM),
      unmap("the second", AT + 16 * MiB, LOCKED_BYTES_MAX / 2 - PAGE, LOCKED_BYTES_MAX / 2 - PAGE),
      map("where there is room now", AT + 33 * MiB, memory, LOCKED_BYTES_MAX / 4, RW, 0),
      unmap("everything", 0, 2 ** 39, LOCKED_BYTES_MAX * 0.75 + PAGE),
    ],
  },
  {
    name: "memory",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("none", AT, memory + MEMORY_BYTES, PAGE, RW, EFAULT),
      map("none, for reading", AT, memory + MEMORY_BYTES, PAGE, R, EFAULT),
      map("address 0", AT, 0, PAGE, RW, EFAULT),
      map("the last address", AT, 2 ** 64 - PAGE, PAGE, RW, EFAULT),
      map("the first of two pages", AT, memory + MEMORY_BYTES - PAGE, 2 * PAGE, RW, EFAULT),
      unmap("nothing came of it", AT, 2 * PAGE, 0),
      map("the last page", AT, memory + MEMORY_BYTES - PAGE, PAGE, RW, 0),
      unmap("it", AT, PAGE, PAGE),
    ],
  },
  {
    name: "DMA",
    entries: DEFAULT_ENTRIES,
    steps: (memory) => [
      map("the device's own page", SCRATCH_IOVA, memory + SCRATCH_AT, PAGE, RW, 0),
      map("page 1, for both", AT, memory + PAGE, PAGE, RW, 0),
      map("page 4 behind it", AT + PAGE, memory + 4 * PAGE, PAGE, RW, 0),
      map("page 2 behind it, for reading", AT + 2 * PAGE, memory + 2 * PAGE, PAGE, R, 0),
      map("page 3 behind it, for writing", AT + 3 * PAGE, memory + 3 * PAGE, PAGE, W, 0),
      dma("write", "a mapped page", AT + 1, [[PAGE + 1, 4095]], 4095),
      dma("read", "a mapped page", AT + 1, [[PAGE + 1, 4095]], 4095),
      dma("write", "no bus master", AT, [[PAGE, 64]], 0, { master: false }),
      dma("read", "no bus master", AT, [[PAGE, 64]], 0, { master: false }),
      dma(
        "write",
        "two mappings, pages apart",
        AT + PAGE - 100,
        [
          [2 * PAGE - 100, 100],
          [4 * PAGE, 300],
        ],
        400,
      ),
      dma(
        "read",
        "two mappings, pages apart",
        AT + PAGE - 100,
        [
          [2 * PAGE - 100, 100],
          [4 * PAGE, 300],
        ],
        400,
      ),
      dma("write", "where only reads are allowed", AT + 2 * PAGE, [[2 * PAGE, 512]], 0),
      dma("read", "where only reads are allowed", AT + 2 * PAGE, [[2 * PAGE, 512]], 512),
      dma(
        "write",
        "into what is for reading",
        AT + 2 * PAGE - 64,
        [
          [5 * PAGE - 64, 64],
          [2 * PAGE, 64],
        ],
        64,
      ),
      dma("write", "where only writes are allowed", AT + 3 * PAGE, [[3 * PAGE, 512]], 512),
      // Linux's VT-d driver always sets the bit for reading, which is "present" in the other format of these tables.
      dma("read", "where only writes are allowed", AT + 3 * PAGE, [[3 * PAGE, 512]], 0, { vtd: 512 }),
      dma("write", "where nothing is mapped", AT + 16 * PAGE, [[16 * PAGE, 512]], 0),
      dma("read", "where nothing is mapped", AT + 16 * PAGE, [[16 * PAGE, 512]], 0),
      dma(
        "write",
        "off the last page",
        AT + 4 * PAGE - 64,
        [
          [4 * PAGE - 64, 64],
          [5 * PAGE, 64],
        ],
        64,
      ),
      // On a bus each packet is refused by itself, and a device that does not care goes on behind it. DmaPort ends an
      // access where it is refused.
      dma(
        "write",
        "from before into the first page",
        AT - 64,
        [
          [0, 64],
          [PAGE, 64],
        ],
        0,
        { vtd: 64 },
      ),
      unmap("page 1", AT, PAGE, PAGE),
      dma("write", "what was unmapped", AT, [[PAGE, 64]], 0),
      dma("read", "what was unmapped", AT, [[PAGE, 64]], 0),
      dma("write", "what was next to it", AT + PAGE, [[4 * PAGE, 64]], 64),
      map("other memory there", AT, memory + 7 * PAGE, PAGE, RW, 0),
      dma("write", "the new memory", AT, [[7 * PAGE, 64]], 64),
      dma("read", "the new memory", AT, [[7 * PAGE, 64]], 64),
      map("eight pages", AT + MiB, memory + 16 * PAGE, 8 * PAGE, RW, 0),
      dma("write", "across pages of one mapping", AT + MiB + PAGE - 8, [[17 * PAGE - 8, 4095]], 4095),
      unmap("a part of them", AT + MiB, 4 * PAGE, -EINVAL),
      dma("read", "after an unmap that failed", AT + MiB, [[16 * PAGE, 64]], 64),
      unmap("all", 0, 2 ** 39, 13 * PAGE),
    ],
  },
];

/** The answer of a step that changed memory elsewhere. */
export const ELSEWHERE = -1000;

const POISON = 0xee;

/** Runs the steps one after the other; returns the answers. */
export async function runScene(scene: Scene, stage: Stage): Promise<number[]> {
  const { backend, bytes: memory, device } = stage;
  const answers: number[] = [];
  for (const step of scene.steps(stage.memory, stage.limits.ranges.at(-1)!.last + 1)) {
    if (step.op === "map") {
      answers.push(backend.map(iova(step.iova), hva(step.hva), step.bytes, step.access));
    } else if (step.op === "unmap") answers.push(backend.unmap(iova(step.iova), step.bytes));
    else {
      // Bytes that differ from those of the step before, and from the poison.
      const seed = answers.length;
      const data = Buffer.alloc(step.bytes);
      for (let i = 0; i < step.bytes; i++) data[i] = 1 + ((i * 7 + seed * 31) % 200);
      if (step.op === "read") scatter(data, step.pieces, memory);
      const expected = Buffer.from(memory);
      let arrived: Buffer;
      if (step.op === "read") arrived = await device.read(step.iova, step.bytes, POISON, step.master);
      else {
        await device.write(step.iova, data, step.master);
        arrived = gather(memory, step.pieces);
      }
      let count = 0;
      let from = 0;
      for (const [at, bytes] of step.pieces) {
        let same = 0;
        while (same < bytes && arrived[from + same] === data[from + same]) same++;
        if (step.op === "write") expected.set(data.subarray(from, from + same), at);
        count += same;
        from += bytes;
      }
      // The device's own page is its own affair.
      const unchanged = memory.subarray(0, SCRATCH_AT).equals(expected.subarray(0, SCRATCH_AT));
      answers.push(unchanged ? count : ELSEWHERE);
    }
  }
  return answers;
}

/** Writes data to the pieces, as far as it goes. */
function scatter(data: Buffer, pieces: readonly (readonly [number, number])[], memory: Buffer): void {
  let from = 0;
  for (const [at, bytes] of pieces) {
    memory.set(data.subarray(from, from + bytes), at);
    from += bytes;
  }
}

function gather(memory: Buffer, pieces: readonly (readonly [number, number])[]): Buffer {
  return Buffer.concat(pieces.map(([at, bytes]) => memory.subarray(at, at + bytes)));
}

/** The answers of the table, one per step; `vtd`: as VT-d under Linux gives them. */
export const expectedAnswers = (
  scene: Scene,
  stage: Pick<Stage, "limits" | "memory">,
  vtd: boolean,
): number[] =>
  scene
    .steps(stage.memory, stage.limits.ranges.at(-1)!.last + 1)
    .map((step) => ("vtd" in step && vtd ? step.vtd! : step.answer));

/** Answers with what they answer, for a comparison that can be read. */
export const named = (
  scene: Scene,
  stage: Pick<Stage, "limits" | "memory">,
  answers: readonly number[],
): string[] =>
  scene
    .steps(stage.memory, stage.limits.ranges.at(-1)!.last + 1)
    .map(({ what }, index) => `${scene.name}: ${what}: ${answers[index]}`);
