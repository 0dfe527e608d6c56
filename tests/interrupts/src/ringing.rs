//! Devices that interrupt when they are told to.

use std::fs;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use iohost_device_backend::{
    BarInfo, DeviceBackend, DeviceError, DeviceEvent, InterruptKind, Reset, ResetLevel,
};
use iohost_device_models::bells;
use iohost_memory::SharedMemory;
use iohost_registers::MappedRegion;

/// How long a device may take for an interrupt before it counts as lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The registers by which a device is told to interrupt. The device is bus master and decodes
/// memory.
pub trait Registers: Send + Sync {
    /// Makes the device quiet before its interrupts are enabled, where a reset of its function
    /// does not.
    fn prepare(&self, _device: &dyn DeviceBackend) {}

    /// Returns when the device has done with the messages it was told to send.
    fn rest(&self) {}

    /// Sends the message of a vector, which may be under way when this returns.
    fn send(&self, device: &dyn DeviceBackend, vector: u32);

    /// The same, after a shorter rest: for who waits for each message, and disables nothing
    /// soon after.
    fn send_at_once(&self, device: &dyn DeviceBackend, vector: u32) {
        self.send(device, vector);
    }

    /// Asserts the INTx line.
    fn assert_line(&self, device: &dyn DeviceBackend);

    /// Lets go of it.
    fn deassert_line(&self, device: &dyn DeviceBackend);
}

/// A device with its registers: a [`DeviceBackend`] that knows what its interrupts signal.
pub struct Ringing {
    device: Box<dyn DeviceBackend>,
    registers: Box<dyn Registers>,
    triggers: Mutex<Vec<OwnedFd>>,
}

impl Ringing {
    /// A device of which `registers` are the ones.
    pub fn new(device: Box<dyn DeviceBackend>, registers: Box<dyn Registers>) -> Self {
        Self { device, registers, triggers: Mutex::default() }
    }

    /// Sends the message of a vector; returns when its eventfd has it.
    pub(crate) fn send(&self, vector: u32) {
        let before = self.count(vector);
        self.post(vector);
        await_that(|| self.count(vector) > before, "the message to arrive");
    }

    /// As [`send`](Self::send), for who disables nothing soon after.
    pub(crate) fn send_at_once(&self, vector: u32) {
        let before = self.count(vector);
        self.post_at_once(vector);
        await_that(|| self.count(vector) > before, "the message to arrive");
    }

    /// As [`post`](Self::post), for who waits for the message, and disables nothing soon after.
    pub(crate) fn post_at_once(&self, vector: u32) {
        self.registers.send_at_once(&*self.device, vector);
    }

    /// As [`send`](Self::send), but does not wait: for messages that are taken or lost on their way.
    pub(crate) fn post(&self, vector: u32) {
        self.registers.send(&*self.device, vector);
    }

    /// Asserts the line; returns when its eventfd says so.
    pub(crate) fn interrupt_by_line(&self) {
        self.assert_line();
        await_that(|| self.count(0) > 0, "the line to interrupt");
    }

    /// Asserts the line, which may be masked.
    pub(crate) fn assert_line(&self) {
        self.registers.assert_line(&*self.device);
    }

    pub(crate) fn deassert_line(&self) {
        self.registers.deassert_line(&*self.device);
    }

    /// What stands in a vector's eventfd, without taking it (proc_pid_fdinfo(5)).
    fn count(&self, vector: u32) -> u64 {
        let triggers = self.triggers.lock().unwrap();
        let Some(trigger) = triggers.get(vector as usize) else { return 0 };
        let path = format!("/proc/self/fdinfo/{}", trigger.as_raw_fd());
        let text = fs::read_to_string(path).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("eventfd-count:")).unwrap();
        u64::from_str_radix(count.trim(), 16).unwrap()
    }
}

/// Waits for something that another thread or a device does.
fn await_that(condition: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::yield_now();
    }
}

/// Those of the emulated [`bells`].
#[derive(Debug)]
pub struct BellsRegisters;

impl Registers for BellsRegisters {
    fn send(&self, device: &dyn DeviceBackend, vector: u32) {
        write(device, bells::MESSAGE, vector);
    }

    fn assert_line(&self, device: &dyn DeviceBackend) {
        write(device, bells::LINE, 1);
    }

    fn deassert_line(&self, device: &dyn DeviceBackend) {
        write(device, bells::LINE, 0);
    }
}

/// Those of QEMU's `edu`, for its line and its one MSI: a write raises a cause (QEMU,
/// `docs/specs/edu.rst`), and each time sends one message.
#[derive(Debug)]
pub struct EduRegisters;

impl EduRegisters {
    const RAISE: u64 = 0x60;
    const ACKNOWLEDGE: u64 = 0x64;
}

impl Registers for EduRegisters {
    fn send(&self, device: &dyn DeviceBackend, _vector: u32) {
        write(device, Self::RAISE, 1);
        write(device, Self::ACKNOWLEDGE, u32::MAX);
    }

    fn assert_line(&self, device: &dyn DeviceBackend) {
        write(device, Self::RAISE, 1);
    }

    fn deassert_line(&self, device: &dyn DeviceBackend) {
        write(device, Self::ACKNOWLEDGE, u32::MAX);
    }
}

/// Those of QEMU's `e1000e`, for MSI-X, by which each cause has a vector of its own. (By MSI its
/// throttling repeats messages, so that they cannot be counted.)
///
/// Source: Intel 82574 GbE Controller Family Datasheet, revision 3.4, sections 7.4 (interrupts) and
/// 10.2.4 (their registers).
#[derive(Debug)]
pub struct E1000eRegisters;

