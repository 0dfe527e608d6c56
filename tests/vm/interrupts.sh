# The rules of interrupt sources hold on real VFIO, by INTx, MSI and MSI-X, and the kernel has counted
# the interrupts.
# device: e1000e,romfile=
. /share/tests/guest/pci.sh

card=$(pci_address 8086 10d3)
for kind in intx msi msi-x; do
    echo "--- by $kind"
    vfio-check interrupts "$card" $kind
done
