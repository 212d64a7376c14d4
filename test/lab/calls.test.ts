// Malformed hypercalls: a freestanding guest (test/guest/calls.c) makes every mistake the contract knows, with good
// calls between, on a machine without an assigned device and on one with two. Each call's answer is compared with
// the table below, and so is what the VMM counted: a mistake gets its status and changes nothing.

import * as assert from "uvu/assert";
import { ERRNO } from "../../hypercalls/status.js";
import { buildTestGuest } from "../guest/build.js";
import { scratchDir } from "./cache.js";
import { bindVfio, type Host } from "./host.js";
import { l1Bdf } from "./l1.js";
import { blankDisk, LabSuite, localTest, RunningVmm, readStats } from "./support.js";

const guestTimeoutMs = 120_000;

/** What the machine is like: assigned devices, and whether it has RAM above 4 GiB. */
interface Shape {
  /** Host addresses. */
  devices: readonly string[];
  high: boolean;
}

interface Case {
  name: string;
  call: string;
  status: string;
  errno: keyof typeof ERRNO | "0";
  /** Results as the guest prints them, a pattern: ~ is any hexadecimal digits. */
  results: string;
}

// NAME CALL STATUS ERRNO RESULTS. A line that begins with = is the same without a device; without one, the others
// are ENODEV. A line that begins with ^ is only there with RAM above 4 GiB, one with 1 or 2 only with so many devices.

const innocents = `
  innocent:page map ok 0 rdi=~123 pages=1
  innocent:pages map ok 0 rdi=~ff0 pages=5
  innocent:twin map ok 0 rdi=~123 pages=1
  innocent:aligned map ok 0 rdi=~[048c]000 pages=3
  innocent:narrow map ok 0 rdi=0x[0-9a-f]{6,7} pages=1
  innocent:last-byte map ok 0 rdi=~fff pages=1
^ innocent:high-first map ok 0 rdi=~000 pages=1
^ innocent:high-last map ok 0 rdi=~800 pages=1
  innocent:scattered map_list ok 0 rdi=~000 pages=4
  innocent:full map_list ok 0 rdi=~000 pages=256
  innocent:contiguous map_list ok 0 rdi=~000 pages=4
  innocent:twice map_list ok 0 rdi=~000 pages=2`;

const offer = "rdi=0x10002 rsi=0x7 r8=~[13579bdf]000 r9=0x0";
const probes = `
= probe:plain probe ok 0 ${offer} r10=0x0
= probe:ranges probe ok 0 ${offer} r10=0x[1-9]
= probe:rax-above-32-bits probe ok 0 ${offer} r10=0x0
= probe:nearly-the-result probe ok 0 ${offer} r10=0x0
= probe-page:byte-1 probe invalid EINVAL
= probe-page:2^53 probe invalid EFAULT
= probe-page:2^63 probe invalid EFAULT
= probe-page:2^64-4096 probe invalid EFAULT
= probe-page:2^64-1 probe invalid EFAULT
= probe-page:unaligned probe invalid EINVAL
= probe-page:end-of-ram probe invalid EFAULT
= probe-page:hole probe invalid EFAULT`;

const assignments = ["2^16", "2^32-1", "2^53", "2^64-1", "above-32-bits", "other-function"].map(
  (name) => `= is_assigned:${name} is_assigned ok 0 rdi=0x0 rsi=0x0 r8=0x0 r9=0x0 r10=0x0`,
);

const unknownCalls = ["0", "9", "99", "2^8+4", "2^16+4", "2^31+4", "2^32-1"].map(
  (number) => `= unknown:${number} unknown invalid ENOSYS`,
);

const handles = ["0", "next", "33", "2^31+1", "2^32", "2^32+1", "2^53+1", "2^63", "2^63+1", "2^64-1"].map(
  (handle) => `
  map-handle:${handle} map invalid ENODEV
  unmap-handle:${handle} unmap invalid ENODEV
  map_list-handle:${handle} map_list invalid ENODEV rsi=0x0
  unmap_list-handle:${handle} unmap_list invalid ENODEV rsi=0x0
  release-handle:${handle} release invalid ENODEV
  table-handle:${handle} table invalid ENODEV`,
);
const otherDevice = `
2 unmap-handle:other-device unmap invalid ESTALE
2 unmap_list-handle:other-device unmap_list invalid ESTALE rsi=0x0`;

