// How a VMM's life can end, and begin again: reboots, triple fault, signals, Ctrl-A X, a console nobody reads. Whatever
// happens, nothing stays pinned, nothing of an earlier life is left, and the wish to end is obeyed.

import { setTimeout as sleep } from "node:timers/promises";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { buildTestGuest } from "../guest/build.js";
import { scratchDir } from "./cache.js";
import type { Host } from "./host.js";
import { openHost } from "./open.js";
import { labTest, MiB, RunningVmm, randomDisk } from "./support.js";

const test = suite("life");
const files = scratchDir();
let host: Host;
let bdf: string;
let image: string;

test.before(async () => {
  const disk = randomDisk(files.path, "disk.raw", MiB);
  ({ host, bdf } = await openHost({ nvme0: { file: disk }, name: "life" }));
  image = await buildTestGuest("life", host.shareDir);
});
test.after(async () => {
  await host?.close();
  files.remove();
});
const lab = (name: string, body: () => Promise<void>) => labTest(test, name, () => host, body);
const start = (how: string, ...args: string[]) =>
  RunningVmm.start(host, ["--memory", "64M", "--assign", bdf, "--cmdline", how, ...args, image]);

lab("power-off: exit status 0, and the page the guest left mapped is not pinned", async () => {
  const { status, stats } = await (await start("off")).end();
  assert.is(status, 0);
  assert.is(stats.get("hypercalls/map/calls"), 1);
  assert.is(stats.get("dma/peak_pinned_bytes"), 4096);
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab("a guest that reboots for ever leaves nothing of its lives behind, and SIGTERM ends it", async () => {
  const vmm = await start("reset", "--cpus", "2");
  const left = async () => {
    const proc = `/proc/${vmm.process.pid}`;
    const { stdout } = await host.run(
      `grep -c kvm-vcpu ${proc}/maps; ls ${proc}/fd | wc -l; ls ${proc}/task | wc -l; grep VmLck ${proc}/status`,
    );
    const [vcpus, fds, tasks, locked] = stdout
      .split("\n")
      .map((line) => Number.parseInt(line.replace(/\D+/, ""), 10));
    return { vcpus: vcpus!, fds: fds!, tasks: tasks!, lockedKiB: locked! };
  };
  for (let life = 0; life < 3; life++) await vmm.guestSays("alive");
  const early = await left();
  for (let life = 0; life < 10; life++) {
    await vmm.guestSays("mapped");
    await vmm.guestSays("alive");
  }
  const late = await left();
  assert.ok(late.vcpus <= 2, `vCPUs of earlier lives are mapped: ${late.vcpus}`);
  assert.ok(late.fds <= early.fds + 20, `open files: ${early.fds}, then ${late.fds}`);
  assert.ok(late.tasks <= early.tasks + 4, `threads: ${early.tasks}, then ${late.tasks}`);
  assert.ok(late.lockedKiB <= 4, `locked: ${late.lockedKiB} KiB`);
  vmm.process.kill("SIGTERM");
  const { status, stats } = await vmm.end(20_000);
  assert.is(status, 1);
  assert.match(vmm.process.stderr, /^vmm: ended by SIGTERM$/m);
  assert.ok((stats.get("hypercalls/map/calls") ?? 0) >= 12, "calls are counted over reboots");
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab("--no-reboot: a reset ends it", async () => {
  assert.is((await (await start("reset", "--no-reboot")).end()).status, 0);
});

lab("a triple fault is reported as such", async () => {
  const vmm = await start("fault");
  const { status, stats } = await vmm.end();
  assert.is(status, 1);
  assert.match(
    vmm.process.stderr,
    /^vmm: guest: triple fault on vCPU 0: it cannot go on, and may have said why on its console$/m,
  );
  assert.is(stats.get("dma/pinned_bytes"), 0);
});

lab("what is typed reaches the guest, and Ctrl-A X leaves", async () => {
  const typed = await start("wait");
  await typed.guestSays("alive");
  typed.process.write("\x01\x01");
  assert.is(await typed.guestSays("got"), "1", "Ctrl-A twice is one for the guest");
  assert.is((await typed.end()).status, 0);

  const left = await start("wait");
  await left.guestSays("alive");
  left.process.write("\x01x");
  assert.is((await left.end(20_000)).status, 0);
  assert.not.match(left.process.stdout, /got/);
});

lab("a console that nobody reads does not keep SIGTERM from ending it", async () => {
  const directory = `${host.shareDir}/flood`;
  const command = `exec node dist/vmm.js --memory 64M --assign ${bdf} --stats-dir ${directory} --cmdline flood '${image}'`;
  const reader = await host.spawn(`sh -c 'echo $$ > ${host.shareDir}/pid; ${command}' | sleep 1000`);
  const writes = async () => {
    const { stdout } = await host.run(`cat ${directory}/vcpus/0/exits/serial 2>/dev/null || echo 0`);
    return Number(stdout);
  };
  // Until the guest has filled the pipe, what Node buffers, and the serial port's queue, and waits.
  for (let before = -1, now = await writes(); now === 0 || now !== before; ) {
    await sleep(2000);
    before = now;
    now = await writes();
  }
  assert.ok((await writes()) > 2 ** 16, "the guest wrote more than the queue holds");
  const { status } = await host.run(
    `p=$(cat ${host.shareDir}/pid); kill $p; for i in $(seq 150); do kill -0 $p 2>/dev/null || exit 0; sleep 0.1; done; exit 1`,
  );
  assert.is(status, 0, "it ended within 15 s");
  reader.kill("SIGKILL");
});

lab("a console whose reader has gone away does not end the guest", async () => {
  const { stdout } = await host.run(
    `(node dist/vmm.js --memory 64M --no-reboot --cmdline reset '${image}' < /dev/null; echo status $? >&2) 2>&1 >/dev/full | cat`,
  );
  assert.is(stdout.trim(), "status 0");
});

test.run();
