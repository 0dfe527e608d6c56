//! Opening a device by its own node, with an address space of its own from iommufd.
//!
//! Source: Linux, `Documentation/driver-api/vfio.rst`, "VFIO Device cdev", and
//! `Documentation/userspace-api/iommufd.rst`.

use std::fs;
use std::io::{self, ErrorKind};
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use vfio_bindings::bindings::vfio as uapi;

use crate::device::{Attachment, Opened, iommu_group, name, node_error};
use crate::ioctl::{DeviceCall, DeviceFile, IommuCall, IommuFile, Message};
use crate::locked::once_unlocked;
use crate::{Nodes, VfioError};

/// The nodes: of iommufd, and of devices.
struct Places {
    iommufd: PathBuf,
    devices: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { iommufd: Nodes::IOMMUFD.into(), devices: Nodes::DEVICES.into() }
    }
}

/// `iommu_ioas_alloc`: size, flags, the new address space.
const ALLOCATE_LEN: usize = 12;
const ALLOCATED: usize = 8;

/// `iommu_ioas_unmap`: size, address space, address, length.
const UNMAP_LEN: usize = 24;

/// Whether the kernel has made a node for the device, and for iommufd.
pub(crate) fn is_there(sysfs: &Path) -> bool {
    nodes_of(sysfs, &Places::default()).is_ok()
}

pub(crate) fn open(sysfs: &Path) -> Result<Opened, VfioError> {
    let group = iommu_group(sysfs)?;
    let (device_node, iommu_node) = nodes_of(sysfs, &Places::default())?;
    let device =
        DeviceFile::open(&device_node).map_err(|source| node_error(device_node, source))?;
    let iommufd = IommuFile::open(&iommu_node).map_err(|source| node_error(iommu_node, source))?;

    let mut bind = Message::of::<uapi::vfio_device_bind_iommufd>();
    bind.set(offset_of!(uapi::vfio_device_bind_iommufd, iommufd), iommufd.as_raw_fd() as u32);
    once_unlocked(|| device.call(DeviceCall::BindIommufd, &mut bind))
        .map_err(|source| bind_error(sysfs, group, source))?;

    let mut space = Message::with_len(ALLOCATE_LEN);
    iommufd.call(IommuCall::AllocateIoas, &mut space).map_err(|source| VfioError::Device {
        operation: "making an address space".to_owned(),
        source,
    })?;
    let ioas = space.u32(ALLOCATED);

    let mut attach = Message::of::<uapi::vfio_device_attach_iommufd_pt>();
    attach.set(offset_of!(uapi::vfio_device_attach_iommufd_pt, pt_id), ioas);
    device.call(DeviceCall::AttachIommufd, &mut attach).map_err(|source| VfioError::Device {
        operation: "attaching the device to its address space".to_owned(),
        source,
    })?;

    let ranges = iommufd.iova_ranges(ioas).map_err(|source| VfioError::Device {
        operation: "reading which addresses can be mapped".to_owned(),
        source,
    })?;
    let mut iova_ranges: Vec<RangeInclusive<u64>> =
        ranges.into_iter().map(|[first, last]| first..=last).collect();
    iova_ranges.sort_by_key(|range| *range.start());
    Ok(Opened { device, attachment: Attachment::Iommufd { iommufd, ioas }, group, iova_ranges })
}

/// Takes a mapping back, whole.
pub(crate) fn unmap(iommufd: &IommuFile, ioas: u32, iova: u64, len: u64) -> io::Result<()> {
    let mut message = Message::with_len(UNMAP_LEN);
    message.set(4, ioas).set64(8, iova).set64(16, len);
    iommufd.call(IommuCall::Unmap, &mut message)
}

/// The device's node and that of iommufd.
fn nodes_of(sysfs: &Path, places: &Places) -> Result<(PathBuf, PathBuf), VfioError> {
    let not_bound = |source| VfioError::NotBound { name: name(sysfs), source };
    let mut entries = fs::read_dir(sysfs.join("vfio-dev")).map_err(not_bound)?;
    let Some(entry) = entries.next() else { return Err(not_bound(ErrorKind::NotFound.into())) };
    // The kernel lists a device here whether or not it has made a node for it.
    let device = places.devices.join(entry.map_err(not_bound)?.file_name());
    for node in [&device, &places.iommufd] {
        if !node.exists() {
            return Err(VfioError::NoCdev { node: node.clone() });
        }
    }
    Ok((device, places.iommufd.clone()))
}

