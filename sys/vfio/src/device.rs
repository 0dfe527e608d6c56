//! Opening a device, and what belongs to it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::VfioContainer;

use crate::interrupt::{self, Enabled};
use crate::ioctl::{ContainerFile, DeviceCall, DeviceFile, GroupFile, IommuFile, Message};
use crate::region::{self, Region};
use crate::{Access, VfioError, cdev, group};

/// One PCI function, open.
///
/// All methods can be called from any thread; those that change interrupts, mappings or the
/// device as a whole exclude each other.
///
/// Invariant: `device` belongs to `attachment`, and is dropped before it, as the kernel wants it.
pub struct VfioDevice {
    pub(crate) device: DeviceFile,
    pub(crate) attachment: Attachment,
    group_number: u32,
    /// The device's folder in sysfs.
    pub(crate) sysfs: PathBuf,
    pub(crate) resets_alone: bool,
    /// The kernel's methods of resetting the function alone, in the order in which it tries them;
    /// empty where it does not say. Read at once, since a process may give up reading files.
    pub(crate) reset_methods: Vec<String>,
    pub(crate) regions: Vec<Region>,
    pub(crate) vectors: [u32; 3],
    iova_ranges: Vec<RangeInclusive<u64>>,
    /// The kind of interrupt that is enabled: a device has one at a time.
    pub(crate) enabled: Mutex<Option<Enabled>>,
    /// What the device can reach: first address to length, both in whole pages.
    pub(crate) mapped: Mutex<BTreeMap<u64, u64>>,
}

impl VfioDevice {
    /// Opens the function whose folder in sysfs is `sysfs`, such as
    /// `/sys/bus/pci/devices/0000:01:00.0`.
    ///
    /// The kernel resets the function at this, where it can without disturbing others.
    ///
    /// - Needs: read and write permission on the nodes that [`Access`] names.
    /// - Errors of every access: `NoSuchDevice`, `NodeMissing`, `Permission`, `Busy`, `NotBound`,
    ///   `NotPci`; `Group` and `Device` for what has no name. With an IOMMU: `NoIommu`,
    ///   `UnsafeInterrupts`. By its own node: `NoCdev`. By its group: `NotViable`,
    ///   `NoIommuDriver`, `NoIovaRanges`. Without an IOMMU: `NoIommuModeOff`, `HasIommu`,
    ///   `NeedsRawIo`.
    pub fn open(sysfs: &Path, access: Access) -> Result<Self, VfioError> {
        if !sysfs.is_dir() {
            return Err(VfioError::NoSuchDevice { sysfs: sysfs.to_owned() });
        }
        let Opened { device, attachment, group, iova_ranges } = match access {
            Access::Cdev => cdev::open(sysfs)?,
            Access::Group => group::open(sysfs)?,
            Access::NoIommu => group::open_without_iommu(sysfs)?,
        };
        let mut info = Message::of::<uapi::vfio_device_info>();
        device.call(DeviceCall::GetInfo, &mut info).map_err(|source| VfioError::Device {
            operation: "reading what the device is".to_owned(),
            source,
        })?;
        let flags = info.u32(offset_of!(uapi::vfio_device_info, flags));
        if flags & uapi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::NotPci { name: name(sysfs), flags });
        }
        let regions = region::regions(&device)?;
        let vectors = interrupt::vectors(&device)?;
        Ok(Self {
            device,
            attachment,
            group_number: group,
            sysfs: sysfs.to_owned(),
            resets_alone: flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0,
            reset_methods: reset_methods(sysfs),
            regions,
            vectors,
            iova_ranges,
            enabled: Mutex::new(None),
            mapped: Mutex::new(BTreeMap::new()),
        })
    }

    /// How the device was opened.
    pub fn access(&self) -> Access {
        match self.attachment {
            Attachment::Iommufd { .. } => Access::Cdev,
            Attachment::Type1 { .. } => Access::Group,
            Attachment::NoIommu { .. } => Access::NoIommu,
        }
    }

    /// The number of the IOMMU group, the `N` of `/dev/vfio/N`.
    pub fn group(&self) -> u32 {
        self.group_number
    }

    /// The I/O virtual addresses that can be mapped, in increasing order; none without an IOMMU.
    pub fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &self.iova_ranges
    }
}

