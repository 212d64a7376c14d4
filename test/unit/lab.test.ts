// The pure parts of the lab: the initramfs writer, module order, the choice of kernel packages, the line protocol.

import { spawn, spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { test } from "uvu";
import * as assert from "uvu/assert";
import { CpioArchive } from "../lab/cpio.js";
import { shellQuote } from "../lab/host.js";
import { insmodOrder, moduleName, parseModulesDep } from "../lab/modules.js";
import { choose61, choose612 } from "../lab/packages.js";
import { LineReader } from "../lab/wire.js";

test("cpio: another implementation reads back what was written", () => {
  const archive = new CpioArchive()
    .charDevice("dev/console", 5, 1)
    .file("/usr/bin/tool", "12345", 0o755)
    .symlink("bin", "usr/bin");
  const listed = spawnSync("busybox", ["cpio", "-tv"], { input: archive.bytes(), encoding: "utf8" });
  assert.is(listed.status, 0, listed.stderr);
  const entries = listed.stdout.split("\n").map((line) => {
    const words = line.split(/\s+/);
    return `${words[0]} ${words.slice(1).join(" ")}`;
  });
  assert.match(entries.join("\n"), /^drwxr-xr-x .* dev$/m, "the parent comes by itself");
  assert.match(entries.join("\n"), /^crw------- .* dev\/console$/m);
  assert.match(entries.join("\n"), /^-rwxr-xr-x .* 5 .* usr\/bin\/tool$/m);
  assert.match(entries.join("\n"), /^lrwxrwxrwx .* bin -> usr\/bin$/m);
  const content = spawnSync("busybox", ["cpio", "-i", "--to-stdout", "usr/bin/tool"], {
    input: archive.bytes(),
    encoding: "utf8",
  });
  assert.is(content.stdout, "12345");
});

test("cpio: layout of one entry, and the same bytes every time", () => {
  const make = (): Buffer => new CpioArchive().file("ab", "xyz", 0o600).bytes();
  const bytes = make();
  assert.equal(make(), bytes);
  assert.is(bytes.length % 512, 0);
  assert.is(bytes.toString("latin1", 0, 14), "07070100000001");
  assert.is(bytes.toString("latin1", 14, 22), "00008180", "a regular file, 0600");
  assert.is(bytes.toString("latin1", 54, 62), "00000003", "file size");
  assert.is(bytes.toString("latin1", 94, 102), "00000003", "name size with its NUL");
  assert.is(
    bytes.toString("latin1", 110, 120),
    "ab\0\0\0\0xyz\0",
    "name from 110, data from 116, each padded to 4",
  );
});

test("cpio: refuses a second entry of a name, and names that leave the archive", () => {
  const archive = new CpioArchive().file("a/b", "");
  assert.throws(() => archive.file("a//b", ""), /a\/b is in the archive already/);
  assert.throws(() => archive.file("a/../../b", ""), /leaves the archive/);
  assert.throws(() => archive.file("/", ""), /needs a name/);
  archive.directory("a"); // a directory may come again
});

const dep =
  parseModulesDep(`kernel/drivers/nvme/host/nvme.ko.xz: kernel/drivers/nvme/host/nvme-core.ko.xz kernel/lib/crc64.ko
kernel/drivers/nvme/host/nvme-core.ko.xz: kernel/lib/crc64.ko
kernel/lib/crc64.ko:
kernel/a.ko.zst: kernel/b.ko
kernel/b.ko: kernel/a.ko.zst
`);

test("modules: what is needed comes first, and once", () => {
  assert.equal(insmodOrder(dep, ["nvme", "nvme_core"]), [
    "kernel/lib/crc64.ko",
    "kernel/drivers/nvme/host/nvme-core.ko.xz",
    "kernel/drivers/nvme/host/nvme.ko.xz",
  ]);
});

test("modules: names, built-in ones, unknown ones, loops", () => {
  assert.is(moduleName("kernel/x/nvme-core.ko.xz"), "nvme_core");
  assert.is(moduleName("vfio-pci"), "vfio_pci");
  assert.equal(insmodOrder(dep, ["virtio-pci"], new Set(["virtio_pci"])), []);
  assert.throws(() => insmodOrder(dep, ["nvmf"]), /nvmf: not in modules.dep and not built in/);
  assert.throws(() => insmodOrder(dep, ["a"]), /needs itself/);
});

test("packages: 6.1 is what linux-image-amd64 depends on", () => {
  assert.equal(choose61("linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"), {
    abi: "6.1.0-56-amd64",
    image: "linux-image-6.1.0-56-amd64",
    headers: "linux-headers-6.1.0-56-amd64",
  });
  assert.is(choose61("linux-image-amd64\n  Depends: linux-image-6.12.9+deb13-amd64\n"), undefined);
});

test("packages: 6.12 is the newest plain one that has headers, signed before unsigned", () => {
  const images = [
    "linux-image-6.12-amd64",
    "linux-image-6.12.9+deb12-amd64",
    "linux-image-6.12.107+deb12-amd64-unsigned",
    "linux-image-6.12.107+deb12-amd64",
    "linux-image-6.12.111+deb12-amd64", // no headers
    "linux-image-6.12.117+deb12-rt-amd64",
    "linux-image-6.12.117+deb12-cloud-amd64",
    "linux-image-6.12.117+deb12-amd64-dbg",
    "linux-image-6.12.12+bpo-amd64-unsigned",
  ];
  const headers = ["9+deb12", "107+deb12", "117+deb12-rt", "117+deb12-cloud", "12+bpo"].map(
    (abi) => `linux-headers-6.12.${abi}-amd64`,
  );
  assert.equal(
    choose612(images, headers).map(({ image }) => image),
    [
      "linux-image-6.12.107+deb12-amd64",
      "linux-image-6.12.107+deb12-amd64-unsigned",
      "linux-image-6.12.12+bpo-amd64-unsigned",
      "linux-image-6.12.9+deb12-amd64",
    ],
  );
  assert.equal(choose612([], headers), []);
});

test("wire: lines survive any cut", () => {
  const text = '{"a":1}\n\n{"b":"x\\ny"}\n{"c"';
  for (let cut = 0; cut <= text.length; cut++) {
    const lines = new LineReader<object>();
    const got = [...lines.read(text.slice(0, cut)), ...lines.read(text.slice(cut)), ...lines.read(":3}\n")];
    assert.equal(got, [{ a: 1 }, { b: "x\ny" }, { c: 3 }]);
  }
});

test("shellQuote: a shell gives the word back", () => {
  for (const word of ["plain", "two words", "it's", '$HOME `x` \\ "', ""]) {
    const { stdout } = spawnSync("sh", ["-c", `printf %s ${shellQuote(word)}`], { encoding: "utf8" });
    assert.is(stdout, word);
  }
});

test("local host: what it started dies with it, even by SIGKILL", async () => {
  const local = new URL("../lab/local.js", import.meta.url).href;
  const program = `
    import { LocalHost } from "${local}";
    console.log((await new LocalHost().spawn("exec sleep 1000")).pid);
  `;
  const owner = spawn(process.execPath, ["--input-type=module", "--eval", program]);
  const pid = await new Promise<number>((resolve) =>
    owner.stdout.once("data", (line) => resolve(Number(line))),
  );
  assert.ok(existsSync(`/proc/${pid}`), "it runs");
  owner.kill("SIGKILL");
  for (let tries = 0; tries < 100 && existsSync(`/proc/${pid}`); tries++) await sleep(50);
  const left = existsSync(`/proc/${pid}`);
  if (left) process.kill(pid, "SIGKILL");
  assert.not(left, "it is gone");
});

test.run();
