// Guest RAM through windows: a call page may lie in any of them, and at the very end of a piece.

import { closeSync, existsSync, fstatSync, readFileSync } from "node:fs";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { gpa } from "../../hypercalls/addresses.js";
import { createRam, GuestMemory, pinsPrivatePages, ramBytes, writtenAtBoot } from "../../vmm/guest-memory.js";

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const PAGE = 4096;
const test = suite("guest memory");

// Sparse: two windows below the hole, the second of two pages, and a piece above it.
const ram = createRam([
  { gpa: 0, bytes: GiB + 2 * PAGE },
  { gpa: 4 * GiB, bytes: 2 * PAGE },
]);
const memory = new GuestMemory(ram);
const page = (seed: number) => Uint32Array.from({ length: PAGE / 4 }, (_, i) => seed * 65_536 + i);
test.after(() => closeSync(ram.fd));

test("a page is the same through copyOut, copyIn and write, wherever it lies", () => {
  const places = [0, GiB - PAGE, GiB, GiB + PAGE, 4 * GiB, 4 * GiB + PAGE];
  for (const [i, at] of places.entries()) assert.ok(memory.copyOut(gpa(at), PAGE, page(i + 1)), `gpa ${at}`);
  const other = new GuestMemory(ram);
  const got = new Uint32Array(PAGE / 4);
  for (const [i, at] of places.entries()) {
    assert.ok(other.copyIn(gpa(at), PAGE, got));
    assert.equal(got, page(i + 1), `gpa ${at}`);
  }
  other.write(GiB - 2, Uint8Array.of(1, 2, 3, 4));
  assert.ok(memory.copyIn(gpa(GiB), 4, got));
  assert.is(got[0]! & 0xffff, 0x0403, "write crosses windows");
});

test("what is not wholly RAM is refused, and nothing is copied", () => {
  const got = page(9);
  for (const at of [GiB + 2 * PAGE, GiB + PAGE + 4, 2 * GiB, 4 * GiB - PAGE, 4 * GiB + 2 * PAGE, 2 ** 53]) {
    assert.not.ok(memory.copyIn(gpa(at), PAGE, got), `gpa ${at}`);
    assert.not.ok(memory.copyOut(gpa(at), PAGE, got), `gpa ${at}`);
    assert.throws(() => memory.write(at, new Uint8Array(PAGE)), /are not guest RAM/);
  }
  assert.equal(got, page(9));
});

test("memory costs only what was touched, and nothing after clear()", () => {
  assert.is(ramBytes(ram), GiB + 4 * PAGE);
  assert.ok(fstatSync(ram.fd).blocks * 512 < 64 * PAGE, `${fstatSync(ram.fd).blocks} blocks`);
  memory.clear();
  assert.is(fstatSync(ram.fd).blocks, 0);
  const got = page(1);
  assert.ok(memory.copyIn(gpa(4 * GiB), PAGE, got));
  assert.ok(got.every((word) => word === 0));
});

const LARGE = [
  { gpa: 0, bytes: 3 * GiB },
  { gpa: 4 * GiB, bytes: GiB },
];

/** Permissions and flags of what is mapped from this address on. */
function mappingAt(address: number): { permissions: string; flags: string[] } {
  const smaps = readFileSync("/proc/self/smaps", "latin1");
  const begin = address.toString(16).padStart(8, "0");
  const found = new RegExp(`^${begin}-\\S+ (\\S+)[^]*?^VmFlags: (.*)$`, "m").exec(smaps);
  assert.ok(found, `nothing begins at ${begin}`);
  return { permissions: found![1]!, flags: found![2]!.trim().split(" ") };
}

