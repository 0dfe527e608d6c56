//! From facts to findings. Nothing is read here.
//!
//! Here stand all rules in the order in which they are applied, and what they share; the rules
//! themselves stand by subject in the modules.

mod binding;
mod device;
mod iommu;
mod kernel;
mod rights;

use iohost_pci::PciAddress;

use crate::facts::{Facts, Function, Owned};
use crate::function::BRIDGES;
use crate::{Code, Finding};

use binding::{busy, not_bound, owned, unsafe_backend, uses};
use device::{asleep, gone, no_interrupts, no_reset, not_an_endpoint, unassigned};
use iommu::{interrupts, no_iommu, no_iommu_mode, not_covered, not_viable};
use kernel::{device_nodes, driver_not_loaded, forced_cdev, no_landlock};
use rights::{locked_memory, permission};

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iohost_pci::{BarMapping, Configuration, PciBar};

    use super::*;
    use crate::Report;
    use crate::boot::{Boot, Loader};
    use crate::facts::{Group, Iommu, Machine, Member, Module, Node, Opener, Subject, Use};

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
    pub(super) fn found(defect: impl FnOnce(&mut Facts, &mut Function)) -> Vec<Finding> {
        let mut facts = healthy();
        let mut function = facts.functions.remove(0);
        defect(&mut facts, &mut function);
        facts.functions = vec![function];
        let report = Report::of(facts, false);
        let devices = report.devices.into_iter().flat_map(|device| device.findings);
        report.findings.into_iter().chain(devices).collect()
    }

    /// The only finding.
    pub(super) fn only(defect: impl FnOnce(&mut Facts, &mut Function)) -> Finding {
        let mut found = found(defect);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    pub(super) fn owner(pid: Option<u32>, backend: &str, is_unsafe: bool) -> Option<Owned> {
        let service = "edu0".to_owned();
        let address = "0000:01:00.0".parse().unwrap();
        let backend = backend.to_owned();
        Some(Owned { address, service, driver: Some("edu".to_owned()), pid, backend, is_unsafe })
    }

    pub(super) fn used(is_disk: bool, what: &str, command: Option<&str>) -> Use {
        Use { is_disk, what: what.to_owned(), command: command.map(str::to_owned) }
    }

    pub(super) fn opener(pid: u32) -> Opener {
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
    fn a_function_in_the_overview_blocks_nothing_but_one_that_is_asked_about_does() {
        let mut facts = healthy();
        facts.functions[0].openers = vec![opener(7)];
        assert!(Report::of(facts.clone(), false).blocks);
        assert!(!Report::of(facts.clone(), true).blocks);
        facts.machine.vfio_pci = Module::NotLoaded;
        assert!(Report::of(facts, true).blocks);
    }
}
