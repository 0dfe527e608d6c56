# An error that a device reports reaches its driver and the policy; an access to a BAR that nobody answers reads as ones.
# device: virtio-rng-pci,id=rng,aer=on,disable-legacy=on,iommu_platform=on
# device: edu
# monitor: yes
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh
. /share/tests/guest/monitor.sh

rng=$(pci_address 1af4 1044)
edu=$(pci_address 1234 11e8)

# The root port tells the kernel of errors below it: SERR in its bridge control.
port=$(basename "$(dirname "$(readlink -f "/sys/bus/pci/devices/$rng")")")
printf '\002' | dd of="/sys/bus/pci/devices/$port/config" bs=1 seek=62 conv=notrunc 2>/dev/null

# start_with POLICY
start_with() {
    : >/tmp/daemon.log
    start_daemon "name = \"rng\"
address = \"$rng\"
driver = \"probe\"
bind = true
$1"
    await "the driver" is_ready
    watch_service rng
}

inject() {
    monitor "pcie_aer_inject_error rng POISON_TLP"
}

end() {
    kill "$watcher"
    stop_daemon
}

start_with ""
host=$(status pid)
inject
await "the error to reach the driver" sh -c 'iohost call rng events | grep -q Error'
[ "$(status pid)" = "$host" ] || fail "the driver was ended though nobody said so"
grep "the device has news" /tmp/daemon.log | head -n 1
end

start_with 'on_error = "reset"'
inject
await "the end of the driver" grep -q "ended device-error" /tmp/news
expect_news began
[ "$(status incarnation)" = 2 ] || fail "incarnation $(status incarnation)"
echo "on_error = reset: incarnation $(status incarnation), the device was $(status outcome)"
end

start_with 'on_error = "isolate"'
inject
await "the end of the driver" grep -q "ended device-error" /tmp/news
await "the device to be left alone" sh -c 'iohost status --json | grep -q "\"state\": *\"quarantined\""'
iohost status
iohost bind rng || fail "a person who asks was refused"
await "the driver" is_ready
end

# An access to a mapped BAR while the device does not decode memory: SIGBUS, without the handler.
: >/tmp/daemon.log
start_daemon "name = \"edu0\"
address = \"$edu\"
driver = \"probe\"
bind = true"
await "the driver" is_ready
host=$(status pid)
iohost call edu0 register | grep 16777453 || fail "the register does not read as it should"
iohost call edu0 decode 0
iohost call edu0 register | grep 4294967295 || fail "a BAR that nobody answers for does not read as ones"
await "the driver to be told" sh -c 'iohost call edu0 events | grep -q Error'
[ "$(status pid)" = "$host" ] || fail "the driver host did not survive"
stop_daemon