const maps = `
  map:end-of-ram map invalid EFAULT
  map:last-byte-and-next map invalid EFAULT
  map:last-page-and-next map invalid EFAULT
  map:last-pages-in-offset map invalid EFAULT
  map:pci-window map invalid EFAULT
  map:ecam map invalid EFAULT
  map:local-apic map invalid EFAULT
  map:below-4GiB map invalid EFAULT
^ map:high-end map invalid EFAULT
^ map:high-last-and-next map invalid EFAULT
  map:gpa-2^44 map invalid EFAULT
  map:gpa-2^44+scratch map invalid EFAULT
  map:gpa-2^53-1 map invalid EFAULT
  map:gpa-2^53+scratch map invalid EFAULT
  map:gpa-2^63+scratch map invalid EFAULT
  map:gpa-2^64-1 map invalid EFAULT
  map:gpa-wraps-to-0 map invalid EFAULT
  map:bytes-0 map invalid EINVAL
  map:bytes-1GiB+1 map invalid E2BIG
  map:pages-1GiB+1 map invalid E2BIG
  map:bytes-2^32 map invalid E2BIG
  map:bytes-2^32+4096 map invalid E2BIG
  map:bytes-2^63 map invalid E2BIG
  map:bytes-wrap map invalid E2BIG
  map:bytes-2^64-1 map invalid E2BIG
  map:iova-max-0 map limit ERANGE
  map:iova-max-4094 map limit ERANGE
  map:iova-max-1MiB map limit ERANGE
= map-flags:0 map invalid EINVAL
= map-flags:align-only map invalid EINVAL
= map-flags:counted map invalid EINVAL
  map-flags:3+counted map invalid EINVAL
= map-flags:3+16 map invalid EINVAL
= map-flags:3+2^31 map invalid EINVAL
= map-flags:3+2^32 map invalid EINVAL
= map-flags:3+2^63 map invalid EINVAL
= map-flags:2^64-1 map invalid EINVAL`;

const unmaps = `
  unmap:never-0 unmap invalid ESTALE
  unmap:never-4096 unmap invalid ESTALE
  unmap:never-2^44 unmap invalid ESTALE
  unmap:never-2^44+innocent unmap invalid ESTALE
  unmap:never-2^53+innocent unmap invalid ESTALE
  unmap:never-2^63+innocent unmap invalid ESTALE
  unmap:never-2^64-1 unmap invalid ESTALE
  unmap:wraps-to-0 unmap invalid ESTALE
  unmap:bytes-0 unmap invalid EINVAL
  unmap:bytes-1GiB+1 unmap invalid E2BIG
  unmap:bytes-2^32+right unmap invalid E2BIG
  unmap:bytes-wrap unmap invalid E2BIG
  unmap:bytes-2^64-1 unmap invalid E2BIG
  unmap:one-page-short unmap invalid EINVAL
  unmap:one-page-long unmap invalid EINVAL
  unmap:from-the-second unmap invalid ESTALE
  unmap:second-page unmap invalid ESTALE
  unmap:last-page unmap invalid ESTALE
  unmap:first-of-list unmap invalid EINVAL
  unmap:second-of-list unmap invalid ESTALE
  map:for-twice map ok 0 rdi=~000 pages=1
  unmap:once unmap ok 0 rdi=0x1000 pages=1
  unmap:twice unmap invalid ESTALE`;

const listArguments = [
  ["count:0", "EINVAL"],
  ["count:257", "E2BIG"],
  ["count:2^32", "E2BIG"],
  ["count:2^32+5", "E2BIG"],
  ["count:2^53+5", "E2BIG"],
  ["count:2^64-1", "E2BIG"],
  ["page:unaligned", "EINVAL"],
  ["page:end-of-ram", "EFAULT"],
  ["page:hole", "EFAULT"],
  ["page:2^53+page", "EFAULT"],
  ["page:2^64-4096", "EFAULT"],
  ["page:2^64-1", "EFAULT"],
].map(
  ([name, errno]) => `
= map_list-${name} map_list invalid ${errno} rsi=0x0
= unmap_list-${name} unmap_list invalid ${errno} rsi=0x0`,
);

