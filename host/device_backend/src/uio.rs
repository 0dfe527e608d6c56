//! A real device, through the kernel's UIO.

use std::ops::{Range, RangeInclusive};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;
use iohost_uio::{UioDevice, UioError};
use iohost_vfio::CONFIG_REGION;

use crate::access::{self, WIDEST_BAR, WIDEST_CONFIG};
use crate::{BarInfo, DeviceBackend, DeviceError, InterruptKind, PciAddress, Reset, ResetLevel};

/// The BARs; the expansion ROM is not offered, as its decoder may share the BARs'.
const BARS: u8 = 6;

/// A PCI function that is bound to `uio_pci_generic`, open.
#[derive(Debug)]
pub struct UioBackend {
    device: UioDevice,
    bars: Vec<Option<BarInfo>>,
    location: Option<PciAddress>,
}

impl UioBackend {
    /// Opens the function whose folder in sysfs is `sysfs`; see [`UioDevice::open`].
    pub fn open(sysfs: &Path) -> Result<Self, UioError> {
        let device = UioDevice::open(sysfs)?;
        let bars = (0..BARS).map(|index| bar(&device, index)).collect::<Result<_, _>>()?;
        Ok(Self { device, bars, location: access::location(sysfs) })
    }

    fn check_bar(&self, index: u8, offset: u64, len: usize) -> Result<(), DeviceError> {
        let info = self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        access::check(index.into(), offset, len, info.size, WIDEST_BAR)
    }

    fn check_config(&self, offset: u16, len: usize) -> Result<(), DeviceError> {
        access::check(CONFIG_REGION, offset.into(), len, self.device.config_size(), WIDEST_CONFIG)
    }
}

fn bar(device: &UioDevice, index: u8) -> Result<Option<BarInfo>, UioError> {
    let Some(bar) = device.bar(index) else { return Ok(None) };
    let kind = access::bar_kind(index, |offset, register| device.config_read(offset, register))?;
    Ok(Some(BarInfo { size: bar.size, kind, mappable: bar.mappable().into_iter().collect() }))
}

impl DeviceBackend for UioBackend {
    fn kind(&self) -> &'static str {
        "uio"
    }

    fn is_isolated(&self) -> bool {
        false
    }

    fn location(&self) -> Option<PciAddress> {
        self.location
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        Ok(self.device.config_read(offset, data)?)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        Ok(self.device.config_write(offset, data)?)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.bars.get(usize::from(index))?.as_ref()
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        Ok(self.device.read(index, offset, data)?)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        Ok(self.device.write(index, offset, data)?)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        Ok(self.device.map(index, range)?)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::IntX => u32::from(self.device.has_line()),
            InterruptKind::Msi | InterruptKind::MsiX => 0,
        }
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let available = self.interrupt_count(kind);
        match triggers {
            [trigger] if available == 1 => Ok(self.device.enable_line(*trigger)?),
            _ => {
                let asked = u32::try_from(triggers.len()).unwrap_or(u32::MAX);
                Err(DeviceError::NoSuchInterrupt { kind, asked, available })
            }
        }
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        _first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.enable_interrupts(kind, triggers)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        match kind {
            InterruptKind::IntX => Ok(self.device.disable_line()?),
            InterruptKind::Msi | InterruptKind::MsiX => Ok(()),
        }
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        Ok(self.device.unmask()?)
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &[]
    }

    fn dma_map_part(
        &self,
        _iova: u64,
        _memory: &SharedMemory,
        _part: Range<u64>,
    ) -> Result<(), DeviceError> {
        Err(DeviceError::NoDma { backend: self.kind() })
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        Err(DeviceError::NotMapped { iova, len })
    }

    fn reset(&self) -> Result<(), DeviceError> {
        Ok(self.device.reset()?)
    }

    fn resets(&self) -> Vec<Reset> {
        match self.device.reset_methods() {
            Some(methods) => vec![Reset { methods, ..Reset::of_function() }],
            None => Vec::new(),
        }
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        match level {
            ResetLevel::Function => self.reset(),
            ResetLevel::Bus => {
                let reason = "UIO resets no bus".to_owned();
                Err(DeviceError::NoReset { reason })
            }
        }
    }

    fn posted_writes_take(&self) -> Duration {
        Duration::from_millis(100)
    }
}

impl From<UioError> for DeviceError {
    fn from(err: UioError) -> Self {
        let operation = err.to_string();
        match err {
            UioError::NoSuchBar { index } => DeviceError::NoSuchBar { index },
            UioError::OutOfRange { index, offset, len, size } => {
                DeviceError::Range { region: access::region_name(index.into()), offset, len, size }
            }
            UioError::NotMappable { index, start, end } => {
                DeviceError::NotMappable { index, start, end }
            }
            UioError::NoInterrupt => {
                DeviceError::NoSuchInterrupt { kind: InterruptKind::IntX, asked: 1, available: 0 }
            }
            UioError::NoReset => DeviceError::NoReset { reason: operation },
            UioError::Device { source, .. } => DeviceError::Refused { operation, source },
            UioError::Permission { source, .. } => DeviceError::Refused { operation, source },
            UioError::DecodingOff { .. } | UioError::Moves { .. } => {
                let source = std::io::Error::from(std::io::ErrorKind::InvalidInput);
                DeviceError::Refused { operation, source }
            }
            // The rest can only come from opening, which returns it as it is.
            _ => DeviceError::Gone(operation),
        }
    }
}
