# What goes wrong with an NVMe disk reaches its clients as what it is: a medium that cannot be read or written in one place, a
# controller that takes too long, one that is unplugged under load.
# device: nvme,id=bad,serial=bad,drive=bad
# device: nvme,id=slow,serial=slow,drive=slow
# image: bad-image 32M
# image: slow 32M
# qemu: -drive if=none,id=bad,file=blkdebug:blkdebug:bad-image,format=raw
# qemu: -blockdev driver=raw,node-name=slow,file.driver=file,file.filename=slow
# monitor: yes
# tools: yes
# deadline: 600
. /share/tests/guest/disk.sh
. /share/tests/guest/hotplug.sh

bad=$(nvme_addresses | sed -n 1p)
slow=$(nvme_addresses | sed -n 2p)

start() {
    : >/tmp/daemon.log
    start_disk "$1" "restart = { hang_seconds = 0 }"
}

# Bytes at 8 and 16 MiB, see tests/vm/outside/nvme-errors.sh.
echo "--- a bad medium"
start "$bad"
attach nbd0 disk 1 512
dd if=/dev/zero of=/tmp/block bs=4096 count=1 2>/dev/null
expect_refusal "$(refusal block read disk /tmp/read --offset 8M --length 4K)" block-failed "unrecovered read error" ""
expect_refusal "$(refusal block write disk /tmp/block --offset 16M)" block-failed "write fault" ""
dd if=/dev/nbd0 of=/dev/null bs=4096 skip=2048 count=1 iflag=direct 2>/tmp/dd && fail "a bad block was read"
grep "Input/output error" /tmp/dd || fail "another error: $(cat /tmp/dd)"
dd if=/dev/zero of=/dev/nbd0 bs=4096 seek=4096 count=1 oflag=direct 2>/tmp/dd && fail "a bad block was written"
grep "Input/output error" /tmp/dd || fail "another error: $(cat /tmp/dd)"
# The blocks beside them.
dd if=/dev/nbd0 of=/dev/null bs=4096 skip=2049 count=1 iflag=direct 2>/dev/null || fail "a good block is not read"
dd if=/dev/nbd0 of=/dev/null bs=4096 skip=2047 count=1 iflag=direct 2>/dev/null || fail "a good block is not read"
[ "$(status incarnation)" = 1 ] || fail "the driver was started again: $(iohost crashes)"
! grep "the controller is reset" /tmp/daemon.log || fail "the controller was reset for it"
detach nbd0
stop_daemon

echo "--- a controller that takes too long"
start "$slow"
attach nbd0 disk 1 512
# One command per second: those behind it are late after ten seconds, cannot be aborted, and are done again.
monitor "block_set_io_throttle slow 0 0 0 1 0 0"
iohost --json block bench disk --depth 32 --seconds 1 >/tmp/bench.log 2>&1 &
bench=$!
await "an abort" grep -q "a command is late, it is aborted" /tmp/daemon.log
await "a reset" grep -q "the controller is reset" /tmp/daemon.log
monitor "block_set_io_throttle slow 0 0 0 0 0 0"
wait $bench || fail "a request was not done: $(cat /tmp/bench.log)"
grep -e "late" -e "is reset" /tmp/daemon.log | tail -n 2
# QEMU completes what is under way while the controller is being disabled.
grep "not under way" /tmp/daemon.log && fail "a completion of before the reset was taken for one after it"
[ "$(status incarnation)" = 1 ] || fail "the driver was started again: $(iohost crashes)"

echo "--- a controller that is unplugged"
watch_service disk
fio_rounds nbd0 512 600 &
fio=$!
loaded() { [ "$(done_requests nbd0)" -gt 100 ]; }
await "some load" loaded
device_del slow "$slow"
expect_news "ended removed"
wait $fio && fail "fio was told that all went well"
grep -m 1 -o "Input/output error" /tmp/nbd0.fio.log || fail "another error: $(cat /tmp/nbd0.fio.log)"
expect_refusal "$(refusal block read disk /tmp/read --length 4K)" not-running "was removed" "when the device comes back"
dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null && fail "a disk that is gone was read"
kill $watcher
detach nbd0
stop_daemon
