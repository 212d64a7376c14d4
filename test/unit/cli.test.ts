// The command as users run it: what is wrong is said in one line, with exit status 2 for the command line and 1 for
// everything else. Only mistakes that are found before /dev/kvm is touched; the others are in lab/errors.test.ts.

import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { suite } from "uvu";
import * as assert from "uvu/assert";
import { parseInjectSpec } from "../../vmm/inject-spec.js";
import { RAISE, smallRoom } from "../../vmm/limits.js";
import { parseCommandLine } from "../../vmm/options.js";
import { repoRoot } from "../lab/cache.js";

const test = suite("command line");
const directory = mkdtempSync(join(tmpdir(), "pvdma-cli-"));
test.after(() => rmSync(directory, { recursive: true }));

function vmm(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, [join(repoRoot, "dist/vmm.js"), ...args], {
    cwd: directory,
    encoding: "utf8",
    timeout: 30_000,
  });
  return { status, stdout, stderr };
}

/** The smallest thing that looks like a bzImage: a boot sector, one setup sector, `payloadBytes` of payload. */
function bzImage(payloadBytes: number, loadFlags = 1): Buffer {
  const image = Buffer.alloc(1024 + payloadBytes);
  image[0x1f1] = 1;
  image.set([0xeb, 0x66], 0x200); // the jump over the setup header, which says where it ends
  image.writeUInt32LE(Math.ceil(payloadBytes / 16), 0x1f4);
  image.writeUInt16LE(0xaa55, 0x1fe);
  image.write("HdrS", 0x202, "latin1");
  image.writeUInt16LE(0x20f, 0x206);
  image[0x211] = 1;
  image.writeUInt32LE(0x7fffffff, 0x22c);
  image.writeUInt32LE(0x200000, 0x230);
  image[0x234] = 1;
  image.writeUInt16LE(loadFlags, 0x236);
  image.writeUInt32LE(255, 0x238);
  image.writeUInt32LE(0x1000000, 0x258);
  image.writeUInt32LE(payloadBytes, 0x260);
  return image;
}

function file(name: string, content: string | Buffer): string {
  writeFileSync(join(directory, name), content);
  return name;
}

