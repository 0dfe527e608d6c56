# Vectors of MSI-X are resized ten thousand times under interrupts, and none is lost or reaches another source.
# device: e1000e,romfile=
# deadline: 900
. /share/tests/guest/pci.sh

vfio-check resize vfio-group "$(pci_address 8086 10d3)" "$(part_of 10000)"