impl E1000eRegisters {
    /// Interrupt cause read; writing ones clears.
    const ICR: u64 = 0xc0;
    /// Interrupt cause set.
    const ICS: u64 = 0xc8;
    /// Interrupt mask set.
    const IMS: u64 = 0xd0;
    /// Causes that a message clears and masks, so that it is sent once.
    const EIAC: u64 = 0xdc;
    /// Which vector a cause has: 4 bits each, of which the highest says that it has one.
    const IVAR: u64 = 0xe4;

    /// The shortest interval between two messages of a vector, which QEMU imposes: 500 * 256 ns.
    const THROTTLE: Duration = Duration::from_micros(128);

    /// Causes 20 to 24: receive queues 0 and 1, transmit queues 0 and 1, other.
    const FIRST_CAUSE: u32 = 20;
    const CAUSES: u32 = 0b1_1111 << Self::FIRST_CAUSE;
    /// Cause 20 has vector 0, and so on.
    const VECTORS: u32 = 0x000c_ba98;

    fn raise(device: &dyn DeviceBackend, cause: u32) {
        write(device, Self::IVAR, Self::VECTORS);
        write(device, Self::EIAC, Self::CAUSES);
        write(device, Self::IMS, Self::CAUSES);
        write(device, Self::ICS, cause);
    }
}

impl Registers for E1000eRegisters {
    fn prepare(&self, device: &dyn DeviceBackend) {
        // QEMU does nothing at a reset by power management, which is all that this device has, so a
        // cause can still stand that was raised while MSI-X was disabled.
        write(device, Self::ICR, Self::CAUSES);
    }

    fn rest(&self) {
        // What the device is spacing out shows nowhere, and QEMU 7.2 dies of a message that falls
        // due after MSI-X was disabled: so this waits many times the interval.
        std::thread::sleep(Self::THROTTLE * 40);
    }

    fn send(&self, device: &dyn DeviceBackend, vector: u32) {
        self.rest();
        Self::raise(device, 1 << (Self::FIRST_CAUSE + vector));
    }

    fn send_at_once(&self, device: &dyn DeviceBackend, vector: u32) {
        // A message that had to wait for the interval is one that QEMU 7.2 sends again later.
        std::thread::sleep(Self::THROTTLE * 12);
        Self::raise(device, 1 << (Self::FIRST_CAUSE + vector));
    }

    fn assert_line(&self, device: &dyn DeviceBackend) {
        Self::raise(device, 1 << Self::FIRST_CAUSE);
    }

    fn deassert_line(&self, device: &dyn DeviceBackend) {
        write(device, Self::ICR, Self::CAUSES);
    }
}

fn write(device: &dyn DeviceBackend, register: u64, value: u32) {
    device.bar_write(0, register, &value.to_le_bytes()).unwrap();
}

impl DeviceBackend for Ringing {
    fn kind(&self) -> &'static str {
        self.device.kind()
    }

    fn is_isolated(&self) -> bool {
        self.device.is_isolated()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), DeviceError> {
        self.device.config_read(offset, data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), DeviceError> {
        self.device.config_write(offset, data)
    }

    fn bar(&self, index: u8) -> Option<&BarInfo> {
        self.device.bar(index)
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) -> Result<(), DeviceError> {
        self.device.bar_read(index, offset, data)
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.device.bar_write(index, offset, data)
    }

    fn map_bar(&self, index: u8, range: Range<u64>) -> Result<MappedRegion, DeviceError> {
        self.device.map_bar(index, range)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.device.interrupt_count(kind)
    }

    fn enable_interrupts(
        &self,
        kind: InterruptKind,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        self.registers.prepare(&*self.device);
        let copies = triggers.iter().map(|trigger| trigger.try_clone_to_owned().unwrap());
        *self.triggers.lock().unwrap() = copies.collect();
        self.device.enable_interrupts(kind, triggers)
    }

    fn change_triggers(
        &self,
        kind: InterruptKind,
        first: u32,
        triggers: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let mut copies = self.triggers.lock().unwrap();
        for (place, trigger) in (first as usize..).zip(triggers) {
            copies[place] = trigger.try_clone_to_owned().unwrap();
        }
        self.device.change_triggers(kind, first, triggers)
    }

    fn disable_interrupts(&self, kind: InterruptKind) -> Result<(), DeviceError> {
        self.registers.rest();
        self.triggers.lock().unwrap().clear();
        self.device.disable_interrupts(kind)
    }

    fn unmask_intx(&self) -> Result<(), DeviceError> {
        self.device.unmask_intx()
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
        self.device.dma_map_part(iova, memory, part)
    }

    fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), DeviceError> {
        self.device.dma_unmap(iova, len)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.registers.rest();
        self.device.reset()
    }

    fn resets(&self) -> Vec<Reset> {
        self.device.resets()
    }

    fn reset_by(&self, level: ResetLevel) -> Result<(), DeviceError> {
        self.registers.rest();
        self.device.reset_by(level)
    }

    fn posted_writes_take(&self) -> Duration {
        self.device.posted_writes_take()
    }

    fn watch(&self, event: DeviceEvent, trigger: BorrowedFd<'_>) -> Result<bool, DeviceError> {
        self.device.watch(event, trigger)
    }
}

impl std::fmt::Debug for Ringing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ringing").field(&self.device).finish()
    }
}