const usage: readonly (readonly [args: string[], message: string])[] = [
  [[], "nothing to run; give an image or --kernel, see --help"],
  [["a", "b"], "b: only one image can be given, and a already is; see --help"],
  [["--bogus", "a"], "Unknown option '--bogus'; see --help"],
  [["--cpus", "0", "a"], "--cpus 0: not a whole number from 1 to 16"],
  [["--cpus", "17", "a"], "--cpus 17: not a whole number from 1 to 16"],
  [["--memory", "12X", "a"], "--memory 12X: not a size; give a number with K, M, G or T, such as 512M"],
  [["--memory", "4M", "a"], "--memory 4M: too small; a guest needs at least 16M"],
  [["--memory", "8T", "a"], "--memory 8T: too large; it has to be less than 8T"],
  [["--memory", "20000K", "a"], "--memory 20000K: not a whole number of MiB"],
  [["--dma", "open", "a"], "--dma open: not a policy; there are cached, lazy, strict and pinned"],
  [["--dma-granule", "2K", "a"], "--dma-granule 2K: 4K to 2M are possible"],
  [["--dma-granule", "4M", "a"], "--dma-granule 4M: 4K to 2M are possible"],
  [["--dma-granule", "12K", "a"], "--dma-granule 12K: not a power of two"],
  [["--hugepages", "1G", "a"], "--hugepages 1G: not a kind; there are hugetlb and thp"],
  [
    ["--hugepages", "hugetlb", "--memory", "129M", "a"],
    "--memory 129M: not a multiple of 2M, as --hugepages hugetlb needs",
  ],
  [["--dma-idle", "86401", "a"], "--dma-idle 86401: not a whole number from 0 to 86400"],
  [
    ["--dma", "cached", "--assign", "02:00.0", "--dma-limit", "32K", "a"],
    "--dma-limit 32K: too small for 0000:02:00.0, whose policy cached maps 64K at a time; raise it or lower --dma-granule",
  ],
  [["--assign", "", "a"], "--assign : names no device; give a BDF such as 0000:02:00.0, or emul:edu"],
  [
    ["--assign", "somewhere", "a"],
    '"somewhere" is no PCI address; it looks like 0000:02:00.0 or 02:00.0 (see lspci -D)',
  ],
  [["--assign", "02:00.0,guest", "a"], "--assign 02:00.0,guest: guest is not KEY=VALUE; see --help"],
  [["--assign", "02:00.0,guest=0", "a"], "--assign 02:00.0,guest=0: guest: not a whole number from 1 to 31"],
  [["--assign", "02:00.0,guest=1,guest=2", "a"], "--assign 02:00.0,guest=1,guest=2: guest is given twice"],
  [
    ["--assign", "02:00.0,constructor=1", "a"],
    "--assign 02:00.0,constructor=1: unknown key constructor; there are guest, dma, domain",
  ],
  [["--assign", "02:00.0,domain=mine", "a"], "--assign 02:00.0,domain=mine: domain: the only value is own"],
  [["--assign", "emul:", "a"], "--assign emul:: there is no emul:; emulated are emul:edu, emul:nvme"],
  [
    ["--assign", "emul:floppy,x=1", "a"],
    "--assign emul:floppy,x=1: there is no emul:floppy; emulated are emul:edu, emul:nvme",
  ],
  [
    ["--assign", "emul:edu.1", "a"],
    "--assign emul:edu.1: there is no emul:edu.1; emulated are emul:edu, emul:nvme",
  ],
  [["--assign", "emul:edu,mask=1", "a"], "--assign emul:edu,mask=1: unknown key mask; see --help"],
  [
    ["--assign", "emul:edu,guest=40", "a"],
    "--assign emul:edu,guest=40: guest: not a whole number from 1 to 31",
  ],
  [
    ["--assign", "emul:edu,__proto__=1", "a"],
    "--assign emul:edu,__proto__=1: unknown key __proto__; see --help",
  ],
  [
    ["--assign", "emul:edu,dma_mask=wide", "a"],
    "--assign emul:edu,dma_mask=wide: dma_mask: not a mask; give a number such as 0xfffffff",
  ],
  [
    ["--assign", "emul:edu,dma_mask=1,dma_mask=2", "a"],
    "--assign emul:edu,dma_mask=1,dma_mask=2: dma_mask is given twice",
  ],
  [
    ["--assign", "emul:edu", "--dma-limit", "1M,emul:edu.1", "a"],
    "--dma-limit 1M,emul:edu.1: emul:edu.1 is not assigned; assigned: emul:edu",
  ],
  [
    ["--assign", "emul:edu", "--inject", "map,device=emul:", "a"],
    '--inject map,device=emul:: device: "emul:" names no emulated device; they are called emul:edu, emul:edu.1, and so on',
  ],
  [
    ["--assign", "emul:edu,guest=2", "--assign", "emul:edu,guest=2", "a"],
    "emul:edu.1: guest slot 2 is taken by emul:edu; use another",
  ],
  [["--dma-limit", "1", "a"], "--dma-limit 1: too small; it takes at least a page, 4K"],
  [["--dma-limit", "6K", "a"], "--dma-limit 6K: not a whole number of pages of 4K"],
  [
    ["--dma-limit", "lots", "a"],
    "--dma-limit lots: not a size; give a number with K, M, G or T, such as 512M",
  ],
  [["--dma-limit", "1M,02:00.0", "a"], "--dma-limit 1M,02:00.0: 0000:02:00.0 is not assigned; no device is"],
  [
    ["--assign", "03:00.0", "--dma-limit", "1M,02:00.0", "a"],
    "--dma-limit 1M,02:00.0: 0000:02:00.0 is not assigned; assigned: 0000:03:00.0",
  ],
  [["--dma-limit", "1M", "--dma-limit", "2M", "a"], "--dma-limit 2M: the VM has a limit already; give one"],
  [
    ["--assign", "02:00.0", "--dma-limit", "1M,02:00.0", "--dma-limit", "1M,0000:02:00.0", "a"],
    "--dma-limit 1M,0000:02:00.0: 0000:02:00.0 has a limit already; give one",
  ],
  [
    ["--assign", "02:00.0,dma=pinned", "--dma-limit", "1M", "a"],
    "--dma-limit 1M: too small for 0000:02:00.0, whose policy pinned pins all 512M of RAM; raise it or use --dma strict",
  ],
  [
    ["--emul-iommu", "entries=30", "a"],
    "--emul-iommu entries=30: no emulated device is assigned; add --assign emul:MODEL",
  ],
  [
    ["--assign", "emul:edu", "--emul-iommu", "entries=0", "a"],
    "--emul-iommu entries=0: entries: not a whole number from 1 to 1048576",
  ],
  [
    ["--assign", "emul:edu", "--emul-iommu", "locked=6K", "a"],
    "--emul-iommu locked=6K: locked: not a whole number of pages of 4K",
  ],
  [
    ["--assign", "emul:edu", "--emul-iommu", "tables=3", "a"],
    "--emul-iommu tables=3: unknown key tables; there are entries, locked",
  ],
  [
    ["--assign", "emul:edu,dma=pinned", "--emul-iommu", "entries=30", "a"],
    "--emul-iommu entries=30: emul:edu has the policy pinned, for which all of RAM is mapped; use dma=strict for it",
  ],
  [
    ["--assign", "emul:edu", "--emul-iommu", "entries=30", "--emul-iommu", "entries=40", "a"],
    "--emul-iommu entries=30,entries=40: entries is given twice",
  ],
  [["--inject", "map,p=2", "a"], "--inject map,p=2: p: not a number above 0, up to 1"],
  [
    ["--inject", "map,device=02:00.0", "a"],
    "--inject map,device=02:00.0: 0000:02:00.0 is not assigned; no device is",
  ],
  [
    Array.from({ length: 17 }, () => ["--inject", "map"])
      .flat()
      .concat("a"),
    "--inject: 17 rules, at most 16 can be given",
  ],
  [["--tell", "/nowhere"], "--tell /nowhere: tell it what? try: vmm --tell /nowhere help"],
  [["--tell", "/nowhere", "--cpus", "2", "help"], "--cpus: does not go with --tell; see --help"],
  [
    ["--assign", "02:00.0", "--assign", "0000:02:00.0", "a"],
    "0000:02:00.0: assigned twice; name each device once",
  ],
];

