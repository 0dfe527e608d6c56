//! Every code, with its explanation: the one place where they are written down.
//!
//! `docs/doctor.md` is this file as a table. A code is for ever: programs compare it. What it
//! says can change.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// iohost cannot run a driver on the device.
    Blocks,
    /// It can, and something is not as it should be.
    Warns,
    /// Worth knowing.
    Notes,
}

/// What `iohost explain` says of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The code.
    pub code: Code,
    /// How much it matters where doctor finds it; `None` for a code that only refusals have.
    pub severity: Option<Severity>,
    /// What is the case, in one sentence.
    pub means: &'static str,
    /// Why that matters, and what the kernel does.
    pub why: &'static str,
    /// How to see it for oneself.
    pub check: &'static str,
    /// What to do about it.
    pub fix: &'static str,
}

macro_rules! catalogue {
    ($($variant:ident = $name:literal, $severity:expr, {
        means: $means:literal,
        why: $why:literal,
        check: $check:literal,
        fix: $fix:literal,
    })*) => {
        /// A stable word for one thing that can be the matter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $means] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &[Code] = &[$(Code::$variant),*];

            /// The word.
            pub const fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// What there is to say of it.
            pub const fn explanation(self) -> Explanation {
                match self {
                    $(Code::$variant => Explanation {
                        code: self,
                        severity: $severity,
                        means: $means,
                        why: $why,
                        check: $check,
                        fix: $fix,
                    },)*
                }
            }
        }
    };
}

use Severity::{Blocks, Notes, Warns};

