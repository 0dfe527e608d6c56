//! What a driver can do with a real device. Run in the guest, as root, by the tests beside it.
//! BACKEND is one of `vfio-cdev`, `vfio-group`.
//!
//! ```text
//! device-check all BACKEND ADDRESS         all of `IOPCIDevice` that needs a real function
//! device-check dma-cost BACKEND ADDRESS    what preparing memory of an arena costs, beside mapping it
//! ```
//!
//! Every line that starts with `ok` is a check that passed; the exit status says whether all did.

#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::hint::black_box;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use iohost_device_backend::{Access, DeviceBackend, InterruptKind, VfioBackend};
use iohost_dispatch::Engine;
use iohost_driver::{
    Capability, DevicePowerState, DmaArena, DmaArenaOptions, Error, Exported,
    IOBufferMemoryDescriptor, IODMACommand, IODispatchQueue, IOPCIDevice, IOReturn, IOService,
    MappingOptions, MemoryDirection, Personality,
};
use iohost_driver_host::{Device, Driver, Plugin};
use iohost_pci::{Binding, PciAddress, Sysfs};

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [what, backend, address] = words[..] else { bail!(USAGE) };
    let access = [Access::Cdev, Access::Group].into_iter().find(|one| one.to_string() == backend);
    let access = access.with_context(|| format!("{backend} is neither of VFIO's backends"))?;
    match what {
        "all" => all(access, address.parse()?),
        "dma-cost" => dma_cost(access, address.parse()?),
        _ => bail!(USAGE),
    }
}

const USAGE: &str = "usage: see the first lines of this program";

struct Lender;

static DEVICE: OnceLock<IOPCIDevice> = OnceLock::new();

impl IOService for Lender {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(device: IOPCIDevice, _: &IODispatchQueue<Self>) -> iohost_driver::Result<Self> {
        let _ = DEVICE.set(device);
        Ok(Self)
    }
}

iohost_driver::export_driver!(Lender);

/// The device as a driver has it, and as the host has; to be done once.
fn lend(
    access: Access,
    address: PciAddress,
) -> Result<(&'static IOPCIDevice, Arc<dyn DeviceBackend>)> {
    let sysfs = Sysfs::default();
    sysfs.bind(address, Binding::Vfio)?;
    let backend: Arc<dyn DeviceBackend> =
        Arc::new(VfioBackend::open(&sysfs.directory(address), access)?);
    let engine = Box::leak(Box::new(Engine::start()?));
    let (device, _) = Device::take_over(backend.clone(), vec![InterruptKind::Msi])?;
    let plugin = Plugin::linked(Lender::descriptor());
    Box::leak(Box::new(Driver::start(engine, plugin, device, Arc::default())?));
    Ok((DEVICE.get().context("the driver started")?, backend))
}

