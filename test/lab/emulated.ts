// Emulated devices: the edu of QEMU, assigned, and ours do the same, fact by fact, when a freestanding guest
// (test/guest/edu.c) drives them; what must not be reached is not, and is counted; and how their lives end. Run on this
// very machine (emulated-here.test.ts), and in the lab (emulated.test.ts).

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import * as assert from "uvu/assert";
import { buildTestGuest } from "../guest/build.js";
import { sized } from "../soak.js";
import { type Host, shellQuote } from "./host.js";
import { RunningVmm } from "./support.js";

// NAME VALUE, in the guest's order.
const REGISTERS = `
  id 0x11e81234
  class 0xff0010
  subsystem 0x11001af4
  bar-size 0xfff00000
  bar-elsewhere 0xffffffff
  bar-moved 0x10000ed
  bar-left 0xffffffff
  bar-off 0xffffffff
  msi-vectors-log2 0x0
  identity 0x10000ed
  identity-written 0x10000ed
  liveness-0 0xffffffff
  liveness 0xedcba987
  factorial-done 0x1
  factorial-0 0x1
  factorial-done 0x1
  factorial-1 0x1
  factorial-done 0x1
  factorial-5 0x78
  factorial-done 0x1
  factorial-12 0x1c8cfc00
  factorial-done 0x1
  factorial-13 0x7328cc00
  factorial-done 0x1
  factorial-20 0x82b40000
  factorial-done 0x1
  factorial-40 0x0
  status-all 0x80
  status-none 0x0
  unknown 0xffffffff
  write-only 0xffffffff
  far 0xffffffff
  source 0x11223344
  target 0x512345678
  target-low 0x12345678
  target-4-of-8 0x87654321
  count 0x64
  command-without-run 0x0`;

const INTERRUPTS = `
  raised-came 0x1
  raised-status 0x5
  acknowledged-1 0x4
  acknowledged-all 0x0
  factorial-irq 0x1
  factorial-came 0x1
  off-status 0x8
  on-came 0x1
  off-came 0x0
  dma-irq 0x1
  dma-came 0x1
  dma-command 0x4
  dma-acknowledged 0x0`;

const DMA = `
  dma-wrong 0x0
  dma-odd-wrong 0x0
  dma-crossing-wrong 0x0
  dma-masked-wrong 0x0
  dma-unmap 0x0
  high-below-mask 0x1
  high-gpa-above-mask 0x1
  high-wrong 0x0
  high-unmap 0x0
  list-map 0x0
  list-wrong 0x0
  list-unmap 0x0`;

const STRAY = `
  stale-unmap 0x0
  unmapped-changed 0x0
  stale-changed 0x0
  read-only-changed 0x0
  far-changed 0x0
  walk-missed 0x0
  walk-changed-in-page 0x0
  walk-changed-outside 0x0
  walk-read-only-missed 0x0
  walk-read-only-changed 0x0
  read-got-it 0x0
  read-got-stale 0x0
  no-master-changed 0x0
  master-again-wrong 0x0
  outside-at-end 0x0
  unmap-read-only 0x0
  unmap-tail 0x0
  unmap 0x0`;
/** Accesses among them that the IOMMU refuses; without bus mastering there is none. */
const REFUSED = 8;

const BOUNDS = `${"  bounds-store-done 0x1\n  bounds-fetch-done 0x1\n".repeat(10)}
  bounds-changed 0x0
  bounds-buffer-changed 0x0
  bounds-all-changed 0x1
  bounds-unmap 0x0
  bounds-alive 0x10000ed`;

const linesOf = (text: string): string[] => text.split("\n").flatMap((line) => line.trim() || []);
export const FACTS = linesOf(`${REGISTERS}${INTERRUPTS}${DMA}${STRAY}\n  last-unmap 0x0`);
/** With the ranges that QEMU does not survive. */
const ALL_FACTS = linesOf(`${REGISTERS}${INTERRUPTS}${DMA}${STRAY}\n${BOUNDS}\n  last-unmap 0x0`);

/** Beyond the 28 bits of the device. */
const MEMORY = ["--memory", "320M"];

/** Runs the guest with an edu to its end; asserts what it found, and returns the VMM's figures and words. */
export async function runFacts(host: Host, args: string[], facts: readonly string[]) {
  const image = await buildTestGuest("edu", host.shareDir);
  const vmm = await RunningVmm.start(host, [...MEMORY, ...args, "--kernel", image]);
  const { status, stats } = await vmm.end();
  const found = [...vmm.process.stdout.matchAll(/^fact (.*?)\r?$/gm)].map(([, line]) => line);
  assert.equal(found, facts);
  assert.is(status, 0);
  assert.match(vmm.process.stdout, /^guest: done\r?$/m);
  for (const name of ["dma/mapped_bytes", "dma/pinned_bytes", "dma/entries", "dma/stuck_mappings"])
    assert.is(stats.get(name), 0, name);
  return { stats, messages: vmm.messages() };
}

