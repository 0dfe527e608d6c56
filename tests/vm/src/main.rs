//! Checks the backends on a real device. Run in the guest, as root, by the tests beside it.
//! BACKEND is one of `vfio-cdev`, `vfio-group`, `vfio-no-iommu`, `uio`.
//!
//! ```text
//! vfio-check conformance BACKEND ADDRESS       binds an `edu`, runs the conformance tests, restores it
//! vfio-check best BACKEND ADDRESS              the best way that VFIO has to a function is this one
//! vfio-check refusals BACKEND ADDRESS          the errors of opening and mapping that need a real kernel
//! vfio-check not-open BACKEND ADDRESS WORDS    opening a function that VFIO has fails with these words
//! vfio-check bus-reset BACKEND ADDRESS OTHER   resets a function that cannot be reset alone
//! vfio-check borrow ADDRESS                    takes a function from its driver, tries it, gives it back
//! vfio-check shared BACKEND ADDRESS BLOCKER    fails to take a function whose group somebody else uses
//! vfio-check no-iommu ADDRESS                  fails to take a function on a machine without an IOMMU
//! vfio-check removal BACKEND ADDRESS           loses an open function
//! vfio-check interrupts BACKEND ADDRESS KIND   tries the rules of interrupt sources: on an `edu` by intx or msi,
//!                                              on an `e1000e` by msi-x
//! vfio-check resize BACKEND ADDRESS ROUNDS     resizes the vectors of an `e1000e` under interrupts
//! vfio-check watch SERVICE                     prints `began` and `ended REASON` of a service, as they come
//! vfio-check bind-forever ADDRESS STATE        takes a function and gives it back until it is killed
//! vfio-check settle ADDRESS STATE              gives back what one that was killed left of that
//! vfio-check take ADDRESS STATE                takes a function for VFIO and leaves it so
//! vfio-check give-back ADDRESS STATE           gives it back
//! ```
//!
//! Every line that starts with `ok` is a check that passed; the exit status says whether all did.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use iohost_client::{DEFAULT_SOCKET, Daemon, EventKind};
use iohost_device_backend::{
    Access, DeviceBackend, DeviceError, InterruptKind, UioBackend, UioError, VfioBackend,
    conformance,
};
use iohost_interrupt_tests::{
    E1000eRegisters, EduRegisters, RULES, Registers, Ringing, Setup, resize_rounds,
};
use iohost_memory::SharedMemory;
use iohost_pci::{Binder, Binding, Order, PciAddress, PciError, Sysfs, VFIO_PCI};
use iohost_vfio::{ResetKind, VfioDevice, VfioError};
use nix::sys::eventfd::EventFd;

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["conformance", backend, address] => conformance_of(way(backend)?, address.parse()?),
        ["best", backend, address] => best(way(backend)?, address.parse()?),
        ["refusals", backend, address] => refusals(access(backend)?, address.parse()?),
        ["not-open", backend, address, words] => not_open(way(backend)?, address.parse()?, words),
        ["bus-reset", backend, address, other] => {
            bus_reset(access(backend)?, address.parse()?, other.parse()?)
        }
        ["borrow", address] => borrow(address.parse()?),
        ["shared", backend, address, blocker] => {
            shared(access(backend)?, address.parse()?, blocker.parse()?)
        }
        ["no-iommu", address] => no_iommu(address.parse()?),
        ["removal", backend, address] => removal(way(backend)?, address.parse()?),
        ["interrupts", backend, address, kind] => {
            let kind = match kind {
                "intx" => InterruptKind::IntX,
                "msi" => InterruptKind::Msi,
                "msi-x" => InterruptKind::MsiX,
                _ => bail!("{kind} is no kind of interrupt"),
            };
            interrupts(way(backend)?, address.parse()?, kind)
        }
        ["resize", backend, address, rounds] => {
            resize(way(backend)?, address.parse()?, rounds.parse()?)
        }
        ["watch", service] => watch(service),
        ["bind-forever", address, state] => bind_forever(address.parse()?, state),
        ["settle", address, state] => settle(address.parse()?, state),
        ["take", address, state] => take(&Binder::new(Sysfs::default(), state), address.parse()?),
        ["give-back", address, state] => {
            Binder::new(Sysfs::default(), state).give_back(address.parse()?, true)?;
            Ok(())
        }
        _ => bail!("usage: see the first lines of this program"),
    }
}

/// A way to a device; `None` is UIO.
type Way = Option<Access>;

fn way(backend: &str) -> Result<Way> {
    if backend == "uio" { Ok(None) } else { access(backend).map(Some) }
}

fn access(backend: &str) -> Result<Access> {
    let all = [Access::Cdev, Access::Group, Access::NoIommu];
    let found = all.into_iter().find(|access| access.to_string() == backend);
    found.with_context(|| format!("{backend} is no backend of VFIO"))
}

