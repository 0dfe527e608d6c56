# A function that cannot be reset alone is reset with its bus, when all that is on it is ours.
# device: edu,multifunction=on,addr=0.0
# qemu: -device edu,bus=port1,addr=0.1
vfio-check bus-reset vfio-group 0000:01:00.0 0000:01:00.1
