# The driver host of a real device is killed again and again in the middle of a stream. The client goes on: it never
# connects again, and every byte comes back once. After each kill, and before the next driver host has the device, the
# device is quiet: it may not master the bus, and at the end the IOMMU has seen nothing that it should not.
# device: edu
# deadline: 500
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

readonly KILLS=5

edu=$(pci_address 1234 11e8)
start_daemon "name = \"edu0\"
address = \"$edu\"
driver = \"edu\"
bind = true"
await "the driver" is_ready

# Whether the device may start transfers: bit 2 of the command register, PCI Local Bus 3.0, 6.2.2.
masters_the_bus() {
    command=$(dd if="/sys/bus/pci/devices/$edu/config" bs=1 skip=4 count=1 2>/dev/null | od -An -tu1)
    [ $((command & 4)) -ne 0 ]
}

interrupts() {
    grep vfio-msi /proc/interrupts | awk '{ print $2 + $3 }'
}

# flows: interrupts come, so entries go through the device. The count begins again with each driver.
flows() {
    [ "$(interrupts || echo 0)" -gt 8 ] 2>/dev/null
}

iohost demo --service edu --limit 131072 /share/bin/iohost >/tmp/stream.log 2>&1 &
client=$!
await "the stream" sh -c 'iohost status --json | grep -q "\"sessions\": *1"'

for kill in $(seq $KILLS); do
    await "some entries" flows
    kill -0 "$client" || fail "the client has ended: $(cat /tmp/stream.log)"
    before=$(status pid)
    masters_the_bus || fail "a driver that streams does not master the bus: the look is wrong"
    # With the daemon stopped nobody has the device next.
    kill -STOP "$daemon"
    kill -9 "$before"
    await "the end of process $before" grep -q "State:.*Z" "/proc/$before/status"
    masters_the_bus && fail "kill $kill: the device of a dead driver host masters the bus"
    grep -q vfio-msi /proc/interrupts && fail "kill $kill: a vector of the dead driver host is armed"
    kill -CONT "$daemon"
    # Who asks is not kept waiting.
    await "the next driver host" sh -c "iohost bind $edu >/dev/null 2>&1; iohost status --json | grep -q '\"incarnation\": *$((kill + 1))'"
    await "the driver" is_ready
    [ "$(status pid)" != "$before" ] || fail "process $before is said to run still"
    [ "$(status reset)" = done ] || echo "the reset before start $((kill + 1)): $(status reset)"
    [ "$(status sessions)" = 1 ] || fail "kill $kill: the session is lost"
    echo "kill $kill    process $before; the device was quiet; process $(status pid) serves"
done

wait $client || fail "the client did not outlive its drivers: $(cat /tmp/stream.log)"
grep -v '^\(device\|driver\|factorials\)' /tmp/stream.log | tail -n 4
faults=$(dmesg | grep -i 'DMAR:.*fault' || true)
[ -z "$faults" ] || fail "the IOMMU stopped the device: $faults"
stop_daemon