fn binding(way: Way) -> Binding {
    match way {
        Some(Access::Cdev | Access::Group) => Binding::Vfio,
        Some(Access::NoIommu) => Binding::VfioNoIommu,
        None => Binding::Uio,
    }
}

fn open(way: Way, directory: &Path) -> Result<Box<dyn DeviceBackend>> {
    Ok(match way {
        Some(access) => Box::new(VfioBackend::open(directory, access)?),
        None => Box::new(UioBackend::open(directory)?),
    })
}

fn conformance_of(way: Way, address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let before = sysfs.function(address)?;
    let former = sysfs.bind(address, binding(way))?;
    let again = sysfs.bind(address, binding(way))?;
    ensure!(again.driver.as_deref() == Some(binding(way).driver()), "it is bound to {again:?}");
    println!("ok bound {address}, which had {:?}", former.driver);

    let device = open(way, &sysfs.directory(address))?;
    println!("ok opened {}", device.kind());
    for (name, test) in conformance::TESTS {
        test(&*device);
        println!("ok {name}");
    }
    drop(device);
    // Whatever the first user left, the second one finds a device that works.
    let device = open(way, &sysfs.directory(address)).context("opening it again")?;
    conformance::all(&*device);
    drop(device);
    println!("ok opened again, and all of that once more");

    sysfs.restore(&former)?;
    sysfs.restore(&former)?;
    let after = sysfs.function(address)?;
    ensure!(after == before, "the function is not as it was: {after:?}");
    println!("ok restored");
    Ok(())
}

fn best(way: Way, address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let former = sysfs.bind(address, Binding::Vfio)?;
    let best = Access::best(&sysfs.directory(address));
    ensure!(Some(best) == way, "{best}");
    println!("ok the best way is {best}");
    sysfs.restore(&former)?;
    Ok(())
}

fn not_open(way: Way, address: PciAddress, words: &str) -> Result<()> {
    let sysfs = Sysfs::default();
    let Some(refused) = open(way, &sysfs.directory(address)).err() else {
        bail!("{address} was opened");
    };
    let next = match refused.downcast_ref::<VfioError>() {
        Some(refused) => refused.next_step(),
        None => refused.downcast_ref::<UioError>().context("another error")?.next_step(),
    };
    let text = format!("{refused}; next: {next}");
    ensure!(text.contains(words), "{text}");
    println!("ok {text}");
    Ok(())
}

