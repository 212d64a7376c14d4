// Limits and failures on demand as their users see them: options, the control socket while the guest runs, figures. The
// guest is a small one that maps and unmaps a page when it is told to.

import { setTimeout as sleep } from "node:timers/promises";
import * as assert from "uvu/assert";
import { buildTestGuest } from "../guest/build.js";
import { bindVfio } from "./host.js";
import { L1, l1Bdf } from "./l1.js";
import { LabSuite, type RunningVmm } from "./support.js";

const lab = new LabSuite("control", { edu: true }, async () => {
  if (lab.host instanceof L1) await bindVfio(lab.host, l1Bdf.edu);
  image = await buildTestGuest("asked", lab.host.shareDir);
});
let image: string;

/** A guest that has said what it was told of its devices and waits. */
async function start(...args: string[]): Promise<RunningVmm> {
  const vmm = await lab.start("--memory", "64M", ...args, image);
  await vmm.guestSays("ready");
  return vmm;
}
/** Has the guest map (a, b for the device in slot 1, 2) or unmap (A, B); what came of it. */
async function ask(vmm: RunningVmm, what: string): Promise<string> {
  vmm.process.write(what);
  return vmm.guestSays(what >= "a" ? "map" : "unmap");
}
/** The figures once they have settled: files are at most 250 ms old. */
async function settled(vmm: RunningVmm): Promise<Map<string, number>> {
  await sleep(500);
  return vmm.statistics();
}
const quit = (vmm: RunningVmm) => {
  vmm.process.write("q");
  return vmm.end();
};

lab.test("--inject: the call fails as it was to, and is counted apart from real failures", async () => {
  const vmm = await start("--inject", "map,skip=1,next=1,errno=ENOMEM", "--inject", "unmap,next=1");
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.is(await ask(vmm, "a"), "1 limit 12 retries 0");
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.is(await ask(vmm, "A"), "1 limit 28 retries 0");
  assert.is(await ask(vmm, "A"), "1 ok 0 retries 0");
  const figures = await settled(vmm);
  for (const where of ["", `devices/${lab.bdf}/`]) {
    assert.is(figures.get(`${where}hypercalls/map/calls`), 3);
    assert.is(figures.get(`${where}hypercalls/map/injected`), 1);
    assert.is(figures.get(`${where}hypercalls/map/errors`), 0);
    assert.is(figures.get(`${where}hypercalls/unmap/injected`), 1);
    assert.is(figures.get(`${where}hypercalls/unmap/errors`), 0);
    assert.is(figures.get(`${where}dma/injected`), 2);
    assert.is(figures.get(`${where}dma/limit_hits`), 0);
    assert.is(
      figures.get(`${where}dma/mapped_bytes`),
      4096,
      "the unmap that failed did nothing, the other did",
    );
  }
  assert.is(figures.get("hypercall_map"), 3);
  assert.is(figures.get("hypercall_unmap"), 2);
  assert.is((await quit(vmm)).status, 0);
});

lab.test("--tell changes what fails while the guest runs", async () => {
  const vmm = await start();
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.is(await vmm.tell("inject", "map,next=2,errno=EAGAIN"), "ok rule 1\n");
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 2", "asked again at once, and mapped");
  assert.is(await vmm.tell("inject", "map,errno=EAGAIN"), "ok rule 2\n");
  assert.is(await ask(vmm, "a"), "1 retry 11 retries 17", "after 16 tries it is given up");
  assert.is(
    await vmm.tell("inject"),
    "rule 1: map,next=2,errno=EAGAIN (matched 2, struck 2)\n" +
      "rule 2: map,every=1,errno=EAGAIN (matched 16, struck 16)\nok 2 rules\n",
  );
  assert.is(await vmm.tell("uninject", "all"), "ok 2 rules removed\n");
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 17");
  const refused = await vmm.tell("inject", "map,p=2").catch((error: Error) => error.message);
  assert.match(refused, /^exit status 1: .*\nvmm: inject map,p=2: p: not a number above 0, up to 1$/);
  assert.is(await vmm.tell("inject", "is-assigned,next=1"), "ok rule 1\n");
  vmm.process.write("?");
  assert.match(await vmm.guestSays("device 1 limit"), /^28 handle 0 /);
  assert.is((await quit(vmm)).status, 0);
});

