# Functions for tests, about PCI functions in sysfs. Source it: . /share/tests/guest/pci.sh
. /share/tests/guest/check.sh

# Prints the address of the only function with this vendor and device: pci_address 1234 11e8
pci_address() {
    local function found=
    for function in /sys/bus/pci/devices/*; do
        if [ "$(cat "$function/vendor" "$function/device" | tr '\n' ' ')" = "0x$1 0x$2 " ]; then
            [ -z "$found" ] || fail "more than one function is $1:$2"
            found=${function##*/}
        fi
    done
    [ -n "$found" ] || fail "no function is $1:$2"
    echo "$found"
}

# Prints the name of the driver a function is bound to, or nothing.
pci_driver() {
    [ ! -e "/sys/bus/pci/devices/$1/driver" ] || basename "$(readlink "/sys/bus/pci/devices/$1/driver")"
}

# Prints the number of a function's IOMMU group.
iommu_group() {
    [ -e "/sys/bus/pci/devices/$1/iommu_group" ] || fail "$1 is in no IOMMU group"
    basename "$(readlink "/sys/bus/pci/devices/$1/iommu_group")"
}

# Binds a function to vfio-pci, whatever it was bound to, or back.
bind_to_vfio() {
    echo vfio-pci >"/sys/bus/pci/devices/$1/driver_override"
    [ ! -e "/sys/bus/pci/devices/$1/driver" ] || echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
    echo "$1" >/sys/bus/pci/drivers_probe
}

unbind_from_vfio() {
    echo "$1" >/sys/bus/pci/drivers/vfio-pci/unbind
    echo >"/sys/bus/pci/devices/$1/driver_override"
}
