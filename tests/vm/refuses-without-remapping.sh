# Without interrupt remapping, a device is refused in both ways that VFIO has, until the risk is
# accepted as the next step says.
# guest: kernel
# device: edu
# kernel: nointremap
. /share/tests/guest/pci.sh

edu=$(pci_address 1234 11e8)
bind_to_vfio "$edu"
for way in vfio-cdev:iommufd vfio-group:vfio_iommu_type1; do
    parameter=/sys/module/${way#*:}/parameters/allow_unsafe_interrupts
    vfio-check not-open "${way%:*}" "$edu" "no interrupt remapping"
    vfio-check not-open "${way%:*}" "$edu" "echo 1 > $parameter"
    echo 1 >"$parameter" # the next step, taken
    vfio-check conformance "${way%:*}" "$edu"
done
