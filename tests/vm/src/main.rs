//! Checks the VFIO backend on a real device. Run in the guest, as root, by the tests beside it.
//!
//! ```text
//! vfio-check conformance ADDRESS        binds an `edu`, runs the conformance tests, restores it
//! vfio-check refusals ADDRESS           the errors of opening and mapping that need a real kernel
//! vfio-check bus-reset ADDRESS OTHER    resets a function that cannot be reset alone
//! vfio-check borrow ADDRESS             takes a function from its driver, tries it, gives it back
//! vfio-check shared ADDRESS BLOCKER     fails to take a function whose group somebody else uses
//! vfio-check no-iommu ADDRESS           fails to take a function on a machine without an IOMMU
//! vfio-check removal ADDRESS            loses an open function
//! vfio-check interrupts ADDRESS KIND    tries the rules of interrupt sources: on an `edu` by intx
//!                                       or msi, on an `e1000e` by msi-x
//! ```
//!
//! Every line that starts with `ok` is a check that passed; the exit status says whether all did.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use iohost_device_backend::{DeviceBackend, DeviceError, InterruptKind, VfioBackend, conformance};
use iohost_interrupt_tests::{E1000eRegisters, EduRegisters, RULES, Registers, Ringing, Setup};
use iohost_memory::SharedMemory;
use iohost_pci::{PciAddress, PciError, Sysfs, VFIO_PCI};
use iohost_vfio::{ResetKind, VfioDevice, VfioError};
use nix::sys::eventfd::EventFd;

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["conformance", address] => conformance_of(address.parse()?),
        ["refusals", address] => refusals(address.parse()?),
        ["bus-reset", address, other] => bus_reset(address.parse()?, other.parse()?),
        ["borrow", address] => borrow(address.parse()?),
        ["shared", address, blocker] => shared(address.parse()?, blocker.parse()?),
        ["no-iommu", address] => no_iommu(address.parse()?),
        ["removal", address] => removal(address.parse()?),
        ["interrupts", address, "intx"] => interrupts(address.parse()?, InterruptKind::IntX),
        ["interrupts", address, "msi"] => interrupts(address.parse()?, InterruptKind::Msi),
        ["interrupts", address, "msi-x"] => interrupts(address.parse()?, InterruptKind::MsiX),
        _ => bail!("usage: see the first lines of this program"),
    }
}

fn conformance_of(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let before = sysfs.function(address)?;
    let former = sysfs.bind(address)?;
    ensure!(sysfs.function(address)?.driver.as_deref() == Some(VFIO_PCI));
    ensure!(sysfs.bind(address)?.was_bound_to_vfio(), "a second binding changes nothing");
    println!("ok bound {address}, which had {:?}", former.driver);

    let device = VfioBackend::open(&sysfs.directory(address))?;
    for (name, test) in conformance::TESTS {
        test(&device);
        println!("ok {name}");
    }
    drop(device);
    // Whatever the first user left, the second one finds a device that works.
    let device = VfioBackend::open(&sysfs.directory(address)).context("opening it again")?;
    conformance::all(&device);
    drop(device);
    println!("ok opened again, and all of that once more");

    sysfs.restore(&former)?;
    sysfs.restore(&former)?;
    ensure!(sysfs.function(address)? == before, "the function is not as it was");
    println!("ok restored");
    Ok(())
}

