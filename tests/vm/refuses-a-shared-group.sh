# A device whose IOMMU group has a member that the kernel uses is refused, and that member named:
# before it is bound, and when somebody has bound it all the same.
# device: edu,multifunction=on,addr=0.0
# qemu: -device nvme,serial=1,bus=port1,addr=0.1
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=0000:01:00.0
nvme=0000:01:00.1
modprobe nvme
await "the driver of $nvme" test -e "/sys/bus/pci/devices/$nvme/driver"
group=$(iommu_group "$edu")
unbind="echo $nvme > /sys/bus/pci/devices/$nvme/driver/unbind"

start_daemon ""
expect_refusal "$(refusal bind $edu)" \
    group-not-viable "IOMMU group $group cannot be used: $nvme is bound to nvme" "$unbind"
[ -z "$(pci_driver $edu)" ] || fail "$edu is bound to $(pci_driver $edu) all the same"

bind_to_vfio $edu
expect_refusal "$(refusal bind $edu)" \
    group-not-viable "IOMMU group $group cannot be used: $nvme is bound to nvme" "$unbind"

sh -c "$unbind" # the next step, taken
iohost bind $edu
stop_daemon
unbind_from_vfio $edu

echo $nvme >/sys/bus/pci/drivers_probe
await "the driver of $nvme" test -e "/sys/bus/pci/devices/$nvme/driver"
vfio-check shared vfio-group $edu $nvme
