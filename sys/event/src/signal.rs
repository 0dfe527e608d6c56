//! An eventfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// A counter in the kernel that one side adds to and the other takes; readable while not zero.
///
/// Interrupts, doorbells and wake-ups all arrive through one.
#[derive(Debug)]
pub struct Signal {
    fd: EventFd,
}

impl Signal {
    /// Makes a counter of zero.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { fd: EventFd::from_flags(flags)? })
    }

    /// Adds one. A counter that is full already has its reader's attention and stays as it is.
    pub fn raise(&self) {
        // The only failure of a live eventfd is EAGAIN at 2^64 - 2.
        let _ = self.fd.write(1);
    }

    /// Adds several at once; a counter that has no room for them stays as it is.
    pub fn add(&self, count: u64) {
        let _ = self.fd.write(count);
    }

    /// Takes the whole count; 0 when there is none.
    pub fn take(&self) -> u64 {
        take(self)
    }
}

/// Takes the whole count of any non-blocking eventfd, also one that came from a peer; 0 for a
/// descriptor that turns out to be something else.
pub(crate) fn take(fd: impl AsFd) -> u64 {
    let mut count = [0; 8];
    match nix::unistd::read(fd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl TryFrom<OwnedFd> for Signal {
    type Error = io::Error;

    /// Takes over an eventfd that somebody else made, and makes it non-blocking, which its other
    /// holders see.
    ///
    /// Errors: `InvalidInput` for a descriptor that is no eventfd.
    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            let text = format!("{} is no eventfd", kind.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { fd: eventfd_from(fd) })
    }
}

#[expect(unsafe_code)]
// UNSAFETY: nix has no safe conversion from a descriptor that somebody else made.
fn eventfd_from(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is open and owned by the argument. That it is an eventfd is a
    // matter of behaviour, not of memory: reads and writes of eight bytes on anything else fail
    // or return other bytes.
    unsafe { EventFd::from_owned_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_counts_until_it_is_taken() {
        let signal = Signal::new().unwrap();
        signal.raise();
        signal.raise();
        assert_eq!(signal.take(), 2);
        assert_eq!(signal.take(), 0);
    }

    #[test]
    fn a_descriptor_that_is_no_eventfd_is_refused() {
        let timer = crate::Timer::new(crate::Clock::Uptime).unwrap();
        let refused = Signal::try_from(timer.as_fd().try_clone_to_owned().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert!(refused.to_string().contains("timerfd"), "{refused}");
    }
}
