//! An epoll set.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Descriptors that are watched for becoming readable, each with a number of the caller's.
///
/// Watching is edge-triggered where the method does not say otherwise: one report per write to an
/// eventfd or per packet that arrives, whether or not the earlier ones were read. Several threads
/// can wait at once; the kernel wakes one of them per event.
///
/// The set has a descriptor of its own ([`AsFd`]), which is readable while there is something to
/// report and can be watched by another set (epoll(7)).
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

/// What a wait found. Reused from one wait to the next.
#[derive(Debug)]
pub struct Ready {
    events: Vec<EpollEvent>,
    count: usize,
}

impl Ready {
    /// Room for `most` reports per wait.
    pub fn new(most: usize) -> Self {
        Self { events: vec![EpollEvent::empty(); most], count: 0 }
    }

    /// The numbers of the descriptors that became readable.
    pub fn tokens(&self) -> impl Iterator<Item = u64> + '_ {
        self.events[..self.count].iter().map(EpollEvent::data)
    }
}

impl Poller {
    /// Makes an empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Watches a descriptor. It is forgotten when its last duplicate closes, or by
    /// [`forget`](Self::forget). A descriptor that is readable already is reported once.
    pub fn watch(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token))?)
    }

    /// Watches a descriptor for as long as it is readable: level-triggered.
    pub fn watch_while_readable(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    /// Watches a connection for its end only, whatever else arrives on it: level-triggered.
    pub fn watch_for_end(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLRDHUP, token))?)
    }

    /// As [`watch_for_end`](Self::watch_for_end), reported once.
    pub fn watch_for_end_once(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLONESHOT;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, token))?)
    }

    /// Stops watching a descriptor.
    pub fn forget(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// Waits for reports, for `timeout` at the most and for ever without one; a signal ends the
    /// wait with none.
    pub fn wait(&self, ready: &mut Ready, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            Some(time) => EpollTimeout::try_from(time).unwrap_or(EpollTimeout::MAX),
        };
        ready.count = match self.epoll.wait(&mut ready.events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(err) => return Err(err.into()),
        };
        Ok(())
    }
}

/// A set that was made elsewhere. Of a descriptor that is none, every method says `EINVAL`.
impl From<OwnedFd> for Poller {
    fn from(fd: OwnedFd) -> Self {
        Self { epoll: Epoll(fd) }
    }
}

impl From<Poller> for OwnedFd {
    fn from(poller: Poller) -> Self {
        poller.epoll.0
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
