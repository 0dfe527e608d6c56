# Functions for tests of disks, which say `# tools: yes`. Source it: . /share/tests/guest/disk.sh
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

mkdir -p /tools
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro,cache=mmap tools /tools
export PATH=$PATH:/tools

# nvme_addresses: of all NVMe controllers, a line each, in the order of their ports.
nvme_addresses() {
    local function
    for function in /sys/bus/pci/devices/*; do
        [ "$(cat "$function/class")" != 0x010802 ] || echo "${function##*/}"
    done
}

# start_disk ADDRESS [LINE]...: the daemon, with our driver on that controller as service `disk`, configured by further lines.
# It runs when this returns.
start_disk() {
    local address=$1
    shift
    start_daemon "$(printf '%s\n' 'name = "disk"' "address = \"$address\"" 'driver = "nvme"' 'bind = true' "$@")"
    await "the driver" is_ready
}

# attach NBD SERVICE DISK BLOCK: the kernel has the disk of the service as /dev/NBD, in blocks of BLOCK bytes, by way of
# the NBD server. Process $server is that.
attach() {
    modprobe nbd
    iohost block export "$2" --disk "$3" "/tmp/$1.socket" >"/tmp/$1.log" 2>&1 &
    server=$!
    await "the socket of $1" test -S "/tmp/$1.socket"
    nbd-client -unix "/tmp/$1.socket" "/dev/$1" -b "$4" >"/tmp/$1.client" 2>&1 || fail "$(cat "/tmp/$1.client" "/tmp/$1.log")"
    [ "$(cat "/sys/block/$1/queue/logical_block_size")" = "$4" ] || fail "$1 has blocks of another size than $4"
    [ "$(cat "/sys/block/$1/size")" -gt 0 ] || fail "$1 has no size"
}

# detach NBD: the kernel lets go of it, which its server outlives, with nothing to complain of.
detach() {
    nbd-client -d "/dev/$1" >/dev/null || fail "$1 was not let go"
    kill $server || fail "the NBD server of $1 has ended: $(cat "/tmp/$1.log")"
    wait $server || true
    [ "$(wc -l <"/tmp/$1.log")" -eq 1 ] || fail "the NBD server of $1 says: $(cat "/tmp/$1.log")"
    rm "/tmp/$1.socket"
}

# attach_ublk BLOCK_DEVICE ARGUMENT...: the kernel has a disk, as /dev/BLOCK_DEVICE, by ublk. Process $server is what
# serves it.
attach_ublk() {
    local device=$1
    shift
    # Not by the server's own redirection, which comes later: an earlier server's words may stand there.
    : >"/tmp/$device.log"
    iohost block attach "$@" >>"/tmp/$device.log" 2>&1 &
    server=$!
    await "/dev/$device" grep "/dev/$device" "/tmp/$device.log"
    [ -b "/dev/$device" ] || fail "there is no /dev/$device"
}

# no_errors: of disks, in the kernel's log.
no_errors() {
    ! dmesg | grep -e 'I/O error' -e 'EXT4-fs error' -e 'nbd.*timed out' -e 'ublk.*fail' || fail "the kernel has seen errors"
}

# fio_rounds BLOCK_DEVICE BLOCK SECONDS: four jobs at once, at depths of 1, 4, 16 and 64, read and write at random, each in
# 2 MiB of its own, in requests from BLOCK bytes to 64 KiB, with flushes in between; then each reads what it has written
# and compares checksums. That again and again, with other places and sizes, until so many seconds are over. It ends at the
# first error, with fio's words in /tmp/BLOCK_DEVICE.fio.log.
fio_rounds() {
    local end=$(($(uptime_seconds) + $3)) depth round=0
    cat >"/tmp/$1.fio" <<END
[global]
filename=/dev/$1
direct=1
ioengine=libaio
thread
rw=randrw
rwmixwrite=60
bsrange=$2-65536
size=2M
fdatasync=64
verify=crc32c
verify_fatal=1
END
    for depth in 1 4 16 64; do
        printf '[depth%s]\niodepth=%s\noffset=%sM\n' $depth $depth $((round * 8)) >>"/tmp/$1.fio"
        round=$((round + 1))
    done
    round=0
    until [ "$(uptime_seconds)" -ge $end ]; do
        round=$((round + 1))
        fio --randseed=$round "/tmp/$1.fio" >"/tmp/$1.fio.log" 2>&1 || return 1
        ! grep -v 'err= 0' "/tmp/$1.fio.log" | grep -i -e 'err=' -e 'verify:' || return 1
        [ "$(grep -c 'err= 0' "/tmp/$1.fio.log")" -eq 4 ] || return 1
        grep -e '^ *READ:' -e '^ *WRITE:' "/tmp/$1.fio.log" | sed 's/.*\(io=[^ ]*\).*/\1/' | tr '\n' ' ' >"/tmp/$1.fio.last"
        echo $round >"/tmp/$1.fio.rounds"
    done
}

uptime_seconds() {
    cut -d. -f1 /proc/uptime
}

# kill_hosts BLOCK_DEVICE: the one driver host is killed every second, but not before the one after it has served something,
# until process $fio has ended. The count is in $kills.
kill_hosts() {
    local before pid
    kills=0
    serves() { ! kill -0 $fio || [ "$(done_requests "$1")" -gt $((before + 8)) ]; }
    while kill -0 $fio 2>/dev/null; do
        sleep 1
        pid=$(status pid)
        kill -9 "$pid" || fail "process $pid of the driver host has ended by itself"
        kills=$((kills + 1))
        await "the driver after kill $kills" is_next $((kills + 1))
        before=$(done_requests "$1")
        await "requests to be done after kill $kills" serves "$1"
    done
}

# is_next INCARNATION: whether that driver runs.
is_next() {
    [ "$(status incarnation)" = "$1" ] && is_ready
}

# done_requests BLOCK_DEVICE: that the kernel has had done.
done_requests() {
    awk '{ print $1 + $5 }' "/sys/block/$1/stat"
}
