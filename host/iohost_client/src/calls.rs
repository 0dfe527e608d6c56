//! Calls over a session's socket.
//!
//! One thread per session receives replies and hands each to the call it answers; calls are sent
//! by whoever makes them. Neither waits for the other.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use iohost_event::{PacketError, Packets, Poller, Ready};
use iohost_interface::packet::{self, Call, ReplyPacket};
use iohost_interface::{Arguments, Caller, IOReturn, PendingAnswer, ReplySink, answer_pair};

/// The calls under way on one session.
#[derive(Debug)]
pub(crate) struct Calls {
    socket: Packets,
    waiting: Mutex<Waiting>,
}

/// Invariant: once `is_offline`, `sinks` is empty and stays so.
struct Waiting {
    sinks: HashMap<u64, Box<dyn ReplySink>>,
    next_id: u64,
    is_offline: bool,
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("calls", &self.sinks.len()).finish_non_exhaustive()
    }
}

impl Calls {
    /// Takes the session's socket and starts the receiving thread, which ends with the connection.
    pub(crate) fn start(socket: OwnedFd) -> io::Result<Arc<Self>> {
        let socket = Packets::from(socket);
        socket.set_nonblocking()?;
        let poller = Poller::new()?;
        poller.watch(&socket, 0)?;
        let waiting = Mutex::new(Waiting { sinks: HashMap::new(), next_id: 1, is_offline: false });
        let calls = Arc::new(Self { socket, waiting });
        let receiver = calls.clone();
        thread::Builder::new()
            .name("iohost-session".into())
            .spawn(move || receiver.receive_all(&poller))?;
        Ok(calls)
    }

    /// A duplicate of the socket, to notice the end of the connection.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Ends the connection for both sides, and with it the receiving thread.
    pub(crate) fn close(&self) {
        if let Ok(socket) = self.duplicate() {
            // `shutdown` is the same for every kind of socket; a connection that has ended
            // already needs none.
            let _ = UnixStream::from(socket).shutdown(Shutdown::Both);
        }
    }

    fn receive_all(&self, poller: &Poller) {
        let mut buffer = vec![0; packet::LONGEST];
        let mut ready = Ready::new(1);
        loop {
            match self.socket.receive(&mut buffer, 0) {
                Ok(packet) => match ReplyPacket::decode(&buffer[..packet.len]) {
                    Ok(reply) => self.deliver(reply),
                    // Whoever sends this is no driver host of ours.
                    Err(_) => break,
                },
                Err(PacketError::WouldBlock) => {
                    if poller.wait(&mut ready, None).is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        self.close();
        let sinks = {
            let mut waiting = self.waiting();
            waiting.is_offline = true;
            std::mem::take(&mut waiting.sinks)
        };
        for sink in sinks.into_values() {
            sink.deliver(Err(IOReturn::OFFLINE));
        }
    }

    fn deliver(&self, reply: ReplyPacket) {
        let sink = self.waiting().sinks.remove(&reply.id);
        // An answer to a call that nobody made is the driver host's mistake, and nobody's loss.
        if let Some(sink) = sink {
            sink.deliver(reply.answer);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no code that can panic runs under this lock")
    }
}

impl Caller for Calls {
    /// Sends at once, or answers at once with why not: `OFFLINE`, `BUSY` when the driver host has
    /// not read the earlier calls, or what is wrong with the arguments.
    fn call(&self, selector: u64, arguments: Arguments) -> Box<dyn PendingAnswer> {
        let (sink, pending) = answer_pair();
        let id = {
            let mut waiting = self.waiting();
            if waiting.is_offline {
                drop(waiting);
                sink.deliver(Err(IOReturn::OFFLINE));
                return pending;
            }
            let id = waiting.next_id;
            waiting.next_id += 1;
            // Before it is sent: the answer may come before `send` returns.
            waiting.sinks.insert(id, sink);
            id
        };
        let sent = Call { id, selector, arguments }.encode().and_then(|packet| {
            self.socket.send(&packet, &[]).map_err(|err| match err {
                PacketError::WouldBlock => IOReturn::BUSY,
                PacketError::Closed => IOReturn::OFFLINE,
                _ => IOReturn::IPC_ERROR,
            })
        });
        if let Err(status) = sent {
            self.deliver(ReplyPacket { id, answer: Err(status) });
        }
        pending
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn session() -> (Packets, Arc<Calls>) {
        let (theirs, ours) = Packets::pair().unwrap();
        (theirs, Calls::start(ours.into()).unwrap())
    }

    fn receive(theirs: &Packets) -> Call {
        let mut buffer = vec![0; packet::LONGEST];
        let packet = theirs.receive(&mut buffer, 0).unwrap();
        Call::decode(&buffer[..packet.len]).unwrap()
    }

    fn number(scalar: u64) -> Arguments {
        Arguments { scalars: vec![scalar], ..Default::default() }
    }

    #[test]
    fn answers_find_their_calls_in_any_order() {
        let (theirs, calls) = session();
        let mut first = calls.call(0, number(1));
        let mut second = calls.call(0, number(2));

        let asked = [receive(&theirs), receive(&theirs)];
        for call in asked.into_iter().rev() {
            let reply = ReplyPacket { id: call.id, answer: Ok(call.arguments) };
            theirs.send(&reply.encode(), &[]).unwrap();
        }

        assert_eq!(first.wait(None), Ok(number(1)));
        assert_eq!(second.wait(None), Ok(number(2)));
    }

    #[test]
    fn a_call_that_waits_ends_when_the_driver_host_does() {
        let (theirs, calls) = session();
        let mut answer = calls.call(0, number(1));
        drop(theirs);
        assert_eq!(answer.wait(None), Err(IOReturn::OFFLINE));
        assert_eq!(calls.call(0, number(1)).wait(None), Err(IOReturn::OFFLINE));
    }

    #[test]
    fn a_reply_that_makes_no_sense_ends_the_session() {
        let (theirs, calls) = session();
        let mut answer = calls.call(0, number(1));
        theirs.send(b"nonsense", &[]).unwrap();
        assert_eq!(answer.wait(None), Err(IOReturn::OFFLINE));
    }

    #[test]
    fn a_driver_host_that_does_not_read_makes_calls_fail_not_block() {
        let (_theirs, calls) = session();
        let long = || Arguments { structure: vec![0; 4096], ..Default::default() };
        let mut pending: Vec<_> = (0..1000).map(|_| calls.call(0, long())).collect();
        let last = pending.last_mut().unwrap();
        assert_eq!(last.wait(Some(Duration::from_secs(60))), Err(IOReturn::BUSY));
    }

    #[test]
    fn closing_a_session_answers_what_waits() {
        let (_theirs, calls) = session();
        let mut answer = calls.call(0, number(1));
        calls.close();
        assert_eq!(answer.wait(None), Err(IOReturn::OFFLINE));
    }
}
