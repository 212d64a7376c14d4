// vmm/vfio without VFIO: addresses, what sysfs is taken to say, the errors for each mistake, capability chains. The
// ioctls themselves run in the lab.

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { suite } from "uvu";
import { MAP_FLAG } from "../../hypercalls/abi.js";
import { hva, iova } from "../../hypercalls/addresses.js";
import { UsageError, VmmError } from "../../vmm/errors.js";
import { CONSTANT } from "../../vmm/sys/vfio.js";
import { type Assignment, OpenAssignments, prepareAssignments } from "../../vmm/vfio/assign.js";
import { VfioBackend, VfioContainer, VfioGroup } from "../../vmm/vfio/container.js";
import { capabilities } from "../../vmm/vfio/info-chain.js";
import { assignableGroup, parseBdf } from "../../vmm/vfio/sysfs.js";

interface HostDevice {
  readonly driver?: string;
  readonly group?: number;
  readonly class?: string;
}

const roots: string[] = [];

/** A /sys with these devices. */
function sysfs(devices: Readonly<Record<string, HostDevice>>, groupName?: string): string {
  const root = mkdtempSync(join(tmpdir(), "pvdma-sysfs-"));
  roots.push(root);
  for (const [bdf, { driver, group, class: code = "0x010802" }] of Object.entries(devices)) {
    const path = join(root, "bus/pci/devices", bdf);
    mkdirSync(path, { recursive: true });
    writeFileSync(join(path, "class"), `${code}\n`);
    if (driver !== undefined) {
      mkdirSync(join(root, "bus/pci/drivers", driver), { recursive: true });
      symlinkSync(join("../../drivers", driver), join(path, "driver"));
    }
    if (group !== undefined) {
      const groupPath = join(root, "kernel/iommu_groups", String(group));
      mkdirSync(join(groupPath, "devices"), { recursive: true });
      if (groupName !== undefined) writeFileSync(join(groupPath, "name"), `${groupName}\n`);
      symlinkSync(join("../../../../bus/pci/devices", bdf), join(groupPath, "devices", bdf));
      symlinkSync(join("../../../../kernel/iommu_groups", String(group)), join(path, "iommu_group"));
    }
  }
  return root;
}

const NVME = parseBdf("0000:02:00.0");
const NIC = parseBdf("0000:02:00.1");
const GOOD = { [NVME]: { driver: "vfio-pci", group: 12 } };

/** The one line that a VmmError says. */
/** The message of the error that `action` throws: a VmmError unless the command line is to blame. */
function complaint(action: () => unknown, kind: typeof VmmError | typeof UsageError = VmmError): string {
  try {
    action();
  } catch (error) {
    assert.ok(error instanceof kind, String(error));
    assert.doesNotMatch(error.message, /\n/);
    return error.message;
  }
  throw new Error("no error");
}

const addresses = suite("vfio: addresses");

addresses("long and short forms", () => {
  assert.equal(parseBdf("0000:02:00.0"), "0000:02:00.0");
  assert.equal(parseBdf("02:1F.7"), "0000:02:1f.7");
  assert.equal(parseBdf("10000:e1:00.0"), "10000:e1:00.0");
});

addresses("anything else is a usage error that shows it", () => {
  for (const text of [
    "",
    "2:0.0",
    "02:00",
    "0000:02:00.8",
    "0000:02:20.0",
    "02:00.0 ",
    "../02:00.0",
    "0:02:00.0",
  ]) {
    assert.throws(
      () => parseBdf(text),
      (error: unknown) =>
        error instanceof UsageError && error.message.startsWith(`"${text}" is no PCI address`),
    );
  }
});

const mistakes = suite("vfio: mistakes");

mistakes("a device on vfio-pci in a group of its own is fine", () => {
  assert.equal(assignableGroup(NVME, sysfs(GOOD)), 12);
  const variant = sysfs({ [NVME]: { driver: "mlx5_vfio_pci", group: 3 } });
  assert.equal(assignableGroup(NVME, variant), 3);
});

