# A device that the machine uses is not taken: a disk that is mounted, here or elsewhere, or swapped
# to, a network interface that is up or belongs to a bridge. The next step of each refusal works, and
# force takes it all the same.
# qemu: -drive if=none,id=disk,format=raw,file=fat:.,snapshot=on
# device: nvme,serial=1,drive=disk
# device: e1000e,romfile=
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

nvme=$(pci_address 1b36 0010)
card=$(pci_address 8086 10d3)
modprobe -a nvme e1000e vfat nls_cp437 nls_ascii bridge
await "the disk's partition" test -b /dev/nvme0n1p1
await "the network interface of $card" test -d "/sys/bus/pci/devices/$card/net"
interface=$(ls "/sys/bus/pci/devices/$card/net")
mkdir -p /mnt

# A plugin that takes anything: it refuses what it is given, but only after that was bound.
printf 'driver_directory = "/share/bin"\n' >/tmp/iohost.toml
for device in "$nvme" "$card"; do
    printf '[[device]]\naddress = "%s"\ndriver = "probe"\n' "$device" >>/tmp/iohost.toml
done
iohost daemon --config /tmp/iohost.toml 2>>/tmp/daemon.log &
daemon=$!
await "the daemon's socket" test -S /run/iohost/io.iohost

# expect_in_use DEVICE DRIVER WORDS NEXT: refused with these words, and DEVICE keeps its driver.
expect_in_use() {
    expect_refusal "$(refusal bind "$1")" in-use "PCI device $1 is in use: $3" "end that first$4"
    [ "$(pci_driver "$1")" = "$2" ] || fail "$1 is bound to '$(pci_driver "$1")' all the same"
    [ "$(cat "/sys/bus/pci/devices/$1/driver_override")" = "(null)" ] || fail "$1 has an override"
    [ ! -e "/var/lib/iohost/$1.json" ] || fail "a note of $1 is left"
}

# expect_in_use_until DEVICE DRIVER WORDS COMMAND: the same, and COMMAND, the next step, ends it.
expect_in_use_until() {
    expect_in_use "$1" "$2" "$3" ": $4"
    $4
}

# expect_free DEVICE DRIVER: it can be taken, and goes back.
expect_free() {
    iohost bind "$1"
    [ "$(pci_driver "$1")" = vfio-pci ] || fail "$1 is bound to '$(pci_driver "$1")'"
    iohost unbind "$1" | grep "bound to $2 again" || fail "unbind says otherwise"
}

echo "--- a mounted disk"
mount -t vfat /dev/nvme0n1p1 /mnt
expect_in_use_until "$nvme" nvme "/dev/nvme0n1p1 is mounted on /mnt" "umount /mnt"
expect_free "$nvme" nvme
await "the disk's partition" test -b /dev/nvme0n1p1

echo "--- a disk mounted where only another process sees it"
unshare -m sh -c 'mount -t vfat /dev/nvme0n1p1 /mnt && touch /tmp/mounted && exec sleep 600' &
elsewhere=$!
await "the mount" test -e /tmp/mounted
! grep nvme /proc/self/mountinfo || fail "it is mounted for all to see"
expect_in_use "$nvme" nvme "/dev/nvme0n1p1 is held by a mount elsewhere or another program" ", or take it"
kill $elsewhere
wait $elsewhere || true
expect_free "$nvme" nvme
await "the disk's partition" test -b /dev/nvme0n1p1

echo "--- a disk that is swapped to"
mkswap /dev/nvme0n1p1
swapon /dev/nvme0n1p1
expect_in_use_until "$nvme" nvme "/dev/nvme0n1p1 is swapped to" "swapoff /dev/nvme0n1p1"
expect_free "$nvme" nvme
await "the network interface of $card" test -d "/sys/bus/pci/devices/$card/net"

echo "--- a network interface"
ip link set "$interface" up
expect_in_use_until "$card" e1000e "network interface $interface is up" "ip link set $interface down"
brctl addbr bridge0
brctl addif bridge0 "$interface"
expect_in_use_until "$card" e1000e "network interface $interface belongs to bridge0" "ip link set $interface nomaster"
expect_free "$card" e1000e

echo "--- by force"
await "the network interface of $card" test -d "/sys/bus/pci/devices/$card/net"
interface=$(ls "/sys/bus/pci/devices/$card/net")
ip link set "$interface" up
iohost bind --force "$card"
grep "taken by force: PCI device $card is in use: network interface $interface is up" /tmp/daemon.log ||
    fail "the log does not say so"
iohost unbind "$card"
stop_daemon
