//! Sessions: the calls of clients on their way to the driver, and the answers on their way back.
//!
//! A client is not trusted. Whatever it sends, however much, and whenever it goes: the worst
//! that happens is the end of its own session.
//!
//! # A session that survived the driver host before this one
//!
//! The daemon hands it over with the socket, in which there may be packets for the dead one. The
//! client has kept everything that it still waits for, and sends it again behind a `Resumed` that
//! answers ours. So what comes before that is read, judged like all that a client sends, and
//! dropped: nothing is done twice, and nothing is lost.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{
    AtomicBool, AtomicUsize, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use iohost_control::host::{FromHost, OpenSession, QueueSize};
use iohost_dispatch::{DescriptorSource, Queue, QueueOptions};
use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{self, Call, FromClient, Invocation, ReplyPacket, encode_resumed};
use iohost_interface::{
    ActionTarget, Arguments, ClientFile, Completion, Description, IOReturn, ReplySink, with_sources,
};
use iohost_memory::ring::{Bell, Ledger, Ring};
use log::warn;

use crate::Driver;
use crate::daemon::Teller;
use crate::plugin::{NewSession, SessionQueue};
use crate::session_actions::SessionActions;

/// The most calls of one session that wait for their answer, and invocations of the driver's
/// actions that wait for their end. A client that sends more is not read until some are done; its
/// own sends block then.
const MOST_CALLS: usize = 64;

/// The most memory files that one session offers at a time.
const MOST_OFFERS: usize = 64;

/// Packets of one session that are dealt with before others get their turn.
const PACKETS_PER_TURN: usize = 256;

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no foreign code runs under a session lock";

/// The sessions of a driver.
pub(crate) struct Sessions {
    driver: Arc<Driver>,
    /// Reads the sockets, so that a driver that is busy holds up nobody's goodbye.
    queue: Queue,
    open: Mutex<HashMap<u64, Arc<Session>>>,
    /// Told when a session ends, with its number and the reason in words.
    on_end: OnEnd,
    /// Nothing is read: what clients send waits in their sockets.
    is_paused: AtomicBool,
    this: Weak<Sessions>,
}

type OnEnd = Box<dyn Fn(u64, &str) + Send + Sync>;

struct Session {
    id: u64,
    socket: Arc<Packets>,
    source: Mutex<Option<DescriptorSource<Arc<Packets>>>>,
    /// Which driver host this is for the session.
    generation: u64,
    /// What is read is still meant for an earlier one. Touched by the reading alone.
    is_stale: AtomicBool,
    /// Where it is noted which call was begun.
    ledger: Ledger,
    /// Its queues, for a daemon that takes the driver host over; the driver has duplicates.
    queues: Vec<SessionQueue>,
    /// Calls that wait for their answer, and invocations that wait for their end.
    waiting: AtomicUsize,
    actions: SessionActions,
    /// Memory that the client has offered, by its numbers; `None` once the session is over.
    offers: Mutex<Option<HashMap<u64, Offer>>>,
}

/// Memory of a client's, checked.
struct Offer {
    file: OwnedFd,
    len: u64,
    read_only: bool,
}

impl Sessions {
    pub(crate) fn new(
        driver: Arc<Driver>,
        on_end: impl Fn(u64, &str) + Send + Sync + 'static,
    ) -> Result<Arc<Self>, IOReturn> {
        let queue = driver.queue().create_beside("sessions", QueueOptions::default())?;
        Ok(Arc::new_cyclic(|this| Self {
            driver,
            queue,
            open: Mutex::default(),
            on_end: Box::new(on_end),
            is_paused: AtomicBool::new(false),
            this: this.clone(),
        }))
    }

    /// Sessions open now.
    pub(crate) fn count(&self) -> usize {
        self.open.lock().expect(NO_PANIC).len()
    }