mistakes("no such device", () => {
  assert.equal(
    complaint(() => assignableGroup(NIC, sysfs(GOOD))),
    "0000:02:00.1: no such PCI device; see lspci -D",
  );
});

mistakes("bound to a host driver: says how to bind it", () => {
  assert.equal(
    complaint(() => assignableGroup(NVME, sysfs({ [NVME]: { driver: "nvme", group: 12 } }))),
    "0000:02:00.0: is bound to nvme, not to vfio-pci; as root: modprobe vfio-pci; " +
      "echo vfio-pci > /sys/bus/pci/devices/0000:02:00.0/driver_override; " +
      "echo 0000:02:00.0 > /sys/bus/pci/devices/0000:02:00.0/driver/unbind; " +
      "echo 0000:02:00.0 > /sys/bus/pci/drivers_probe",
  );
  const unbound = complaint(() => assignableGroup(NVME, sysfs({ [NVME]: { group: 12 } })));
  assert.match(unbound, /^0000:02:00\.0: has no driver; as root: modprobe vfio-pci; echo vfio-pci >/);
  assert.doesNotMatch(unbound, /unbind/);
});

mistakes("no IOMMU comes before the driver: without one, binding would fail", () => {
  assert.match(
    complaint(() => assignableGroup(NVME, sysfs({ [NVME]: { driver: "nvme" } }))),
    /^0000:02:00\.0: has no IOMMU group, so no IOMMU is on; boot with intel_iommu=on or amd_iommu=on/,
  );
  assert.match(
    complaint(() => assignableGroup(NVME, sysfs(GOOD, "vfio-noiommu"))),
    /^0000:02:00\.0: its group has no IOMMU behind it \(noiommu\)/,
  );
});

mistakes("a bridge", () => {
  const bridge = sysfs({ [NVME]: { driver: "pcieport", group: 1, class: "0x060400" } });
  assert.match(
    complaint(() => assignableGroup(NVME, bridge)),
    /^0000:02:00\.0: is a PCI bridge/,
  );
});

mistakes("a group that is not viable names the others and their drivers", () => {
  const root = sysfs({
    [NVME]: { driver: "vfio-pci", group: 12 },
    [NIC]: { driver: "e1000e", group: 12 },
    "0000:02:00.2": { driver: "xhci_hcd", group: 12 },
    "0000:02:00.3": { group: 12 },
    "0000:02:00.4": { driver: "vfio-pci", group: 12 },
    "0000:00:1c.0": { driver: "pcieport", group: 12, class: "0x060400" },
    "0000:00:1c.1": { driver: "shpchp", group: 12, class: "0x060400" },
    "0000:00:1c.2": { driver: "pci-stub", group: 12 },
  });
  assert.equal(
    complaint(() => assignableGroup(NVME, root)),
    "0000:02:00.0: its IOMMU group 12 is not viable: 0000:02:00.1 (e1000e), 0000:02:00.2 (xhci_hcd) on host drivers; " +
      "bind them to vfio-pci too, or to no driver",
  );
});

const requests = suite("vfio: requests");

requests("slots are given from 1 up, around those that are asked for or taken", () => {
  const root = sysfs({
    [NVME]: { driver: "vfio-pci", group: 12 },
    [NIC]: { driver: "vfio-pci", group: 13 },
    "0000:05:00.0": { driver: "vfio-pci", group: 14 },
  });
  const other = parseBdf("05:00.0");
  assert.deepEqual(
    prepareAssignments([{ bdf: NVME }, { bdf: NIC, guestSlot: 2 }, { bdf: other, domain: other }], {
      sysfs: root,
      takenSlots: new Set([1]),
    }),
    [
      { bdf: NVME, group: 12, guestSlot: 3, domain: "shared" },
      { bdf: NIC, group: 13, guestSlot: 2, domain: "shared" },
      { bdf: other, group: 14, guestSlot: 4, domain: other },
    ],
  );
});

