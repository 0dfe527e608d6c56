//! One driver host process and the conversation with it.
//!
//! Nothing here waits for the process: sending and receiving return at once, and its end is
//! learned from a descriptor that becomes readable.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use iohost_control::host::{Failure, FromHost, LONGEST_MESSAGE, MOST_DESCRIPTORS, ToHost};
use iohost_event::{PacketError, Packets, ProcessHandle, close_on_exec};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::host_records::Files;

/// A driver host that has been started. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct DriverProcess {
    origin: Origin,
    handle: ProcessHandle,
    socket: Packets,
    files: Files,
}

/// Who started it.
#[derive(Debug)]
enum Origin {
    Ours(Child),
    /// An earlier daemon. How it ended is told to its parent alone, which is the machine's first
    /// process by now, or a reaper of orphans: waitid(2) on the pidfd says ECHILD, and to be a reaper
    /// helps only for processes that descend from us.
    Earlier {
        pid: u32,
    },
}

/// How a driver host ended.
#[derive(Clone, Debug)]
pub(crate) struct Exit {
    /// The signal that it ended by, if it was one.
    pub(crate) signal: Option<i32>,
    /// `exited with code 3`.
    pub(crate) words: String,
}

impl Exit {
    pub(crate) fn is_sigkill(&self) -> bool {
        self.signal == Some(Signal::SIGKILL as i32)
    }
}

/// What a driver host says next.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A message, with its descriptors.
    Message(FromHost, Vec<OwnedFd>),
    /// Nothing for now.
    Nothing,
    /// It closed its end: it is about to end, or has ended.
    Closed,
    /// Something that is no message; in words.
    Garbage(String),
}

impl DriverProcess {
    /// Starts the program. `name` is the service's, for its log lines and the list of processes.
    pub(crate) fn spawn(program: &Path, name: &str, files: Files) -> Result<Self, Failure> {
        let refused = |err: io::Error| {
            Failure::new(
                "driver-host",
                format!("the driver host {} cannot be started: {err}", program.display()),
                "install iohost-driver-host beside iohost, or name it with --driver-host",
            )
        };
        let (ours, theirs) = Packets::pair().map_err(refused)?;
        ours.set_nonblocking().map_err(refused)?;
        // What the daemon inherited is no driver's: no sandbox takes away what is open.
        close_on_exec().map_err(refused)?;
        let mut child = Command::new(program)
            .args(["--device", name])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // A signal from the terminal is for the daemon, which then stops its driver hosts.
            .process_group(0)
            .spawn()
            .map_err(refused)?;
        let handle = ProcessHandle::of_child(&child).map_err(|err| {
            // Without a handle nobody would notice its end.
            let _ = child.kill();
            let _ = child.wait();
            refused(err)
        })?;
        Ok(Self { origin: Origin::Ours(child), handle, socket: ours, files })
    }

    /// One that an earlier daemon started.
    pub(crate) fn earlier(pid: u32, handle: ProcessHandle, socket: Packets, files: Files) -> Self {
        Self { origin: Origin::Earlier { pid }, handle, socket, files }
    }

    pub(crate) fn pid(&self) -> u32 {
        match &self.origin {
            Origin::Ours(child) => child.id(),
            Origin::Earlier { pid } => *pid,
        }
    }

    /// Its files in the runtime directory.
    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    /// Readable when there is a message.
    pub(crate) fn messages(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Readable when the process has ended.
    pub(crate) fn end(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Sends a message. `WouldBlock` means that the driver host has not read the earlier ones.
    pub(crate) fn send(&self, message: &ToHost, fds: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
        let text = serde_json::to_vec(message).expect("messages have no maps with odd keys");
        self.socket.send(&text, fds)
    }

    /// The next message, if there is one.
    pub(crate) fn receive(&self) -> Heard {
        let mut buffer = vec![0; LONGEST_MESSAGE];
        let packet = match self.socket.receive(&mut buffer, MOST_DESCRIPTORS) {
            Ok(packet) => packet,
            Err(PacketError::WouldBlock) => return Heard::Nothing,
            Err(PacketError::Closed) => return Heard::Closed,
            Err(err) => return Heard::Garbage(err.to_string()),
        };
        match serde_json::from_slice(&buffer[..packet.len]) {
            Ok(
                message @ (FromHost::HandedOver(_)
                | FromHost::HandedSession(_)
                | FromHost::Saved(_)),
            ) => Heard::Message(message, packet.fds),
            Ok(_) if !packet.fds.is_empty() => {
                Heard::Garbage("descriptors that nobody asked for".to_owned())
            }
            Ok(message) => Heard::Message(message, Vec::new()),
            Err(err) => Heard::Garbage(format!("a message that makes no sense: {err}")),
        }
    }

    /// Kills the process; its end is reported as any other.
    pub(crate) fn kill(&self) {
        // The only failure is that it has ended.
        let _ = self.handle.signal(Signal::SIGKILL);
    }

    /// How the process ended; `None` while it runs.
    pub(crate) fn ended(&mut self) -> Option<Exit> {
        let exit = match &mut self.origin {
            Origin::Ours(child) => match child.try_wait() {
                Ok(None) => return None,
                Ok(Some(status)) => Exit { signal: status.signal(), words: in_words(status) },
                Err(err) => {
                    Exit { signal: None, words: format!("ended, but how is unknown: {err}") }
                }
            },
            Origin::Earlier { .. } if self.handle.has_ended() => Exit {
                signal: None,
                words: "ended; how is unknown, an earlier daemon started it".to_owned(),
            },
            Origin::Earlier { .. } => return None,
        };
        self.files.remove();
        Some(exit)
    }

    /// Lets it run on without this daemon.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }

    /// Whether a signal has stopped the process, and none has it go on yet. Nobody tells us of one that
    /// an earlier daemon started: it hangs as soon as it is in the middle of something.
    pub(crate) fn is_stopped(&self) -> bool {
        let Origin::Ours(child) = &self.origin else { return false };
        let id = Id::Pid(Pid::from_raw(child.id() as i32));
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        matches!(waitid(id, flags), Ok(WaitStatus::Stopped(..)))
    }
}

impl DriverProcess {
    /// Whether the process is known to have ended, and by this signal.
    pub(crate) fn was_killed_by(&mut self, signal: Signal) -> bool {
        let Origin::Ours(child) = &mut self.origin else { return false };
        let status = child.try_wait().ok().flatten();
        status.and_then(|status| status.signal()) == Some(signal as i32)
    }
}

impl Drop for DriverProcess {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
            // Not waited for: a process that hangs in the kernel must not hang us.
        }
    }
}

fn in_words(status: ExitStatus) -> String {
    if let Some(number) = status.signal() {
        let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
        let dumped = if status.core_dumped() { ", core dumped" } else { "" };
        return format!("was killed by signal {number} ({name}{dumped})");
    }
    match status.code() {
        Some(code) => format!("exited with code {code}"),
        None => format!("ended with status {status}"),
    }
}
