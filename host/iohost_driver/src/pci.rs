//! PCI devices and their registers.

mod capability;
mod link;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};

use iohost_interface::IOReturn;
use iohost_registers::{
    MapWindow, Readable, Register, RegisterMap, RegisterValue, Width, Writable, register_bits,
};

use crate::memory::{DeviceMemory, Source};
use crate::{IOMemoryDescriptor, InterruptType, MemoryDirection, Result, abi, ensure};

pub use self::capability::Capability;
pub use self::link::{AspmStates, DevicePowerState, LinkStatus};

/// `IOPCIDevice`: one PCI function, owned by the driver it was given to.
///
/// A value of this type is a handle; clones are the same device. It is given to the driver open.
/// Callable from any thread.
#[derive(Clone)]
pub struct IOPCIDevice {
    shared: Arc<Shared>,
}

struct Shared {
    device: abi::Device,
    /// How many [`InUse`] there are, or [`CLOSED`].
    users: AtomicUsize,
}

/// There is no use of the device, and can be none.
const CLOSED: usize = usize::MAX;

/// A use of the device that keeps it open: registers, mappings, memory it was given.
pub(crate) struct InUse {
    device: IOPCIDevice,
}

impl InUse {
    pub(crate) fn raw(&self) -> &abi::Device {
        self.device.raw()
    }

    pub(crate) fn is(&self, device: &IOPCIDevice) -> bool {
        Arc::ptr_eq(&self.device.shared, &device.shared)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.device.shared.users.fetch_sub(1, Release);
    }
}

/// What a base address register covers. `GetBARInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Bytes.
    pub size: u64,
    /// The type bits: 0x00 memory 32 bit, 0x01 I/O, 0x04 memory 64 bit, 0x08 prefetchable.
    pub kind: u32,
}

register_bits! {
    /// The command register of configuration space (PCI Local Bus 3.0, section 6.2.2).
    pub struct Command: u16 {
        const IO_SPACE = 0x001;
        const MEMORY_SPACE = 0x002;
        const BUS_MASTER = 0x004;
        const INTX_DISABLE = 0x400;
    }
}

/// Where the command register is.
const COMMAND: u64 = 0x04;

impl IOPCIDevice {
    pub(crate) fn new(device: abi::Device) -> Self {
        Self { shared: Arc::new(Shared { device, users: AtomicUsize::new(0) }) }
    }

    pub(crate) fn raw(&self) -> &abi::Device {
        &self.shared.device
    }

    /// Keeps the device open. Errors: `NOT_OPEN`.
    pub(crate) fn in_use(&self) -> Result<InUse> {
        let one_more = |users| (users != CLOSED).then(|| users + 1);
        let counted = self.shared.users.fetch_update(Acquire, Acquire, one_more);
        ensure!(counted.is_ok(), IOReturn::NOT_OPEN, "the device was closed");
        Ok(InUse { device: self.clone() })
    }

    /// Opens the device that was closed. It decodes memory then, and is no bus master. A driver
    /// gets its device open, so there is a use for this after [`close`](Self::close) alone.
    ///
    /// Errors: `NOT_OPEN` when it is open: as in DriverKit, a device has one owner, who opens it
    /// once.
    pub fn open(&self) -> Result<()> {
        self.raw().open()?;
        // The host opened it for us, and nobody else: it is marked as closed here too.
        self.shared.users.store(0, Release);
        Ok(())
    }

    /// Gives back everything of the device: its interrupts are disabled, it is no bus master and
    /// decodes no memory, and a saved state that was to last is forgotten. Afterwards reads of
    /// configuration space give all ones, and everything else is `NOT_OPEN`.
    ///
    /// Errors: `STILL_OPEN` while there are [`Bar`]s, mappings of its memory, preparations or
    /// arenas: drop them first; `NOT_OPEN` when it was closed before.
    pub fn close(&self) -> Result<()> {
        match self.shared.users.compare_exchange(0, CLOSED, AcqRel, Acquire) {
            Ok(_) => Ok(self.raw().close()?),
            Err(CLOSED) => Err(crate::Error::new(IOReturn::NOT_OPEN, "the device was closed")),
            Err(users) => Err(crate::Error::new(
                IOReturn::STILL_OPEN,
                format!("{users} BARs, mappings or preparations of the device are in use"),
            )),
        }
    }

