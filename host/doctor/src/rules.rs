//! From facts to findings. Nothing is read here.

use std::path::Path;

use iohost_pci::{BarMapping, PciAddress, VFIO_PCI};

use crate::boot::Boot;
use crate::facts::{Facts, Function, Iommu, Machine, Module, Node, Opener, Owned, Subject, Use};
use crate::function::BRIDGES;
use crate::{Code, Finding, Severity};

/// What is the matter with the machine.
pub(crate) fn of_machine(facts: &Facts) -> Vec<Finding> {
    let machine = &facts.machine;
    // A device that is reached without an IOMMU does not miss it.
    let misses_one = facts.functions.is_empty() || facts.functions.iter().any(|f| !is_unsafe(f));
    let findings = [
        misses_one.then(|| no_iommu(machine)).flatten(),
        misses_one.then(|| interrupts(machine)).flatten(),
        driver_not_loaded(machine),
        device_nodes(machine),
        no_iommu_mode(machine),
        no_landlock(machine),
        locked_memory(&facts.subject, facts.dma_bytes, machine.boot.has_unit),
    ];
    findings.into_iter().flatten().collect()
}

/// What is the matter with one function.
pub(crate) fn of_function(facts: &Facts, function: &Function) -> Vec<Finding> {
    if function.class >> 16 == BRIDGES {
        return vec![not_an_endpoint(function)];
    }
    let mut findings: Vec<Finding> = [
        gone(function),
        not_covered(&facts.machine, function),
        not_viable(function),
        owned(function),
        unsafe_backend(function),
        not_bound(&facts.subject, function),
        permission(&facts.subject, function),
        forced_cdev(&facts.machine, function),
        asleep(function),
        no_reset(function),
        no_interrupts(function),
    ]
    .into_iter()
    .flatten()
    .collect();
    findings.extend(uses(function));
    findings.extend(busy(function));
    findings.extend(unassigned(function));
    findings.sort_by_key(|finding| finding.severity);
    findings
}

/// A function that was asked about and is not there.
pub(crate) fn missing(address: PciAddress) -> Finding {
    Finding {
        device: Some(address),
        ..finding(
            Code::NoSuchDevice,
            format!("there is no PCI device {address}"),
            "list the devices that are there with `iohost devices`, or let the kernel look again",
            Some("echo 1 > /sys/bus/pci/rescan".to_owned()),
        )
    }
}

fn finding(
    code: Code,
    message: String,
    next: impl Into<String>,
    command: Option<String>,
) -> Finding {
    let severity = code.severity().expect("rules find what has a severity; tests try them all");
    Finding { code, severity, device: None, message, next: next.into(), command }
}

fn at(
    function: &Function,
    code: Code,
    message: String,
    next: impl Into<String>,
    command: Option<String>,
) -> Finding {
    Finding { device: Some(function.address), ..finding(code, message, next, command) }
}

fn sysfs(function: &Function, attribute: &str) -> String {
    format!("/sys/bus/pci/devices/{}/{attribute}", function.address)
}

/// Whether the configuration reaches it in an UNSAFE way.
fn is_unsafe(function: &Function) -> bool {
    function.owner.as_ref().is_some_and(|owner| owner.is_unsafe)
}

/// The driver host that runs a driver on it now.
fn runs(function: &Function) -> Option<(&Owned, u32)> {
    let owner = function.owner.as_ref()?;
    Some((owner, owner.pid?))
}

fn no_iommu(machine: &Machine) -> Option<Finding> {
    let Machine { iommu: Iommu { groups, tables, .. }, boot, .. } = machine;
    if *groups > 0 {
        return None;
    }
    let off = boot.words_that(turns_iommu_off);
    let (why, next, command) = if !off.is_empty() {
        (
            format!("the kernel command line says {}", off.join(" ")),
            format!("take {} from the kernel command line and reboot", off.join(" ")),
            boot.without(&off),
        )
    } else if tables.is_empty() {
        (
            "the firmware describes none (no DMAR, IVRS or IORT table)".to_owned(),
            "turn VT-d, AMD-Vi or the like on in the firmware's setup".to_owned(),
            Some(Boot::firmware_setup()),
        )
    } else if tables.iter().any(|table| table == "DMAR")
        && boot.words_that(|word| word.starts_with("intel_iommu=")).is_empty()
    {
        (
            "this kernel waits to be told".to_owned(),
            "add intel_iommu=on to the kernel command line and reboot".to_owned(),
            boot.with("intel_iommu=on"),
        )
    } else {
        (
            format!("the firmware describes one ({}), and the kernel did not start it", {
                tables.join(", ")
            }),
            "read the kernel log for why: dmesg | grep -i -e DMAR -e AMD-Vi -e iommu".to_owned(),
            None,
        )
    };
    Some(finding(Code::NoIommu, format!("no IOMMU is at work: {why}"), next, command))
}

/// Source: Linux, `Documentation/admin-guide/kernel-parameters.txt`.
fn turns_iommu_off(word: &str) -> bool {
    let Some((name, value)) = word.split_once('=') else { return false };
    // The last one counts.
    let mut choices = value.split(',').filter(|choice| ["on", "off"].contains(choice));
    ["intel_iommu", "amd_iommu", "iommu"].contains(&name) && choices.next_back() == Some("off")
}

