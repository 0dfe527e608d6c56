//! Notifications between processes, and sleeping until one comes.

#![expect(unsafe_code)]
// UNSAFETY: one system call that the `nix` crate does not have.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iohost_event::{Poller, Ready};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

use super::QueueError;

/// How one end of a queue tells the other.
///
/// Called on the thread of the operation that owes the notification, after everything else it does.
pub trait Notify {
    /// Sends the notification. Several that nobody has taken yet may become one.
    fn notify(&self);

    /// Whether there is anyone to tell. If not, the notification counts as not sent.
    fn is_installed(&self) -> bool {
        true
    }
}

/// `None`: no handler is installed.
impl<N: Notify> Notify for Option<N> {
    fn notify(&self) {
        if let Some(installed) = self {
            installed.notify();
        }
    }

    fn is_installed(&self) -> bool {
        self.as_ref().is_some_and(N::is_installed)
    }
}

impl<N: Notify + ?Sized> Notify for Arc<N> {
    fn notify(&self) {
        (**self).notify();
    }

    fn is_installed(&self) -> bool {
        (**self).is_installed()
    }
}

/// How a thread without a dispatch engine learns of notifications.
pub trait Wait {
    /// Sleeps until a notification comes or has come since the last time, and takes it. No deadline
    /// means none. Once the deadline has passed the answer is `TimedOut` even if a notification
    /// came, so that a peer that rings without end keeps nobody here.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Wake>;
}

/// Why a sleep ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// At least one notification came.
    Rung,
    /// The deadline passed.
    TimedOut,
    /// The peer is gone, and no notification of its is left.
    HungUp,
}

/// Why waiting for the other end of a queue was in vain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The time that the caller gave is over.
    #[error("nothing came from the other end of the queue within {timeout:?}")]
    TimedOut {
        /// The time given.
        timeout: Duration,
    },
    /// The queue will not get there.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The kernel refused.
    #[error("sleeping until the other end of the queue rings")]
    Wait(#[source] io::Error),
}

/// One direction of notifications between processes: an eventfd that does not block.
///
/// It holds at most one notification: ringing a bell that has been rung changes nothing for the
/// other side.
///
/// Who has the descriptor can make it blocking for all that have it (the flag belongs to the open
/// file, not to the process) and fill the counter, and then a ring blocks. So a peer that is not
/// trusted gets a bell only to ring it, and to hear one its [`listener`](Self::listener).
#[derive(Debug)]
pub struct Bell {
    fd: OwnedFd,
}

