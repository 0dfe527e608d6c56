# A device whose driver died too often is left alone, until it is taken out and plugged in anew: then it starts again, and
# the deaths before do not count.
# device: edu,id=victim
# monitor: yes
# deadline: 300
. /share/tests/guest/hotplug.sh

edu=$(pci_address 1234 11e8)

is_quarantined() {
    [ "$(status state)" = quarantined ]
}

start_daemon "name = \"edu0\"
address = \"$edu\"
driver = \"probe\"
bind = true
restart = { most = 1, pause_seconds = 0 }"
await "the driver" is_ready

deaths=0

# has_died N: it has died N times, since the test began.
has_died() {
    [ "$(iohost crashes --json | tr ',' '\n' | grep -c '"number"')" -ge "$1" ]
}

# dies N: it dies so often in a row.
dies() {
    for _ in $(seq "$1"); do
        await "the driver" is_ready
        iohost call edu0 die 0 && fail "a call was answered by a driver that died of it"
        deaths=$((deaths + 1))
        await "death $deaths to be reported" has_died $deaths
    done
}

dies 2
await "quarantine" is_quarantined
echo "quarantined, incarnation $(status incarnation)"

in_time "remove, quarantined" remove "$edu"
is_quarantined || fail "it is $(status state) once it is gone"
echo 1 >/sys/bus/pci/rescan
await "the device to be there again" test -e "/sys/bus/pci/devices/$edu"
await "the driver" is_ready
echo "replugged: the driver runs again, incarnation $(status incarnation)"

# With the deaths before it, this would be one too many.
dies 1
await "the driver" is_ready
dies 1
await "quarantine" is_quarantined
iohost crashes
stop_daemon
