//! Memory that a device has for good, and buffers in it.

use std::fmt;
use std::sync::{Arc, Mutex};

use iohost_interface::IOReturn;
use iohost_memory::HUGE_PAGE;
use iohost_memory::iova::{IovaError, IovaSpace, PAGE};

use super::{Backing, IOBufferMemoryDescriptor, IOMemoryDescriptor, MemoryDirection, Source};
use crate::pci::InUse;
use crate::{Error, IOPCIDevice, Result};

/// Memory that is mapped for a device once, for as long as the arena or a buffer in it lives.
///
/// Preparing a buffer of the arena for this device and completing it maps and unmaps nothing: no
/// system call, a few nanoseconds. The price: the device can reach all of the arena all the time.
/// Memory that is taken from the device by `complete_dma` is a buffer of its own,
/// [`IOBufferMemoryDescriptor::create`].
///
/// A value of this type is a handle; clones are the same arena. Callable from any thread.
#[derive(Clone)]
pub struct DmaArena {
    arena: Arc<Arena>,
}

/// What an arena is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaArenaOptions {
    /// Bytes; rounded up to whole pages.
    pub length: u64,
    /// Address lines of the device: the arena lies below `2^max_address_bits`; 0 for no limit.
    pub max_address_bits: u32,
    /// Of pages of 2 MiB, which the machine has to have set aside (`vm.nr_hugepages`), and at an
    /// address that is a multiple of 2 MiB: an IOMMU needs fewer entries for them.
    pub huge_pages: bool,
}

struct Arena {
    device: InUse,
    backing: Backing,
    /// Where the device finds it.
    address: u64,
    /// Addresses, from `address` on, that no buffer has.
    space: Mutex<IovaSpace>,
}

/// Why the lock is never poisoned.
const NO_PANIC: &str = "nothing panics under the lock of an arena";

impl DmaArena {
    /// Makes the memory and maps it for the device.
    ///
    /// Errors: as [`IODMACommand::create`](crate::IODMACommand::create) for the address bits, and
    /// as its `prepare_for_dma`; `NO_MEMORY` for a length of zero, or when there is none.
    pub fn create(device: &IOPCIDevice, options: DmaArenaOptions) -> Result<Self> {
        let bits = crate::dma::check_address_bits(options.max_address_bits)?;
        let page = if options.huge_pages { HUGE_PAGE as u64 } else { PAGE };
        let length = options.length.checked_next_multiple_of(page).ok_or(IOReturn::NO_MEMORY)?;
        let backing = Backing::create(length, page, options.huge_pages).map_err(
            |err| match options.huge_pages {
                true => Error::new(
                    err.code(),
                    format!(
                        "no {} huge pages are free: set more aside with `sysctl vm.nr_hugepages=N`",
                        length / page
                    ),
                ),
                false => err,
            },
        )?;
        let in_use = device.in_use()?;
        let whole = [(&backing.handle, 0, length)];
        let segments = device.raw().dma_prepare(&whole, bits, page)?;
        let address = segments[0].address;
        let space = Mutex::new(IovaSpace::new(&[address..=address + (length - 1)]));
        let arena = Arena { device: in_use, backing, address, space };
        Ok(Self { arena: Arc::new(arena) })
    }

    /// Bytes of the arena.
    pub fn length(&self) -> u64 {
        self.arena.length()
    }

    /// Takes `capacity` bytes of it, zeroed, that the device finds at a multiple of `alignment`,
    /// and of a page. They are free again when nothing refers to the buffer any more.
    ///
    /// Errors: `NO_MEMORY` for a capacity of zero, or more than is free in one place;
    /// `BAD_ARGUMENT` for an alignment that is no power of two.
    pub fn allocate(
        &self,
        direction: MemoryDirection,
        capacity: u64,
        alignment: u64,
    ) -> Result<IOBufferMemoryDescriptor> {
        let mut space = self.arena.space.lock().expect(NO_PANIC);
        let allocated = space.allocate(capacity, 64, alignment);
        drop(space);
        let address = allocated.map_err(|err| {
            let code = match err {
                IovaError::Request { len: 1.., .. } => IOReturn::BAD_ARGUMENT,
                _ => IOReturn::NO_MEMORY,
            };
            let length = self.length();
            Error::new(code, format!("in an arena of {length} bytes: {err}"))
        })?;
        // From here on it is given back on every way out.
        let place = Place { arena: self.arena.clone(), address };
        let first = address - self.arena.address;
        let pages = first..first + capacity.next_multiple_of(PAGE);
        for page in pages.step_by(PAGE as usize) {
            place.backing().view.write_at(page as usize, &[0; PAGE as usize]);
        }
        let bytes = first..first + capacity;
        let memory = IOMemoryDescriptor::of(direction, Source::Arena(place), bytes);
        Ok(IOBufferMemoryDescriptor::of(memory))
    }
}

impl Arena {
    fn length(&self) -> u64 {
        self.backing.view.len() as u64
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // The host keeps the memory that it could not take back from the device, and says so.
        let _ = self.device.raw().dma_complete(self.address);
    }
}

/// Part of an arena, which is free again when this is dropped.
pub(crate) struct Place {
    arena: Arc<Arena>,
    address: u64,
}

impl Place {
    pub(crate) fn backing(&self) -> &Backing {
        &self.arena.backing
    }

    /// Where a device finds the byte at `offset` of the arena, if it has the arena.
    pub(crate) fn address_for(&self, device: &IOPCIDevice, offset: u64) -> Option<u64> {
        self.arena.device.is(device).then(|| self.arena.address + offset)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut space = self.arena.space.lock().expect(NO_PANIC);
        let _ = space.free(self.address).expect("allocated by `allocate`, and freed once");
    }
}

impl fmt::Debug for DmaArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Arena { address, .. } = *self.arena;
        write!(f, "DmaArena({address:#x}, {} bytes)", self.length())
    }
}