fn turns_remapping_off(word: &str) -> bool {
    word == "nointremap" || word == "intremap=off"
}

fn interrupts(machine: &Machine) -> Option<Finding> {
    if machine.iommu.groups == 0 || machine.remaps_interrupts != Some(false) {
        return None;
    }
    let by_nodes = machine.device_nodes == Some(true) && machine.iommufd;
    let (module, allows) = match by_nodes {
        true => ("iommufd", machine.iommufd_allows_unsafe_interrupts),
        false => ("vfio_iommu_type1", machine.type1_allows_unsafe_interrupts),
    };
    let parameter = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
    if allows == Some(true) {
        return Some(finding(
            Code::UnsafeInterrupts,
            format!("interrupts are not remapped, and {module} was told to accept that"),
            "turn interrupt remapping on, and then take that back",
            Some(format!("echo 0 > {parameter}")),
        ));
    }
    let off = machine.boot.words_that(turns_remapping_off);
    let risk = format!("or accept the risk: echo 1 > {parameter}");
    Some(if off.is_empty() {
        finding(
            Code::NoInterruptRemapping,
            "the IOMMU does not remap interrupts".to_owned(),
            format!("turn interrupt remapping on in the firmware's setup; {risk}"),
            Some(Boot::firmware_setup()),
        )
    } else {
        let off = off.join(" ");
        finding(
            Code::NoInterruptRemapping,
            format!("interrupts are not remapped: the kernel command line says {off}"),
            format!("take {off} from the kernel command line and reboot; {risk}"),
            machine.boot.without(&machine.boot.words_that(turns_remapping_off)),
        )
    })
}

fn driver_not_loaded(machine: &Machine) -> Option<Finding> {
    match machine.vfio_pci {
        Module::Loaded => None,
        Module::NotLoaded => Some(finding(
            Code::DriverNotLoaded,
            format!("the kernel's driver {VFIO_PCI} is not loaded"),
            "load it; a line in /etc/modules-load.d does so at every start",
            Some(format!("modprobe {VFIO_PCI}")),
        )),
        Module::Absent => Some(finding(
            Code::DriverNotLoaded,
            format!("this kernel was built without {VFIO_PCI}"),
            "start a kernel with CONFIG_VFIO_PCI",
            None,
        )),
    }
}

fn device_nodes(machine: &Machine) -> Option<Finding> {
    match machine.device_nodes {
        Some(true) if !machine.iommufd => Some(finding(
            Code::NoCdev,
            "the kernel makes nodes for devices, but /dev/iommu is not there".to_owned(),
            "load iommufd; until then devices are reached by their groups",
            Some("modprobe iommufd".to_owned()),
        )),
        Some(false) => {
            let other = machine.boot.kernels_with_device_nodes.last();
            Some(finding(
                Code::NoCdev,
                "this kernel makes no nodes for devices, which are reached by their groups instead"
                    .to_owned(),
                match other {
                    Some(release) => format!("kernel {release} on this machine makes them"),
                    None => "nothing has to be done; kernels with CONFIG_VFIO_DEVICE_CDEV and \
                             CONFIG_IOMMUFD make them"
                        .to_owned(),
                },
                other.map(|release| Boot::kernel(release)),
            ))
        }
        _ => None,
    }
}

/// The configuration forces a way that the kernel does not have: no longer a note.
fn forced_cdev(machine: &Machine, function: &Function) -> Option<Finding> {
    let owner = function.owner.as_ref()?;
    let lacks = machine.device_nodes == Some(false) || !machine.iommufd;
    if owner.backend != "vfio-cdev" || !lacks {
        return None;
    }
    let message = format!(
        "the configuration of {} says backend = \"vfio-cdev\", which this kernel has not",
        function.address
    );
    let next = "take that line from the configuration and start the daemon again";
    Some(Finding { severity: Severity::Blocks, ..at(function, Code::NoCdev, message, next, None) })
}

fn no_iommu_mode(machine: &Machine) -> Option<Finding> {
    let on = machine.no_iommu_mode == Some(true);
    on.then(|| {
        finding(
            Code::NoIommuModeOn,
            "VFIO's no-IOMMU mode is on, which is UNSAFE: it hands out devices that nothing keeps \
             from the machine's memory"
                .to_owned(),
            "turn it off where no device of this machine needs it",
            Some("echo 0 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode".to_owned()),
        )
    })
}

fn no_landlock(machine: &Machine) -> Option<Finding> {
    let off = machine.landlock == Some(false);
    off.then(|| {
        finding(
            Code::NoLandlock,
            "the kernel's Landlock is off, so a driver can read files that everybody may read"
                .to_owned(),
            "add `landlock` to the list lsm= on the kernel command line (the list that is in force \
             is in /sys/kernel/security/lsm), and reboot",
            None,
        )
    })
}

