// What happens to assigned devices while the guest runs: the kernel's words for refused accesses, bursts of them, the
// order in which a device is taken away. The real thing is in lab/dying.test.ts.

import assert from "node:assert/strict";
import { writeSync } from "node:fs";
import { suite } from "uvu";
import { DeviceWatch, type WatchedDevice } from "../../vmm/device-watch.js";
import { SystemError } from "../../vmm/errors.js";
import { type Fault, FaultWatch, kernelMessage, loggedFaults, parseFault } from "../../vmm/iommu-faults.js";
import { DeviceEvents } from "../../vmm/vfio/events.js";
import { parseBdf } from "../../vmm/vfio/sysfs.js";
import { Device, Machine } from "./support/pci-parts.js";

const NVME = parseBdf("0000:02:00.0");
const EDU = parseBdf("0000:04:00.0");

// ---- the kernel's words ----

const words = suite("iommu faults: the kernel's words");

/** From kernels 6.1 and 6.12 under QEMU's VT-d. */
const READ =
  "DMAR: [DMA Read NO_PASID] Request device [04:00.0] fault addr 0x2345000 [fault reason 0x06] PTE Read access is not set";
const WRITE =
  "DMAR: [DMA Write NO_PASID] Request device [02:00.0] fault addr 0x6789000 [fault reason 0x05] PTE Write access is not set";

words("Intel's", () => {
  assert.deepEqual(parseFault(READ), {
    device: "04:00.0",
    access: "read",
    iova: "2345000",
    why: "PTE Read access is not set",
  });
  assert.equal(parseFault(WRITE)?.access, "write");
  const pasid = READ.replace("NO_PASID", "PASID 0x1f");
  assert.equal(parseFault(pasid)?.device, "04:00.0");
  // 5.10.
  assert.deepEqual(
    parseFault(
      "DMAR: [DMA Write] Request device [03:00.1] PASID ffffffff fault addr fffc0000 [fault reason 02] Present bit in context entry is clear",
    ),
    { device: "03:00.1", access: "write", iova: "fffc0000", why: "Present bit in context entry is clear" },
  );
});

words("AMD's, with and without the device in front", () => {
  // Reports of users: 6.6 and 5.8.
  assert.deepEqual(
    parseFault(
      "nvme 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000b address=0xb6674000 flags=0x0000]",
    ),
    { device: "0000:01:00.0", access: "read", iova: "b6674000", why: "not mapped" },
  );
  assert.deepEqual(
    parseFault(
      "vfio-pci 0000:02:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0015 address=0x1fffff800 flags=0x0030]",
    ),
    { device: "0000:02:00.0", access: "write", iova: "1fffff800", why: "mapped, but not for that" },
  );
  assert.deepEqual(
    parseFault(
      "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:02:00.0 domain=0x0015 address=0x1fffff800 flags=0x0020]",
    ),
    { device: "0000:02:00.0", access: "write", iova: "1fffff800", why: "not mapped" },
  );
  assert.deepEqual(
    parseFault(
      "AMD-Vi: Event logged [IO_PAGE_FAULT device=02:00.0 domain=0x0015 address=0x00000001fffff800 flags=0x0000]",
    ),
    { device: "02:00.0", access: "read", iova: "1fffff800", why: "not mapped" },
  );
});

words("nothing else is a fault", () => {
  for (const message of [
    "",
    "DMAR: DRHD: handling fault status reg 3",
    "dmar_fault: 44 callbacks suppressed",
    "DMAR: [INTR-REMAP] Request device [04:00.0] fault index 0x0 [fault reason 0x22] Present field in the IRTE entry is clear",
    // An interrupt, no access to memory.
    "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0055 address=0xfffffffdf8000000 flags=0x0008]",
    "vfio-pci 0000:02:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0055 address=0xfffffffdf8000000 flags=0x0008]",
    `somebody writes: ${READ}`,
    "x".repeat(8000),
  ])
    assert.equal(parseFault(message), undefined, message);
});