/// Everything of `IOPCIDevice` that an emulated function has no configuration space for.
fn all(access: Access, address: PciAddress) -> Result<()> {
    let (device, _) = lend(access, address)?;
    ensure!(
        device.bus_device_function()? == (address.bus, address.device, address.function),
        "{:?}",
        device.bus_device_function()
    );
    println!("ok bus, device and function of {address}");

    let directory = Sysfs::default().directory(address);
    let config = fs::read(directory.join("config"))?;
    let mut list = Vec::new();
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        list.push((at as u64, config[at]));
        at = usize::from(config[at + 1]);
    }
    for (at, id) in &list {
        let first = list.iter().find(|(_, other)| other == id).context("it is in the list")?;
        let found = device.find_capability(Capability::Standard(*id), None)?;
        ensure!(found == first.0, "capability {id:#x} at {found:#x}, in sysfs at {at:#x}");
    }
    println!("ok {} capabilities, as in sysfs: {list:x?}", list.len());
    if config.len() > 256 && config[0x100..0x104] != [0; 4] {
        let id = u16::from_le_bytes([config[0x100], config[0x101]]);
        ensure!(device.find_capability(Capability::Extended(id), None)? == 0x100, "extended");
        println!("ok extended capability {id:#x}");
    }

    let sysfs = |name: &str| fs::read_to_string(directory.join(name));
    match (device.link_status(), sysfs("current_link_width")) {
        (Ok(link), Ok(width)) => {
            ensure!(width.trim() == link.width.to_string(), "{link:?}, in sysfs {width}");
            println!("ok {link:?}, could be {:?}", device.link_capabilities()?);
            let states = device.aspm_states()?;
            let set = device.set_aspm_states(states).map_err(|err| err.code());
            ensure!(set == Ok(()), "writing what is there: {set:?}");
            println!("ok {states:?} of {:?}", device.aspm_capabilities()?);
        }
        (link, _) => {
            let code = link.map_err(|err| err.code());
            ensure!(code == Err(IOReturn::UNSUPPORTED), "{code:?}");
            println!("ok no link");
        }
    }
    match device.power_state() {
        Ok(state) => {
            ensure!(state == DevicePowerState::D0, "{state:?}");
            println!("ok power state {state:?}");
        }
        Err(err) => ensure!(err.code() == IOReturn::UNSUPPORTED, "{err}"),
    }

    let everything =
        || -> Vec<u32> { (0..64).map(|dword| device.configuration_read32(4 * dword)).collect() };
    device.configuration_write8(0x3c, 0x5a);
    let before = everything();
    device.save_device_state(false)?;
    device.reset()?;
    device.configuration_write8(0x3c, 0x11);
    device.configuration_write32(0x10, 0);
    ensure!(everything() != before, "nothing to restore");
    device.restore_device_state(false)?;
    ensure!(everything() == before, "{:x?}, before {before:x?}", everything());
    println!("ok saved and restored over a reset");

    if let Ok(memory) = device.copy_device_memory(0)
        && let Ok(map) = memory.create_mapping(MappingOptions::default(), 0, 0x1000)
    {
        let mut seen = [0; 4];
        map.read_at(0, &mut seen)?;
        println!("ok BAR 0 is mapped, and begins with {:#x}", u32::from_le_bytes(seen));
        let refused = device.close().map_err(|err| err.code());
        ensure!(refused == Err(IOReturn::STILL_OPEN), "{refused:?}");
    }
    device.close()?;
    ensure!(device.configuration_read32(0) == u32::MAX, "a closed device answers");
    let command = fs::read(directory.join("config"))?[4];
    ensure!(command & 0x6 == 0, "the command register has {command:#x}");
    device.open()?;
    ensure!(device.configuration_read32(0) != u32::MAX, "an open device does not answer");
    println!("ok closed and opened");
    Ok(())
}

/// Prints what a pair costs: of preparing and completing memory of an arena, and of mapping and
/// unmapping as much.
fn dma_cost(access: Access, address: PciAddress) -> Result<()> {
    const BYTES: u64 = 4096;
    const ROUNDS: usize = 9;
    let (device, backend) = lend(access, address)?;
    let options = DmaArenaOptions { length: 1 << 20, max_address_bits: 28, huge_pages: false };
    let arena = DmaArena::create(device, options)?;
    let command = IODMACommand::create(device, 28)?;
    let mut of_arena = Some(arena.allocate(MemoryDirection::InOut, BYTES, 1)?);
    let mut own = Some(IOBufferMemoryDescriptor::create(BYTES as usize)?);
    let file = iohost_memory::SharedMemory::create(c"dma-cost", BYTES as usize)?;
    let iova = 0x0800_0000;
    let (mut ours, mut kernels, mut mapping) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(each(20_000, || pair(&command, &mut of_arena))?);
        kernels.push(each(500, || {
            let mapped = backend.dma_map(iova, &file);
            let done = mapped.and_then(|()| backend.dma_unmap(iova, BYTES));
            done.map_err(|err| Error::new(err.code(), err.to_string()))
        })?);
        mapping.push(each(500, || pair(&command, &mut own))?);
    }
    let [ours, kernels, mapping] = [ours, kernels, mapping].map(median);
    println!(
        "ok {}: arena {ours:.0} ns, VFIO map and unmap {kernels:.0} ns, ratio {:.0}; \
         a buffer of its own {mapping:.0} ns",
        backend.kind(),
        kernels / ours
    );
    Ok(())
}

/// Prepares a buffer, completes it and puts it back.
fn pair(
    command: &IODMACommand,
    buffer: &mut Option<IOBufferMemoryDescriptor>,
) -> iohost_driver::Result<()> {
    let prepared = command.prepare_for_dma(buffer.take().expect("put back each time"))?;
    black_box(prepared.address());
    *buffer = Some(prepared.complete_dma()?);
    Ok(())
}

/// Nanoseconds of one of `times` calls.
fn each(times: u32, mut call: impl FnMut() -> iohost_driver::Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..times {
        call()?;
    }
    Ok(start.elapsed().as_nanos() as f64 / f64::from(times))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
