//! Checks the VFIO backend on a real device; for a guest, as root.
//!
//!     vfio conformance ADDRESS        binds an `edu`, runs the conformance tests, restores it
//!     vfio refusals ADDRESS           the errors of opening and mapping that need a real kernel
//!     vfio bus-reset ADDRESS OTHER    resets a function that cannot be reset alone
//!
//! Every line that starts with `ok` is a check that passed; the exit status says whether all did.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use iohost_device_backend::{DeviceBackend, DeviceError, VfioBackend, conformance};
use iohost_memory::SharedMemory;
use iohost_pci::{PciAddress, PciError, Sysfs, VFIO_PCI};
use iohost_vfio::{ResetKind, VfioDevice, VfioError};

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["conformance", address] => conformance_of(address.parse()?),
        ["refusals", address] => refusals(address.parse()?),
        ["bus-reset", address, other] => bus_reset(address.parse()?, other.parse()?),
        _ => bail!("usage: vfio conformance ADDRESS | refusals ADDRESS | bus-reset ADDRESS OTHER"),
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
    println!("   {device:?}");
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
