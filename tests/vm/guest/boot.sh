# A boot loader for tests that change how the machine starts. Source it: . /share/tests/guest/boot.sh
#
# scripts/vm starts the guest, so the tools that an operator has write down for it what to start
# next: /etc/default/grub with update-grub, kexec, systemctl, shutdown. (Not reboot: busybox's shell takes its own.)

# Whether the machine has been started again.
is_second_boot() { grep -q 'iohost\.boot=2' /proc/cmdline; }

# install_boot_loader: from here on, the tools above work. The words of the kernel command line that
# are the test's are in GRUB's file.
install_boot_loader() {
    words=$(sed 's/.*iohost\.test=[^ ]* *//; s/ *$//' /proc/cmdline)
    mkdir -p /etc/default /boot
    echo "GRUB_CMDLINE_LINUX=\"$words\"" >/etc/default/grub

    cat >/bin/update-grub <<'END'
#!/bin/sh
system=guest
! uname -r | grep -q -e '-rig$' || system=kernel
echo "$system $(sed -n 's/^GRUB_CMDLINE_LINUX="\(.*\)"$/\1/p' /etc/default/grub)" >/tmp/next-boot
END
    cat >/bin/kexec <<'END'
#!/bin/sh
# kexec -l /boot/vmlinuz-RELEASE OPTION...
. /etc/default/grub
case $2 in
*-rig) echo "kernel $GRUB_CMDLINE_LINUX" ;;
*) echo "guest $GRUB_CMDLINE_LINUX" ;;
esac >/tmp/next-boot
END
    cat >/bin/systemctl <<'END'
#!/bin/sh
# systemctl kexec
exec shutdown -r now
END
    cat >/bin/shutdown <<'END'
#!/bin/sh
# shutdown -r now
dmesg -n 1 # a kernel message must not cut the line in two
echo
echo "IOHOST-GUEST-NEXT-BOOT: $(cat /tmp/next-boot)"
stty -F /dev/console sane # returns only when the line has left the serial port
reboot -f
END
    chmod +x /bin/update-grub /bin/kexec /bin/systemctl /bin/shutdown
}
