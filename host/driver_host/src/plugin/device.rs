//! The table of PCI devices; the functions for memory are in `memory.rs`.

use std::os::fd::IntoRawFd;

use iohost_device_backend::{InterruptKind, ResetLevel};
use iohost_driver_abi::{DeviceBar, DeviceLocation, DeviceTable, HostDevice};
use iohost_interface::IOReturn;

use super::memory::{dma_complete, dma_prepare, memory_attach, memory_create, memory_release};
use super::object::{object, released, shared, written};
use crate::Device;
use crate::device::refused;

pub(super) static DEVICE_TABLE: DeviceTable = DeviceTable {
    size: size_of::<DeviceTable>() as u32,
    retain: device_retain,
    release: device_release,
    config_read,
    config_write,
    bar_info,
    bar_map,
    bar_read,
    bar_write,
    configure_interrupts,
    interrupt_type,
    reset: device_reset,
    memory_create,
    memory_release,
    dma_prepare,
    dma_complete,
    reset_by,
    resize_interrupts,
    dropped_interrupts,
    event_signal,
    open: device_open,
    close: device_close,
    location,
    save_state,
    restore_state,
    memory_attach,
};

unsafe extern "C" fn device_retain(device: *mut HostDevice) {
    // SAFETY: contract 2.
    std::mem::forget(unsafe { shared::<Device>(device) });
}

unsafe extern "C" fn device_release(device: *mut HostDevice) {
    // SAFETY: contract 2.
    unsafe { released::<Device>(device) }
}

/// The part of an 8-byte buffer that an access of `width` bytes uses; `BAD_ARGUMENT` for a width
/// that no bus has.
pub(super) fn part(buffer: &mut [u8; 8], width: u32) -> Result<&mut [u8], IOReturn> {
    match width {
        1 | 2 | 4 | 8 => Ok(&mut buffer[..width as usize]),
        _ => Err(IOReturn::BAD_ARGUMENT),
    }
}

/// One read of up to 8 bytes, little-endian as PCI is.
pub(super) fn read(
    width: u32,
    access: impl FnOnce(&mut [u8]) -> Result<(), IOReturn>,
) -> Result<u64, IOReturn> {
    let mut buffer = [0; 8];
    access(part(&mut buffer, width)?)?;
    Ok(u64::from_le_bytes(buffer))
}

/// One write of up to 8 bytes.
fn write(
    width: u32,
    value: u64,
    access: impl FnOnce(&[u8]) -> Result<(), IOReturn>,
) -> Result<(), IOReturn> {
    access(part(&mut value.to_le_bytes(), width)?)
}

/// A configuration space offset; beyond the largest one there is nothing.
fn config_offset(offset: u64) -> Result<u16, IOReturn> {
    u16::try_from(offset).map_err(|_| IOReturn::OVERRUN)
}

/// A BAR's number: 0 to 6.
fn bar_number(bar: u32) -> Result<u8, IOReturn> {
    u8::try_from(bar).ok().filter(|bar| *bar <= 6).ok_or(IOReturn::BAD_ARGUMENT)
}

unsafe extern "C" fn config_read(
    device: *mut HostDevice,
    offset: u64,
    width: u32,
    value: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let read = device.opened().and_then(|_| {
        let offset = config_offset(offset)?;
        read(width, |data| device.config_read(offset, data).map_err(|err| refused(&err)))
    });
    // SAFETY: contract 4.
    unsafe { written(value, read) }
}

unsafe extern "C" fn config_write(
    device: *mut HostDevice,
    offset: u64,
    width: u32,
    value: u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    IOReturn::code(&device.opened().and_then(|_| {
        let offset = config_offset(offset)?;
        write(width, value, |data| device.config_write(offset, data).map_err(|err| refused(&err)))
    }))
}

unsafe extern "C" fn bar_info(device: *mut HostDevice, bar: u32, info: *mut DeviceBar) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.opened();
    let found = backend.and_then(|backend| {
        let found = backend.bar(bar_number(bar)?).ok_or(IOReturn::NOT_FOUND)?;
        Ok(DeviceBar { size: found.size, kind: u32::from(found.kind), reserved: 0 })
    });
    // SAFETY: contract 4.
    unsafe { written(info, found) }
}

unsafe extern "C" fn bar_map(
    device: *mut HostDevice,
    bar: u32,
    offset: u64,
    len: u64,
    address: *mut *mut u8,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let mapped = bar_number(bar).and_then(|bar| device.map_bar(bar, offset, len));
    // SAFETY: contract 4.
    unsafe { written(address, mapped) }
}

