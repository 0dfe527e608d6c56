# A device through UIO, with the whole system: allowed, marked UNSAFE, given back.
# device: edu
. /share/tests/guest/pci.sh
. /share/tests/guest/unsafe.sh

edu=$(pci_address 1234 11e8)
modprobe uio_pci_generic
expect_unsafe uio "$edu"
[ -z "$(pci_driver "$edu")" ] || fail "$edu is still bound to '$(pci_driver "$edu")'"