fn locked_memory(subject: &Subject, need: u64, has_unit: bool) -> Option<Finding> {
    let have = subject.memlock.filter(|have| *have < need && !subject.locks_all_memory)?;
    let who = match subject.is_daemon {
        true => format!("the daemon (process {})", subject.pid),
        false => format!("user {} here", subject.user),
    };
    let kib = need.div_ceil(1024);
    let line = format!("LimitMEMLOCK={need} in the [Service] section of its unit file");
    let (next, command) = match (has_unit, subject.is_daemon) {
        (true, _) => (
            format!("give the daemon {line}"),
            format!(
                "mkdir -p /etc/systemd/system/iohost.service.d && \
                 printf '[Service]\\nLimitMEMLOCK={need}\\n' \
                 > /etc/systemd/system/iohost.service.d/memlock.conf && \
                 systemctl daemon-reload && systemctl restart iohost"
            ),
        ),
        (false, true) => (
            format!(
                "raise the limit of the daemon, for drivers that start from now on; for good: {line}"
            ),
            format!("prlimit --pid {} --memlock={need}:{need}", subject.pid),
        ),
        (false, false) => {
            let root = match subject.memlock_hard {
                Some(hard) if hard < need => format!(" (as root: the hard limit is {hard})"),
                _ => String::new(),
            };
            (
                format!(
                    "raise the limit in the shell that starts the daemon{root}; for good: {line}"
                ),
                format!("ulimit -l {kib}"),
            )
        }
    };
    let message = format!("drivers need {need} bytes of locked memory, and {who} may lock {have}");
    Some(finding(Code::MemlockTooSmall, message, next, Some(command)))
}

fn not_an_endpoint(function: &Function) -> Finding {
    at(
        function,
        Code::NotAnEndpoint,
        format!("{} is a bridge", function.address),
        "name the function behind it: `iohost devices` lists all",
        None,
    )
}

fn gone(function: &Function) -> Option<Finding> {
    let again = format!("echo 1 > {} && echo 1 > /sys/bus/pci/rescan", sysfs(function, "remove"));
    (!function.configuration.answers).then(|| {
        at(
            function,
            Code::DeviceGone,
            format!("{} does not answer: its configuration reads as all ones", function.address),
            "let the kernel forget it and look for it again; if it stays away, power-cycle it",
            Some(again),
        )
    })
}

fn not_covered(machine: &Machine, function: &Function) -> Option<Finding> {
    if machine.iommu.groups == 0 || function.group.is_some() || is_unsafe(function) {
        return None;
    }
    Some(at(
        function,
        Code::NoIommu,
        format!("the IOMMU does not cover {}: it is in no group", function.address),
        "put the device into another slot, or read why: dmesg | grep -i -e DMAR -e AMD-Vi",
        None,
    ))
}

fn not_viable(function: &Function) -> Option<Finding> {
    let group = function.group.as_ref().filter(|_| !is_unsafe(function))?;
    let others = || group.members.iter().filter(|member| member.address != function.address);
    let blockers: Vec<_> = others().filter(|member| member.blocks).collect();
    if blockers.is_empty() {
        return None;
    }
    let named: Vec<String> = blockers
        .iter()
        .map(|member| {
            let driver = member.driver.as_deref().unwrap_or("no driver");
            let uses: Vec<_> = member.uses.iter().map(|found| found.what.as_str()).collect();
            let uses =
                if uses.is_empty() { String::new() } else { format!(" ({})", uses.join(", ")) };
            format!("{} is bound to {driver}{uses}", member.address)
        })
        .collect();
    // What the machine uses is let go first; each in the order in which it can be.
    let ends = blockers.iter().flat_map(|member| commands_to_end(&member.uses));
    let unbind = |address| format!("echo {address} > /sys/bus/pci/devices/{address}/driver/unbind");
    let unbinds = blockers.iter().map(|member| unbind(member.address));
    let commands: Vec<String> = ends.chain(unbinds).collect();
    Some(at(
        function,
        Code::GroupNotViable,
        format!("IOMMU group {} cannot be used: {}", group.number, named.join(", ")),
        format!(
            "take these from their drivers, or take the whole group: iohost bind --group {}",
            function.address
        ),
        Some(commands.join(" && ")),
    ))
}

/// The highest use first: what rests on others is ended before them.
fn commands_to_end(uses: &[Use]) -> impl Iterator<Item = String> {
    uses.iter().rev().filter_map(|found| found.command.clone())
}

fn uses(function: &Function) -> Vec<Finding> {
    let kinds = [(Code::DiskInUse, true), (Code::InterfaceInUse, false)];
    let of_kind = |(code, is_disk): (Code, bool)| {
        let uses: Vec<Use> =
            function.uses.iter().filter(|found| found.is_disk == is_disk).cloned().collect();
        if uses.is_empty() {
            return None;
        }
        let what: Vec<_> = uses.iter().map(|found| found.what.as_str()).collect();
        // One that nobody knows how to end leaves the rest without a point.
        let all_end = uses.iter().all(|found| found.command.is_some());
        let commands: Vec<String> = commands_to_end(&uses).collect();
        Some(at(
            function,
            code,
            format!("the machine uses {}: {}", function.address, what.join(", ")),
            "end these uses, if the machine can do without; iohost bind --force does not ask",
            all_end.then(|| commands.join(" && ")),
        ))
    };
    kinds.into_iter().filter_map(of_kind).collect()
}

