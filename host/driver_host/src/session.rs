//! Sessions: the calls of clients on their way to the driver, and the answers on their way back.
//!
//! A client is not trusted. Whatever it sends, however much, and whenever it goes: the worst
//! that happens is the end of its own session.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Arc, Mutex, Weak};

use iohost_dispatch::{DescriptorSource, Queue, QueueOptions};
use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{self, Call, ReplyPacket};
use iohost_interface::{Arguments, IOReturn, ReplySink};

use crate::Driver;
use crate::device::with_sources;
use crate::plugin::SessionQueue;

/// The most calls of one session that wait for their answer. A client that sends more is not
/// read until some are answered; its own sends block then.
const MOST_CALLS: usize = 64;

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
    this: Weak<Sessions>,
}

type OnEnd = Box<dyn Fn(u64, &str) + Send + Sync>;

struct Session {
    id: u64,
    socket: Arc<Packets>,
    source: Mutex<Option<DescriptorSource<Arc<Packets>>>>,
    /// Calls that wait for their answer.
    waiting: AtomicUsize,
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
            this: this.clone(),
        }))
    }

    /// Sessions open now.
    pub(crate) fn count(&self) -> usize {
        self.open.lock().expect(NO_PANIC).len()
    }

    /// Offers a session to the driver and, if it takes it, serves its calls. An error is the
    /// driver's answer or ours, in words.
    pub(crate) fn open(
        &self,
        id: u64,
        socket: Packets,
        queues: Vec<SessionQueue>,
    ) -> Result<(), String> {
        socket.set_nonblocking().map_err(|err| err.to_string())?;
        self.driver.session_opened(id, queues).map_err(|status| format!("the driver: {status}"))?;
        let socket = Arc::new(socket);
        let session = Arc::new(Session {
            id,
            socket: socket.clone(),
            source: Mutex::new(None),
            waiting: AtomicUsize::new(0),
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

    /// Ends a session, if it is still there.
    pub(crate) fn close(&self, id: u64) {
        self.end(id, "closed by the daemon");
    }

    /// Takes what a client sent, as far as it may have calls waiting.
    fn read(&self, session: &Arc<Session>) {
        let mut buffer = [0; packet::LONGEST];
        while session.waiting.load(Acquire) < MOST_CALLS {
            let call = match session.socket.receive(&mut buffer, 0) {
                Ok(packet) => Call::decode(&buffer[..packet.len]).map_err(|err| err.to_string()),
                Err(PacketError::WouldBlock) => return,
                Err(PacketError::Closed) => return self.end(session.id, ""),
                Err(err) => Err(with_sources(&err)),
            };
            match call {
                Ok(Call { id, selector, arguments }) => {
                    session.waiting.fetch_add(1, AcqRel);
                    let sink = Answer { sessions: self.this.clone(), session: session.clone(), id };
                    self.driver.call(session.id, selector, arguments, Box::new(sink));
                }
                Err(reason) => return self.end(session.id, &reason),
            }
        }
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
    fn deliver(self: Box<Self>, answer: Result<Arguments, IOReturn>) {
        let reply = ReplyPacket { id: self.id, answer }.encode();
        let sent = self.session.socket.send(&reply, &[]);
        let before = self.session.waiting.fetch_sub(1, AcqRel);
        match sent {
            Ok(()) if before == MOST_CALLS => {
                // Reading had stopped.
                if let Some(source) = &*self.session.source.lock().expect(NO_PANIC) {
                    source.nudge();
                }
            }
            Ok(()) | Err(PacketError::Closed) => {}
            Err(err) => {
                // A client that asks and never reads the answers.
                if let Some(sessions) = self.sessions.upgrade() {
                    let session = self.session.id;
                    let reason = match err {
                        PacketError::WouldBlock => "does not read its answers".to_owned(),
                        err => with_sources(&err),
                    };
                    // Not here: this can be the driver's own call of `complete`.
                    let queue = sessions.queue.clone();
                    queue.dispatch_async(move || sessions.end(session, &reason));
                }
            }
        }
    }
}
