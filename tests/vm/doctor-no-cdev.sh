# Debian's kernel has no nodes for devices. Another one on the machine has: doctor's command starts that, where the finding
# is gone.
# device: edu
# reboots: kernel
. /share/tests/guest/pci.sh
. /share/tests/guest/doctor.sh
. /share/tests/guest/boot.sh

edu=$(pci_address 1234 11e8)
if is_second_boot; then
    examine "$edu"
    expect_no_finding no-cdev
    grep 'nodes of devices  *yes' /tmp/doctor || fail "no nodes of devices: $(cat /tmp/doctor)"
    grep 'reached by  *vfio-cdev' /tmp/doctor || fail "not by its node: $(cat /tmp/doctor)"
    echo "cured       no-cdev, by kernel $(uname -r)"
    exit 0
fi
install_boot_loader
examine "$edu"
expect_finding no-cdev "reached by their groups instead"
[ -z "$(command_of no-cdev)" ] || fail "a command, and no kernel to start: $(cat /tmp/doctor)"

# What a package of our kernel would leave in /boot.
echo CONFIG_VFIO_DEVICE_CDEV=y >/boot/config-6.12-rig
cure no-cdev "$edu" "reached by their groups instead"
fail "the machine was not started again"
