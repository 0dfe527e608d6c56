//! Why something about a PCI function cannot be read or done.

use std::io;
use std::path::PathBuf;

use crate::{GroupMember, PciAddress, Use};

/// The most uses or commands in one message; a machine can mount a disk a thousand times.
const MOST: usize = 8;

/// Why sysfs does not say or do what was asked, with the values that matter.
///
/// [`next_step`](Self::next_step) says what a person can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// No PCI function has this address.
    #[error("there is no PCI device {address}")]
    NoSuchDevice {
        /// The address asked for.
        address: PciAddress,
    },
    /// The function belongs to no IOMMU group, so VFIO cannot contain its DMA.
    #[error("PCI device {address} is behind no IOMMU: it has no iommu_group in sysfs")]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// The function is to be taken without an IOMMU, and has one.
    #[error("PCI device {address} is behind an IOMMU, in group {group}, and need not do without")]
    HasIommu {
        /// The function.
        address: PciAddress,
        /// The group's number.
        group: u32,
    },
    /// The function is to be taken without an IOMMU, which VFIO does only when told to.
    #[error("VFIO does not take PCI device {address} without an IOMMU: its no-IOMMU mode is off")]
    NoIommuModeOff {
        /// The function.
        address: PciAddress,
    },
    /// The kernel driver that is to take the function is not there.
    #[error("the kernel has no PCI driver {driver}")]
    DriverNotLoaded {
        /// The driver's name.
        driver: String,
    },
    /// Somebody else's driver has another function of the same group.
    #[error("IOMMU group {group} cannot be used: {}", list(blockers))]
    GroupNotViable {
        /// The group's number.
        group: u32,
        /// The functions in the way, each with its driver.
        blockers: Vec<GroupMember>,
    },
    /// The machine uses the functions.
    #[error("{}", in_use(functions))]
    InUse {
        /// Each function in use, with what for.
        functions: Vec<(PciAddress, Vec<Use>)>,
    },
    /// Another process has taken the function.
    #[error(
        "PCI device {address} is taken by another iohost, {}",
        pid.map_or("which is not known".to_owned(), |pid| format!("process {pid}"))
    )]
    TakenElsewhere {
        /// The function.
        address: PciAddress,
        /// The process.
        pid: Option<u32>,
    },
    /// The function was taken together with another one of its group.
    #[error("PCI device {address} was taken together with {taken_for}, for that one's sake")]
    TakenWith {
        /// The function.
        address: PciAddress,
        /// The other one.
        taken_for: PciAddress,
    },
    /// A whole group was asked for where groups do not matter.
    #[error("PCI device {address} is for {driver}, which takes no IOMMU group")]
    NotForGroups {
        /// The function.
        address: PciAddress,
        /// The driver it is to have.
        driver: &'static str,
    },
    /// The state directory does not work.
    #[error("the state {} cannot be read or written", path.display())]
    State {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the state directory was not written by this iohost.
    #[error("the state file {} makes no sense: {why}", path.display())]
    StateMalformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// This process may not do that.
    #[error("no permission to {action} ({})", path.display())]
    Permission {
        /// What was tried.
        action: String,
        /// The file it was tried on.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel accepted every write, but the function has another driver afterwards.
    #[error(
        "PCI device {address} did not bind to {wanted}, it is now bound to {}",
        bound.as_deref().unwrap_or("no driver")
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver it was to have.
        wanted: String,
        /// The driver it has.
        bound: Option<String>,
    },
    /// A file of sysfs cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of sysfs says something unexpected.
    #[error("{} says {text:?}, which is no {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it says.
        text: String,
        /// What should be there.
        expected: &'static str,
    },
    /// A write to sysfs was refused.
    #[error("writing {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PciError {
    /// What a person can do about it, as one sentence.
    pub fn next_step(&self) -> String {
        match self {
            PciError::NoSuchDevice { .. } => {
                "list the devices that are there with `iohost devices`".to_owned()
            }
            PciError::NoIommu { .. } => {
                "turn the IOMMU on in the firmware (VT-d, AMD-Vi) and on the kernel command line \
                 (intel_iommu=on), and reboot"
                    .to_owned()
            }
            PciError::HasIommu { .. } => {
                "leave `backend` out of the configuration of this device".to_owned()
            }
            PciError::NoIommuModeOff { .. } => {
                "turn it on: echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode; a \
                 kernel without CONFIG_VFIO_NOIOMMU has none"
                    .to_owned()
            }
            PciError::DriverNotLoaded { driver } => format!("load it: modprobe {driver}"),
            PciError::GroupNotViable { blockers, .. } => {
                let commands: Vec<String> = blockers.iter().map(unbind_command).collect();
                format!(
                    "take the whole group with --group, or take these from their drivers: {}",
                    commands.join("; ")
                )
            }
            PciError::InUse { functions } => {
                // What rests on others comes first.
                let uses = functions.iter().flat_map(|(_, uses)| uses.iter().rev());
                let commands: Vec<String> = uses.filter_map(Use::command).collect();
                let force = "take it all the same with --force, which breaks whatever uses it";
                match commands.is_empty() {
                    true => format!("end that first, or {force}"),
                    false => format!("end that first: {}; or {force}", shortened(&commands, "; ")),
                }
            }
            PciError::TakenElsewhere { .. } => {
                "unbind it there (iohost --runtime-dir DIR unbind), or stop that daemon".to_owned()
            }
            PciError::TakenWith { taken_for, .. } => {
                format!("give both back first: iohost unbind {taken_for}")
            }
            PciError::NotForGroups { .. } => "bind it without --group".to_owned(),
            PciError::State { .. } => {
                "run the iohost daemon as root, or name another `state_directory` in the \
                 configuration"
                    .to_owned()
            }
            PciError::StateMalformed { path, .. } => format!(
                "it says what driver the device had; bind it to that one by hand, then remove the \
                 file: rm {}",
                path.display()
            ),
            PciError::Permission { .. } => "run the iohost daemon as root".to_owned(),
            PciError::NotBound { .. } => {
                "read the kernel log (dmesg) for why the driver refused".to_owned()
            }
            PciError::Read { .. } | PciError::Malformed { .. } => {
                "check that sysfs is mounted at /sys".to_owned()
            }
            PciError::Write { .. } => {
                "read the kernel log (dmesg) for why the kernel refused".to_owned()
            }
        }
    }
}

fn unbind_command(member: &GroupMember) -> String {
    format!("echo {0} > /sys/bus/pci/devices/{0}/driver/unbind", member.address)
}

fn list(members: &[GroupMember]) -> String {
    let texts: Vec<String> = members
        .iter()
        .map(|member| {
            let driver = member.driver.as_deref().unwrap_or("no driver");
            format!("{} is bound to {driver}", member.address)
        })
        .collect();
    texts.join(", ")
}

fn in_use(functions: &[(PciAddress, Vec<Use>)]) -> String {
    let one = |(address, uses): &(PciAddress, Vec<Use>)| {
        let uses: Vec<String> = uses.iter().map(Use::to_string).collect();
        format!("PCI device {address} is in use: {}", shortened(&uses, ", "))
    };
    functions.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn shortened(texts: &[String], between: &str) -> String {
    let shown = texts[..texts.len().min(MOST)].join(between);
    match texts.len().saturating_sub(MOST) {
        0 => shown,
        more => format!("{shown}{between}and {more} more"),
    }
}
