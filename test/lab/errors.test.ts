// Each mistake about devices, KVM and memory gives its one line and exit status, in the lab; those of the command line
// and of image files are in unit/cli.test.ts.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { repoRoot, scratchDir } from "./cache.js";
import { buildGuestImage } from "./guest.js";
import { bindDriver, bindVfio, must, shellQuote } from "./host.js";
import { bootL1, type L1, l1Bdf } from "./l1.js";
import { labTest, MiB, RunningVmm, randomDisk } from "./support.js";

const test = suite("errors");
const files = scratchDir();
let host: L1;
let image: string;

test.before(async () => {
  image = await buildGuestImage({ script: "echo 'guest: up'; read -r line" });
  host = await bootL1({
    nvme0: { file: randomDisk(files.path, "a.raw", MiB) },
    pair: { file: randomDisk(files.path, "b.raw", MiB) },
    name: "errors",
    hugePages: true,
  });
});
test.after(async () => {
  await host?.close();
  files.remove();
});

/** Runs the command to its end; `around` is a shell command with %s for it. */
async function vmm(
  args: readonly string[],
  around = "%s",
  on = host,
): Promise<{ status: number; stderr: string }> {
  const command = ["node", `${repoRoot}/dist/vmm.js`, ...args].map(shellQuote).join(" ");
  const { status, stdout, stderr } = await on.run(around.replace("%s", command));
  assert.is(stdout, "");
  return { status, stderr };
}

const lab = (name: string, body: () => Promise<void>) => labTest(test, name, () => host, body);
const fails = (message: string) => ({ status: 1, stderr: `vmm: ${message}\n` });

lab("no such device", async () => {
  const got = await vmm(["--assign", "0000:7f:00.0", image]);
  assert.equal(got, fails("0000:7f:00.0: no such PCI device; see lspci -D"));
});

lab("a bridge", async () => {
  const got = await vmm(["--assign", "0000:00:11.0", image]);
  assert.equal(got, fails("0000:00:11.0: is a PCI bridge; assign the devices behind it"));
});

lab("not bound to vfio-pci: says how to bind it", async () => {
  const bdf = l1Bdf.nvme0;
  const device = `/sys/bus/pci/devices/${bdf}`;
  const bind = `echo vfio-pci > ${device}/driver_override; echo ${bdf} > /sys/bus/pci/drivers_probe`;
  const free = await vmm(["--assign", bdf, image]);
  assert.equal(free, fails(`${bdf}: has no driver; as root: modprobe vfio-pci; ${bind}`));
  await must(host, "modprobe nvme");
  await bindDriver(host, bdf, "nvme");
  const bound = await vmm(["--assign", bdf, image]);
  assert.is(bound.status, 1);
  assert.match(
    bound.stderr,
    new RegExp(`^vmm: ${bdf}: is bound to nvme, not to vfio-pci; as root: .*unbind.*\n$`),
  );
  // And doing what it says is enough.
  await must(host, bound.stderr.replace(/^.*as root: /, "").trim());
  await must(host, `[ "$(basename $(readlink ${device}/driver))" = vfio-pci ]`);
});

lab("group not viable: names the other devices and their drivers", async () => {
  const [nvme, card] = l1Bdf.pair;
  await must(host, "modprobe e1000e");
  await bindVfio(host, nvme);
  await bindDriver(host, card, "e1000e");
  const got = await vmm(["--assign", nvme, image]);
  assert.is(got.status, 1);
  const line = `^vmm: ${nvme}: its IOMMU group \\d+ is not viable: ${card} \\(e1000e\\) on host drivers; bind them to vfio-pci too, or to no driver\n$`;
  assert.match(got.stderr, new RegExp(line));
});

lab("device busy", async () => {
  await bindVfio(host, l1Bdf.nvme0);
  const first = await RunningVmm.start(host, ["--assign", l1Bdf.nvme0, image]);
  await first.guestSays("up");
  const got = await vmm(["--assign", l1Bdf.nvme0, image]);
  assert.is(got.status, 1);
  const line = `^vmm: ${l1Bdf.nvme0}: cannot open /dev/vfio/\\d+ \\(EBUSY\\): another process uses its group; .*fuser -v /dev/vfio/\\d+\n$`;
  assert.match(got.stderr, new RegExp(line));
  first.goOn();
  assert.is((await first.end()).status, 0, "the first guest was not disturbed");
});

lab("no /dev/kvm", async () => {
  const got = await vmm([image], "mv /dev/kvm /dev/kvm.off; %s; s=$?; mv /dev/kvm.off /dev/kvm; exit $s");
  const line =
    "/dev/kvm: there is no KVM here (ENOENT); load kvm-intel or kvm-amd and enable virtualization in the firmware";
  assert.equal(got, fails(line));
});

/** A user for whom file modes count; the working tree need not be readable for all. */
const ORDINARY = "setpriv --bounding-set -dac_override,-dac_read_search %s";

lab("no permission for /dev/kvm", async () => {
  const got = await vmm([image], `chmod 0 /dev/kvm; ${ORDINARY}; s=$?; chmod 600 /dev/kvm; exit $s`);
  const line = "/dev/kvm: no permission (EACCES); add the user to the group that owns it, usually kvm";
  assert.equal(got, fails(line));
});

lab("no permission for the device's group", async () => {
  const got = await vmm(
    ["--assign", l1Bdf.nvme0, image],
    `chmod 0 /dev/vfio/[0-9]*; ${ORDINARY}; s=$?; chmod 600 /dev/vfio/[0-9]*; exit $s`,
  );
  assert.is(got.status, 1);
  assert.match(
    got.stderr,
    new RegExp(`^vmm: ${l1Bdf.nvme0}: cannot open /dev/vfio/\\d+ \\(EACCES\\): .+\n$`),
  );
});

lab("memory too small for the kernel", async () => {
  const got = await vmm(["--memory", "32M", image]);
  assert.is(got.status, 1);
  assert.match(
    got.stderr,
    /^vmm: memory of 32M is too small for a kernel that needs \d+M at 16M and an initrd of \d+M: give --memory \d+M or more\n$/,
  );
});

lab("command line too long", async () => {
  const got = await vmm(["--cmdline", "x".repeat(3000), image]);
  assert.is(got.status, 1);
  assert.match(
    got.stderr,
    /^vmm: command line of 3000 bytes is too long for kernel \S+, which takes 2047: shorten it \(--cmdline\)\n$/,
  );
});

lab("no IOMMU", async () => {
  const bare = await bootL1({
    nvme0: { file: randomDisk(files.path, "c.raw", MiB) },
    kernelArgs: "intel_iommu=off",
    name: "errors-no-iommu",
  });
  try {
    const got = await vmm(["--assign", l1Bdf.nvme0, image], "%s", bare);
    const line = `${l1Bdf.nvme0}: has no IOMMU group, so no IOMMU is on; boot with intel_iommu=on or amd_iommu=on, and enable VT-d or AMD-Vi in the firmware`;
    assert.equal(got, fails(line));
  } finally {
    await bare.close();
  }
});

test.run();