const mapLists = `
  map_list-entry:first map_list invalid EFAULT rsi=0x0
  map_list-entry:middle map_list invalid EFAULT rsi=0x2
  map_list-entry:last map_list invalid EFAULT rsi=0x4
  map_list-entry:hole map_list invalid EFAULT rsi=0x2
  map_list-entry:crossing map_list invalid EFAULT rsi=0x2
  map_list-entry:gpa-2^63 map_list invalid EFAULT rsi=0x2
  map_list-entry:gpa-2^64-1 map_list invalid EFAULT rsi=0x2
  map_list-entry:bytes-0 map_list invalid EINVAL rsi=0x2
  map_list-entry:bytes-2^32+4096 map_list invalid E2BIG rsi=0x2
  map_list-entry:bytes-wrap map_list invalid E2BIG rsi=0x2
  map_list-entry:bytes-2^64-1 map_list invalid E2BIG rsi=0x2
= map_list:flags-0 map_list invalid EINVAL rsi=0x0
= map_list:flags-3+2^32 map_list invalid EINVAL rsi=0x0
  map_list:iova-max-1MiB map_list limit ERANGE rsi=0x0
  map_list:pages-in-all map_list invalid E2BIG rsi=0x10
  map_list:good map_list ok 0 rdi=~000 rsi=0x5 pages=5
  unmap:of-list unmap ok 0 rdi=0x5000 pages=5`;

const unmapLists = `
  map:for-list-a map ok 0 rdi=~000 pages=1
  map:for-list-b map ok 0 rdi=~000 pages=1
  map:for-list-c map ok 0 rdi=~000 pages=1
  unmap_list:first-never-mapped unmap_list invalid ESTALE rsi=0x0
  unmap_list:middle-never-mapped unmap_list invalid ESTALE rsi=0x1 pages=1
  unmap:done-by-list unmap invalid ESTALE
  unmap_list:last-wrong-size unmap_list invalid EINVAL rsi=0x1 pages=1
  unmap_list:one-twice unmap_list invalid ESTALE rsi=0x1 pages=1
  unmap_list:bytes-0 unmap_list invalid EINVAL rsi=0x0
  unmap_list:bytes-2^64-1 unmap_list invalid E2BIG rsi=0x0
  unmap_list:in-a-mapping unmap_list invalid ESTALE rsi=0x0`;

const tables = `
1 table:strict table ok 0 rdi=0x0 rsi=0x0
1 table:anew table ok 0 rdi=0x0 rsi=0x0
1 table:2 table invalid EINVAL
1 table:2^53+1 table invalid EINVAL`;

const releases = `
2 release:nothing release ok 0 rdi=0x0 rsi=0x0
2 map:for-release map ok 0 rdi=~123 pages=2
2 map_list:for-release map_list ok 0 rdi=~000 rsi=0x5 pages=5
2 release:two release ok 0 rdi=0x2 rsi=0x7000 pages=7
2 release:twice release ok 0 rdi=0x0 rsi=0x0
2 unmap:released unmap invalid ESTALE`;

const noCalls = [
  ...["out-16-bit", "out-8-bit", "in-32-bit", "port-3", "port-1", "port+1", "port+4"],
  ...["outs-of-call", "rep-outs-of-call", "outs-beside-call"],
].map((name) => `= no-call:${name} none - 0`);

const fromCpl3 = `
= cpl3:probe probe invalid EPERM
= cpl3:is_assigned is_assigned invalid EPERM
= cpl3:map map invalid EPERM
= cpl3:unmap unmap invalid EPERM
= cpl3:map_list map_list invalid EPERM rsi=0x0
= cpl3:unmap_list unmap_list invalid EPERM rsi=0x0
= cpl3:release release invalid EPERM
= cpl3:99 unknown invalid EPERM
= no-call:cpl3-out-16-bit none - 0`;

const theEnd = `
1 innocent:three unmap_list ok 0 failed=0x0 pages=7
  innocent:aligned unmap ok 0 iova=~ pages=3
  innocent:narrow unmap ok 0 iova=~ pages=1
  innocent:last-byte unmap ok 0 iova=~ pages=1
^ innocent:high-first unmap ok 0 iova=~ pages=1
^ innocent:high-last unmap ok 0 iova=~ pages=1
  innocent:scattered unmap ok 0 iova=~ pages=4
  innocent:full unmap ok 0 iova=~ pages=256
  innocent:contiguous unmap ok 0 iova=~ pages=4
  innocent:twice unmap ok 0 iova=~ pages=2
  unmap:page unmap invalid ESTALE
  unmap:pages unmap invalid ESTALE
  unmap:twin unmap invalid ESTALE
  release:nothing-left release ok 0 rdi=0x0 rsi=0x0`;

