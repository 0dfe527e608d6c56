# A device that somebody wants back is let go in time, with a good driver under load and with one that hangs; its
# clients are told, and it starts again when it comes back. It may hang as long as it likes: that is not what ends it here.
# device: edu,id=victim
# monitor: yes
# deadline: 400
. /share/tests/guest/hotplug.sh

edu=$(pci_address 1234 11e8)

# load: a stream through the driver, which the removal will cut off.
load() {
    iohost demo --service edu0 --limit 1048576 /share/bin/iohost >/tmp/cut.log 2>&1 &
    client=$!
    await "the stream" sh -c 'iohost status --json | grep -q "\"sessions\": *1"'
}

# hang: a driver that does nothing any more, and a client that waits for it.
hang() {
    iohost call edu0 hang
    iohost call edu0 events >/tmp/cut.log 2>&1 &
    client=$!
}

# is_told: the client's end, and the reason for whoever watches.
is_told() {
    wait "$client" && fail "the client of a removed device was told that all went well"
    expect_news "ended removed"
    await "the service to be removed" is_removed
}

comes_back() {
    await "the device to be there again" test -e "/sys/bus/pci/devices/$edu"
    await "the driver" is_ready
    expect_news began
    echo "$1: the driver runs again, incarnation $(status incarnation)"
}

for driver in edu probe; do
    : >/tmp/daemon.log
    start_daemon "name = \"edu0\"
address = \"$edu\"
driver = \"$driver\"
bind = true
restart = { hang_seconds = 0 }"
    await "the driver" is_ready
    watch_service edu0
    [ "$driver" = edu ] && work=load || work=hang

    $work
    in_time "remove, $work" remove "$edu"
    is_told
    echo 1 >/sys/bus/pci/rescan
    comes_back "rescan"

    $work
    in_time "unbind, $work" unbind "$edu"
    is_told
    [ -z "$(pci_driver "$edu")" ] || fail "it was taken again though somebody has unbound it"
    echo "$edu" >/sys/bus/pci/drivers/vfio-pci/bind
    comes_back "bind"

    $work
    in_time "device_del, $work" device_del victim "$edu"
    is_told
    monitor "device_add edu,id=victim,bus=port1"
    comes_back "device_add"

    kill "$watcher"
    stop_daemon
done
grep "killing driver host" /tmp/daemon.log | head -n 1
