// Commands per second of the NVMe controller in one thread: 4 KiB random reads and writes at queue depth 32 and 128 KiB
// sequential, through the software IOMMU to a file in the page cache. The guest's side is as cheap as it can be: its
// queue is filled once, and only doorbells move. What a machine adds (exits, interrupts) is not in it.

import fs from "node:fs";
import { type Fields, type GuestQueue, NATIVES, NvmeGuest, PAGE } from "../unit/support/nvme-guest.js";
import { present, progress } from "./program.js";
import type { Row } from "./report.js";

const ROUNDS = 3;
const SECONDS = 1;
const DISK_BYTES = 256 * 2 ** 20;

interface Case {
  readonly name: string;
  readonly bytes: number;
  readonly depth: number;
  readonly opcode: number;
  readonly random: boolean;
}

/** Commands per second, and processor time of one in microseconds: on a machine with other work, the truer figure. */
async function measure(
  what: Case,
  natives: typeof NATIVES,
): Promise<{ readonly rate: number; readonly cpu: number }> {
  const guest = new NvmeGuest({ bytes: DISK_BYTES, natives, memoryPages: 8192 });
  fs.writeFileSync(guest.path, Buffer.alloc(DISK_BYTES, 1));
  guest.start();
  const entries = 1024;
  const io: GuestQueue = await guest.createQueue(1, entries);
  const pages = what.bytes / PAGE;
  const blocks = what.bytes / 512;
  const buffers = Array.from({ length: what.depth }, () => guest.map(pages));
  const lists = buffers.map((at) => {
    const list = guest.map(1);
    guest.poke64(list, ...Array.from({ length: pages - 1 }, (_, i) => at + (i + 1) * PAGE));
    return list;
  });
  let next = 0;
  for (let i = 0; i < entries; i++) {
    const buffer = i % what.depth;
    const slot = what.random ? Math.imul(i, 0x9e3779b1) >>> 0 : next++;
    const first = (slot % (DISK_BYTES / what.bytes)) * blocks;
    const prp2 = pages === 1 ? 0 : pages === 2 ? buffers[buffer]! + PAGE : lists[buffer]!;
    const fields: Fields = {
      opcode: what.opcode,
      nsid: 1,
      prp1: buffers[buffer]!,
      prp2,
      cdw10: first,
      cdw12: blocks - 1,
    };
    io.put(fields);
  }
  let tail = 0;
  let head = 0;
  const round = async () => {
    tail = (tail + what.depth) % entries;
    guest.setReg(0x1008, tail);
    await guest.run();
    head = (head + what.depth) % entries;
    guest.setReg(0x100c, head);
  };
  for (let i = 0; i < 200; i++) await round();
  let done = 0;
  const started = performance.now();
  const cpuBefore = process.cpuUsage();
  while (performance.now() - started < SECONDS * 1000) {
    await round();
    done += what.depth;
  }
  const seconds = (performance.now() - started) / 1000;
  const { user, system } = process.cpuUsage(cpuBefore);
  await guest.close();
  return { rate: done / seconds, cpu: (user + system) / done };
}

const CASES: readonly Case[] = [
  { name: "4 KiB random reads, QD 32", bytes: 4096, depth: 32, opcode: 2, random: true },
  { name: "4 KiB random writes, QD 32", bytes: 4096, depth: 32, opcode: 1, random: true },
  { name: "4 KiB random reads, QD 1", bytes: 4096, depth: 1, opcode: 2, random: true },
  { name: "128 KiB sequential reads, QD 8", bytes: 131072, depth: 8, opcode: 2, random: false },
  { name: "128 KiB sequential writes, QD 8", bytes: 131072, depth: 8, opcode: 1, random: false },
];

const MEMORY = [
  { name: "copies by libc", natives: NATIVES },
  { name: "Node's functions only", natives: {} },
];

/** Command rates and processor times by case and way of copying. */
const measured = CASES.map(() => MEMORY.map(() => ({ rates: [] as number[], cpu: [] as number[] })));
for (let round = 0; round < ROUNDS; round++) {
  progress(`  round ${round + 1} of ${ROUNDS}`);
  for (const [index, what] of CASES.entries()) {
    for (const [way, { natives }] of MEMORY.entries()) {
      const { rate, cpu } = await measure(what, natives);
      measured[index]![way]!.rates.push(rate);
      measured[index]![way]!.cpu.push(cpu);
    }
  }
}
const rows = (field: "rates" | "cpu"): Row[] =>
  CASES.map(({ name }, index) => ({
    name,
    bars: MEMORY.map((way, i) => ({ contender: way.name, values: measured[index]![i]![field] })),
  }));
const about =
  "One thread, queues filled beforehand, through the software IOMMU to a file in the page cache. What a machine adds, exits " +
  "and interrupts, is not in it.";
present({
  sections: [
    {
      id: "controller",
      title: "The emulated NVMe controller alone",
      about,
      unit: "commands/s",
      better: "more",
      reference: MEMORY[1]!.name,
      rows: rows("rates"),
    },
    {
      id: "controller-cpu",
      title: "The emulated NVMe controller alone: processor time",
      about,
      unit: "µs per command",
      better: "less",
      reference: MEMORY[1]!.name,
      rows: rows("cpu"),
    },
  ],
});
