//! Configuration space, as sysfs has it: the registers themselves, with nothing in between.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use crate::UioError;

/// The command register and some of its bits; the base address registers, the one of the
/// expansion ROM, and the interrupt pin.
///
/// Source: PCI Local Bus Specification 3.0, 6.2.
const COMMAND: u16 = 0x04;
pub(crate) const MEMORY_SPACE: u16 = 0x0002;
pub(crate) const BUS_MASTER: u16 = 0x0004;
pub(crate) const INTX_DISABLE: u16 = 0x0400;
const BASE_ADDRESSES: std::ops::Range<u16> = 0x10..0x28;
const ROM_ADDRESS: std::ops::Range<u16> = 0x30..0x34;
const INTERRUPT_PIN: u16 = 0x3d;

/// An open `config` file.
#[derive(Debug)]
pub(crate) struct Config {
    file: File,
    size: u64,
    /// Held from reading the command register to writing it.
    ///
    /// The kernel changes it too, without this lock, but only in one way: at an interrupt it sets
    /// `INTX_DISABLE`. A write that comes between takes that back, and a line that is still
    /// asserted interrupts once more; nothing is lost.
    command: Mutex<()>,
}

impl Config {
    pub(crate) fn open(path: &Path) -> Result<Self, UioError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let file = opened.map_err(|source| UioError::open(path, source))?;
        let size = file.metadata().map_err(|source| UioError::open(path, source))?.len();
        Ok(Self { file, size, command: Mutex::new(()) })
    }

    /// Bytes: 256 or 4096.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) -> Result<(), UioError> {
        let len = data.len();
        let what = || format!("reading {len} bytes at {offset:#x} of configuration space");
        let read = self.file.read_exact_at(data, offset.into());
        read.map_err(|source| UioError::device(what())(source))
    }

    /// Writes a driver's bytes, but for what is not the driver's: the placing of the device, and
    /// whether its line is masked.
    pub(crate) fn write(&self, offset: u16, data: &[u8]) -> Result<(), UioError> {
        let end = offset.saturating_add(data.len() as u16);
        for placing in [BASE_ADDRESSES, ROM_ADDRESS] {
            if offset < placing.end && placing.start < end {
                return Err(UioError::Moves { offset, len: data.len() });
            }
        }
        let high = COMMAND + 1;
        if !(offset..end).contains(&high) {
            return self.put(offset, data);
        }
        let _locked = self.locked();
        let mut kept = [0];
        self.read(high, &mut kept)?;
        let mask = INTX_DISABLE.to_le_bytes()[1];
        let mut data = data.to_vec();
        let byte = &mut data[usize::from(high - offset)];
        *byte = *byte & !mask | kept[0] & mask;
        self.put(offset, &data)
    }

    /// The command register.
    pub(crate) fn command(&self) -> Result<u16, UioError> {
        let mut command = [0; 2];
        self.read(COMMAND, &mut command)?;
        Ok(u16::from_le_bytes(command))
    }

    /// Sets and clears bits of the command register.
    pub(crate) fn change_command(&self, set: u16, clear: u16) -> Result<(), UioError> {
        let _locked = self.locked();
        let changed = (self.command()? | set) & !clear;
        self.put(COMMAND, &changed.to_le_bytes())
    }

    /// Whether the function has an interrupt line.
    pub(crate) fn has_line(&self) -> Result<bool, UioError> {
        let mut pin = [0];
        self.read(INTERRUPT_PIN, &mut pin)?;
        Ok(pin[0] != 0)
    }

    fn put(&self, offset: u16, data: &[u8]) -> Result<(), UioError> {
        let what = format!("writing {} bytes at {offset:#x} of configuration space", data.len());
        self.file.write_all_at(data, offset.into()).map_err(UioError::device(what))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, ()> {
        self.command.lock().expect("no panic happens under this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(command: u16) -> (tempfile::NamedTempFile, Config) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = [0; 256];
        bytes[4..6].copy_from_slice(&command.to_le_bytes());
        std::fs::write(file.path(), bytes).unwrap();
        let config = Config::open(file.path()).unwrap();
        (file, config)
    }

    #[test]
    fn a_driver_that_writes_the_command_register_leaves_the_line_as_it_is() {
        for masked in [0, INTX_DISABLE] {
            let (_file, config) = config(masked);
            config.write(COMMAND, &0xffff_u16.to_le_bytes()).unwrap();
            assert_eq!(config.command().unwrap(), !INTX_DISABLE | masked);
            config.write(COMMAND, &[0; 4]).unwrap();
            assert_eq!(config.command().unwrap(), masked);
            config.write(COMMAND, &[0x06]).unwrap();
            assert_eq!(config.command().unwrap(), 0x06 | masked);
        }
    }

    #[test]
    fn the_host_masks_and_unmasks_the_line() {
        let (_file, config) = config(MEMORY_SPACE);
        config.change_command(INTX_DISABLE, 0).unwrap();
        assert_eq!(config.command().unwrap(), MEMORY_SPACE | INTX_DISABLE);
        config.change_command(0, INTX_DISABLE).unwrap();
        assert_eq!(config.command().unwrap(), MEMORY_SPACE);
    }

    #[test]
    fn a_write_that_would_move_the_device_is_refused() {
        let (_file, config) = config(0);
        for offset in [0x10, 0x24, 0x30] {
            let err = config.write(offset, &[0xff; 4]).unwrap_err();
            assert!(matches!(err, UioError::Moves { .. }), "{offset:#x}: {err}");
        }
        config.write(0x0c, &[0; 4]).unwrap();
        config.write(0x28, &[0; 4]).unwrap();
        config.write(0x3c, &[0; 1]).unwrap();
    }

    #[test]
    fn the_space_is_as_large_as_its_file() {
        assert_eq!(config(0).1.size(), 256);
    }
}
