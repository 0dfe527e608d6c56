//! SIGBUS at a mapped region: what an access to a device that has gone, or does not decode
//! memory, raises.
//!
//! Left alone it ends the process, and with it whatever the driver could still have said. The
//! handler here puts a page of ones under the access, as a bus answers that nobody answers on,
//! marks the region, and raises a signal for whoever watches. The driver goes on with ones.
//!
//! A SIGBUS anywhere else, and one that somebody sent, is left to whoever handled it before: by
//! default it ends the process.
//!
//! What the page is not: a write to it stays there and is read back, until the region is unmapped.
//!
//! Source: Linux, `drivers/vfio/pci/vfio_pci_core.c`, `vfio_pci_mmap_fault`: `VM_FAULT_SIGBUS`
//! while memory decoding is off or the device is gone; signal-safety(7), for what a handler may
//! call. `mmap` and `mremap` are not in that list: they are bare system calls in every libc of
//! Linux, which take no lock of the process.

#![expect(unsafe_code)]
// UNSAFETY: a signal handler, and the mappings it changes.

use std::ffi::c_void;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// Regions that can be mapped at one time. A function has six BARs and a ROM, in few pieces each.
const MOST_REGIONS: usize = 256;

/// A region that the handler knows. `start` is 0 while the place is free, and `CLAIMED` while it
/// is being filled; a handler that sees another value sees the `len` that belongs to it.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

/// No mapping starts there.
const CLAIMED: usize = 1;

static REGIONS: [Slot; MOST_REGIONS] = [const {
    Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0), lost: AtomicBool::new(false) }
}; MOST_REGIONS];

/// The descriptor that the handler raises; -1 while there is none.
static SIGNAL: AtomicI32 = AtomicI32::new(-1);

/// What handled SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Bytes of a page, for the handler, which may not ask.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// A region's place in the handler's list; given back on drop, before the region is unmapped.
#[derive(Debug)]
pub(crate) struct Watched {
    slot: usize,
}

impl Watched {
    /// Has faults in `start..start + len` answered with ones.
    ///
    /// Errors: when the handler cannot be installed, or 256 regions are mapped already.
    pub(crate) fn new(start: usize, len: usize) -> io::Result<Self> {
        install()?;
        for (slot, region) in REGIONS.iter().enumerate() {
            let claimed =
                region.start.compare_exchange(0, CLAIMED, Ordering::Acquire, Ordering::Relaxed);
            if claimed.is_ok() {
                region.len.store(len, Ordering::Relaxed);
                region.lost.store(false, Ordering::Relaxed);
                region.start.store(start, Ordering::Release);
                return Ok(Self { slot });
            }
        }
        Err(io::Error::other(format!("{MOST_REGIONS} regions are mapped already")))
    }

    /// Whether an access faulted.
    pub(crate) fn is_lost(&self) -> bool {
        REGIONS[self.slot].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        REGIONS[self.slot].start.store(0, Ordering::Release);
    }
}

/// An eventfd, non-blocking, that counts accesses which were answered with ones instead of by
/// their device: one for each page and each thread that met it first. It is the process's one;
/// each call gives another descriptor of it.
pub fn lost_accesses() -> io::Result<OwnedFd> {
    static COUNTER: OnceLock<OwnedFd> = OnceLock::new();
    if COUNTER.get().is_none() {
        // SAFETY: the call has no argument that is an address.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made the descriptor for us, and nobody else knows of it.
        let made = unsafe { OwnedFd::from_raw_fd(fd) };
        // Another thread may have been first; its counter is the one then.
        let _ = COUNTER.set(made);
    }
    let counter = COUNTER.get().expect("set above");
    SIGNAL.store(counter.as_raw_fd(), Ordering::Release);
    counter.try_clone()
}

/// Installs the handler, once in a process.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: the call has no argument that is an address.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if let Ok(page) = usize::try_from(page) {
            PAGE.store(page, Ordering::Relaxed);
        }
        // SAFETY: the structure is integers and an address that may be null: all zeros is one.
        let mut before: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: the second argument may be null, the third is ours to write.
        let asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) };
        if asked != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
        // Set before the handler can run.
        let _ = BEFORE.set(before);
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that `SA_SIGINFO` calls for, is there for ever,
        // and calls nothing that a handler may not; see the head of this file.
        let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
        match set {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// The handler. Async-signal-safe: atomics, bare system calls, and a store to fresh memory.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the call has no argument.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it is this thread's own, and lives as long as the thread.
    let before = unsafe { *errno };
    // SAFETY: the kernel passes a valid structure.
    let info = unsafe { &*info };
    let code = info.si_code;
    // SAFETY: SIGBUS of the kernel has an address; of one that was sent it is not used.
    let address = unsafe { info.si_addr() } as usize;
    // 0 and less: somebody sent the signal.
    if code > 0 && answer_with_ones(address) {
        // SAFETY: as where it was read.
        unsafe { *errno = before };
        return;
    }
    leave_to_others(code);
}

