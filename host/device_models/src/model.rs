//! What a device has to say for itself, and what it may do.

use std::time::{Duration, Instant};

use crate::config_space::ConfigSpace;
use crate::dma::DmaTable;
use crate::faults::Faults;
use crate::interrupt::Interrupts;

/// The part of an emulated device that is not common to all PCI functions.
///
/// Thread: the methods run one at a time, on whichever thread made the access or on the
/// function's own timer thread. None may block.
pub trait DeviceModel: Send + 'static {
    /// What configuration space says at power-on. Asked for once.
    fn identity(&self) -> Identity;

    /// Fills `data` with what a read of that width gives. The access lies inside the BAR; its
    /// width and alignment are whatever the driver chose.
    fn bar_read(&mut self, bus: &mut Bus<'_>, bar: u8, offset: u64, data: &mut [u8]);

    /// Takes a write, likewise.
    fn bar_write(&mut self, bus: &mut Bus<'_>, bar: u8, offset: u64, data: &[u8]);

    /// A time set with [`Bus::call_after`] has come.
    fn time_has_come(&mut self, bus: &mut Bus<'_>, what: u32);

    /// The function was reset: configuration space is at power-on and no interrupt is enabled.
    fn reset(&mut self, bus: &mut Bus<'_>);
}

/// A PCI function's identity and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Configuration space 0x00.
    pub vendor: u16,
    /// Configuration space 0x02.
    pub device: u16,
    /// Configuration space 0x2c.
    pub subsystem_vendor: u16,
    /// Configuration space 0x2e.
    pub subsystem: u16,
    /// Base class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Configuration space 0x08.
    pub revision: u8,
    /// The base address registers.
    pub bars: [Option<BarSpec>; 6],
    /// Whether there is an INTx line, on pin A.
    pub intx: bool,
    /// MSI vectors: 0, or a power of two up to 32.
    pub msi_vectors: u8,
    /// MSI-X, if the function has it.
    pub msi_x: Option<MsiXSpec>,
}

/// An MSI-X capability. Behind VFIO and vfio-user the table is the host's affair, so that nothing
/// of it is emulated: the model's BAR only has to have the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiXSpec {
    /// Vectors: 1 to 2048.
    pub vectors: u16,
    /// The BAR with the table and the pending bits.
    pub bar: u8,
    /// Offset of the table in it, a multiple of 8: 16 bytes per vector.
    pub table: u32,
    /// Offset of the pending bits in it, a multiple of 8: a bit per vector, in whole 8 bytes.
    pub pending: u32,
}

/// A 32-bit memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Bytes: a power of two, at least 16.
    pub size: u32,
}

/// A device's way to memory, to its driver and to the clock.
#[derive(Debug)]
pub struct Bus<'a> {
    pub(crate) config: &'a mut ConfigSpace,
    pub(crate) dma: &'a mut DmaTable,
    pub(crate) interrupts: &'a mut Interrupts,
    pub(crate) faults: &'a mut Faults,
    pub(crate) timers: &'a mut Vec<(Instant, u32)>,
}

impl Bus<'_> {
    /// Reads memory. Bytes at addresses that no mapping names, or all of them while the function
    /// is not bus master, come back as zeros; the transfer then counts as blocked.
    pub fn dma_read(&mut self, iova: u64, data: &mut [u8]) {
        match self.config.is_bus_master() {
            true => {
                let (iova, len) = self.faults.transfer(iova, data.len());
                let (moved, left) = data.split_at_mut(len);
                left.fill(0);
                self.dma.read(iova, moved);
            }
            false => {
                data.fill(0);
                self.dma.block(iova, data.len(), "not bus master");
            }
        }
    }

    /// Writes memory. Bytes for addresses that no mapping names, or all of them while the
    /// function is not bus master, are dropped; the transfer then counts as blocked.
    pub fn dma_write(&mut self, iova: u64, data: &[u8]) {
        match self.config.is_bus_master() {
            true => {
                let (iova, len) = self.faults.transfer(iova, data.len());
                self.dma.write(iova, &data[..len]);
            }
            false => self.dma.block(iova, data.len(), "not bus master"),
        }
    }

    /// Whether the driver uses message signalled interrupts; the INTx line is then dead.
    pub fn msi_enabled(&self) -> bool {
        self.config.msi_enabled()
    }

    /// Sends a message. Lost unless MSI is enabled, the vector has a trigger and the function is
    /// bus master: a message is a write to memory.
    pub fn send_msi(&mut self, vector: u8) {
        if self.config.msi_enabled() && self.config.is_bus_master() {
            (0..self.faults.interrupts()).for_each(|_| self.interrupts.send_msi(vector));
        }
    }

    /// Whether the driver uses MSI-X; the INTx line is then dead.
    pub fn msi_x_enabled(&self) -> bool {
        self.config.msi_x_enabled()
    }

    /// Sends a message of MSI-X. Lost as one of [`send_msi`](Self::send_msi) is.
    pub fn send_msi_x(&mut self, vector: u16) {
        if self.config.msi_x_enabled() && self.config.is_bus_master() {
            (0..self.faults.interrupts()).for_each(|_| self.interrupts.send_msi_x(vector));
        }
    }

    /// Asserts the INTx line until [`deassert_intx`](Self::deassert_intx).
    pub fn assert_intx(&mut self) {
        if self.faults.interrupts() == 0 {
            return;
        }
        self.config.set_intx_pending(true);
        self.update_intx();
    }

    /// Lets go of the INTx line.
    pub fn deassert_intx(&mut self) {
        self.config.set_intx_pending(false);
        self.update_intx();
    }

    /// Has [`DeviceModel::time_has_come`] called with `what`, once, on the function's timer
    /// thread, not before `delay` has passed.
    pub fn call_after(&mut self, delay: Duration, what: u32) {
        self.timers.push((Instant::now() + delay, what));
    }

    /// Shows the level of the line, after the switches in configuration space, to the interrupt
    /// state.
    pub(crate) fn update_intx(&mut self) {
        self.interrupts.set_line(self.config.drives_intx());
    }
}
