# NVMe controllers that lack something: one of two disks, the second with blocks of 4096 bytes; one with a single pair of
# I/O queues, one vector and commands of 8 KiB at most; one with fewer vectors than queues; one that interrupts by its
# line. fio finds on each what it has written.
# image: first 32M
# image: second 32M
# image: few 32M
# image: shared 32M
# image: line 32M
# qemu: -drive if=none,id=first,file=first,format=raw,discard=unmap
# qemu: -drive if=none,id=second,file=second,format=raw,discard=unmap
# qemu: -drive if=none,id=few,file=few,format=raw,discard=unmap
# qemu: -drive if=none,id=shared,file=shared,format=raw,discard=unmap
# qemu: -drive if=none,id=line,file=line,format=raw,discard=unmap
# device: nvme,serial=two,id=two
# qemu: -device nvme-ns,bus=two,drive=first,nsid=1
# qemu: -device nvme-ns,bus=two,drive=second,nsid=2,logical_block_size=4096,physical_block_size=4096
# device: nvme,serial=few,drive=few,max_ioqpairs=1,msix_qsize=1,mdts=1
# device: nvme,serial=shared,drive=shared,msix_qsize=2,mdts=2
# device: nvme,serial=line,drive=line
# tools: yes
# deadline: 900
. /share/tests/guest/disk.sh

seconds=$(part_of 60)

# variant NUMBER EXPECTED [LINES]: the driver on the controller behind that port, configured by further LINES; the words that
# it has to say of it.
variant() {
    echo "--- $2"
    : >/tmp/daemon.log
    start_disk "$(nvme_addresses | sed -n "$1p")" "restart = { hang_seconds = 0 }" "${3:-}"
    await "the driver to say '$2'" grep -q "the controller works.*$2" /tmp/daemon.log
}

# try DISK BLOCK: one of its disks.
try() {
    attach nbd0 disk "$1" "$2"
    fio_rounds nbd0 "$2" "$seconds" || fail "fio: $(cat /tmp/nbd0.fio.log)"
    echo "fio         disk $1: $(cat /tmp/nbd0.fio.rounds) rounds, each $(cat /tmp/nbd0.fio.last)"
    detach nbd0
}

variant 1 "disks=2"
iohost block info disk --disk 2 | grep "block *4096"
try 1 512
try 2 4096
stop_daemon

variant 2 "queues=1 .*vectors=1 "
iohost block info disk | grep "at once *8.00 KiB" || fail "more than 8 KiB at once"
try 1 512
stop_daemon

variant 3 "vectors=2 "
try 1 512
stop_daemon

variant 4 "vectors=1 " 'interrupts = ["intx"]'
try 1 512
stop_daemon
no_errors
