//! The ways to a device that VFIO has.

use std::fmt;
use std::path::Path;

use crate::cdev;

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