fn refusals(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let directory = sysfs.directory(address);
    let group = sysfs.group_of(address)?.number;

    let unbound = VfioBackend::open(&directory).unwrap_err();
    ensure!(matches!(unbound, VfioError::NodeMissing { .. }), "{unbound:?}");
    println!("ok not bound: {unbound}; next: {}", unbound.next_step());

    let absent = sysfs.bind("ffff:00:00.0".parse()?).unwrap_err();
    ensure!(matches!(absent, PciError::NoSuchDevice { .. }), "{absent:?}");
    println!("ok absent: {absent}");

    sysfs.bind(address)?;
    let device = VfioBackend::open(&directory)?;
    let busy = VfioBackend::open(&directory).unwrap_err();
    ensure!(matches!(busy, VfioError::Busy { .. }), "{busy:?}");
    println!("ok open twice: {busy}");

    let memory = SharedMemory::create(c"refusals", 0x2000)?;
    let last = *device.iova_ranges().last().context("some range")?.end();
    for (what, iova) in [("unaligned", 0x10_0800), ("window", 0xfee0_0000), ("end", last + 1)] {
        let err = device.dma_map(iova, &memory).unwrap_err();
        ensure!(matches!(err, DeviceError::Refused { .. }), "{what}: {err:?}");
        println!("ok {what}: {err}");
    }
    device.config_write(0x04, &[0, 0])?;
    let off = device.bar_read(0, 0, &mut [0; 4]).unwrap_err();
    ensure!(matches!(off, DeviceError::Refused { .. }), "{off:?}");
    let off = device.bar_read(0, 0x80, &mut [0; 8]).unwrap_err();
    ensure!(matches!(off, DeviceError::Refused { .. }), "{off:?}");
    println!("ok memory decoding is off: {off}");
    drop(device);

    // From here on as an ordinary user who owns nothing yet.
    let node = PathBuf::from(format!("/dev/vfio/{group}"));
    let other = PathBuf::from("/dev/vfio/vfio");
    std::os::unix::fs::chown(&other, Some(1000), Some(1000))?;
    nix::unistd::setresuid(1000.into(), 1000.into(), 0.into())?;
    let denied = VfioBackend::open(&directory).unwrap_err();
    ensure!(matches!(denied, VfioError::Permission { .. }), "{denied:?}");
    println!("ok denied: {denied}; next: {}", denied.next_step());
    let denied =
        sysfs.restore(&iohost_pci::Former { address, driver: None, driver_override: None });
    let denied = denied.unwrap_err();
    ensure!(matches!(denied, PciError::Permission { .. }), "{denied:?}");
    println!("ok denied: {denied}; next: {}", denied.next_step());

    nix::unistd::seteuid(0.into())?;
    std::os::unix::fs::chown(&node, Some(1000), Some(1000))?;
    nix::unistd::setresuid(1000.into(), 1000.into(), 1000.into())?;
    let device = VfioBackend::open(&directory).context("opening it as its owner")?;
    let big = SharedMemory::create(c"refusals", 16 << 20)?;
    let locked = device.dma_map(0x10_0000, &big).unwrap_err();
    ensure!(
        matches!(locked, DeviceError::LockedMemory { need: 0x100_0000, have: 0x80_0000, .. }),
        "{locked:?}"
    );
    println!("ok locked memory: {locked}");
    conformance::all(&device);
    println!("ok an ordinary user passes the conformance tests");
    Ok(())
}

fn bus_reset(address: PciAddress, other: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    sysfs.bind(address)?;
    sysfs.bind(other)?;
    let device = VfioDevice::open(&sysfs.directory(address))?;
    let kind = device.reset()?;
    ensure!(kind == ResetKind::Bus, "{kind:?}");
    println!("ok reset {kind:?}");
    drop(device);
    let device = VfioBackend::open(&sysfs.directory(address))?;
    conformance::all(&device);
    println!("ok the conformance tests pass on {address}");
    Ok(())
}

fn borrow(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let before = sysfs.function(address)?;
    let former = sysfs.bind(address)?;
    let device = VfioBackend::open(&sysfs.directory(address))?;
    for index in 0..=6 {
        if let Some(bar) = device.bar(index) {
            println!("   BAR {index}: {bar:x?}");
            for range in &bar.mappable {
                device.map_bar(index, range.clone())?;
            }
        }
    }
    for kind in [InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX] {
        let count = device.interrupt_count(kind);
        println!("   {count} {kind}");
        let triggers: Vec<EventFd> =
            (0..count).map(|_| EventFd::new()).collect::<Result<_, _>>()?;
        let triggers: Vec<_> = triggers.iter().map(AsFd::as_fd).collect();
        // All, fewer, all again: the number of vectors can change.
        for count in [count, count / 2, count] {
            if count > 0 {
                device.enable_interrupts(kind, &triggers[..count as usize])?;
            }
        }
    }
    device.reset()?;
    drop(device);
    sysfs.restore(&former)?;
    ensure!(sysfs.function(address)? == before, "the function is not as it was");
    println!("ok borrowed {address} from {:?} and gave it back", before.driver);
    Ok(())
}

