//! The codes of what the daemon and the driver host refuse for the reasons that doctor finds.

use iohost_pci::PciError;
use iohost_uio::UioError;
use iohost_vfio::VfioError;

use crate::Code;

/// The code of what sysfs says or refuses.
pub fn of_pci(err: &PciError) -> Code {
    match err {
        PciError::NoSuchDevice { .. } => Code::NoSuchDevice,
        PciError::NoIommu { .. } => Code::NoIommu,
        PciError::HasIommu { .. } => Code::HasIommu,
        PciError::NoIommuModeOff { .. } => Code::NoIommuModeOff,
        PciError::DriverNotLoaded { .. } => Code::DriverNotLoaded,
        PciError::GroupNotViable { .. } => Code::GroupNotViable,
        PciError::InUse { .. } => Code::InUse,
        PciError::TakenElsewhere { .. } | PciError::TakenWith { .. } => Code::Taken,
        PciError::NotForGroups { .. } => Code::NoGroup,
        PciError::State { .. } | PciError::StateMalformed { .. } => Code::StateDirectory,
        PciError::Permission { .. } => Code::NoPermission,
        PciError::NotBound { .. } => Code::BindFailed,
        _ => Code::Sysfs,
    }
}

/// The code of a device that VFIO does not open.
pub fn of_vfio(err: &VfioError) -> Code {
    match err {
        VfioError::NoSuchDevice { .. } => Code::NoSuchDevice,
        VfioError::NoIommu { .. } | VfioError::NoIommuDriver => Code::NoIommu,
        VfioError::NodeMissing { .. } | VfioError::NotBound { .. } => Code::NotBound,
        VfioError::NoCdev { .. } => Code::NoCdev,
        VfioError::NoIommuModeOff { .. } => Code::NoIommuModeOff,
        VfioError::HasIommu { .. } => Code::HasIommu,
        VfioError::Permission { .. } | VfioError::NeedsRawIo { .. } => Code::VfioPermission,
        VfioError::Busy { .. } => Code::DeviceBusy,
        VfioError::NotViable { .. } => Code::GroupNotViable,
        VfioError::UnsafeInterrupts { .. } => Code::NoInterruptRemapping,
        VfioError::LockedMemory { .. } => Code::MemlockTooSmall,
        _ => Code::DeviceOpen,
    }
}

/// The code of a device that UIO does not open.
pub fn of_uio(err: &UioError) -> Code {
    match err {
        UioError::NoSuchDevice { .. } => Code::NoSuchDevice,
        UioError::NotBound { .. } | UioError::NodeMissing { .. } => Code::NotBound,
        UioError::Permission { .. } => Code::UioPermission,
        UioError::Busy { .. } => Code::DeviceBusy,
        _ => Code::DeviceOpen,
    }
}