async function emulatedFacts(host: Host): Promise<void> {
  const args = ["--assign", "emul:edu", "--cmdline", "bounds"];
  const { stats, messages } = await runFacts(host, args, ALL_FACTS);
  assert.is(stats.get("devices/emul:edu/dma/faults"), REFUSED, "each refused access is counted");
  assert.is(stats.get("dma/faults"), REFUSED);
  // Told once per burst; how many bursts there are is a matter of time.
  const told = messages.filter((line) => line.startsWith("vmm: emul:edu: the IOMMU refused a "));
  assert.ok(told.length >= 1 && told.length <= REFUSED, messages.join("\n"));
  const more = messages.flatMap((line) => /^vmm: emul:edu: (\d+) more of its accesses/.exec(line)?.[1] ?? []);
  assert.is(
    more.reduce((sum, count) => sum + Number(count), told.length),
    REFUSED,
  );
  assert.is(messages.filter((line) => line.includes("which is not in its buffer")).length, 10);
  assert.is(messages.filter((line) => line.includes("is beyond its DMA mask: it takes 0x")).length, 1);
}

/** Has the device's thread do something else than a factorial. */
async function startLosing(host: Host, name: string, instead: string): Promise<RunningVmm> {
  const image = await buildTestGuest("edu", host.shareDir);
  const hook = join(host.shareDir, `${name}.cjs`);
  writeFileSync(
    hook,
    `const { isMainThread, workerData } = require("node:worker_threads");
     if (!isMainThread && workerData.model === "edu") Math.imul = () => { ${instead} };`,
  );
  const args = ["--memory", "64M", "--assign", "emul:edu", "--cmdline", "lose", "--kernel", image];
  return RunningVmm.start(host, args, `exec env NODE_OPTIONS=${shellQuote(`--require ${hook}`)} %s`);
}

async function lose(host: Host, name: string, instead: string, why: string): Promise<void> {
  const vmm = await startLosing(host, name, instead);
  assert.is(await vmm.guestSays("lost"), "19", "calls are answered gone, ENODEV");
  vmm.process.write("x");
  // After the reset there is no device, and a byte ends the guest.
  await vmm.guestSays("no edu");
  vmm.process.write("x");
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.equal(vmm.messages(), [
    `vmm: emul:edu: ${why}: it is taken from the guest, which goes on without it`,
    "vmm: the guest starts again without emul:edu",
  ]);
  assert.ok(stats.get("hypercalls/status/gone")! >= 1);
}

/** Maps in all, by this many CPUs. */
const MAPS = sized(8_000, 10_000_000);
const CPUS = 4;
/** What devices may pin is less than what the CPUs have mapped at times, and far less than what they map in turn. */
const LIMIT_BYTES = 2 ** 18;

async function underPressure(host: Host): Promise<void> {
  const image = await buildTestGuest("stress", host.shareDir);
  const devices = Array.from({ length: CPUS }, () => ["--assign", "emul:edu,dma=cached,dma_mask=0xffffffff"]);
  const limits = ["--dma-limit", String(LIMIT_BYTES), "--dma-granule", "16K", "--dma-idle", "1"];
  const args = ["--cpus", String(CPUS), ...devices.flat(), ...limits, "--cmdline", `maps=${MAPS / CPUS}`];
  const vmm = await RunningVmm.start(host, [...MEMORY, ...args, "--kernel", image]);
  const found = await vmm.guestSaysLate("maps", sized(300_000, 7_200_000));
  const { status, stats } = await vmm.end();
  const [maps, limited, calls, checks, wrong] = found.split(/ [a-z]+ /).map(Number);
  console.log(
    `    ${maps} maps, ${calls} calls, ${limited} limited, ${stats.get("dma/evicted")} granules reclaimed, ` +
      `${checks} copies compared`,
  );
  assert.is(wrong, 0, vmm.process.stdout);
  assert.is(stats.get("dma/faults"), 0, "a device reached a page that was counted and not mapped");
  assert.is(status, 0);
  assert.ok(maps! >= MAPS && checks! > MAPS / 500 && limited! > 0 && stats.get("dma/evicted")! > MAPS / 100);
  assert.ok(stats.get("dma/peak_pinned_bytes")! <= LIMIT_BYTES);
  for (const name of ["dma/mapped_bytes", "dma/pinned_bytes", "dma/entries", "dma/stuck_mappings"])
    assert.is(stats.get(name), 0, name);
}