catalogue! {
    NoSuchDevice = "no-such-device", Some(Blocks), {
        means: "No PCI function has this address.",
        why: "The device may be switched off or unplugged, its slot may be off, or it has another address since \
              a card was added: the firmware numbers buses anew.",
        check: "ls /sys/bus/pci/devices; iohost devices",
        fix: "Correct the address. For a device that was plugged in or switched on late, let the kernel look again: \
              echo 1 > /sys/bus/pci/rescan",
    }
    DeviceGone = "device-gone", Some(Blocks), {
        means: "The device does not answer: its configuration space reads as all ones.",
        why: "A read that nobody answers comes back as ones. The device has lost power or its link, hangs, or was \
              unplugged without the kernel's knowing. Every register of it reads as ones, too.",
        check: "od -An -tx1 -N4 /sys/bus/pci/devices/ADDRESS/config shows ff ff ff ff; dmesg | grep -i -e aer -e pcie",
        fix: "Let the kernel forget it and look for it again: echo 1 > /sys/bus/pci/devices/ADDRESS/remove; \
              echo 1 > /sys/bus/pci/rescan. If it stays away, power-cycle the machine.",
    }
    NotAnEndpoint = "not-an-endpoint", Some(Blocks), {
        means: "The function is a bridge; iohost drives what is behind it.",
        why: "vfio-pci takes functions with a standard header only, and the kernel needs its bridges itself. A bridge \
              in the group of a device does no harm: it does not block the group.",
        check: "cat /sys/bus/pci/devices/ADDRESS/class begins with 0x06",
        fix: "Name the function behind the bridge: iohost devices lists all.",
    }
    NoIommu = "no-iommu", Some(Blocks), {
        means: "No IOMMU stands between the device and the machine's memory.",
        why: "VFIO hands out a device only with its IOMMU group, which the kernel makes when an IOMMU is at work. \
              It is not when the processor or board has none, when the firmware keeps it off and so describes none \
              (no DMAR table on Intel, no IVRS on AMD), when the kernel's command line turns it off, or when the \
              kernel waits to be told (intel_iommu=on). Without one a driver could make its device read and write all \
              of memory.",
        check: "ls /sys/kernel/iommu_groups; ls /sys/firmware/acpi/tables | grep -e DMAR -e IVRS; \
                cat /proc/cmdline; dmesg | grep -i -e DMAR -e AMD-Vi",
        fix: "Turn VT-d or AMD-Vi on in the firmware's setup, take intel_iommu=off, amd_iommu=off or iommu=off from \
              the kernel command line, add intel_iommu=on for Intel; then reboot. Where the machine has none, there are \
              backends that do without, all UNSAFE: docs/backends.md.",
    }
    NoInterruptRemapping = "no-interrupt-remapping", Some(Blocks), {
        means: "The IOMMU does not remap interrupts, so a device could send any interrupt to the machine.",
        why: "A message-signalled interrupt is a write to a certain address. Where these writes are not checked, a \
              driver can make its device forge those of another one. VFIO and iommufd refuse devices then, with EPERM, \
              until they are told to take the risk.",
        check: "grep IR- /proc/interrupts; dmesg | grep -i -e 'IRQ remapping' -e 'AMD-Vi: Interrupt remapping'",
        fix: "Take nointremap or intremap=off from the kernel command line, or turn interrupt remapping (x2APIC) on in \
              the firmware; reboot. Where the machine cannot do it and you trust the drivers: \
              echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts, or the same of vfio_iommu_type1.",
    }
    UnsafeInterrupts = "unsafe-interrupts", Some(Warns), {
        means: "VFIO was told to hand out devices although interrupts are not remapped.",
        why: "Somebody set allow_unsafe_interrupts. A driver can then make its device send any interrupt.",
        check: "cat /sys/module/{iommufd,vfio_iommu_type1}/parameters/allow_unsafe_interrupts",
        fix: "Turn remapping on (see no-interrupt-remapping), then set the parameter to 0.",
    }
    DriverNotLoaded = "driver-not-loaded", Some(Blocks), {
        means: "The kernel's driver that hands devices out is not loaded: vfio-pci, or uio_pci_generic for that backend.",
        why: "A device is bound to vfio-pci before a program can open it. The driver is a module in most distributions, \
              and nothing loads it by itself.",
        check: "ls -d /sys/bus/pci/drivers/vfio-pci; modinfo vfio-pci",
        fix: "modprobe vfio-pci; for every start of the machine: echo vfio-pci > /etc/modules-load.d/iohost.conf. A \
              kernel that has no such module needs CONFIG_VFIO_PCI.",
    }
    GroupNotViable = "group-not-viable", Some(Blocks), {
        means: "Another function of the device's IOMMU group is in the hands of a kernel driver.",
        why: "The IOMMU cannot tell the functions of a group apart, so VFIO hands them out together or not at all. \
              Functions without a driver, with vfio-pci or with pci-stub do not block, and neither do bridges.",
        check: "ls -l /sys/bus/pci/devices/ADDRESS/iommu_group/devices/*/driver",
        fix: "Take the others from their drivers, or the whole group at once: iohost bind --group ADDRESS. If the machine needs them, put the \
              device into another slot: which functions share a group depends on the bridges above them.",
    }
    DiskInUse = "disk-in-use", Some(Blocks), {
        means: "The machine uses a disk that is behind the device.",
        why: "Taking a disk controller from its driver takes the disks away: what is mounted on them is lost. A disk \
              counts as used while it is mounted, swapped to, part of another one (LVM, RAID, dm-crypt), or held by \
              somebody else.",
        check: "lsblk; findmnt; swapon",
        fix: "End the uses, from the top one down: umount, swapoff, dmsetup remove, mdadm --stop.",
    }
    InterfaceInUse = "interface-in-use", Some(Blocks), {
        means: "A network interface of the device is up, or belongs to a bridge or bond.",
        why: "Taking the card from its driver takes the interface away, with its addresses and connections: perhaps \
              the one that you are logged in through.",
        check: "ip link; ip route",
        fix: "Take the interface down: ip link set INTERFACE down. What manages the network (NetworkManager, \
              systemd-networkd, ifupdown) has to be told too, or it comes back.",
    }
    DeviceBusy = "device-busy", Some(Blocks), {
        means: "Another process has the device or its IOMMU group open.",
        why: "VFIO lets one process at a time have a group, and one a device. A virtual machine with the device passed \
              through is the usual owner.",
        check: "fuser -v /dev/vfio/*; as root: what others have open is shown to root only",
        fix: "Stop that process.",
    }
    DeviceOwned = "device-owned", Some(Notes), {
        means: "The iohost daemon has the device: a driver runs on it.",
        why: "There is nothing wrong with that. Another daemon, a virtual machine or a kernel driver gets the device \
              only when iohost has given it back.",
        check: "iohost status",
        fix: "iohost unbind ADDRESS stops the driver, resets the device and gives it back.",
    }
    VfioPermission = "vfio-permission", Some(Blocks), {
        means: "The user of the daemon may not open the nodes of the device.",
        why: "The kernel makes them for root (mode 0600). Whoever may open them can use the device, and nothing else: \
              the IOMMU keeps it from the memory of others. Access control lists are not looked at.",
        check: "ls -l /dev/vfio /dev/vfio/devices /dev/iommu",
        fix: "chown USER NODE, until the device is bound anew; a udev rule for SUBSYSTEM==\"vfio\" (and \"vfio-dev\") \
              does it each time. A device without an IOMMU needs CAP_SYS_RAWIO as well, which is to say root.",
    }
    UioPermission = "uio-permission", None, {
        means: "The user of the daemon may not open the files that UIO takes.",
        why: "Besides /dev/uioN, UIO takes the function's files config and resourceN in sysfs, which are root's.",
        check: "ls -l /dev/uio* /sys/bus/pci/devices/ADDRESS/{config,resource*}",
        fix: "Run the daemon as root, or give its user these files.",
    }
    NoPermission = "no-permission", Some(Blocks), {
        means: "The user of the daemon may not take the device from its kernel driver.",
        why: "That is done by writing to driver_override, unbind and drivers_probe in sysfs, which are root's.",
        check: "ls -l /sys/bus/pci/devices/ADDRESS/driver_override /sys/bus/pci/drivers_probe",
        fix: "Bind the device as root, and give the daemon's user its node; or run the daemon as root.",
    }
    MemlockTooSmall = "memlock-too-small", Some(Blocks), {
        means: "Drivers need more memory for DMA than the daemon may lock.",
        why: "Memory that a device reaches must not move, so the kernel locks it, and counts it against RLIMIT_MEMLOCK. \
              The default is 8 MiB, and was 64 KiB before Linux 5.16. Whoever has CAP_IPC_LOCK has no limit.",
        check: "ulimit -l (in KiB); grep 'locked memory' /proc/PID/limits",
        fix: "In the service's unit file: LimitMEMLOCK=BYTES. Without systemd: ulimit -l KIB before the daemon is \
              started. What drivers need is said by --dma-memory.",
    }
    DeviceAsleep = "device-asleep", Some(Warns), {
        means: "The device is in a low power state, in which its registers do not answer.",
        why: "In D3hot only configuration space works, in D3cold not even that. Linux puts idle devices there (runtime \
              power management), and some drivers leave theirs there. The kernel wakes a device when it is opened; one \
              that was put to sleep behind its back it may not. Under vfio-pci an idle device in D3hot is normal.",
        check: "cat /sys/bus/pci/devices/ADDRESS/{power_state,power/control}; lspci -vv -s ADDRESS | grep 'Status: D'",
        fix: "echo on > /sys/bus/pci/devices/ADDRESS/power/control. Where no driver has it: \
              echo 1 > /sys/bus/pci/devices/ADDRESS/enable, and 0 again, lets the kernel set it to D0.",
    }
    NoReset = "no-reset", Some(Warns), {
        means: "The device cannot be reset alone.",
        why: "iohost resets a device before and after a driver, so that nothing of the one is left for the other. Without \
              a function-level reset, a power-management reset or a bus of its own, that takes its whole bus: possible \
              when all on it are iohost's, else left out.",
        check: "cat /sys/bus/pci/devices/ADDRESS/reset_method",
        fix: "Where the list is empty because somebody emptied it: echo default > \
              /sys/bus/pci/devices/ADDRESS/reset_method. Else put the device into a slot of its own, or bind its \
              neighbours to vfio-pci too.",
    }
    NoInterrupts = "no-interrupts", Some(Notes), {
        means: "The device has no interrupt: neither a line nor MSI nor MSI-X.",
        why: "A driver that waits for interrupts does not start on it, one that polls does.",
        check: "lspci -vv -s ADDRESS | grep -e Interrupt -e MSI",
        fix: "Use a driver that polls.",
    }
    BarUnassigned = "bar-unassigned", Some(Warns), {
        means: "The kernel found no room for a BAR of the device.",
        why: "Firmware leaves too little address space below a bridge, most often for large BARs and for devices that \
              were plugged in later. A driver that maps the BAR does not start.",
        check: "cat /sys/bus/pci/devices/ADDRESS/resource; dmesg | grep \"can't assign\"",
        fix: "Let the kernel place it again: echo 1 > /sys/bus/pci/devices/ADDRESS/remove; \
              echo 1 > /sys/bus/pci/rescan. If that fails: 'above 4G decoding' in the firmware's setup, or \
              pci=realloc on the kernel command line.",
    }
    NotBound = "not-bound", Some(Notes), {
        means: "The device is not bound to vfio-pci, or whichever driver its backend needs.",
        why: "iohost takes a device from its kernel driver when it is told to, and gives it back in the end.",
        check: "readlink /sys/bus/pci/devices/ADDRESS/driver",
        fix: "iohost bind ADDRESS, or bind = true in the configuration.",
    }
    NoCdev = "no-cdev", Some(Notes), {
        means: "The kernel has no nodes for devices with iommufd, so devices are reached by their groups.",
        why: "A node for each device, /dev/vfio/devices/vfioN, with an address space of its own came with Linux 6.6, \
              behind CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV; distributions leave them out now and then. The group does \
              the same job. It is a fault only where the configuration says backend = \"vfio-cdev\".",
        check: "grep vfio-dev /proc/devices; ls -l /dev/iommu; grep VFIO_DEVICE_CDEV /boot/config-$(uname -r)",
        fix: "modprobe iommufd, where only /dev/iommu is missing; else start a kernel with these options. Or leave it, \
              and leave `backend` out of the configuration.",
    }
    NoIommuModeOn = "no-iommu-mode-on", Some(Warns), {
        means: "VFIO's no-IOMMU mode is on: it hands out devices that nothing keeps from the machine's memory.",
        why: "iohost uses such a device only where the configuration says so. Other programs may not ask.",
        check: "cat /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        fix: "echo 0 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
    }
    NoIommuModeOff = "no-iommu-mode-off", None, {
        means: "The configuration wants a device without an IOMMU, and VFIO was not told to take such devices.",
        why: "It is UNSAFE: a driver that goes wrong reads and writes all of memory. So the kernel wants it said twice, \
              by the module's parameter and by CAP_SYS_RAWIO, and taints itself.",
        check: "cat /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        fix: "echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode; a kernel without CONFIG_VFIO_NOIOMMU has \
              no such file.",
    }
    UnsafeBackend = "unsafe-backend", Some(Warns), {
        means: "The configuration reaches the device in an UNSAFE way: no IOMMU keeps it from the machine's memory.",
        why: "uio and vfio-no-iommu are for machines and kernels that have nothing better. A fault of the driver can \
              overwrite anything.",
        check: "iohost status",
        fix: "Leave `backend` and `allow_unsafe` out of the device's configuration.",
    }
    HasIommu = "has-iommu", None, {
        means: "The configuration wants a device without its IOMMU, and it has one.",
        why: "The kernel makes no-IOMMU groups only for devices that are in no other.",
        check: "readlink /sys/bus/pci/devices/ADDRESS/iommu_group",
        fix: "Leave `backend` out of the configuration of this device.",
    }
    InUse = "in-use", None, {
        means: "The machine uses what is behind the device, or behind others that would be taken with it.",
        why: "Taking a device from its driver takes its disks and network interfaces away. iohost does that by force only. \
              doctor calls each by its kind: see disk-in-use and interface-in-use.",
        check: "iohost doctor ADDRESS; lsblk; ip link",
        fix: "End the uses, or take it all the same: iohost bind --force ADDRESS.",
    }
    Taken = "taken", None, {
        means: "The device is taken already: by another iohost, or together with another device of its group.",
        why: "Each device has one owner, who gives it back in the end; what was taken for another one's sake goes back with it.",
        check: "iohost status; the message has the process or the other device",
        fix: "Stop that process, or unbind the other device first: iohost unbind ADDRESS.",
    }
    NoGroup = "no-group", None, {
        means: "A whole group was asked for, for a driver that groups do not matter to.",
        why: "uio_pci_generic and VFIO without an IOMMU take functions one by one.",
        check: "iohost devices",
        fix: "Leave --group out.",
    }
    StateDirectory = "state-directory", None, {
        means: "The directory in which iohost writes down what it has taken does not work.",
        why: "What is written there is how devices get back to their drivers after a crash or a power cut.",
        check: "ls -l /var/lib/iohost; the message has the file",
        fix: "Make it writable for the daemon; remove a file there only when the devices in it are back in place.",
    }
    NotGivenBack = "not-given-back", None, {
        means: "The daemon ended while devices were still being taken or given back.",
        why: "A kernel driver takes long over a device, or hangs. What is unfinished is written down.",
        check: "iohost devices; dmesg | tail",
        fix: "Start the daemon again: it finishes, or gives the devices back.",
    }
    NotPci = "not-pci", None, {
        means: "The service's device is no PCI function, so there is nothing to take.",
        why: "A device behind a socket has no kernel driver and no IOMMU group.",
        check: "iohost status",
        fix: "Leave --group and --persist out.",
    }
    BindFailed = "bind-failed", None, {
        means: "The kernel accepted every step of binding, but the device has another driver afterwards.",
        why: "The driver looked at the device and refused it, or another one was faster.",
        check: "dmesg | tail",
        fix: "The kernel log says why.",
    }
    DeviceOpen = "device-open", None, {
        means: "The kernel refused a step of opening the device, for a reason that has no code of its own.",
        why: "The message has the step and what the kernel said.",
        check: "dmesg | tail; iohost doctor ADDRESS",
        fix: "The kernel log says why.",
    }
    BackendLacksDma = "backend-lacks-dma", None, {
        means: "The driver needs DMA, and the device is reached in a way that has none.",
        why: "uio and vfio-no-iommu can map no memory for a device: nothing would translate its addresses.",
        check: "docs/backends.md has what each way offers",
        fix: "Reach the device through VFIO and an IOMMU: leave `backend` out of its configuration.",
    }
    BackendLacksMessages = "backend-lacks-messages", None, {
        means: "The driver needs interrupts by message, and the device is reached in a way that has none.",
        why: "uio_pci_generic knows the INTx line only.",
        check: "docs/backends.md has what each way offers",
        fix: "Reach the device through VFIO: leave `backend` out of its configuration.",
    }
    Sysfs = "sysfs", None, {
        means: "Sysfs does not say what it should.",
        why: "iohost learns of devices from /sys, which may not be mounted, as in some containers.",
        check: "ls /sys/bus/pci/devices",
        fix: "mount -t sysfs sysfs /sys",
    }
    NotRunning = "not-running", None, {
        means: "The daemon does not run, or the service does not.",
        why: "A client reaches a driver through the daemon, and only while the driver runs; one that died is started again after a pause that grows.",
        check: "iohost status",
        fix: "Start the daemon (iohost daemon), wait for the restart, or start the service again: iohost bind SERVICE.",
    }
    SocketPermission = "socket-permission", None, {
        means: "This user may not use the daemon's control socket.",
        why: "Whoever may use it can take devices from the kernel, so it belongs to the daemon's user and group.",
        check: "ls -l /run/iohost/io.iohost",
        fix: "Run the command as root, or join the group that owns the socket.",
    }
    Connect = "connect", None, {
        means: "The control socket is there and cannot be connected to.",
        why: "It is no socket, or the kernel refused for a reason that the message has.",
        check: "ls -l /run/iohost/io.iohost",
        fix: "Correct the path: --socket or --runtime-dir.",
    }
    Broken = "broken", None, {
        means: "The conversation with the daemon broke off.",
        why: "The daemon ended, or another program than the daemon answers on that socket.",
        check: "iohost status; the daemon's log",
        fix: "Ask again over a new connection; install daemon and client of the same version.",
    }
    Silent = "silent", None, {
        means: "The daemon did not answer in time.",
        why: "It hangs, or the machine is so busy that it does not get to it.",
        check: "the daemon's log; IOHOST_LOG=debug shows more",
        fix: "Read the log for what it did last, and start it again if it hangs.",
    }
    AlreadyRunning = "already-running", None, {
        means: "Another daemon has the runtime directory.",
        why: "Two daemons would take devices from each other.",
        check: "iohost status; the message has the process",
        fix: "Stop that one, or give this one another folder: --runtime-dir.",
    }
    Stopping = "stopping", None, {
        means: "The daemon is on its way out.",
        why: "It answers what it was asked before and starts nothing new.",
        check: "iohost status",
        fix: "Start it again: iohost daemon.",
    }
    RuntimeDirectory = "runtime-directory", None, {
        means: "The daemon cannot make or use its runtime directory.",
        why: "Its socket and its lock have to be there.",
        check: "ls -ld /run/iohost",
        fix: "Give the daemon's user that folder, or name another: --runtime-dir.",
    }
    ControlSocket = "control-socket", None, {
        means: "The daemon cannot listen on its control socket.",
        why: "The kernel refused, for the reason in the message.",
        check: "ls -l /run/iohost",
        fix: "Remove what is in the way, or name another folder: --runtime-dir.",
    }
    PathTooLong = "path-too-long", None, {
        means: "The path of the control socket is longer than a socket's address can be.",
        why: "Linux has room for 107 bytes (unix(7)).",
        check: "the message has the path",
        fix: "Choose a shorter runtime directory.",
    }
    Config = "config", None, {
        means: "The configuration has a mistake.",
        why: "The daemon touches nothing before all of it is right.",
        check: "the message has file, line and key",
        fix: "Correct that line.",
    }
    NoResources = "no-resources", None, {
        means: "A limit of the process is reached, or the machine is out of memory.",
        why: "Sessions take descriptors: their sockets, and three for each queue.",
        check: "ulimit -n; grep 'open files' /proc/PID/limits",
        fix: "Raise the limit: LimitNOFILE= of the service, or ulimit -n; or close sessions.",
    }
    NoSuchService = "no-such-service", None, {
        means: "The daemon has no service of this name, location or driver.",
        why: "A service is a device that the daemon was told to run: by its configuration, or by iohost bind.",
        check: "iohost status",
        fix: "Name one that is listed, or bind the device.",
    }
    Ambiguous = "ambiguous", None, {
        means: "More than one service fits.",
        why: "A driver's name, or a rule, stands for a service only while one fits.",
        check: "iohost status",
        fix: "Name the service.",
    }
    NoMatch = "no-match", None, {
        means: "No service that runs fits what the program asks for.",
        why: "Programs can ask by driver, interface or device instead of by name.",
        check: "iohost status",
        fix: "Bind a device that fits, or wait for its driver.",
    }
    NoDriver = "no-driver", None, {
        means: "No plugin is for the device, and the configuration names none.",
        why: "A plugin says which vendor, device and class numbers it is for.",
        check: "iohost devices; ls /usr/lib/iohost/drivers",
        fix: "Install a plugin for it, or name one: driver = \"NAME\" in the configuration.",
    }
    NoSuchPlugin = "no-such-plugin", None, {
        means: "The driver that the configuration names is not installed.",
        why: "Plugins are the .so files of the driver directory.",
        check: "ls /usr/lib/iohost/drivers",
        fix: "Install it there, or correct the name.",
    }
    DriverDirectory = "driver-directory", None, {
        means: "The driver directory cannot be read.",
        why: "The daemon looks there for plugins when it starts and at each iohost bind.",
        check: "ls -l /usr/lib/iohost/drivers",
        fix: "Make the folder, or name another: --driver-dir.",
    }
    PluginUnreadable = "plugin-unreadable", None, {
        means: "The plugin's file cannot be read.",
        why: "Its permissions or its path are wrong.",
        check: "ls -l FILE",
        fix: "Correct path or permissions.",
    }
    PluginNotALibrary = "plugin-not-a-library", None, {
        means: "The file is no shared library for this machine.",
        why: "Only 64-bit ELF libraries of this architecture can be loaded.",
        check: "file FILE",
        fix: "Give the .so that cargo build makes of a crate of type cdylib.",
    }
    PluginNoDriver = "plugin-no-driver", None, {
        means: "The library exports no driver.",
        why: "export_driver! leaves a descriptor in the file, which is read before anything of it runs.",
        check: "readelf -S FILE",
        fix: "Build it with iohost_driver::export_driver!.",
    }
    PluginAbi = "plugin-abi", None, {
        means: "The plugin was built for another version of iohost.",
        why: "The tables between host and plugin have a version and a fingerprint; both are compared before anything is loaded.",
        check: "the message names both sides",
        fix: "Build the plugin anew with this version's iohost_driver.",
    }
    PluginPersonality = "plugin-personality", None, {
        means: "The plugin's match table makes no sense.",
        why: "Each entry has to name a vendor and device, or a class.",
        check: "the plugin's PERSONALITIES",
        fix: "Correct the table and build it anew.",
    }
    PluginLoad = "plugin-load", None, {
        means: "The plugin could not be loaded.",
        why: "The dynamic loader refused: a library or symbol is missing.",
        check: "ldd FILE",
        fix: "Install what is missing, or build the plugin anew.",
    }
    DriverHost = "driver-host", None, {
        means: "The program that runs drivers could not be started or set up.",
        why: "It is iohost-driver-host, beside iohost unless --driver-host says otherwise.",
        check: "the message has the reason",
        fix: "Install it, or name it; check the limits of the daemon.",
    }
    Terminated = "terminated", None, {
        means: "The driver ended itself.",
        why: "Its code called terminate; its device was made safe and given back.",
        check: "the driver's log lines",
        fix: "See the log, then: iohost bind SERVICE.",
    }
    NotRegistered = "not-registered", None, {
        means: "The driver runs, and does not want to be seen yet.",
        why: "A driver can say itself when clients may open it, for example after its device has told what it is.",
        check: "iohost status --json has is_registered",
        fix: "Wait for it; iohost_client's Daemon::watch tells.",
    }
    OtherInterface = "other-interface", None, {
        means: "The driver that took over serves another interface than the one before it.",
        why: "A session outlives its driver only where the next one has all that the session's client was built for.",
        check: "iohost call SERVICE lists the methods",
        fix: "Open a new session.",
    }
    ClientType = "client-type", None, {
        means: "The driver has no clients of that type.",
        why: "A driver can have more than one interface; a program names one by its place, from 0.",
        check: "the driver's documentation",
        fix: "Open the session as another type of client.",
    }
    PowerLate = "power-late", None, {
        means: "The driver has not acknowledged a power state within 20 seconds.",
        why: "It may still do so; until then its device has to be taken for being in the old state.",
        check: "iohost status shows the state that it has acknowledged",
        fix: "Read the driver's log for what it waits for.",
    }
    Disabled = "disabled", None, {
        means: "The configuration says that the device is to be left alone.",
        why: "A device with disabled = true is started neither with the daemon, nor by a match, nor by iohost bind.",
        check: "iohost status SERVICE names the line",
        fix: "Take the key out, then: iohost reload.",
    }
    DriverStart = "driver-start", None, {
        means: "The driver refused its device.",
        why: "Its start function returned an error; the device may be another one than it expects, or in a state that it does not know.",
        check: "the driver's log lines",
        fix: "See the log; the driver's documentation has what it needs.",
    }
    DriverDied = "driver-died", None, {
        means: "The driver's process ended without being asked to.",
        why: "A crash, a panic, or a kill; nobody else is harmed. The device is reset and the driver started again, later each time, and after too many times not at all.",
        check: "iohost status; the daemon's log",
        fix: "Read the log for what it said last; a service in quarantine is started again by iohost bind SERVICE.",
    }
    NoSuchCrash = "no-such-crash", None, {
        means: "There is no crash report of this number.",
        why: "The newest 64 are kept; they lie in the daemon's state directory.",
        check: "iohost crashes",
        fix: "Name one that is listed, or the directory with --state-dir.",
    }
    CrashUnreadable = "crash-unreadable", None, {
        means: "A crash report, or the folder of them, cannot be read.",
        why: "They belong to the user that the daemon runs as; or the file is of another version.",
        check: "ls -l /var/lib/iohost/crashes",
        fix: "Read it as that user.",
    }
    DriverPanicked = "driver-panicked", None, {
        means: "The driver panicked, and its process was ended.",
        why: "A handler that panics leaves the driver's state as it was then. The caller is answered, the device is reset and the driver started again.",
        check: "iohost crashes; iohost crashes show N has the words and the place",
        fix: "Report it to the driver's author with that.",
    }
    DriverHung = "driver-hung", None, {
        means: "The driver did what it was told too slowly, or gave no sign of life in the middle of something, and was killed.",
        why: "Starting, stopping and leaving have a time limit each, and so has each piece of work that reports no progress, so that a driver cannot hold up the machine.",
        check: "the daemon's log; IOHOST_LOG=debug shows more",
        fix: "Find out what it waits for; it is started again.",
    }
    DriverBusy = "driver-busy", None, {
        means: "The driver is not upgraded: it had calls under way that it did not answer in time.",
        why: "A driver is replaced between calls, so that no client sees an error.",
        check: "iohost status SERVICE",
        fix: "Try again when its clients do less; the driver goes on as before.",
    }
    UpgradeFailed = "upgrade-failed", None, {
        means: "The new version of a driver does not run, and the one before it runs again.",
        why: "It did not start, ended, took too long, or serves another interface than its clients use; the message says which.",
        check: "the daemon's log",
        fix: "Correct the new version and upgrade again; the plugin that is installed is the old one.",
    }
    UpgradeMismatch = "upgrade-mismatch", None, {
        means: "The plugin file is not another version of the driver that runs.",
        why: "A service is upgraded to its own driver, for its own device.",
        check: "iohost status",
        fix: "Give a plugin of that driver; another driver is installed, and bound with iohost unbind and iohost bind.",
    }
    PluginInstall = "plugin-install", None, {
        means: "A plugin file could not be put into the driver directory.",
        why: "The daemon may not write there, or there is no room.",
        check: "ls -ld of the directory; df",
        fix: "See to it that the daemon may write there, and that there is room.",
    }
    DriverUnkillable = "driver-unkillable", None, {
        means: "The driver's process does not end even by SIGKILL.",
        why: "It hangs inside the kernel, with its device; nothing of that device is touched again.",
        check: "cat /proc/PID/stack; dmesg",
        fix: "The device needs a power cycle, and perhaps the machine a reboot.",
    }
    DriverSilent = "driver-silent", None, {
        means: "The driver's process takes no new session.",
        why: "It does not read its messages, or its handlers take long.",
        check: "iohost status SERVICE",
        fix: "Try again; if it stays so, restart it: iohost unbind, iohost bind.",
    }
    DriverProtocol = "driver-protocol", None, {
        means: "The driver's process said something that the daemon does not understand.",
        why: "iohost and iohost-driver-host are of different versions, or a plugin damaged its process.",
        check: "the message has what was said",
        fix: "Install both of the same version.",
    }
    DeviceError = "device-error", None, {
        means: "The device reported an error that it did not correct itself.",
        why: "PCIe devices report errors of their link and of their own (AER). What is done then is the configuration's choice: \
              tell, reset, or keep the device from being used.",
        check: "dmesg | grep -i -e aer -e 'PCIe Bus Error'",
        fix: "If it comes again, the card sits badly or is broken. on_error in the device's configuration has the choice.",
    }
    DeviceQuarantined = "device-quarantined", None, {
        means: "The device could not be brought to rest, so no driver is started on it again by itself.",
        why: "After each driver the device is quieted and reset, and it is looked whether it answers. One that does not might \
              still write to memory.",
        check: "iohost status; iohost doctor ADDRESS; dmesg",
        fix: "Power-cycle the device, then start it again: iohost bind ADDRESS.",
    }
    Removed = "removed", None, {
        means: "The device is taken away: unplugged, or given up by an operator through the kernel.",
        why: "The kernel asks for it back, and waits until the driver has let go.",
        check: "ls /sys/bus/pci/devices; dmesg | tail",
        fix: "Plug it in again, or let the kernel look for it: echo 1 > /sys/bus/pci/rescan; then iohost bind ADDRESS.",
    }
    DeviceServer = "device-server", None, {
        means: "The emulated device's server cannot be used.",
        why: "No vfio-user server listens on that socket, or it does not keep to the protocol.",
        check: "ls -l SOCKET; the server's log",
        fix: "Start the server, or correct `socket` in the configuration.",
    }
    DeviceBroken = "device-broken", None, {
        means: "The device cannot be reset or does not answer as a PCI function should.",
        why: "It hangs, or has left the bus.",
        check: "iohost doctor ADDRESS; dmesg",
        fix: "Power-cycle the device.",
    }
    SessionRefused = "session-refused", None, {
        means: "The driver refused the session.",
        why: "The reason in the message is the driver's.",
        check: "the driver's log lines",
        fix: "Depends on the driver.",
    }
    AccessDenied = "access-denied", None, {
        means: "The client's user may not open this service.",
        why: "The configuration says who may, device by device; the user and its groups are what the kernel noted when \
              the client connected. Root and the daemon's own user always may.",
        check: "allow_users and allow_groups of the device in the configuration; id",
        fix: "Add the user or one of its groups to allow_users or allow_groups. A group that was given just now counts \
              after the next login.",
    }
    AdminOnly = "admin-only", None, {
        means: "The client's user may not take devices or give them back.",
        why: "That changes the machine: it is root's and the daemon's own user's, unless the configuration says who else.",
        check: "admin_users and admin_groups in the configuration; id",
        fix: "Run it as root, or add the user or one of its groups to admin_users or admin_groups.",
    }
    ClientSessions = "client-sessions", None, {
        means: "The client's process has as many sessions as it may, with all services together.",
        why: "Each takes memory and descriptors of the daemon, and no client may take those of the others.",
        check: "iohost status",
        fix: "Close one, or raise sessions_per_client in the configuration.",
    }
    ClientMemory = "client-memory", None, {
        means: "The queues of the client's sessions would take more memory than one process may have.",
        why: "The memory is shared, and the daemon holds it while the session lasts.",
        check: "memory_per_client in the configuration",
        fix: "Ask for smaller queues, close sessions, or raise memory_per_client in the configuration.",
    }
    TooManyConnections = "too-many-connections", None, {
        means: "The client's process, or its user, has as many connections to the daemon as it may.",
        why: "Each takes memory and descriptors of the daemon, and no client may take those of the others.",
        check: "ss -xp | grep io.iohost",
        fix: "Close some: one connection serves any number of calls. Or raise connections_per_client in the \
              configuration.",
    }
    TooManyRequests = "too-many-requests", None, {
        means: "The client's process makes more requests of the daemon than it may.",
        why: "Requests are dealt with one after the other, those of all clients. Calls of a driver are none: they go to \
              the driver.",
        check: "requests_per_second in the configuration",
        fix: "Wait between requests; watch services where it is their state that is asked for. Or raise \
              requests_per_second in the configuration.",
    }
    SandboxFailed = "sandbox-failed", None, {
        means: "The driver host could not give up its rights.",
        why: "It does before it loads its plugin, and runs none with rights that it was to give up.",
        check: "the message has the step and what the kernel said",
        fix: "Look for what forbids the step: another sandbox around the daemon, a limit. sandbox = \"off\" for the device \
              runs its driver with the daemon's rights.",
    }
    SandboxIncomplete = "sandbox-incomplete", None, {
        means: "The sandbox is required, and this kernel or this daemon cannot do all of it.",
        why: "A user of its own takes a daemon with root's rights, Landlock a kernel that has it switched on.",
        check: "cat /sys/kernel/security/lsm; id",
        fix: "Give what is missing, or set sandbox = \"on\" to do without.",
    }
    NoLandlock = "no-landlock", Some(Notes), {
        means: "The kernel's Landlock is off, which would keep drivers from files.",
        why: "Without it a driver can read what everybody may read; it still can write nothing, start nothing and connect \
              to nothing. iohost status shows what each driver's sandbox has.",
        check: "cat /sys/kernel/security/lsm",
        fix: "Add landlock to lsm= on the kernel command line; reboot. A kernel before 5.13 has none.",
    }
    TooManySessions = "too-many-sessions", None, {
        means: "The service has as many sessions as it may.",
        why: "Each takes memory and descriptors of the daemon.",
        check: "iohost status",
        fix: "Close one, or raise sessions_per_service in the configuration.",
    }
    QueueCount = "queue-count", None, {
        means: "The sizes given are not one for each queue.",
        why: "A session has one ring for each queue of the interface.",
        check: "iohost call SERVICE",
        fix: "Give one size for each queue, or none at all.",
    }
    QueueSize = "queue-size", None, {
        means: "A queue's ring is too small or too large.",
        why: "A ring is a power of two in whole pages, and its memory is the daemon's.",
        check: "the message has the bounds",
        fix: "Choose another size, or raise largest_queue_bytes in the configuration.",
    }
    Stopped = "stopped", None, {
        means: "The service was stopped because somebody asked for it.",
        why: "Its device was reset and given back.",
        check: "iohost status",
        fix: "iohost bind SERVICE starts it again.",
    }
    NotStarted = "not-started", None, {
        means: "The service was not started yet.",
        why: "The daemon starts them one after the other.",
        check: "iohost status",
        fix: "Wait a moment.",
    }
    Killed = "killed", None, {
        means: "A driver's process was killed because a second signal came.",
        why: "The first SIGTERM or SIGINT asks drivers to stop, the second does not wait for them.",
        check: "the daemon's log",
        fix: "Start the daemon again; its devices are reset first.",
    }
    WrongInterface = "wrong-interface", None, {
        means: "The service serves another interface than the program speaks.",
        why: "A driver and its clients share an interface by name.",
        check: "iohost call SERVICE",
        fix: "Name a service of that interface.",
    }
    OtherVersion = "other-version", None, {
        means: "The driver's interface lacks what the program was built for.",
        why: "A typed client compares methods and queues before it makes the first call.",
        check: "iohost call SERVICE",
        fix: "Install driver and program of the same version.",
    }
    NoSuchQueue = "no-such-queue", None, {
        means: "The interface has no queue of this name.",
        why: "Queues are declared in the driver's interface!.",
        check: "iohost call SERVICE",
        fix: "Name one that is listed.",
    }
    QueueInUse = "queue-in-use", None, {
        means: "That end of the queue is in use in this session already.",
        why: "A ring has one producer and one consumer.",
        check: "the program's own code",
        fix: "Use the end that is open, or open another session.",
    }
    BadQueue = "bad-queue", None, {
        means: "The memory of a queue is not what it should be.",
        why: "Its header or its seals are wrong: daemon and program do not fit together.",
        check: "iohost status; the program's version",
        fix: "Install iohost and the program of the same version.",
    }
    NoMemory = "no-memory", None, {
        means: "The driver offers no memory of this type.",
        why: "Types are numbers that each driver documents.",
        check: "the driver's documentation",
        fix: "Ask for another type.",
    }
    BadMemory = "bad-memory", None, {
        means: "The memory that the driver offers cannot be mapped.",
        why: "It is not sealed or not as long as it was said to be.",
        check: "the message has the reason",
        fix: "Install iohost and the program of the same version.",
    }
    OfferNotSent = "offer-not-sent", None, {
        means: "Memory that the program offered did not get to the driver.",
        why: "The session has ended, or the driver has not taken what was sent before.",
        check: "iohost status SERVICE",
        fix: "Open the session anew, or wait for the calls under way.",
    }
    WrongSize = "wrong-size", None, {
        means: "A value that the driver sent has another size than the program expects.",
        why: "Driver and program were built from different versions of their interface.",
        check: "iohost call SERVICE",
        fix: "Install driver and program of the same version.",
    }
    NoSuchMethod = "no-such-method", None, {
        means: "The driver has no method of this name.",
        why: "iohost call knows the interface from the driver itself.",
        check: "iohost call SERVICE",
        fix: "Name one that is listed.",
    }
    BadArgument = "bad-argument", None, {
        means: "An argument is not what the method takes.",
        why: "The interface says the type of each.",
        check: "iohost call SERVICE",
        fix: "Correct the argument.",
    }
    NoSuchCode = "no-such-code", None, {
        means: "There is no such code.",
        why: "Codes are single words.",
        check: "iohost explain",
        fix: "Name one that is listed.",
    }
    NothingToSend = "nothing-to-send", None, {
        means: "The demo got no file with anything in it.",
        why: "It streams files through a device and compares.",
        check: "ls -l FILE",
        fix: "Name another file.",
    }
    File = "file", None, {
        means: "A file cannot be read or written.",
        why: "The message has the kernel's reason.",
        check: "ls -l FILE",
        fix: "Correct path or permissions.",
    }
    FileChanged = "file-changed", None, {
        means: "A file changed while the demo sent it.",
        why: "What came back cannot be compared with what was there before.",
        check: "ls -l FILE",
        fix: "Name a file that nobody writes to.",
    }
    DemoCall = "demo-call", None, {
        means: "A call of the demo failed.",
        why: "The message has the driver's status.",
        check: "iohost status; the driver's log lines",
        fix: "See the driver's log.",
    }
    DemoStream = "demo-stream", None, {
        means: "A data queue of the demo failed.",
        why: "The driver or the daemon went away in the middle of it.",
        check: "iohost status",
        fix: "Run it again.",
    }
    DemoWrong = "demo-wrong", None, {
        means: "What came back from the device is not what was sent.",
        why: "The device or its driver is broken.",
        check: "run it again, with another file",
        fix: "Report it.",
    }
    FaultsCampaign = "faults-campaign", None, {
        means: "A campaign of faults could not be made, or not to its end.",
        why: "The message says what could not be had, or what was waited for in vain.",
        check: "the daemon's log that the message names",
        fix: "Correct what it names, and run it again with the same --seed.",
    }
    FaultsFound = "faults-found", None, {
        means: "In a campaign of faults not everything held that has to hold.",
        why: "The score says what: processes that died, entries that were lost or came twice, devices that were not safe, things left behind.",
        check: "iohost faults run --seed N makes the same faults again",
        fix: "Report it with the score and the seed.",
    }
    FaultsStopped = "faults-stopped", None, {
        means: "A campaign of faults was ended by Ctrl-C or SIGTERM.",
        why: "The score is of the faults that were made until then; everything held.",
        check: "the score",
        fix: "Run it again, with the same --seed for the same faults.",
    }
    NoSuchDisk = "no-such-disk", None, {
        means: "The service has no disk of this number, or none at all.",
        why: "A controller's namespaces have numbers, which need not be consecutive.",
        check: "iohost block ls",
        fix: "Name one that is listed.",
    }
    BlockRange = "block-range", None, {
        means: "The bytes are not on the disk, or not whole blocks of it.",
        why: "A disk is read and written in whole blocks; the message has the numbers.",
        check: "iohost block info SERVICE",
        fix: "Name bytes that the disk has.",
    }
    NoUblk = "no-ublk", None, {
        means: "The kernel has no ublk that could make a disk of ours a block device.",
        why: "Block devices that a process serves are ublk's, with user copy, which came with Linux 6.4; Debian 12's kernel \
              has none.",
        check: "ls /dev/ublk-control; modinfo ublk_drv",
        fix: "modprobe ublk_drv, or export the disk over NBD: iohost block export",
    }
    UblkDenied = "ublk-denied", None, {
        means: "This user may not make block devices.",
        why: "A block device is there for the whole machine, so ublk is root's.",
        check: "ls -l /dev/ublk-control",
        fix: "Run it as root.",
    }
    BlockInUse = "block-in-use", None, {
        means: "The block device is mounted, or another program has it for itself.",
        why: "What was not written yet would be lost.",
        check: "fuser -vm /dev/ublkbN; cat /proc/mounts",
        fix: "Unmount it first.",
    }
    NoSuchBlockDevice = "no-such-block-device", None, {
        means: "There is no ublk device of this number.",
        why: "The number is the N of /dev/ublkbN and /dev/ublkcN.",
        check: "ls /dev/ublkc*",
        fix: "Name one that is there.",
    }
    BlockFailed = "block-failed", None, {
        means: "A disk did not do what it should.",
        why: "The message has the kind of failure and the device's words.",
        check: "iohost block health SERVICE; the driver's log lines",
        fix: "See what the message says; a medium error is one of the device.",
    }
}

