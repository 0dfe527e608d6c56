# A device whose reset fails is left alone until somebody asks, and a failed reset of the function is followed by one of
# its bus where that is ours.
# device: edu
# qemu: -device e1000e,romfile=,addr=1d.0
# deadline: 300
. /share/tests/guest/daemon.sh
. /share/tests/guest/pci.sh

alone=0000:00:1d.0 # on the root bus, which nobody can reset
below=$(pci_address 1234 11e8)

# start ADDRESS: a driver on a device that is reset by itself, which then cannot be any more: VFIO does not know.
start() {
    : >/tmp/daemon.log
    start_daemon "name = \"card\"
address = \"$1\"
driver = \"probe\"
bind = true"
    await "the driver" is_ready
    [ "$(status outcome)" = reset ] || fail "it was $(status outcome) before the start: $(iohost status)"
    grep "the device is safe" /tmp/daemon.log | tail -n 1
    echo >"/sys/bus/pci/devices/$1/reset_method"
}

start "$below"
iohost unbind card || fail "it was not given back though its bus can be reset"
grep "the device is safe" /tmp/daemon.log | tail -n 1 | grep "bus reset (hot) with $below" || fail "no bus reset"
stop_daemon

start "$alone"
expect_refusal "$(refusal unbind card)" device-quarantined "its reset failed: function reset" "iohost bind card"
[ "$(status state)" = quarantined ] || fail "it is $(status state)"
[ "$(status outcome)" = quarantined ] || fail "its device is $(status outcome)"
[ "$(pci_driver "$alone")" = vfio-pci ] || fail "a broken device was given to '$(pci_driver "$alone")'"
iohost status
sleep 3
[ "$(status incarnation)" = 1 ] || fail "it was started again by itself"

echo default >"/sys/bus/pci/devices/$alone/reset_method"
iohost bind card
await "the driver" is_ready
[ "$(status outcome)" = reset ] || fail "its device is $(status outcome)"
stop_daemon
