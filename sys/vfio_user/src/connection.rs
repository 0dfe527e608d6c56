//! One request, one reply, over a stream socket that also carries descriptors.
//!
//! Invariant: between calls nothing is owed by us, and everything buffered came after the last
//! reply. Any error from here means that this no longer holds; the connection is then dropped.

#![expect(unsafe_code)]
// UNSAFETY: descriptors arrive as plain numbers and have to be given an owner.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::dma::{ACCESS, DmaTable, MOST_DATA};
use crate::error::VfioUserError;
use crate::wire::{Command, HEADER, Header, Request};

/// The most descriptors the kernel passes in one message (`SCM_MAX_FD`). With room for all of
/// them none can be cut off, which would leave the others without an owner.
const MOST_DESCRIPTORS_IN_FLIGHT: usize = 253;

/// The longest message: a request of the server to write the most data it may.
const LONGEST_MESSAGE: usize = HEADER + ACCESS + MOST_DATA as usize;

/// What a reply has to look like.
#[derive(Clone, Debug)]
pub(crate) struct Expect {
    /// Bytes after the header.
    pub(crate) payload: RangeInclusive<usize>,
    /// The most descriptors beside it.
    pub(crate) descriptors: usize,
}

impl Expect {
    /// A reply of exactly `payload` bytes after the header.
    pub(crate) fn bytes(payload: usize) -> Self {
        Self { payload: payload..=payload, descriptors: 0 }
    }
}

/// A reply without its header.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    pub(crate) payload: &'a [u8],
    pub(crate) descriptors: Vec<OwnedFd>,
}

#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    deadline: Duration,
    next_id: u16,
    /// Bytes `consumed..filled` came and are not yet used.
    buffer: Vec<u8>,
    filled: usize,
    consumed: usize,
    descriptors: Vec<OwnedFd>,
    control: Vec<u8>,
    /// Replies to the server's own requests are built here.
    answer: Vec<u8>,
    /// The memory that the server's own requests may reach.
    pub(crate) dma: DmaTable,
}