words("records of /dev/kmsg: the kernel's own only, without their details", () => {
  assert.equal(kernelMessage(`3,1234,5678901,-;${READ}\n`), READ);
  assert.equal(kernelMessage(`3,1,2,c,caller=T1;${READ}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:04:00.0\n`), READ);
  assert.equal(kernelMessage(`11,1234,5678901,-;${READ}\n`), undefined, "a program's (facility 1)");
  assert.equal(kernelMessage(READ), undefined);
});

// ---- bursts ----

const bursts = suite("iommu faults: bursts");

/** A watch over two devices; what it counted and said. */
function watch() {
  const log: string[] = [];
  const said: string[] = [];
  const counted: number[] = [];
  const faults = new FaultWatch(
    [loggedFaults({ read: (each) => log.splice(0).forEach(each) })],
    new Map([
      [NVME as string, { handle: 1 }],
      [EDU as string, { handle: 2 }],
    ]),
    (handle) => counted.push(handle),
    (line) => said.push(line),
  );
  return { faults, log, counted, news: () => said.splice(0) };
}

bursts("a line at the beginning, silence, and how many followed", () => {
  const { faults, log, counted, news } = watch();
  log.push(READ, READ);
  faults.look(1000);
  assert.deepEqual(news(), [
    "0000:04:00.0: the IOMMU refused a read at iova 0x2345000: nothing is mapped there for it (PTE Read access is not set)",
  ]);
  // As the kernel's rate limit lets a storm through: ten, and five seconds later ten more.
  for (let i = 0; i < 10; i++) log.push(READ);
  faults.look(6000);
  faults.look(11_750);
  assert.deepEqual(news(), []);
  faults.look(12_000);
  assert.deepEqual(news(), [
    "0000:04:00.0: 11 more of its accesses were refused within 5 s, as far as the host logged them",
  ]);
  faults.look(60_000);
  assert.deepEqual(news(), []);
  log.push(READ);
  faults.look(61_000);
  assert.equal(news().length, 1, "the next burst");
  faults.look(70_000);
  assert.deepEqual(news(), [], "one alone has said all");
  assert.deepEqual(counted, new Array(13).fill(2));
});

bursts("devices have bursts of their own; other devices' faults are not ours", () => {
  const { faults, log, counted, news } = watch();
  log.push(READ, WRITE, READ.replace("04:00.0", "07:00.0"), READ.replace("04:00.0", "04:00.1"));
  faults.look(0);
  assert.deepEqual(
    news().map((line) => line.slice(0, 12)),
    [EDU, NVME],
  );
  assert.deepEqual(counted, [2, 1]);
  log.push(READ);
  faults.look(1);
  faults.close();
  assert.deepEqual(news(), [
    "0000:04:00.0: 1 more of its accesses were refused within a second, as far as the host logged them",
  ]);
});

bursts(
  "a source that tells all: what it counted without telling is counted, and the last line has no doubt",
  () => {
    const said: string[] = [];
    const counted: number[] = [];
    const fault = { device: "emul:edu.1", access: "write", iova: "1000", why: "not mapped" } as const;
    const news: [Fault, number?][] = [[fault], [fault], [fault, 40]];
    const faults = new FaultWatch(
      [
        {
          complete: true,
          read: (each) => {
            for (const [it, more] of news.splice(0)) each(it, more);
          },
        },
        loggedFaults({ read: () => undefined }),
      ],
      new Map([["emul:edu.1", { handle: 3 }]]),
      (handle, times) => counted.push(handle, times),
      (line) => said.push(line),
    );
    faults.look(0);
    news.push([{ ...fault, device: "emul:edu" }]);
    faults.look(100);
    faults.close();
    assert.deepEqual(said, [
      "emul:edu.1: the IOMMU refused a write at iova 0x1000: nothing is mapped there for it (not mapped)",
      "emul:edu.1: 42 more of its accesses were refused within a second",
    ]);
    assert.deepEqual(counted, [3, 1, 3, 1, 3, 41]);
  },
);

// ---- events ----

const events = suite("devices: events");

