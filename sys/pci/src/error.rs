//! Why something about a PCI function cannot be read or done.

use std::io;
use std::path::PathBuf;

use crate::{GroupMember, PciAddress};

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
                    "take these from their drivers, or bind them to vfio-pci too: {}",
                    commands.join("; ")
                )
            }
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