/** What the innocent mappings come to. Pages that are mapped twice: twin is page again, twice is one page. */
function innocentTotals({ devices, high }: Shape): { pages: number; pinnedPages: number; entries: number } {
  if (devices.length === 0) return { pages: 0, pinnedPages: 0, entries: 0 };
  const more = high ? 2 : 0;
  return { pages: 278 + more, pinnedPages: 276 + more, entries: 6 + 3 + 256 + 1 + 2 + more };
}

/** The table for a machine: everything before the innocent mappings are undone, and after. */
function expectedCases(shape: Shape): { before: Case[]; after: Case[] } {
  const before = [
    ...[innocents, probes, ...assignments, ...unknownCalls, ...handles, otherDevice, maps, unmaps],
    ...[...listArguments, mapLists, unmapLists, tables, releases, ...noCalls, fromCpl3],
  ];
  return { before: parseTable(before.join("\n"), shape), after: parseTable(theEnd, shape) };
}

function parseTable(table: string, { devices, high }: Shape): Case[] {
  return table.split("\n").flatMap((line) => {
    const match = /^([ =^12]) (\S+) (\S+) (\S+) (\S+) ?(.*)$/.exec(line);
    if (match === null) return [];
    const [, mark, name, call, status, errno, results] = match as unknown as [string, ...string[]];
    if ((mark === "^" && !high) || Number(mark) > devices.length) return [];
    if (devices.length > 0 || mark === "=") {
      return [{ name, call, status, errno: errno as Case["errno"], results } as Case];
    }
    const entriesDone = /_list$/.test(call!) && !name!.startsWith("innocent:");
    return [
      { name, call, status: "invalid", errno: "ENODEV", results: entriesDone ? "rsi=0x0" : "" } as Case,
    ];
  });
}

/** The line of a case, as the guest has to print it; `printed` stands in for results that match the pattern. */
function lineOf(wanted: Case, printed: string | undefined): string {
  const number = wanted.errno === "0" ? 0 : ERRNO[wanted.errno];
  const verdict = wanted.name.startsWith("innocent:") ? "core" : "kept";
  const start = `case ${wanted.name} ${wanted.call} ${wanted.status} ${number}`;
  const end = wanted.results === "" ? ` ${verdict}` : ` ${wanted.results} ${verdict}`;
  if (printed?.startsWith(start)) {
    const pattern = new RegExp(`^${end.replaceAll("~", "0x[0-9a-f]*")}$`);
    if (pattern.test(printed.slice(start.length))) return printed;
  }
  return start + end;
}

/** What the VMM must have counted when these calls, and `found` calls of is_assigned, were all. */
function expectedCounters(cases: readonly Case[], found: number): Map<string, number> {
  const counters = new Map<string, number>();
  const add = (name: string, more: number) => counters.set(name, (counters.get(name) ?? 0) + more);
  for (const call of ["probe", "is_assigned", "map", "unmap", "map_list", "unmap_list", "release", "table"]) {
    for (const field of ["calls", "errors", "pages"]) add(`hypercalls/${call}/${field}`, 0);
  }
  for (const status of ["ok", "retry", "limit", "invalid", "gone"]) add(`hypercalls/status/${status}`, 0);
  add("hypercalls/is_assigned/calls", found);
  add("hypercalls/status/ok", found);
  add("hypercalls/refused/cpl", 0);
  add("hypercalls/refused/unknown", 0);
  for (const { call, status, errno, results } of cases) {
    if (call === "none") continue;
    if (errno === "EPERM") add("hypercalls/refused/cpl", 1);
    else if (errno === "ENOSYS") add("hypercalls/refused/unknown", 1);
    else {
      add(`hypercalls/${call}/calls`, 1);
      add(`hypercalls/${call}/errors`, status === "ok" ? 0 : 1);
      add(`hypercalls/${call}/pages`, Number(/pages=(\d+)/.exec(results)?.[1] ?? 0));
      add(`hypercalls/status/${status}`, 1);
    }
  }
  return counters;
}

