//! Opening a device, and what belongs to it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::{VfioContainer, VfioError as CrateError};

use crate::interrupt::{self, Interrupt};
use crate::ioctl::{self, DeviceCall, DeviceFile, GroupFile, Message};
use crate::region::{self, Region};
use crate::{VfioError, capability};

/// Where the nodes of groups are.
const NODES: &str = "/dev/vfio";

/// One PCI function, open.
///
/// All methods can be called from any thread; those that change interrupts, mappings or the
/// device as a whole exclude each other.
///
/// Invariant: `device` belongs to `group`, and `group` is in `container`. The fields are dropped
/// in this order, which is the only one that the kernel accepts.
pub struct VfioDevice {
    pub(crate) device: DeviceFile,
    pub(crate) group: GroupFile,
    pub(crate) container: VfioContainer,
    group_number: u32,
    pub(crate) resets_alone: bool,
    pub(crate) regions: Vec<Region>,
    pub(crate) vectors: [u32; 3],
    iova_ranges: Vec<RangeInclusive<u64>>,
    /// The kind of interrupt that is enabled: a device has one at a time.
    pub(crate) enabled: Mutex<Option<Interrupt>>,
    /// What the device can reach: first address to length, both in whole pages.
    pub(crate) mapped: Mutex<BTreeMap<u64, u64>>,
}

impl VfioDevice {
    /// Opens the function whose folder in sysfs is `sysfs`, such as
    /// `/sys/bus/pci/devices/0000:01:00.0`, and takes its whole IOMMU group.
    ///
    /// The kernel resets the function at this, where it can without disturbing others.
    ///
    /// - Needs: read and write permission on `/dev/vfio/N`; nothing else.
    /// - Errors: `NoSuchDevice`, `NoIommu`, `NodeMissing`, `Permission`, `Busy`, `NotViable`,
    ///   `NoIommuDriver`, `UnsafeInterrupts`, `NotBound`, `NotPci`, `NoIovaRanges`; `Group` and
    ///   `Device` for what has no name.
    pub fn open(sysfs: &Path) -> Result<Self, VfioError> {
        let number = group_number(sysfs)?;
        let container = VfioContainer::new(None).map_err(container_error)?;
        let group = open_group(Path::new(NODES), number)?;
        put_into(&container, &group, number)?;

        let name = sysfs.file_name().unwrap_or_default();
        let device = open_device(&group, number, name.as_bytes())?;
        let mut info = Message::of::<uapi::vfio_device_info>();
        device.call(DeviceCall::GetInfo, &mut info).map_err(|source| VfioError::Device {
            operation: "reading what the device is".to_owned(),
            source,
        })?;
        let flags = info.u32(offset_of!(uapi::vfio_device_info, flags));
        if flags & uapi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::NotPci { name: name.to_string_lossy().into_owned(), flags });
        }
        let regions = region::regions(&device)?;
        let vectors = interrupt::vectors(&device)?;
        let iova_ranges = iova_ranges(&container, number)?;
        Ok(Self {
            device,
            group,
            container,
            group_number: number,
            resets_alone: flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0,
            regions,
            vectors,
            iova_ranges,
            enabled: Mutex::new(None),
            mapped: Mutex::new(BTreeMap::new()),
        })
    }

    /// The number of the IOMMU group, the `N` of `/dev/vfio/N`.
    pub fn group(&self) -> u32 {
        self.group_number
    }

    /// The I/O virtual addresses that can be mapped, in increasing order.
    pub fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &self.iova_ranges
    }
}

// By hand: the container of `vfio-ioctls` has none, and the rest says enough.
impl std::fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioDevice")
            .field("group", &self.group_number)
            .field("regions", &self.regions)
            .field("vectors", &self.vectors)
            .field("enabled", &self.enabled)
            .field("mapped", &self.mapped)
            .finish_non_exhaustive()
    }
}

fn group_number(sysfs: &Path) -> Result<u32, VfioError> {
    if !sysfs.is_dir() {
        return Err(VfioError::NoSuchDevice { sysfs: sysfs.to_owned() });
    }
    let link = fs::read_link(sysfs.join("iommu_group")).ok();
    let number = link.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    number
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| VfioError::NoIommu { sysfs: sysfs.to_owned() })
}

/// What `VfioContainer::new` can say, in our words.
fn container_error(err: CrateError) -> VfioError {
    match err {
        CrateError::OpenContainer(source) => node_error(Path::new(NODES).join("vfio"), source),
        // The version or the type 1 driver: the same to whoever has to do something about it.
        _ => VfioError::NoIommuDriver,
    }
}

