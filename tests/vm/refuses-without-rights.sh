# What the daemon may not do is refused with the reason and the next step, which then works: take a
# device that nobody allowed it, bind one as an ordinary user, open a group that is not its own,
# lock more memory than the limit.
# device: edu
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
node=/dev/vfio/$(iommu_group "$edu")
device="address = \"$edu\"
driver = \"edu\""

echo "--- not bound, and iohost may not bind it"
start_daemon "$device"
expect_refusal "$(down_reason)" not-bound \
    "$edu is bound to no driver, not to vfio-pci" "iohost bind $edu"
[ -z "$(pci_driver "$edu")" ] || fail "$edu is bound to $(pci_driver "$edu") all the same"
iohost bind "$edu"
stop_daemon

# The rest as a user who is not root.
echo 'operator:x:1000:1000:operator:/tmp:/bin/sh' >>/etc/passwd
chown -R operator /run/iohost
# as_operator KIB COMMAND...: with so much memory to lock.
as_operator() {
    local limit=$1
    shift
    exec su operator -c "ulimit -l $limit && exec $*"
}

echo "--- bound by somebody who may not"
start_daemon "$device
bind = true" as_operator 8192
expect_refusal "$(down_reason)" no-permission \
    "no permission to set the driver of $edu (/sys/bus/pci/devices/$edu/driver_override)" "as root"
stop_daemon

echo "--- opened by somebody who may not"
bind_to_vfio "$edu"
start_daemon "$device" as_operator 2
expect_refusal "$(down_reason)" vfio-permission \
    "$edu cannot be opened: no permission on $node" "chown \$USER $node"
chown operator "$node"

echo "--- more memory than may be locked"
expect_refusal "$(refusal bind "$edu")" memlock-too-small \
    "needs 4096 bytes of locked memory, the limit is 2048" "ulimit -l 4"
stop_daemon

echo "--- all of it allowed"
start_daemon "$device" as_operator 4
await "the driver" is_ready
iohost call "$edu" factorial 5 | grep 120 || fail "the driver does not answer"
stop_daemon
unbind_from_vfio "$edu"
