# VFIO's device nodes with iommufd pass the conformance tests and name their refusals, beside the
# group on the same kernel; they are what a device is reached by unless the configuration says else.
# guest: kernel
# device: edu
# device: edu,multifunction=on,addr=0.0
# qemu: -device edu,bus=port2,addr=0.1
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=0000:01:00.0
vfio-check best vfio-cdev $edu
vfio-check conformance vfio-cdev $edu
vfio-check conformance vfio-group $edu
for kind in intx msi; do vfio-check interrupts vfio-cdev $edu $kind; done
(ulimit -l 8192 && vfio-check refusals vfio-cdev $edu)
vfio-check not-open vfio-no-iommu $edu "behind an IOMMU"
unbind_from_vfio $edu # which the check has no right to any more at its end

# A sibling in the hands of the kernel, then in ours.
modprobe uio_pci_generic 2>/dev/null || true # it may be built in
echo uio_pci_generic >/sys/bus/pci/devices/0000:02:00.1/driver_override
echo 0000:02:00.1 >/sys/bus/pci/drivers_probe
vfio-check shared vfio-cdev 0000:02:00.0 0000:02:00.1
echo 0000:02:00.1 >/sys/bus/pci/drivers/uio_pci_generic/unbind
echo >/sys/bus/pci/devices/0000:02:00.1/driver_override
vfio-check bus-reset vfio-cdev 0000:02:00.0 0000:02:00.1

for backend in vfio-cdev vfio-group; do
    forced=
    [ $backend = vfio-cdev ] || forced="backend = \"$backend\""
    start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true
$forced"
    await "the driver" is_ready
    [ "$(status backend)" = $backend ] || fail "reached by '$(status backend)', not by $backend"
    [ "$(status is_unsafe)" = false ] || fail "$backend is called unsafe"
    limit=4096 # the group has its own test, on Debian's kernel
    [ $backend = vfio-group ] || limit=65536
    demo --limit $limit /share/bin/iohost || fail "the demo: see above"
    stop_daemon
done

vfio-check removal vfio-cdev $edu