export const emulatedTests: readonly (readonly [name: string, body: (host: Host) => Promise<void>])[] = [
  ["an emulated edu does what QEMU's does, and reaches nothing that is not mapped", emulatedFacts],
  ["policy cached, all CPUs at random, with too little to pin: no wrong byte", underPressure],
  [
    "the same in a domain of its own, beside another edu",
    async (host) => {
      const assign = ["--assign", "emul:edu,dma=pinned", "--assign", "emul:edu,domain=own,guest=1"];
      const { stats } = await runFacts(host, assign, FACTS);
      assert.is(stats.get("devices/emul:edu.1/dma/faults"), REFUSED);
      assert.is(stats.get("devices/emul:edu/dma/faults"), 0);
    },
  ],
  [
    "a device whose code fails is pulled out, and the guest goes on, also over a reset",
    (host) => lose(host, "throws", "throw new Error('made to fail')", "made to fail"),
  ],
  [
    "a device whose thread ends is pulled out",
    (host) => lose(host, "exits", "process.exit(1)", "its thread ended without a word"),
  ],
  [
    "a device that hangs is pulled out when a vCPU has waited for it long enough",
    (host) => lose(host, "hangs", "for (;;);", "its thread does not answer"),
  ],
  [
    "SIGTERM ends a machine whose device is at work",
    async (host) => {
      const image = await buildTestGuest("edu", host.shareDir);
      const args = ["--assign", "emul:edu", "--cmdline", "busy", "--kernel", image];
      const vmm = await RunningVmm.start(host, ["--memory", "64M", ...args]);
      await vmm.guestSays("busy");
      const directory = await vmm.statistics();
      assert.ok(directory.has("devices/emul:edu/dma/faults"));
      assert.ok(directory.has("vcpus/0/exits/serial"));
      vmm.process.kill("SIGTERM");
      const { status, stats } = await vmm.end();
      assert.is(status, 1);
      assert.ok(vmm.messages().includes("vmm: ended by SIGTERM"));
      assert.is(stats.get("dma/pinned_bytes"), 0);
    },
  ],
  [
    "a machine that resets again and again has its device anew each time",
    async (host) => {
      const image = await buildTestGuest("life", host.shareDir);
      const args = ["--memory", "64M", "--assign", "emul:edu", "--cmdline", "ask", "--kernel", image];
      const vmm = await RunningVmm.start(host, args);
      for (const end of ["r", "f", "r", "x"]) {
        await vmm.guestSays("mapped");
        await vmm.guestSays("alive");
        vmm.process.write(end);
      }
      const { status, stats } = await vmm.end();
      assert.is(status, 0);
      assert.equal(vmm.messages(), ["vmm: guest: triple fault on vCPU 0: it starts anew"]);
      assert.is(stats.get("dma/released_mappings"), 4, "each life's page was taken back");
      assert.is(stats.get("dma/pinned_bytes"), 0);
    },
  ],
  [
    "limits, and failures on demand, of one of two devices",
    async (host) => {
      const image = await buildTestGuest("asked", host.shareDir);
      const assign = ["--assign", "emul:edu", "--assign", "emul:edu", "--dma-limit", "4K,emul:edu.1"];
      const inject = ["--inject", "map,device=emul:edu,skip=1,next=1,errno=ENOMEM"];
      const args = ["--memory", "64M", ...assign, ...inject, "--kernel", image];
      const vmm = await RunningVmm.start(host, args);
      await vmm.guestSays("ready");
      const asks: readonly (readonly [byte: string, word: string, answer: string])[] = [
        ["a", "map 1", "ok 0 retries 0"],
        ["a", "map 1", "limit 12 retries 0"],
        ["a", "map 1", "ok 0 retries 0"],
        ["b", "map 2", "ok 0 retries 0"],
        ["b", "map 2", "limit 122 retries 0"],
        ["B", "unmap 2", "ok 0 retries 0"],
        ["b", "map 2", "ok 0 retries 0"],
      ];
      for (const [byte, word, answer] of asks) {
        vmm.process.write(byte);
        assert.is(await vmm.guestSays(word), answer);
      }
      vmm.process.write("q");
      const { status, stats } = await vmm.end();
      assert.is(status, 0);
      assert.is(stats.get("devices/emul:edu/dma/injected"), 1);
      assert.is(stats.get("devices/emul:edu.1/dma/limit_hits"), 1);
      assert.is(stats.get("dma/released_mappings"), 3);
    },
  ],
];
