# Interrupts are not remapped, by the kernel command line: doctor's command changes that line and starts the machine
# again, where the finding is gone. Before, the risk is accepted, as the finding's next step says: a warning is left.
# device: edu
# kernel: nointremap
. /share/tests/guest/pci.sh
. /share/tests/guest/doctor.sh
. /share/tests/guest/boot.sh

edu=$(pci_address 1234 11e8)
if is_second_boot; then
    examine "$edu"
    expect_no_finding no-interrupt-remapping
    echo "cured       no-interrupt-remapping, by $(cat /proc/cmdline)"
    exit 0
fi
parameter=/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
examine "$edu"
expect_finding no-interrupt-remapping "the kernel command line says nointremap"
grep -F "echo 1 > $parameter" /tmp/doctor || fail "no word of the risk: $(cat /tmp/doctor)"
echo 1 >$parameter
examine "$edu"
expect_no_finding no-interrupt-remapping
cure unsafe-interrupts "$edu" "vfio_iommu_type1 was told to accept that"
[ "$(cat $parameter)" = N ] || fail "the risk is still accepted"

install_boot_loader
cure no-interrupt-remapping "$edu" "the kernel command line says nointremap"
fail "the machine was not started again"
