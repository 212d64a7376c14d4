// The emulated NVMe disk in the lab, with one kernel in the guest: partitions, a file system, I/O that is verified, a
// VMM that is killed while its guest writes, and nvme-cli's view. VFIO is not touched: the host has no device to assign.
// Used by emul-nvme-6.1.test.ts and emul-nvme-6.12.test.ts, which run side by side.

import { suite } from "uvu";
import * as assert from "uvu/assert";
import { SOAK, sized } from "../soak.js";
import { buildGuestImage } from "./guest.js";
import { must } from "./host.js";
import { bootL1, type L1 } from "./l1.js";
import type { KernelSeries } from "./packages.js";
import { assertNothingLeft, commandTimeoutMs, endDriven, loadNvme } from "./recovery.js";
import { CONSOLE } from "./scripts.js";
import { assertViewsAgree, labTest, RunningVmm } from "./support.js";

/** In the host, in memory: its root is read-only. */
const DISK = "/tmp/disk.raw";
const DISK_MIB = 64;
const PARTITION = "/dev/nvme0n1p1";
/** Where sfdisk puts the first partition. */
const PARTITION_BYTES = 2 ** 20;
const FIO_MIB = sized(2, 16);

/**
 * - `file_system NAME OPTIONS…`: fio writes a file and verifies it; prints `error` and their number.
 * - `keep_writing`: begins writes that do not end and returns when many are done; if they end before that, prints why and
 *   fails.
 */
const FIO = `file_system() {
  name=$1; shift
  fio --name=$name --directory=/mnt --rw=randwrite --bs=4k --size=${FIO_MIB}M --direct=1 --verify=crc32c --do_verify=1 \\
    --verify_fatal=1 --eta=never --output=/tmp/fio --output-format=json "$@" || { cat /tmp/fio; return 1; }
  awk '/"error" :/ { error += $3 } END { print "error " error }' /tmp/fio
}
written() { read -r _ _ _ _ count _ < /sys/block/nvme0n1/stat; echo $count; }
keep_writing() {
  rm -f /tmp/ended
  before=$(written)
  {
    fio --name=busy --directory=/mnt --rw=randwrite --bs=4k --size=${FIO_MIB}M --direct=1 --ioengine=io_uring \\
      --iodepth=32 --time_based --runtime=1d --eta=never > /tmp/busy 2>&1
    : > /tmp/ended
  } &
  until [ $(($(written) - before)) -ge 200 ]; do
    [ ! -e /tmp/ended ] || { cat /tmp/busy; return 1; }
    sleep 0.1
  done
}
`;

