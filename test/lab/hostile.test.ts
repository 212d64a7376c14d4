// A hostile guest: a freestanding guest (test/guest/hostile.c) makes random and nearly right hypercalls from four vCPUs
// at once, for devices that do nothing, while an innocent one goes on reading and writing memory. The guest looks at
// every answer; here the VMM is watched from outside: its memory, what it pins, what it counted, its host's log.
// PVDMA_SEED repeats a run.

import * as assert from "uvu/assert";
import { CALL_NAMES } from "../../hypercalls/abi.js";
import { ERRNO } from "../../hypercalls/status.js";
import { buildTestGuest } from "../guest/build.js";
import { median } from "../median.js";
import { SOAK, sized } from "../soak.js";
import { scratchDir } from "./cache.js";
import { bindVfio, type Host, must } from "./host.js";
import { L1, l1Bdf } from "./l1.js";
import { blankDisk, LabSuite, localTest, MiB, RunningVmm } from "./support.js";

const CPUS = 4;
const seed = Number(process.env.PVDMA_SEED ?? Date.now() % 1_000_000);
/** A call in the lab takes some 100 µs of its only processor, whoever makes it. */
const stormTimeoutMs = (SOAK ? 120 : 10) * 60_000;

const files = scratchDir();
/** Where the host is an L1: another device for the attackers, and the innocent one. */
let more: { attacker: string; innocent: string } | undefined;
const lab = new LabSuite("hostile", { nvme1: blankDisk(files.path, "nvme1"), edu: true }, async () => {
  if (!(lab.host instanceof L1)) return;
  more = { attacker: l1Bdf.nvme1, innocent: l1Bdf.edu };
  for (const each of Object.values(more)) await bindVfio(lab.host, each);
});

/** The VMM's memory at one moment: kB that are locked or pinned, kB that are its own, and the calls made so far. */
interface Sample {
  lockedKiB: number;
  ownKiB: number;
  calls: number;
}

interface Storm {
  readonly host: Host;
  readonly calls: number;
  readonly memoryMiB: number;
  /** The guest's options beside seed and calls. */
  readonly guest?: string;
  readonly assign?: readonly string[];
  /** What the VMM may lock, without CAP_IPC_LOCK. */
  readonly lockableMiB?: number;
}

/**
 * Runs the guest and holds everything that can be seen of it against what must be. Returns how many answers were
 * limits, by errno.
 */
