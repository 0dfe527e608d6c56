//! Why a driver host cannot do its work, in words for the daemon and its people.

use std::error::Error;
use std::path::Path;

use iohost_control::host::{DeviceLocation, Failure};
use iohost_device_backend::{DeviceError, UioError, VfioError};
use iohost_doctor::{Code, refusal};
use iohost_interface::{IOReturn, with_sources};
use iohost_pci::{PciError, Sysfs};

use crate::StartError;

pub(crate) fn vfio_failure(address: &str, err: &VfioError) -> Failure {
    let (reason, next) = match (err, blockers(address)) {
        // VFIO only says that there are some.
        (VfioError::NotViable { .. }, Some(blockers)) => {
            (blockers.to_string(), blockers.next_step())
        }
        _ => (with_sources(err), err.next_step()),
    };
    let message = format!("{address} cannot be opened: {reason}");
    Failure::new(refusal::of_vfio(err).name(), message, next)
}

pub(crate) fn uio_failure(address: &str, err: &UioError) -> Failure {
    let message = format!("{address} cannot be opened: {}", with_sources(err));
    Failure::new(refusal::of_uio(err).name(), message, err.next_step())
}

/// Of the vfio-user server at a socket.
pub(crate) fn server_failure(socket: &str, err: &dyn Error) -> Failure {
    let message = format!("{socket} cannot be used: {}", with_sources(err));
    let next = "start the device's vfio-user server, or correct `socket` in the configuration";
    Failure::new("device-server", message, next)
}

/// The members that keep VFIO from using the device's group, where sysfs shows some.
fn blockers(address: &str) -> Option<PciError> {
    let group = Sysfs::default().group_of(address.parse().ok()?).ok()?;
    let blockers = group.blockers();
    (!blockers.is_empty()).then_some(PciError::GroupNotViable { group: group.number, blockers })
}

/// Of a plugin that the dynamic linker does not take.
pub(crate) fn load_failure(path: &Path, err: &dyn Error) -> Failure {
    let message = format!("{} cannot be loaded: {}", path.display(), with_sources(err));
    let next = "run `ldd` on it: a library it needs may be missing, or outside of the system's \
                folders for libraries";
    Failure::new("plugin-load", message, next)
}

/// Why a driver did not start. `refusal` is the mapping that it did not get, if there was one.
pub(crate) fn start_failure(err: &StartError, refusal: Option<DeviceError>) -> Failure {
    match refusal {
        // A driver gets no more than the status, and cannot say more than that.
        Some(refusal @ DeviceError::LockedMemory { need, .. })
            if err.status == IOReturn::CANNOT_LOCK =>
        {
            Failure::new(
                Code::MemlockTooSmall.name(),
                format!("the driver did not start: {refusal}"),
                format!(
                    "raise the daemon's limit to at least {need} bytes: LimitMEMLOCK= of its \
                     service, or ulimit -l {}",
                    need.div_ceil(1024)
                ),
            )
        }
        Some(refusal @ DeviceError::NoDma { .. }) if err.status == IOReturn::UNSUPPORTED => {
            Failure::new(
                Code::BackendLacksDma.name(),
                format!("the driver needs DMA: {refusal}"),
                "reach the device through VFIO and an IOMMU: leave `backend` out of its configuration",
            )
        }
        _ => Failure::new(
            "driver-start",
            format!("the driver did not start: {err}"),
            "see the driver's own log lines; the device may be another one than it expects",
        ),
    }
}

pub(crate) fn device_failure(location: &DeviceLocation, err: &DeviceError) -> Failure {
    let (DeviceLocation::Pci { address: name, .. } | DeviceLocation::VfioUser { socket: name }) =
        location;
    let (code, next) = match err {
        DeviceError::Quarantined(_) => (
            "device-quarantined",
            format!("power-cycle the device, then start it again: iohost bind {name}"),
        ),
        _ => (
            "device-broken",
            "the device does not answer as a PCI function should; power-cycle it".to_owned(),
        ),
    };
    let message = format!("{name} cannot be used: {}", with_sources(err));
    Failure::new(code, message, next)
}

pub(crate) fn internal(message: String) -> Failure {
    let next = "this is no fault of the device or the driver; check the limits of the process";
    Failure::new("driver-host", message, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(status: IOReturn, refusal: Option<DeviceError>) -> Failure {
        start_failure(&StartError { status, message: None }, refusal)
    }

    fn too_little() -> Option<DeviceError> {
        Some(DeviceError::LockedMemory { len: 0x1000, need: 0x3000, have: 0x2800 })
    }

    #[test]
    fn a_start_that_failed_for_want_of_locked_memory_tells_need_and_have() {
        let failure = failure(IOReturn::CANNOT_LOCK, too_little());
        assert_eq!(failure.code, "memlock-too-small");
        assert!(failure.message.contains("needs 12288 bytes"), "{}", failure.message);
        assert!(failure.message.ends_with("the limit is 10240"), "{}", failure.message);
        assert!(failure.next.contains("ulimit -l 12"), "{}", failure.next);
    }

    #[test]
    fn a_driver_that_needs_dma_where_there_is_none_is_told_so() {
        let refusal = Some(DeviceError::NoDma { backend: "uio" });
        let failure = failure(IOReturn::UNSUPPORTED, refusal);
        assert_eq!(failure.code, "backend-lacks-dma");
        assert!(failure.message.contains("uio has no DMA"), "{}", failure.message);
    }

    #[test]
    fn a_start_that_failed_for_another_reason_is_not_blamed_on_the_limit() {
        for (status, refusal) in
            [(IOReturn::CANNOT_LOCK, None), (IOReturn::UNSUPPORTED, too_little())]
        {
            assert_eq!(failure(status, refusal).code, "driver-start");
        }
    }
}
