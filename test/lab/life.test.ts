// How a VMM's life can end, and begin again: reboots, triple faults, signals, Ctrl-A X, a console nobody reads, a thread
// that is lost. Whatever happens, nothing stays pinned, nothing of an earlier life is left, and the wish to end is obeyed.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import * as assert from "uvu/assert";
import { buildTestGuest } from "../guest/build.js";
import { sized } from "../soak.js";
import { shellQuote } from "./host.js";
import { LabSuite, RunningVmm } from "./support.js";

const lab = new LabSuite("life", {}, async () => {
  image = await buildTestGuest("life", lab.host.shareDir);
});
let image: string;
const start = (how: string, ...args: string[]) =>
  lab.start("--memory", "64M", "--cmdline", how, ...args, image);
/** What the VMM has said, statistics aside. */
const said = (vmm: RunningVmm) => vmm.process.stderr.split("\n").filter((line) => line.startsWith("vmm: "));

lab.test("power-off: exit status 0, and the page the guest left mapped is not pinned", async () => {
  const { status, stats } = await (await start("off")).end();
  assert.is(status, 0);
  assert.is(stats.get("hypercalls/map/calls"), 1);
  assert.is(stats.get("dma/peak_pinned_bytes"), 4096);
  assert.is(stats.get("dma/pinned_bytes"), 0);
  assert.is(stats.get("dma/released_mappings"), 1);
});

