# What a backend without an IOMMU has to show. Source it: . /share/tests/guest/unsafe.sh
. /share/tests/guest/daemon.sh

# expect_unsafe BACKEND ADDRESS: it runs when allowed, says UNSAFE wherever it is seen, and refuses a
# driver that needs DMA.
expect_unsafe() {
    local device="address = \"$2\"
bind = true
backend = \"$1\""

    printf '[[device]]\n%s\n' "$device" >/tmp/refused.toml
    iohost daemon --config /tmp/refused.toml 2>/tmp/refused && fail "$1 was not refused"
    grep "$1 is UNSAFE" /tmp/refused || fail "refused with other words: $(cat /tmp/refused)"
    grep "allow_unsafe = true" /tmp/refused || fail "no next step: $(cat /tmp/refused)"

    start_daemon "$device
driver = \"edu\"
allow_unsafe = true"
    expect_refusal "$(down_reason)" backend-lacks-dma "$1 has no DMA" "through VFIO and an IOMMU"
    stop_daemon

    : >/tmp/daemon.log
    start_daemon "$device
driver = \"probe\"
allow_unsafe = true"
    await "the driver" is_ready
    [ "$(status backend)" = "$1" ] || fail "reached by '$(status backend)', not by $1"
    iohost status | grep "$2 .*$1 UNSAFE" || fail "the status does not say UNSAFE: $(iohost status)"
    iohost devices | grep "$2 .*$1 UNSAFE" || fail "the list does not say UNSAFE: $(iohost devices)"
    grep UNSAFE /tmp/daemon.log || fail "the log does not say UNSAFE"
    stop_daemon
}