    /// Bus, device and function. `GetBusDeviceFunction`.
    ///
    /// Errors: `NOT_FOUND` for an emulated device, which is on no bus.
    pub fn bus_device_function(&self) -> Result<(u8, u8, u8)> {
        let (bus, device, function) = self.raw().location()?;
        Ok((bus as u8, device as u8, function as u8))
    }

    /// Reads configuration space; all ones when the offset is out of range or not aligned.
    pub fn configuration_read8(&self, offset: u64) -> u8 {
        self.configuration_read(offset)
    }

    /// Reads configuration space; all ones when the offset is out of range or not aligned.
    pub fn configuration_read16(&self, offset: u64) -> u16 {
        self.configuration_read(offset)
    }

    /// Reads configuration space; all ones when the offset is out of range or not aligned.
    pub fn configuration_read32(&self, offset: u64) -> u32 {
        self.configuration_read(offset)
    }

    /// Writes configuration space; ignored when the offset is out of range or not aligned.
    pub fn configuration_write8(&self, offset: u64, value: u8) {
        self.configuration_write(offset, value);
    }

    /// Writes configuration space; ignored when the offset is out of range or not aligned.
    pub fn configuration_write16(&self, offset: u64, value: u16) {
        self.configuration_write(offset, value);
    }

    /// Writes configuration space; ignored when the offset is out of range or not aligned.
    pub fn configuration_write32(&self, offset: u64, value: u32) {
        self.configuration_write(offset, value);
    }

    fn configuration_read<T: Width>(&self, offset: u64) -> T {
        let width = size_of::<T>() as u32;
        T::from_u64(self.raw().config_read(offset, width).unwrap_or(u64::MAX))
    }

    fn configuration_write<T: Width>(&self, offset: u64, value: T) {
        // DriverKit's rule: a write that cannot be made is not made, and nobody is told.
        let _ = self.raw().config_write(offset, size_of::<T>() as u32, value.to_u64());
    }

    /// Lets the device read and write memory on its own, or forbids it: bit 2 of the command
    /// register. Without it a device makes no DMA and sends no message interrupts.
    pub fn set_bus_master(&self, enable: bool) {
        let command = Command::from_register(self.configuration_read16(COMMAND));
        let command = if enable {
            command | Command::BUS_MASTER
        } else {
            Command::from_register(command.to_register() & !Command::BUS_MASTER.to_register())
        };
        self.configuration_write16(COMMAND, command.to_register());
    }

    /// Size and type of a BAR: 0–5, or 6 for the expansion ROM.
    ///
    /// Errors: `NOT_FOUND` for a BAR that is absent or the upper half of a 64-bit one,
    /// `BAD_ARGUMENT` above 6.
    pub fn bar_info(&self, bar: u8) -> Result<BarInfo> {
        let info = self.raw().bar_info(bar)?;
        Ok(BarInfo { size: info.size, kind: info.kind })
    }

    /// Gives access to the registers of a BAR: mapped where the device allows it, by calls
    /// elsewhere; a driver cannot tell.
    ///
    /// Errors: as [`bar_info`](Self::bar_info), and `OVERRUN` when the map is larger than the BAR.
    pub fn map_bar<M: RegisterMap>(&self, bar: u8) -> Result<Bar<M>> {
        let info = self.bar_info(bar)?;
        ensure!(
            M::SIZE <= info.size,
            IOReturn::OVERRUN,
            "BAR {bar} has {:#x} bytes, its map {:#x}",
            info.size,
            M::SIZE
        );
        let device = self.in_use()?;
        let window = match self.raw().bar_map(bar, 0, M::SIZE) {
            Ok(window) => MapWindow::new(window),
            Err(IOReturn::UNSUPPORTED) => None,
            Err(status) => return Err(status.into()),
        };
        Ok(Bar { device, bar, window })
    }

