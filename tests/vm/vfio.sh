# The ground the other tests stand on: an IOMMU, and a device that vfio-pci takes and gives back.
# device: edu
. /share/tests/guest/pci.sh

dmesg | grep 'DMAR: IOMMU enabled' || fail "the kernel did not turn the IOMMU on"
dmesg | grep 'DMAR-IR: Enabled IRQ remapping' || fail "interrupts are not remapped"

edu=$(pci_address 1234 11e8)
group=$(iommu_group "$edu")
echo "edu is $edu, in IOMMU group $group"
[ ! -e "/dev/vfio/$group" ] || fail "/dev/vfio/$group exists before anything is bound"

bind_to_vfio "$edu"
[ "$(pci_driver "$edu")" = vfio-pci ] || fail "$edu is bound to '$(pci_driver "$edu")'"
[ -c "/dev/vfio/$group" ] || fail "no node /dev/vfio/$group: $(ls /dev/vfio)"

unbind_from_vfio "$edu"
[ -z "$(pci_driver "$edu")" ] || fail "$edu is still bound to '$(pci_driver "$edu")'"
[ ! -e "/dev/vfio/$group" ] || fail "/dev/vfio/$group outlived the binding"
