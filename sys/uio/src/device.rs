//! Opening a device, and what belongs to it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use iohost_registers::MappedRegion;
use nix::fcntl::{Flock, FlockArg};

use crate::UioError;
use crate::bar::{self, Bar};
use crate::config::{BUS_MASTER, Config, INTX_DISABLE, MEMORY_SPACE};
use crate::line::{self, Line};

/// One PCI function that is bound to `uio_pci_generic`, open.
///
/// All methods can be called from any thread. Dropped, its line is masked and it is no bus master
/// any more, which the kernel sees to as well when the process dies.
#[derive(Debug)]
pub struct UioDevice {
    /// Locked, so that no second process of ours has the device. UIO itself would not mind.
    node: Flock<File>,
    config: Config,
    bars: Vec<Option<Bar>>,
    has_line: bool,
    /// `None` where the kernel has no way to reset it.
    reset: Option<Reset>,
    line: Mutex<Option<Line>>,
}

/// How the function is reset, opened at once, since a process may give up opening files.
#[derive(Debug)]
struct Reset {
    path: PathBuf,
    /// Or why it cannot be opened, for whoever wants to reset.
    file: Result<File, ErrorKind>,
    methods: Vec<String>,
}

impl Reset {
    fn open(sysfs: &Path) -> Option<Self> {
        let path = sysfs.join("reset");
        let file = match File::options().write(true).open(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return None,
            file => file.map_err(|err| err.kind()),
        };
        let text = fs::read_to_string(sysfs.join("reset_method")).unwrap_or_default();
        let methods = text.split_whitespace().map(str::to_owned).collect();
        Some(Self { path, file, methods })
    }
}

impl UioDevice {
    /// Opens the function whose folder in sysfs is `sysfs`, such as
    /// `/sys/bus/pci/devices/0000:01:00.0`. Its line is masked.
    ///
    /// - Needs: read and write permission on `/dev/uioN`, and on `config` and `resourceN` in the
    ///   folder; root has them.
    /// - Errors: `NoSuchDevice`, `NotBound`, `NodeMissing`, `Permission`, `Busy`, `Malformed`;
    ///   `Device` for what has no name.
    pub fn open(sysfs: &Path) -> Result<Self, UioError> {
        Self::open_in(sysfs, Path::new("/dev"))
    }

    fn open_in(sysfs: &Path, nodes: &Path) -> Result<Self, UioError> {
        if !sysfs.is_dir() {
            return Err(UioError::NoSuchDevice { sysfs: sysfs.to_owned() });
        }
        let not_bound = || UioError::NotBound { sysfs: sysfs.to_owned() };
        let mut entries = fs::read_dir(sysfs.join("uio")).map_err(|_| not_bound())?;
        let entry = entries.next().and_then(Result::ok).ok_or_else(not_bound)?;
        let path = nodes.join(entry.file_name());
        let node = Flock::lock(line::open(&path)?, FlockArg::LockExclusiveNonblock).map_err(
            |(_, errno)| match std::io::Error::from(errno) {
                err if err.kind() == ErrorKind::WouldBlock => UioError::Busy { node: path },
                err => UioError::device(format!("locking {}", path.display()))(err),
            },
        )?;
        let config = Config::open(&sysfs.join("config"))?;
        config.change_command(INTX_DISABLE, 0)?;
        let bars = bar::bars(sysfs)?;
        let has_line = config.has_line()?;
        let reset = Reset::open(sysfs);
        Ok(Self { node, config, bars, has_line, reset, line: Mutex::new(None) })
    }

    /// Bytes of configuration space: 256 or 4096.
    pub fn config_size(&self) -> u64 {
        self.config.size()
    }

