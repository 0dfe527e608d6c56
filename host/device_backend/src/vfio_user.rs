//! A device that another process emulates, over vfio-user.

use std::ops::{Range, RangeInclusive};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;
use iohost_vfio_user::{CONFIG_REGION, Client, IrqKind, Options, ROM_REGION, VfioUserError};

use crate::access;
use crate::config_space::{self, BUS_MASTER};
use crate::{BarInfo, DeviceBackend, DeviceError, InterruptKind, Reset, ResetLevel};

/// The protocol has no word for the addresses that a server takes. These are what a process has
/// for its own memory, so every server that maps by address has them too.
const IOVA_RANGES: [RangeInclusive<u64>; 1] = [0..=(1 << 47) - 1];

/// A device behind a vfio-user socket.
#[derive(Debug)]
pub struct VfioUserBackend {
    client: Client,
    bars: Vec<Option<BarInfo>>,
    /// The kind of interrupt that is enabled: a function has one at a time.
    enabled: Mutex<Option<InterruptKind>>,
}

impl VfioUserBackend {
    /// Connects to the server at `socket` with the default deadline; see [`Client::connect`].
    pub fn open(socket: &Path) -> Result<Self, VfioUserError> {
        Self::open_with(socket, &Options::default())
    }

    /// Connects to the server at `socket`; see [`Client::connect_with`].
    pub fn open_with(socket: &Path, options: &Options) -> Result<Self, VfioUserError> {
        let client = Client::connect_with(socket, options)?;
        let bars = (0..=ROM_REGION as u8)
            .map(|index| bar(&client, index))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { client, bars, enabled: Mutex::new(None) })
    }

    fn enabled(&self) -> MutexGuard<'_, Option<InterruptKind>> {
        self.enabled.lock().expect("no panic happens under this lock")
    }

    fn disable(&self, enabled: &mut Option<InterruptKind>) -> Result<(), DeviceError> {
        if let Some(kind) = *enabled {
            self.client.disable_irqs(kind.into())?;
            *enabled = None;
        }
        Ok(())
    }
}

fn bar(client: &Client, index: u8) -> Result<Option<BarInfo>, VfioUserError> {
    let Some(region) = client.region(index.into()) else { return Ok(None) };
    let kind = access::bar_kind(index, |offset, register| client.config_read(offset, register))?;
    Ok(Some(BarInfo { size: region.size(), kind, mappable: region.mappable().to_vec() }))
}

impl DeviceBackend for VfioUserBackend {
    fn kind(&self) -> &'static str {
        "vfio-user"
    }

    /// The server reaches what it was sent descriptors of.
    fn is_isolated(&self) -> bool {
        true
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        Ok(self.client.config_read(offset, data)?)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        Ok(self.client.config_write(offset, data)?)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.bars.get(usize::from(index))?.as_ref()
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        Ok(self.client.region_read(index.into(), offset, data)?)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        Ok(self.client.region_write(index.into(), offset, data)?)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        Ok(self.client.map_region(index.into(), range)?)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        let irq = self.client.irq(kind.into());
        if irq.signals_eventfds() { irq.count } else { 0 }
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let available = self.interrupt_count(kind);
        if triggers.is_empty() || triggers.len() > available as usize {
            let asked = u32::try_from(triggers.len()).unwrap_or(u32::MAX);
            return Err(DeviceError::NoSuchInterrupt { kind, asked, available });
        }
        let mut enabled = self.enabled();
        self.disable(&mut enabled)?;
        self.client.enable_irqs(kind.into(), triggers)?;
        *enabled = Some(kind);
        Ok(())
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        Ok(self.client.change_irqs(kind.into(), first, triggers)?)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        let mut enabled = self.enabled();
        if *enabled == Some(kind) { self.disable(&mut enabled) } else { Ok(()) }
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        Ok(self.client.unmask_intx()?)
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        &IOVA_RANGES
    }

    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError> {
        Ok(self.client.dma_map_part(iova, memory, part)?)
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        Ok(self.client.dma_unmap(iova, len)?)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let mut enabled = self.enabled();
        self.disable(&mut enabled)?;
        config_space::change_command(self, 0, BUS_MASTER)?;
        Ok(self.client.reset()?)
    }

    fn resets(&self) -> Vec<Reset> {
        if self.client.resettable() { vec![Reset::of_function()] } else { Vec::new() }
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        match level {
            ResetLevel::Function => self.reset(),
            ResetLevel::Bus => {
                let reason = "vfio-user has no reset of a bus".to_owned();
                Err(DeviceError::NoReset { reason })
            }
        }
    }
}

impl From<InterruptKind> for IrqKind {
    fn from(kind: InterruptKind) -> Self {
        match kind {
            InterruptKind::IntX => IrqKind::IntX,
            InterruptKind::Msi => IrqKind::Msi,
            InterruptKind::MsiX => IrqKind::MsiX,
        }
    }
}

impl From<IrqKind> for InterruptKind {
    fn from(kind: IrqKind) -> Self {
        match kind {
            IrqKind::IntX => InterruptKind::IntX,
            IrqKind::Msi => InterruptKind::Msi,
            IrqKind::MsiX => InterruptKind::MsiX,
        }
    }
}

impl From<VfioUserError> for DeviceError {
    fn from(err: VfioUserError) -> Self {
        let operation = err.to_string();
        if err.ends_connection() {
            return DeviceError::Gone(operation);
        }
        match err {
            VfioUserError::NoSuchRegion { index: CONFIG_REGION } => DeviceError::Gone(operation),
            VfioUserError::NoSuchRegion { index } => DeviceError::NoSuchBar { index: index as u8 },
            VfioUserError::Range { index, offset, len, size } => {
                DeviceError::Range { region: access::region_name(index), offset, len, size }
            }
            VfioUserError::NotMappable { index, start, end } => {
                DeviceError::NotMappable { index: index as u8, start, end }
            }
            VfioUserError::NoSuchInterrupt { kind, asked, available } => {
                DeviceError::NoSuchInterrupt { kind: kind.into(), asked, available }
            }
            VfioUserError::NotMapped { iova, len } => DeviceError::NotMapped { iova, len },
            VfioUserError::NoReset => DeviceError::NoReset { reason: operation },
            VfioUserError::Refused { source, .. }
            | VfioUserError::Map { source, .. }
            | VfioUserError::Duplicate { source, .. } => DeviceError::Refused { operation, source },
            err => DeviceError::Refused { operation, source: std::io::Error::other(err) },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use iohost_vfio_user::Command;

    use super::*;

    #[test]
    fn a_server_that_closed_the_connection_is_a_device_that_is_gone() {
        let err = DeviceError::from(VfioUserError::Closed { command: Command::RegionRead });
        assert!(matches!(err, DeviceError::Gone(_)), "{err:?}");
        let later = DeviceError::from(VfioUserError::Gone { reason: "closed".to_owned() });
        assert!(matches!(later, DeviceError::Gone(_)), "{later:?}");
    }

    #[test]
    fn a_refusal_keeps_what_the_server_said() {
        let source = io::Error::from_raw_os_error(22);
        let err = VfioUserError::Refused { command: Command::DmaMap, source };
        let DeviceError::Refused { source, .. } = err.into() else { panic!("not a refusal") };
        assert_eq!(source.raw_os_error(), Some(22));
    }
}
