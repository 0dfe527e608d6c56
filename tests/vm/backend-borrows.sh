# Devices of many kinds move from their kernel drivers to VFIO and back: BARs, every kind and
# number of interrupts, reset.
# device: nvme,serial=1
# device: e1000e,romfile=
# device: qemu-xhci
# device: nec-usb-xhci
# device: rtl8139,romfile=
# device: vmxnet3,romfile=
. /share/tests/guest/pci.sh

modprobe -a nvme e1000e xhci_pci 8139cp vmxnet3
for bus in 01 02 03 04 05 06; do
    function=0000:$bus:00.0
    await "the driver of $function" test -e "/sys/bus/pci/devices/$function/driver"
    vfio-check borrow "$function"
done
