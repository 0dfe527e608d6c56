//! PCI devices and their registers.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use iohost_interface::IOReturn;
use iohost_registers::{
    Readable, Register, RegisterMap, RegisterValue, RegisterWindow, Width, Writable, register_bits,
};

use crate::{InterruptType, Result, abi, ensure};

/// `IOPCIDevice`: one PCI function, owned by the driver it was given to.
///
/// A value of this type is a handle; clones are the same device. Callable from any thread.
#[derive(Clone)]
pub struct IOPCIDevice {
    device: Arc<abi::Device>,
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
        Self { device: Arc::new(device) }
    }

    pub(crate) fn raw(&self) -> &abi::Device {
        &self.device
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
        T::from_u64(self.device.config_read(offset, width).unwrap_or(u64::MAX))
    }

    fn configuration_write<T: Width>(&self, offset: u64, value: T) {
        // DriverKit's rule: a write that cannot be made is not made, and nobody is told.
        let _ = self.device.config_write(offset, size_of::<T>() as u32, value.to_u64());
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
        let info = self.device.bar_info(bar)?;
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
        let window = match self.device.bar_map(bar, M::SIZE) {
            Ok(window) => Some(window),
            Err(IOReturn::UNSUPPORTED) => None,
            Err(status) => return Err(status.into()),
        };
        Ok(Bar { device: self.clone(), bar, window, map: PhantomData })
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
        Ok(self.device.configure_interrupts(kind, required, requested)?)
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
        Ok(self.device.resize_interrupts(count)?)
    }

    /// How many interrupts came to nobody: of vectors that were disabled, or that had no source.
    pub fn dropped_interrupts(&self) -> u64 {
        self.device.dropped_interrupts()
    }

    /// Brings the device back to its state at power-on, in the gentlest way it has. Its base
    /// addresses and interrupts are afterwards as before, and it decodes memory; it is bus master
    /// only if it has message interrupts. Takes 100 ms and more.
    ///
    /// Errors: `UNSUPPORTED` when it cannot be reset; `OFFLINE` when it does not answer afterwards.
    pub fn reset(&self) -> Result<()> {
        Ok(self.device.reset()?)
    }

    /// [`reset`](Self::reset), in one way only.
    ///
    /// Errors: as there; `UNSUPPORTED` also for a reset of the bus that would reset devices of
    /// others.
    pub fn reset_by(&self, kind: ResetType) -> Result<()> {
        Ok(self.device.reset_by(kind as u32)?)
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
    device: IOPCIDevice,
    bar: u8,
    window: Option<RegisterWindow>,
    map: PhantomData<fn() -> M>,
}

impl<M: RegisterMap> Bar<M> {
    /// Reads a register.
    pub fn read<T: RegisterValue, A: Readable>(&self, register: Register<M, T, A>) -> T {
        let offset = register.offset();
        let bits = match &self.window {
            Some(window) => window.read::<T::Bits>(offset as usize),
            None => {
                let width = size_of::<T::Bits>() as u32;
                let value = self.device.raw().bar_read(self.bar, offset, width);
                value.ok().map(T::Bits::from_u64)
            }
        };
        T::from_register(bits.unwrap_or(T::Bits::from_u64(u64::MAX)))
    }

    /// Writes a register.
    pub fn write<T: RegisterValue, A: Writable>(&self, register: Register<M, T, A>, value: T) {
        let (offset, bits) = (register.offset(), value.to_register());
        match &self.window {
            Some(window) => {
                let _ = window.write(offset as usize, bits);
            }
            None => {
                let width = size_of::<T::Bits>() as u32;
                let _ = self.device.raw().bar_write(self.bar, offset, width, bits.to_u64());
            }
        }
    }
}

impl<M> fmt::Debug for Bar<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.window.is_some() { "mapped" } else { "by calls" };
        write!(f, "Bar({}, {how})", self.bar)
    }
}
