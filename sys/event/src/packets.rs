//! Packets between processes, with descriptors beside them.

#![expect(unsafe_code)]
// UNSAFETY: descriptors arrive from the kernel as bare numbers.

use std::ffi::c_int;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

/// The most descriptors the kernel passes beside one packet (`SCM_MAX_FD`).
const MOST_DESCRIPTORS: usize = 253;

/// One end of a Unix `SOCK_SEQPACKET` connection: whole messages, in order, or the end.
#[derive(Debug)]
pub struct Packets {
    fd: OwnedFd,
}

/// A packet that arrived.
#[derive(Debug)]
pub struct Packet {
    /// Bytes of it in the caller's buffer.
    pub len: usize,
    /// Descriptors that came beside it.
    pub fds: Vec<OwnedFd>,
    /// This process had no room for the descriptors (`EMFILE`): those that came are closed again, and
    /// the others lost.
    pub lost_fds: bool,
}

/// Why no packet went or came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// Nothing there now, or no room now; only on a non-blocking end.
    #[error("would block")]
    WouldBlock,
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// A packet longer than the receiver's buffer. It is lost, and with it the trust in its sender.
    #[error("a packet of more than {room} bytes")]
    TooLong {
        /// The receiver's buffer.
        room: usize,
    },
    /// More descriptors than the receiver expects. They were closed.
    #[error("more than {most} descriptors beside a packet")]
    TooManyDescriptors {
        /// The most the receiver takes.
        most: usize,
    },
    /// Anything else the kernel says.
    #[error("packet socket")]
    Socket(#[from] io::Error),
}

impl Packets {
    /// Two connected ends. Both block until [`set_nonblocking`](Self::set_nonblocking).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Makes calls on this end return [`PacketError::WouldBlock`] instead of waiting.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&self.fd, FcntlArg::F_GETFL)?);
        fcntl(&self.fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Sends one packet, whole or not at all. An empty packet is refused: it would look like the
    /// end of the connection.
    pub fn send(&self, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
        self.send_as(data, fds, MsgFlags::empty())
    }

    /// As [`send`](Self::send), and never waits, whatever somebody who shares this end made of it.
    pub fn send_at_once(&self, data: &[u8]) -> Result<(), PacketError> {
        self.send_as(data, &[], MsgFlags::MSG_DONTWAIT)
    }

    fn send_as(
        &self,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
        how: MsgFlags,
    ) -> Result<(), PacketError> {
        if data.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "empty packet").into());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let sent = sendmsg::<()>(
                self.fd.as_raw_fd(),
                &[IoSlice::new(data)],
                control,
                MsgFlags::MSG_NOSIGNAL | how,
                None,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Err(PacketError::WouldBlock),
                Err(Errno::EPIPE | Errno::ECONNRESET) => Err(PacketError::Closed),
                Err(err) => Err(PacketError::Socket(err.into())),
            };
        }
    }

    /// Receives one packet into `data`, with `most_fds` descriptors at the most.
    pub fn receive(&self, data: &mut [u8], most_fds: usize) -> Result<Packet, PacketError> {
        let room = data.len();
        let mut control = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(data)];
        let (len, flags) = loop {
            match recvmsg::<()>(
                self.fd.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(PacketError::WouldBlock),
                Err(Errno::ECONNRESET) => return Err(PacketError::Closed),
                Err(err) => return Err(PacketError::Socket(err.into())),
                Ok(received) => break (received.bytes, received.flags),
            }
        };
        // First of all own what came, so that every way out closes it.
        let own = |fd| {
            // SAFETY: the kernel just made this descriptor for us and told nobody else.
            unsafe { OwnedFd::from_raw_fd(fd) }
        };
        let mut fds: Vec<_> = rights(&control).into_iter().map(own).collect();
        if fds.len() > most_fds {
            return Err(PacketError::TooManyDescriptors { most: most_fds });
        }
        if flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(PacketError::TooLong { room });
        }
        if len == 0 {
            return Err(PacketError::Closed);
        }
        // There is room for as many as the kernel passes, so it is this process that has none.
        let lost_fds = flags.contains(MsgFlags::MSG_CTRUNC);
        if lost_fds {
            fds.clear();
        }
        Ok(Packet { len, fds, lost_fds })
    }
}

