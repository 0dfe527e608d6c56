//! Why a VFIO call failed.

use std::io;
use std::path::PathBuf;

use crate::Interrupt;

/// Why a VFIO call failed, with the values that made it fail.
///
/// [`next_step`](Self::next_step) says what a person can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// Sysfs has no such device.
    #[error("there is no device at {}", sysfs.display())]
    NoSuchDevice {
        /// The folder that should be the device's.
        sysfs: PathBuf,
    },
    /// The device belongs to no IOMMU group.
    #[error("the device at {} is behind no IOMMU: it has no iommu_group", sysfs.display())]
    NoIommu {
        /// The device's folder.
        sysfs: PathBuf,
    },
    /// A node of VFIO is missing.
    #[error("{} is not there", node.display())]
    NodeMissing {
        /// The node.
        node: PathBuf,
    },
    /// This process may not open a node of VFIO.
    #[error("no permission on {}", node.display())]
    Permission {
        /// The node.
        node: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel has no node for the device itself, or none for its memory.
    #[error("the kernel offers no device node with iommufd: {} is not there", node.display())]
    NoCdev {
        /// The node that is missing.
        node: PathBuf,
    },
    /// VFIO was not told to take devices without an IOMMU, so it has not taken this one.
    #[error("VFIO has not taken the device at {} without an IOMMU: it has no group", sysfs.display())]
    NoIommuModeOff {
        /// The device's folder.
        sysfs: PathBuf,
    },
    /// A device that an IOMMU stands before is not to be opened without it.
    #[error("the device is behind an IOMMU, in group {group}, and need not do without")]
    HasIommu {
        /// The group's number.
        group: u32,
    },
    /// The kernel hands a device without an IOMMU only to those who may do everything anyway.
    #[error("no permission on {}, which takes CAP_SYS_RAWIO", node.display())]
    NeedsRawIo {
        /// The node.
        node: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing translates the device's addresses, so no memory can be mapped for it.
    #[error("no memory can be mapped for a device that is opened without an IOMMU")]
    NoDma,
    /// Another process has the group.
    #[error("IOMMU group {group} is in use by another process")]
    Busy {
        /// The group's number.
        group: u32,
    },
    /// A device of the group has a driver that VFIO does not trust.
    #[error("IOMMU group {group} is not viable: a device in it is bound to a driver of the kernel")]
    NotViable {
        /// The group's number.
        group: u32,
    },
    /// The kernel has no IOMMU driver for VFIO, or speaks another version of it.
    #[error("the kernel's VFIO has no type 1 IOMMU")]
    NoIommuDriver,
    /// Interrupts are not remapped, so a device could send any interrupt to the host.
    #[error("IOMMU group {group} has no interrupt remapping, and the kernel insists on it")]
    UnsafeInterrupts {
        /// The group's number.
        group: u32,
        /// The part of the kernel that insists.
        module: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// VFIO has no such device: it is not bound to `vfio-pci`.
    #[error("device {name} is not bound to vfio-pci")]
    NotBound {
        /// The device's name in sysfs.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A step of opening the group failed in a way that has no name of its own.
    #[error("{operation} of IOMMU group {group}")]
    Group {
        /// What was asked.
        operation: &'static str,
        /// The group's number.
        group: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device is not a PCI device.
    #[error("device {name} is not a PCI device, its VFIO flags are {flags:#x}")]
    NotPci {
        /// The device's name in sysfs.
        name: String,
        /// What `VFIO_DEVICE_GET_INFO` said.
        flags: u32,
    },
    /// A call on the device failed.
    #[error("{operation}")]
    Device {
        /// What was asked, with its values.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device has no such region.
    #[error("the device has no region {index}")]
    NoSuchRegion {
        /// The region asked for.
        index: u32,
    },
    /// An access that does not fit into its region.
    #[error("{len} bytes at {offset:#x} of region {index}, which has {size:#x} bytes")]
    OutOfRange {
        /// The region.
        index: u32,
        /// First byte of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// The kernel did not make an access.
    #[error("accessing {len} bytes at {offset:#x} of region {index}")]
    Access {
        /// The region.
        index: u32,
        /// First byte of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A range that the kernel does not offer for mapping.
    #[error("region {index} cannot be mapped at {start:#x}..{end:#x}")]
    NotMappable {
        /// The region.
        index: u32,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The kernel refused a mapping that it offers.
    #[error("mapping {start:#x}..{end:#x} of region {index}")]
    MapRegion {
        /// The region.
        index: u32,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// More vectors than the device has.
    #[error("{asked} {kind} vectors of a device that has {available}")]
    NoSuchInterrupt {
        /// The kind asked for.
        kind: Interrupt,
        /// Vectors asked for.
        asked: usize,
        /// Vectors the device has.
        available: u32,
    },
    /// A mapping would pin more memory than this process may.
    #[error(
        "mapping {len:#x} bytes for the device needs {need} bytes of locked memory, \
         the limit is {have}"
    )]
    LockedMemory {
        /// Bytes of the mapping.
        len: u64,
        /// Bytes that would be locked then.
        need: u64,
        /// `RLIMIT_MEMLOCK` of this process, in bytes.
        have: u64,
    },
    /// The kernel did not map memory for the device.
    #[error("mapping {len:#x} bytes at iova {iova:#x}")]
    MapDma {
        /// The device's address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel did not take a mapping back.
    #[error("unmapping {len:#x} bytes at iova {iova:#x}")]
    UnmapDma {
        /// The device's address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No mapping of this length starts there.
    #[error("no mapping of {len:#x} bytes starts at iova {iova:#x}")]
    NotMapped {
        /// The device's address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// The kernel does not say which addresses can be mapped; it is older than 5.4.
    #[error("the kernel does not say which I/O virtual addresses can be used")]
    NoIovaRanges,
    /// The kernel knows no way to reset the device.
    #[error("the device cannot be reset, neither alone nor with its bus")]
    NoReset,
    /// The device can only be reset together with devices that are not ours.
    #[error("the device resets only together with {others:?}, which are in other IOMMU groups")]
    ResetShared {
        /// Those devices' addresses.
        others: Vec<String>,
    },
}

impl VfioError {
    /// What a person can do about it, as one sentence.
    pub fn next_step(&self) -> String {
        match self {
            VfioError::NoSuchDevice { .. } => {
                "list the devices that are there with `iohost devices`".to_owned()
            }
            VfioError::NoIommu { .. } => {
                "turn the IOMMU on in the firmware (VT-d, AMD-Vi) and on the kernel command line \
                 (intel_iommu=on), and reboot"
                    .to_owned()
            }
            VfioError::NodeMissing { node } if node.ends_with("vfio/vfio") => {
                "load VFIO: modprobe vfio-pci".to_owned()
            }
            VfioError::NodeMissing { .. } | VfioError::NotBound { .. } => {
                "bind the device to vfio-pci with `iohost bind`".to_owned()
            }
            VfioError::Permission { node, .. } => {
                format!("give this user the node: chown $USER {}", node.display())
            }
            VfioError::Busy { .. } => {
                "stop the other process that has a device of the group open".to_owned()
            }
            VfioError::NotViable { .. } => {
                "bind every device of the group to vfio-pci with `iohost bind`".to_owned()
            }
            VfioError::NoIommuDriver => {
                "load the IOMMU driver of VFIO: modprobe vfio_iommu_type1".to_owned()
            }
            VfioError::UnsafeInterrupts { module, .. } => format!(
                "turn interrupt remapping on in the firmware; or accept the risk: \
                 echo 1 > /sys/module/{module}/parameters/allow_unsafe_interrupts"
            ),
            VfioError::NoCdev { node } if node.ends_with("iommu") => {
                "load iommufd: modprobe iommufd; or use the group: backend = \"vfio-group\""
                    .to_owned()
            }
            VfioError::NoCdev { .. } => {
                "use a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV (6.6 or later); or \
                 use the group: backend = \"vfio-group\""
                    .to_owned()
            }
            VfioError::NoIommuModeOff { .. } => "tell VFIO to take it, and bind it again: \
                 echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
                .to_owned(),
            VfioError::HasIommu { .. } | VfioError::NoDma => {
                "open it with its IOMMU: without `backend` in the configuration".to_owned()
            }
            VfioError::NeedsRawIo { .. } => {
                "run the iohost daemon as root; a node of its own is not enough here".to_owned()
            }
            VfioError::LockedMemory { need, .. } => format!(
                "raise the limit to at least {need} bytes: LimitMEMLOCK= of the service, or \
                 ulimit -l {}",
                need.div_ceil(1024)
            ),
            VfioError::ResetShared { .. } => {
                "bind those devices to vfio-pci too, or do without a reset".to_owned()
            }
            VfioError::NoReset => {
                "do without a reset, or put the device into a slot of its own".to_owned()
            }
            VfioError::NoIovaRanges => "use Linux 5.4 or later".to_owned(),
            _ => "read the kernel log (dmesg) for why the kernel refused".to_owned(),
        }
    }
}
