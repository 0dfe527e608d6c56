# A DMA to an address that no mapping names is stopped by the IOMMU; the host stays up.
# device: edu
# kernel: iomem=relaxed
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true"
await "the driver" is_ready
host=$(status pid)
iohost call edu factorial 5 | grep 120 || fail "the driver does not answer"

# Behind the back of the driver (hence iomem=relaxed), which has made the device bus master: 64 bytes from the device's own
# buffer to an address below 2^28 that the driver never mapped.
bar=$(sed -n '1s/ .*//p' "/sys/bus/pci/devices/$edu/resource")
poke() { devmem $((bar + $1)) 32 "$2"; }
poke 0x80 0x40000
poke 0x84 0
poke 0x88 0x0badf00
poke 0x8c 0
poke 0x90 64
poke 0x94 0
poke 0x98 3

faulted() { dmesg | grep -i 'DMAR:.*DMA Write.*fault addr 0xbad[f0]'; }
await "the IOMMU's report in the kernel log" faulted
dmesg | grep -i 'DMAR:.*DMA Write' | head -n 1

[ "$(status pid)" = "$host" ] || fail "the driver host did not survive"
iohost call edu factorial 6 | grep 720 || fail "the driver does not answer any more"
echo "host        process $host still answers"
stop_daemon
