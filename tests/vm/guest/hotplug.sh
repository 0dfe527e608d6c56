# What a driver of a removed device has to do. Source it: . /share/tests/guest/hotplug.sh
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh
. /share/tests/guest/monitor.sh

# now: milliseconds.
now() {
    sed 's/\([0-9]*\)\.\([0-9]\)\([0-9]\).*/\1\2\30/' /proc/uptime
}

# in_time WHAT COMMAND...: runs COMMAND, which has to return within the 2 s that an operator is promised.
in_time() {
    local what=$1 start took
    shift
    start=$(now)
    "$@"
    took=$(($(now) - start))
    echo "$what returned after $took ms"
    [ "$took" -lt 2000 ] || fail "$what took $took ms"
}

is_removed() {
    [ "$(status state)" = down ] && iohost status --json | grep -q '"code": *"removed"'
}

is_gone() {
    [ ! -e "/sys/bus/pci/devices/$1" ]
}

# device_del ID ADDRESS: as an operator of the machine does it.
device_del() {
    monitor "device_del $1"
    # Not in a tight loop: what is waited for needs the processor.
    while [ -e "/sys/bus/pci/devices/$2" ]; do sleep 0.02; done
}

unbind() {
    echo "$1" >/sys/bus/pci/drivers/vfio-pci/unbind
}

remove() {
    echo 1 >"/sys/bus/pci/devices/$1/remove"
}
