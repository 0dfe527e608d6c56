# Functions for tests that run the daemon. Source it: . /share/tests/guest/daemon.sh
. /share/tests/guest/check.sh

daemon=

# start_daemon LINES [COMMAND...]: runs the daemon with one device, configured by LINES of TOML,
# or with none if there are no LINES. COMMAND gets the daemon's command line to run, in its way.
start_daemon() {
    echo 'driver_directory = "/share/bin"' >/tmp/iohost.toml
    [ -z "$1" ] || printf '[[device]]\n%s\n' "$1" >>/tmp/iohost.toml
    shift
    "$@" iohost daemon --config /tmp/iohost.toml 2>>/tmp/daemon.log &
    daemon=$!
    await "the daemon's socket" test -S /run/iohost/io.iohost
}

# stop_daemon: as an operator does it. The daemon has to end well.
stop_daemon() {
    kill -TERM "$daemon"
    wait "$daemon" || fail "the daemon ended with exit code $?"
}

# status FIELD: of the one service: driver, state, pid, incarnation, reset, ...
status() {
    iohost status --json | tr -d ' \n' | sed -n 's/.*"services":\[{\(.*\)}\].*/\1/p' |
        sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p"
}

# Whether the daemon answers and nothing is under way. Its answer is in /tmp/status.json.
is_settled() {
    iohost status --json >/tmp/status.json && ! grep -q '"state":"\(starting\|stopping\|restarting\)"' /tmp/status.json
}

# Whether the driver runs.
is_ready() {
    [ "$(status state)" = ready ] || [ "$(status state)" = running ]
}

# Whether the driver was given up, with a reason.
is_down() {
    [ "$(status state)" = down ]
}

# watch_service NAME: what happens to it from now on stands in /tmp/news, until $watcher is killed.
watch_service() {
    # Those of an earlier watch would be taken for the beginning of this one.
    rm -f /tmp/news
    vfio-check watch "$1" >/tmp/news &
    watcher=$!
    await "the watch" grep -q began /tmp/news
}

# expect_news WORDS: the latest of them.
expect_news() {
    await "the news '$*'" sh -c "tail -n 1 /tmp/news | grep -q '$*'"
}

# refusal COMMAND...: what an iohost command says when it is refused, as JSON. Not to be refused is
# a failure, and so is any other exit code than 1.
refusal() {
    iohost --json "$@" 2>/tmp/refusal && fail "iohost $* was not refused"
    [ $? -eq 1 ] || fail "iohost $* ended with another exit code than 1"
    cat /tmp/refusal
}

# down_reason: why the one service is down, as JSON.
down_reason() {
    await "the service to be down" is_down
    iohost status --json | sed -n 's/.*"reason":\({[^}]*}\).*/\1/p'
}

# expect_refusal REFUSAL CODE MESSAGE NEXT: REFUSAL, as JSON, has this code, and these words in its
# message and its next step.
expect_refusal() {
    echo "$1"
    case $1 in
    *"\"code\":\"$2\",\"message\":\""*"$3"*"\",\"next\":\""*"$4"*) ;;
    *) fail "expected code '$2', '$3' in the message, '$4' in the next step" ;;
    esac
}

# demo OPTIONS: the demo's account, without the progress bar that a terminal gets.
demo() {
    iohost demo --service edu "$@" >/tmp/demo.log 2>&1 || { cat /tmp/demo.log; return 1; }
    cat /tmp/demo.log
}
