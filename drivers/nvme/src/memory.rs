//! Memory that driver and controller share for as long as the driver runs.

use iohost_driver::prelude::*;
use iohost_driver::{DmaArena, DmaArenaOptions, IOMemoryMap, MappingOptions, MemoryDirection};

/// Bytes of the pages that the controller is told to use, and of the alignment of all memory here.
pub const PAGE: usize = 4096;

/// Whole pages at an address of the controller's, and mapped for us.
pub struct Shared {
    /// For the controller.
    memory: PreparedDma,
    /// For us: the same bytes.
    map: IOMemoryMap,
}

impl Shared {
    /// `sizes.len()` pieces of zeroed memory, each of whole pages, in one mapping of the device.
    pub fn make<const N: usize>(device: &IOPCIDevice, sizes: [usize; N]) -> Result<[Self; N]> {
        let sizes = sizes.map(|size| size.next_multiple_of(PAGE) as u64);
        let length = sizes.iter().sum();
        let options = DmaArenaOptions { length, max_address_bits: 0, huge_pages: false };
        let arena = DmaArena::create(device, options)?;
        let command = IODMACommand::create(device, 0)?;
        let mut pieces = Vec::with_capacity(N);
        for size in sizes {
            let buffer = arena.allocate(MemoryDirection::InOut, size, PAGE as u64)?;
            let map = buffer.memory_descriptor().create_mapping(MappingOptions::default(), 0, 0)?;
            pieces.push(Self { memory: command.prepare_for_dma(buffer)?, map });
        }
        pieces.try_into().map_err(|_| IOReturn::INTERNAL_ERROR.into())
    }

    /// Where the controller finds the first byte.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    #[inline]
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut data = [0; N];
        self.map.read_at(at, &mut data).expect(INSIDE);
        data
    }

    #[inline]
    pub fn write(&self, at: usize, data: &[u8]) {
        self.map.write_at(at, data).expect(INSIDE);
    }

    /// All bytes, copied.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut data = vec![0; self.map.length() as usize];
        self.map.read_at(0, &mut data).expect(INSIDE);
        data
    }

    pub fn clear(&self) {
        for page in (0..self.map.length() as usize).step_by(PAGE) {
            self.write(page, &[0; PAGE]);
        }
    }
}

/// Why an access is inside: all offsets are ours.
const INSIDE: &str = "offsets come from the sizes that the memory was made with";