const failure: readonly (readonly [name: string, args: () => string[], message: string | RegExp])[] = [
  ["missing", () => ["none.img"], "cannot open guest image none.img: no such file; check the path (ENOENT)"],
  [
    "missing initrd",
    () => ["--initrd", "none", file("k", bzImage(4096))],
    "cannot open initrd none: no such file; check the path (ENOENT)",
  ],
  ["empty", () => [file("empty.img", "")], "guest image empty.img is empty (0 bytes): make or copy it again"],
  [
    "truncated",
    () => [file("cut.img", bzImage(8192).subarray(0, 4000))],
    "guest image cut.img is truncated: the kernel ends at byte 9216, there are 4000; copy or make it again",
  ],
  [
    "unknown kind",
    () => [file("text.img", "hello world")],
    "guest image text.img is of unknown kind (11 bytes, the first are 68 65 6c 6c 6f 20 77 6f): give a unified kernel image or a bzImage for x86-64",
  ],
  [
    "32-bit only",
    () => [file("old.img", bzImage(4096, 0))],
    "guest image old.img is a 32-bit only bzImage (xloadflags 0x0, no XLF_KERNEL_64): give an x86-64 kernel",
  ],
  [
    "a directory",
    () => {
      mkdirSync(join(directory, "dir"));
      return ["dir"];
    },
    "guest image dir is a directory, not a regular file: give the file itself",
  ],
  ["no such BDF", () => ["--assign", "7fff:02:00.0", "a"], "7fff:02:00.0: no such PCI device; see lspci -D"],
];

for (const [args, message] of usage) {
  test(`usage: ${args.join(" ")}`, () => {
    assert.equal(vmm(...args), { status: 2, stdout: "", stderr: `vmm: ${message}\n` });
  });
}
for (const [name, args, message] of failure) {
  test(`failure: ${name}`, () => {
    assert.equal(vmm(...args()), { status: 1, stdout: "", stderr: `vmm: ${message}\n` });
  });
}

test("--help and --version", () => {
  const help = vmm("--help");
  assert.is(help.status, 0);
  assert.match(help.stdout, /--assign BDF/);
  assert.match(vmm("--version").stdout, /^vmm \d+\.\d+\.\d+\n$/);
});

test("--tell: nobody there is a failure, not a mistake of the command line", () => {
  const { status, stderr } = vmm("--tell", "none", "inject", "map,p=0.5");
  assert.is(status, 1);
  assert.match(
    stderr,
    /^vmm: --tell none: no such directory, or no VMM runs with it \(ENOENT\); give the statistics .*\n$/,
  );
});

test("limits and failures become what they say", () => {
  const line =
    "--assign 02:00.0 --assign 03:00.0 --dma-limit 1M --dma-limit 256K,03:00.0 --inject map,p=0.5 a";
  const parsed = parseCommandLine(line.split(" "));
  assert.ok("run" in parsed);
  assert.is(parsed.run.limitBytes, 2 ** 20);
  assert.equal(
    parsed.run.assignments.map((each) => each.limitBytes),
    [0, 2 ** 18],
  );
  assert.equal(parsed.run.injections, [parseInjectSpec("map,p=0.5")]);
  assert.equal(parseCommandLine(["--tell", "dir", "inject", "map,next=1"]), {
    tell: { directory: "dir", line: "inject map,next=1" },
  });
});

