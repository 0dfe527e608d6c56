//! A real device, through the kernel's VFIO.

use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;
use iohost_vfio::{
    Access, CONFIG_REGION, Event, Interrupt, ROM_REGION, ResetKind, VfioDevice, VfioError,
};

use crate::access::{self, WIDEST_BAR, WIDEST_CONFIG};
use crate::config_space::{COMMAND, MEMORY_SPACE};
use crate::{
    BarInfo, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, PciAddress, Reset, ResetLevel,
};

/// A PCI function that is bound to `vfio-pci`, open.
#[derive(Debug)]
pub struct VfioBackend {
    device: VfioDevice,
    bars: Vec<Bar>,
    location: Option<PciAddress>,
}

#[derive(Debug)]
struct Bar {
    info: Option<BarInfo>,
    /// One for each mappable range, mapped when it is first needed.
    mapped: Vec<OnceLock<MappedRegion>>,
}

impl VfioBackend {
    /// Opens the function whose folder in sysfs is `sysfs`; see [`VfioDevice::open`].
    pub fn open(sysfs: &Path, access: Access) -> Result<Self, VfioError> {
        let device = VfioDevice::open(sysfs, access)?;
        let bars = (0..=ROM_REGION as u8)
            .map(|index| Bar::new(&device, index))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { device, bars, location: access::location(sysfs) })
    }

    /// An access of 8 bytes through a mapping, where there can be one: there it is one access on
    /// the bus, while a call makes two of it before Linux 6.10.
    fn mapped_at(
        &self,
        index: u8,
        offset: u64,
    ) -> Result<Option<(&MappedRegion, usize)>, DeviceError> {
        let Some(Bar { info: Some(info), mapped }) = self.bars.get(usize::from(index)) else {
            return Ok(None);
        };
        let holds = |area: &Range<u64>| area.start <= offset && offset + 8 <= area.end;
        let Some(at) = info.mappable.iter().position(holds) else { return Ok(None) };
        self.refuse_without_memory_decoding(index, offset)?;
        let area = info.mappable[at].clone();
        let start = area.start;
        let region = match mapped[at].get() {
            Some(region) => region,
            None => {
                let region = self.map_bar(index, area)?;
                mapped[at].get_or_init(|| region)
            }
        };
        Ok(Some((region, (offset - start) as usize)))
    }

    /// A call says `EIO` where an access to the mapping would kill the process.
    fn refuse_without_memory_decoding(&self, index: u8, offset: u64) -> Result<(), DeviceError> {
        let mut command = [0; 2];
        self.config_read(COMMAND, &mut command)?;
        if u16::from_le_bytes(command) & MEMORY_SPACE != 0 {
            return Ok(());
        }
        Err(DeviceError::Refused {
            operation: format!("accessing 8 bytes at {offset:#x} of BAR {index}"),
            source: io::Error::other("memory decoding is off in the command register"),
        })
    }

    fn check_bar(&self, index: u8, offset: u64, len: usize) -> Result<(), DeviceError> {
        let info = self.bar(index).ok_or(DeviceError::NoSuchBar { index })?;
        access::check(index.into(), offset, len, info.size, WIDEST_BAR)
    }

    fn check_config(&self, offset: u16, len: usize) -> Result<(), DeviceError> {
        let size = self.device.region(CONFIG_REGION).map_or(0, |region| region.size);
        access::check(CONFIG_REGION, offset.into(), len, size, WIDEST_CONFIG)
    }
}

impl Bar {
    fn new(device: &VfioDevice, index: u8) -> Result<Self, VfioError> {
        let Some(region) = device.region(index.into()) else {
            return Ok(Self { info: None, mapped: Vec::new() });
        };
        let kind = access::bar_kind(index, |offset, register| {
            device.read(CONFIG_REGION, offset.into(), register)
        })?;
        let mappable = region.mappable.clone();
        let mapped = mappable.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { info: Some(BarInfo { size: region.size, kind, mappable }), mapped })
    }
}

