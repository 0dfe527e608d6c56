//! Interrupts as eventfds.

use std::fmt;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::MutexGuard;

use vfio_bindings::bindings::vfio as uapi;

use crate::ioctl::{DeviceCall, DeviceFile, Message};
use crate::{VfioDevice, VfioError};

/// The three ways in which a PCI function can interrupt. The numbers are VFIO's indexes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// The line, which VFIO masks at each interrupt.
    IntX = uapi::VFIO_PCI_INTX_IRQ_INDEX as isize,
    /// Message signalled.
    Msi = uapi::VFIO_PCI_MSI_IRQ_INDEX as isize,
    /// Message signalled with a table of vectors.
    MsiX = uapi::VFIO_PCI_MSIX_IRQ_INDEX as isize,
}

impl VfioDevice {
    /// How many vectors of this kind the device has; 0 where it has none.
    pub fn vectors(&self, kind: Interrupt) -> u32 {
        self.vectors[kind as usize]
    }

    /// Lets vector *n* signal `triggers[n]`, an eventfd. Whatever was enabled is disabled first:
    /// a device has one kind at a time.
    ///
    /// Errors: `NoSuchInterrupt`, with nothing changed; `Device`, with nothing enabled.
    pub fn enable_interrupts(
        &self,
        kind: Interrupt,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), VfioError> {
        let available = self.vectors(kind);
        if triggers.is_empty() || triggers.len() > available as usize {
            return Err(VfioError::NoSuchInterrupt { kind, asked: triggers.len(), available });
        }
        let mut enabled = self.enabled();
        self.disable(&mut enabled)?;

        let fixed = size_of::<uapi::vfio_irq_set>();
        let mut message = Message::with_len(fixed + 4 * triggers.len());
        for (index, trigger) in triggers.iter().enumerate() {
            message.set(fixed + 4 * index, trigger.as_raw_fd() as u32);
        }
        let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        let count = triggers.len() as u32;
        self.set(message, kind, flags, count)
            .map_err(|source| device_error(format!("enabling {count} {kind} vectors"), source))?;
        *enabled = Some(kind);
        Ok(())
    }

    /// Stops interrupts of this kind, if they are enabled. Nothing is signalled afterwards: the
    /// kernel waits for a handler in progress.
    pub fn disable_interrupts(&self, kind: Interrupt) -> Result<(), VfioError> {
        let mut enabled = self.enabled();
        if *enabled == Some(kind) { self.disable(&mut enabled) } else { Ok(()) }
    }

    /// Lets the INTx line interrupt again. One that is still asserted interrupts at once.
    ///
    /// Errors: `Device` when INTx is not enabled.
    pub fn unmask_intx(&self) -> Result<(), VfioError> {
        let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set(Message::of::<uapi::vfio_irq_set>(), Interrupt::IntX, flags, 1)
            .map_err(|source| device_error("unmasking INTx".to_owned(), source))
    }

    /// Stops whatever is enabled.
    pub(crate) fn disable(&self, enabled: &mut Option<Interrupt>) -> Result<(), VfioError> {
        let Some(kind) = *enabled else { return Ok(()) };
        // No vectors at all: this disables the index as a whole.
        let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set(Message::of::<uapi::vfio_irq_set>(), kind, flags, 0)
            .map_err(|source| device_error(format!("disabling {kind}"), source))?;
        *enabled = None;
        Ok(())
    }

    pub(crate) fn enabled(&self) -> MutexGuard<'_, Option<Interrupt>> {
        self.enabled.lock().expect("no panic happens under this lock")
    }

    fn set(
        &self,
        mut message: Message,
        kind: Interrupt,
        flags: u32,
        count: u32,
    ) -> std::io::Result<()> {
        message
            .set(offset_of!(uapi::vfio_irq_set, flags), flags)
            .set(offset_of!(uapi::vfio_irq_set, index), kind as u32)
            .set(offset_of!(uapi::vfio_irq_set, start), 0)
            .set(offset_of!(uapi::vfio_irq_set, count), count);
        self.device.call(DeviceCall::SetInterrupts, &mut message)
    }
}

impl fmt::Display for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Interrupt::IntX => "INTx",
            Interrupt::Msi => "MSI",
            Interrupt::MsiX => "MSI-X",
        })
    }
}

/// How many vectors of each kind the device has.
pub(crate) fn vectors(device: &DeviceFile) -> Result<[u32; 3], VfioError> {
    let mut vectors = [0; 3];
    for kind in [Interrupt::IntX, Interrupt::Msi, Interrupt::MsiX] {
        let mut info = Message::of::<uapi::vfio_irq_info>();
        info.set(offset_of!(uapi::vfio_irq_info, index), kind as u32);
        device
            .call(DeviceCall::GetInterruptInfo, &mut info)
            .map_err(|source| device_error(format!("counting {kind} vectors"), source))?;
        vectors[kind as usize] = info.u32(offset_of!(uapi::vfio_irq_info, count));
    }
    Ok(vectors)
}

fn device_error(operation: String, source: std::io::Error) -> VfioError {
    VfioError::Device { operation, source }
}