fn bind_error(sysfs: &Path, group: u32, source: io::Error) -> VfioError {
    match source.raw_os_error() {
        // `EBUSY`: the group is open. `EINVAL`: the node was opened twice; nothing else in our
        // call could be wrong.
        Some(libc::EBUSY | libc::EINVAL) => VfioError::Busy { group },
        // From `iommu_device_claim_dma_owner`, or else from `iommufd_device_bind` itself.
        Some(libc::EPERM) if has_foreign_member(sysfs) => VfioError::NotViable { group },
        Some(libc::EPERM) => VfioError::UnsafeInterrupts { group, module: "iommufd", source },
        _ => VfioError::Device { operation: "binding the device to iommufd".to_owned(), source },
    }
}

/// Whether a device of the group has a driver that does DMA on its own.
fn has_foreign_member(sysfs: &Path) -> bool {
    let Ok(members) = fs::read_dir(sysfs.join("iommu_group/devices")) else { return false };
    members.flatten().any(|member| {
        let Ok(driver) = fs::read_link(member.path().join("driver")) else { return false };
        let driver = driver.file_name().unwrap_or_default().to_string_lossy().replace('_', "-");
        !(driver.ends_with("vfio-pci") || driver == "pci-stub" || driver == "pcieport")
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A device's folder, and folders for nodes.
    fn tree() -> (tempfile::TempDir, PathBuf, Places) {
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path().join("0000:01:00.0");
        let places =
            Places { iommufd: root.path().join("iommu"), devices: root.path().join("devices") };
        fs::create_dir(&sysfs).unwrap();
        fs::create_dir(&places.devices).unwrap();
        (root, sysfs, places)
    }

    #[test]
    fn a_device_that_vfio_does_not_list_is_not_bound() {
        let (_root, sysfs, places) = tree();
        let err = nodes_of(&sysfs, &places).unwrap_err();
        assert_eq!(err.to_string(), "device 0000:01:00.0 is not bound to vfio-pci");
        assert!(err.next_step().contains("iohost bind"));
    }

    #[test]
    fn a_listed_device_without_a_node_is_a_kernel_without_cdev() {
        let (_root, sysfs, places) = tree();
        fs::create_dir_all(sysfs.join("vfio-dev/vfio3")).unwrap();
        let err = nodes_of(&sysfs, &places).unwrap_err();
        assert!(matches!(&err, VfioError::NoCdev { node } if node.ends_with("vfio3")), "{err}");
        assert!(err.next_step().contains("backend = \"vfio-group\""), "{}", err.next_step());

        fs::write(places.devices.join("vfio3"), "").unwrap();
        let err = nodes_of(&sysfs, &places).unwrap_err();
        assert!(matches!(&err, VfioError::NoCdev { node } if node.ends_with("iommu")), "{err}");

        fs::write(&places.iommufd, "").unwrap();
        let found = nodes_of(&sysfs, &places).unwrap();
        assert_eq!(found, (places.devices.join("vfio3"), places.iommufd));
    }

    #[test]
    fn a_second_user_of_a_node_is_told_that_the_device_is_in_use() {
        let (_root, sysfs, _) = tree();
        for errno in [libc::EBUSY, libc::EINVAL] {
            let err = bind_error(&sysfs, 7, io::Error::from_raw_os_error(errno));
            assert!(matches!(err, VfioError::Busy { group: 7 }), "{err:?}");
        }
    }

    #[test]
    fn a_refusal_is_a_sibling_s_where_one_has_a_driver_and_else_for_want_of_remapping() {
        let (root, sysfs, _) = tree();
        let denied = || io::Error::from_raw_os_error(libc::EPERM);
        let sibling = sysfs.join("iommu_group/devices/0000:01:00.1");
        fs::create_dir_all(&sibling).unwrap();
        for driver in [None, Some("vfio-pci"), Some("pcieport")] {
            if let Some(driver) = driver {
                let _ = fs::remove_file(sibling.join("driver"));
                symlink(root.path().join(driver), sibling.join("driver")).unwrap();
            }
            let err = bind_error(&sysfs, 7, denied());
            assert!(matches!(err, VfioError::UnsafeInterrupts { .. }), "{driver:?}: {err:?}");
            let parameter = "/sys/module/iommufd/parameters/allow_unsafe_interrupts";
            assert!(err.next_step().contains(parameter), "{}", err.next_step());
        }
        fs::remove_file(sibling.join("driver")).unwrap();
        symlink(root.path().join("nvme"), sibling.join("driver")).unwrap();
        let err = bind_error(&sysfs, 7, denied());
        assert!(matches!(err, VfioError::NotViable { group: 7 }), "{err:?}");
    }
}