/** Boots the guest and holds every line of it, and what the VMM counted, against the table. */
async function runCalls(host: Host, image: string, options: string[], shape: Shape): Promise<void> {
  const args = ["--kernel", image, "--cmdline", "pause", ...options];
  const vmm = await RunningVmm.start(host, args);
  const child = vmm.process;
  const { before, after } = expectedCases(shape);
  const { pages, pinnedPages, entries } = innocentTotals(shape);
  const linesOf = (text: string) => [...text.matchAll(/^case .*$/gm)].map(([line]) => line.trimEnd());
  const compare = (cases: readonly Case[]) => {
    const lines = linesOf(child.stdout);
    const wanted = cases.map((each, index) => lineOf(each, lines[index]));
    // Only what differs: the table is long.
    const wrong = [...wanted.keys()].filter((index) => lines[index] !== wanted[index]);
    const at = (all: readonly string[]) => wrong.map((index) => all[index]);
    assert.equal(at(lines), at(wanted));
    assert.is(lines.length, cases.length, `${lines.length} cases`);
  };

  // All mistakes are made, and only the innocent mappings are there.
  await child.waitFor(/^pause innocents\r?$/m, guestTimeoutMs);
  compare(before);
  const assigned = [...child.stdout.matchAll(/^device slot=\d+ handle=(\d+) policy=(\w+) identity=(\d)/gm)];
  const devices = assigned.filter(([, handle]) => handle !== "0");
  assert.equal(
    devices.map((match) => match.slice(1)),
    shape.devices.map((_, index) => [String(index + 1), "strict", "0"]),
  );
  checkApart(child.stdout);
  const during = new Map([
    ...expectedCounters(before, assigned.length),
    ["dma/mapped_bytes", pages * 4096],
    ["dma/pinned_bytes", pinnedPages * 4096],
    ["dma/entries", entries],
    ["dma/stuck_mappings", 0],
    // The innocents are the first device's.
    ...shape.devices.map(
      (bdf, i) => [`devices/${bdf}/dma/mapped_bytes`, i === 0 ? pages * 4096 : 0] as const,
    ),
  ]);
  assert.equal(Object.fromEntries(await vmm.settledStatistics(during)), Object.fromEntries(during));

  // The innocent mappings go, each exactly once.
  child.write("\n");
  await child.waitFor(/^pause end\r?$/m, guestTimeoutMs);
  compare([...before, ...after]);
  assert.match(child.stdout, `core outstanding=0 mapped=${pages} unmapped=${pages}`);
  const atEnd = new Map([
    ...expectedCounters([...before, ...after], assigned.length),
    ["dma/mapped_bytes", 0],
    ["dma/pinned_bytes", 0],
    ["dma/entries", 0],
    ["dma/stuck_mappings", 0],
  ]);
  assert.equal(Object.fromEntries(await vmm.settledStatistics(atEnd)), Object.fromEntries(atEnd));

  // The VMM ends as if nothing had been, and says the same with --stats.
  child.write("\n");
  assert.is(await child.exited, 0, child.stderr);
  assert.match(child.stdout, /^guest: end\r?$/m);
  const printed = readStats(child.stderr);
  for (const [name, value] of atEnd) assert.is(printed.get(name), value, name);
  assert.equal(vmm.messages(), []);
}

/** No two innocent mappings share a bus address. */
function checkApart(output: string): void {
  const ranges = [...output.matchAll(/^case innocent:(\S+) map\S* ok 0 rdi=(0x\w+) pages=(\d+) /gm)]
    .map(([, name, iova, pages]) => {
      const first = Math.floor(Number(iova) / 4096);
      return { name, first, end: first + Number(pages) };
    })
    .sort((a, b) => a.first - b.first);
  for (const [index, { name, first }] of ranges.entries()) {
    const previous = ranges[index - 1];
    if (previous !== undefined) assert.ok(previous.end <= first, `${previous.name} and ${name} overlap`);
  }
}

localTest("calls, this machine", "malformed hypercalls, no device", async (host) => {
  const image = await buildTestGuest("calls", host.shareDir);
  await runCalls(host, image, ["--memory", "64M"], { devices: [], high: false });
});

const files = scratchDir();
const lab = new LabSuite("calls", { nvme1: blankDisk(files.path, "nvme1") });

lab.test("malformed hypercalls, assigned devices, RAM on both sides of the hole", async () => {
  const { host, bdf } = lab;
  const bdfs = [bdf];
  if (host.kind === "l1") {
    await bindVfio(host, l1Bdf.nvme1);
    bdfs.push(l1Bdf.nvme1);
  }
  const image = await buildTestGuest("calls", host.shareDir);
  const assign = bdfs.flatMap((each) => ["--assign", each]);
  await runCalls(host, image, ["--memory", "4G", ...assign], { devices: bdfs, high: true });
});

lab.run();