    /// Offers a session to the driver and, if it takes it, serves its calls. An error is the
    /// driver's answer or ours, in words.
    pub(crate) fn open(&self, socket: Packets, offered: NewSession) -> Result<(), String> {
        let NewSession { number: id, generation, .. } = offered;
        socket.set_nonblocking().map_err(|err| err.to_string())?;
        let ledger = offered.ledger.as_ref().ok_or("no ledger")?.try_clone();
        let ledger = Ledger::attach(ledger.map_err(|err| err.to_string())?);
        let ledger = ledger.map_err(|err| with_sources(&err))?;
        if generation > 1 {
            self.recover(&ledger, id, &offered.queues)?;
        }
        let queues = offered.queues.iter().map(SessionQueue::try_clone);
        let queues = queues.collect::<io::Result<_>>().map_err(|err| err.to_string())?;
        let opened = self.driver.session_opened(offered);
        opened.map_err(|status| format!("the driver: {status}"))?;
        if generation > 1
            && let Err(err) = socket.send(&encode_resumed(generation), &[])
        {
            self.driver.session_closed(id);
            return Err(unread(&err));
        }
        let socket = Arc::new(socket);
        let session = Arc::new(Session {
            id,
            socket: socket.clone(),
            source: Mutex::new(None),
            generation,
            is_stale: AtomicBool::new(generation > 1),
            ledger,
            queues,
            waiting: AtomicUsize::new(0),
            actions: SessionActions::new(),
            offers: Mutex::new(Some(HashMap::new())),
        });
        self.open.lock().expect(NO_PANIC).insert(id, session.clone());
        let (sessions, reading) = (self.this.clone(), Arc::downgrade(&session));
        let source = DescriptorSource::create(&self.queue, socket, move || {
            if let (Some(sessions), Some(session)) = (sessions.upgrade(), reading.upgrade()) {
                sessions.read(&session);
            }
        });
        match source {
            Ok(source) => {
                *session.source.lock().expect(NO_PANIC) = Some(source);
                Ok(())
            }
            Err(err) => {
                self.forget(id);
                Err(err.to_string())
            }
        }
    }

