//! Calls over a session's socket, and invocations of actions both ways.
//!
//! One thread per session receives replies and hands each to the call it answers, and invocations
//! to the client's action; calls are sent by whoever makes them. Neither waits for the other.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;

use iohost_event::{PacketError, Packets, Poller, Ready};
use iohost_interface::packet::{
    self, Call, FromDriver, Invocation, ReplyPacket, encode_map, encode_offer, encode_release,
    encode_taken, encode_withdraw,
};
use iohost_interface::{
    ActionTarget, Arguments, Caller, Completion, IOReturn, PassedAction, PendingAnswer, ReplySink,
    answer_pair,
};
use smol::channel::{self, Sender};

/// The calls under way on one session.
#[derive(Debug)]
pub(crate) struct Calls {
    socket: Packets,
    waiting: Mutex<Waiting>,
    /// Small packets that have to arrive and found no room yet, in order.
    unsent: Mutex<VecDeque<Vec<u8>>>,
    this: Weak<Calls>,
}

/// Invariant: once `is_offline`, `sinks`, `mappings` and `actions` are empty and stay so.
struct Waiting {
    sinks: HashMap<u64, Box<dyn ReplySink>>,
    /// Who asked for memory, by numbers from the same row as the calls'.
    mappings: HashMap<u64, Sender<Offer>>,
    next_id: u64,
    /// Our actions that the driver holds, by the number we gave them.
    actions: HashMap<u64, Arc<dyn ActionTarget>>,
    next_action: u64,
    /// Of our memory that was offered.
    next_offer: u64,
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
        let waiting = Waiting {
            sinks: HashMap::new(),
            mappings: HashMap::new(),
            next_id: 1,
            actions: HashMap::new(),
            next_action: 1,
            next_offer: 1,
            is_offline: false,
        };
        let calls = Arc::new_cyclic(|this| Self {
            socket,
            waiting: Mutex::new(waiting),
            unsent: Mutex::default(),
            this: this.clone(),
        });
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
            match self.socket.receive(&mut buffer, 1) {
                Ok(packet) => {
                    let file = packet.fds.into_iter().next();
                    if self.take_in(&buffer[..packet.len], file).is_none() {
                        // Whoever sends this is no driver host of ours.
                        break;
                    }
                    self.send_unsent();
                }
                Err(PacketError::WouldBlock) => {
                    if poller.wait(&mut ready, None).is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        self.close();
        let (sinks, mappings, actions) = {
            let mut waiting = self.waiting();
            waiting.is_offline = true;
            let Waiting { sinks, mappings, actions, .. } = &mut *waiting;
            (std::mem::take(sinks), std::mem::take(mappings), std::mem::take(actions))
        };
        // Whoever waits for memory hears of this by the end of the channel.
        drop((mappings, actions));
        for sink in sinks.into_values() {
            sink.deliver(Err(IOReturn::OFFLINE));
        }
    }

    /// `None` for what cannot come from a driver host.
    fn take_in(&self, packet: &[u8], file: Option<OwnedFd>) -> Option<()> {
        match FromDriver::decode(packet).ok()? {
            FromDriver::Reply(reply) => {
                let asked = self.waiting().mappings.remove(&reply.id);
                match asked {
                    // One that has stopped waiting needs none.
                    Some(asked) => drop(asked.try_send(offer(reply.answer, file))),
                    None => self.deliver(reply),
                }
            }
            FromDriver::Invoke(Invocation { action, arguments }) => {
                let target = self.waiting().actions.get(&action).cloned()?;
                let calls = self.this.clone();
                let taken = Completion::new(move || {
                    if let Some(calls) = calls.upgrade() {
                        calls.send_for_sure(encode_taken(action, 1));
                    }
                });
                // Refused, because its owner is gone or overrun: it counts as taken.
                let _ = target.invoke(arguments, taken);
            }
            FromDriver::Release { action } => {
                let target = self.waiting().actions.remove(&action)?;
                drop(target);
            }
        }
        Some(())
    }

    fn deliver(&self, mut reply: ReplyPacket) {
        if let Ok(results) = &mut reply.answer {
            for PassedAction { scalar, target } in &mut results.actions {
                // In any case, so that an action that nobody takes is released.
                let action = results.scalars[*scalar];
                *target = Some(Arc::new(DriverAction { calls: self.this.clone(), action }));
            }
        }
        let sink = self.waiting().sinks.remove(&reply.id);
        // An answer to a call that nobody made is the driver host's mistake, and nobody's loss.
        if let Some(sink) = sink {
            sink.deliver(reply.answer);
        }
    }

    /// Asks for memory of the driver's.
    ///
    /// Errors: `OFFLINE`, `BUSY` when the driver host has not read the earlier calls, `IPC_ERROR`
    /// for a reply that makes no sense, what the driver said.
    pub(crate) async fn ask_for_memory(&self, memory: u64) -> Offer {
        let (sender, receiver) = channel::bounded(1);
        let id = {
            let mut waiting = self.waiting();
            if waiting.is_offline {
                return Err(IOReturn::OFFLINE);
            }
            let id = waiting.next_id;
            waiting.next_id += 1;
            waiting.mappings.insert(id, sender);
            id
        };
        if let Err(status) = self.send(&encode_map(id, memory)) {
            self.waiting().mappings.remove(&id);
            return Err(status);
        }
        receiver.recv().await.unwrap_or(Err(IOReturn::OFFLINE))
    }

    /// Offers memory of ours to the driver; its number.
    ///
    /// Errors: `OFFLINE`, `BUSY` when the driver host has not read the earlier calls.
    pub(crate) fn offer_memory(
        &self,
        file: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<u64, IOReturn> {
        let number = {
            let mut waiting = self.waiting();
            if waiting.is_offline {
                return Err(IOReturn::OFFLINE);
            }
            let number = waiting.next_offer;
            waiting.next_offer += 1;
            number
        };
        self.send_with(&encode_offer(number, read_only), &[file])?;
        Ok(number)
    }

    /// Takes an offer back.
    pub(crate) fn withdraw_memory(&self, number: u64) {
        self.send_for_sure(encode_withdraw(number));
    }

    /// Numbers our actions among arguments, and keeps them for the driver to invoke.
    fn offer(&self, waiting: &mut Waiting, arguments: &mut Arguments) -> Vec<u64> {
        let mut numbers = Vec::new();
        for PassedAction { scalar, target } in &mut arguments.actions {
            let Some(target) = target.take() else { continue };
            let number = waiting.next_action;
            waiting.next_action += 1;
            waiting.actions.insert(number, target);
            arguments.scalars[*scalar] = number;
            numbers.push(number);
        }
        numbers
    }

    /// Sends a packet that has to arrive, now or when there is room.
    fn send_for_sure(&self, packet: Vec<u8>) {
        self.unsent().push_back(packet);
        self.send_unsent();
    }

    /// Whether everything that has to arrive was sent.
    fn send_unsent(&self) -> bool {
        let mut unsent = self.unsent();
        while let Some(packet) = unsent.front() {
            match self.socket.send(packet, &[]) {
                Err(PacketError::WouldBlock) => return false,
                // On a connection that has ended nothing has to arrive.
                Ok(()) | Err(_) => drop(unsent.pop_front()),
            }
        }
        true
    }

    fn send(&self, packet: &[u8]) -> Result<(), IOReturn> {
        self.send_with(packet, &[])
    }

    fn send_with(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), IOReturn> {
        if !self.send_unsent() {
            return Err(IOReturn::BUSY);
        }
        self.socket.send(packet, fds).map_err(|err| match err {
            PacketError::WouldBlock => IOReturn::BUSY,
            PacketError::Closed => IOReturn::OFFLINE,
            _ => IOReturn::IPC_ERROR,
        })
    }

    fn unsent(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.unsent.lock().expect("no code that can panic runs under this lock")
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no code that can panic runs under this lock")
    }
}

impl Caller for Calls {
    /// Sends at once, or answers at once with why not: `OFFLINE`, `BUSY` when the driver host has
    /// not read the earlier calls, or what is wrong with the arguments.
    fn call(&self, selector: u64, mut arguments: Arguments) -> Box<dyn PendingAnswer> {
        let (sink, pending) = answer_pair();
        let (id, offered) = {
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
            (id, self.offer(&mut waiting, &mut arguments))
        };
        let packet = Call { id, selector, arguments }.encode();
        if let Err(status) = packet.and_then(|packet| self.send(&packet)) {
            for action in offered {
                // Bound first: what is dropped must not find the lock held.
                let unsent = self.waiting().actions.remove(&action);
                drop(unsent);
            }
            self.deliver(ReplyPacket { id, answer: Err(status) });
        }
        pending
    }
}

/// Memory of the driver's: its file, its bytes, and whether it is for reading only.
pub(crate) type Offer = Result<(OwnedFd, u64, bool), IOReturn>;

fn offer(answer: Result<Arguments, IOReturn>, file: Option<OwnedFd>) -> Offer {
    match (answer?.scalars.as_slice(), file) {
        ([len, read_only @ (0 | 1)], Some(file)) => Ok((file, *len, *read_only == 1)),
        _ => Err(IOReturn::IPC_ERROR),
    }
}

/// An action of the driver's, in our hands.
struct DriverAction {
    calls: Weak<Calls>,
    /// The driver host's number for it.
    action: u64,
}

impl ActionTarget for DriverAction {
    fn invoke(&self, arguments: Arguments, _: Completion) -> Result<(), IOReturn> {
        let calls = self.calls.upgrade().ok_or(IOReturn::OFFLINE)?;
        if calls.waiting().is_offline {
            return Err(IOReturn::OFFLINE);
        }
        calls.send(&Invocation { action: self.action, arguments }.encode()?)
    }
}

impl Drop for DriverAction {
    fn drop(&mut self) {
        if let Some(calls) = self.calls.upgrade() {
            calls.send_for_sure(encode_release(self.action));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use iohost_interface::Results;
    use iohost_interface::packet::FromClient;

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
    fn whoever_waits_for_memory_is_told_when_the_driver_host_ends_or_talks_nonsense() {
        let (theirs, calls) = session();
        let asking = calls.clone();
        let asked = thread::spawn(move || smol::block_on(asking.ask_for_memory(3)));
        let mut buffer = vec![0; packet::LONGEST];
        let len = theirs.receive(&mut buffer, 0).unwrap().len;
        let asks = FromClient::decode(&buffer[..len]).unwrap();
        let FromClient::Map { id, memory: 3 } = asks else { panic!("{asks:?}") };
        // Bytes and rights, but no file.
        let reply = ReplyPacket { id, answer: Ok((64_u64, false).into_arguments()) };
        theirs.send(&reply.encode(), &[]).unwrap();
        assert_eq!(asked.join().unwrap().map(drop), Err(IOReturn::IPC_ERROR));

        let asking = calls.clone();
        let asked = thread::spawn(move || smol::block_on(asking.ask_for_memory(3)));
        theirs.receive(&mut buffer, 0).unwrap();
        drop(theirs);
        assert_eq!(asked.join().unwrap().map(drop), Err(IOReturn::OFFLINE));
        let late = smol::block_on(calls.ask_for_memory(3));
        assert_eq!(late.map(drop), Err(IOReturn::OFFLINE));
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
