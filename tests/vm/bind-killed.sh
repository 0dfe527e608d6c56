# Whoever binds and unbinds a device is killed at random points: 200 times while it does nothing
# else, 60 times as the daemon in the middle of `iohost bind` and `unbind`. The next run finds how
# things were, and undoes or finishes.
# A comment `kernel: iohost.seed=N` runs it again with the points of an earlier run.
# device: edu
# deadline: 1800
. /share/tests/guest/pci.sh
. /share/tests/guest/daemon.sh

edu=$(pci_address 1234 11e8)
state=/var/lib/iohost
# No driver of the kernel knows an edu; this one takes what it is told to.
modprobe uio_pci_generic
echo 1234 11e8 >/sys/bus/pci/drivers/uio_pci_generic/new_id

seed=$(sed -n 's/.*iohost\.seed=\([0-9]*\).*/\1/p' /proc/cmdline)
seed=${seed:-$(date +%s)}
echo "seed        $seed"

binders=$(part_of 200)
daemons=$(part_of 60)

# pauses COUNT MOST: that many numbers of seconds.
pauses() { awk -v seed="$seed" -v n="$1" -v most="$2" 'BEGIN { srand(seed); while (n--) printf "%.4f\n", rand() * most }'; }

# What the one that was killed had noted.
noted() {
    [ -f "$1/$edu.json" ] || { echo nothing && return; }
    sed -n 's/.*"step": "\(.*\)".*/\1/p' "$1/$edu.json"
}

# expect_binding DRIVER OVERRIDE RECORDS
expect_binding() {
    local override records
    override=$(cat "/sys/bus/pci/devices/$edu/driver_override")
    records=$(find "$state" -name '*.json' | wc -l)
    [ "$(pci_driver "$edu") $override $records" = "$*" ] ||
        fail "round $round: $edu has driver '$(pci_driver "$edu")', override '$override' and $records notes," \
            "expected $*; it was killed at '$was'"
}

echo "--- the binder alone"
round=0
for pause in $(pauses "$binders" 0.05); do
    round=$((round + 1))
    vfio-check bind-forever "$edu" $state &
    binder=$!
    # From its first note on, so that it is in the middle of it.
    until [ -d $state ] && [ "$(pci_driver "$edu")" != uio_pci_generic ]; do
        kill -0 $binder || fail "round $round: it ended by itself"
    done
    sleep "$pause"
    kill -9 $binder
    wait $binder 2>/dev/null && fail "round $round: it was not killed, and ended"
    was=$(noted $state)
    echo "$was$(pci_driver "$edu" | sed 's/^/ at /')" >>/tmp/binder-was
    vfio-check settle "$edu" $state || fail "round $round: killed at '$was'"
    expect_binding uio_pci_generic "(null)" 0
    [ $((round % 50)) != 0 ] || echo "killed      $round times"
done
sort /tmp/binder-was | uniq -c
[ "$(wc -l </tmp/binder-was)" = "$binders" ] || fail "it was killed $(wc -l </tmp/binder-was) times"

echo "--- the daemon"
# bind_and_unbind: every other time so that the next daemon takes it again.
bind_and_unbind() {
    while :; do
        iohost bind "$@" "$edu" && iohost unbind "$edu" || return 0
    done >/dev/null 2>&1
}

round=0
kept=0
for pause in $(pauses "$daemons" 1); do
    round=$((round + 1))
    start_daemon ""
    await "the daemon to settle" is_settled
    # What persists is taken again, whether or not its driver came up in time; a driver that runs is
    # taken over; else it is as before.
    if grep -q '"persist": "function"' "$state/$edu.json" 2>/dev/null || is_ready; then
        kept=$((kept + 1))
        expect_binding vfio-pci vfio-pci 1
    else
        expect_binding uio_pci_generic "(null)" 0
    fi
    [ $((round % 2)) = 0 ] && persist=--persist || persist=
    # shellcheck disable=SC2086 # nothing, or one word
    bind_and_unbind $persist &
    client=$!
    sleep "$pause"
    kill -9 "$daemon"
    wait "$daemon" 2>/dev/null && fail "round $round: the daemon was not killed, and ended"
    wait $client
    was=$(noted $state)
    echo "$was$(pci_driver "$edu" | sed 's/^/ at /')" >>/tmp/daemon-was
    [ $((round % 20)) != 0 ] || echo "killed      $round times"
done
sort /tmp/daemon-was | uniq -c
[ "$(wc -l </tmp/daemon-was)" = "$daemons" ] || fail "it was killed $(wc -l </tmp/daemon-was) times"

was="the last of them"
start_daemon ""
await "the daemon to settle" is_settled
iohost bind "$edu"
expect_binding vfio-pci vfio-pci 1
iohost call "$edu" factorial 5 | grep 120 || fail "the driver does not answer"
iohost unbind "$edu" | grep "bound to uio_pci_generic again" || fail "unbind says otherwise"
stop_daemon
expect_binding uio_pci_generic "(null)" 0
echo "killed      $((binders + daemons)) times; $kept times the next daemon took the device again"
