//! Calls over a session's socket, and invocations of actions both ways.
//!
//! One thread per session receives replies and hands each to the call it answers, and invocations
//! to the client's action; calls are sent by whoever makes them. Neither waits for the other.
//!
//! # When the driver dies
//!
//! Everything that goes out does so under one lock, with numbers that rise, and what is still
//! waited for is kept as it was sent. Two packets settle it, both in one stream with the replies of
//! the driver that died, so that none of those is missed:
//!
//! 1. `Away`, from the daemon, with the last call that was begun. Calls up to there fail, as nobody
//!    knows what became of them, unless their method is idempotent. The others are kept, but for those
//!    that are not to wait. What belonged to the dead driver is over: its actions, and what it held of
//!    ours.
//! 2. `Resumed`, from the next driver host. It is answered, and behind the answer everything that is
//!    kept goes out again: memory that is offered, then requests for memory, then calls, in their
//!    order.
//!
//! The next driver host drops what it finds before the answer. So a call that was written into the
//! socket while nobody knew of the death is done once.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use iohost_event::{PacketError, Packets, Poller, Ready};
use iohost_interface::packet::{
    self, Call, FromDriver, Invocation, ReplyPacket, encode_goodbye, encode_map, encode_offer,
    encode_release, encode_resumed, encode_taken, encode_withdraw,
};
use iohost_interface::{
    ActionTarget, Arguments, Caller, Completion, Description, IOReturn, PassedAction,
    PendingAnswer, ReplySink, answer_pair,
};
use smol::channel::{self, Sender};

/// The most calls that wait for a driver that is away.
const MOST_HELD: usize = 1024;

/// When a driver host that did not read is tried again, if nothing comes from it before.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// The calls under way on one session.
#[derive(Debug)]
pub(crate) struct Calls {
    socket: Packets,
    state: Mutex<State>,
    /// The generation, or the end.
    changed: Condvar,
    /// Methods that can be called twice.
    idempotent: Vec<u64>,
    /// Calls made from now on fail rather than wait for a driver that is away.
    fails_when_away: AtomicBool,
    this: Weak<Calls>,
}

/// Invariant: once `presence` is `Over`, `calls`, `mappings`, `actions` and `offers` are empty and
/// stay so.
struct State {
    presence: Presence,
    generation: u64,
    /// By their numbers, which are in the order of sending.
    calls: BTreeMap<u64, Waiting>,
    /// Who asked for memory, by numbers from the same row as the calls'.
    mappings: BTreeMap<u64, (u64, Sender<Offer>)>,
    next_id: u64,
    /// Our actions that the driver holds, by the number we gave them.
    actions: HashMap<u64, Arc<dyn ActionTarget>>,
    next_action: u64,
    /// Our memory that is offered, and whether for reading only.
    offers: BTreeMap<u64, (Arc<OwnedFd>, bool)>,
    next_offer: u64,
    /// Packets that have to arrive and found no room yet, in order, each with its file.
    unsent: VecDeque<(Vec<u8>, Option<Arc<OwnedFd>>)>,
}

/// Where the driver is, as far as this end has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Here,
    /// Died, and another one is to come.
    Away,
    /// The session has ended.
    Over,
}

/// A call that is not answered.
struct Waiting {
    sink: Box<dyn ReplySink>,
    /// As it was sent, or is to be.
    packet: Vec<u8>,
    /// Those of our actions that it passes.
    actions: Vec<u64>,
    is_idempotent: bool,
    /// It does not wait for another driver.
    fails_when_away: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("presence", &self.presence)
            .field("generation", &self.generation)
            .field("calls", &self.calls.len())
            .finish_non_exhaustive()
    }
}

