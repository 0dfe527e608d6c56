# Nine prepared defects: each has its code, and the command that doctor prints removes it. Three more need another start
# of the machine: doctor-no-iommu, doctor-no-remapping and doctor-no-cdev.
# device: pcie-pci-bridge,id=bridge
# qemu: -drive if=none,id=empty,file.driver=null-co,file.size=64M,file.read-zeroes=on,snapshot=on
# qemu: -device edu,bus=bridge,addr=1.0 -device nvme,serial=1,drive=empty,bus=bridge,addr=2.0
# device: e1000e,romfile=
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh
. /share/tests/guest/doctor.sh

edu=0000:02:01.0
nvme=0000:02:02.0
card=0000:03:00.0
card_folder=/sys/bus/pci/devices/$card
echo 'operator:x:1000:1000:operator:/tmp:/bin/sh' >>/etc/passwd
# as_operator COMMAND...: as a user who is not root.
as_operator() { su operator -c "$*"; }

expect_healthy driver-not-loaded $edu
rmmod vfio_pci
cure driver-not-loaded $edu "vfio-pci is not loaded"

expect_healthy group-not-viable $edu
modprobe nvme
await "the disk of $nvme" test -b /dev/nvme0n1
group=$(iommu_group $edu)
cure group-not-viable $edu "IOMMU group $group cannot be used: $nvme is bound to nvme"
[ -z "$(pci_driver $nvme)" ] || fail "$nvme is bound to $(pci_driver $nvme)"

echo $nvme >/sys/bus/pci/drivers_probe
await "the disk of $nvme" test -b /dev/nvme0n1
modprobe -a crc32c_generic ext4
mke2fs /dev/nvme0n1 >/dev/null
expect_healthy disk-in-use $nvme
mkdir /tmp/disk
mount -t ext4 /dev/nvme0n1 /tmp/disk
cure disk-in-use $nvme "/dev/nvme0n1 is mounted on /tmp/disk"
! grep -q nvme0n1 /proc/mounts || fail "still mounted: $(cat /proc/mounts)"

# A sibling that is in use: the command ends that first.
mount -t ext4 /dev/nvme0n1 /tmp/disk
cure group-not-viable $edu "$nvme is bound to nvme (/dev/nvme0n1 is mounted on /tmp/disk)"

modprobe e1000e
await "the interface of $card" test -d $card_folder/net
interface=$(ls $card_folder/net)
expect_healthy interface-in-use $card
ip link set "$interface" up
cure interface-in-use $card "network interface $interface is up"

# Somebody puts the card to sleep behind the kernel's back: into D3hot, by its power management
# capability, whose second register is at 0xcc in a 82574L.
echo $card >/sys/bus/pci/drivers/e1000e/unbind
expect_healthy device-asleep $card
printf '\003' | dd of=$card_folder/config bs=1 seek=$((0xcc)) conv=notrunc 2>/dev/null
cure device-asleep $card "$card is in D3hot"

doctor_as=as_operator
expect_healthy vfio-permission $edu
bind_to_vfio $edu
cure vfio-permission $edu "user operator may not open /dev/vfio/$group"
[ "$(stat -c %U /dev/vfio/"$group")" = operator ] || fail "$(ls -l /dev/vfio)"
chown root /dev/vfio/"$group"
doctor_as=

expect_healthy device-busy $edu
sleep 10000 7<>/dev/vfio/"$group" &
busy=$!
cure device-busy $edu "$edu is in use: process $busy ("
wait $busy || true
unbind_from_vfio $edu

# The limit is the shell's, so one shell does it all: what as_operator's user may lock, the command
# raises within the hard limit.
expect_healthy memlock-too-small $edu
cat >/tmp/memlock.sh <<'END'
. /share/tests/guest/doctor.sh
ulimit -S -l 64
cure memlock-too-small 0000:02:01.0 "drivers need 8388608 bytes of locked memory, and user operator here may lock 65536" eval
END
rm -f /tmp/doctor
su operator -c "sh -eu /tmp/memlock.sh"
rm -f /tmp/doctor

expect_healthy device-owned $edu
start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true"
await "the driver" is_ready
cure device-owned $edu "iohost has $edu: service $edu runs edu on it in process $(status pid)"
[ -z "$(pci_driver $edu)" ] || fail "$edu is bound to $(pci_driver $edu)"
stop_daemon
