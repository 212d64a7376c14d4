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

/**
 * Takes its commands from the console, a line each, and says how each ended: RunningVmm.sh() is the other end. Needs fio.
 *
 * - `disk_of BDF`: the disk of an NVMe controller, such as /dev/nvme0n1; nothing when there is none.
 * - `verify DISK OPTIONS…`: fio writes at random and verifies; prints fio's error and the number of its I/Os.
 * - `throughput COUNT SECONDS DISK…`: fio reads at random from all the disks at once, COUNT times; prints each disk's I/Os
 *   per second, disk by disk.
 * - `bind BDF`: clears the kernel's log, binds nvme and waits; prints `disk` when there is one, `failed` when the driver has none of the device,
 *   `no disk` when it has it and says that there will be none.
 * - `complaints`: what the kernel has logged that it should not have.
 */
export const CONSOLE = `${PRELUDE}
disk_of() { ls -d /sys/bus/pci/devices/$1/nvme/nvme*/nvme*n1 2> /dev/null | sed 's|.*/|/dev/|'; }
fio_json() { fio --ioengine=io_uring --direct=1 --eta=never --output=/tmp/fio --output-format=json "$@" || { cat /tmp/fio; return 1; }; }
verify() {
  disk=$1; shift
  fio_json --name=verify --filename=$disk --rw=randwrite --verify=crc32c --do_verify=1 --verify_fatal=1 "$@" || return 1
  awk '/"error" :/ { error += $3 } /"total_ios" :/ { ios += $3 } END { print error, ios }' /tmp/fio
}
throughput() {
  jobs=; count=$1; seconds=$2; shift 2
  for i in $(seq $count); do
    together=--stonewall
    for disk; do jobs="$jobs --name=$disk-$i $together --filename=$disk"; together=; done
  done
  fio_json --thread --rw=randread --bs=4k --iodepth=16 --time_based --runtime=$seconds $jobs || return 1
  awk '/"read" :/ { read = 1 } /"iops" :/ && read { printf "%d ", $3; read = 0 }' /tmp/fio
}
bind() {
  dmesg -c > /dev/null
  device=/sys/bus/pci/devices/$1
  echo $1 > /sys/bus/pci/drivers/nvme/bind 2> /dev/null
  for tries in $(seq 600); do
    disk=$(disk_of $1)
    [ -n "$disk" ] && [ -b $disk ] && { echo disk; return; }
    [ -e $device/driver ] || { echo failed; return; }
    dmesg | grep -q 'IO queues not created' && { echo no disk; return; }
    sleep 0.1
  done
  echo "neither bound nor failed"
}
unbind() { [ ! -e /sys/bus/pci/devices/$1/driver ] || echo $1 > /sys/bus/pci/devices/$1/driver/unbind; }
complaints() {
  dmesg | grep -E 'BUG|WARNING|Oops|Call Trace|protection fault|blocked for more than|soft lockup|stall|I/O error|timeout|DMA-API'
  return 0
}
echo 60 > /proc/sys/kernel/hung_task_timeout_secs
dmesg -n 1 # what it logs stays out of what commands print; panics are shown all the same
stty -echo
say ready
while read -r line; do
  eval "$line" < /dev/null
  say did $?
done
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
  --eta=never --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/tmp/fio --output-format=json || { cat /tmp/fio; fail fio; }
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