impl Code {
    /// How much it matters where doctor finds it; `None` for a code that only refusals have.
    pub const fn severity(self) -> Option<Severity> {
        self.explanation().severity
    }

    /// The codes as the table of `docs/doctor.md`.
    pub fn table() -> String {
        let mut table =
            "| code | doctor says | means | what to do |\n| --- | --- | --- | --- |\n".to_owned();
        for code in Code::ALL {
            let Explanation { severity, means, fix, .. } = code.explanation();
            let severity = severity.map_or("-".to_owned(), |severity| severity.to_string());
            let fix = fix.replace('|', "\\|");
            table += &format!("| `{code}` | {severity} | {means} | {fix} |\n");
        }
        table
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Code {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Code::ALL.iter().copied().find(|code| code.name() == name).ok_or(())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Blocks => "blocks",
            Severity::Warns => "warns",
            Severity::Notes => "notes",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_is_one_word_that_no_other_code_is() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for name in names {
            let is_plain = |letter: char| letter.is_ascii_lowercase() || letter == '-';
            assert!(!name.is_empty() && name.chars().all(is_plain), "{name}");
            assert_eq!(name.parse::<Code>().unwrap().name(), name);
        }
        assert!("no-such-word".parse::<Code>().is_err());
    }

    #[test]
    fn every_code_is_explained_in_full() {
        for code in Code::ALL {
            let Explanation { means, why, check, fix, .. } = code.explanation();
            assert!(means.ends_with('.') && !means.contains('\n'), "{code}: {means}");
            for text in [means, why, check, fix] {
                assert!(text.len() >= 8, "{code}: {text:?}");
                assert!(!text.contains("  "), "{code}: {text:?}");
            }
        }
    }

    #[test]
    fn the_documentation_has_the_table_of_all_codes() {
        let documentation = include_str!("../../../docs/doctor.md");
        let table = Code::table();
        assert!(
            documentation.contains(&table),
            "docs/doctor.md has another table than this one:\n\n{table}"
        );
    }
}