fn owned(function: &Function) -> Option<Finding> {
    let (owner, pid) = runs(function)?;
    let driver = owner.driver.as_deref().unwrap_or("a driver");
    Some(at(
        function,
        Code::DeviceOwned,
        format!(
            "iohost has {}: service {} runs {driver} on it in process {pid}",
            function.address, owner.service
        ),
        "give it back, if somebody else is to have it",
        Some(format!("iohost unbind {}", function.address)),
    ))
}

fn busy(function: &Function) -> Vec<Finding> {
    let ours = runs(function).map(|(_, pid)| pid);
    let mut others: Vec<&Opener> =
        function.openers.iter().filter(|opener| Some(opener.pid) != ours).collect();
    others.sort_by_key(|opener| opener.pid);
    others.dedup_by_key(|opener| opener.pid);
    let busy = |opener: &Opener| {
        let Opener { pid, name, node } = opener;
        at(
            function,
            Code::DeviceBusy,
            format!(
                "{} is in use: process {pid} ({name}) has {} open",
                function.address,
                node.display()
            ),
            "stop that process",
            Some(format!("kill {pid}")),
        )
    };
    others.into_iter().map(busy).collect()
}

fn unsafe_backend(function: &Function) -> Option<Finding> {
    let owner = function.owner.as_ref().filter(|owner| owner.is_unsafe)?;
    Some(at(
        function,
        Code::UnsafeBackend,
        format!(
            "the configuration reaches {} by {}, which is UNSAFE",
            function.address, owner.backend
        ),
        "leave `backend` and `allow_unsafe` out of its configuration",
        None,
    ))
}

fn not_bound(subject: &Subject, function: &Function) -> Option<Finding> {
    let is_bound = function.driver.as_deref() == Some(VFIO_PCI);
    if is_bound || is_unsafe(function) || runs(function).is_some() {
        return None;
    }
    let address = function.address;
    let has = function.driver.as_deref().unwrap_or("no driver");
    if function.may_bind {
        return Some(at(
            function,
            Code::NotBound,
            format!("{address} is bound to {has}, not to {VFIO_PCI}"),
            "let the daemon take it",
            Some(format!("iohost bind {address}")),
        ));
    }
    let unbind = match function.driver {
        Some(_) => format!("echo {address} > {} && ", sysfs(function, "driver/unbind")),
        None => String::new(),
    };
    let command = format!(
        "echo {VFIO_PCI} > {} && {unbind}echo {address} > /sys/bus/pci/drivers_probe",
        sysfs(function, "driver_override")
    );
    Some(at(
        function,
        Code::NoPermission,
        format!(
            "user {} may not take {address} from {has} and bind it to {VFIO_PCI}",
            subject.user
        ),
        "bind it as root, or run the daemon as root",
        Some(command),
    ))
}

fn permission(subject: &Subject, function: &Function) -> Option<Finding> {
    let closed: Vec<&Node> = function.nodes.iter().filter(|node| !node.may_open).collect();
    if closed.is_empty() {
        return None;
    }
    let list = |separator: &str| {
        let paths = closed.iter().map(|node| node.path.as_path()).map(Path::display);
        paths.map(|path| path.to_string()).collect::<Vec<_>>().join(separator)
    };
    Some(at(
        function,
        Code::VfioPermission,
        format!("user {} may not open {}", subject.user, list(" and ")),
        "give it to that user; a udev rule does so each time the device is bound",
        Some(format!("chown {} {}", subject.user, list(" "))),
    ))
}

fn asleep(function: &Function) -> Option<Finding> {
    let kernel = function.kernel_power_state.as_deref();
    let state = match (kernel, function.configuration.power_state) {
        (Some("D3cold"), _) => "D3cold",
        (_, Some(0)) => return None,
        (_, Some(1)) => "D1",
        (_, Some(2)) => "D2",
        (_, Some(_)) => "D3hot",
        (Some(state @ ("D1" | "D2" | "D3hot")), None) => state,
        (_, None) => return None,
    };
    // There it idles so, and is woken when it is opened.
    if function.driver.as_deref() == Some(VFIO_PCI) || !function.configuration.answers {
        return None;
    }
    let control = sysfs(function, "power/control");
    let enable = sysfs(function, "enable");
    let command = match function.driver {
        Some(_) => format!("echo on > {control}"),
        // With a driver gone, this is how the kernel is told to set it to D0.
        None => format!("echo on > {control} && echo 1 > {enable} && echo 0 > {enable}"),
    };
    Some(at(
        function,
        Code::DeviceAsleep,
        format!("{} is in {state}, in which its registers do not answer", function.address),
        "have the kernel wake it and keep it awake",
        Some(command),
    ))
}

fn no_reset(function: &Function) -> Option<Finding> {
    let address = function.address;
    match function.reset_methods.as_deref() {
        None => Some(at(
            function,
            Code::NoReset,
            format!("the kernel knows no way to reset {address} alone"),
            "put it into a slot of its own; else it is reset with its bus, or not at all",
            None,
        )),
        Some([]) => Some(at(
            function,
            Code::NoReset,
            format!("somebody has taken from {address} all the ways to reset it"),
            "give them back",
            Some(format!("echo default > {}", sysfs(function, "reset_method"))),
        )),
        Some(_) => None,
    }
}

