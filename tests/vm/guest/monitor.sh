# QEMU's monitor, from inside the guest: the test says `# monitor: yes`. Source it: . /share/tests/guest/monitor.sh
. /share/tests/guest/check.sh

# Open all the time, and without echo: or the monitor would be answered with its own words. What it has been answered
# until then ends with the first line.
exec 9<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
cat <&9 >/tmp/monitor.log &
printf '\r' >&9
sleep 1

# monitor COMMAND: what the monitor's HMP does with it is in /tmp/monitor.log.
monitor() {
    printf '\r%s\r' "$*" >&9
}
