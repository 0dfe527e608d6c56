# The whole system on real VFIO: bound by iohost, driven by MSI and then by INTx, given back.
# device: edu
# deadline: 300
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)

# Interrupts of a function, as the kernel counts them: interrupts KIND
interrupts() {
    sed -n "s/^ *[0-9]*: *\([0-9]*\) *\([0-9]*\).*vfio-$1.*$edu.*/\1 \2/p" /proc/interrupts |
        { read -r a b && echo $((a + b)); }
}

for kind in msi intx; do
    echo "--- by $kind"
    start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true
interrupts = [\"$kind\"]"
    await "the driver" is_ready
    [ "$(pci_driver "$edu")" = vfio-pci ] || fail "$edu is bound to '$(pci_driver "$edu")'"

    demo --limit 65536 /share/bin/iohost || fail "the demo: see above"

    count=$(interrupts $kind) || fail "no vfio-$kind line for $edu: $(cat /proc/interrupts)"
    # 13 factorials, and two DMA interrupts for each of the 32 entries and the round trip. The kernel
    # does not count a line that it finds asserted at its unmasking, which a slow machine leads to.
    least=79
    [ $kind = msi ] || least=1
    [ "$count" -ge $least ] || fail "$count interrupts by $kind, expected at least $least"
    echo "interrupts  $count by $kind"

    stop_daemon
    [ -z "$(pci_driver "$edu")" ] || fail "$edu is still bound to '$(pci_driver "$edu")'"
    echo "given back  $edu has no driver, as before"
done
