//! The ways to a device that VFIO has.

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use crate::cdev;
use crate::device::{group_number, is_without_iommu};

/// How VFIO hands a device out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// By a node of its own, `/dev/vfio/devices/vfioN`, with `/dev/iommu` for its memory: an
    /// address space for each device. Linux 6.6 and later, where it is configured.
    Cdev,
    /// With its whole group, `/dev/vfio/N`, and `/dev/vfio/vfio` for its memory.
    Group,
    /// With its group, `/dev/vfio/noiommu-N`, and no IOMMU: what the device is told to reach, it
    /// reaches in the machine's memory. For whoever has `CAP_SYS_RAWIO`.
    NoIommu,
}

impl Access {
    /// The best way to the function whose folder in sysfs is `sysfs`: by its own node where the
    /// kernel has made one, else by its group. Never without an IOMMU.
    pub fn best(sysfs: &Path) -> Self {
        if cdev::is_there(sysfs) { Access::Cdev } else { Access::Group }
    }
}

impl fmt::Display for Access {
    /// In the configuration's words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Cdev => "vfio-cdev",
            Access::Group => "vfio-group",
            Access::NoIommu => "vfio-no-iommu",
        })
    }
}

/// Where VFIO's nodes of a function are, or would be. None of them need exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes {
    /// The function's own, once it is bound to `vfio-pci` on a kernel that makes such nodes.
    pub device: Option<PathBuf>,
    /// Its group's.
    pub group: Option<PathBuf>,
    /// Whether VFIO made that group itself, for want of an IOMMU.
    pub is_without_iommu: bool,
}

impl Nodes {
    /// Of the containers that groups are attached to.
    pub const CONTAINER: &str = "/dev/vfio/vfio";

    /// Of iommufd, which devices' own nodes are attached to.
    pub const IOMMUFD: &str = "/dev/iommu";

    /// Where the nodes of devices are.
    pub(crate) const DEVICES: &str = "/dev/vfio/devices";

    /// Where the nodes of groups are.
    pub(crate) const GROUPS: &str = "/dev/vfio";

    /// Those of the function whose folder in sysfs is `sysfs`.
    pub fn of(sysfs: &Path) -> Self {
        let entry =
            fs::read_dir(sysfs.join("vfio-dev")).ok().and_then(|mut entries| entries.next());
        let device = entry.and_then(Result::ok).map(|entry| entry.file_name());
        let is_without_iommu = is_without_iommu(sysfs);
        let name = |number: u32| match is_without_iommu {
            true => format!("noiommu-{number}"),
            false => number.to_string(),
        };
        Self {
            device: device.map(|name| Path::new(Self::DEVICES).join(name)),
            group: group_number(sysfs).map(|number| Path::new(Self::GROUPS).join(name(number))),
            is_without_iommu,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_nodes_of_a_function_are_named_after_its_group_and_its_entry_in_vfio_dev() {
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path().join("0000:01:00.0");
        fs::create_dir_all(&sysfs).unwrap();
        assert_eq!(Nodes::of(&sysfs), Nodes::default());

        let group = root.path().join("7");
        fs::create_dir(&group).unwrap();
        symlink(&group, sysfs.join("iommu_group")).unwrap();
        assert_eq!(Nodes::of(&sysfs).group, Some("/dev/vfio/7".into()));

        fs::create_dir_all(sysfs.join("vfio-dev/vfio3")).unwrap();
        assert_eq!(Nodes::of(&sysfs).device, Some("/dev/vfio/devices/vfio3".into()));
    }

    #[test]
    fn a_group_that_vfio_made_for_want_of_an_iommu_has_a_node_of_another_name() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("0")).unwrap();
        fs::write(root.path().join("0/name"), "vfio-noiommu\n").unwrap();
        symlink(root.path().join("0"), root.path().join("iommu_group")).unwrap();
        let nodes = Nodes::of(root.path());
        assert_eq!(nodes.group, Some("/dev/vfio/noiommu-0".into()));
        assert!(nodes.is_without_iommu);
    }
}