lab.test("a guest that reboots for ever is ended by SIGTERM, wherever it is", async () => {
  const vmm = await start("reset", "--cpus", "2");
  for (let life = 0; life < 3; life++) await vmm.guestSays("alive");
  vmm.process.kill("SIGTERM");
  const { status, stats } = await vmm.end(20_000);
  assert.is(status, 1);
  assert.equal(said(vmm), ["vmm: ended by SIGTERM"]);
  assert.ok((stats.get("hypercalls/map/calls") ?? 0) >= 2, "calls are counted over reboots");
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab.test("resets and triple faults leave nothing, whatever the other vCPUs do meanwhile", async () => {
  const idle = await lab.pinnedPages();
  const vmm = await start("ask busy", "--cpus", "3");
  const left = async () => {
    const proc = `/proc/${vmm.process.pid}`;
    const { stdout } = await lab.host.run(
      `grep -c kvm-vcpu ${proc}/maps; ls ${proc}/fd | wc -l; ls ${proc}/task | wc -l; grep VmLck ${proc}/status`,
    );
    const [vcpus, fds, tasks, locked] = stdout
      .split("\n")
      .map((line) => Number.parseInt(line.replace(/\D+/, ""), 10));
    return { vcpus: vcpus!, fds: fds!, tasks: tasks!, lockedKiB: locked! };
  };
  const live = async (end: string) => {
    await vmm.guestSays("alive");
    vmm.process.write(end);
  };
  await live("r");
  await vmm.guestSays("alive");
  const early = await left();
  vmm.process.write("f");
  const rounds = sized(1, 9);
  for (let round = 0; round < rounds; round++) {
    await live("r");
    await live("f");
  }
  await vmm.guestSays("alive");
  const late = await left();
  assert.ok(late.vcpus <= 3, `vCPUs of earlier lives are mapped: ${late.vcpus}`);
  assert.ok(late.fds <= early.fds + 20, `open files: ${early.fds}, then ${late.fds}`);
  assert.ok(late.tasks <= early.tasks + 4, `threads: ${early.tasks}, then ${late.tasks}`);
  assert.ok(late.lockedKiB <= 2 * 4, `locked: ${late.lockedKiB} KiB`);
  vmm.process.write("x");
  const { status, stats } = await vmm.end();
  assert.is(status, 0);
  assert.equal(said(vmm), Array(1 + rounds).fill("vmm: guest: triple fault on vCPU 0: it starts anew"));
  assert.ok((stats.get("dma/released_mappings") ?? 0) >= 3 + 2 * rounds, "each life's page was taken back");
  assert.is(stats.get("dma/pinned_bytes"), 0);
  assert.is(await lab.pinnedPages(), idle);
});

lab.test("--no-reboot: a reset ends it, and so does a triple fault, which is a failure", async () => {
  assert.is((await (await start("reset", "--no-reboot")).end()).status, 0);
  const vmm = await start("fault", "--no-reboot");
  const { status, stats } = await vmm.end();
  assert.is(status, 1);
  assert.equal(said(vmm), ["vmm: guest: triple fault on vCPU 0: it ends"]);
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab.test("a guest that only ever triple-faults is given up", async () => {
  const vmm = await start("fault");
  const { status, stats } = await vmm.end();
  assert.is(status, 1);
  assert.equal(said(vmm), [
    ...Array(4).fill("vmm: guest: triple fault on vCPU 0: it starts anew"),
    "vmm: guest: triple fault on vCPU 0, the 5th in a row within 1000 ms of a start: given up; its console may say why (earlyprintk=serial on its command line)",
  ]);
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab.test("a vCPU's thread that is lost with a lock in its hands does not keep the others", async () => {
  const idle = await lab.pinnedPages();
  // What running out of memory does, at the worst moment: before it gives a lock back, for which others wait by then.
  const hook = join(lab.host.shareDir, "lose.cjs");
  writeFileSync(
    hook,
    `const { isMainThread, workerData } = require("node:worker_threads");
     const { exchange } = Atomics;
     let releases = 0;
     if (!isMainThread && workerData.index === 2) {
       Atomics.exchange = (words, at, value) => {
         if (value === 0 && ++releases === 10) {
           Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2000);
           process.exit(1);
         }
         return exchange(words, at, value);
       };
     }`,
  );
  const vmm = await RunningVmm.start(
    lab.host,
    ["--memory", "64M", "--cpus", "4", "--assign", lab.bdf, "--cmdline", "ask busy", image],
    `exec env NODE_OPTIONS=${shellQuote(`--require ${hook}`)} %s`,
  );
  await vmm.guestSays("alive");
  const { status } = await vmm.end(30_000);
  assert.is(status, 1);
  assert.equal(said(vmm), ["vmm: vCPU 2: its thread ended without a word"]);
  assert.is(await lab.pinnedPages(), idle, "the kernel undid what was mapped");
});

lab.test("what is typed reaches the guest, and Ctrl-A X leaves", async () => {
  const typed = await start("ask");
  await typed.guestSays("alive");
  typed.process.write("\x01\x01");
  assert.is(await typed.guestSays("got"), "1", "Ctrl-A twice is one for the guest");
  assert.is((await typed.end()).status, 0);

  const left = await start("ask");
  await left.guestSays("alive");
  left.process.write("\x01x");
  assert.is((await left.end(20_000)).status, 0);
  assert.not.match(left.process.stdout, /got/);
});

lab.test("a console that nobody reads does not keep SIGTERM from ending it", async () => {
  const directory = `${lab.host.shareDir}/flood`;
  const command = `exec node dist/vmm.js --memory 64M --assign ${lab.bdf} --stats-dir ${directory} --cmdline flood '${image}'`;
  const reader = await lab.host.spawn(`sh -c 'echo $$ > ${lab.host.shareDir}/pid; ${command}' | sleep 1000`);
  const writes = async () => {
    const { stdout } = await lab.host.run(`cat ${directory}/vcpus/0/exits/serial 2>/dev/null || echo 0`);
    return Number(stdout);
  };
  // Until the guest has filled the pipe, what Node buffers, and the serial port's queue, and waits.
  for (let before = -1, now = await writes(); now === 0 || now !== before; ) {
    await sleep(2000);
    before = now;
    now = await writes();
  }
  assert.ok((await writes()) > 2 ** 16, "the guest wrote more than the queue holds");
  const { status } = await lab.host.run(
    `p=$(cat ${lab.host.shareDir}/pid); kill $p; for i in $(seq 150); do kill -0 $p 2>/dev/null || exit 0; sleep 0.1; done; exit 1`,
  );
  assert.is(status, 0, "it ended within 15 s");
  reader.kill("SIGKILL");
});

lab.test("a console whose reader has gone away does not end the guest", async () => {
  const { stdout } = await lab.host.run(
    `(node dist/vmm.js --memory 64M --no-reboot --cmdline reset '${image}' < /dev/null; echo status $? >&2) 2>&1 >/dev/full | cat`,
  );
  assert.is(stdout.trim(), "status 0");
});

lab.run();
