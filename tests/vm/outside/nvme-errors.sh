# The defects of a disk of tests/vm/nvme-errors.sh: QEMU's blkdebug. Run by scripts/vm.
[[ $1 == prepare ]] || exit 0
cat >blkdebug <<'END'
[inject-error]
event = "read_aio"
iotype = "read"
errno = "5"
sector = "16384"

[inject-error]
event = "write_aio"
iotype = "write"
errno = "5"
sector = "32768"
END
