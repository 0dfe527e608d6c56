# The driver host is killed in the middle of a stream: the device is reset, a new one takes over.
# device: edu
# deadline: 300
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
start_daemon "address = \"$edu\"
driver = \"edu\"
bind = true"
await "the driver" is_ready
first=$(status pid)

iohost demo --service edu --limit 1048576 /share/bin/iohost >/tmp/cut.log 2>&1 &
client=$!
await "the stream" sh -c 'iohost status --json | grep -q "\"sessions\": *1"'
await "some entries" sh -c '[ "$(grep vfio-msi /proc/interrupts | awk "{print \$2 + \$3}")" -gt 40 ]'
kill -9 "$first"

wait $client && fail "the client of a dead driver host was told that all went well"
grep -v '^\(device\|driver\|factorials\|dma\)' /tmp/cut.log | head -n 3

await "the next driver host" sh -c '[ "$(iohost status --json | grep -c "\"incarnation\": *2")" = 1 ]'
await "the driver" is_ready
second=$(status pid)
[ "$second" != "$first" ] || fail "process $first is said to run still"
[ "$(status reset)" = done ] || fail "the reset before the second start: '$(status reset)'"
grep "$first" /tmp/daemon.log | tail -n 1

demo --limit 16384 /share/bin/iohost || fail "a new session does not work"
echo "restarted   process $first was killed, process $second serves"
stop_daemon
