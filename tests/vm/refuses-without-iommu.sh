# Without an IOMMU, a device is refused and left as it was.
# device: edu
# kernel: intel_iommu=off
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true"
expect_refusal "$(down_reason)" no-iommu "$edu is behind no IOMMU" intel_iommu=on
expect_refusal "$(refusal bind "$edu")" no-iommu "$edu is behind no IOMMU" intel_iommu=on
[ -z "$(pci_driver "$edu")" ] || fail "$edu is bound to $(pci_driver "$edu") all the same"
stop_daemon

vfio-check no-iommu "$edu"