    /// Reads the registers of configuration space, up to 4 bytes at their natural alignment.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), UioError> {
        self.config.read(offset, data)
    }

    /// Writes the registers of configuration space, but for the bit that masks the line.
    ///
    /// Errors: `Moves` for the base address registers: the kernel goes by their values; `Device`.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), UioError> {
        self.config.write(offset, data)
    }

    /// A BAR; `None` where the device has none of this index.
    pub fn bar(&self, index: u8) -> Option<&Bar> {
        self.bars.get(usize::from(index))?.as_ref()
    }

    /// Reads a BAR, 1, 2, 4 or (not of I/O ports) 8 bytes at their natural alignment, as one
    /// access.
    ///
    /// Errors: `NoSuchBar`, `OutOfRange`, `DecodingOff`; `Device` with what the kernel says.
    pub fn read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), UioError> {
        self.answering_bar(index)?.read(offset, data)
    }

    /// Writes a BAR; see [`read`](Self::read).
    pub fn write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), UioError> {
        self.answering_bar(index)?.write(offset, data)
    }

    /// Maps part of a BAR, from a page on.
    ///
    /// Errors: `NoSuchBar`; `NotMappable`; `Device` with what the kernel says.
    pub fn map(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, UioError> {
        self.bar(index).ok_or(UioError::NoSuchBar { index })?.map(range)
    }

    /// Whether the device has an interrupt line. There is no other kind of interrupt.
    pub fn has_line(&self) -> bool {
        self.has_line
    }

    /// Lets the line signal `trigger`, an eventfd, in place of what it signalled before. At each
    /// interrupt the kernel masks the line, until [`unmask`](Self::unmask).
    ///
    /// Errors: `NoInterrupt`; `Device`, with nothing enabled.
    pub fn enable_line(&self, trigger: BorrowedFd<'_>) -> Result<(), UioError> {
        if !self.has_line {
            return Err(UioError::NoInterrupt);
        }
        let mut line = self.line();
        self.disable(&mut line)?;
        *line = Some(Line::forward(&self.node, trigger)?);
        self.config.change_command(0, INTX_DISABLE)
    }

    /// Masks the line. Nothing is signalled afterwards.
    pub fn disable_line(&self) -> Result<(), UioError> {
        self.disable(&mut self.line())
    }

    /// Lets the line interrupt again. One that is still asserted interrupts at once.
    ///
    /// Errors: `NoInterrupt` when it is not enabled; `Device`.
    pub fn unmask(&self) -> Result<(), UioError> {
        match *self.line() {
            Some(_) => self.config.change_command(0, INTX_DISABLE),
            None => Err(UioError::NoInterrupt),
        }
    }

    /// The kernel's methods of resetting the function, in the order in which it tries them; empty
    /// where it does not say, `None` where it has none.
    pub fn reset_methods(&self) -> Option<Vec<String>> {
        self.reset.as_ref().map(|reset| reset.methods.clone())
    }

    /// Stops interrupts and transfers, then resets the function in the way the kernel prefers.
    ///
    /// Configuration space is as before afterwards, but for bus mastering, which is off. Takes up
    /// to a second or so.
    ///
    /// Errors: `NoReset`; `Device`. The device is quiet, unless it was the quieting that failed.
    pub fn reset(&self) -> Result<(), UioError> {
        let mut line = self.line();
        self.disable(&mut line)?;
        self.config.change_command(0, BUS_MASTER)?;
        let reset = self.reset.as_ref().ok_or(UioError::NoReset)?;
        match &reset.file {
            Ok(file) => file
                .write_all_at(b"1", 0)
                .map_err(UioError::device("resetting the function".to_owned())),
            Err(kind) => Err(UioError::open(&reset.path, (*kind).into())),
        }
    }

    fn disable(&self, line: &mut Option<Line>) -> Result<(), UioError> {
        let masked = self.config.change_command(INTX_DISABLE, 0);
        // Waits for the thread, which may be signalling the last one.
        *line = None;
        masked
    }

    fn answering_bar(&self, index: u8) -> Result<&Bar, UioError> {
        let bar = self.bar(index).ok_or(UioError::NoSuchBar { index })?;
        if bar.is_memory() && self.config.command()? & MEMORY_SPACE == 0 {
            return Err(UioError::DecodingOff { index });
        }
        Ok(bar)
    }

    fn line(&self) -> MutexGuard<'_, Option<Line>> {
        self.line.lock().expect("no panic happens under this lock")
    }
}

