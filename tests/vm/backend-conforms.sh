# VFIO's group and UIO pass the conformance tests on Debian's kernel, which has no nodes of devices;
# every refusal is named; a removal is survived.
# device: edu
. /share/tests/guest/pci.sh

edu=$(pci_address 1234 11e8)
vfio-check best vfio-group "$edu"
vfio-check conformance vfio-group "$edu"
(ulimit -l 8192 && vfio-check refusals vfio-group "$edu")
vfio-check not-open vfio-cdev "$edu" 'backend = "vfio-group"'
vfio-check not-open vfio-no-iommu "$edu" "behind an IOMMU"
vfio-check not-open uio "$edu" "modprobe uio_pci_generic"
unbind_from_vfio "$edu" # which the check has no right to any more at its end

modprobe uio_pci_generic
vfio-check conformance uio "$edu"
vfio-check removal vfio-group "$edu"
