# Preparing memory of an arena is only bookkeeping: what it costs, beside VFIO's map and unmap.
# device: edu
. /share/tests/guest/pci.sh

device-check dma-cost vfio-group "$(pci_address 1234 11e8)"
