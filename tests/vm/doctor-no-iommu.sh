# The IOMMU is off by the kernel command line: doctor's command changes that line and starts the machine again, where the
# finding is gone.
# device: edu
# kernel: intel_iommu=off quiet
. /share/tests/guest/pci.sh
. /share/tests/guest/doctor.sh
. /share/tests/guest/boot.sh

edu=$(pci_address 1234 11e8)
if is_second_boot; then
    examine "$edu"
    expect_no_finding no-iommu
    echo "cured       no-iommu, by $(cat /proc/cmdline)"
    exit 0
fi
install_boot_loader
cure no-iommu "$edu" "the kernel command line says intel_iommu=off"
fail "the machine was not started again"
