# A device through VFIO on a machine without an IOMMU: refused while VFIO's own mode for that is off,
# then allowed, marked UNSAFE, given back.
# guest: kernel
# device: edu
# kernel: intel_iommu=off
. /share/tests/guest/pci.sh
. /share/tests/guest/unsafe.sh

edu=$(pci_address 1234 11e8)
mode=/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
start_daemon "address = \"$edu\"
driver = \"probe\"
bind = true
backend = \"vfio-no-iommu\"
allow_unsafe = true"
expect_refusal "$(down_reason)" no-iommu-mode-off "its no-IOMMU mode is off" "echo 1 > $mode"
stop_daemon

echo 1 >$mode # the next step, taken
vfio-check conformance vfio-no-iommu "$edu"
expect_unsafe vfio-no-iommu "$edu"
[ -z "$(pci_driver "$edu")" ] || fail "$edu is still bound to '$(pci_driver "$edu")'"