const signal = (fd: number): void => {
  writeSync(fd, Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
};

events("each that the host offers is listened for, and told once", () => {
  const device = new Device(new Machine(), { irqs: [1, 0, 0, 1, 1] });
  const it = new DeviceEvents(device);
  assert.equal(it.poll(), undefined);
  signal(device.triggers[4]![0]!);
  assert.equal(it.poll(), "request");
  assert.equal(it.poll(), undefined);
  signal(device.triggers[4]![0]!);
  signal(device.triggers[3]![0]!);
  assert.equal(it.poll(), "error");
  it.close();
  it.close();
});

events("a conventional PCI device has no error event; one that has none at all is fine", () => {
  const device = new Device(new Machine(), { irqs: [1, 0, 0, 0, 1] });
  const it = new DeviceEvents(device);
  assert.equal(device.triggers[3], undefined);
  signal(device.triggers[4]![0]!);
  assert.equal(it.poll(), "request");
  it.close();
  const none = new DeviceEvents(new Device(new Machine(), { irqs: [1, 0, 0] }));
  assert.equal(none.poll(), undefined);
  none.close();
});

// ---- taking away ----

const taking = suite("devices: taken away");

/** Two watched devices that log what is done to them. */
function rig() {
  const log: string[] = [];
  const said: string[] = [];
  const devices = [NVME, EDU].map((bdf, index): WatchedDevice & { readonly device: Device } => {
    const device = new Device(new Machine(), { irqs: [1, 0, 0, 1, 1] });
    const step = (name: string) => () => {
      log.push(`${name} ${bdf}`);
    };
    return {
      device,
      name: bdf,
      handle: index + 1,
      events: new DeviceEvents(device),
      unplug: step("unplug"),
      unmap: step("unmap"),
      giveBack: step("give back"),
      forget: step("forget"),
    };
  });
  const start = (watched: readonly WatchedDevice[] = devices) =>
    new DeviceWatch(
      watched,
      [],
      () => assert.fail("no log, no fault"),
      (line) => said.push(line),
    );
  return { devices, start, log, said };
}

taking("quiet before unmapped, unmapped before given back; once, and the other device stays", () => {
  const { devices, start, log, said } = rig();
  const watch = start();
  watch.look();
  assert.deepEqual(log, []);
  signal(devices[0]!.device.triggers[4]![0]!);
  watch.look();
  assert.deepEqual(log.splice(0), [`unplug ${NVME}`, `unmap ${NVME}`, `give back ${NVME}`, `forget ${NVME}`]);
  assert.deepEqual(said.splice(0), [
    `${NVME}: the host wants it back: it is taken from the guest, which goes on without it`,
  ]);
  signal(devices[0]!.device.triggers[4]![0]!);
  watch.look();
  assert.deepEqual(log, [], "the host repeats its request");
  signal(devices[1]!.device.triggers[3]![0]!);
  watch.look();
  assert.equal(log[0], `unplug ${EDU}`);
  assert.match(
    said.join(),
    /^0000:04:00\.0: an uncorrectable PCI Express error, .*: it is taken from the guest/,
  );
  watch.close();
});

taking("a step that fails is told, and the others are taken", () => {
  const { devices, start, log, said } = rig();
  const unplug = () => {
    throw new SystemError("VFIO_DEVICE_SET_IRQS", 5, "EIO");
  };
  const watch = start([{ ...devices[0]!, unplug }]);
  signal(devices[0]!.device.triggers[3]![0]!);
  watch.look();
  assert.deepEqual(log, [`unmap ${NVME}`, `give back ${NVME}`, `forget ${NVME}`]);
  assert.equal(said[1], `${NVME}: while it was taken away: VFIO_DEVICE_SET_IRQS: EIO`);
  watch.close();
});

taking("it is found by the timer, and not after close", async () => {
  const { devices, start, log } = rig();
  const watch = start();
  signal(devices[1]!.device.triggers[4]![0]!);
  await new Promise((resolve) => setTimeout(resolve, 400));
  assert.equal(log[0], `unplug ${EDU}`);
  watch.close();
  log.length = 0;
  signal(devices[0]!.device.triggers[4]![0]!);
  await new Promise((resolve) => setTimeout(resolve, 400));
  assert.deepEqual(log, []);
});

for (const each of [words, bursts, events, taking]) each.run();
