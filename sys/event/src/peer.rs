//! Who is at the other end of a Unix socket.

#![expect(unsafe_code)]
// UNSAFETY: SO_PEERGROUPS, which `nix` does not have.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{getsockopt, sockopt};

/// A process that connected, as the kernel noted it then (unix(7), SO_PEERCRED).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id; 0 for one outside of our process namespace.
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group and its other ones.
    pub gids: Vec<u32>,
}

impl Peer {
    /// Whoever connected a stream or packet socket.
    ///
    /// Errors: what the kernel says, for what is no connected Unix socket.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let socket = socket.as_fd();
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        let mut gids = vec![credentials.gid()];
        // A kernel before 4.13 does not say; then the effective group is the only one.
        gids.extend(other_groups(socket.as_raw_fd()).unwrap_or_default());
        Ok(Self { pid: credentials.pid() as u32, uid: credentials.uid(), gids })
    }
}

/// The supplementary groups (SO_PEERGROUPS, Linux 4.13).
fn other_groups(socket: i32) -> io::Result<Vec<libc::gid_t>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let room = groups.len() * mem::size_of::<libc::gid_t>();
        let mut len = room as libc::socklen_t;
        let into = groups.as_mut_ptr().cast();
        // SAFETY: `into` has `len` bytes of room, and any bytes are numbers.
        let asked = unsafe {
            libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERGROUPS, into, &raw mut len)
        };
        let count = len as usize / mem::size_of::<libc::gid_t>();
        match asked {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            // With ERANGE the kernel says how much room it takes.
            _ => match io::Error::last_os_error() {
                err if err.raw_os_error() == Some(libc::ERANGE) && count > groups.len() => {
                    groups.resize(count, 0);
                }
                err => return Err(err),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::unistd::{getegid, geteuid, getgroups};

    use super::*;

    #[test]
    fn the_peer_of_a_socket_of_ones_own_is_oneself() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id(), geteuid().as_raw()));
        let mut own = vec![getegid().as_raw()];
        own.extend(getgroups().unwrap().into_iter().map(|gid| gid.as_raw()));
        assert_eq!(peer.gids, own);
    }

    #[test]
    fn what_is_no_unix_socket_has_no_peer() {
        assert!(Peer::of(std::io::pipe().unwrap().0).is_err());
    }
}
