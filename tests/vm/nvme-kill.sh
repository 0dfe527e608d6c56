# As nvme-fio, while the driver host is killed every second, for 10 minutes (one in CI): fio sees no error, and finds what it
# has written.
# device: nvme,serial=plain,drive=image
# image: image 64M
# qemu: -drive if=none,id=image,file=image,format=raw,discard=unmap
# tools: yes
# deadline: 1500
. /share/tests/guest/disk.sh

start_disk "$(nvme_addresses)" "restart = { most = 10000, pause_seconds = 0, hang_seconds = 0 }"
attach nbd0 disk 1 512
fio_rounds nbd0 512 "$(part_of 600)" &
fio=$!
kill_hosts nbd0
wait $fio || fail "fio: $(cat /tmp/nbd0.fio.log)"
echo "fio         $(cat /tmp/nbd0.fio.rounds) rounds without an error over $kills kills, each $(cat /tmp/nbd0.fio.last)"
[ "$(status incarnation)" = $((kills + 1)) ] || fail "$kills kills, and incarnation $(status incarnation)"
detach nbd0
no_errors
stop_daemon
