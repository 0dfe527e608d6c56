# fio finds what it has written, by way of our NBD server and our driver, on an NVMe controller with all that QEMU's has:
# 10 minutes (one in CI).
# device: nvme,serial=plain,drive=image
# image: image 64M
# qemu: -drive if=none,id=image,file=image,format=raw,discard=unmap
# tools: yes
# deadline: 1500
. /share/tests/guest/disk.sh

start_disk "$(nvme_addresses)" "restart = { hang_seconds = 0 }"
attach nbd0 disk 1 512
fio_rounds nbd0 512 "$(part_of 600)" || fail "fio: $(cat /tmp/nbd0.fio.log)"
echo "fio         $(cat /tmp/nbd0.fio.rounds) rounds without an error, each $(cat /tmp/nbd0.fio.last)"
[ "$(status incarnation)" = 1 ] || fail "the driver was started again: $(iohost crashes)"
! grep -e 'WARN' -e 'ERROR' /tmp/daemon.log || fail "the driver complains"
detach nbd0
no_errors
stop_daemon