/// Puts a page of ones under an address, if it lies in a region of ours.
fn answer_with_ones(address: usize) -> bool {
    let lies_in = |region: &&Slot| {
        let start = region.start.load(Ordering::Acquire);
        start > CLAIMED && (start..start + region.len.load(Ordering::Relaxed)).contains(&address)
    };
    let Some(region) = REGIONS.iter().find(lies_in) else { return false };
    let page = PAGE.load(Ordering::Relaxed);
    // SAFETY: a mapping that the kernel places where nothing is.
    let ones = unsafe {
        libc::mmap(
            ptr::null_mut(),
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if ones == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the page was just mapped, writable, and nobody else knows of it.
    unsafe { ptr::write_bytes(ones.cast::<u8>(), 0xff, page) };
    let place = (address & !(page - 1)) as *mut c_void;
    // In one step, so that no thread ever finds zeros there, or nothing.
    // SAFETY: the page's new place is inside a region of ours, which is registers: no object of
    // the program is there, and whoever accesses it does so by volatile accesses of integers.
    let moved =
        unsafe { libc::mremap(ones, page, page, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place) };
    if moved == libc::MAP_FAILED {
        return false;
    }
    region.lost.store(true, Ordering::Relaxed);
    let signal = SIGNAL.load(Ordering::Acquire);
    if signal >= 0 {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight bytes of ours; the descriptor is never closed once it is set. That the
        // counter could be full is no matter.
        unsafe { libc::write(signal, one.as_ptr().cast(), one.len()) };
    }
    true
}

/// Has whoever handled the signal before handle this one: it comes again, at once.
fn leave_to_others(code: libc::c_int) {
    let Some(before) = BEFORE.get() else { return };
    // SAFETY: the action is the one that the kernel gave us.
    unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    if code <= 0 {
        // The instruction that was interrupted has not failed, and will not.
        // SAFETY: no argument is an address; the signal waits until this handler has returned.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;
    use crate::MappedRegion;

    const PAGE_SIZE: usize = 4096;

    /// Two pages of a file that stands for a device: it can be taken away.
    fn region() -> (File, MappedRegion) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE_SIZE as u64).unwrap();
        let region = MappedRegion::map(&file, 0, 2 * PAGE_SIZE).unwrap();
        (file, region)
    }

    #[test]
    fn a_region_whose_device_has_gone_reads_as_ones_and_says_so() {
        let (file, region) = region();
        region.write(0, 7_u32).unwrap();
        assert_eq!(region.read::<u32>(0), Some(7));
        assert!(!region.is_lost());
        let lost = lost_accesses().unwrap();

        file.set_len(0).unwrap();

        assert_eq!(region.read::<u32>(0), Some(u32::MAX));
        assert!(region.is_lost());
        assert_eq!(region.read::<u64>(8), Some(u64::MAX));
        // The other page, by a write, which is the driver's to lose.
        region.write(PAGE_SIZE, 1_u8).unwrap();
        assert_eq!(region.read::<u8>(PAGE_SIZE + 1), Some(0xff));
        let mut count = [0; 8];
        // SAFETY: eight bytes of ours.
        let read = unsafe { libc::read(lost.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        assert_eq!(read, 8);
        assert!(u64::from_ne_bytes(count) >= 2, "both pages were counted");
    }

    #[test]
    fn a_region_that_is_gone_takes_no_other_with_it() {
        let (file, gone) = region();
        let (_kept, there) = region();
        there.write(0, 5_u8).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(gone.read::<u8>(0), Some(0xff));
        assert_eq!((there.read::<u8>(0), there.is_lost()), (Some(5), false));
    }

    #[test]
    fn what_is_mapped_after_a_region_has_gone_is_itself() {
        let (file, gone) = region();
        file.set_len(0).unwrap();
        assert_eq!(gone.read::<u8>(0), Some(0xff));
        drop(gone);
        let (_file, next) = region();
        assert_eq!((next.read::<u8>(0), next.is_lost()), (Some(0), false));
    }

    /// Runs the test of this name alone in a process, in which it does what it must not survive.
    fn in_a_process(name: &str) -> std::process::ExitStatus {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["--exact", name, "--nocapture"]).env("DIE_OF_SIGBUS", "1");
        command.output().unwrap().status
    }

    fn is_alone() -> bool {
        std::env::var_os("DIE_OF_SIGBUS").is_some()
    }

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_ever() {
        if !is_alone() {
            let status = in_a_process("fault::tests::a_fault_elsewhere_ends_the_process_as_ever");
            return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        }
        let (_file, _region) = region();
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE as u64).unwrap();
        let map = memmap2::MmapOptions::new().len(PAGE_SIZE).map_raw(&file).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: mapped; that the file behind it is gone is what is tried here.
        unsafe { map.as_ptr().read_volatile() };
    }

    #[test]
    fn a_signal_that_was_sent_ends_the_process_as_ever() {
        if !is_alone() {
            let name = "fault::tests::a_signal_that_was_sent_ends_the_process_as_ever";
            let status = in_a_process(name);
            return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        }
        let (_file, _region) = region();
        // The handler of Rust's runtime, which was there before, takes the first one, as it does
        // without ours, and has the next one end the process.
        for _ in 0..2 {
            // SAFETY: no argument is an address.
            unsafe { libc::raise(libc::SIGBUS) };
        }
    }
}