/** What nvme-cli shows is sane, and it has no complaint. */
async function askNvmeCli(vmm: RunningVmm): Promise<void> {
  const nvme = async (command: string): Promise<string> => {
    const output = await vmm.sh(`nvme ${command} 2> /tmp/err`);
    assert.is(await vmm.sh("cat /tmp/err"), "", `nvme ${command}`);
    return output;
  };
  const json = async (command: string) =>
    JSON.parse(await nvme(`${command} -o json`)) as Record<string, unknown>;
  const controller = await json("id-ctrl /dev/nvme0");
  assert.is(controller.ver, 0x10400, "NVMe 1.4");
  assert.is(controller.nn, 1);
  const namespace = await json("id-ns /dev/nvme0n1");
  assert.is(namespace.nsze, (DISK_MIB * 2 ** 20) / 512);
  const smart = await json("smart-log /dev/nvme0");
  assert.is(smart.critical_warning, 0);
  assert.ok(Number(smart.host_read_commands) > 0, "the driver has read");
  await vmm.sh("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=10 iflag=direct 2> /dev/null");
  const later = await json("smart-log /dev/nvme0");
  assert.ok(
    Number(later.host_read_commands) >= Number(smart.host_read_commands) + 10,
    "and the reads are counted",
  );
  // Few entries, since a guest here prints slowly. Not show-regs: it wants the registers mapped, which the kernel
  // refuses while nvme has them (IO_STRICT_DEVMEM).
  for (const command of ["error-log /dev/nvme0 -e 4", "fw-log /dev/nvme0", "list-ns /dev/nvme0", "list"])
    await nvme(command);
  for (const feature of [1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    await nvme(`get-feature /dev/nvme0 -f ${feature}${feature === 5 ? " -n 1" : ""}`); // error recovery: a namespace's
  // A command that the controller refuses is in its error log, with the status the guest was told.
  const refused = await vmm.sh("nvme get-log /dev/nvme0 --log-id=0xee --log-len=512 2>&1 || true");
  assert.match(refused, /Invalid Log Page|INVALID_LOG_PAGE|0x4109|0x109/i);
  // NVMe 1.4, figure 247: reserved bytes of Identify Controller, which are zero.
  assert.is(await vmm.sh("nvme id-ctrl /dev/nvme0 -b > /tmp/id; wc -c < /tmp/id"), "4096\n");
  for (const [first, last] of [
    [134, 252],
    [372, 511],
    [544, 767],
    [1024, 1791],
  ] as const) {
    const others = `tail -c +${first + 1} /tmp/id | head -c ${last - first + 1} | tr -d '\\0' | wc -c`;
    assert.is(await vmm.sh(others), "0\n", `reserved bytes ${first} to ${last}`);
  }
}

export function runEmulatedNvmeTests(kernel: KernelSeries): void {
  const test = suite(`emul-nvme-${kernel}`);
  let host: L1;
  test.before(async () => {
    host = await bootL1({ name: `emul-nvme-${kernel}`, memoryMiB: 2048, hugePages: kernel === "6.12" });
  });
  test.after(() => host?.close());

  const start = async (): Promise<RunningVmm> => {
    const image = await buildGuestImage({
      kernel,
      script: FIO + CONSOLE,
      modules: ["nvme", "ext4", "crc32c_generic"],
      tools: ["fio", "nvme", "sfdisk", "mkfs.ext4", "fsck.ext4"],
    });
    const vmm = await RunningVmm.start(host, ["--cpus", "2", "--assign", `emul:nvme,file=${DISK}`, image]);
    await vmm.guestSays("ready");
    await vmm.sh("modprobe crc32c_generic; modprobe ext4; modprobe pvdma");
    assert.equal(await loadNvme(vmm), ["/dev/nvme0n1"]);
    return vmm;
  };
  /** What the guest's fsck says of a file system that nobody uses: 0 for nothing to mend. */
  const fsck = (vmm: RunningVmm) =>
    vmm.sh(`fsck.ext4 -fn ${PARTITION} > /tmp/fsck 2>&1 || { cat /tmp/fsck; false; }`);
  /** The host's word on the same. */
  const hostFsck = () => must(host, `e2fsck -fn '${DISK}?offset=${PARTITION_BYTES}'`);
  const hostHash = async () => (await must(host, `sha256sum ${DISK}`)).split(" ")[0]!;
  const guestHash = async (vmm: RunningVmm) =>
    (await vmm.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/nvme0n1", commandTimeoutMs)).split(
      " ",
    )[0]!;
  const seal = (vmm: RunningVmm) =>
    vmm.sh(
      "dd if=/dev/urandom of=/mnt/sealed bs=64k count=16 2> /dev/null && sync && sha256sum < /mnt/sealed",
    );
  const finish = async (vmm: RunningVmm) => {
    const hash = await guestHash(vmm);
    // The driver says that it will wait as long for a shutdown as the controller asks for: that, and no more.
    const complaints = (await vmm.sh("complaints")).replace(
      /^.*nvme nvme0: Shutdown timeout set to 60 seconds\n/m,
      "",
    );
    assert.is(complaints, "", "the guest's kernel log");
    const { host: figures } = await assertViewsAgree(vmm);
    assert.is(figures.get("dma/faults"), 0, "refused accesses");
    await assertNothingLeft(vmm);
    await endDriven(vmm);
    assert.is(await hostHash(), hash, "the file holds what the guest reads");
    await hostFsck();
  };

  labTest(
    test,
    `a ${kernel} guest partitions, formats, verifies, and leaves a clean file system; nvme-cli has no complaint`,
    () => host,
    async () => {
      await must(host, `rm -f ${DISK}; truncate -s ${DISK_MIB}M ${DISK}; ! ls /dev/vfio/[0-9]*`);
      const vmm = await start();
      await vmm.sh("echo ',,L' | sfdisk -q /dev/nvme0n1");
      await vmm.sh(
        `until [ -b ${PARTITION} ]; do sleep 0.1; done; mkfs.ext4 -q ${PARTITION} && mount -t ext4 ${PARTITION} /mnt`,
      );
      assert.is(await vmm.sh("file_system psync --ioengine=psync", commandTimeoutMs), "error 0\n");
      assert.is(
        await vmm.sh("file_system uring --ioengine=io_uring --iodepth=32", commandTimeoutMs),
        "error 0\n",
      );
      await vmm.sh("rm /mnt/psync* /mnt/uring* && fstrim /mnt && umount /mnt");
      await fsck(vmm);
      await askNvmeCli(vmm);
      await finish(vmm);
    },
  );

  // The guest's kernel makes no difference to that; the soak does it with both.
  if (SOAK || kernel === "6.12") {
    labTest(
      test,
      `a ${kernel} guest whose VMM is killed in the middle of I/O loses nothing that was synced`,
      () => host,
      async () => {
        const killed = await start();
        await killed.sh(`mount -t ext4 ${PARTITION} /mnt`);
        const sealed = await seal(killed);
        await killed.sh("keep_writing");
        killed.process.kill("SIGKILL");
        await killed.process.exited;

        const vmm = await start();
        // 0 or 1: nothing to mend but what the journal knows.
        await vmm.sh(`fsck.ext4 -p ${PARTITION} > /tmp/fsck 2>&1 || [ $? = 1 ] || { cat /tmp/fsck; false; }`);
        await vmm.sh(`mount -t ext4 ${PARTITION} /mnt`);
        assert.is(await vmm.sh("sha256sum < /mnt/sealed"), sealed, "what was synced before the kill");
        await vmm.sh("umount /mnt");
        await fsck(vmm);
        await finish(vmm);
      },
    );
  }

  test.run();
}