lab.test("an injected delay takes its time, and does not keep the VMM from ending", async () => {
  const vmm = await start("--inject", "map,next=1,delay=700", "--inject", "map,skip=1,delay=10000");
  const begun = Date.now();
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.ok(Date.now() - begun >= 700, `${Date.now() - begun} ms`);
  assert.is((await settled(vmm)).get("dma/delayed"), 1);
  vmm.process.write("a");
  await sleep(1000);
  const asked = Date.now();
  vmm.process.kill("SIGTERM");
  assert.is((await vmm.end(30_000)).status, 1);
  assert.ok(Date.now() - asked < 7000, `it took ${Date.now() - asked} ms to end`);
});

lab.test("--dma-limit: the guest is told, the limit holds, and another device goes on working", async () => {
  if (!(lab.host instanceof L1)) return console.log("  skipped: a real host has one device to assign");
  const other = ["--assign", l1Bdf.edu, "--dma-limit", `8K,${lab.bdf}`, "--dma-limit", "16K"];
  const vmm = await lab.start("--memory", "64M", ...other, image);
  assert.is(await vmm.guestSays("device 1 ok"), "0 handle 1 runs 65535 bytes 8192");
  assert.is(await vmm.guestSays("device 2 ok"), "0 handle 2 runs 65535 bytes 16384");
  await vmm.guestSays("ready");
  assert.match(
    vmm.process.stderr,
    new RegExp(
      `^vmm: ${lab.bdf}: its --dma-limit is 8K, too little for most drivers to probe; raise it$`,
      "m",
    ),
  );
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.is(await ask(vmm, "a"), "1 ok 0 retries 0");
  assert.is(await ask(vmm, "a"), "1 limit 122 retries 0", "its own quota");
  assert.is(await ask(vmm, "b"), "2 ok 0 retries 0");
  assert.is(await ask(vmm, "b"), "2 ok 0 retries 0");
  assert.is(await ask(vmm, "b"), "2 limit 122 retries 0", "the quota of the VM");
  assert.is(await ask(vmm, "A"), "1 ok 0 retries 0");
  assert.is(await ask(vmm, "b"), "2 ok 0 retries 0", "what one gives back is there for the other");
  const figures = await settled(vmm);
  assert.is(figures.get("dma/limit_hits"), 2);
  assert.is(figures.get(`devices/${lab.bdf}/dma/limit_hits`), 1);
  assert.is(figures.get(`devices/${l1Bdf.edu}/dma/pinned_bytes`), 3 * 4096);
  assert.is(figures.get("dma/pinned_bytes"), 4 * 4096);
  assert.is(figures.get("dma/injected"), 0);
  assert.is((await quit(vmm)).status, 0);
});

lab.test("every figure has its file, and nothing of them is left at the end", async () => {
  const vmm = await start();
  const names = [...(await settled(vmm)).keys()];
  const calls = ["is_assigned", "map", "unmap", "map_list", "unmap_list", "release"].flatMap((call) =>
    ["calls", "errors", "injected", "pages", "ns_total", "ns_max"].map(
      (field) => `hypercalls/${call}/${field}`,
    ),
  );
  const dma =
    "pinned_bytes mapped_bytes peak_pinned_bytes quota_bytes limit_hits injected faults released_mappings"
      .split(" ")
      .map((field) => `dma/${field}`);
  const wanted = [
    ...["hypercall_map", "hypercall_unmap", "hypercall_pv_dev", ...calls, ...dma],
    ...[...calls, ...dma].map((name) => `devices/${lab.bdf}/${name}`),
    ...["hypercall", "serial", "pio", "mmio", "interrupted", "other"].map((kind) => `vcpus/0/exits/${kind}`),
  ];
  assert.equal(
    wanted.filter((name) => !names.includes(name)),
    [],
    "missing",
  );
  assert.is((await quit(vmm)).status, 0);
  const left = await lab.host.run(`ls "\${XDG_RUNTIME_DIR:-/run}/pvdma/${vmm.process.pid}"`);
  assert.is.not(left.status, 0);
});

lab.run();