test("room that is too small for a driver is told, with what to raise", () => {
  const limits = { entries: 10, quotaBytes: 2 ** 17, vmQuotaBytes: 2 ** 17, lockableBytes: 2 ** 17 };
  const enough = { ...limits, ...RAISE.vfio };
  assert.equal(smallRoom(enough, 1), []);
  const none = { entries: 65535, quotaBytes: 0, vmQuotaBytes: 0, lockableBytes: 0 };
  assert.equal(smallRoom({ ...none, ...RAISE.vfio }, 16), []);
  const little = { entries: 9, quotaBytes: 65536, vmQuotaBytes: 98304, lockableBytes: 4096 };
  assert.equal(smallRoom({ ...little, ...RAISE.vfio }, 1), [
    "its IOMMU domain takes 9 mappings at a time, too few for most drivers to probe; raise dma_entry_limit of vfio_iommu_type1",
    "its --dma-limit is 64K, too little for most drivers to probe; raise it",
    "the --dma-limit of the VM is 96K, too little for most drivers to probe; raise it",
    "the limit of locked memory is 4K, too little for most drivers to probe; raise it (ulimit -l)",
  ]);
  assert.is(smallRoom(enough, 4).length, 4, "more vCPUs, more queues");
  const emulated = smallRoom({ ...none, entries: 9, lockableBytes: 4096, ...RAISE.emulated }, 1);
  assert.equal(emulated, [
    "its IOMMU domain takes 9 mappings at a time, too few for most drivers to probe; raise entries= of --emul-iommu",
    "the limit of locked memory is 4K, too little for most drivers to probe; raise locked= of --emul-iommu",
  ]);
});

test("limits of the software IOMMU", () => {
  const parsed = parseCommandLine("--assign emul:edu --emul-iommu entries=30,locked=1M a".split(" "));
  assert.ok("run" in parsed);
  assert.equal(parsed.run.softIommu, { entries: 30, lockedBytesMax: 2 ** 20 });
  const apart = parseCommandLine(
    "--assign emul:edu --emul-iommu entries=30 --emul-iommu locked=1M a".split(" "),
  );
  assert.equal(apart, parsed);
});

test("options become what they say", () => {
  const parsed = parseCommandLine([
    ..."--cpus 4 --memory 8G --dma pinned --no-reboot --stats --cmdline".split(" "),
    "console=ttyS0 quiet",
    ..."--assign 02:00.0,guest=5,dma=strict --assign 03:00.0,domain=own guest.img".split(" "),
  ]);
  assert.equal(parsed, {
    run: {
      image: "guest.img",
      cmdline: "console=ttyS0 quiet",
      cpus: 4,
      memoryBytes: 8 * 2 ** 30,
      assignments: [
        {
          kind: "vfio",
          name: "0000:02:00.0",
          guestSlot: 5,
          policy: "strict",
          ownDomain: false,
          limitBytes: 0,
        },
        { kind: "vfio", name: "0000:03:00.0", policy: "pinned", ownDomain: true, limitBytes: 0 },
      ],
      limitBytes: 0,
      granuleBytes: 65536,
      idleSeconds: 30,
      softIommu: {},
      injections: [],
      stats: true,
      reboot: false,
    },
  });
});

test("policy cached: granule and idle time", () => {
  const parsed = parseCommandLine("--dma cached --assign 02:00.0 --dma-granule 2M --dma-idle 0 a".split(" "));
  assert.ok("run" in parsed);
  assert.is(parsed.run.assignments[0]!.policy, "cached");
  assert.is(parsed.run.granuleBytes, 2 ** 21);
  assert.is(parsed.run.idleSeconds, 0);
  const huge = parseCommandLine("--hugepages thp --assign 02:00.0 a".split(" "));
  assert.ok("run" in huge);
  assert.is(huge.run.hugePages, "thp");
  assert.is(huge.run.granuleBytes, 2 ** 21);
});

test("emulated devices: keys of their own, names by their order, limits and rules by their names", () => {
  const parsed = parseCommandLine([
    ..."--assign emul:edu,dma_mask=0x1ffffffff,guest=9 --assign 02:00.0 --assign emul:edu,domain=own".split(
      " ",
    ),
    ..."--assign emul:edu,dma=pinned --memory 64M --dma-limit 4M,emul:edu.1".split(" "),
    ..."--inject map,device=emul:edu.2 guest.img".split(" "),
  ]);
  assert.ok("run" in parsed);
  const edu = { kind: "emulated", model: "edu", policy: "strict", ownDomain: false, limitBytes: 0 };
  const mask = { maskLow: 0xfffffff, maskHigh: 0 };
  assert.equal(parsed.run.assignments, [
    { ...edu, name: "emul:edu", guestSlot: 9, modelOptions: { maskLow: 0xffffffff, maskHigh: 1 } },
    { kind: "vfio", name: "0000:02:00.0", policy: "cached", ownDomain: false, limitBytes: 0 },
    { ...edu, name: "emul:edu.1", ownDomain: true, limitBytes: 4 * 2 ** 20, modelOptions: mask },
    { ...edu, name: "emul:edu.2", policy: "pinned", modelOptions: mask },
  ]);
  assert.is(parsed.run.injections[0]!.device, "emul:edu.2");
});

test.run();
