//! Processes: a pidfd, and what a program that is started does not inherit.

#![expect(unsafe_code)]
// UNSAFETY: neither std nor nix opens a pidfd or has close_range(2) yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal as Number;

/// Has every descriptor of this process but the standard three closed in the programs that it starts
/// from now on (close_range(2) with `CLOSE_RANGE_CLOEXEC`): what was inherited, or received by a library
/// that does not see to it.
///
/// Errors: what the kernel says; Linux before 5.11 does not have it.
pub fn close_on_exec() -> io::Result<()> {
    let (first, last) = (3, libc::c_uint::MAX);
    // SAFETY: the call takes three integers, touches no memory of ours, and closes nothing here.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A process of ours that cannot be mistaken for another one that got its number later.
/// Readable once the process has ended.
#[derive(Debug)]
pub struct ProcessHandle {
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Opens a handle to a child that has not been waited for: its number is its own until then.
    pub fn of_child(child: &std::process::Child) -> io::Result<Self> {
        Self::open(child.id())
    }

    /// Opens a handle to a process that is no child, or is one no more; `None` once it has ended.
    /// `started` is what [`process_start`] said of it.
    pub fn of(pid: u32, started: u64) -> io::Result<Option<Self>> {
        let handle = match Self::open(pid) {
            Ok(handle) => handle,
            Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(err) => return Err(err),
        };
        // Asked once the handle is there: whoever has the number now is whom the handle means, or
        // has ended, which the handle says as well.
        Ok(match process_start(pid) {
            Ok(found) if found == started => Some(handle),
            _ => None,
        })
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        // A descriptor of ours, polled without a wait: there is nothing to fail.
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..))
    }

    fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: the call takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
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

/// When a process started, in clock ticks since the boot: with its number it means that process and no
/// later one (`starttime`, proc_pid_stat(5)).
pub fn process_start(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, with anything in it.
    let behind_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    let field = behind_name.and_then(|rest| rest.split_ascii_whitespace().nth(19));
    let ticks = field.and_then(|word| word.parse().ok());
    ticks.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a process without a start"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_meant_by_number_and_start_together() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (pid, started) = (child.id(), process_start(child.id()).unwrap());
        assert!(ProcessHandle::of(pid, started + 1).unwrap().is_none());
        let handle = ProcessHandle::of(pid, started).unwrap().unwrap();
        assert!(!handle.has_ended());
        handle.signal(Number::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(handle.has_ended());
        assert!(ProcessHandle::of(pid, started).unwrap().is_none());
    }
}
