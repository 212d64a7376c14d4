// Scripts for the guests of the lab tests. What a guest has to tell is a line `guest: WORD …` on its console.

/** Functions for the guests' scripts. */
export const PRELUDE = `
say() { echo "guest: $*"; }
fail() { say "failed $*"; dmesg | tail -n 30; exit 1; }
wait_disk() {
  tries=0
  while [ ! -b /dev/nvme0n1 ]; do
    tries=$((tries + 1)); [ $tries -gt 600 ] && fail "no /dev/nvme0n1"
    sleep 0.1
  done
}
hash() { sha256sum /dev/nvme0n1 | cut -d ' ' -f 1; }
`;

/** Reads the whole disk through the module and tells its hash. */
export const READ_ALL = `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
wait_disk
say hash $(hash)
`;

/**
 * All of it: reads the disk, lets fio write and verify, reads again, shows that a device which is not assigned is left
 * alone, unloads everything, waits for a line, and tells whether its kernel had anything to complain about.
 */
export const READ_AND_WRITE = `${PRELUDE}
modprobe pvdma || fail pvdma
modprobe nvme || fail nvme
wait_disk
say cpus $(nproc)
say hash $(hash)
say fio
fio --name=v --filename=/dev/nvme0n1 --rw=randwrite --bs=4k --size=4M --ioengine=io_uring --iodepth=16 --direct=1 \\
  --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/tmp/fio --output-format=json || { cat /tmp/fio; fail fio; }
say verified $(grep -c . /tmp/fio) $(grep -m1 '"error"' /tmp/fio)
sync
echo 3 > /proc/sys/vm/drop_caches
say rehash $(hash)
# The host bridge is not assigned: a driver bound to it gets no ops of ours, and the host one question about it.
modprobe pci-stub
echo 1b36 0008 > /sys/bus/pci/drivers/pci-stub/new_id
for i in 1 2 3; do
  echo 0000:00:00.0 > /sys/bus/pci/drivers/pci-stub/unbind
  echo 0000:00:00.0 > /sys/bus/pci/drivers/pci-stub/bind
done
modprobe dmaprobe
dmesg | sed -n 's/.*dmaprobe: /guest: probe /p'
modprobe -r dmaprobe pci-stub
say before $(cat /sys/kernel/debug/pvdma/*/outstanding)
modprobe -r nvme || fail "nvme does not unload"
modprobe -r pvdma || fail "pvdma does not unload"
say unloaded
read -r line
say bad $(dmesg | grep -cE 'BUG|WARNING|Oops|DMA-API|left behind')
`;
