# The rules of interrupt sources hold on real VFIO, by INTx, MSI and MSI-X.
# device: edu
# device: e1000e,romfile=
. /share/tests/guest/pci.sh

edu=$(pci_address 1234 11e8)
card=$(pci_address 8086 10d3)
vfio-check interrupts vfio-group "$edu" intx
vfio-check interrupts vfio-group "$edu" msi
vfio-check interrupts vfio-group "$card" msi-x
