# Devices go back to the kernel drivers they were taken from: when unbound, when the daemon ends,
# and when the driver refuses what it was given.
# device: edu
# device: e1000e,romfile=
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
card=$(pci_address 8086 10d3)
# No driver of the kernel knows an edu; this one takes what it is told to.
modprobe -a uio_pci_generic e1000e
echo 1234 11e8 >/sys/bus/pci/drivers/uio_pci_generic/new_id

# expect_drivers EDU CARD: these have the two devices, and nothing is left of their override.
expect_drivers() {
    [ "$(pci_driver "$edu")" = "$1" ] || fail "$edu is bound to '$(pci_driver "$edu")', not to $1"
    [ "$(pci_driver "$card")" = "$2" ] || fail "$card is bound to '$(pci_driver "$card")', not to $2"
    for function in "$edu" "$card"; do
        override=$(cat "/sys/bus/pci/devices/$function/driver_override")
        [ "$override" = "(null)" ] || [ "$(pci_driver "$function")" = vfio-pci ] ||
            fail "the override of $function is '$override'"
    done
    echo "drivers     $edu $1, $card $2"
}

# The card's network interface: the kernel's driver works again.
has_interface() { test -d "/sys/bus/pci/devices/$card/net"; }

await "the network interface of $card" has_interface
expect_drivers uio_pci_generic e1000e

echo "--- bind and unbind by hand"
start_daemon ""
iohost bind "$edu"
expect_drivers vfio-pci e1000e
iohost call "$edu" factorial 5 | grep 120 || fail "the driver does not answer"
iohost unbind "$edu" | grep "bound to uio_pci_generic again" || fail "unbind says otherwise"
expect_drivers uio_pci_generic e1000e

echo "--- lent to a guest of its own, as scripts/vm --passthrough does"
vfio-check take "$edu" /var/lib/iohost
expect_drivers vfio-pci e1000e
vfio-check give-back "$edu" /var/lib/iohost
expect_drivers uio_pci_generic e1000e

echo "--- bind by hand, and the end of the daemon"
iohost bind "$edu"
expect_drivers vfio-pci e1000e
stop_daemon
expect_drivers uio_pci_generic e1000e

echo "--- a device that no plugin is for"
start_daemon ""
expect_refusal "$(refusal bind "$card")" no-driver "8086:10d3" "install a plugin"
expect_drivers uio_pci_generic e1000e
stop_daemon

echo "--- a driver that refuses its device"
start_daemon "address = \"$card\"
driver = \"edu\"
bind = true"
expect_refusal "$(down_reason)" driver-start "the driver did not start" "another one than it expects"
expect_drivers uio_pci_generic vfio-pci
stop_daemon
expect_drivers uio_pci_generic e1000e
await "the network interface of $card" has_interface
