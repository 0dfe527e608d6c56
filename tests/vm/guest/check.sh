# Functions for every test. Source it: . /share/tests/guest/check.sh

# Ends the test with a reason.
fail() {
    echo "FAILED: $*" >&2 # not into the answer of a function that is being asked
    [ ! -f /tmp/daemon.log ] || tail -n 20 /tmp/daemon.log >&2
    exit 1
}

# await WHAT COMMAND...: until COMMAND succeeds, for a minute at the most.
await() {
    local what=$1 attempts=600
    shift
    until "$@" >/dev/null 2>&1; do
        attempts=$((attempts - 1))
        [ $attempts -gt 0 ] || fail "waited a minute for $what"
        sleep 0.1
    done
}

# part_of COUNT: how many of so many times, see IOHOST_VM_PART in scripts/vm.
part_of() {
    echo $(($1 / $(sed -n 's/.*iohost\.part=\([0-9]*\).*/\1/p' /proc/cmdline)))
}
