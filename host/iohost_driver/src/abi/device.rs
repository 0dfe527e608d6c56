//! PCI devices.

use std::ptr;
use std::ptr::NonNull;

use iohost_driver_abi::{DeviceBar, HostDevice};
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

    /// A view of the first `len` bytes of a BAR. The device must outlive the window.
    pub(crate) fn bar_map(&self, bar: u8, len: u64) -> Result<RegisterWindow, IOReturn> {
        let mut address = ptr::null_mut();
        check(host!(device.bar_map(self.0.as_ptr(), u32::from(bar), len, &raw mut address)))?;
        let address = NonNull::new(address).ok_or(IOReturn::INTERNAL_ERROR)?;
        // SAFETY: contract of `bar_map`: page-aligned, `len` bytes, mapped until the device's
        // last reference goes; `Bar` keeps a reference beside the window. Nobody refers to
        // device memory by reference.
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

    pub(crate) fn dma_prepare(&self, memory: &Memory, bits: u32) -> Result<u64, IOReturn> {
        let mut address = 0;
        let memory = memory.0.as_ptr();
        check(host!(device.dma_prepare(self.0.as_ptr(), memory, bits, &raw mut address)))?;
        Ok(address)
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