test("all RAM is the file's on kernels that may pin the page of zeros for who will read what is written later", () => {
  for (const [kernel, pins] of [
    ["5.10.0-33-amd64", false],
    ["6.1.0-50-amd64", false],
    ["6.2.0", true],
    ["6.12.107+deb12-amd64", true],
    ["7.0.0-rc1", true],
    ["10.0", true],
    ["unheard of", false],
  ] as const)
    assert.is(pinsPrivatePages(kernel), pins, kernel);
  const all = createRam(LARGE, undefined, "6.1.0-50-amd64");
  assert.equal(all.privateRanges, []);
  new GuestMemory(all).write(5 * GiB - PAGE, Uint8Array.of(1));
  assert.is(fstatSync(all.fd).blocks * 512, PAGE);
  closeSync(all.fd);
});

test("the ends of low and of high RAM are what Linux writes first: apart from the file, and large pages if there are any", () => {
  const low = { bytes: 3 * GiB };
  const bounceBuffers = { offset: 3 * GiB - 64 * MiB, bytes: 64 * MiB };
  assert.equal(writtenAtBoot([{ bytes: 2 * GiB }]), [], "no high RAM");
  assert.equal(writtenAtBoot([low, { bytes: 13 * GiB }]), [
    bounceBuffers,
    { offset: 16 * GiB - 296 * MiB, bytes: 296 * MiB },
  ]);
  assert.equal(writtenAtBoot([low, { bytes: 5 * MiB }]), [bounceBuffers], "descriptors do not fit high RAM");
  assert.equal(writtenAtBoot([{ bytes: 64 * MiB + PAGE }, { bytes: 6 * MiB }]), [
    { offset: 2 * MiB, bytes: 62 * MiB + PAGE },
    { offset: 66 * MiB, bytes: 4 * MiB + PAGE },
  ]);
  const fitsLowAlone = [{ bytes: 3 * MiB + PAGE }, { bytes: MiB }];
  assert.equal(writtenAtBoot(fitsLowAlone), [{ offset: 0, bytes: 3 * MiB + PAGE }]);
  assert.equal(writtenAtBoot([{ bytes: MiB + PAGE }, { bytes: MiB }]), [], "no large page fits");

  const large = createRam(LARGE, undefined, "6.2.0");
  try {
    const [first, second] = large.slots;
    assert.is(first!.hva % (2 * MiB), 0);
    assert.is(second!.hva, first!.hva + 3 * GiB);
    assert.is(large.privateRanges.length, 2);
    const memory = new GuestMemory(large);
    const got = new Uint32Array(PAGE / 4);
    const isZero = (at: number) =>
      assert.ok(memory.copyIn(gpa(at), PAGE, got) && got.every((word) => word === 0), `gpa ${at}`);
    for (const [index, { offset, bytes }] of large.privateRanges.entries()) {
      const { permissions, flags } = mappingAt(first!.hva + offset);
      assert.is(permissions, "rw-p");
      assert.ok(flags.includes("dd"), "not in core dumps");
      if (existsSync("/sys/kernel/mm/transparent_hugepage"))
        assert.ok(flags.includes("hg"), "large pages are asked for");
      const begin = index === 0 ? offset : 4 * GiB + (offset - 3 * GiB);
      const end = begin + bytes;
      assert.is(end, index === 0 ? 3 * GiB : 5 * GiB);
      memory.write(begin - 4, Uint8Array.of(1, 1, 1, 1, 2, 2, 2, 2));
      assert.ok(new GuestMemory(large).copyIn(gpa(begin), 4, got));
      assert.is(got[0], 0x02020202);
      assert.ok(memory.copyOut(gpa(end - PAGE), PAGE, page(7)));
      assert.is(
        fstatSync(large.fd).blocks * 512,
        PAGE,
        "of what was written the page before it alone is the file's",
      );
      memory.clear();
      for (const at of [begin - PAGE, begin, end - PAGE]) isZero(at);
      // To read a page of the file gives it one.
      memory.clear();
    }
    // They are not neighbours: what is between them is the file's.
    memory.write(3 * GiB - 2, Uint8Array.of(1, 2));
    memory.write(4 * GiB, Uint8Array.of(3));
    assert.is(fstatSync(large.fd).blocks * 512, PAGE, "low RAM's last page is not, high RAM's first is");
  } finally {
    closeSync(large.fd);
  }
});

test.run();