fn no_interrupts(function: &Function) -> Option<Finding> {
    let known = &function.configuration;
    let has_none =
        known.answers && !known.has_line && known.msi == Some(0) && known.msi_x == Some(0);
    has_none.then(|| {
        at(
            function,
            Code::NoInterrupts,
            format!("{} has no interrupt: no line, no MSI, no MSI-X", function.address),
            "use a driver that polls",
            None,
        )
    })
}

fn unassigned(function: &Function) -> Vec<Finding> {
    let bars = function.bars.iter().filter(|bar| bar.mapping == BarMapping::Unassigned);
    let unassigned = |bar: &iohost_pci::PciBar| {
        at(
            function,
            Code::BarUnassigned,
            format!(
                "the kernel found no room for BAR {} of {}, which has {:#x} bytes",
                bar.index, function.address, bar.size
            ),
            "let the kernel place it again; or turn above 4G decoding on in the firmware's setup",
            Some(format!("echo 1 > {} && echo 1 > /sys/bus/pci/rescan", sysfs(function, "remove"))),
        )
    };
    bars.map(unassigned).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iohost_pci::{Configuration, PciBar};

    use super::*;
    use crate::Report;
    use crate::boot::Loader;
    use crate::facts::{Group, Member};

    /// A machine that has everything, with one device that iohost can take.
    fn healthy() -> Facts {
        let edu: PciAddress = "0000:01:00.0".parse().unwrap();
        let member = |address: &str, driver: Option<&str>, is_bridge| Member {
            address: address.parse().unwrap(),
            driver: driver.map(str::to_owned),
            is_bridge,
            blocks: false,
            uses: Vec::new(),
        };
        let node =
            |path: &str| Node { path: path.into(), uid: 0, gid: 0, mode: 0o600, may_open: true };
        Facts {
            machine: Machine {
                iommu: Iommu {
                    groups: 5,
                    units: vec!["dmar0".to_owned()],
                    tables: vec!["DMAR".to_owned()],
                },
                remaps_interrupts: Some(true),
                iommufd_allows_unsafe_interrupts: Some(false),
                type1_allows_unsafe_interrupts: Some(false),
                vfio_pci: Module::Loaded,
                uio_pci_generic: Module::NotLoaded,
                device_nodes: Some(true),
                iommufd: true,
                no_iommu_mode: Some(false),
                landlock: Some(true),
                boot: Boot {
                    words: vec!["quiet".to_owned(), "intel_iommu=on".to_owned()],
                    loader: Some(Loader::GrubDefaults),
                    ..Boot::default()
                },
            },
            subject: Subject {
                pid: 41,
                is_daemon: false,
                uid: 1000,
                user: "operator".to_owned(),
                gids: Vec::new(),
                opens_all_files: false,
                locks_all_memory: false,
                memlock: Some(8 << 20),
                memlock_hard: Some(8 << 20),
            },
            functions: vec![Function {
                address: edu,
                vendor: 0x1234,
                device: 0x11e8,
                class: 0x00ff00,
                driver: Some("vfio-pci".to_owned()),
                group: Some(Group {
                    number: 3,
                    members: vec![
                        member("0000:00:1c.0", Some("pcieport"), true),
                        member("0000:01:00.0", Some("vfio-pci"), false),
                        member("0000:01:00.1", None, false),
                    ],
                }),
                uses: Vec::new(),
                way: "vfio-cdev",
                nodes: vec![node("/dev/vfio/devices/vfio0"), node("/dev/iommu")],
                openers: Vec::new(),
                may_bind: false,
                configuration: Configuration {
                    answers: true,
                    has_line: true,
                    msi: Some(1),
                    msi_x: Some(0),
                    power_state: Some(0),
                },
                kernel_power_state: Some("D0".to_owned()),
                reset_methods: Some(vec!["flr".to_owned()]),
                bars: vec![PciBar { index: 0, size: 0x1000, mapping: BarMapping::Whole }],
                owner: None,
            }],
            missing: Vec::new(),
            dma_bytes: 8 << 20,
        }
    }

    /// What is found once `defect` has been prepared.
    fn found(defect: impl FnOnce(&mut Facts, &mut Function)) -> Vec<Finding> {
        let mut facts = healthy();
        let mut function = facts.functions.remove(0);
        defect(&mut facts, &mut function);
        facts.functions = vec![function];
        let report = Report::of(facts, false);
        let devices = report.devices.into_iter().flat_map(|device| device.findings);
        report.findings.into_iter().chain(devices).collect()
    }

    /// The only finding.
    fn only(defect: impl FnOnce(&mut Facts, &mut Function)) -> Finding {
        let mut found = found(defect);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    fn owner(pid: Option<u32>, backend: &str, is_unsafe: bool) -> Option<Owned> {
        let service = "edu0".to_owned();
        let address = "0000:01:00.0".parse().unwrap();
        let backend = backend.to_owned();
        Some(Owned { address, service, driver: Some("edu".to_owned()), pid, backend, is_unsafe })
    }

    fn used(is_disk: bool, what: &str, command: Option<&str>) -> Use {
        Use { is_disk, what: what.to_owned(), command: command.map(str::to_owned) }
    }

    fn opener(pid: u32) -> Opener {
        Opener { pid, name: "qemu".to_owned(), node: "/dev/vfio/3".into() }
    }

    type Defect = fn(&mut Facts, &mut Function);

    /// One defect for each code that a rule finds.
    const DEFECTS: &[(Code, Defect)] = &[
        (Code::NoSuchDevice, |facts, _| facts.missing.push("0000:09:00.0".parse().unwrap())),
        (Code::DeviceGone, |_, edu| edu.configuration = Configuration::default()),
        (Code::NotAnEndpoint, |_, edu| edu.class = 0x060400),
        (Code::NoIommu, |_, edu| edu.group = None),
        (Code::NoInterruptRemapping, |facts, _| facts.machine.remaps_interrupts = Some(false)),
        (Code::UnsafeInterrupts, |facts, _| {
            facts.machine.remaps_interrupts = Some(false);
            facts.machine.iommufd_allows_unsafe_interrupts = Some(true);
        }),
        (Code::DriverNotLoaded, |facts, _| facts.machine.vfio_pci = Module::NotLoaded),
        (Code::GroupNotViable, |_, edu| {
            let sibling = &mut edu.group.as_mut().unwrap().members[2];
            (sibling.driver, sibling.blocks) = (Some("nvme".to_owned()), true);
        }),
        (Code::DiskInUse, |_, edu| edu.uses = vec![used(true, "a disk", Some("umount /mnt"))]),
        (Code::InterfaceInUse, |_, edu| edu.uses = vec![used(false, "eth0", None)]),
        (Code::DeviceBusy, |_, edu| edu.openers = vec![opener(7)]),
        (Code::DeviceOwned, |_, edu| edu.owner = owner(Some(7), "vfio", false)),
        (Code::VfioPermission, |_, edu| edu.nodes[0].may_open = false),
        (Code::NoPermission, |_, edu| edu.driver = None),
        (Code::MemlockTooSmall, |facts, _| facts.subject.memlock = Some(64 << 10)),
        (Code::DeviceAsleep, |_, edu| {
            (edu.driver, edu.may_bind) = (Some("vfio-pci-not".to_owned()), true);
            edu.configuration.power_state = Some(3);
        }),
        (Code::NoReset, |_, edu| edu.reset_methods = None),
        (Code::NoInterrupts, |_, edu| {
            (edu.configuration.has_line, edu.configuration.msi) = (false, Some(0));
        }),
        (Code::BarUnassigned, |_, edu| edu.bars[0].mapping = BarMapping::Unassigned),
        (Code::NotBound, |_, edu| (edu.driver, edu.may_bind) = (None, true)),
        (Code::NoCdev, |facts, _| facts.machine.device_nodes = Some(false)),
        (Code::NoIommuModeOn, |facts, _| facts.machine.no_iommu_mode = Some(true)),
        (Code::NoLandlock, |facts, _| facts.machine.landlock = Some(false)),
        (Code::UnsafeBackend, |_, edu| edu.owner = owner(None, "uio", true)),
    ];

    #[test]
    fn nothing_is_found_where_nothing_is_the_matter() {
        assert_eq!(found(|_, _| {}), []);
    }

    #[test]
    fn every_code_with_a_severity_is_found_by_a_rule_in_its_defect() {
        let tried: BTreeSet<Code> = DEFECTS.iter().map(|(code, _)| *code).collect();
        for code in Code::ALL {
            assert_eq!(code.severity().is_some(), tried.contains(code), "{code}");
        }
        for (code, defect) in DEFECTS {
            let found = found(defect);
            assert!(found.iter().any(|finding| finding.code == *code), "{code}: {found:?}");
            for finding in &found {
                assert_eq!(Some(finding.severity), finding.code.severity(), "{finding:?}");
            }
        }
    }

    #[test]
    fn every_finding_is_a_sentence_with_a_next_step() {
        for (code, defect) in DEFECTS {
            for finding in found(defect) {
                for text in [&finding.message, &finding.next] {
                    assert!(text.len() > 10 && !text.ends_with('.'), "{code}: {text}");
                    assert!(!text.contains("  ") && !text.contains('\n'), "{code}: {text}");
                }
                assert!(finding.command.is_none_or(|command| !command.contains('\n')), "{code}");
            }
        }
    }

    #[test]
    fn no_iommu_is_told_with_its_reason_and_what_helps_against_that_one() {
        let without = |words: &str, tables: &[&str]| {
            only(|facts, edu| {
                edu.group = None;
                let iommu = &mut facts.machine.iommu;
                iommu.groups = 0;
                iommu.tables = tables.iter().map(|table| (*table).to_owned()).collect();
                facts.machine.boot.words = words.split(' ').map(str::to_owned).collect();
            })
        };
        let off = without("quiet intel_iommu=on intel_iommu=off", &["DMAR"]);
        assert!(off.message.ends_with("the kernel command line says intel_iommu=off"), "{off:?}");
        let command = off.command.unwrap();
        assert!(
            command.contains("intel_iommu=off") && command.ends_with("shutdown -r now"),
            "{command}"
        );

        let no_table = without("intel_iommu=on", &[]);
        assert!(no_table.message.contains("the firmware describes none"), "{no_table:?}");
        assert_eq!(no_table.command.as_deref(), Some("systemctl reboot --firmware-setup"));

        let not_told = without("quiet", &["DMAR"]);
        assert!(not_told.next.starts_with("add intel_iommu=on"), "{not_told:?}");
        assert!(not_told.command.unwrap().contains("&intel_iommu=on "));

        let broken = without("intel_iommu=on", &["DMAR"]);
        assert!(broken.next.contains("dmesg"), "{broken:?}");
        let broken = without("quiet", &["IVRS"]);
        assert!(broken.message.contains("(IVRS)") && broken.command.is_none(), "{broken:?}");
    }

    #[test]
    fn words_that_turn_the_iommu_off_are_known_and_others_are_not() {
        for word in ["intel_iommu=off", "amd_iommu=off", "iommu=off", "intel_iommu=on,off"] {
            assert!(turns_iommu_off(word), "{word}");
        }
        for word in ["intel_iommu=on", "intel_iommu=off,on", "iommu=pt", "acpi=off", "intel_iommu"]
        {
            assert!(!turns_iommu_off(word), "{word}");
        }
    }

    #[test]
    fn remapping_off_by_the_command_line_differs_from_none_in_the_firmware() {
        let by_word = only(|facts, _| {
            facts.machine.remaps_interrupts = Some(false);
            facts.machine.boot.words.push("nointremap".to_owned());
        });
        assert!(by_word.command.unwrap().contains("nointremap"));
        let risk = "echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts";
        assert!(by_word.next.ends_with(risk), "{}", by_word.next);
        let by_firmware = only(|facts, _| facts.machine.remaps_interrupts = Some(false));
        assert!(by_firmware.command.unwrap().contains("--firmware-setup"));
    }

    #[test]
    fn a_kernel_without_device_nodes_is_asked_of_the_module_that_it_uses_instead() {
        let found = found(|facts, _| {
            facts.machine.device_nodes = Some(false);
            facts.machine.remaps_interrupts = Some(false);
            facts.machine.type1_allows_unsafe_interrupts = Some(true);
        });
        let codes: Vec<Code> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, [Code::UnsafeInterrupts, Code::NoCdev]);
        assert!(found[0].command.as_ref().unwrap().contains("vfio_iommu_type1"));
    }

    #[test]
    fn every_blocker_of_a_group_is_named_and_let_go_after_what_uses_it() {
        let finding = only(|_, edu| {
            let members = &mut edu.group.as_mut().unwrap().members;
            let sibling = &mut members[2];
            (sibling.driver, sibling.blocks) = (Some("nvme".to_owned()), true);
            sibling.uses = vec![
                used(true, "/dev/nvme0n1p1 is part of /dev/dm-0", Some("dmsetup remove data")),
                used(true, "/dev/dm-0 is mounted on /mnt", Some("umount /mnt")),
            ];
            let mut other = members[2].clone();
            (other.address, other.uses) = ("0000:01:00.2".parse().unwrap(), Vec::new());
            members.push(other);
        });
        assert!(
            finding.message.starts_with(
                "IOMMU group 3 cannot be used: 0000:01:00.1 is bound to nvme (/dev/nvme0n1p1"
            ),
            "{finding:?}"
        );
        assert!(finding.message.ends_with("0000:01:00.2 is bound to nvme"), "{finding:?}");
        assert_eq!(
            finding.command.unwrap(),
            "umount /mnt && dmsetup remove data && \
             echo 0000:01:00.1 > /sys/bus/pci/devices/0000:01:00.1/driver/unbind && \
             echo 0000:01:00.2 > /sys/bus/pci/devices/0000:01:00.2/driver/unbind"
        );
    }

    #[test]
    fn a_use_that_nobody_can_end_leaves_no_command() {
        let finding = only(|_, edu| {
            edu.uses =
                vec![used(true, "a", Some("umount /mnt")), used(true, "/dev/sda is held", None)];
        });
        assert_eq!((finding.code, finding.command), (Code::DiskInUse, None));
    }

    #[test]
    fn a_driver_host_of_ours_does_not_make_its_own_device_busy() {
        let finding = only(|_, edu| {
            edu.owner = owner(Some(7), "vfio", false);
            edu.openers = vec![opener(7), opener(7)];
        });
        assert_eq!(finding.code, Code::DeviceOwned);
        assert_eq!(finding.command.as_deref(), Some("iohost unbind 0000:01:00.0"));

        let found = found(|_, edu| {
            edu.owner = owner(Some(7), "vfio", false);
            edu.openers = vec![opener(8), opener(7)];
        });
        let codes: Vec<Code> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, [Code::DeviceBusy, Code::DeviceOwned]);
        assert_eq!(found[0].command.as_deref(), Some("kill 8"));
    }

    #[test]
    fn locked_memory_is_told_with_need_and_have_and_the_line_of_the_unit_file() {
        let small = |facts: &mut Facts| facts.subject.memlock = Some(64 << 10);
        let here = only(|facts, _| small(facts));
        assert_eq!(
            here.message,
            "drivers need 8388608 bytes of locked memory, and user operator here may lock 65536"
        );
        assert!(here.next.contains("LimitMEMLOCK=8388608"), "{}", here.next);
        assert_eq!(here.command.as_deref(), Some("ulimit -l 8192"));

        let daemon = only(|facts, _| {
            small(facts);
            facts.subject.is_daemon = true;
        });
        assert_eq!(daemon.command.as_deref(), Some("prlimit --pid 41 --memlock=8388608:8388608"));
        let unit = only(|facts, _| {
            small(facts);
            facts.machine.boot.has_unit = true;
        });
        assert!(unit.command.unwrap().contains("[Service]\\nLimitMEMLOCK=8388608\\n"));
    }

    #[test]
    fn locked_memory_without_a_limit_is_no_finding() {
        assert_eq!(found(|facts, _| facts.subject.memlock = None), []);
        let all = found(|facts, _| {
            facts.subject.memlock = Some(0);
            facts.subject.locks_all_memory = true;
        });
        assert_eq!(all, []);
    }

    #[test]
    fn an_idle_device_under_vfio_sleeps_as_it_should() {
        let asleep = |edu: &mut Function| {
            edu.kernel_power_state = Some("D3hot".to_owned());
            edu.configuration.power_state = Some(3);
        };
        assert_eq!(found(|_, edu| asleep(edu)), []);
        let found = found(|_, edu| {
            asleep(edu);
            (edu.driver, edu.may_bind) = (None, true);
        });
        let asleep = &found[0];
        assert_eq!(asleep.code, Code::DeviceAsleep);
        assert!(asleep.message.contains("D3hot"));
        let enable = "/sys/bus/pci/devices/0000:01:00.0/enable";
        let command = asleep.command.as_ref().unwrap();
        assert!(command.ends_with(&format!("echo 1 > {enable} && echo 0 > {enable}")), "{command}");
    }

    #[test]
    fn the_power_state_is_that_of_the_device_where_it_says_one() {
        let state = |kernel: Option<&str>, device| {
            let found = found(|_, edu| {
                (edu.driver, edu.may_bind) = (Some("e1000e".to_owned()), true);
                edu.kernel_power_state = kernel.map(str::to_owned);
                edu.configuration.power_state = device;
            });
            found.into_iter().find(|finding| finding.code == Code::DeviceAsleep)
        };
        assert!(state(Some("D3hot"), Some(0)).is_none());
        assert!(state(Some("unknown"), None).is_none());
        assert!(state(None, None).is_none());
        for (kernel, device, says) in [
            (Some("D0"), Some(3), "in D3hot"),
            (Some("D3hot"), None, "in D3hot"),
            (Some("D3cold"), None, "in D3cold"),
            (None, Some(1), "in D1"),
        ] {
            let message = state(kernel, device).unwrap().message;
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn a_kernel_without_device_nodes_is_a_note_unless_the_configuration_wants_them() {
        let note = only(|facts, _| facts.machine.device_nodes = Some(false));
        assert_eq!((note.severity, note.command), (Severity::Notes, None));
        let other = only(|facts, _| {
            facts.machine.device_nodes = Some(false);
            facts.machine.boot.kernels_with_device_nodes = vec!["6.12-rig".to_owned()];
        });
        assert!(other.command.unwrap().contains("/boot/vmlinuz-6.12-rig"));
        let unloaded = only(|facts, _| facts.machine.iommufd = false);
        assert_eq!(unloaded.command.as_deref(), Some("modprobe iommufd"));

        let found = found(|facts, edu| {
            facts.machine.device_nodes = Some(false);
            edu.owner = owner(None, "vfio-cdev", false);
        });
        assert!(found.iter().any(|finding| finding.code == Code::NoCdev && finding.blocks()));
    }

    #[test]
    fn a_device_that_is_reached_without_an_iommu_does_not_miss_it() {
        let finding = only(|facts, edu| {
            facts.machine.iommu.groups = 0;
            (edu.group, edu.driver) = (None, Some("uio_pci_generic".to_owned()));
            edu.owner = owner(None, "uio", true);
        });
        assert_eq!(finding.code, Code::UnsafeBackend);
    }

    #[test]
    fn a_function_in_the_overview_blocks_nothing_but_one_that_is_asked_about_does() {
        let mut facts = healthy();
        facts.functions[0].openers = vec![opener(7)];
        assert!(Report::of(facts.clone(), false).blocks);
        assert!(!Report::of(facts.clone(), true).blocks);
        facts.machine.vfio_pci = Module::NotLoaded;
        assert!(Report::of(facts, true).blocks);
    }

    #[test]
    fn who_may_not_bind_is_told_the_commands_for_root() {
        let finding = only(|_, edu| edu.driver = Some("nvme".to_owned()));
        let folder = "/sys/bus/pci/devices/0000:01:00.0";
        assert_eq!(
            finding.command.unwrap(),
            format!(
                "echo vfio-pci > {folder}/driver_override && \
                 echo 0000:01:00.0 > {folder}/driver/unbind && \
                 echo 0000:01:00.0 > /sys/bus/pci/drivers_probe"
            )
        );
    }

    #[test]
    fn nodes_that_are_closed_are_given_with_one_command() {
        let finding = only(|_, edu| edu.nodes.iter_mut().for_each(|node| node.may_open = false));
        assert_eq!(
            finding.command.as_deref(),
            Some("chown operator /dev/vfio/devices/vfio0 /dev/iommu")
        );
    }
}