impl DeviceBackend for VfioBackend {
    fn kind(&self) -> &'static str {
        match self.device.access() {
            Access::Cdev => "vfio-cdev",
            Access::Group => "vfio-group",
            Access::NoIommu => "vfio-no-iommu",
        }
    }

    fn is_isolated(&self) -> bool {
        self.device.access() != Access::NoIommu
    }

    fn location(&self) -> Option<PciAddress> {
        self.location
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        Ok(self.device.read(CONFIG_REGION, offset.into(), data)?)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.check_config(offset, data.len())?;
        Ok(self.device.write(CONFIG_REGION, offset.into(), data)?)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.bars.get(usize::from(index))?.info.as_ref()
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        if data.len() == 8
            && let Some((region, at)) = self.mapped_at(index, offset)?
        {
            let value: u64 = region.read(at).expect("the access was checked against its area");
            data.copy_from_slice(&value.to_ne_bytes());
            return Ok(());
        }
        Ok(self.device.read(index.into(), offset, data)?)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check_bar(index, offset, data.len())?;
        if let Ok(value) = data.try_into().map(u64::from_ne_bytes)
            && let Some((region, at)) = self.mapped_at(index, offset)?
        {
            region.write(at, value).expect("the access was checked against its area");
            return Ok(());
        }
        Ok(self.device.write(index.into(), offset, data)?)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        if self.bar(index).is_none() {
            return Err(DeviceError::NoSuchBar { index });
        }
        Ok(self.device.map(index.into(), range)?)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.device.vectors(kind.into())
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        Ok(self.device.enable_interrupts(kind.into(), triggers)?)
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        Ok(self.device.change_triggers(kind.into(), first, triggers)?)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        Ok(self.device.disable_interrupts(kind.into())?)
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        Ok(self.device.unmask_intx()?)
    }

    fn iova_ranges(&self) -> &[RangeInclusive<u64>] {
        self.device.iova_ranges()
    }

    fn dma_map_part(
        &self,
        iova: u64,
        memory: &SharedMemory,
        part: Range<u64>,
    ) -> Result<(), DeviceError> {
        match self.device.map_dma(iova, memory, part) {
            Err(VfioError::NoDma) => Err(DeviceError::NoDma { backend: self.kind() }),
            done => Ok(done?),
        }
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        Ok(self.device.unmap_dma(iova, len)?)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.device.reset()?;
        Ok(())
    }

    fn resets(&self) -> Vec<Reset> {
        let resets = self.device.resets().into_iter().map(|reset| Reset {
            level: match reset.kind {
                ResetKind::Function => ResetLevel::Function,
                ResetKind::Bus => ResetLevel::Bus,
            },
            methods: reset.methods,
            affected: reset
                .affected
                .into_iter()
                .map(|device| (device.address, device.is_ours))
                .collect(),
        });
        resets.collect()
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        Ok(self.device.reset_by(match level {
            ResetLevel::Function => ResetKind::Function,
            ResetLevel::Bus => ResetKind::Bus,
        })?)
    }

    /// What the kernel waits for a function's transfers at a reset that has no better sign of
    /// their end (Linux, `drivers/pci/pci.c`, `pcie_flr` and `pci_af_flr`).
    fn posted_writes_take(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        match event {
            DeviceEvent::Error => Ok(self.device.watch(Event::Error, trigger)?),
            DeviceEvent::RemovalRequested => Ok(self.device.watch(Event::Request, trigger)?),
            DeviceEvent::Gone => Ok(false),
        }
    }
}

impl From<InterruptKind> for Interrupt {
    fn from(kind: InterruptKind) -> Self {
        match kind {
            InterruptKind::IntX => Interrupt::IntX,
            InterruptKind::Msi => Interrupt::Msi,
            InterruptKind::MsiX => Interrupt::MsiX,
        }
    }
}

impl From<Interrupt> for InterruptKind {
    fn from(kind: Interrupt) -> Self {
        match kind {
            Interrupt::IntX => InterruptKind::IntX,
            Interrupt::Msi => InterruptKind::Msi,
            Interrupt::MsiX => InterruptKind::MsiX,
        }
    }
}

impl From<VfioError> for DeviceError {
    fn from(err: VfioError) -> Self {
        let operation = err.to_string();
        match err {
            VfioError::NoSuchRegion { index } => DeviceError::NoSuchBar { index: index as u8 },
            VfioError::OutOfRange { index, offset, len, size } => {
                DeviceError::Range { region: access::region_name(index), offset, len, size }
            }
            VfioError::NotMappable { index, start, end } => {
                DeviceError::NotMappable { index: index as u8, start, end }
            }
            VfioError::NoSuchInterrupt { kind, asked, available } => DeviceError::NoSuchInterrupt {
                kind: kind.into(),
                asked: u32::try_from(asked).unwrap_or(u32::MAX),
                available,
            },
            VfioError::LockedMemory { len, need, have } => {
                DeviceError::LockedMemory { len, need, have }
            }
            VfioError::NotMapped { iova, len } => DeviceError::NotMapped { iova, len },
            VfioError::NoReset | VfioError::ResetShared { .. } => {
                DeviceError::NoReset { reason: operation }
            }
            VfioError::Access { source, .. }
            | VfioError::MapRegion { source, .. }
            | VfioError::MapDma { source, .. }
            | VfioError::UnmapDma { source, .. }
            | VfioError::Device { source, .. } => DeviceError::Refused { operation, source },
            // The rest can only come from opening, which returns it as it is.
            _ => DeviceError::Gone(operation),
        }
    }
}