fn node_error(node: PathBuf, source: io::Error) -> VfioError {
    match source.kind() {
        ErrorKind::NotFound => VfioError::NodeMissing { node },
        ErrorKind::PermissionDenied => VfioError::Permission { node, source },
        _ => VfioError::Device { operation: format!("opening {}", node.display()), source },
    }
}

fn open_group(nodes: &Path, number: u32) -> Result<GroupFile, VfioError> {
    let group = GroupFile::open(nodes, number).map_err(|source| match source.kind() {
        ErrorKind::ResourceBusy => VfioError::Busy { group: number },
        _ => node_error(nodes.join(number.to_string()), source),
    })?;
    match group.is_viable() {
        Ok(true) => Ok(group),
        Ok(false) => Err(VfioError::NotViable { group: number }),
        Err(source) => {
            Err(VfioError::Group { operation: "reading the status", group: number, source })
        }
    }
}

fn put_into(container: &VfioContainer, group: &GroupFile, number: u32) -> Result<(), VfioError> {
    group.set_container(container).map_err(|source| VfioError::Group {
        operation: "setting the container",
        group: number,
        source,
    })?;
    ioctl::set_iommu(container, uapi::VFIO_TYPE1v2_IOMMU).map_err(|source| match source.kind() {
        // `vfio_iommu_type1_attach_group` without interrupt remapping.
        ErrorKind::PermissionDenied => VfioError::UnsafeInterrupts { group: number, source },
        _ => VfioError::Group { operation: "setting the IOMMU", group: number, source },
    })
}

fn open_device(group: &GroupFile, number: u32, name: &[u8]) -> Result<DeviceFile, VfioError> {
    let text = || String::from_utf8_lossy(name).into_owned();
    let c_name = CString::new(name).map_err(|err| VfioError::Device {
        operation: format!("opening {:?}", text()),
        source: err.into(),
    })?;
    group.device(&c_name).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV) => VfioError::NotBound { group: number, name: text(), source },
        Some(libc::EBUSY) => VfioError::Busy { group: number },
        _ => VfioError::Device { operation: format!("opening {}", text()), source },
    })
}

fn iova_ranges(
    container: &VfioContainer,
    number: u32,
) -> Result<Vec<RangeInclusive<u64>>, VfioError> {
    let info = ioctl::iommu_info(container).map_err(|source| VfioError::Group {
        operation: "reading what the IOMMU can do",
        group: number,
        source,
    })?;
    let flags = info.u32(offset_of!(uapi::vfio_iommu_type1_info, flags));
    let first = info.u32(offset_of!(uapi::vfio_iommu_type1_info, cap_offset));
    let ranges = match flags & uapi::VFIO_IOMMU_INFO_CAPS {
        0 => None,
        _ => capability::iova_ranges(&info, first),
    };
    ranges.ok_or(VfioError::NoIovaRanges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_no_such_device() {
        let folder = tempfile::tempdir().unwrap();
        let err = VfioDevice::open(&folder.path().join("0000:01:00.0")).unwrap_err();
        assert!(matches!(err, VfioError::NoSuchDevice { .. }), "{err}");
    }

    #[test]
    fn a_device_without_a_group_is_behind_no_iommu() {
        let folder = tempfile::tempdir().unwrap();
        let err = VfioDevice::open(folder.path()).unwrap_err();
        assert!(matches!(err, VfioError::NoIommu { .. }), "{err}");
        assert!(err.next_step().contains("intel_iommu=on"));
    }

    #[test]
    fn a_missing_group_node_means_that_the_device_is_not_bound() {
        let nodes = tempfile::tempdir().unwrap();
        let err = open_group(nodes.path(), 7).unwrap_err();
        assert_eq!(err.to_string(), format!("{} is not there", nodes.path().join("7").display()));
        assert!(err.next_step().contains("iohost bind"));
    }

    #[test]
    fn a_refused_node_names_itself_and_what_to_do() {
        let err = node_error("/dev/vfio/7".into(), ErrorKind::PermissionDenied.into());
        assert_eq!(err.to_string(), "no permission on /dev/vfio/7");
        assert!(err.next_step().contains("chown $USER /dev/vfio/7"));
    }

    #[test]
    fn a_missing_container_node_means_that_vfio_is_not_loaded() {
        let err = container_error(CrateError::OpenContainer(ErrorKind::NotFound.into()));
        assert_eq!(err.next_step(), "load VFIO: modprobe vfio-pci");
    }
}
