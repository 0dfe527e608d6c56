# A driver finds capabilities, link, power and memory of a real function, and saves and restores it.
# device: edu
# device: e1000e,romfile=
. /share/tests/guest/pci.sh

device-check all vfio-group "$(pci_address 1234 11e8)"
device-check all vfio-group "$(pci_address 8086 10d3)"