impl Bell {
    /// Makes a bell that has not been rung.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { fd: EventFd::from_flags(flags)?.into() })
    }

    /// The same bell under another descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()? })
    }

    /// A descriptor for whoever is to hear this bell and must not be able to do anything to it: a
    /// [`Doorway`] is made [`at`](Doorway::at) it. It is readable from a ring to the next report, and
    /// hears rings that came before once. An epoll set, so `epoll_wait(2)` takes the report. With the
    /// last descriptor of the bell goes what was not reported yet.
    ///
    /// Errors: what `epoll_ctl(2)` says of a descriptor that cannot be waited for, or when this
    /// process has no more descriptors.
    pub fn listener(&self) -> io::Result<OwnedFd> {
        let watched = Poller::new()?;
        watched.watch(self, RUNG)?;
        Ok(watched.into())
    }

    /// Tells the other side.
    ///
    /// Errors: none for a bell made by `new`; whatever the kernel says of a descriptor that is no
    /// eventfd.
    pub fn ring(&self) -> io::Result<()> {
        match nix::unistd::write(&self.fd, &1_u64.to_ne_bytes()) {
            // The counter is at its end: rung, and not yet heard.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes the notification, if there is one. Does not block.
    ///
    /// Errors: none for a bell made by `new`; `UnexpectedEof` or what the kernel says for a
    /// descriptor that is no eventfd.
    pub fn clear(&self) -> io::Result<bool> {
        let mut count = [0_u8; 8];
        let buffer = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // RWF_NOWAIT and not O_NONBLOCK, because the peer can take the latter away.
        // SAFETY:
        // 1. One buffer is announced and given; it is valid for writes of its length.
        // 2. `fd` is open during the call. The offset of -1 is "the current one", as for `read`.
        let read = unsafe { libc::preadv2(self.fd.as_raw_fd(), &buffer, 1, -1, libc::RWF_NOWAIT) };
        match Errno::result(read) {
            Ok(8) => Ok(true),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Notify for Bell {
    fn notify(&self) {
        // A bell of ours cannot fail. One that a peer gave us and that does is the peer's loss.
        let _ = self.ring();
    }
}

/// A bell that another process made.
impl From<OwnedFd> for Bell {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<Bell> for OwnedFd {
    fn from(bell: Bell) -> Self {
        bell.fd
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// How the end of the peer is noticed.
#[derive(Debug)]
pub enum Peer {
    /// A pidfd: the peer is gone when its process is.
    Process(OwnedFd),
    /// A connected socket, or one end of a pipe: the peer is gone when its side is closed. What
    /// arrives on it is left alone.
    Connection(OwnedFd),
}

impl Peer {
    fn watch(&self, watched: &Poller) -> io::Result<()> {
        match self {
            Self::Process(fd) => watched.watch_while_readable(fd, GONE),
            Self::Connection(fd) => watched.watch_for_end(fd, GONE),
        }
    }
}

/// Where a client without a dispatch engine waits: for the bell that rings for it, and for the end
/// of its peer. Its descriptor is readable while there is something to wait no longer for.
#[derive(Debug)]
pub struct Doorway {
    /// A wait is one system call: the set reports each ring once, and nobody reads the bell.
    watched: Poller,
    _peer: Option<Peer>,
    /// So that the last ring of an end that is gone is heard.
    _bell: Option<Bell>,
}

const RUNG: u64 = 0;
const GONE: u64 = 1;

impl Doorway {
    /// `bell` is rung by the other end, by a descriptor of its own. Without `peer` one that died looks
    /// like one that is silent.
    ///
    /// Errors: as [`Bell::listener`].
    pub fn new(bell: Bell, peer: Option<Peer>) -> io::Result<Self> {
        let doorway = Self::at(bell.listener()?, peer)?;
        Ok(Self { _bell: Some(bell), ..doorway })
    }

    /// As [`new`](Self::new), at the [`listener`](Bell::listener) of a bell that this process does not
    /// have.
    ///
    /// Errors: what `epoll_ctl(2)` says, also of a descriptor that is no listener.
    pub fn at(listener: OwnedFd, peer: Option<Peer>) -> io::Result<Self> {
        let watched = Poller::from(listener);
        if let Some(peer) = &peer {
            peer.watch(&watched)?;
        }
        Ok(Self { watched, _peer: peer, _bell: None })
    }

    /// Takes the notification, if there is one. Does not block.
    pub fn take(&self) -> io::Result<bool> {
        let mut reports = Ready::new(2);
        self.watched.wait(&mut reports, Some(Duration::ZERO))?;
        Ok(reports.tokens().any(|token| token == RUNG))
    }

    /// Sleeps until there is something to report. `false` when the deadline passed before. The
    /// kernel's wait for reports knows milliseconds only.
    fn sleep_until(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut watched = [PollFd::new(self.watched.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut watched, Some(TimeSpec::from(left)), None) {
            Ok(0) => Ok(false),
            Ok(_) | Err(Errno::EINTR) => Ok(!left.is_zero()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Wait for Doorway {
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Wake> {
        let mut reports = Ready::new(2);
        loop {
            let in_time = deadline.map_or(Ok(true), |deadline| self.sleep_until(deadline))?;
            let timeout = deadline.map(|_| Duration::ZERO);
            self.watched.wait(&mut reports, timeout)?;
            // A notification comes before a hang-up: what was sent before the end still counts.
            if reports.tokens().any(|token| token == RUNG) {
                return Ok(if in_time { Wake::Rung } else { Wake::TimedOut });
            }
            if reports.tokens().any(|token| token == GONE) {
                return Ok(Wake::HungUp);
            }
            if !in_time {
                return Ok(Wake::TimedOut);
            }
        }
    }
}

impl AsFd for Doorway {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watched.as_fd()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use super::*;

    const WATCHDOG: Duration = Duration::from_secs(30);

    fn deadline() -> Option<Instant> {
        Instant::now().checked_add(WATCHDOG)
    }

    #[test]
    fn ringing_twice_leaves_one_notification() {
        let bell = Bell::new().unwrap();
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(bell.clear().unwrap());
        assert!(!bell.clear().unwrap());
    }

    #[test]
    fn ringing_a_bell_whose_counter_is_full_neither_fails_nor_blocks() {
        let bell = Bell::new().unwrap();
        nix::unistd::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        bell.ring().unwrap();
        assert!(bell.clear().unwrap());
    }

    #[test]
    fn taking_a_notification_does_not_block_even_if_the_peer_made_the_bell_blocking() {
        let bell = Bell::new().unwrap();
        let flags = nix::fcntl::OFlag::empty();
        nix::fcntl::fcntl(&bell, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        let (answer, answered) = std::sync::mpsc::channel();
        std::thread::spawn(move || answer.send(bell.clear().unwrap()));
        assert_eq!(answered.recv_timeout(WATCHDOG), Ok(false));
    }

    #[test]
    fn a_peer_that_rings_without_end_does_not_keep_a_waiter_past_its_time() {
        let bell = Bell::new().unwrap();
        let line = Doorway::at(bell.listener().unwrap(), None).unwrap();
        bell.ring().unwrap();
        assert_eq!(line.wait(deadline()).unwrap(), Wake::Rung, "in time");
        bell.ring().unwrap();
        assert_eq!(line.wait(Some(Instant::now())).unwrap(), Wake::TimedOut, "too late");
    }

    #[test]
    fn a_listener_hears_each_ring_once_and_cannot_ring() {
        let bell = Bell::new().unwrap();
        bell.ring().unwrap();
        let listener = bell.listener().unwrap();
        assert!(nix::unistd::write(&listener, &1_u64.to_ne_bytes()).is_err());
        let line = Doorway::at(listener, None).unwrap();
        assert!(line.take().unwrap(), "of a ring before it was there");
        assert!(!line.take().unwrap());
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(line.take().unwrap());
        assert!(!line.take().unwrap(), "two rings are one notification");
    }

    #[test]
    fn a_descriptor_that_is_no_eventfd_is_an_error_and_not_a_notification() {
        let (read, write) = nix::unistd::pipe().unwrap();
        drop(write);
        assert!(Bell::from(read).clear().is_err());
    }

    #[test]
    fn a_notification_comes_before_a_hang_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = Some(Peer::Connection(ours.into()));
        let bell = Bell::new().unwrap();
        let line = Doorway::at(bell.listener().unwrap(), peer).unwrap();
        bell.ring().unwrap();
        drop(theirs);
        assert_eq!(line.wait(deadline()).unwrap(), Wake::Rung);
        assert_eq!(line.wait(deadline()).unwrap(), Wake::HungUp);
    }

    #[test]
    fn the_last_ring_of_an_end_that_is_gone_is_heard() {
        let bell = Bell::new().unwrap();
        let line = Doorway::new(bell.try_clone().unwrap(), None).unwrap();
        bell.ring().unwrap();
        drop(bell);
        assert!(line.take().unwrap());
    }

    #[test]
    fn traffic_on_the_connection_is_no_hang_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut theirs, b"unrelated").unwrap();
        let peer = Some(Peer::Connection(ours.into()));
        let line = Doorway::new(Bell::new().unwrap(), peer).unwrap();
        assert_eq!(line.wait(Some(Instant::now())).unwrap(), Wake::TimedOut);
    }

    #[test]
    fn a_process_that_ends_is_a_hang_up() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        // SAFETY: takes two integers, and returns a descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        let fd = Errno::result(fd).unwrap() as i32;
        // SAFETY: the kernel has just made it, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let line = Doorway::new(Bell::new().unwrap(), Some(Peer::Process(fd))).unwrap();
        assert_eq!(line.wait(Some(Instant::now())).unwrap(), Wake::TimedOut, "still there");
        drop(child.stdin.take());
        assert_eq!(line.wait(deadline()).unwrap(), Wake::HungUp);
        child.wait().unwrap();
    }
}