    /// A BAR's memory, to be mapped whole or in part. `_CopyDeviceMemoryWithIndex`.
    ///
    /// Errors: as [`bar_info`](Self::bar_info); `UNSUPPORTED` for a BAR of I/O ports; `NOT_OPEN`.
    pub fn copy_device_memory(&self, bar: u8) -> Result<IOMemoryDescriptor> {
        const IO_PORTS: u32 = 0x1;
        let info = self.bar_info(bar)?;
        ensure!(
            info.kind & IO_PORTS == 0,
            IOReturn::UNSUPPORTED,
            "BAR {bar} is I/O ports: they can be read and written, and not be mapped"
        );
        let source = Source::Device(DeviceMemory { device: self.clone(), bar });
        Ok(IOMemoryDescriptor::of(MemoryDirection::InOut, source, 0..info.size))
    }

    /// Keeps what configuration space says, for [`restore_device_state`](Self::restore_device_state):
    /// the header, the MSI capability but for its enable bit, and the control registers of PCI
    /// Express. A snapshot that is `permanent` stands apart, until the device is closed.
    ///
    /// Errors: what the device says; `NOT_OPEN`.
    pub fn save_device_state(&self, permanent: bool) -> Result<()> {
        Ok(self.raw().save_state(permanent.into())?)
    }

    /// Writes a snapshot back, and reads what it wrote.
    ///
    /// Errors: `NOT_READY` when there is no such snapshot; `IO_ERROR` when a register does not
    /// read as it did; what the device says; `NOT_OPEN`.
    pub fn restore_device_state(&self, permanent: bool) -> Result<()> {
        Ok(self.raw().restore_state(permanent.into())?)
    }

    /// Chooses the kind of interrupt and how many: at least `required`, `requested` if the device
    /// has them; MSI vectors come in powers of two, so there may be more. The first choice lasts
    /// as long as the driver; call it before making a source or asking for a type, which choose
    /// the default: the INTx line, if the device has one, then one MSI vector.
    ///
    /// Errors: `UNSUPPORTED` when the device has none of the kind or something else was chosen,
    /// `NO_SPACE` when it has fewer than `required`, `BAD_ARGUMENT` when `required` is 0 or more
    /// than `requested`, or when the device has the other kind of message only.
    pub fn configure_interrupts(
        &self,
        kind: InterruptType,
        required: u32,
        requested: u32,
    ) -> Result<()> {
        // The request names MSI-X by its own bit alone.
        let kind = match kind {
            InterruptType::MessagedX => 0x2_0000,
            other => other as u32,
        };
        Ok(self.raw().configure_interrupts(kind, required, requested)?)
    }

    /// Enables the first `count` vectors of what [`configure_interrupts`](Self::configure_interrupts)
    /// chose, and disables the others; 0 disables all. DriverKit has no such call: there the first
    /// choice is the last.
    ///
    /// Of vectors that stay enabled no interrupt is lost or delayed, as long as `count` is not
    /// larger than what was chosen; beyond that all of them are armed anew, and what comes
    /// meanwhile can be lost. Sources of vectors that are disabled stay, and hear nothing until
    /// their vector is enabled again: what such a vector signals, and what its source was not
    /// told before, is dropped and counted ([`dropped_interrupts`](Self::dropped_interrupts)). A
    /// reset of the device keeps which vectors are enabled.
    ///
    /// Errors: `NOT_READY` before `configure_interrupts`, `UNSUPPORTED` for the line, `NO_SPACE`
    /// when the device has fewer.
    pub fn resize_interrupts(&self, count: u32) -> Result<()> {
        Ok(self.raw().resize_interrupts(count)?)
    }