/// The descriptors that the kernel has put into `control` (cmsg(3)), which was all zeros before. nix
/// would not say which they are where some are missing, and nobody could close them.
fn rights(mut control: &[u8]) -> Vec<RawFd> {
    const LEN: usize = size_of::<usize>();
    const HEADER: usize = LEN + 2 * size_of::<c_int>();
    let mut found = Vec::new();
    while let Some((header, _)) = control.split_first_chunk::<HEADER>() {
        let len = usize::from_ne_bytes(header[..LEN].try_into().expect("of that length"));
        if len < HEADER || len > control.len() {
            break;
        }
        let (words, _) = control[LEN..len].as_chunks();
        let words: Vec<c_int> = words.iter().map(|word| c_int::from_ne_bytes(*word)).collect();
        // Its level and type, then its data.
        if let [libc::SOL_SOCKET, libc::SCM_RIGHTS, fds @ ..] = &words[..] {
            found.extend(fds);
        }
        control = control.get(len.next_multiple_of(LEN)..).unwrap_or_default();
    }
    found
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for Packets {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<Packets> for OwnedFd {
    fn from(packets: Packets) -> Self {
        packets.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_travels_beside_its_packet() {
        let (a, b) = Packets::pair().unwrap();
        let signal = crate::Signal::new().unwrap();
        a.send(b"x", &[signal.as_fd()]).unwrap();
        let mut data = [0; 8];
        let packet = b.receive(&mut data, 1).unwrap();
        let theirs = crate::Signal::try_from(packet.fds.into_iter().next().unwrap()).unwrap();
        theirs.raise();
        assert_eq!((packet.len, signal.take()), (1, 1));
    }

    #[test]
    fn a_descriptor_is_found_behind_other_things_that_come_beside_a_packet() {
        use nix::sys::socket::{setsockopt, sockopt::PassCred};

        let (a, b) = Packets::pair().unwrap();
        setsockopt(&b.fd, PassCred, &true).unwrap();
        a.send(b"x", &[a.as_fd(), b.as_fd()]).unwrap();
        assert_eq!(b.receive(&mut [0; 8], 2).unwrap().fds.len(), 2);
    }

    #[test]
    fn a_process_without_descriptors_gets_the_packet_and_keeps_none_of_its_descriptors() {
        use nix::sys::resource::{Resource, setrlimit};
        use std::process::Command;

        // In a process of its own, since the limit is everybody's.
        if std::env::var_os("ALONE").is_none() {
            let this = "packets::tests::a_process_without_descriptors_gets_the_packet_and_keeps_none_of_its_descriptors";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let ended = alone.args(["--exact", this]).env("ALONE", "1").status();
            assert!(ended.unwrap().success());
            return;
        }
        let (a, b) = Packets::pair().unwrap();
        let signal = crate::Signal::new().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        // Reading the folder takes one, too.
        let before = open();
        let next_free = signal.as_fd().try_clone_to_owned().unwrap().as_raw_fd() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, next_free + 2, next_free + 2).unwrap();
        let mut data = [0; 8];
        for _ in 0..3 {
            a.send(b"all", &[signal.as_fd(); 2]).unwrap();
            let packet = b.receive(&mut data, 5).unwrap();
            assert_eq!((packet.len, packet.fds.len(), packet.lost_fds), (3, 2, false));
            a.send(b"some", &[signal.as_fd(); 5]).unwrap();
            drop(packet);
            let packet = b.receive(&mut data, 5).unwrap();
            assert_eq!((packet.len, packet.fds.len(), packet.lost_fds), (4, 0, true));
            assert_eq!(open(), before);
        }
    }

    #[test]
    fn what_is_too_much_is_refused_by_name() {
        let (a, b) = Packets::pair().unwrap();
        let mut data = [0; 4];
        a.send(b"longer", &[]).unwrap();
        assert!(matches!(b.receive(&mut data, 0), Err(PacketError::TooLong { room: 4 })));
        a.send(b"x", &[a.as_fd()]).unwrap();
        let err = b.receive(&mut data, 0).unwrap_err();
        assert!(matches!(err, PacketError::TooManyDescriptors { most: 0 }));
        assert!(a.send(b"", &[]).is_err());
        drop(a);
        assert!(matches!(b.receive(&mut data, 0), Err(PacketError::Closed)));
    }
}