/// Source: Linux, `Documentation/ABI/testing/sysfs-bus-pci`, `reset_method` (5.15).
fn reset_methods(sysfs: &Path) -> Vec<String> {
    let text = fs::read_to_string(sysfs.join("reset_method")).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// What an access to a device comes to.
pub(crate) struct Opened {
    pub(crate) device: DeviceFile,
    pub(crate) attachment: Attachment,
    pub(crate) group: u32,
    pub(crate) iova_ranges: Vec<RangeInclusive<u64>>,
}

/// What the device's transfers go through, and what shows the kernel that the device is ours.
///
/// The fields of each are dropped in their order, which is the only one that the kernel accepts.
pub(crate) enum Attachment {
    /// The group is in the container.
    Type1 { group: GroupFile, container: VfioContainer },
    /// The device is attached to this address space, which nothing else is attached to.
    Iommufd { iommufd: IommuFile, ioas: u32 },
    /// The group is in the container, which translates nothing.
    NoIommu { group: GroupFile, _container: ContainerFile },
}

// By hand: the container of `vfio-ioctls` has none, and the rest says enough.
impl std::fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDevice")
            .field("access", &self.access())
            .field("group", &self.group_number)
            .field("regions", &self.regions)
            .field("vectors", &self.vectors)
            .field("enabled", &self.enabled)
            .field("mapped", &self.mapped)
            .finish_non_exhaustive()
    }
}

/// The device's name in sysfs.
pub(crate) fn name(sysfs: &Path) -> String {
    sysfs.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The number of the device's group, if it has one.
pub(crate) fn group_number(sysfs: &Path) -> Option<u32> {
    fs::read_link(sysfs.join("iommu_group")).ok()?.file_name()?.to_str()?.parse().ok()
}

/// Whether the kernel made the device's group itself, in its no-IOMMU mode.
pub(crate) fn is_without_iommu(sysfs: &Path) -> bool {
    let name = fs::read_to_string(sysfs.join("iommu_group/name"));
    name.is_ok_and(|name| name.trim_end() == "vfio-noiommu")
}

/// The number of the group of a device that is behind an IOMMU.
pub(crate) fn iommu_group(sysfs: &Path) -> Result<u32, VfioError> {
    let number = group_number(sysfs).filter(|_| !is_without_iommu(sysfs));
    number.ok_or_else(|| VfioError::NoIommu { sysfs: sysfs.to_owned() })
}

/// Why a node of VFIO was not opened.
pub(crate) fn node_error(node: PathBuf, source: io::Error) -> VfioError {
    match source.kind() {
        ErrorKind::NotFound => VfioError::NodeMissing { node },
        ErrorKind::PermissionDenied => VfioError::Permission { node, source },
        _ => VfioError::Device { operation: format!("opening {}", node.display()), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_no_such_device() {
        let folder = tempfile::tempdir().unwrap();
        for access in [Access::Cdev, Access::Group, Access::NoIommu] {
            let err = VfioDevice::open(&folder.path().join("0000:01:00.0"), access).unwrap_err();
            assert!(matches!(err, VfioError::NoSuchDevice { .. }), "{access}: {err}");
        }
    }

    #[test]
    fn a_device_without_a_group_is_behind_no_iommu() {
        let folder = tempfile::tempdir().unwrap();
        for access in [Access::Cdev, Access::Group] {
            let err = VfioDevice::open(folder.path(), access).unwrap_err();
            assert!(matches!(err, VfioError::NoIommu { .. }), "{access}: {err}");
            assert!(err.next_step().contains("intel_iommu=on"));
        }
    }

    #[test]
    fn a_refused_node_names_itself_and_what_to_do() {
        let err = node_error("/dev/vfio/7".into(), ErrorKind::PermissionDenied.into());
        assert_eq!(err.to_string(), "no permission on /dev/vfio/7");
        assert!(err.next_step().contains("chown $USER /dev/vfio/7"));
    }
}
