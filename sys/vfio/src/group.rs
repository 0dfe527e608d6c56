//! Opening a device with its group and a container: with the type 1 IOMMU, or with none.

use std::ffi::CString;
use std::io::ErrorKind;
use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::{VfioContainer, VfioError as CrateError};

use crate::device::{
    Attachment, Opened, group_number, iommu_group, is_without_iommu, name, node_error,
};
use crate::ioctl::{self, ContainerFile, DeviceFile, GroupFile};
use crate::locked::once_unlocked;
use crate::{Nodes, VfioError, capability};

pub(crate) fn open(sysfs: &Path) -> Result<Opened, VfioError> {
    let number = iommu_group(sysfs)?;
    let container = VfioContainer::new(None).map_err(container_error)?;
    let group = open_group(&Path::new(Nodes::GROUPS).join(number.to_string()), number)?;
    set_container(&group, &container, number)?;
    set_iommu(&container, uapi::VFIO_TYPE1v2_IOMMU, number)?;
    let device = open_device(&group, &name(sysfs))?;
    let iova_ranges = iova_ranges(&container, number)?;
    Ok(Opened {
        device,
        attachment: Attachment::Type1 { group, container },
        group: number,
        iova_ranges,
    })
}

pub(crate) fn open_without_iommu(sysfs: &Path) -> Result<Opened, VfioError> {
    let number =
        group_number(sysfs).ok_or_else(|| VfioError::NoIommuModeOff { sysfs: sysfs.to_owned() })?;
    if !is_without_iommu(sysfs) {
        return Err(VfioError::HasIommu { group: number });
    }
    let containers = PathBuf::from(Nodes::CONTAINER);
    let container =
        ContainerFile::open(&containers).map_err(|source| node_error(containers, source))?;
    let node = Path::new(Nodes::GROUPS).join(format!("noiommu-{number}"));
    let group = open_group(&node, number).map_err(|err| match err {
        // To own the node is not enough here, so it is no use to say so.
        VfioError::Permission { node, source } => VfioError::NeedsRawIo { node, source },
        err => err,
    })?;
    set_container(&group, &container, number)?;
    set_iommu(&container, uapi::VFIO_NOIOMMU_IOMMU, number)?;
    let device = open_device(&group, &name(sysfs))?;
    Ok(Opened {
        device,
        attachment: Attachment::NoIommu { group, _container: container },
        group: number,
        iova_ranges: Vec::new(),
    })
}

/// What `VfioContainer::new` can say, in our words.
fn container_error(err: CrateError) -> VfioError {
    match err {
        CrateError::OpenContainer(source) => node_error(Nodes::CONTAINER.into(), source),
        // The version or the type 1 driver: the same to whoever has to do something about it.
        _ => VfioError::NoIommuDriver,
    }
}

fn open_group(node: &Path, number: u32) -> Result<GroupFile, VfioError> {
    let group = GroupFile::open(node).map_err(|source| match source.kind() {
        ErrorKind::ResourceBusy => VfioError::Busy { group: number },
        _ => node_error(node.to_owned(), source),
    })?;
    match group.is_viable() {
        Ok(true) => Ok(group),
        Ok(false) => Err(VfioError::NotViable { group: number }),
        Err(source) => {
            Err(VfioError::Group { operation: "reading the status", group: number, source })
        }
    }
}

fn set_container(
    group: &GroupFile,
    container: &impl AsRawFd,
    number: u32,
) -> Result<(), VfioError> {
    group.set_container(container).map_err(|source| VfioError::Group {
        operation: "setting the container",
        group: number,
        source,
    })
}

fn set_iommu(container: &impl AsRawFd, kind: u32, number: u32) -> Result<(), VfioError> {
    ioctl::set_iommu(container, kind).map_err(|source| match source.kind() {
        // `vfio_iommu_type1_attach_group` without interrupt remapping.
        ErrorKind::PermissionDenied => {
            VfioError::UnsafeInterrupts { group: number, module: "vfio_iommu_type1", source }
        }
        _ => VfioError::Group { operation: "setting the IOMMU", group: number, source },
    })
}

fn open_device(group: &GroupFile, name: &str) -> Result<DeviceFile, VfioError> {
    let c_name = CString::new(name).map_err(|err| VfioError::Device {
        operation: format!("opening {name:?}"),
        source: err.into(),
    })?;
    once_unlocked(|| group.device(&c_name)).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV) => VfioError::NotBound { name: name.to_owned(), source },
        _ => VfioError::Device { operation: format!("opening {name}"), source },
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
    fn a_missing_group_node_means_that_the_device_is_not_bound() {
        let node = Path::new("/nonexistent/7");
        let err = open_group(node, 7).unwrap_err();
        assert_eq!(err.to_string(), "/nonexistent/7 is not there");
        assert!(err.next_step().contains("iohost bind"));
    }

    #[test]
    fn a_missing_container_node_means_that_vfio_is_not_loaded() {
        let err = container_error(CrateError::OpenContainer(ErrorKind::NotFound.into()));
        assert_eq!(err.next_step(), "load VFIO: modprobe vfio-pci");
    }

    #[test]
    fn a_device_with_no_group_is_not_bound_in_no_iommu_mode() {
        let folder = tempfile::tempdir().unwrap();
        let err = open_without_iommu(folder.path()).err().unwrap();
        assert!(matches!(err, VfioError::NoIommuModeOff { .. }), "{err}");
        assert!(err.next_step().contains("enable_unsafe_noiommu_mode"), "{}", err.next_step());
    }

    #[test]
    fn a_device_behind_an_iommu_is_not_opened_without_it() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("7");
        std::fs::create_dir(&group).unwrap();
        std::os::unix::fs::symlink(&group, folder.path().join("iommu_group")).unwrap();
        let err = open_without_iommu(folder.path()).err().unwrap();
        assert!(matches!(err, VfioError::HasIommu { group: 7 }), "{err}");

        std::fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
        let err = open(folder.path()).err().unwrap();
        assert!(matches!(err, VfioError::NoIommu { .. }), "{err}");
    }
}