async function runStorm(storm: Storm): Promise<Map<number, number>> {
  const { host, calls, memoryMiB, guest = "", assign = [], lockableMiB } = storm;
  const image = await buildTestGuest("hostile", host.shareDir);
  const logged = assign.length > 0 ? (await host.kernelLog()).length : 0;
  const args = [
    ...["--cpus", String(CPUS), "--memory", `${memoryMiB}M`],
    ...["--kernel", image, "--cmdline", `seed=${seed} calls=${calls} ${guest}`],
    ...assign.flatMap((each) => ["--assign", each]),
  ];
  const around =
    lockableMiB && `ulimit -l ${lockableMiB * 1024}; exec setpriv --bounding-set=-ipc_lock -- %s`;
  const vmm = await RunningVmm.start(host, args, around || undefined);
  const samples: Sample[] = [];
  const sampler = await host.spawn(
    `while sleep 1; do
       echo sample $(awk '/^(VmLck|VmPin):/ { print $2 }' /proc/${vmm.process.pid}/status) \\
         $(awk '${OWN_MEMORY}' /proc/${vmm.process.pid}/smaps) \\
         $(cat ${vmm.directory}/vcpus/*/exits/hypercall)
     done`,
    {
      onOutput: (bytes) => {
        for (const [, words] of bytes.toString().matchAll(/^sample (.+)$/gm)) {
          const [locked, pinned, own, ...made] = words!.split(" ").map(Number);
          const all = made.reduce((sum, each) => sum + each, 0);
          if (made.length === CPUS) samples.push({ lockedKiB: locked! + pinned!, ownKiB: own!, calls: all });
        }
      },
    },
  );
  try {
    const result = await vmm.guestSays("storm", stormTimeoutMs);
    const output = vmm.process.stdout;
    assert.not.match(output, /^guest: (wrong|exception)/m);
    const figures = new Map(
      [...result.matchAll(/(\w+)=(\d+)/g)].map(([, name, value]) => [name!, Number(value)]),
    );
    const { wrong, made, mapped, unmapped, copies, damage } = Object.fromEntries(figures);
    assert.is(wrong, 0);
    assert.is(damage, 0, "words of the innocent device's memory that are not what they have to be");
    assert.ok(made! >= calls, `${made} calls of ${calls}`);
    assert.is(mapped, unmapped);
    if (assign.length > 0) assert.ok(mapped! > calls / 10, `only ${mapped} pages were mapped`);
    if (more !== undefined && assign.length > 0) {
      assert.ok(copies! > 16, `${copies} copies: 16 of them are before and after the storm`);
    }
    report(storm, figures, samples);
    checkMemory(samples, lockableMiB ?? memoryMiB);

    // Host and guest have counted the same, to the last call.
    const wanted = new Map([
      ...[...output.matchAll(/^count (\w+) calls=(\d+) errors=(\d+) pages=(\d+)\r?$/gm)].flatMap(
        ([, call, ...values]) =>
          ["calls", "errors", "pages"].map(
            (field, index) => [`hypercalls/${call}/${field}`, Number(values[index])] as const,
          ),
      ),
      ...[...output.matchAll(/^(status|refused) (\w+) (\d+)\r?$/gm)].map(
        ([, kind, name, value]) => [`hypercalls/${kind}/${name}`, Number(value)] as const,
      ),
      ...["mapped_bytes", "pinned_bytes", "entries", "stuck_mappings"].map(
        (name) => [`dma/${name}`, 0] as const,
      ),
    ]);
    assert.is(wanted.size, CALL_NAMES.length * 3 + 5 + 2 + 4);
    assert.equal(Object.fromEntries(await vmm.settledStatistics(wanted)), Object.fromEntries(wanted));
    assert.is(await vmm.lockedBytes(), 0, "locked after everything was unmapped");

    // The VMM ends as if nothing had been, and had nothing to say.
    vmm.goOn();
    const end = await vmm.end();
    assert.is(end.status, 0);
    for (const [name, value] of wanted) assert.is(end.stats.get(name), value, name);
    assert.equal(vmm.messages(), []);
    if (assign.length > 0) {
      const log = (await host.kernelLog()).slice(logged);
      assert.not.match(log, /DMAR:.*(fault|DMA (Read|Write))|BUG:|WARNING:|Oops|general protection/i);
    }
    return new Map(
      [...output.matchAll(/^limit (\d+) (\d+)\r?$/gm)].map(([, errno, count]) => [
        Number(errno),
        Number(count),
      ]),
    );
  } finally {
    sampler.kill("SIGKILL");
  }
}

/** Adds up, in smaps, the VMM's own memory in KiB: the ends of a guest's low and high RAM are anonymous, too, but ask for large pages. */
const OWN_MEMORY = "/^Anonymous:/ { size = $2 } /^VmFlags:/ && !/ hg/ { own += size } END { print own + 0 }";

/** One line for who reads the test's output. */
function report({ calls }: Storm, figures: ReadonlyMap<string, number>, samples: readonly Sample[]): void {
  const own = samples.map((each) => Math.round(each.ownKiB / 1024));
  const locked = samples.map((each) => each.lockedKiB);
  const shown = [...figures].map(([name, value]) => `${name} ${value}`).join(", ");
  console.log(
    `  seed ${seed}, calls ${calls}: ${shown}; own memory ${Math.min(...own)} to ${Math.max(...own)} MiB, ` +
      `at most ${Math.round(Math.max(...locked) / 1024)} MiB locked, ${samples.length} s`,
  );
}

/** After a fifth of the calls the VMM grows no more, and it never pins more than the guest has, or it may. */
function checkMemory(samples: readonly Sample[], lockableMiB: number): void {
  const last = samples.at(-1)!.calls;
  const between = (from: number, to: number) =>
    samples.filter(({ calls }) => calls >= from * last && calls <= to * last).map(({ ownKiB }) => ownKiB);
  const [warm, end] = [between(0.2, 0.4), between(0.8, 1)];
  assert.ok(warm.length > 0 && end.length > 0, `${samples.length} samples are too few`);
  assert.ok(
    median(end) <= 1.1 * median(warm),
    `own memory grew from ${median(warm)} to ${median(end)} KiB: ${samples.map((each) => each.ownKiB)}`,
  );
  const locked = Math.max(...samples.map(({ lockedKiB }) => lockedKiB));
  assert.ok(locked * 1024 <= lockableMiB * MiB, `${locked} KiB are locked, of ${lockableMiB} MiB`);
}

/**
 * A guest that is hostile to policy cached (test/guest/scribble.c): its first devices, and what is written to their table,
 * harm nobody else. `assign`: the VMM's devices, the last of them an edu that is innocent and not cached.
 */
