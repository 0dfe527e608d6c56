//! What a client can do wrong: to the daemon, to a driver host, to memory that it shares with one.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use fastrand::Rng;
use iohost_event::Packets;
use iohost_interface::Arguments;
use iohost_interface::packet::{Call, LONGEST};
use iohost_memory::ring::{Bell, Notify, Ring};

/// Something that a client does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offence {
    /// Says half of something to the daemon and leaves.
    HalfRequest,
    /// Says nonsense to the daemon.
    NoRequest,
    /// Opens a session and is gone.
    Vanishes,
    /// Sends the driver what is no call.
    NoCall,
    /// Sends the driver half a call.
    HalfCall,
    /// Sends a descriptor that nobody asked for.
    Descriptor,
    /// Sends calls and reads no answer.
    Flood,
    /// Writes anything over the data queues, and rings their bells.
    Scribble,
}

/// Calls of a flood.
const FLOOD: u64 = 200;

impl Offence {
    pub(crate) const ALL: [Self; 8] = [
        Self::HalfRequest,
        Self::NoRequest,
        Self::Vanishes,
        Self::NoCall,
        Self::HalfCall,
        Self::Descriptor,
        Self::Flood,
        Self::Scribble,
    ];

    /// Commits it. That it is refused, or hung up on, is as it should be.
    pub(crate) fn commit(self, control: &Path, service: &str, random: &mut Rng) -> io::Result<()> {
        match self {
            Self::HalfRequest => {
                let request = open_request(service);
                let half = random.usize(..request.len());
                (&UnixStream::connect(control)?).write_all(&request.as_bytes()[..half])?;
            }
            Self::NoRequest => {
                let mut nonsense = vec![0; random.usize(1..2000)];
                random.fill(&mut nonsense);
                // The daemon may hang up in the middle of it.
                let _ = (&UnixStream::connect(control)?).write_all(&nonsense);
            }
            Self::Vanishes => drop(RawSession::open(control, service)?),
            Self::NoCall => {
                let mut nonsense = vec![0; random.usize(1..LONGEST)];
                random.fill(&mut nonsense);
                RawSession::open(control, service)?.send(&nonsense);
            }
            Self::HalfCall => {
                let call = factorial(1);
                let half = random.usize(1..call.len());
                RawSession::open(control, service)?.send(&call[..half]);
            }
            Self::Descriptor => {
                let session = RawSession::open(control, service)?;
                let _ = session.socket.send(&factorial(1), &[session.socket.as_fd()]);
            }
            Self::Flood => {
                let session = RawSession::open(control, service)?;
                session.socket.set_nonblocking()?;
                (0..FLOOD).for_each(|id| session.send(&factorial(id)));
            }
            Self::Scribble => RawSession::open(control, service)?.scribble(random),
        }
        Ok(())
    }
}

fn open_request(service: &str) -> String {
    format!(
        "{{\"method\":\"io.iohost.Open\",\"parameters\":{{\"service\":\"{service}\",\"queue_bytes\":\
         [{QUEUE_BYTES},{QUEUE_BYTES}]}}}}\0"
    )
}

/// Of the queues of such a session.
const QUEUE_BYTES: u32 = 4096;

fn factorial(id: u64) -> Vec<u8> {
    let arguments = Arguments { scalars: vec![5], ..Default::default() };
    Call { id, selector: 0, arguments }.encode().expect("within all limits")
}

/// A session as descriptors: its socket, then memory and two eventfds per queue.
struct RawSession {
    socket: Packets,
    queues: Vec<OwnedFd>,
}

impl RawSession {
    fn open(control: &Path, service: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(control)?;
        (&stream).write_all(open_request(service).as_bytes())?;
        let mut reply = vec![0; 65536];
        let packet = Packets::from(OwnedFd::from(stream)).receive(&mut reply, 16);
        let mut fds = packet.map_err(io::Error::other)?.fds.into_iter();
        let refused = || {
            let text = String::from_utf8_lossy(&reply);
            io::Error::other(text.trim_end_matches('\0').to_owned())
        };
        let socket = Packets::from(fds.next().ok_or_else(refused)?);
        Ok(Self { socket, queues: fds.collect() })
    }

    /// Or not: the driver host may have hung up.
    fn send(&self, packet: &[u8]) {
        let _ = self.socket.send(packet, &[]);
    }

    fn scribble(self, random: &mut Rng) {
        let mut queues = self.queues.into_iter();
        while let (Some(memory), Some(available), Some(serviced)) =
            (queues.next(), queues.next(), queues.next())
        {
            let Ok(ring) = Ring::attach(memory, QUEUE_BYTES.into()) else { continue };
            let memory = ring.memory();
            for _ in 0..random.usize(1..50) {
                let at = random.usize(..memory.len() - 4);
                memory.write_at(at, &random.u32(..).to_ne_bytes());
            }
            // An index that could be one, for what lies behind the first checks.
            for index in [0, 4, 64] {
                memory.write_at(index, &(4 * random.u32(..QUEUE_BYTES / 4)).to_ne_bytes());
            }
            // One of them takes it: the other is there to be heard.
            Bell::from(available).notify();
            Bell::from(serviced).notify();
        }
    }
}
