//! A driver that lends its queue, its interrupt and its device to the benchmarks.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use iohost_device_backend::{DeviceBackend, InterruptKind};
use iohost_device_models::{Function, edu};
use iohost_dispatch::Engine;
use iohost_driver::{
    Exported, IODispatchQueue, IODispatchSource, IOInterruptDispatchSource, IOPCIDevice, IOService,
    InterruptType, Personality,
};
use iohost_driver_host::{Device, Driver, Plugin};
use iohost_memory::SharedMemory;
use iohost_memory::flight_recorder::Recorder;
use iohost_testkit::FakeDevice;

use crate::latency::Handled;

pub struct Lender {
    /// Owned, so that it stays.
    _interrupt: IOInterruptDispatchSource,
}

/// A driver's queue and its device, which interrupts.
pub struct Lent {
    pub queue: &'static IODispatchQueue<Lender>,
    pub function: Arc<Function<edu::Edu>>,
}

/// When the handler of the driver's interrupt ran last.
pub static HANDLED: Handled = Handled::not_yet();

static DEFAULT_QUEUE: OnceLock<IODispatchQueue<Lender>> = OnceLock::new();
static DEVICE: OnceLock<IOPCIDevice> = OnceLock::new();

/// Starts the driver on an emulated device; to be done once. It ends with the process.
pub fn lend() -> Result<Lent> {
    let function = Arc::new(Function::new(edu::Edu::new(edu::Timing::Immediate)));
    lend_to(Arc::new(FakeDevice::new(function.clone())))?;
    let queue = DEFAULT_QUEUE.get().context("the driver started")?;
    Ok(Lent { queue, function })
}

/// The same on a device whose BAR 0 is memory.
pub fn lend_device(bar: SharedMemory) -> Result<&'static IOPCIDevice> {
    let function = Arc::new(Function::new(edu::Edu::new(edu::Timing::Immediate)));
    lend_to(Arc::new(FakeDevice::new(function).with_memory(0, bar)))
}

/// The same on any device.
pub fn lend_to(device: Arc<dyn DeviceBackend>) -> Result<&'static IOPCIDevice> {
    start_on::<Lender>(device, InterruptKind::Msi)?;
    DEVICE.get().context("the driver started")
}

/// Starts a driver as the driver host does, but linked. It ends with the process.
pub fn start_on<D: Exported>(
    device: Arc<dyn DeviceBackend>,
    interrupts: InterruptKind,
) -> Result<Arc<Driver>> {
    let recorder = Recorder::create()?;
    recorder.watch();
    let engine = Box::leak(Box::new(Engine::start_recorded(Arc::new(recorder))?));
    let (device, _) = Device::take_over(device, vec![interrupts])?;
    let plugin = Plugin::linked(D::descriptor());
    let driver = Arc::new(Driver::start(engine, plugin, device, Arc::default())?);
    // One more, which is never dropped.
    std::mem::forget(driver.clone());
    Ok(driver)
}

impl IOService for Lender {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> iohost_driver::Result<Self> {
        device.configure_interrupts(InterruptType::Messaged, 1, 1)?;
        let interrupt = IOInterruptDispatchSource::create(&device, 0, queue, |_: &mut Self, _| {
            HANDLED.now();
        })?;
        interrupt.set_enable(true)?;
        let _ = DEFAULT_QUEUE.set(queue.clone());
        let _ = DEVICE.set(device);
        Ok(Self { _interrupt: interrupt })
    }
}

iohost_driver::export_driver!(Lender, linked);
