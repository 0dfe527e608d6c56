//! PCI devices and DMA.

use crate::{HostDevice, HostMemory};

/// PCI devices and DMA: the table `iohost.device.1`.
#[repr(C)]
#[derive(Debug)]
pub struct DeviceTable {
    /// Bytes of this table.
    pub size: u32,
    /// One reference more.
    pub retain: unsafe extern "C" fn(device: *mut HostDevice),
    /// One reference less.
    pub release: unsafe extern "C" fn(device: *mut HostDevice),
    /// Reads 1, 2 or 4 bytes of configuration space.
    pub config_read: unsafe extern "C" fn(
        device: *mut HostDevice,
        offset: u64,
        width: u32,
        value: *mut u64,
    ) -> i32,
    /// Writes 1, 2 or 4 bytes of configuration space.
    pub config_write:
        unsafe extern "C" fn(device: *mut HostDevice, offset: u64, width: u32, value: u64) -> i32,
    /// Size and kind of a BAR.
    pub bar_info:
        unsafe extern "C" fn(device: *mut HostDevice, bar: u32, info: *mut DeviceBar) -> i32,
    /// Maps `len` bytes of a BAR from `offset`, until the device is closed or its last reference
    /// goes. The address is that of a page and the rest of `offset` in it. `UNSUPPORTED` when the
    /// bytes can only be reached by calls.
    pub bar_map: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        len: u64,
        address: *mut *mut u8,
    ) -> i32,
    /// Reads 1, 2, 4 or 8 bytes of a BAR as one access.
    pub bar_read: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        width: u32,
        value: *mut u64,
    ) -> i32,
    /// Writes 1, 2, 4 or 8 bytes of a BAR as one access.
    pub bar_write: unsafe extern "C" fn(
        device: *mut HostDevice,
        bar: u32,
        offset: u64,
        width: u32,
        value: u64,
    ) -> i32,
    /// Chooses the kind of interrupt: 1 level, 0x10000 MSI, 0x20000 MSI-X.
    pub configure_interrupts: unsafe extern "C" fn(
        device: *mut HostDevice,
        kind: u32,
        required: u32,
        requested: u32,
    ) -> i32,
    /// The kind of one interrupt: bit 0 level, 0x10000 MSI, 0x30000 MSI-X.
    pub interrupt_type:
        unsafe extern "C" fn(device: *mut HostDevice, index: u32, kind: *mut u64) -> i32,
    /// Resets the device.
    pub reset: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Makes zeroed memory that a device can be given; option 1: of huge pages. `fd` is the memory
    /// file, which the plugin then owns and maps.
    pub memory_create: unsafe extern "C" fn(
        len: u64,
        options: u32,
        memory: *mut *mut HostMemory,
        fd: *mut i32,
    ) -> i32,
    /// Gives the reference back. Memory that is still prepared stays until it is completed.
    pub memory_release: unsafe extern "C" fn(memory: *mut HostMemory),
    /// Lets the device reach pieces of memory, below `2^address_bits` (0: any), each segment's
    /// address a multiple of `alignment`, a power of two. There is room for as many segments as
    /// there are pieces; `segment_count` is how many were written, at least 1.
    pub dma_prepare: unsafe extern "C" fn(
        device: *mut HostDevice,
        pieces: *const DmaPiece,
        piece_count: usize,
        address_bits: u32,
        alignment: u64,
        segments: *mut DmaSegment,
        segment_count: *mut usize,
    ) -> i32,
    /// Takes back from the device what it was given with the first segment at `address`.
    pub dma_complete: unsafe extern "C" fn(device: *mut HostDevice, address: u64) -> i32,
    /// Resets the device in one way: 0x01 everything on its bus, 0x10 the function alone. `options`
    /// is 0. `BAD_ARGUMENT` for anything else.
    pub reset_by: unsafe extern "C" fn(device: *mut HostDevice, kind: u32, options: u32) -> i32,
    /// Enables the first `count` vectors of the kind that was chosen, and disables the others.
    pub resize_interrupts: unsafe extern "C" fn(device: *mut HostDevice, count: u32) -> i32,
    /// How many interrupts came to nobody so far.
    pub dropped_interrupts: unsafe extern "C" fn(device: *mut HostDevice) -> u64,
    /// Makes an eventfd that the device's events add to, which the plugin then owns: 1 for each
    /// error, 2^16 for each request to give the device back, 2^32 when it is gone.
    pub event_signal: unsafe extern "C" fn(device: *mut HostDevice, fd: *mut i32) -> i32,
    /// Opens a device that was closed; a driver starts with one that is open. All functions but
    /// `retain`, `release` and this one say `NOT_OPEN` of one that is closed.
    pub open: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Closes the device: interrupts are off, it reaches no memory and answers to nobody. The
    /// plugin uses nothing any more that was mapped of it.
    pub close: unsafe extern "C" fn(device: *mut HostDevice) -> i32,
    /// Where the device is. `NOT_FOUND` for one that is on no bus.
    pub location:
        unsafe extern "C" fn(device: *mut HostDevice, location: *mut DeviceLocation) -> i32,
    /// Keeps what configuration space says, in place of what was kept; option 1: apart from that,
    /// until the device is closed.
    pub save_state: unsafe extern "C" fn(device: *mut HostDevice, options: u32) -> i32,
    /// Writes back what was kept, with the same options, and checks that it is there. `NOT_READY`
    /// when nothing was kept.
    pub restore_state: unsafe extern "C" fn(device: *mut HostDevice, options: u32) -> i32,
    /// Makes memory that a device can be given of a sealed file of `len` bytes, which stays the
    /// plugin's; option 1: for reading only.
    pub memory_attach:
        unsafe extern "C" fn(fd: i32, len: u64, options: u32, memory: *mut *mut HostMemory) -> i32,
}

/// Where a device is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceLocation {
    /// The bus, 0 to 255.
    pub bus: u32,
    /// The device, 0 to 31.
    pub device: u32,
    /// The function, 0 to 7.
    pub function: u32,
}

/// Bytes of memory that a device is to reach.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DmaPiece {
    /// The memory.
    pub memory: *mut HostMemory,
    /// The first byte.
    pub offset: u64,
    /// How many; not 0.
    pub len: u64,
}

/// Where a device finds memory, in order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaSegment {
    /// The address of the first byte, as the device sees it.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// The name of [`DeviceTable`].
pub const DEVICE: &std::ffi::CStr = c"iohost.device.1";

/// A BAR, as `bar_info` reports it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceBar {
    /// Bytes.
    pub size: u64,
    /// The type bits of the register.
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}
