# How fast NVMe controllers without a disk behind them are read: one by the kernel's driver, as fio with io_uring sees it, one
# by ours, as a client process sees it. They take turns; each figure is the median of 12 slices.
# bench: yes
# qemu: -drive if=none,id=theirs,driver=null-co,size=1G,read-zeroes=on
# qemu: -drive if=none,id=ours,driver=null-co,size=1G,read-zeroes=on
# device: nvme,serial=theirs,drive=theirs
# device: nvme,serial=ours,drive=ours
# kernel: iommu=pt tsc=reliable clocksource=tsc mitigations=off
# tools: yes
# deadline: 900
. /share/tests/guest/disk.sh

modprobe nvme
theirs=$(nvme_addresses | sed -n 1p)
await "the kernel's disk" test -e "/sys/bus/pci/devices/$theirs/nvme"
disk=$(cd "/sys/bus/pci/devices/$theirs/nvme" && echo nvme*/nvme*n1)
disk=${disk##*/}
# Huge pages for memory of clients: the emulated IOMMU looks for each page that a disk writes.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled
start_disk "$(nvme_addresses | sed -n 2p)" "restart = { hang_seconds = 0 }"

slices=$(part_of 12)
seconds=2

# kernel PATTERN SIZE DEPTH: reads per second.
kernel() {
    fio --name=reads --filename="/dev/$disk" --direct=1 --ioengine=io_uring --rw="$1" --bs="$2" --iodepth="$3" \
        --time_based --runtime=$seconds --output-format=terse >/tmp/fio.log 2>&1 || fail "fio: $(cat /tmp/fio.log)"
    grep '^3;' /tmp/fio.log | cut -d';' -f8
}

# iohosts PATTERN SIZE DEPTH [--polled]: reads per second.
iohosts() {
    pattern=
    [ "$1" = randread ] || pattern=--sequential
    # shellcheck disable=SC2086 # nothing or one word
    iohost --json block bench disk $pattern --size "$2" --depth "$3" --seconds $seconds ${4:-} >/tmp/bench.log 2>&1 || fail "$(cat /tmp/bench.log)"
    sed -n 's/.*"per_second": *\([0-9]*\).*/\1/p' /tmp/bench.log
}

median() {
    sort -n "$1" | sed -n "$((($(wc -l <"$1") + 1) / 2))p"
}

# compare WORDS PATTERN SIZE DEPTH [--polled]
compare() {
    : >/tmp/theirs
    : >/tmp/ours
    slice=0
    while [ $slice -lt "$slices" ]; do
        kernel "$2" "$3" "$4" >>/tmp/theirs
        iohosts "$2" "$3" "$4" "${5:-}" >>/tmp/ours
        slice=$((slice + 1))
    done
    awk -v words="$1" -v ours="$(median /tmp/ours)" -v theirs="$(median /tmp/theirs)" \
        'BEGIN { printf "%-36s %9d/s, the kernel'"'"'s %7d/s, %5.2fx\n", words, ours, theirs, ours / theirs }'
}

compare "4 KiB, depth 1, polled" randread 4K 1 --polled
compare "4 KiB, depth 1, interrupts" randread 4K 1
compare "4 KiB, depth 32, polled" randread 4K 32 --polled
compare "4 KiB, depth 32, interrupts" randread 4K 32
compare "128 KiB in order, depth 8, polled" read 128K 8 --polled
compare "128 KiB in order, depth 8, interrupts" read 128K 8
stop_daemon
