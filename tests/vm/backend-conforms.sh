# The VFIO backend passes the conformance tests on a real kernel, names every refusal, and survives
# the removal of its device.
# device: edu
. /share/tests/guest/pci.sh

edu=$(pci_address 1234 11e8)
vfio-check conformance "$edu"
(ulimit -l 8192 && vfio-check refusals "$edu")
unbind_from_vfio "$edu" # which the check has no right to any more at its end
vfio-check removal "$edu"
