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

/// The interrupts that are enabled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Enabled {
    kind: Interrupt,
    vectors: u32,
}

/// What VFIO tells of a device besides its interrupts. The numbers are VFIO's indexes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A PCI Express error that the device has not corrected itself (AER). PCI Express devices
    /// only.
    Error = uapi::VFIO_PCI_ERR_IRQ_INDEX as isize,
    /// Somebody wants the device back, and the kernel waits until it is closed. It says so again
    /// every ten seconds.
    Request = uapi::VFIO_PCI_REQ_IRQ_INDEX as isize,
}

impl VfioDevice {
    /// Has an event signal `trigger`, an eventfd, in place of what it signalled before; `false`
    /// where VFIO never tells this one of this device. Resets leave it as it is.
    ///
    /// Errors: `Device` with what the kernel said.
    pub fn watch(&self, event: Event, trigger: BorrowedFd<'_>) -> Result<bool, VfioError> {
        let index = event as u32;
        match vector_count(&self.device, index) {
            Ok(1..) => {}
            // What has no such index at all: a conventional PCI device, of errors.
            Ok(0) => return Ok(false),
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
            Err(source) => return Err(device_error(format!("asking for {event:?}"), source)),
        }
        let fixed = size_of::<uapi::vfio_irq_set>();
        let mut message = Message::with_len(fixed + 4);
        message.set(fixed, trigger.as_raw_fd() as u32);
        let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set(message, index, flags, 0, 1)
            .map_err(|source| device_error(format!("watching for {event:?}"), source))?;
        Ok(true)
    }

    /// Has vectors `first..` of the kind that is enabled signal `triggers` instead of what they
    /// signalled. The others are not disturbed, and of these no message is lost: the kernel masks
    /// a vector of MSI-X meanwhile, and the device keeps what it has to say.
    ///
    /// Errors: `NoSuchInterrupt` past the vectors that were enabled, or when another kind is;
    /// `Device`, with the vectors before the one that failed changed.
    pub fn change_triggers(
        &self,
        kind: Interrupt,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), VfioError> {
        let enabled = self.enabled();
        let available = enabled.map_or(0, |now| if now.kind == kind { now.vectors } else { 0 });
        let end = first as usize + triggers.len();
        if end > available as usize {
            return Err(VfioError::NoSuchInterrupt { kind, asked: end, available });
        }
        let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        let count = triggers.len() as u32;
        self.set(with_triggers(triggers), kind as u32, flags, first, count)
            .map_err(|source| device_error(format!("changing {count} {kind} vectors"), source))
    }

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

        let flags = uapi::VFIO_IRQ_SET_DATA_EVENTFD | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        let vectors = triggers.len() as u32;
        self.set(with_triggers(triggers), kind as u32, flags, 0, vectors)
            .map_err(|source| device_error(format!("enabling {vectors} {kind} vectors"), source))?;
        *enabled = Some(Enabled { kind, vectors });
        Ok(())
    }

    /// Stops interrupts of this kind, if they are enabled. Nothing is signalled afterwards: the
    /// kernel waits for a handler in progress.
    pub fn disable_interrupts(&self, kind: Interrupt) -> Result<(), VfioError> {
        let mut enabled = self.enabled();
        match *enabled {
            Some(now) if now.kind == kind => self.disable(&mut enabled),
            _ => Ok(()),
        }
    }

    /// Lets the INTx line interrupt again. One that is still asserted interrupts at once.
    ///
    /// Errors: `Device` when INTx is not enabled.
    pub fn unmask_intx(&self) -> Result<(), VfioError> {
        let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set(Message::of::<uapi::vfio_irq_set>(), Interrupt::IntX as u32, flags, 0, 1)
            .map_err(|source| device_error("unmasking INTx".to_owned(), source))
    }

    /// Stops whatever is enabled.
    pub(crate) fn disable(&self, enabled: &mut Option<Enabled>) -> Result<(), VfioError> {
        let Some(Enabled { kind, .. }) = *enabled else { return Ok(()) };
        // No vectors at all: this disables the index as a whole.
        let flags = uapi::VFIO_IRQ_SET_DATA_NONE | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set(Message::of::<uapi::vfio_irq_set>(), kind as u32, flags, 0, 0)
            .map_err(|source| device_error(format!("disabling {kind}"), source))?;
        *enabled = None;
        Ok(())
    }

    pub(crate) fn enabled(&self) -> MutexGuard<'_, Option<Enabled>> {
        self.enabled.lock().expect("no panic happens under this lock")
    }

    fn set(
        &self,
        mut message: Message,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
    ) -> std::io::Result<()> {
        message
            .set(offset_of!(uapi::vfio_irq_set, flags), flags)
            .set(offset_of!(uapi::vfio_irq_set, index), index)
            .set(offset_of!(uapi::vfio_irq_set, start), start)
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
        vectors[kind as usize] = vector_count(device, kind as u32)
            .map_err(|source| device_error(format!("counting {kind} vectors"), source))?;
    }
    Ok(vectors)
}

fn vector_count(device: &DeviceFile, index: u32) -> std::io::Result<u32> {
    let mut info = Message::of::<uapi::vfio_irq_info>();
    info.set(offset_of!(uapi::vfio_irq_info, index), index);
    device.call(DeviceCall::GetInterruptInfo, &mut info)?;
    Ok(info.u32(offset_of!(uapi::vfio_irq_info, count)))
}

/// A structure that has these eventfds behind its fixed part.
fn with_triggers(triggers: &[BorrowedFd<'_>]) -> Message {
    let fixed = size_of::<uapi::vfio_irq_set>();
    let mut message = Message::with_len(fixed + 4 * triggers.len());
    for (index, trigger) in triggers.iter().enumerate() {
        message.set(fixed + 4 * index, trigger.as_raw_fd() as u32);
    }
    message
}

fn device_error(operation: String, source: std::io::Error) -> VfioError {
    VfioError::Device { operation, source }
}
