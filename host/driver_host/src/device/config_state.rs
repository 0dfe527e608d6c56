//! What a driver set up in configuration space, to be there again after a reset.
//!
//! Source: PCI Local Bus Specification 3.0, 6.1 (header), 6.8.1 (MSI); PCI Express Base
//! Specification 5.0, 7.5.3 (PCI Express capability).

use iohost_device_backend::config_space::{COMMAND, EXPRESS, capabilities, read};
use iohost_device_backend::{DeviceBackend, DeviceError};
use iohost_interface::IOReturn;

/// Registers that software sets, as they were.
///
/// Not among them: what only the device sets, what the host has in its own hands (the enable bits
/// and the table of MSI and MSI-X), and what acts when it is written (resets, power states,
/// retraining a link).
#[derive(Debug)]
pub(super) struct ConfigState {
    /// In the order in which they are written: addresses before the command that decodes them.
    registers: Vec<Saved>,
}

#[derive(Debug)]
struct Saved {
    at: u16,
    width: usize,
    value: u32,
    /// Bits that are compared after they were written.
    mask: u32,
}

/// Why a state was not restored.
#[derive(Debug, thiserror::Error)]
pub(super) enum RestoreError {
    /// The device did not take or answer an access.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A register is not as it was.
    #[error("configuration space at {at:#x} reads {found:#x} after {value:#x} was written")]
    Differs { at: u16, value: u32, found: u32 },
}

impl RestoreError {
    pub(super) fn code(&self) -> IOReturn {
        match self {
            RestoreError::Device(err) => err.code(),
            RestoreError::Differs { .. } => IOReturn::IO_ERROR,
        }
    }
}

const CACHE_LINE_SIZE: u16 = 0x0c;
const LATENCY_TIMER: u16 = 0x0d;
const BARS: u16 = 0x10;
const ROM: u16 = 0x30;
const INTERRUPT_LINE: u16 = 0x3c;

const MSI: u8 = 0x05;
const MSI_MULTIPLE_MESSAGES: u32 = 7 << 4;
const MSI_64BIT: u32 = 1 << 7;

/// Of device control, all but the reset of the function.
const DEVICE_CONTROL: u32 = 0x7fff;
/// Of link control, what does not act: ASPM, the common clock, the extended synch.
const LINK_CONTROL: u32 = 0x00c3;

impl ConfigState {
    pub(super) fn save(backend: &dyn DeviceBackend) -> Result<Self, DeviceError> {
        let mut state = Self { registers: Vec::new() };
        state.keep(backend, CACHE_LINE_SIZE, 1, 0xff)?;
        state.keep(backend, LATENCY_TIMER, 1, 0xff)?;
        state.keep(backend, INTERRUPT_LINE, 1, 0xff)?;
        for bar in 0..6 {
            state.keep(backend, BARS + 4 * bar, 4, u32::MAX)?;
        }
        state.keep(backend, ROM, 4, u32::MAX)?;
        for (id, at) in capabilities(backend)? {
            match id {
                MSI => state.keep_msi(backend, at)?,
                EXPRESS => {
                    state.keep(backend, at + 0x08, 2, DEVICE_CONTROL)?;
                    state.keep(backend, at + 0x10, 2, LINK_CONTROL)?;
                }
                _ => {}
            }
        }
        state.keep(backend, COMMAND, 2, 0xffff)?;
        Ok(state)
    }

    pub(super) fn restore(&self, backend: &dyn DeviceBackend) -> Result<(), RestoreError> {
        for Saved { at, width, value, mask } in &self.registers {
            let now = read(backend, *at, *width)?;
            let value = now & !mask | value & mask;
            if value != now {
                backend.config_write(*at, &value.to_le_bytes()[..*width])?;
            }
        }
        for Saved { at, width, value, mask } in &self.registers {
            let found = read(backend, *at, *width)?;
            if (found ^ value) & mask != 0 {
                return Err(RestoreError::Differs { at: *at, value: *value, found });
            }
        }
        Ok(())
    }

    fn keep_msi(&mut self, backend: &dyn DeviceBackend, at: u16) -> Result<(), DeviceError> {
        let control = read(backend, at + 2, 2)?;
        self.keep(backend, at + 2, 2, MSI_MULTIPLE_MESSAGES)?;
        self.keep(backend, at + 4, 4, u32::MAX)?;
        let data = if control & MSI_64BIT != 0 {
            self.keep(backend, at + 8, 4, u32::MAX)?;
            at + 12
        } else {
            at + 8
        };
        self.keep(backend, data, 2, 0xffff)
    }

    fn keep(
        &mut self,
        backend: &dyn DeviceBackend,
        at: u16,
        width: usize,
        mask: u32,
    ) -> Result<(), DeviceError> {
        let value = read(backend, at, width)?;
        self.registers.push(Saved { at, width, value, mask });
        Ok(())
    }
}
