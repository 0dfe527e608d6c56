# A whole IOMMU group is taken and given back; all of it or nothing. What is to persist is taken again
# by the next daemon, and what is not goes back, also after a daemon that was killed. A second daemon
# leaves alone what the first one has.
# device: pcie-pci-bridge,id=bridge
# qemu: -drive if=none,id=disk,format=raw,file=fat:.,snapshot=on
# qemu: -device edu,bus=bridge,addr=1.0 -device nvme,serial=1,bus=bridge,addr=2.0,drive=disk
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=0000:02:01.0
nvme=0000:02:02.0
modprobe -a nvme vfat nls_cp437 nls_ascii
await "the disk's partition" test -b /dev/nvme0n1p1

# expect_drivers EDU NVME NOTES
expect_drivers() {
    [ "$(pci_driver $edu)" = "$1" ] || fail "$edu is bound to '$(pci_driver $edu)', not to '$1'"
    [ "$(pci_driver $nvme)" = "$2" ] || fail "$nvme is bound to '$(pci_driver $nvme)', not to '$2'"
    notes=$(find /var/lib/iohost -name '*.json' 2>/dev/null | wc -l)
    [ "$notes" = "$3" ] || fail "there are $notes notes, not $3"
    echo "drivers     $edu '$1', $nvme '$2', $3 notes"
}

echo "--- all of it or nothing"
start_daemon ""
mkdir -p /mnt
mount -t vfat /dev/nvme0n1p1 /mnt
expect_refusal "$(refusal bind --group $edu)" in-use \
    "PCI device $nvme is in use: /dev/nvme0n1p1 is mounted on /mnt" "umount /mnt"
expect_drivers "" nvme 0
umount /mnt

iohost bind --group $edu
expect_drivers vfio-pci vfio-pci 2
iohost call $edu factorial 5 | grep 120 || fail "the driver does not answer"
expect_refusal "$(refusal bind $nvme)" taken "was taken together with $edu" "iohost unbind $edu"

echo "--- a second daemon"
iohost --runtime-dir /tmp/second daemon --config /tmp/iohost.toml 2>>/tmp/second.log &
second=$!
await "the second daemon's socket" test -S /tmp/second/io.iohost
expect_refusal "$(refusal --runtime-dir /tmp/second bind --persist $edu)" taken \
    "taken by another iohost, process $daemon" "stop that daemon"
kill -TERM $second
wait $second || fail "the second daemon ended with exit code $?"
expect_drivers vfio-pci vfio-pci 2

echo "--- given back"
iohost unbind $edu
expect_drivers "" nvme 0

echo "--- after a daemon that was killed"
iohost bind --group $edu
kill -9 "$daemon"
wait "$daemon" || true
expect_drivers vfio-pci vfio-pci 2
start_daemon ""
await "the driver" is_ready
iohost call $edu factorial 5 | grep 120 || fail "the driver does not answer"
expect_drivers vfio-pci vfio-pci 2
iohost unbind $edu
expect_drivers "" nvme 0

echo "--- after a daemon that was killed with its driver"
iohost bind --group $edu
driver=$(status pid)
kill -9 "$daemon" "$driver"
wait "$daemon" || true
start_daemon ""
await "the driver" is_ready
iohost unbind $edu
expect_drivers "" nvme 0

echo "--- persistent"
iohost bind --group --persist $edu
kill -9 "$daemon"
wait "$daemon" || true
start_daemon ""
await "the driver" is_ready
iohost call $edu factorial 5 | grep 120 || fail "the driver does not answer"
expect_drivers vfio-pci vfio-pci 2
stop_daemon
expect_drivers "" nvme 1
start_daemon ""
await "the driver" is_ready
expect_drivers vfio-pci vfio-pci 2
iohost unbind $edu
expect_drivers "" nvme 0
stop_daemon
start_daemon ""
await "an answer" is_settled
! grep $edu /tmp/status.json || fail "it persists"
expect_drivers "" nvme 0
stop_daemon