impl Drop for UioDevice {
    fn drop(&mut self) {
        // A device that is gone needs no quieting.
        let _ = self.disable_line();
        let _ = self.config.change_command(0, BUS_MASTER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function in a folder that looks like sysfs, with one BAR and a line, and its node.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path().join("0000:01:00.0");
        fs::create_dir_all(sysfs.join("uio/uio7")).unwrap();
        let mut config = [0; 256];
        config[0x3d] = 1;
        fs::write(sysfs.join("config"), config).unwrap();
        fs::write(sysfs.join("resource"), "0xfebf0000 0xfebf0fff 0x200\n").unwrap();
        fs::write(sysfs.join("resource0"), [0; 4096]).unwrap();
        fs::write(root.path().join("uio7"), "").unwrap();
        (root, sysfs)
    }

    fn command(sysfs: &Path) -> u16 {
        let config = fs::read(sysfs.join("config")).unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }

    #[test]
    fn a_device_that_is_not_there_or_not_bound_says_so() {
        let (root, sysfs) = tree();
        let err = UioDevice::open_in(&root.path().join("0000:02:00.0"), root.path()).unwrap_err();
        assert!(matches!(err, UioError::NoSuchDevice { .. }), "{err}");
        fs::remove_dir(sysfs.join("uio/uio7")).unwrap();
        let err = UioDevice::open_in(&sysfs, root.path()).unwrap_err();
        assert!(matches!(err, UioError::NotBound { .. }), "{err}");
        assert!(err.next_step().contains("modprobe uio_pci_generic"), "{}", err.next_step());
    }

    #[test]
    fn a_device_is_one_process_s_at_a_time() {
        let (root, sysfs) = tree();
        let first = UioDevice::open_in(&sysfs, root.path()).unwrap();
        let err = UioDevice::open_in(&sysfs, root.path()).unwrap_err();
        assert!(matches!(err, UioError::Busy { .. }), "{err}");
        drop(first);
        UioDevice::open_in(&sysfs, root.path()).unwrap();
    }

    #[test]
    fn a_bar_answers_only_while_memory_decoding_is_on() {
        let (root, sysfs) = tree();
        let device = UioDevice::open_in(&sysfs, root.path()).unwrap();
        let err = device.read(0, 0, &mut [0; 4]).unwrap_err();
        assert!(matches!(err, UioError::DecodingOff { index: 0 }), "{err}");
        device.config_write(4, &MEMORY_SPACE.to_le_bytes()).unwrap();
        device.write(0, 8, &[1, 2, 3, 4]).unwrap();
        let mut data = [0; 4];
        device.read(0, 8, &mut data).unwrap();
        assert_eq!(data, [1, 2, 3, 4]);
    }

    #[test]
    fn a_device_is_masked_and_no_bus_master_once_it_is_closed() {
        let (root, sysfs) = tree();
        let device = UioDevice::open_in(&sysfs, root.path()).unwrap();
        assert_eq!(command(&sysfs), INTX_DISABLE);
        device.config_write(4, &BUS_MASTER.to_le_bytes()).unwrap();
        assert_eq!(command(&sysfs), BUS_MASTER | INTX_DISABLE);
        drop(device);
        assert_eq!(command(&sysfs), INTX_DISABLE);
    }

    #[test]
    fn a_reset_quiets_first_and_says_when_there_is_none() {
        let (root, sysfs) = tree();
        let device = UioDevice::open_in(&sysfs, root.path()).unwrap();
        device.config_write(4, &BUS_MASTER.to_le_bytes()).unwrap();
        let err = device.reset().unwrap_err();
        assert!(matches!(err, UioError::NoReset), "{err}");
        assert_eq!(device.reset_methods(), None);
        assert_eq!(command(&sysfs), INTX_DISABLE);

        fs::write(sysfs.join("reset"), "").unwrap();
        fs::write(sysfs.join("reset_method"), "flr bus\n").unwrap();
        drop(device);
        let device = UioDevice::open_in(&sysfs, root.path()).unwrap();
        assert_eq!(device.reset_methods(), Some(vec!["flr".to_owned(), "bus".to_owned()]));
        device.reset().unwrap();
        assert_eq!(fs::read(sysfs.join("reset")).unwrap(), b"1");
    }
}
