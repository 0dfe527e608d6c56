//! A device server that is honest until told otherwise.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use iohost_vfio_user::{Client, Options, VfioUserError};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

pub(crate) const VERSION: usize = 0;
pub(crate) const DEVICE_INFO: usize = 1;
pub(crate) const FIRST_REGION_INFO: usize = 2;
pub(crate) const FIRST_IRQ_INFO: usize = 10;
/// Exchanges that a connect makes with this server.
pub(crate) const EXCHANGES: usize = 13;

pub(crate) const REPLY: u32 = 1;
pub(crate) const ERROR: u32 = 0x20;
pub(crate) const EINVAL: u32 = 22;

/// Bytes of the device's BAR 0.
pub(crate) const BAR_SIZE: u64 = 0x4000;

/// A message as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) id: u16,
    pub(crate) command: u16,
    pub(crate) payload: Vec<u8>,
}

/// A message about to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) id: u16,
    pub(crate) command: u16,
    /// Bytes of the message, as the header claims; `None` claims the truth.
    pub(crate) size: Option<u32>,
    pub(crate) flags: u32,
    pub(crate) errno: u32,
    pub(crate) payload: Vec<u8>,
}

impl Reply {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let size = self.size.unwrap_or(16 + self.payload.len() as u32);
        let mut bytes = Vec::new();
        bytes.extend(self.id.to_ne_bytes());
        bytes.extend(self.command.to_ne_bytes());
        bytes.extend(size.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(self.errno.to_ne_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

/// A server's end of the connection.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
}

impl Peer {
    /// The next message; `None` once the client is gone.
    pub(crate) fn next(&mut self) -> Option<Request> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).ok()?;
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
        let mut payload = vec![0; size - 16];
        self.stream.read_exact(&mut payload).ok()?;
        Some(Request {
            id: u16::from_ne_bytes(header[0..2].try_into().unwrap()),
            command: u16::from_ne_bytes(header[2..4].try_into().unwrap()),
            payload,
        })
    }

    pub(crate) fn send(&mut self, reply: &Reply) {
        // The client may have had enough and be gone; what it made of that is asserted there.
        let _ = self.stream.write_all(&reply.bytes());
    }

    pub(crate) fn send_with(&mut self, reply: &Reply, descriptors: &[BorrowedFd<'_>]) {
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let bytes = reply.bytes();
        sendmsg::<UnixAddr>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&numbers)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .unwrap();
    }

    /// Answers honestly until `count` exchanges are over.
    pub(crate) fn behave(&mut self, count: usize) {
        for _ in 0..count {
            let Some(request) = self.next() else { return };
            self.send(&honest(&request));
        }
    }

    /// Sends a request of its own and returns flags, error number and payload of the answer.
    pub(crate) fn ask(&mut self, command: u16, payload: Vec<u8>) -> (u32, u32, Vec<u8>) {
        let request = Reply { id: 77, command, size: None, flags: 0, errno: 0, payload };
        self.send(&request);
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        assert_eq!(header[0..2], 77u16.to_ne_bytes(), "the id of the answer");
        assert_eq!(header[2..4], command.to_ne_bytes(), "the command of the answer");
        let at = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; at(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        (at(8), at(12), payload)
    }
}

/// What a well-behaved server answers.
pub(crate) fn honest(request: &Request) -> Reply {
    let index = |at: usize| u32::from_ne_bytes(request.payload[at..at + 4].try_into().unwrap());
    let payload = match request.command {
        1 => [&[0, 0, 1, 0][..], b"{\"capabilities\":{\"max_msg_fds\":1}}\0"].concat(),
        4 => words(&[16, 3, 9, 5]),
        5 => region_info(index(8)),
        7 => {
            words(&[16, if index(8) == 0 { 7 } else { 1 }, index(8), [1, 4, 0][index(8) as usize]])
        }
        9 => [&request.payload[..16], &vec![0xab; index(12) as usize]].concat(),
        10 => request.payload[..16].to_vec(),
        3 => request.payload[..24].to_vec(),
        _ => Vec::new(),
    };
    let (id, command) = (request.id, request.command);
    Reply { id, command, size: None, flags: REPLY, errno: 0, payload }
}

pub(crate) fn region_info(index: u32) -> Vec<u8> {
    let size = match index {
        0 => BAR_SIZE,
        7 => 256,
        _ => 0,
    };
    [words(&[32, 3, index, 0]), size.to_ne_bytes().to_vec(), vec![0; 8]].concat()
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// A server in a thread of its own, which serves one client with `script`.
pub(crate) struct Server {
    _folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
    thread: JoinHandle<()>,
}

impl Server {
    pub(crate) fn start(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            script(Peer { stream });
        });
        Self { _folder: folder, path, thread }
    }

    /// Answers the connect, then follows `script`.
    pub(crate) fn start_connected(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        Self::start(|mut peer| {
            peer.behave(EXCHANGES);
            script(peer);
        })
    }

    pub(crate) fn connect(&self) -> Result<Client, VfioUserError> {
        Client::connect(&self.path)
    }

    /// Connects with a deadline for tests in which it is meant to pass.
    pub(crate) fn connect_impatiently(&self) -> Result<Client, VfioUserError> {
        Client::connect_with(&self.path, &Options { deadline: Duration::from_millis(250) })
    }

    /// Waits for the script to end; its assertions are this test's.
    pub(crate) fn join(self) {
        self.thread.join().unwrap();
    }
}
