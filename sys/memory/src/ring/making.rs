//! Making the memory of a queue, or taking it from another process.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::cells::Cells;
use super::layout::{ALIGNMENT, MAX_QUEUE_BYTE_COUNT, MEMORY_HEADER_SIZE};
use super::{HangUp, Ring};
use crate::{AttachError, SharedMemory};

impl Ring {
    /// Makes an empty queue in new memory. `name` shows in `/proc/*/maps`.
    ///
    /// Errors: `Empty`, `Unaligned`, `TooLarge` for a count that no queue can have; `Create` if the
    /// kernel refuses.
    pub fn create(name: &CStr, queue_byte_count: u64) -> Result<Self, RingError> {
        let capacity = check_queue_byte_count(queue_byte_count)?;
        let memory = SharedMemory::create(name, memory_size(capacity))
            .map_err(|source| RingError::Create { queue_byte_count: capacity, source })?;
        Self::over(Arc::new(memory), queue_byte_count)
    }

    /// Maps the memory of a queue that another process made. The count comes from whoever sent the
    /// descriptor; the memory itself does not say.
    ///
    /// Errors: as `create`, and `Attach` for a descriptor that is no sealed memory file of that
    /// size.
    pub fn attach(memory: OwnedFd, queue_byte_count: u64) -> Result<Self, RingError> {
        let capacity = check_queue_byte_count(queue_byte_count)?;
        let memory = SharedMemory::attach(memory, memory_size(capacity))
            .map_err(|source| RingError::Attach { queue_byte_count: capacity, source })?;
        Self::over(Arc::new(memory), queue_byte_count)
    }

    /// Takes memory that is mapped already, with whatever it contains.
    ///
    /// Errors: as `create`, and `WrongLength`.
    pub fn over(memory: Arc<SharedMemory>, queue_byte_count: u64) -> Result<Self, RingError> {
        let capacity = check_queue_byte_count(queue_byte_count)?;
        let expected = memory_size(capacity);
        if memory.len() != expected {
            let (queue_byte_count, actual) = (capacity, memory.len());
            return Err(RingError::WrongLength { queue_byte_count, expected, actual });
        }
        let cells = Cells::new(memory, capacity);
        Ok(Self { cells, capacity, hang_up: HangUp::default() })
    }

    /// The memory, to hand its descriptor to the other side.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        self.cells.memory()
    }
}

/// The number of bytes of the ring, if a ring can have so many.
fn check_queue_byte_count(queue_byte_count: u64) -> Result<u32, RingError> {
    if queue_byte_count == 0 {
        return Err(RingError::Empty);
    }
    if !queue_byte_count.is_multiple_of(u64::from(ALIGNMENT)) {
        return Err(RingError::Unaligned { queue_byte_count });
    }
    match u32::try_from(queue_byte_count) {
        Ok(count) if count <= MAX_QUEUE_BYTE_COUNT => Ok(count),
        _ => Err(RingError::TooLarge { queue_byte_count }),
    }
}

/// Bytes of memory for a ring of `capacity` bytes.
const fn memory_size(capacity: u32) -> usize {
    MEMORY_HEADER_SIZE + capacity as usize
}

/// Why a queue cannot be made, or not over this memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// A ring of no bytes would refuse every entry.
    #[error("queue byte count is 0")]
    Empty,
    /// Entries are aligned, and so is the end of the ring.
    #[error("queue byte count {queue_byte_count} is not a multiple of {ALIGNMENT}")]
    Unaligned {
        /// Bytes asked for.
        queue_byte_count: u64,
    },
    /// Offsets are 32 bits wide.
    #[error("queue byte count {queue_byte_count} is more than {MAX_QUEUE_BYTE_COUNT}")]
    TooLarge {
        /// Bytes asked for.
        queue_byte_count: u64,
    },
    /// The memory is not the ring and its header.
    #[error("queue of {queue_byte_count} bytes takes {expected} bytes of memory, not {actual}")]
    WrongLength {
        /// Bytes of ring announced.
        queue_byte_count: u32,
        /// Bytes of memory that this takes.
        expected: usize,
        /// Bytes of memory there are.
        actual: usize,
    },
    /// The descriptor is not usable as the memory of this queue.
    #[error("attaching to the memory of a queue of {queue_byte_count} bytes")]
    Attach {
        /// Bytes of ring announced.
        queue_byte_count: u32,
        /// What is wrong with the descriptor.
        source: AttachError,
    },
    /// The kernel has no memory for it.
    #[error("making the memory of a queue of {queue_byte_count} bytes")]
    Create {
        /// Bytes of ring asked for.
        queue_byte_count: u32,
        /// What the kernel said.
        source: io::Error,
    },
}