requests("assigned twice, a slot twice, a slot out of range", () => {
  const root = { sysfs: sysfs({ ...GOOD, [NIC]: { driver: "vfio-pci", group: 13 } }) };
  assert.equal(
    complaint(() => prepareAssignments([{ bdf: NVME }, { bdf: NVME, guestSlot: 4 }], root), UsageError),
    "0000:02:00.0: assigned twice; name each device once",
  );
  assert.equal(
    complaint(
      () =>
        prepareAssignments(
          [
            { bdf: NVME, guestSlot: 4 },
            { bdf: NIC, guestSlot: 4 },
          ],
          root,
        ),
      UsageError,
    ),
    "0000:02:00.1: guest slot 4 is taken by 0000:02:00.0; use another",
  );
  for (const guestSlot of [0, 32, -1, 1.5]) {
    assert.match(
      complaint(() => prepareAssignments([{ bdf: NVME, guestSlot }], root)),
      /guest slot .* is out of range/,
    );
  }
});

requests("devices of one group cannot be in two domains", () => {
  const root = sysfs({ [NVME]: { driver: "vfio-pci", group: 12 }, [NIC]: { driver: "vfio-pci", group: 12 } });
  assert.match(
    complaint(() => prepareAssignments([{ bdf: NVME }, { bdf: NIC, domain: NIC }], { sysfs: root })),
    /^0000:02:00\.1: shares IOMMU group 12 with 0000:02:00\.0/,
  );
});

requests("more devices than slots", () => {
  const taken = new Set(Array.from({ length: 31 }, (_, i) => i + 1));
  assert.match(
    complaint(() => prepareAssignments([{ bdf: NVME }], { sysfs: sysfs(GOOD), takenSlots: taken })),
    /^0000:02:00\.0: the guest's PCI bus is full/,
  );
});

const files = suite("vfio: device files");

const assignment: Assignment = { bdf: NVME, group: 12, guestSlot: 1, domain: "shared" };

files("no VFIO at all", () => {
  const dev = mkdtempSync(join(tmpdir(), "pvdma-dev-"));
  roots.push(dev);
  assert.equal(
    complaint(() => OpenAssignments.open([assignment], { dev })),
    `VFIO: cannot open ${dev}/vfio/vfio (ENOENT): VFIO is not loaded; run: modprobe vfio-pci`,
  );
});

files("a file that is no VFIO container does not pass for one", () => {
  const dev = mkdtempSync(join(tmpdir(), "pvdma-dev-"));
  roots.push(dev);
  mkdirSync(join(dev, "vfio"));
  writeFileSync(join(dev, "vfio/vfio"), "");
  assert.equal(
    complaint(() => VfioContainer.open(dev)),
    `${dev}/vfio/vfio: is not VFIO's container device (ENOTTY)`,
  );
  assert.match(
    complaint(() => VfioGroup.open(12, NVME, dev)),
    /^0000:02:00\.0: cannot open .*\/vfio\/12 \(ENOENT\): the group has no device file/,
  );
});

files("the backend answers with errnos and throws nothing", () => {
  const backend = new VfioBackend(-1);
  assert.equal(backend.map(iova(0x1000), hva(0x1000), 4096, 3), 9);
  assert.equal(backend.unmap(iova(0x1000), 4096), -9);
});

files("the engine's access bits are VFIO's", () => {
  assert.equal(MAP_FLAG.read, CONSTANT.VFIO_DMA_MAP_FLAG_READ);
  assert.equal(MAP_FLAG.write, CONSTANT.VFIO_DMA_MAP_FLAG_WRITE);
});

files("capability chains end, and stay inside the structure", () => {
  const info = new DataView(new ArrayBuffer(64));
  info.setUint16(24, 3, true);
  info.setUint32(28, 40, true);
  info.setUint16(40, 1, true);
  assert.deepEqual(
    [...capabilities(info, 24)],
    [
      { id: 3, at: 24 },
      { id: 1, at: 40 },
    ],
  );
  assert.deepEqual([...capabilities(info, 0)], []);
  info.setUint32(44, 60, true);
  assert.equal([...capabilities(info, 24)].length, 2, "a header that does not fit");
});

files.after(() => {
  for (const root of roots) rmSync(root, { recursive: true });
});

for (const each of [addresses, mistakes, requests, files]) each.run();