    /// Reads no more, and waits until everything that was read is answered; what is still under way
    /// after `limit` is the error, as a number of calls and invocations, and reading goes on.
    pub(crate) fn drain(&self, limit: Duration) -> Result<(), usize> {
        self.is_paused.store(true, Release);
        // A reading that has begun before is over.
        let _ = self.queue.dispatch_sync(|| ());
        let deadline = Instant::now() + limit;
        loop {
            let open: Vec<_> = self.open.lock().expect(NO_PANIC).values().cloned().collect();
            let waiting = open.iter().map(|session| session.waiting.load(Acquire)).sum();
            if waiting == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                self.is_paused.store(false, Release);
                for session in open {
                    if let Some(source) = &*session.source.lock().expect(NO_PANIC) {
                        source.nudge();
                    }
                }
                return Err(waiting);
            }
            // Once in the life of a driver, for as long as a call takes.
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells a new daemon of every session.
    pub(crate) fn hand_over(&self, tell: Teller<'_>) -> anyhow::Result<()> {
        let open: Vec<_> = self.open.lock().expect(NO_PANIC).values().cloned().collect();
        for session in open {
            let queues = session.queues.iter().map(|queue| QueueSize { bytes: queue.bytes });
            let (number, generation) = (session.id, session.generation);
            let client_type = self.driver.client_type(number);
            let queues = queues.collect();
            let message = OpenSession { session: number, generation, client_type, queues };
            let own = [session.socket.as_fd(), session.ledger.as_fd()];
            let of_queues = session.queues.iter().flat_map(|queue| {
                [queue.memory.as_fd(), queue.available.as_fd(), queue.serviced.as_fd()]
            });
            let fds: Vec<_> = own.into_iter().chain(of_queues).collect();
            tell(&FromHost::HandedSession(message), &fds)?;
        }
        Ok(())
    }

    /// Ends a session, if it is still there.
    pub(crate) fn close(&self, id: u64) {
        self.end(id, "closed by the daemon");
    }

    /// Takes what a client sent, as far as it may have calls waiting.
    fn read(&self, session: &Arc<Session>) {
        let mut buffer = [0; packet::LONGEST];
        for _ in 0..PACKETS_PER_TURN {
            if self.is_paused.load(Acquire) {
                return;
            }
            if session.waiting.load(Acquire) >= MOST_CALLS {
                // Goes on when there is one less.
                return;
            }
            let (packet, mut files) = match session.socket.receive(&mut buffer, 1) {
                Ok(packet) => (FromClient::decode(&buffer[..packet.len]), packet.fds.into_iter()),
                Err(PacketError::WouldBlock) => return,
                Err(PacketError::Closed) => {
                    // Whoever lives says goodbye.
                    self.driver.client_crashed(session.id);
                    return self.end(session.id, "");
                }
                Err(err) => return self.end(session.id, &with_sources(&err)),
            };
            let done = packet.map_err(|fault| fault.to_string()).and_then(|packet| match packet {
                // An end without a reason is one in order.
                FromClient::Goodbye => Err(String::new()),
                FromClient::Resumed { generation } => session.resumed(generation),
                _ if session.is_stale.load(Relaxed) => {
                    files.by_ref().for_each(drop);
                    Ok(())
                }
                FromClient::Call(call) => self.call(session, call),
                FromClient::Map { id, memory } => {
                    self.map(session, id, memory);
                    Ok(())
                }
                FromClient::Offer { memory, read_only } => {
                    let file = files.next().ok_or("offers memory without a file")?;
                    session.offer(memory, file, read_only)
                }
                FromClient::Withdraw { memory } => session.withdraw(memory),
                FromClient::Invoke(invocation) => self.invoke(session, invocation),
                FromClient::Release { action } => {
                    let held = session.actions.take_back(action);
                    held.map(drop).ok_or_else(|| format!("gives back action {action}, has none"))
                }
                FromClient::Taken { action, count } => {
                    match session.actions.taken(&session.socket, action, count) {
                        None => Err(format!("took {count} of action {action}, were not sent")),
                        Some(sent) => sent.map_err(|err| unread(&err)),
                    }
                }
            });
            let done = match files.next() {
                Some(_) => Err("sends a descriptor that nobody asked for".to_owned()),
                None => done,
            };
            if let Err(reason) = done {
                return self.end(session.id, &reason);
            }
        }
        if let Some(source) = &*session.source.lock().expect(NO_PANIC) {
            source.nudge();
        }
    }

    fn call(&self, session: &Arc<Session>, call: Call) -> Result<(), String> {
        let Call { id, selector, mut arguments } = call;
        for passed in &mut arguments.actions {
            let action = arguments.scalars[passed.scalar];
            let target = ClientAction {
                sessions: self.this.clone(),
                session: Arc::downgrade(session),
                action,
            };
            let fits = session.actions.hold();
            // Made in any case: its drop is what counts down.
            passed.target = Some(Arc::new(target));
            if !fits {
                return Err("passes too many actions".to_owned());
            }
        }
        session.waiting.fetch_add(1, AcqRel);
        let sink = Answer { sessions: self.this.clone(), session: session.clone(), id };
        let ledger = session.ledger.clone();
        let begin = move || ledger.begin(id);
        self.driver.call(session.id, selector, arguments, Box::new(sink), begin);
        Ok(())
    }

    fn map(&self, session: &Arc<Session>, id: u64, memory: u64) {
        session.waiting.fetch_add(1, AcqRel);
        let reply =
            MapReply { sessions: self.this.clone(), session: session.clone(), id, is_owed: true };
        self.driver.copy_client_memory(session.id, memory, move |file| reply.deliver(file));
    }

    fn invoke(&self, session: &Arc<Session>, invocation: Invocation) -> Result<(), String> {
        let Invocation { action, arguments } = invocation;
        let target = session.actions.target(action);
        let target = target.ok_or_else(|| format!("invokes action {action}, has none"))?;
        session.waiting.fetch_add(1, AcqRel);
        let ended = session.clone();
        match target.invoke(arguments, Completion::new(move || ended.one_less())) {
            Err(IOReturn::BAD_ARGUMENT) => Err(format!("invokes action {action} wrongly")),
            // A cancelled one has counted it; nobody is told.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Brings the queues of a session to where its last driver wanted them, and wakes the client: that
    /// driver may have died between a change and its notification. What the client rings is left
    /// alone, since it could make that block, and the driver finds its entries when it sets a handler.
    fn recover(&self, ledger: &Ledger, id: u64, queues: &[SessionQueue]) -> Result<(), String> {
        if ledger.has_links() {
            let attached = queues.iter().map(|queue| {
                let memory = queue.memory.try_clone().map_err(|err| err.to_string())?;
                Ring::attach(memory, u64::from(queue.bytes)).map_err(|err| with_sources(&err))
            });
            ledger.recover(&attached.collect::<Result<Vec<_>, String>>()?);
        }
        let description = self.driver.description_for(self.driver.client_type(id));
        let description = description.map(|text| Description::parse(&text)).transpose();
        let description = description.map_err(|err| with_sources(&err))?;
        let declared = description.into_iter().flat_map(|description| description.queues);
        for (queue, declared) in queues.iter().zip(declared) {
            let (_, heard) = declared.direction.bells(&queue.available, &queue.serviced);
            let heard = heard.try_clone().map_err(|err| err.to_string())?;
            Bell::from(heard).ring().map_err(|err| err.to_string())?;
        }
        Ok(())
    }

    /// Ends a session, but not inside this call, which can be one of the driver's.
    fn end_later(self: &Arc<Self>, id: u64, reason: String) {
        let sessions = self.clone();
        self.queue.dispatch_async(move || sessions.end(id, &reason));
    }

    fn end(&self, id: u64, reason: &str) {
        if self.forget(id) {
            (self.on_end)(id, reason);
        }
    }

    /// `false` when it was not there any more.
    fn forget(&self, id: u64) -> bool {
        let Some(session) = self.open.lock().expect(NO_PANIC).remove(&id) else { return false };
        // Ends the reading; the socket closes with the last answer that is under way.
        let source = session.source.lock().expect(NO_PANIC).take();
        drop(source);
        session.actions.end();
        let offers = session.offers.lock().expect(NO_PANIC).take();
        drop(offers);
        self.driver.session_closed(id);
        true
    }
}

/// Where the answer to one call goes.
struct Answer {
    sessions: Weak<Sessions>,
    session: Arc<Session>,
    id: u64,
}

impl ReplySink for Answer {
    fn deliver(self: Box<Self>, mut answer: Result<Arguments, IOReturn>) {
        if let Ok(results) = &mut answer {
            self.session.actions.give(results);
        }
        let reply = ReplyPacket { id: self.id, answer }.encode();
        let sent = self.session.socket.send(&reply, &[]);
        self.session.one_less();
        end_unless(sent, &self.sessions, self.session.id);
    }

    fn client_memory(&self, memory: u64) -> Result<ClientFile, IOReturn> {
        let offers = self.session.offers.lock().expect(NO_PANIC);
        let offers = offers.as_ref().ok_or(IOReturn::NOT_READY)?;
        let Offer { file, len, read_only } = offers.get(&memory).ok_or(IOReturn::NOT_FOUND)?;
        let file = file.try_clone().map_err(|_| IOReturn::NO_RESOURCES)?;
        Ok(ClientFile { file, len: *len, read_only: *read_only })
    }
}

/// The reply that is owed to a client that asked for memory. Dropped without one, because the
/// driver has stopped, it says so.
struct MapReply {
    sessions: Weak<Sessions>,
    session: Arc<Session>,
    id: u64,
    is_owed: bool,
}

impl MapReply {
    /// Gives the client the memory, or tells it that there is none: `BAD_ARGUMENT`, whatever the
    /// driver said, as in DriverKit.
    fn deliver(mut self, file: Result<(OwnedFd, bool), IOReturn>) {
        let offered = file.and_then(|(file, read_only)| {
            iohost_memory::offer(file, read_only)
                .map(|(file, len)| (file, vec![len as u64, u64::from(read_only)]))
                .inspect_err(|err| warn!(reason:% = with_sources(err); "memory not offered"))
                .map_err(|_| IOReturn::INTERNAL_ERROR)
        });
        match offered {
            Ok((file, scalars)) => {
                self.send(Ok(Arguments { scalars, ..Default::default() }), &[file.as_fd()]);
            }
            Err(_) => self.send(Err(IOReturn::BAD_ARGUMENT), &[]),
        }
    }

    fn send(&mut self, answer: Result<Arguments, IOReturn>, fds: &[BorrowedFd<'_>]) {
        self.is_owed = false;
        let reply = ReplyPacket { id: self.id, answer }.encode();
        let sent = self.session.socket.send(&reply, fds);
        self.session.one_less();
        end_unless(sent, &self.sessions, self.session.id);
    }
}

impl Drop for MapReply {
    fn drop(&mut self) {
        if self.is_owed {
            self.send(Err(IOReturn::NOT_READY), &[]);
        }
    }
}

impl Session {
    /// The client has heard of a generation; with ours, what follows is for us. An error ends the
    /// session.
    fn resumed(&self, generation: u64) -> Result<(), String> {
        if generation > self.generation {
            return Err(format!("speaks of generation {generation}, this is {}", self.generation));
        }
        if generation == self.generation && !self.is_stale.swap(false, Relaxed) {
            return Err(format!("resumes generation {generation} a second time"));
        }
        Ok(())
    }

    /// Takes memory that the client offers, once it is sure that the client cannot take pages away
    /// from under a mapping. An error ends the session.
    fn offer(&self, memory: u64, file: OwnedFd, read_only: bool) -> Result<(), String> {
        let len = iohost_memory::sealed_len(&file)
            .map_err(|err| format!("offers memory {memory}: {}", with_sources(&err)))?;
        let mut offers = self.offers.lock().expect(NO_PANIC);
        let Some(offers) = &mut *offers else { return Ok(()) };
        if offers.len() == MOST_OFFERS {
            return Err(format!("offers more than {MOST_OFFERS} memories"));
        }
        match offers.insert(memory, Offer { file, len: len as u64, read_only }) {
            Some(_) => Err(format!("offers memory {memory} a second time")),
            None => Ok(()),
        }
    }

    fn withdraw(&self, memory: u64) -> Result<(), String> {
        let mut offers = self.offers.lock().expect(NO_PANIC);
        let Some(offers) = &mut *offers else { return Ok(()) };
        let known = offers.remove(&memory).is_some();
        known.then_some(()).ok_or_else(|| format!("takes back memory {memory}, offered none"))
    }

    /// A call was answered, or an invocation has ended.
    fn one_less(&self) {
        if self.waiting.fetch_sub(1, AcqRel) == MOST_CALLS {
            // Reading had stopped.
            if let Some(source) = &*self.source.lock().expect(NO_PANIC) {
                source.nudge();
            }
        }
    }
}

/// An action of a client's, in the driver's hands.
struct ClientAction {
    sessions: Weak<Sessions>,
    session: Weak<Session>,
    /// The client's number for it.
    action: u64,
}

impl ActionTarget for ClientAction {
    fn invoke(&self, arguments: Arguments, _: Completion) -> Result<(), IOReturn> {
        let session = self.session.upgrade().ok_or(IOReturn::OFFLINE)?;
        let invocation = Invocation { action: self.action, arguments };
        let sent = session.actions.invoke(&session.socket, &invocation)?;
        let gone = matches!(sent, Err(PacketError::Closed));
        end_unless(sent, &self.sessions, session.id);
        if gone { Err(IOReturn::OFFLINE) } else { Ok(()) }
    }
}

impl Drop for ClientAction {
    fn drop(&mut self) {
        if let Some(session) = self.session.upgrade() {
            let sent = session.actions.release(&session.socket, self.action);
            end_unless(sent, &self.sessions, session.id);
        }
    }
}

/// Ends a session whose client could not be sent something.
fn end_unless(sent: Result<(), PacketError>, sessions: &Weak<Sessions>, session: u64) {
    match sent {
        // One that is gone is noticed by the reading.
        Ok(()) | Err(PacketError::Closed) => {}
        Err(err) => {
            if let Some(sessions) = sessions.upgrade() {
                sessions.end_later(session, unread(&err));
            }
        }
    }
}

/// Why nothing could be sent.
fn unread(err: &PacketError) -> String {
    match err {
        PacketError::WouldBlock => "does not read what it is sent".to_owned(),
        PacketError::Closed => String::new(),
        err => with_sources(err),
    }
}