impl Calls {
    /// Takes the session's socket and starts the receiving thread, which ends with the connection.
    pub(crate) fn start(socket: OwnedFd, description: &Description) -> io::Result<Arc<Self>> {
        let socket = Packets::from(socket);
        socket.set_nonblocking()?;
        let poller = Poller::new()?;
        poller.watch(&socket, 0)?;
        let state = State {
            presence: Presence::Here,
            generation: 1,
            calls: BTreeMap::new(),
            mappings: BTreeMap::new(),
            next_id: 1,
            actions: HashMap::new(),
            next_action: 1,
            offers: BTreeMap::new(),
            next_offer: 1,
            unsent: VecDeque::new(),
        };
        let methods = description.methods.iter().filter(|method| method.is_idempotent);
        let idempotent = methods.map(|method| method.selector).collect();
        let calls = Arc::new_cyclic(|this| Self {
            socket,
            state: Mutex::new(state),
            changed: Condvar::new(),
            idempotent,
            fails_when_away: AtomicBool::new(false),
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
        // A driver that reads nothing is left without.
        if self.state().send_unsent(&self.socket) {
            let _ = self.socket.send(&encode_goodbye(), &[]);
        }
        if let Ok(socket) = self.duplicate() {
            // `shutdown` is the same for every kind of socket; a connection that has ended
            // already needs none.
            let _ = UnixStream::from(socket).shutdown(Shutdown::Both);
        }
    }

    /// Whether calls made from now on fail while the driver is away.
    pub(crate) fn set_fails_when_away(&self, fails: bool) {
        self.fails_when_away.store(fails, Relaxed);
    }

    /// Which driver host this is for the session.
    pub(crate) fn generation(&self) -> u64 {
        self.state().generation
    }

    /// Waits for a generation after `known`. `TIMEOUT` at the deadline, `OFFLINE` at the end.
    pub(crate) fn wait_for_generation(
        &self,
        known: u64,
        deadline: Option<Instant>,
    ) -> Result<u64, IOReturn> {
        let mut state = self.state();
        loop {
            if state.generation > known {
                return Ok(state.generation);
            }
            if state.presence == Presence::Over {
                return Err(IOReturn::OFFLINE);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            state = match left {
                None => self.changed.wait(state).expect(NO_PANIC),
                Some(Duration::ZERO) => return Err(IOReturn::TIMEOUT),
                Some(left) => self.changed.wait_timeout(state, left).expect(NO_PANIC).0,
            };
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
                }
                Err(PacketError::WouldBlock) => {
                    let is_clear = self.state().send_unsent(&self.socket);
                    let timeout = (!is_clear).then_some(TRY_AGAIN);
                    if poller.wait(&mut ready, timeout).is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        self.close();
        let (calls, mappings, actions, offers) = {
            let mut state = self.state();
            state.presence = Presence::Over;
            let State { calls, mappings, actions, offers, .. } = &mut *state;
            let taken = std::mem::take(calls);
            (taken, std::mem::take(mappings), std::mem::take(actions), std::mem::take(offers))
        };
        self.changed.notify_all();
        // Whoever waits for memory hears of this by the end of the channel.
        drop((mappings, actions, offers));
        for call in calls.into_values() {
            call.sink.deliver(Err(IOReturn::OFFLINE));
        }
    }

    /// `None` for what cannot come from a driver host.
    fn take_in(&self, packet: &[u8], file: Option<OwnedFd>) -> Option<()> {
        match FromDriver::decode(packet).ok()? {
            FromDriver::Reply(reply) => {
                let asked = self.state().mappings.remove(&reply.id);
                match asked {
                    // One that has stopped waiting needs none.
                    Some((_, asked)) => drop(asked.try_send(offer(reply.answer, file))),
                    None => self.deliver(reply),
                }
            }
            FromDriver::Invoke(Invocation { action, arguments }) => {
                let (target, generation) = {
                    let state = self.state();
                    (state.actions.get(&action).cloned()?, state.generation)
                };
                let calls = self.this.clone();
                let taken = Completion::new(move || {
                    if let Some(calls) = calls.upgrade() {
                        calls.tell(generation, encode_taken(action, 1));
                    }
                });
                // Refused, because its owner is gone or overrun: it counts as taken.
                let _ = target.invoke(arguments, taken);
            }
            FromDriver::Release { action } => {
                let target = self.state().actions.remove(&action)?;
                drop(target);
            }
            FromDriver::Away { generation: _, begun } => self.driver_died(begun),
            FromDriver::Resumed { generation } => self.driver_is_back(generation)?,
        }
        Some(())
    }

    /// 1: settles what was under way.
    fn driver_died(&self, begun: u64) {
        let (failed, released) = {
            let mut state = self.state();
            state.presence = Presence::Away;
            state.unsent.clear();
            let failed: Vec<_> = state
                .calls
                .extract_if(.., |id, call| {
                    call.fails_when_away || *id <= begun && !call.is_idempotent
                })
                .collect();
            // Those that go with a call that is made again are not the dead driver's alone.
            let State { calls, actions, .. } = &mut *state;
            let kept = |action: &u64| calls.values().any(|call| call.actions.contains(action));
            let released: Vec<_> = actions.extract_if(|action, _| !kept(action)).collect();
            (failed, released)
        };
        // Not under the lock: both can run code of the program.
        drop(released);
        for (id, call) in failed {
            let why = if id <= begun { IOReturn::NO_COMPLETION } else { IOReturn::NOT_READY };
            call.sink.deliver(Err(why));
        }
    }

    /// 2: sends again what the next driver is to have. `None` for a generation that was.
    fn driver_is_back(&self, generation: u64) -> Option<()> {
        let mut state = self.state();
        if generation <= state.generation {
            return None;
        }
        state.generation = generation;
        state.presence = Presence::Here;
        let State { offers, mappings, calls, unsent, .. } = &mut *state;
        unsent.clear();
        unsent.push_back((encode_resumed(generation), None));
        unsent.extend(offers.iter().map(|(number, (file, read_only))| {
            (encode_offer(*number, *read_only), Some(file.clone()))
        }));
        unsent.extend(mappings.iter().map(|(id, (memory, _))| (encode_map(*id, *memory), None)));
        unsent.extend(calls.values().map(|call| (call.packet.clone(), None)));
        state.send_unsent(&self.socket);
        drop(state);
        self.changed.notify_all();
        Some(())
    }

    fn deliver(&self, mut reply: ReplyPacket) {
        let (call, generation) = {
            let mut state = self.state();
            (state.calls.remove(&reply.id), state.generation)
        };
        if let Ok(results) = &mut reply.answer {
            for PassedAction { scalar, target } in &mut results.actions {
                // In any case, so that an action that nobody takes is released.
                let action = results.scalars[*scalar];
                let calls = self.this.clone();
                *target = Some(Arc::new(DriverAction { calls, generation, action }));
            }
        }
        // An answer to a call that nobody made is the driver host's mistake, and nobody's loss.
        if let Some(call) = call {
            call.sink.deliver(reply.answer);
        }
    }

    /// Asks for memory of the driver's.
    ///
    /// Errors: `OFFLINE`, `BUSY` when the driver host has not read the earlier calls, `NOT_READY`
    /// when it is away and that is not to be waited for, `IPC_ERROR` for a reply that makes no sense,
    /// what the driver said.
    pub(crate) async fn ask_for_memory(&self, memory: u64) -> Offer {
        let (sender, receiver) = channel::bounded(1);
        {
            let mut state = self.state();
            self.is_to_be_sent(&state)?;
            let id = state.next_id;
            state.next_id += 1;
            state.send(&self.socket, &encode_map(id, memory), None)?;
            state.mappings.insert(id, (memory, sender));
        }
        receiver.recv().await.unwrap_or(Err(IOReturn::OFFLINE))
    }

    /// Offers memory of ours to the driver, and to those after it; its number.
    ///
    /// Errors: `OFFLINE`, `BUSY` when the driver host has not read the earlier calls.
    pub(crate) fn offer_memory(&self, file: OwnedFd, read_only: bool) -> Result<u64, IOReturn> {
        let mut state = self.state();
        if state.presence == Presence::Over {
            return Err(IOReturn::OFFLINE);
        }
        let number = state.next_offer;
        state.next_offer += 1;
        let file = Arc::new(file);
        state.send(&self.socket, &encode_offer(number, read_only), Some(file.as_fd()))?;
        state.offers.insert(number, (file, read_only));
        Ok(number)
    }

    /// Takes an offer back.
    pub(crate) fn withdraw_memory(&self, number: u64) {
        let mut state = self.state();
        let is_offered = state.offers.remove(&number).is_some();
        // Away: the next driver is not offered it.
        if is_offered && state.presence == Presence::Here {
            state.send_for_sure(&self.socket, encode_withdraw(number));
        }
    }

    /// Whether what is sent now reaches a driver, this one or the next.
    fn is_to_be_sent(&self, state: &State) -> Result<(), IOReturn> {
        match state.presence {
            Presence::Over => Err(IOReturn::OFFLINE),
            Presence::Away if self.fails_when_away.load(Relaxed) => Err(IOReturn::NOT_READY),
            Presence::Here | Presence::Away => Ok(()),
        }
    }

    /// Sends something of an action, unless the driver that it concerns is gone.
    fn tell(&self, generation: u64, packet: Vec<u8>) {
        let mut state = self.state();
        if state.has_driver(generation) {
            state.send_for_sure(&self.socket, packet);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NO_PANIC)
    }
}

/// Why the lock of the calls is never poisoned.
const NO_PANIC: &str = "no code that can panic runs under this lock";

impl State {
    fn has_driver(&self, generation: u64) -> bool {
        self.presence == Presence::Here && self.generation == generation
    }

    /// Numbers our actions among arguments, and keeps them for the driver to invoke.
    fn offer_actions(&mut self, arguments: &mut Arguments) -> Vec<u64> {
        let mut numbers = Vec::new();
        for PassedAction { scalar, target } in &mut arguments.actions {
            let Some(target) = target.take() else { continue };
            let number = self.next_action;
            self.next_action += 1;
            self.actions.insert(number, target);
            arguments.scalars[*scalar] = number;
            numbers.push(number);
        }
        numbers
    }

    /// Sends a packet that has to arrive, now or when there is room.
    fn send_for_sure(&mut self, socket: &Packets, packet: Vec<u8>) {
        self.unsent.push_back((packet, None));
        self.send_unsent(socket);
    }

    /// Whether everything that has to arrive was sent.
    fn send_unsent(&mut self, socket: &Packets) -> bool {
        while let Some((packet, file)) = self.unsent.front() {
            let file = file.as_ref().map(|file| file.as_fd());
            match socket.send(packet, file.as_slice()) {
                Err(PacketError::WouldBlock) => return false,
                // On a connection that has ended nothing has to arrive.
                Ok(()) | Err(_) => drop(self.unsent.pop_front()),
            }
        }
        true
    }

    /// Sends to the driver; while it is away, leaves it to its return.
    fn send(
        &mut self,
        socket: &Packets,
        packet: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), IOReturn> {
        if self.presence == Presence::Away {
            return Ok(());
        }
        if !self.send_unsent(socket) {
            return Err(IOReturn::BUSY);
        }
        socket.send(packet, file.as_slice()).map_err(|err| match err {
            PacketError::WouldBlock => IOReturn::BUSY,
            PacketError::Closed => IOReturn::OFFLINE,
            _ => IOReturn::IPC_ERROR,
        })
    }
}

impl Caller for Calls {
    /// Sends at once, or keeps it for a driver that is on its way, or answers at once with why not:
    /// `OFFLINE`, `NOT_READY`, `BUSY` when the driver host has not read the earlier calls or too many
    /// wait for the next one, or what is wrong with the arguments.
    fn call(&self, selector: u64, mut arguments: Arguments) -> Box<dyn PendingAnswer> {
        let (sink, pending) = answer_pair();
        let mut state = self.state();
        if let Err(status) = self.is_to_be_sent(&state) {
            drop(state);
            sink.deliver(Err(status));
            return pending;
        }
        let id = state.next_id;
        state.next_id += 1;
        let actions = state.offer_actions(&mut arguments);
        let sent = Call { id, selector, arguments }.encode().and_then(|packet| {
            if state.presence == Presence::Away && state.calls.len() >= MOST_HELD {
                return Err(IOReturn::BUSY);
            }
            state.send(&self.socket, &packet, None).map(|()| packet)
        });
        match sent {
            Ok(packet) => {
                let is_idempotent = self.idempotent.contains(&selector);
                let fails_when_away = self.fails_when_away.load(Relaxed);
                let call = Waiting { sink, packet, actions, is_idempotent, fails_when_away };
                state.calls.insert(id, call);
            }
            Err(status) => {
                let actions: Vec<_> =
                    actions.iter().map(|action| state.actions.remove(action)).collect();
                // What is dropped and told must not find the lock held.
                drop(state);
                drop(actions);
                sink.deliver(Err(status));
            }
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
    /// The driver it belongs to.
    generation: u64,
    /// The driver host's number for it.
    action: u64,
}

impl ActionTarget for DriverAction {
    fn invoke(&self, arguments: Arguments, _: Completion) -> Result<(), IOReturn> {
        let calls = self.calls.upgrade().ok_or(IOReturn::OFFLINE)?;
        let packet = Invocation { action: self.action, arguments }.encode()?;
        let mut state = calls.state();
        if !state.has_driver(self.generation) {
            return Err(IOReturn::OFFLINE);
        }
        state.send(&calls.socket, &packet, None)
    }
}

impl Drop for DriverAction {
    fn drop(&mut self) {
        if let Some(calls) = self.calls.upgrade() {
            calls.tell(self.generation, encode_release(self.action));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use iohost_interface::Results;
    use iohost_interface::packet::{FromClient, encode_away};

    use super::*;

    /// Method 0 cannot be called twice, method 1 can.
    fn session() -> (Packets, Arc<Calls>) {
        let (theirs, ours) = Packets::pair().unwrap();
        let text =
            "interface test\nmethod 0 f(u64) -> (u64)\nmethod 1 g(u64) -> (u64) idempotent\n";
        let description = Description::parse(text).unwrap();
        (theirs, Calls::start(ours.into(), &description).unwrap())
    }

    fn next(theirs: &Packets) -> FromClient {
        let mut buffer = vec![0; packet::LONGEST];
        let packet = theirs.receive(&mut buffer, 1).unwrap();
        FromClient::decode(&buffer[..packet.len]).unwrap()
    }

    /// The driver dies, having begun calls up to `begun`; what it was sent stays in the socket.
    fn dies(theirs: &Packets, generation: u64, begun: u64) {
        theirs.send(&encode_away(generation, begun), &[]).unwrap();
    }

    /// The next driver comes, and drops what is not for it.
    fn comes(theirs: &Packets, generation: u64) {
        theirs.send(&encode_resumed(generation), &[]).unwrap();
        while next(theirs) != (FromClient::Resumed { generation }) {}
    }

    fn answer(theirs: &Packets, call: Call) {
        let reply = ReplyPacket { id: call.id, answer: Ok(call.arguments) };
        theirs.send(&reply.encode(), &[]).unwrap();
    }

    #[test]
    fn a_call_that_was_not_begun_goes_to_the_next_driver_once() {
        let (theirs, calls) = session();
        let mut first = calls.call(0, number(1));
        let mut second = calls.call(0, number(2));
        let begun = receive(&theirs);
        assert_eq!(begun.arguments, number(1));
        dies(&theirs, 1, begun.id);
        assert_eq!(first.wait(None), Err(IOReturn::NO_COMPLETION));
        let mut third = calls.call(0, number(3));
        comes(&theirs, 2);
        for expected in [2, 3] {
            let call = receive(&theirs);
            assert_eq!(call.arguments, number(expected));
            answer(&theirs, call);
        }
        assert_eq!(second.wait(None), Ok(number(2)));
        assert_eq!(third.wait(None), Ok(number(3)));
        assert_eq!(calls.generation(), 2);
        assert_eq!(calls.state().calls.len(), 0);
    }

    #[test]
    fn a_call_that_can_be_made_twice_is_though_it_was_begun() {
        let (theirs, calls) = session();
        let mut first = calls.call(1, number(1));
        let begun = receive(&theirs);
        // And by a driver that dies before it says anything, too.
        dies(&theirs, 1, begun.id);
        dies(&theirs, 2, begun.id);
        comes(&theirs, 3);
        let again = receive(&theirs);
        assert_eq!(again, begun);
        answer(&theirs, again);
        assert_eq!(first.wait(None), Ok(number(1)));
    }

    #[test]
    fn an_answer_that_was_sent_before_the_death_counts() {
        let (theirs, calls) = session();
        let mut first = calls.call(0, number(1));
        let begun = receive(&theirs);
        answer(&theirs, begun.clone());
        dies(&theirs, 1, begun.id);
        assert_eq!(first.wait(None), Ok(number(1)));
    }

    #[test]
    fn calls_that_are_not_to_wait_fail_while_the_driver_is_away_and_work_when_it_is_back() {
        let (theirs, calls) = session();
        calls.set_fails_when_away(true);
        let mut begun = calls.call(1, number(1));
        let mut waiting = calls.call(1, number(2));
        dies(&theirs, 1, receive(&theirs).id);
        assert_eq!(begun.wait(None), Err(IOReturn::NO_COMPLETION));
        assert_eq!(waiting.wait(None), Err(IOReturn::NOT_READY));
        assert_eq!(calls.call(0, number(3)).wait(None), Err(IOReturn::NOT_READY));
        let asked = smol::block_on(calls.ask_for_memory(1));
        assert_eq!(asked.map(drop), Err(IOReturn::NOT_READY));
        comes(&theirs, 2);
        let generation = calls.wait_for_generation(1, None);
        assert_eq!(generation, Ok(2));
        let mut after = calls.call(0, number(4));
        answer(&theirs, receive(&theirs));
        assert_eq!(after.wait(None), Ok(number(4)));
    }

    #[test]
    fn memory_that_is_offered_is_offered_again_and_what_was_taken_back_is_not() {
        let (theirs, calls) = session();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let kept = calls.offer_memory(file(), true).unwrap();
        let dropped = calls.offer_memory(file(), false).unwrap();
        dies(&theirs, 1, 0);
        assert_eq!(
            calls.wait_for_generation(1, Instant::now().checked_add(Duration::from_millis(1))),
            Err(IOReturn::TIMEOUT)
        );
        calls.withdraw_memory(dropped);
        let late = calls.offer_memory(file(), false).unwrap();
        let mut call = calls.call(0, number(kept));
        comes(&theirs, 2);
        assert_eq!(next(&theirs), FromClient::Offer { memory: kept, read_only: true });
        assert_eq!(next(&theirs), FromClient::Offer { memory: late, read_only: false });
        answer(&theirs, receive(&theirs));
        assert_eq!(call.wait(None), Ok(number(kept)));
    }

    #[test]
    fn a_request_for_memory_goes_to_the_next_driver() {
        let (theirs, calls) = session();
        let asking = calls.clone();
        let asked = thread::spawn(move || smol::block_on(asking.ask_for_memory(3)));
        let FromClient::Map { id, .. } = next(&theirs) else { panic!("no request") };
        dies(&theirs, 1, 0);
        comes(&theirs, 2);
        assert_eq!(next(&theirs), FromClient::Map { id, memory: 3 });
        let null = std::fs::File::open("/dev/null").unwrap();
        let reply = ReplyPacket { id, answer: Ok((64_u64, false).into_arguments()) };
        theirs.send(&reply.encode(), &[null.as_fd()]).unwrap();
        assert!(asked.join().unwrap().is_ok());
    }

    #[test]
    fn actions_of_the_dead_driver_are_offline_and_ours_are_let_go_unless_a_call_has_them() {
        struct Target;
        impl ActionTarget for Target {
            fn invoke(&self, _: Arguments, _: Completion) -> Result<(), IOReturn> {
                Ok(())
            }
        }
        let passing = |target: &Arc<Target>| {
            let target: Arc<dyn ActionTarget> = target.clone();
            let actions = vec![PassedAction { scalar: 0, target: Some(target) }];
            Arguments { actions, ..number(0) }
        };
        let (theirs, calls) = session();
        let (held, waiting) = (Arc::new(Target), Arc::new(Target));
        let mut begun = calls.call(0, passing(&held));
        let call = receive(&theirs);
        // The driver answers with an action of its own, and holds ours.
        let results =
            Arguments { scalars: vec![9], actions: call.arguments.actions, ..Default::default() };
        theirs.send(&ReplyPacket { id: call.id, answer: Ok(results) }.encode(), &[]).unwrap();
        let mut results = begun.wait(None).unwrap();
        let theirs_held = results.actions.remove(0).target.unwrap();
        let _pending = calls.call(0, passing(&waiting));
        dies(&theirs, 1, call.id);
        comes(&theirs, 2);
        assert_eq!(
            receive(&theirs).arguments.scalars,
            [2],
            "the action that waits keeps its number"
        );
        assert_eq!(theirs_held.invoke(number(1), Completion::default()), Err(IOReturn::OFFLINE));
        assert_eq!(Arc::strong_count(&held), 1);
        assert_eq!(Arc::strong_count(&waiting), 2);
        // Its end is none of the next driver's business.
        drop(theirs_held);
        let _more = calls.call(0, number(7));
        assert_eq!(receive(&theirs).arguments, number(7));
    }

    #[test]
    fn what_has_to_go_out_again_goes_out_though_the_next_driver_reads_late() {
        let (theirs, calls) = session();
        let long = |number: u64| Arguments {
            structure: vec![0; 4000],
            scalars: vec![number],
            ..Default::default()
        };
        let mut sent = Vec::new();
        dies(&theirs, 1, 0);
        while calls.state().presence != Presence::Away {
            thread::yield_now();
        }
        for call in 0..MOST_HELD as u64 {
            sent.push(calls.call(1, long(call)));
        }
        assert_eq!(
            calls.call(1, number(0)).wait(None),
            Err(IOReturn::BUSY),
            "that many and no more"
        );
        comes(&theirs, 2);
        for (expected, call) in sent.iter_mut().enumerate() {
            let received = receive(&theirs);
            assert_eq!(received.arguments.scalars, [expected as u64]);
            let reply = ReplyPacket { id: received.id, answer: Ok(number(expected as u64)) };
            theirs.send(&reply.encode(), &[]).unwrap();
            assert_eq!(call.wait(None), Ok(number(expected as u64)));
        }
    }

    #[test]
    fn a_generation_that_was_ends_the_session() {
        let (theirs, calls) = session();
        comes(&theirs, 2);
        theirs.send(&encode_resumed(2), &[]).unwrap();
        assert_eq!(calls.wait_for_generation(2, None), Err(IOReturn::OFFLINE));
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
