# Functions for tests that run the daemon. Source it after pci.sh: . /share/tests/guest/daemon.sh

daemon=

# start_daemon LINES: runs the daemon with one device, configured by LINES of TOML.
start_daemon() {
    printf 'driver_directory = "/share/bin"\n[[device]]\n%s\n' "$1" >/tmp/iohost.toml
    iohost daemon --config /tmp/iohost.toml 2>>/tmp/daemon.log &
    daemon=$!
    await "the daemon's socket" test -S /run/iohost/io.iohost
}

# stop_daemon: as an operator does it. The daemon has to end well.
stop_daemon() {
    kill -TERM "$daemon"
    wait "$daemon" || fail "the daemon ended with exit code $?: $(tail -n 5 /tmp/daemon.log)"
}

# await WHAT COMMAND...: until COMMAND succeeds, for a minute at the most.
await() {
    what=$1
    shift
    attempts=600
    until "$@" >/dev/null 2>&1; do
        attempts=$((attempts - 1))
        [ $attempts -gt 0 ] || fail "waited a minute for $what: $(tail -n 20 /tmp/daemon.log)"
        sleep 0.1
    done
}

# status FIELD: of the one service: driver, state, pid, incarnation, reset, ...
status() {
    iohost status --json | tr -d ' \n' | sed -n 's/.*"services":\[{\(.*\)}\].*/\1/p' |
        sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p"
}

# Whether the driver runs.
is_ready() {
    [ "$(status state)" = ready ] || [ "$(status state)" = running ]
}

# demo OPTIONS: the demo's account, without the progress bar that a terminal gets.
demo() {
    iohost demo --service edu "$@" >/tmp/demo.log 2>&1 || { cat /tmp/demo.log; return 1; }
    cat /tmp/demo.log
}