unsafe extern "C" fn bar_read(
    device: *mut HostDevice,
    bar: u32,
    offset: u64,
    width: u32,
    value: *mut u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let read = device.opened().and_then(|_| {
        let bar = bar_number(bar)?;
        read(width, |data| device.bar_read(bar, offset, data).map_err(|err| refused(&err)))
    });
    // SAFETY: contract 4.
    unsafe { written(value, read) }
}

unsafe extern "C" fn bar_write(
    device: *mut HostDevice,
    bar: u32,
    offset: u64,
    width: u32,
    value: u64,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    IOReturn::code(&device.opened().and_then(|_| {
        let bar = bar_number(bar)?;
        write(width, value, |data| device.bar_write(bar, offset, data).map_err(|err| refused(&err)))
    }))
}

unsafe extern "C" fn configure_interrupts(
    device: *mut HostDevice,
    kind: u32,
    required: u32,
    requested: u32,
) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let kind = match kind {
        1 => Ok(InterruptKind::IntX),
        0x1_0000 => Ok(InterruptKind::Msi),
        0x2_0000 => Ok(InterruptKind::MsiX),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    let chosen = device.opened().and(kind);
    let chosen = chosen.and_then(|kind| device.configure_interrupts(kind, required, requested));
    IOReturn::code(&chosen)
}

unsafe extern "C" fn interrupt_type(device: *mut HostDevice, index: u32, kind: *mut u64) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let found = device.opened().and_then(|_| device.interrupt_kind(index)).map(|kind| match kind {
        InterruptKind::IntX => 1,
        InterruptKind::Msi => 0x1_0000,
        InterruptKind::MsiX => 0x3_0000,
    });
    // SAFETY: contract 4.
    unsafe { written(kind, found) }
}

unsafe extern "C" fn device_reset(device: *mut HostDevice) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    IOReturn::code(&device.opened().and_then(|_| device.reset(None)))
}

unsafe extern "C" fn reset_by(device: *mut HostDevice, kind: u32, options: u32) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    // `kIOPCIDeviceResetTypeHotReset` and `kIOPCIDeviceResetTypeFunctionReset`.
    let level = match (kind, options) {
        (0x01, 0) => Ok(ResetLevel::Bus),
        (0x10, 0) => Ok(ResetLevel::Function),
        _ => Err(IOReturn::BAD_ARGUMENT),
    };
    IOReturn::code(&level.and_then(|level| device.opened().and_then(|_| device.reset(Some(level)))))
}

unsafe extern "C" fn resize_interrupts(device: *mut HostDevice, count: u32) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    IOReturn::code(&device.opened().and_then(|_| device.resize_interrupts(count)))
}

unsafe extern "C" fn dropped_interrupts(device: *mut HostDevice) -> u64 {
    // SAFETY: contract 2.
    unsafe { object::<Device>(device) }.dropped_interrupts()
}

unsafe extern "C" fn event_signal(device: *mut HostDevice, fd: *mut i32) -> i32 {
    // SAFETY: contract 2.
    let device = unsafe { object::<Device>(device) };
    let made = device.events().for_driver().map_err(|_| IOReturn::NO_RESOURCES);
    // SAFETY: contract 4.
    unsafe { written(fd, made.map(IntoRawFd::into_raw_fd)) }
}

unsafe extern "C" fn device_open(device: *mut HostDevice) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.open())
}

unsafe extern "C" fn device_close(device: *mut HostDevice) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.close())
}

unsafe extern "C" fn location(device: *mut HostDevice, location: *mut DeviceLocation) -> i32 {
    // SAFETY: contract 2.
    let backend = unsafe { object::<Device>(device) }.opened();
    let found = backend.and_then(|backend| backend.location().ok_or(IOReturn::NOT_FOUND));
    let found = found.map(|address| DeviceLocation {
        bus: address.bus.into(),
        device: address.device.into(),
        function: address.function.into(),
    });
    // SAFETY: contract 4.
    unsafe { written(location, found) }
}

unsafe extern "C" fn save_state(device: *mut HostDevice, options: u32) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.save_state(options))
}

unsafe extern "C" fn restore_state(device: *mut HostDevice, options: u32) -> i32 {
    // SAFETY: contract 2.
    IOReturn::code(&unsafe { object::<Device>(device) }.restore_state(options))
}
