//! A place where packet connections can be asked for.
//!
//! Named by a file in a directory that the caller has open, however long the directory's path is: a
//! Unix socket's address has room for 108 bytes (unix(7)), so it goes by way of `/proc/self/fd`.

#![expect(unsafe_code)]
// UNSAFETY: nix returns an accepted connection as a bare number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};

use crate::Packets;

/// A listening Unix `SOCK_SEQPACKET` socket. It goes on listening in every process that has it, and
/// whoever connects once nobody has it any more is refused. Its file stays.
#[derive(Debug)]
pub struct PacketListener {
    fd: OwnedFd,
}

impl PacketListener {
    /// Listens under a name that is free in `directory`.
    pub fn bind(directory: &File, name: &str) -> io::Result<Self> {
        let fd = new_socket(SockFlag::empty())?;
        bind(fd.as_raw_fd(), &address(directory, name)?)?;
        listen(&fd, Backlog::MAXCONN)?;
        Ok(Self { fd })
    }

    /// Connects to whoever listens under a name, at once: they need not have accepted yet. The end
    /// does not block.
    ///
    /// Errors: `ConnectionRefused` when nobody does.
    pub fn connect(directory: &File, name: &str) -> io::Result<Packets> {
        let fd = new_socket(SockFlag::SOCK_NONBLOCK)?;
        connect(fd.as_raw_fd(), &address(directory, name)?)?;
        Ok(Packets::from(fd))
    }

    /// Waits until somebody connects. Needs no system call but accept4(2).
    pub fn accept(&self) -> io::Result<Packets> {
        loop {
            match accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(err) => return Err(err.into()),
                Ok(fd) => {
                    // SAFETY: the kernel just made this descriptor for us and told nobody else.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    return Ok(Packets::from(fd));
                }
            }
        }
    }
}

fn new_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn address(directory: &File, name: &str) -> io::Result<UnixAddr> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok(UnixAddr::new(&path)?)
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for PacketListener {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PacketError;

    #[test]
    fn whoever_connects_is_accepted_until_the_listener_is_closed_in_every_process() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let directory = File::open(&deep).unwrap();
        let listener = PacketListener::bind(&directory, "1").unwrap();
        let duplicate = PacketListener::from(listener.as_fd().try_clone_to_owned().unwrap());
        drop(listener);

        let ours = PacketListener::connect(&directory, "1").unwrap();
        let mut data = [0; 4];
        assert!(matches!(ours.receive(&mut data, 0), Err(PacketError::WouldBlock)));
        ours.send(b"x", &[]).unwrap();
        let theirs = duplicate.accept().unwrap();
        assert_eq!(theirs.receive(&mut data, 0).unwrap().len, 1);

        drop(duplicate);
        // A process that another test forks has it, too, until it runs its program.
        let refused = loop {
            match PacketListener::connect(&directory, "1") {
                Ok(_) => std::thread::yield_now(),
                Err(err) => break err,
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(deep.join("1").exists());
    }
}