fn shared(address: PciAddress, blocker: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let refused = sysfs.bind(address).unwrap_err();
    let PciError::GroupNotViable { ref blockers, .. } = refused else { bail!("{refused:?}") };
    ensure!(blockers.len() == 1 && blockers[0].address == blocker, "{refused}");
    println!("ok {refused}; next: {}", refused.next_step());

    // By hand, as somebody else might do it: now VFIO has to refuse.
    let directory = sysfs.directory(address);
    fs::write(directory.join("driver_override"), VFIO_PCI)?;
    fs::write("/sys/bus/pci/drivers_probe", address.to_string())?;
    let refused = VfioBackend::open(&directory).unwrap_err();
    println!("ok {refused}; next: {}", refused.next_step());
    ensure!(matches!(refused, VfioError::NotViable { .. }), "{refused:?}");
    Ok(())
}

fn no_iommu(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let refused = sysfs.bind(address).unwrap_err();
    ensure!(matches!(refused, PciError::NoIommu { .. }), "{refused:?}");
    println!("ok {refused}; next: {}", refused.next_step());
    let refused = VfioBackend::open(&sysfs.directory(address)).unwrap_err();
    ensure!(matches!(refused, VfioError::NoIommu { .. }), "{refused:?}");
    println!("ok {refused}; next: {}", refused.next_step());
    Ok(())
}

fn removal(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let former = sysfs.bind(address)?;
    let directory = sysfs.directory(address);
    let device = VfioBackend::open(&directory)?;
    let remove = directory.join("remove");
    let removal = std::thread::spawn(move || fs::write(remove, "1"));
    // The kernel waits until the device is closed.
    while !some_thread_waits_in("vfio_unregister_group_dev")? {
        ensure!(!removal.is_finished(), "the removal did not wait for the device to be closed");
        std::thread::yield_now();
    }
    drop(device);
    removal.join().expect("the writer does not panic")?;
    ensure!(!directory.exists(), "{} is still there", directory.display());
    println!("ok removed while it was open");
    let gone = sysfs.restore(&former).unwrap_err();
    ensure!(matches!(gone, PciError::NoSuchDevice { .. }), "{gone:?}");
    println!("ok {gone}");
    Ok(())
}

fn interrupts(address: PciAddress, kind: InterruptKind) -> Result<()> {
    let sysfs = Sysfs::default();
    let former = sysfs.bind(address)?;
    let vectors = VfioBackend::open(&sysfs.directory(address))?.interrupt_count(kind);
    let rules = RULES.iter().filter(|rule| rule.is_for(kind, vectors));
    let mut tried = 0;
    for rule in rules {
        let device = VfioBackend::open(&sysfs.directory(address))?;
        let registers: Box<dyn Registers> = match kind {
            InterruptKind::IntX | InterruptKind::Msi => Box::new(EduRegisters),
            InterruptKind::MsiX => Box::new(E1000eRegisters),
        };
        let device = Arc::new(Ringing::new(Box::new(device), registers));
        (rule.test)(&Setup { device, kind });
        println!("ok {} by {kind}", rule.name);
        tried += 1;
    }
    ensure!(tried > 0, "no rule is for {vectors} vectors of {kind}");
    println!("ok {tried} rules by {kind}, of which the device has {vectors}");
    sysfs.restore(&former)?;
    Ok(())
}

fn some_thread_waits_in(function: &str) -> Result<bool> {
    for thread in fs::read_dir("/proc/self/task")? {
        if fs::read_to_string(thread?.path().join("wchan"))? == function {
            return Ok(true);
        }
    }
    Ok(false)
}
