# A file system that was made outside is on an NVMe disk behind our driver: the kernel mounts it by way of our NBD server,
# and files go both ways. What the guest has written is compared from outside, on the raw image, when it has ended.
# device: nvme,serial=files,drive=image
# image: image 192M
# qemu: -drive if=none,id=image,file=image,format=raw,discard=unmap
# tools: yes
# deadline: 600
. /share/tests/guest/disk.sh

modprobe -a crc32c_generic ext4
address=$(nvme_addresses)
start_disk "$address"
[ "$(pci_driver "$address")" = vfio-pci ] || fail "$address is bound to '$(pci_driver "$address")'"
iohost block info disk | head -n 5

attach nbd0 disk 1 512
mkdir /tmp/mounted
mount -t ext4 /dev/nbd0 /tmp/mounted
diff -r /tmp/mounted/from-outside/nls "$(echo /lib/modules/*/kernel/fs/nls)" || fail "what is on the image reads otherwise"
echo "read        $(find /tmp/mounted/from-outside -type f | wc -l) files, $(du -sm /tmp/mounted/from-outside | cut -f1) MiB"

# What is deleted and trimmed must not take anything else with it.
cp -r /tmp/mounted/from-outside /tmp/mounted/deleted
sync
mkdir /tmp/mounted/tree
tar -xf /tmp/mounted/files.tar -C /tmp/mounted/tree
rm -r /tmp/mounted/deleted
fstrim /tmp/mounted
echo "written     $(find /tmp/mounted/tree -type f | wc -l) files, $(du -sm /tmp/mounted/tree | cut -f1) MiB"
umount /tmp/mounted
detach nbd0
no_errors
iohost block health disk | grep -e '^read' -e '^written' -e '^media'
stop_daemon