fn refusals(access: Access, address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let directory = sysfs.directory(address);
    let group = sysfs.group_of(address)?.number;

    let unbound = VfioBackend::open(&directory, access).unwrap_err();
    ensure!(
        matches!(unbound, VfioError::NodeMissing { .. } | VfioError::NotBound { .. }),
        "{unbound:?}"
    );
    println!("ok not bound: {unbound}; next: {}", unbound.next_step());

    let absent = sysfs.bind("ffff:00:00.0".parse()?, Binding::Vfio).unwrap_err();
    ensure!(matches!(absent, PciError::NoSuchDevice { .. }), "{absent:?}");
    println!("ok absent: {absent}");

    sysfs.bind(address, Binding::Vfio)?;
    let device = VfioBackend::open(&directory, access)?;
    // In whichever way it is tried the second time.
    let mut ways = vec![access];
    if Access::best(&directory) == Access::Cdev {
        ways = vec![Access::Cdev, Access::Group];
    }
    for second in ways {
        let busy = VfioBackend::open(&directory, second).unwrap_err();
        ensure!(matches!(busy, VfioError::Busy { .. }), "{second}: {busy:?}");
        println!("ok open twice, by {second}: {busy}");
    }

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
    let (node, other) = match access {
        Access::Cdev => {
            let mut entries = fs::read_dir(directory.join("vfio-dev"))?;
            let name = entries.next().context("no entry in vfio-dev")??.file_name();
            (Path::new("/dev/vfio/devices").join(name), PathBuf::from("/dev/iommu"))
        }
        _ => (PathBuf::from(format!("/dev/vfio/{group}")), PathBuf::from("/dev/vfio/vfio")),
    };
    std::os::unix::fs::chown(&other, Some(1000), Some(1000))?;
    nix::unistd::setresuid(1000.into(), 1000.into(), 0.into())?;
    let denied = VfioBackend::open(&directory, access).unwrap_err();
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
    let device = VfioBackend::open(&directory, access).context("opening it as its owner")?;
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

fn bus_reset(access: Access, address: PciAddress, other: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let directory = sysfs.directory(address);
    sysfs.bind(address, Binding::Vfio)?;
    sysfs.bind(other, Binding::Vfio)?;
    let device = VfioDevice::open(&directory, access)?;
    let kind = device.reset()?;
    ensure!(kind == ResetKind::Bus, "{kind:?}");
    println!("ok reset {kind:?}");
    drop(device);
    let device = VfioBackend::open(&directory, access)?;
    conformance::all(&device);
    println!("ok the conformance tests pass on {address}");
    Ok(())
}

fn borrow(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let before = sysfs.function(address)?;
    let former = sysfs.bind(address, Binding::Vfio)?;
    let directory = sysfs.directory(address);
    let device = VfioBackend::open(&directory, Access::best(&directory))?;
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

fn shared(access: Access, address: PciAddress, blocker: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let refused = sysfs.bind(address, Binding::Vfio).unwrap_err();
    let PciError::GroupNotViable { ref blockers, .. } = refused else { bail!("{refused:?}") };
    ensure!(blockers.len() == 1 && blockers[0].address == blocker, "{refused}");
    println!("ok {refused}; next: {}", refused.next_step());

    // By hand, as somebody else might do it: now VFIO has to refuse.
    let directory = sysfs.directory(address);
    fs::write(directory.join("driver_override"), VFIO_PCI)?;
    fs::write("/sys/bus/pci/drivers_probe", address.to_string())?;
    let refused = VfioBackend::open(&directory, access).unwrap_err();
    println!("ok {refused}; next: {}", refused.next_step());
    ensure!(matches!(refused, VfioError::NotViable { .. }), "{refused:?}");
    Ok(())
}

fn no_iommu(address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let refused = sysfs.bind(address, Binding::Vfio).unwrap_err();
    ensure!(matches!(refused, PciError::NoIommu { .. }), "{refused:?}");
    println!("ok {refused}; next: {}", refused.next_step());
    for access in [Access::Cdev, Access::Group] {
        let refused = VfioBackend::open(&sysfs.directory(address), access).unwrap_err();
        ensure!(matches!(refused, VfioError::NoIommu { .. }), "{refused:?}");
        println!("ok {refused}; next: {}", refused.next_step());
    }
    Ok(())
}

fn removal(way: Way, address: PciAddress) -> Result<()> {
    let sysfs = Sysfs::default();
    let former = sysfs.bind(address, binding(way))?;
    let directory = sysfs.directory(address);
    let device = open(way, &directory)?;
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

fn interrupts(way: Way, address: PciAddress, kind: InterruptKind) -> Result<()> {
    let sysfs = Sysfs::default();
    let former = sysfs.bind(address, binding(way))?;
    let vectors = open(way, &sysfs.directory(address))?.interrupt_count(kind);
    let rules = RULES.iter().filter(|rule| rule.is_for(kind, vectors));
    let mut tried = 0;
    for rule in rules {
        (rule.test)(&setup(way, address, kind)?);
        println!("ok {} by {kind}", rule.name);
        tried += 1;
    }
    ensure!(tried > 0, "no rule is for {vectors} vectors of {kind}");
    println!("ok {tried} rules by {kind}, of which the device has {vectors}");
    sysfs.restore(&former)?;
    Ok(())
}

/// A device that interrupts when it is told to; bound.
fn setup(way: Way, address: PciAddress, kind: InterruptKind) -> Result<Setup> {
    let sysfs = Sysfs::default();
    sysfs.bind(address, binding(way))?;
    let device = open(way, &sysfs.directory(address))?;
    let registers: Box<dyn Registers> = match kind {
        InterruptKind::IntX | InterruptKind::Msi => Box::new(EduRegisters),
        InterruptKind::MsiX => Box::new(E1000eRegisters),
    };
    Ok(Setup { device: Arc::new(Ringing::new(device, registers)), kind })
}

fn resize(way: Way, address: PciAddress, rounds: u32) -> Result<()> {
    const AT_ONCE: u32 = 1000;
    let setup = setup(way, address, InterruptKind::MsiX)?;
    for done in (0..rounds).step_by(AT_ONCE as usize) {
        let now = AT_ONCE.min(rounds - done);
        resize_rounds(&setup, now);
        println!("ok {} times all vectors, one, all again", done + now);
    }
    Ok(())
}

fn watch(service: &str) -> Result<()> {
    let mut watch = Daemon::connect(DEFAULT_SOCKET)?.watch()?;
    loop {
        let event = watch.next_event()?;
        if event.service != service {
            continue;
        }
        match (event.kind, event.reason) {
            (EventKind::Began, _) => println!("began"),
            (EventKind::Ended, reason) => {
                println!("ended {}", reason.map_or_else(String::new, |reason| reason.code));
            }
        }
    }
}

fn bind_forever(address: PciAddress, state: &str) -> Result<()> {
    let binder = Binder::new(Sysfs::default(), state);
    loop {
        take(&binder, address)?;
        binder.give_back(address, true)?;
    }
}

fn take(binder: &Binder, address: PciAddress) -> Result<()> {
    let binding = Binding::Vfio;
    binder.take(&Order { address, binding, group: false, force: false, persist: false })?;
    Ok(())
}

fn settle(address: PciAddress, state: &str) -> Result<()> {
    let binder = Binder::new(Sysfs::default(), state);
    for left in binder.left()? {
        ensure!(left.address == address, "{} is left, too", left.address);
        binder.give_back(address, true)?;
    }
    ensure!(binder.left()?.is_empty(), "something is left still");
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
