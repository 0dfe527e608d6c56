//! Memory that a device can reach.

#![expect(unsafe_code)]
// UNSAFETY: memory becomes reachable for the device, behind the compiler's back.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::MutexGuard;

use iohost_memory::SharedMemory;
use nix::sys::resource::{Resource, getrlimit};
use vfio_ioctls::VfioError as CrateError;

use crate::device::Attachment;
use crate::{VfioDevice, VfioError, cdev};

/// Bytes of the unit of mapping.
const PAGE: u64 = 4096;

impl VfioDevice {
    /// Lets the device read and write a part of `memory`, bytes that begin on a page, from the
    /// address `iova` on; the rest of the last page too. The pages are pinned until
    /// [`unmap_dma`](Self::unmap_dma), even when `memory` is dropped before.
    ///
    /// Panics when the part is not inside the memory.
    ///
    /// Errors: `NoDma` without an IOMMU; `LockedMemory` with the need and the limit when too much would be pinned;
    /// `MapDma` with `EINVAL` for an address that is not on a page or not in the
    /// [`iova_ranges`](Self::iova_ranges), with `EEXIST` for one that is mapped already.
    pub fn map_dma(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), VfioError> {
        let inside = part.start <= part.end && part.end <= memory.len() as u64;
        assert!(inside && part.start.is_multiple_of(PAGE), "{part:x?} of {}", memory.len());
        let len = (part.end - part.start).next_multiple_of(PAGE);
        let address = memory.address().wrapping_add(part.start as usize);
        let mut mapped = self.mapped();
        let done = match &self.attachment {
            Attachment::Type1 { container, .. } => {
                // SAFETY:
                // 1. The part is inside `memory`, which maps every byte of its last page that `len`
                //    may add, as any mapping does.
                // 2. `SharedMemory` never lends a reference to its bytes, so what the device
                //    writes changes nothing that the compiler believes in.
                // 3. The kernel pins the pages: should `memory` be unmapped, the device reaches
                //    the pages of the file, never what is mapped in its place.
                unsafe { container.vfio_dma_map(iova, len as usize, address) }.map_err(system_error)
            }
            Attachment::Iommufd { iommufd, ioas } => {
                // SAFETY: as above.
                unsafe { iommufd.map(*ioas, iova, address, len) }
            }
            Attachment::NoIommu { .. } => return Err(VfioError::NoDma),
        };
        match done {
            Ok(()) => {
                mapped.insert(iova, len);
                Ok(())
            }
            Err(source) => {
                let pinned = mapped.values().sum();
                Err(map_error(iova, len, pinned, locked_memory_limit(), source))
            }
        }
    }

    /// Takes a mapping back, whole: `len` is the length of the part that was mapped at `iova`.
    /// The device reaches none of it afterwards.
    ///
    /// Errors: `NotMapped`; `UnmapDma` with what the kernel says.
    pub fn unmap_dma(&self, iova: u64, len: u64) -> Result<(), VfioError> {
        let mut mapped = self.mapped();
        let whole = len.checked_next_multiple_of(PAGE);
        if whole.is_none() || mapped.get(&iova).copied() != whole {
            return Err(VfioError::NotMapped { iova, len });
        }
        let whole = mapped[&iova];
        let done = match &self.attachment {
            Attachment::Type1 { container, .. } => {
                container.vfio_dma_unmap(iova, whole as usize).map_err(system_error)
            }
            Attachment::Iommufd { iommufd, ioas } => cdev::unmap(iommufd, *ioas, iova, whole),
            Attachment::NoIommu { .. } => unreachable!("nothing is mapped without an IOMMU"),
        };
        done.map_err(|source| VfioError::UnmapDma { iova, len, source })?;
        mapped.remove(&iova);
        Ok(())
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.mapped.lock().expect("no panic happens under this lock")
    }
}

/// What went wrong, in words: the kernel says `ENOMEM` for a limit as for a lack of memory.
fn map_error(iova: u64, len: u64, pinned: u64, limit: u64, source: io::Error) -> VfioError {
    let need = pinned.saturating_add(len);
    match source.raw_os_error() {
        Some(libc::ENOMEM) if need > limit => VfioError::LockedMemory { len, need, have: limit },
        _ => VfioError::MapDma { iova, len, source },
    }
}

/// `RLIMIT_MEMLOCK`, in bytes. What cannot be read limits nothing.
fn locked_memory_limit() -> u64 {
    getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft)
}

fn system_error(err: CrateError) -> io::Error {
    match err {
        CrateError::IommuDmaMap(err) | CrateError::IommuDmaUnmap(err) => err.into(),
        err => io::Error::other(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32, pinned: u64) -> VfioError {
        map_error(0x1000, 0x2000, pinned, 0x4000, io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn a_limit_on_locked_memory_is_told_with_need_and_have() {
        let err = error(libc::ENOMEM, 0x3000);
        assert_eq!(
            err.to_string(),
            "mapping 0x2000 bytes for the device needs 20480 bytes of locked memory, \
             the limit is 16384"
        );
        assert!(err.next_step().contains("ulimit -l 20"), "{}", err.next_step());
    }

    #[test]
    fn a_lack_of_memory_below_the_limit_is_not_blamed_on_the_limit() {
        assert!(matches!(error(libc::ENOMEM, 0), VfioError::MapDma { .. }));
    }

    #[test]
    fn another_refusal_keeps_what_the_kernel_said() {
        let VfioError::MapDma { source, .. } = error(libc::EEXIST, 0x3000) else { panic!() };
        assert_eq!(source.raw_os_error(), Some(libc::EEXIST));
    }
}
