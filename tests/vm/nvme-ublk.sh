# Disks behind our driver are block devices of the kernel's by ublk: one with blocks of 512 bytes, one with 4096. A file system
# is made, used, and found whole; fio finds what it has written while the driver host is killed every second. What is mounted
# is not taken away, and what a dead server left can be.
# guest: kernel
# image: first 64M
# image: second 64M
# qemu: -drive if=none,id=first,file=first,format=raw,discard=unmap
# qemu: -drive if=none,id=second,file=second,format=raw,discard=unmap
# device: nvme,serial=two,id=two
# qemu: -device nvme-ns,bus=two,drive=first,nsid=1
# qemu: -device nvme-ns,bus=two,drive=second,nsid=2,logical_block_size=4096,physical_block_size=4096
# tools: yes
# deadline: 1200
. /share/tests/guest/disk.sh

start_disk "$(nvme_addresses)" "restart = { most = 10000, pause_seconds = 0, hang_seconds = 0 }"

echo "--- without ublk"
expect_refusal "$(refusal block attach disk)" no-ublk "has not loaded it" "modprobe ublk_drv"
modprobe ublk_drv
expect_refusal "$(refusal block attach disk --disk 9)" no-such-disk "no disk 9" "iohost block ls"
expect_refusal "$(refusal block detach 0)" no-such-block-device "no ublk device 0" "ls /dev/ublkc"

# field DEVICE FIELD: what the kernel says of a block device.
field() {
    cat "/sys/block/$1/$2"
}

# server_ends: well, and with its device gone.
server_ends() {
    kill -TERM $server
    wait $server || fail "the server of $1 has ended with $?: $(cat "/tmp/$1.log")"
    [ ! -e "/dev/$1" ] || fail "/dev/$1 is still there"
    [ ! -e "/dev/ublkc${1#ublkb}" ] || fail "the device of $1 was not removed"
}

echo "--- two disks at a time"
attach_ublk ublkb0 disk
first=$server
attach_ublk ublkb1 disk --disk 2
[ "$(field ublkb0 queue/logical_block_size) $(field ublkb1 queue/logical_block_size)" = "512 4096" ] || fail "other blocks"
[ "$(field ublkb0 size) $(field ublkb1 size)" = "131072 131072" ] || fail "other sizes"
[ "$(field ublkb0 queue/write_cache)" = "write back" ] || fail "nobody would flush: $(field ublkb0 queue/write_cache)"
[ "$(field ublkb0 queue/discard_max_bytes)" -gt 0 ] || fail "nothing is discarded"
[ "$(field ublkb0 queue/write_zeroes_max_bytes)" -gt 0 ] || fail "zeroes are written one by one"
head -c 3000000 /dev/urandom >/tmp/random
dd if=/tmp/random of=/dev/ublkb1 bs=64k conv=fsync 2>/dev/null
iohost block read disk --disk 2 --length 3000000 | cmp - /tmp/random || fail "the disk has something else than was written"
iohost block write disk --disk 2 --offset 4096 /tmp/random >/dev/null
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/ublkb1 bs=4096 skip=1 2>/dev/null | head -c 3000000 | cmp - /tmp/random || fail "something else was read"
server_ends ublkb1
server=$first

echo "--- a file system"
mkfs.ext4 -q /dev/ublkb0
mkdir /tmp/mounted
mount -t ext4 -o discard /dev/ublkb0 /tmp/mounted
cp -r /share/tests /tmp/mounted/tests
cp /tmp/random /tmp/mounted/random
kill -INT $server
await "a refusal to take away what is mounted" grep "ublkb0 is in use" /tmp/ublkb0.log
expect_refusal "$(refusal block detach 0)" block-in-use "ublkb0 is in use" "unmount"
fstrim /tmp/mounted
umount /tmp/mounted
e2fsck -f -n /dev/ublkb0 >/tmp/e2fsck.log || fail "$(cat /tmp/e2fsck.log)"
mount -t ext4 /dev/ublkb0 /tmp/mounted
diff -r /share/tests /tmp/mounted/tests || fail "files are not as they were written"
cmp /tmp/random /tmp/mounted/random
echo "files       $(find /tmp/mounted/tests -type f | wc -l) are what was written"
umount /tmp/mounted

echo "--- the driver host is killed"
fio_rounds ublkb0 512 "$(part_of 120)" &
fio=$!
kill_hosts ublkb0
wait $fio || fail "fio: $(cat /tmp/ublkb0.fio.log)"
echo "fio         $(cat /tmp/ublkb0.fio.rounds) rounds without an error over $kills kills, each $(cat /tmp/ublkb0.fio.last)"
no_errors
server_ends ublkb0

echo "--- the server is killed"
attach_ublk ublkb0 disk
dd if=/dev/ublkb0 of=/tmp/some bs=1M count=1 2>/dev/null
kill -9 $server
wait $server || true
[ -e /dev/ublkc0 ] || fail "the kernel removes it by itself: detach is not needed"
iohost block detach 0
[ ! -e /dev/ublkc0 ] || fail "the device is still there"
attach_ublk ublkb0 disk
iohost block detach 0
wait $server || fail "the server has ended with $?: $(cat /tmp/ublkb0.log)"
[ ! -e /dev/ublkc0 ] || fail "the device is still there"

echo "--- the disk is taken away"
attach_ublk ublkb0 disk
iohost unbind disk
! dd if=/dev/ublkb0 of=/tmp/some bs=64k count=1 2>/dev/null || fail "something was read from a disk that is gone"
server_ends ublkb0
stop_daemon
