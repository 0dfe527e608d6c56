//! A Varlink transport that no peer can hold up or fill up.
//!
//! zlink reads messages of up to 100 MB, takes any number of descriptors, leaves those it receives
//! open across `exec`, and waits for ever for the rest of a message and for room to write. A
//! [`GuardedSocket`] is a Unix socket with limits on all of that, under zlink's own protocol code.
//! Breaking one of them ends the connection and nothing else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iohost_event::{PacketError, Packets};
use smol::{Async, Timer, future};
use zlink::connection::socket::{self, ReadResult, UnixSocket};
use zlink::smol::unix::Stream;

/// What a peer may do on one connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest message in bytes, with its terminator.
    pub message: usize,
    /// The most descriptors beside what one read returns.
    pub descriptors: usize,
    /// The time from the first byte of a message to its last, and for a write to find room.
    pub patience: Duration,
}

impl Limits {
    /// For the daemon: calls are short, and no method takes a descriptor.
    pub const SERVER: Limits =
        Limits { message: 64 * 1024, descriptors: 0, patience: Duration::from_secs(10) };

    /// For a client: the reply to `Open` carries one session's descriptors.
    pub const CLIENT: Limits = Limits {
        message: 1024 * 1024,
        descriptors: crate::host::MOST_DESCRIPTORS,
        patience: Duration::from_secs(10),
    };
}

/// A connected Unix stream socket with [`Limits`]; used inside an async runtime of `smol`.
#[derive(Debug)]
pub struct GuardedSocket {
    read: ReadHalf,
    write: WriteHalf,
}

impl GuardedSocket {
    /// Guards a connected socket.
    pub fn new(stream: UnixStream, limits: Limits) -> zlink::Result<Self> {
        let incoming = Packets::from(OwnedFd::from(stream.try_clone()?));
        let (_, outgoing) = socket::Socket::split(Stream::try_from(stream)?);
        Ok(Self {
            read: ReadHalf {
                socket: Arc::new(Async::new(incoming)?),
                limits,
                unfinished: 0,
                deadline: None,
            },
            write: WriteHalf { inner: outgoing, patience: limits.patience },
        })
    }

    /// Connects to a listening socket.
    pub async fn connect(path: &Path, limits: Limits) -> zlink::Result<Self> {
        let stream = Async::<UnixStream>::connect(path).await?;
        Self::new(stream.into_inner()?, limits)
    }
}

impl socket::Socket for GuardedSocket {
    type ReadHalf = ReadHalf;
    type WriteHalf = WriteHalf;

    const CAN_TRANSFER_FDS: bool = true;

    fn split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct ReadHalf {
    /// `Packets` receives from stream sockets too; its receive closes descriptors on `exec` and
    /// refuses too many of them.
    socket: Arc<Async<Packets>>,
    limits: Limits,
    /// Bytes received since the last terminator.
    unfinished: usize,
    /// When the message those bytes belong to has to be whole.
    deadline: Option<Instant>,
}

impl socket::ReadHalf for ReadHalf {
    async fn read(&mut self, buf: &mut [u8]) -> zlink::Result<ReadResult> {
        let most = self.limits.descriptors;
        let receive = self.socket.read_with(|socket| match socket.receive(buf, most) {
            Ok(packet) if packet.lost_fds => {
                Err(io::Error::other("this process has no room for the descriptors that came"))
            }
            Ok(packet) => Ok(ReadResult::new(packet.len).set_fds(packet.fds)),
            Err(PacketError::Closed) => Ok(ReadResult::new(0)),
            Err(err) => Err(into_io(err)),
        });
        let result = match self.deadline {
            None => receive.await?,
            Some(deadline) => {
                future::or(receive, async {
                    Timer::at(deadline).await;
                    Err(timed_out("the rest of a message"))
                })
                .await?
            }
        };

        let received = &buf[..result.bytes_read()];
        match received.iter().rposition(|byte| *byte == 0) {
            Some(terminator) => {
                self.unfinished = received.len() - terminator - 1;
                self.deadline = None;
            }
            None => self.unfinished += received.len(),
        }
        if self.unfinished > self.limits.message {
            return Err(zlink::Error::BufferOverflow);
        }
        if self.unfinished > 0 && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + self.limits.patience);
        }
        Ok(result)
    }
}

impl AsFd for ReadHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().as_fd()
    }
}

impl UnixSocket for ReadHalf {}

/// The half that sends.
#[derive(Debug)]
pub struct WriteHalf {
    inner: <Stream as socket::Socket>::WriteHalf,
    patience: Duration,
}

impl socket::WriteHalf for WriteHalf {
    async fn write(
        &mut self,
        buf: &[u8],
        fds: &[impl AsFd],
        credentials: Option<&zlink::connection::PassedCredentials>,
    ) -> zlink::Result<()> {
        let patience = self.patience;
        future::or(self.inner.write(buf, fds, credentials), async {
            Timer::after(patience).await;
            Err(timed_out("room to write a message").into())
        })
        .await
    }
}

impl AsFd for WriteHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl UnixSocket for WriteHalf {}

fn into_io(err: PacketError) -> io::Error {
    match err {
        PacketError::WouldBlock => io::ErrorKind::WouldBlock.into(),
        PacketError::Socket(err) => err,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

fn timed_out(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("waited too long for {what}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::socket::{setsockopt, sockopt::SndBuf};
    use smol::block_on;
    use zlink::Connection;

    use super::*;

    const TIGHT: Limits =
        Limits { message: 1000, descriptors: 0, patience: Duration::from_millis(20) };

    fn guarded() -> (UnixStream, Connection<GuardedSocket>) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        (theirs, Connection::new(GuardedSocket::new(ours, TIGHT).unwrap()))
    }

    fn receive(ours: &mut Connection<GuardedSocket>) -> zlink::Result<serde_json::Value> {
        block_on(ours.receive_call::<serde_json::Value>()).map(|(call, _)| call.method().clone())
    }

    #[test]
    fn a_message_over_the_limit_ends_the_connection() {
        let (mut theirs, mut ours) = guarded();
        theirs.write_all(&[b' '; 2000]).unwrap();
        let err = receive(&mut ours).unwrap_err();
        assert!(matches!(err, zlink::Error::BufferOverflow), "{err:?}");
    }

    #[test]
    fn half_a_message_is_not_waited_for_for_ever() {
        let (mut theirs, mut ours) = guarded();
        theirs.write_all(b"{\"method\":").unwrap();
        let err = receive(&mut ours).unwrap_err();
        assert!(err.to_string().contains("waited too long for the rest of a message"), "{err}");
    }

    #[test]
    fn a_descriptor_that_no_method_takes_ends_the_connection() {
        let (theirs, mut ours) = guarded();
        let theirs = Packets::from(OwnedFd::from(theirs));
        theirs.send(b"{}\0", &[theirs.as_fd()]).unwrap();
        let err = receive(&mut ours).unwrap_err();
        assert!(err.to_string().contains("more than 0 descriptors"), "{err}");
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for_for_ever() {
        let (_theirs, mut ours) = guarded();
        setsockopt(ours.write().write_half(), SndBuf, &4096).unwrap();
        let long = zlink::Reply::new(Some("x".repeat(30_000)));
        let err = block_on(ours.send_reply(&long, vec![])).unwrap_err();
        assert!(err.to_string().contains("waited too long for room"), "{err}");
    }
}