    /// How many interrupts came to nobody: of vectors that were disabled, or that had no source.
    pub fn dropped_interrupts(&self) -> u64 {
        self.raw().dropped_interrupts()
    }

    /// Brings the device back to its state at power-on, in the gentlest way it has. Its base
    /// addresses and interrupts are afterwards as before, and it decodes memory; it is bus master
    /// only if it has message interrupts. Takes 100 ms and more.
    ///
    /// Errors: `UNSUPPORTED` when it cannot be reset; `OFFLINE` when it does not answer afterwards.
    pub fn reset(&self) -> Result<()> {
        Ok(self.raw().reset()?)
    }

    /// [`reset`](Self::reset), in one way only.
    ///
    /// Errors: as there; `UNSUPPORTED` also for a reset of the bus that would reset devices of
    /// others.
    pub fn reset_by(&self, kind: ResetType) -> Result<()> {
        Ok(self.raw().reset_by(kind as u32)?)
    }

    /// Whether the device has stopped to answer: its vendor id reads as all ones. To be asked when
    /// a register reads as all ones, which the device has no reason for.
    pub fn is_gone(&self) -> bool {
        self.configuration_read16(0) == u16::MAX
    }
}

/// `kIOPCIDeviceResetType…`: what a reset resets. A warm reset, which DriverKit has besides, is
/// what VFIO never makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ResetType {
    /// `HotReset`: everything on the device's bus.
    Hot = 0x01,
    /// `FunctionReset`: the function alone.
    Function = 0x10,
}

impl fmt::Debug for IOPCIDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.configuration_read32(0);
        write!(f, "IOPCIDevice({:04x}:{:04x})", ids & 0xffff, ids >> 16)
    }
}

/// The registers of a BAR, as `M` describes them.
///
/// Every access is one bus access of the register's own width, in program order. A read that the
/// device does not answer gives all ones, as on a bus; such a write is lost.
pub struct Bar<M> {
    /// Keeps the mapping alive.
    device: InUse,
    bar: u8,
    window: Option<MapWindow<M>>,
}

impl<M: RegisterMap> Bar<M> {
    /// Reads a register.
    #[inline]
    pub fn read<T: RegisterValue, A: Readable>(&self, register: Register<M, T, A>) -> T {
        match &self.window {
            Some(window) => window.read(register),
            None => self.read_by_call(register),
        }
    }

    /// Writes a register.
    #[inline]
    pub fn write<T: RegisterValue, A: Writable>(&self, register: Register<M, T, A>, value: T) {
        match &self.window {
            Some(window) => window.write(register, value),
            None => self.write_by_call(register, value),
        }
    }

    /// The registers as they are mapped, for a path on which even the question whether they are
    /// is too much: an access is one instruction. `None` where they are reached by calls.
    pub fn mapped(&self) -> Option<&MapWindow<M>> {
        self.window.as_ref()
    }

    #[cold]
    fn read_by_call<T: RegisterValue, A>(&self, register: Register<M, T, A>) -> T {
        let width = size_of::<T::Bits>() as u32;
        let value = self.device.raw().bar_read(self.bar, register.offset(), width);
        T::from_register(T::Bits::from_u64(value.unwrap_or(u64::MAX)))
    }

    #[cold]
    fn write_by_call<T: RegisterValue, A>(&self, register: Register<M, T, A>, value: T) {
        let (width, value) = (size_of::<T::Bits>() as u32, value.to_register().to_u64());
        let _ = self.device.raw().bar_write(self.bar, register.offset(), width, value);
    }
}

impl<M> fmt::Debug for Bar<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.window.is_some() { "mapped" } else { "by calls" };
        write!(f, "Bar({}, {how})", self.bar)
    }
}