impl Connection {
    pub(crate) fn open(path: &Path, deadline: Duration) -> io::Result<Self> {
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // Also bounds `connect`, which waits while the server's backlog is full: `unix(7)` and
        // `SO_SNDTIMEO` in `socket(7)`.
        let limit = TimeVal::new(deadline.as_secs() as _, deadline.subsec_micros().into());
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self {
            socket,
            deadline,
            next_id: 0,
            buffer: vec![0; 256],
            filled: 0,
            consumed: 0,
            descriptors: Vec::new(),
            control: nix::cmsg_space!([RawFd; MOST_DESCRIPTORS_IN_FLIGHT]),
            answer: Vec::new(),
            dma: DmaTable::default(),
        })
    }

    /// Sends a request and waits for its reply, answering what the server asks meanwhile.
    ///
    /// The whole exchange has one deadline, so a server that keeps asking cannot hold us.
    /// Errors: [`VfioUserError::Refused`] when the reply says so; every other error ends the
    /// connection.
    pub(crate) fn call(
        &mut self,
        mut request: Request,
        descriptors: &[BorrowedFd<'_>],
        expect: Expect,
    ) -> Result<Reply<'_>, VfioUserError> {
        let exchange = Exchange {
            command: request.command,
            id: self.next_id,
            until: Instant::now() + self.deadline,
            expect,
        };
        self.next_id = self.next_id.wrapping_add(1);
        self.send(&exchange, request.finish(exchange.id), descriptors)?;

        let header = loop {
            let header = self.receive(&exchange)?;
            if header.is_reply() {
                break header;
            }
            self.answer(&exchange, &header)?;
        };
        let descriptors = self.check_reply(&exchange, &header)?;
        let payload = &self.buffer[HEADER..header.size as usize];
        Ok(Reply { payload, descriptors })
    }

    /// Checks that a reply is the one to our request, and takes its descriptors.
    fn check_reply(
        &mut self,
        exchange: &Exchange,
        header: &Header,
    ) -> Result<Vec<OwnedFd>, VfioUserError> {
        let command = exchange.command;
        if header.id != exchange.id || header.command != command as u16 {
            return Err(exchange.not_the_reply(header));
        }
        if header.is_error() {
            self.descriptors.clear();
            return Err(VfioUserError::Refused { command, source: refusal(header.errno) });
        }
        let payload = header.size as usize - HEADER;
        if !exchange.expect.payload.contains(&payload) {
            return Err(exchange.wrong_size(header));
        }
        let (actual, most) = (self.descriptors.len(), exchange.expect.descriptors);
        if actual > most {
            return Err(VfioUserError::WrongDescriptors { command, actual, most });
        }
        Ok(std::mem::take(&mut self.descriptors))
    }

    /// Serves a request of the server, whose message is at the start of the buffer.
    fn answer(&mut self, exchange: &Exchange, header: &Header) -> Result<(), VfioUserError> {
        let payload = &self.buffer[HEADER..header.size as usize];
        let mut answer = std::mem::take(&mut self.answer);
        self.dma.answer(header, payload, &mut answer);
        if !header.wants_no_reply() {
            self.send(exchange, &answer, &[])?;
        }
        self.answer = answer;
        Ok(())
    }

    /// Receives one whole message to the start of the buffer.
    fn receive(&mut self, exchange: &Exchange) -> Result<Header, VfioUserError> {
        self.buffer.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;

        // Asking for the expected reply at once saves a system call for every one after that.
        let hint = HEADER + *exchange.expect.payload.end();
        self.fill(exchange, HEADER, hint)?;
        let header = Header::decode(&self.buffer);
        let size = header.size as usize;
        let most = match (header.is_reply(), header.is_command()) {
            (true, _) => hint,
            (_, true) => LONGEST_MESSAGE,
            _ => return Err(exchange.not_the_reply(&header)),
        };
        if size < HEADER || size > most {
            return Err(exchange.wrong_size(&header));
        }
        self.fill(exchange, size, size)?;
        self.consumed = size;
        Ok(header)
    }

    /// Reads until `need` bytes are buffered, asking for `hint` of them.
    fn fill(&mut self, exchange: &Exchange, need: usize, hint: usize) -> Result<(), VfioUserError> {
        let wanted = need.max(hint);
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
        // The first read of an exchange sleeps in the kernel, which knows the deadline; what
        // comes late or in pieces is waited for with the time that is left.
        let mut flags = MsgFlags::MSG_CMSG_CLOEXEC;
        if self.filled > 0 || Instant::now() + self.deadline > exchange.until + SLACK {
            flags |= MsgFlags::MSG_DONTWAIT;
        }
        while self.filled < need {
            match self.read(wanted, flags) {
                Ok(0) => return Err(VfioUserError::Closed { command: exchange.command }),
                Ok(count) => self.filled += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !flags.contains(MsgFlags::MSG_DONTWAIT) => {
                    return Err(self.timeout(exchange));
                }
                Err(Errno::EAGAIN) => self.wait(exchange, PollFlags::POLLIN)?,
                Err(errno) => return Err(exchange.broken(errno)),
            }
            flags |= MsgFlags::MSG_DONTWAIT;
            let (actual, most) = (self.descriptors.len(), MOST_DESCRIPTORS_IN_FLIGHT);
            if actual > most {
                let command = exchange.command;
                return Err(VfioUserError::WrongDescriptors { command, actual, most });
            }
        }
        Ok(())
    }

    /// One `recvmsg`; descriptors that come with it get an owner at once.
    fn read(&mut self, end: usize, flags: MsgFlags) -> Result<usize, Errno> {
        let mut into = [IoSliceMut::new(&mut self.buffer[self.filled..end])];
        let control = Some(self.control.as_mut_slice());
        let received = recvmsg::<UnixAddr>(self.socket.as_raw_fd(), &mut into, control, flags)?;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                for number in numbers {
                    // SAFETY:
                    // 1. The kernel has just installed this descriptor for us (`unix(7)`,
                    //    SCM_RIGHTS), so it is open.
                    // 2. The number appears in this one control message, which is read once:
                    //    nobody else owns it.
                    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
                    self.descriptors.push(descriptor);
                }
            }
        }
        Ok(received.bytes)
    }

    /// Sends a message whole; its descriptors go with the first byte.
    fn send(
        &self,
        exchange: &Exchange,
        message: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), VfioUserError> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let mut control: &[ControlMessage<'_>] = if numbers.is_empty() { &[] } else { &rights };
        let mut rest = message;
        // As in `fill`: the first time the kernel waits, with SO_SNDTIMEO.
        let mut flags = MsgFlags::MSG_NOSIGNAL;
        while !rest.is_empty() {
            let from = [IoSlice::new(rest)];
            match sendmsg::<UnixAddr>(self.socket.as_raw_fd(), &from, control, flags, None) {
                Ok(count) => {
                    rest = &rest[count..];
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !flags.contains(MsgFlags::MSG_DONTWAIT) => {
                    return Err(self.timeout(exchange));
                }
                Err(Errno::EAGAIN) => self.wait(exchange, PollFlags::POLLOUT)?,
                Err(Errno::EPIPE) => {
                    return Err(VfioUserError::Closed { command: exchange.command });
                }
                Err(errno) => return Err(exchange.broken(errno)),
            }
            flags |= MsgFlags::MSG_DONTWAIT;
        }
        Ok(())
    }

    /// Waits for the socket, at most until the exchange's deadline.
    fn wait(&self, exchange: &Exchange, event: PollFlags) -> Result<(), VfioUserError> {
        let left = exchange.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.timeout(exchange));
        }
        // Rounded up: rounding down would spin through the last millisecond.
        let left =
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut sockets = [PollFd::new(self.socket.as_fd(), event)];
        match poll(&mut sockets, left) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(exchange.broken(errno)),
        }
    }

    fn timeout(&self, exchange: &Exchange) -> VfioUserError {
        VfioUserError::Timeout { command: exchange.command, waited: self.deadline }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How much of the deadline may be gone before a read no longer sleeps for all of it.
const SLACK: Duration = Duration::from_millis(10);

/// A request under way.
struct Exchange {
    command: Command,
    id: u16,
    until: Instant,
    expect: Expect,
}

impl Exchange {
    fn broken(&self, errno: Errno) -> VfioUserError {
        match errno {
            Errno::ECONNRESET => VfioUserError::Closed { command: self.command },
            errno => VfioUserError::Socket { command: self.command, source: errno.into() },
        }
    }

    fn not_the_reply(&self, header: &Header) -> VfioUserError {
        VfioUserError::NotTheReply {
            command: self.command,
            id: self.id,
            actual_command: header.command,
            actual_id: header.id,
            flags: header.flags,
        }
    }

    fn wrong_size(&self, header: &Header) -> VfioUserError {
        let (start, end) = (*self.expect.payload.start(), *self.expect.payload.end());
        VfioUserError::WrongSize {
            command: self.command,
            actual: header.size,
            expected: (HEADER + start) as u32..=(HEADER + end) as u32,
        }
    }
}

/// The error number of a refusal. It is optional (specification, "Header"), and a server can
/// write anything there; the kernel's numbers end at 4095.
fn refusal(errno: u32) -> io::Error {
    match errno {
        1..=4095 => io::Error::from_raw_os_error(errno as i32),
        0 => io::Error::other("the server gave no reason"),
        other => io::Error::other(format!("the server gave error {other:#x}")),
    }
}
