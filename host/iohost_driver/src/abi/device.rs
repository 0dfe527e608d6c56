//! PCI devices.

use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;
use std::ptr::NonNull;

use iohost_driver_abi::{DeviceBar, DeviceLocation, DmaPiece, DmaSegment, HostDevice};
use iohost_interface::IOReturn;
use iohost_registers::RegisterWindow;

use super::memory::Memory;
use super::{check, host, owned};

owned! {
    /// A device.
    Device(HostDevice) released by device.release
}

impl Device {
    /// # Safety
    ///
    /// `device` is alive for the call.
    pub(super) unsafe fn borrowed(device: *mut HostDevice) -> Self {
        host!(device.retain(device));
        Self(NonNull::new(device).expect("the host passes a device"))
    }

    pub(crate) fn config_read(&self, offset: u64, width: u32) -> Result<u64, IOReturn> {
        let mut value = 0;
        check(host!(device.config_read(self.0.as_ptr(), offset, width, &raw mut value)))?;
        Ok(value)
    }

    pub(crate) fn config_write(&self, offset: u64, width: u32, value: u64) -> Result<(), IOReturn> {
        check(host!(device.config_write(self.0.as_ptr(), offset, width, value)))
    }

    pub(crate) fn bar_info(&self, bar: u8) -> Result<DeviceBar, IOReturn> {
        let mut info = DeviceBar::default();
        check(host!(device.bar_info(self.0.as_ptr(), u32::from(bar), &raw mut info)))?;
        Ok(info)
    }

    pub(crate) fn open(&self) -> Result<(), IOReturn> {
        check(host!(device.open(self.0.as_ptr())))
    }

    /// No window of the device exists.
    pub(crate) fn close(&self) -> Result<(), IOReturn> {
        check(host!(device.close(self.0.as_ptr())))
    }

    /// Bus, device and function.
    pub(crate) fn location(&self) -> Result<(u32, u32, u32), IOReturn> {
        let mut location = DeviceLocation::default();
        check(host!(device.location(self.0.as_ptr(), &raw mut location)))?;
        Ok((location.bus, location.device, location.function))
    }

    /// Option 1: for as long as the device is open.
    pub(crate) fn save_state(&self, options: u32) -> Result<(), IOReturn> {
        check(host!(device.save_state(self.0.as_ptr(), options)))
    }

    pub(crate) fn restore_state(&self, options: u32) -> Result<(), IOReturn> {
        check(host!(device.restore_state(self.0.as_ptr(), options)))
    }

    /// A view of `len` bytes of a BAR from `offset`, a multiple of 8. The device must be in use
    /// for as long as the window lives.
    pub(crate) fn bar_map(
        &self,
        bar: u8,
        offset: u64,
        len: u64,
    ) -> Result<RegisterWindow, IOReturn> {
        if !offset.is_multiple_of(8) {
            return Err(IOReturn::NOT_ALIGNED);
        }
        let (bar, mut address) = (u32::from(bar), ptr::null_mut());
        check(host!(device.bar_map(self.0.as_ptr(), bar, offset, len, &raw mut address)))?;
        let address = NonNull::new(address).ok_or(IOReturn::INTERNAL_ERROR)?;
        // SAFETY: contract of `bar_map`: a page's address and `offset`, so aligned; `len` bytes;
        // mapped until the device is closed or its last reference goes, and who has the window
        // has an `InUse` beside it, with which there is neither. Nobody refers to device memory by
        // reference.
        Ok(unsafe { RegisterWindow::from_raw(address, len as usize) })
    }

    pub(crate) fn bar_read(&self, bar: u8, offset: u64, width: u32) -> Result<u64, IOReturn> {
        let (bar, mut value) = (u32::from(bar), 0);
        check(host!(device.bar_read(self.0.as_ptr(), bar, offset, width, &raw mut value)))?;
        Ok(value)
    }

    pub(crate) fn bar_write(
        &self,
        bar: u8,
        offset: u64,
        width: u32,
        value: u64,
    ) -> Result<(), IOReturn> {
        check(host!(device.bar_write(self.0.as_ptr(), u32::from(bar), offset, width, value)))
    }

    pub(crate) fn configure_interrupts(
        &self,
        kind: u32,
        required: u32,
        requested: u32,
    ) -> Result<(), IOReturn> {
        check(host!(device.configure_interrupts(self.0.as_ptr(), kind, required, requested)))
    }

    pub(crate) fn interrupt_type(&self, index: u32) -> Result<u64, IOReturn> {
        let mut kind = 0;
        check(host!(device.interrupt_type(self.0.as_ptr(), index, &raw mut kind)))?;
        Ok(kind)
    }

    pub(crate) fn reset(&self) -> Result<(), IOReturn> {
        check(host!(device.reset(self.0.as_ptr())))
    }

    pub(crate) fn reset_by(&self, kind: u32) -> Result<(), IOReturn> {
        check(host!(device.reset_by(self.0.as_ptr(), kind, 0)))
    }

    pub(crate) fn resize_interrupts(&self, count: u32) -> Result<(), IOReturn> {
        check(host!(device.resize_interrupts(self.0.as_ptr(), count)))
    }

    pub(crate) fn dropped_interrupts(&self) -> u64 {
        host!(device.dropped_interrupts(self.0.as_ptr()))
    }

    /// An eventfd that the device's events add to.
    pub(crate) fn event_signal(&self) -> Result<OwnedFd, IOReturn> {
        let mut fd = -1;
        check(host!(device.event_signal(self.0.as_ptr(), &raw mut fd)))?;
        // SAFETY: contract of `event_signal`: on success an open descriptor that is ours.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Pieces: memory, first byte, bytes.
    pub(crate) fn dma_prepare(
        &self,
        pieces: &[(&Memory, u64, u64)],
        bits: u32,
        alignment: u64,
    ) -> Result<Vec<DmaSegment>, IOReturn> {
        let piece = |&(memory, offset, len): &(&Memory, u64, u64)| DmaPiece {
            memory: memory.0.as_ptr(),
            offset,
            len,
        };
        let pieces: Vec<_> = pieces.iter().map(piece).collect();
        let mut segments = vec![DmaSegment::default(); pieces.len()];
        let mut count = 0;
        check(host!(device.dma_prepare(
            self.0.as_ptr(),
            pieces.as_ptr(),
            pieces.len(),
            bits,
            alignment,
            segments.as_mut_ptr(),
            &raw mut count,
        )))?;
        segments.truncate(count);
        if segments.is_empty() { Err(IOReturn::INTERNAL_ERROR) } else { Ok(segments) }
    }

    pub(crate) fn dma_complete(&self, address: u64) -> Result<(), IOReturn> {
        check(host!(device.dma_complete(self.0.as_ptr(), address)))
    }
}

impl Clone for Device {
    fn clone(&self) -> Self {
        host!(device.retain(self.0.as_ptr()));
        Self(self.0)
    }
}
