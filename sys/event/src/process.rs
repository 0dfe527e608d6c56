//! A pidfd.

#![expect(unsafe_code)]
// UNSAFETY: neither std nor nix opens a pidfd yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::signal::Signal as Number;

/// A process of ours that cannot be mistaken for another one that got its number later.
/// Readable once the process has ended.
#[derive(Debug)]
pub struct ProcessHandle {
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Opens a handle to a child that has not been waited for: its number is its own until then.
    pub fn of_child(child: &std::process::Child) -> io::Result<Self> {
        // SAFETY: the call takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel returned a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { fd })
    }

    /// Sends the process a signal. `NotFound` once it has ended and been waited for.
    pub fn signal(&self, number: Number) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        // SAFETY: integers and a null pointer, which stands for the default signal information.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                number as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