async function attackTable(
  host: Host,
  { assign, args, calls, around }: { assign: string[]; args: string[]; calls: number; around?: string },
): Promise<void> {
  const image = await buildTestGuest("scribble", host.shareDir);
  const devices = assign.flatMap((each) => ["--assign", each]);
  const cmdline = `seed=${seed} calls=${calls}`;
  const vmm = await RunningVmm.start(
    host,
    ["--cpus", String(CPUS), ...devices, ...args, "--cmdline", cmdline, "--kernel", image],
    around,
  );
  const found = await vmm.guestSaysLate("scribble", stormTimeoutMs);
  const [, made, ok, copies, wrong] = found.split(/[a-z ]+/).map(Number);
  const none = ["mapped_bytes", "pinned_bytes", "entries", "stuck_mappings"].map(
    (name) => [`dma/${name}`, 0] as const,
  );
  const settled = await vmm.settledStatistics(new Map(none));
  const locked = await vmm.lockedBytes();
  vmm.goOn();
  const { status, stats } = await vmm.end();
  console.log(
    `  seed ${seed}: ${made} calls, ${ok} of them ok, ${copies} copies of the innocent device; ` +
      `${stats.get("dma/evicted")} granules reclaimed, ${stats.get("dma/limit_hits")} limits, ` +
      `${stats.get("dma/faults")} refused accesses`,
  );
  assert.is(wrong, 0, "words of the innocent device's memory, or answers, that cannot be");
  assert.ok(made! > calls * 0.99 && ok! > calls / 10 && copies! > 0);
  assert.equal(Object.fromEntries(settled), Object.fromEntries(none));
  assert.is(locked, 0, "locked after everything was unmapped");
  assert.is(status, 0);
  assert.ok(stats.get("dma/evicted")! > 0, "there was something to reclaim");
}

localTest(
  "hostile, this machine",
  "a guest that is hostile to policy cached and its table, emulated devices",
  (host) => {
    const cached = "emul:edu,dma=cached,dma_mask=0xffffffff";
    const limits = ["--dma-limit", "1M", "--dma-granule", "16K", "--dma-idle", "1"];
    return attackTable(host, {
      assign: [cached, cached, "emul:edu,dma=strict"],
      args: ["--memory", "64M", ...limits],
      // Not more than in the lab: a KVM that emulates its guest's instructions one by one makes some hundred a second.
      calls: sized(4_000, 500_000),
    });
  },
);

localTest("hostile, this machine", "a hostile guest without a device", async (host) => {
  await runStorm({ host, calls: sized(8000, 100_000), memoryMiB: 64 });
});

/** RAM on both sides of the hole below 4 GiB. */
const memoryMiB = 3200;

lab.test("a hostile guest, all devices in one domain", async () => {
  await runStorm({
    host: lab.host,
    memoryMiB,
    calls: sized(20_000, 5_000_000),
    assign: [lab.bdf, ...(more ? [more.attacker, more.innocent] : [])],
  });
});

lab.test("a hostile guest, the innocent device apart, the host short of mappings and memory", async () => {
  // A container has the limit of the moment at which it was opened. A real host's is not ours to change.
  const limit = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
  if (lab.host instanceof L1) await must(lab.host, `echo 200 > ${limit}`);
  const limits = await runStorm({
    host: lab.host,
    memoryMiB,
    lockableMiB: 4,
    calls: sized(10_000, 1_000_000),
    guest: "own-domain limits",
    assign: [lab.bdf, ...(more ? [more.attacker, `${more.innocent},domain=own`] : [])],
  });
  assert.ok((limits.get(ERRNO.ENOMEM) ?? 0) > 0, "the host had memory enough");
  if (lab.host instanceof L1) assert.ok((limits.get(ERRNO.ENOSPC) ?? 0) > 0, "the host had mappings enough");
});

lab.test("a guest that is hostile to policy cached and its table", async () => {
  if (more === undefined) return; // it takes a device that is innocent
  await attackTable(lab.host, {
    assign: [`${lab.bdf},dma=cached`, `${more.attacker},dma=cached`, `${more.innocent},dma=strict`],
    args: ["--memory", "64M", "--dma-granule", "16K", "--dma-idle", "1"],
    calls: sized(5_000, 500_000),
    around: "ulimit -l 1024; exec setpriv --bounding-set=-ipc_lock -- %s",
  });
  assert.not.match(await lab.host.kernelLog(), /BUG:|WARNING:|Oops|general protection/i);
});

lab.run();
