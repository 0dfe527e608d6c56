//! A queue under test, with what has to be true of it.
//!
//! - Blocks of one lane (a sender whose sends have an order) start in that order, none is missing,
//!   and none is dropped unless the queue was cancelled or its engine dropped.
//! - One block at a time; concurrent ones beside each other only.
//! - After a cancel's handler nothing runs but further cancel handlers, in order, once each.
//! - A sleep returns with the queue held, or is told ABORTED and does not hold it. It says that it
//!   was woken exactly if somebody was told that he woke it; who has slept longest is woken first.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use iohost_dispatch::{Clock, Owner, Queue, QueueOptions};
use iohost_interface::IOReturn;

use crate::tally::Tally;
use crate::witness::{MEANT, Witness, broken};

/// What all subjects of a round share.
#[derive(Debug, Default)]
pub struct Ledger {
    pub tally: Tally,
    /// The engine is being dropped: from now on anything may be dropped or told ABORTED.
    pub ending: AtomicBool,
    /// Completions that have neither run nor been dropped.
    pub completions_open: AtomicUsize,
    pub asleep: AtomicUsize,
    lanes: AtomicU32,
    subjects: AtomicU32,
}

/// A sender whose sends have an order: a thread, or the handlers of a serial queue.
#[derive(Debug)]
pub struct Lane {
    pub id: u32,
    operations: AtomicU64,
    doing: Mutex<&'static str>,
    /// By subject.
    sent: Mutex<HashMap<u32, Sent>>,
}

/// How much a lane has sent to a subject.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    plain: u64,
    concurrent: u64,
}

/// How much of what a lane sent has come.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    plain_started: u64,
    concurrent_ended: u64,
}

#[derive(Debug)]
pub struct Subject {
    pub queue: Queue,
    /// Who waits for a queue while holding another one does so in this order.
    pub rank: usize,
    pub reentrant: bool,
    /// What its handlers send.
    pub lane: Arc<Lane>,
    pub ledger: Arc<Ledger>,
    id: u32,
    /// Set before the queue is told.
    cancelled: AtomicBool,
    cancels_ran: AtomicU64,
    /// 0: nobody. `EXCLUSIVE`: one block, or a number of concurrent ones.
    inside: AtomicU64,
    seen: Mutex<HashMap<u32, Seen>>,
    /// Those asleep, longest first, by event.
    naps: Mutex<HashMap<usize, VecDeque<Arc<Nap>>>>,
    timed_events: AtomicUsize,
}

const EXCLUSIVE: u64 = 1 << 63;

#[derive(Debug)]
struct Nap {
    timed: bool,
    woken: AtomicBool,
}

/// A block on its way. Dropped unrun it is counted as such.
#[derive(Debug)]
pub struct Ticket {
    subject: Arc<Subject>,
    witness: Witness,
    order: Order,
    ran: bool,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Plain { number: u64, concurrent_before: u64 },
    Concurrent { plain_before: u64 },
}

/// A block, or a handler, that runs on a subject's queue. Left when dropped.
#[derive(Debug)]
pub struct Inside {
    pub subject: Arc<Subject>,
    pub witness: Witness,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Exclusive,
    Beside,
    /// Its sleep was aborted: it holds the queue no more.
    Outside,
}

impl Ledger {
    pub fn lane(&self) -> Arc<Lane> {
        Arc::new(Lane {
            id: self.lanes.fetch_add(1, SeqCst),
            operations: AtomicU64::new(0),
            doing: Mutex::new("nothing yet"),
            sent: Mutex::default(),
        })
    }

    pub fn is_ending(&self) -> bool {
        self.ending.load(SeqCst)
    }
}

impl Owner for Ledger {
    fn failed(&self, queue: &str, reason: &str) {
        if reason != MEANT {
            broken(format_args!("nobody means this panic on {queue}: {reason}"));
        }
        self.tally.panics_told.one();
    }
}

impl Lane {
    /// The next operation of this lane.
    pub fn begins(&self, what: &'static str) -> Witness {
        *self.doing.lock().unwrap() = what;
        Witness { lane: self.id, operation: self.operations.fetch_add(1, SeqCst), what }
    }

    pub fn doing(&self) -> String {
        format!("operation {}, {}", self.operations.load(SeqCst), self.doing.lock().unwrap())
    }

    /// Sends a plain block by `send`, which must return before the next one is sent.
    pub fn send<R>(
        &self,
        subject: &Arc<Subject>,
        what: &'static str,
        send: impl FnOnce(Ticket) -> R,
    ) -> R {
        let witness = self.begins(what);
        let mut sent = self.sent.lock().unwrap();
        let ticket = subject.plain_ticket(witness, sent.entry(subject.id).or_default());
        send(ticket)
    }

    /// A plain block that the caller sends before this lane sends another.
    pub fn ticket(&self, subject: &Arc<Subject>, what: &'static str) -> Ticket {
        self.send(subject, what, |ticket| ticket)
    }

    pub fn send_concurrent(&self, subject: &Arc<Subject>, send: impl FnOnce(Ticket)) {
        let witness = self.begins("concurrent");
        let mut all = self.sent.lock().unwrap();
        let sent = all.entry(subject.id).or_default();
        sent.concurrent += 1;
        let order = Order::Concurrent { plain_before: sent.plain };
        send(Ticket::new(subject, witness, order));
    }
}

impl Subject {
    pub fn new(ledger: &Arc<Ledger>, rank: usize, reentrant: bool, make: &Make<'_>) -> Arc<Self> {
        let id = ledger.subjects.fetch_add(1, SeqCst);
        let name = format!("{} {id} of rank {rank}", if reentrant { "reentrant" } else { "plain" });
        Arc::new(Self {
            queue: make(&name, QueueOptions { reentrant }).expect("a name that is short enough"),
            rank,
            reentrant,
            lane: ledger.lane(),
            ledger: ledger.clone(),
            id,
            cancelled: AtomicBool::new(false),
            cancels_ran: AtomicU64::new(0),
            inside: AtomicU64::new(0),
            seen: Mutex::default(),
            naps: Mutex::default(),
            timed_events: AtomicUsize::new(1000),
        })
    }

    fn plain_ticket(self: &Arc<Self>, witness: Witness, sent: &mut Sent) -> Ticket {
        sent.plain += 1;
        let order = Order::Plain { number: sent.plain, concurrent_before: sent.concurrent };
        Ticket::new(self, witness, order)
    }

    /// Whether work may be refused.
    pub fn is_over(&self) -> bool {
        self.cancelled.load(SeqCst) || self.ledger.is_ending()
    }

    /// Cancels the queue, `times` in a row; nothing when somebody has.
    pub fn cancel(self: &Arc<Self>, witness: Witness, times: u64) {
        if self.cancelled.swap(true, SeqCst) {
            return;
        }
        self.ledger.tally.queues_cancelled.one();
        for number in 0..times {
            self.ledger.tally.cancels_sent.one();
            let cancel = Cancel { subject: self.clone(), witness, number, ran: false };
            self.queue.cancel(move || cancel.run());
        }
    }

    /// A source's handler starts.
    pub fn enter(self: &Arc<Self>, witness: Witness) -> Inside {
        self.check_running(&witness);
        let inside = Inside { subject: self.clone(), witness, kind: Kind::Exclusive };
        inside.occupy();
        inside
    }

    fn check_running(&self, witness: &Witness) {
        let name = self.queue.name();
        witness.check(self.cancels_ran.load(SeqCst) == 0, || {
            format!("nothing runs after a cancel's handler, on {name}")
        });
        witness.check(self.queue.on_queue(), || format!("on_queue says so to what runs on {name}"));
    }

    /// Wakes one or all that sleep on an event. The caller is inside.
    pub fn wake(&self, witness: &Witness, event: usize, all: bool) {
        let asleep = self.naps.lock().unwrap().get(&event).map_or(0, VecDeque::len);
        let expected = if all { asleep } else { asleep.min(1) };
        let told = match all {
            true => self.queue.wakeup_all(event),
            false => self.queue.wakeup(event).map(usize::from),
        };
        let name = self.queue.name();
        let told = told.unwrap_or_else(|err| {
            witness.broken(format!("wakeup is permitted on its own queue {name}: {err:?}"))
        });
        self.ledger.tally.woken.many(told as u64);
        let mut naps = self.naps.lock().unwrap();
        let naps = naps.entry(event).or_default();
        // The deadline of one may have passed just now, and an aborted one may have gone.
        let exact = naps.iter().all(|nap| !nap.timed) && !self.is_over();
        witness.check(told == expected || (!exact && told <= asleep), || {
            format!("wakeup wakes {expected} of {asleep} asleep on {name}, and not {told}")
        });
        naps.drain(..told.min(naps.len())).for_each(|nap| nap.woken.store(true, SeqCst));
    }

    /// An event that nobody else sleeps on.
    pub fn new_event(&self) -> usize {
        self.timed_events.fetch_add(1, SeqCst)
    }

    pub fn describe(&self) -> String {
        let numbers = self.queue.numbers();
        let naps = self.naps.lock().unwrap();
        let asleep: Vec<_> =
            naps.iter().filter(|(_, naps)| !naps.is_empty()).map(|(e, n)| (*e, n.len())).collect();
        format!(
            "{}: depth {}, executed {}, dropped {}, inside {:#x}, cancelled {} ({} handlers ran), \
             asleep by event {asleep:?}; its handlers: {}",
            self.queue.name(),
            numbers.depth,
            numbers.executed,
            numbers.dropped,
            self.inside.load(SeqCst),
            self.cancelled.load(SeqCst),
            self.cancels_ran.load(SeqCst),
            self.lane.doing(),
        )
    }
}

/// How a subject's queue is made.
pub type Make<'a> = dyn Fn(&str, QueueOptions) -> Result<Queue, IOReturn> + 'a;

impl Ticket {
    fn new(subject: &Arc<Subject>, witness: Witness, order: Order) -> Self {
        subject.ledger.tally.sent.one();
        Self { subject: subject.clone(), witness, order, ran: false }
    }

    /// The block starts.
    pub fn begin(mut self) -> Inside {
        let (subject, witness) = (self.subject.clone(), self.witness);
        let name = subject.queue.name();
        witness.check(!self.ran, || format!("a block runs once, on {name}"));
        self.ran = true;
        subject.ledger.tally.ran.one();
        subject.check_running(&witness);
        let kind = match self.order {
            Order::Plain { .. } => Kind::Exclusive,
            Order::Concurrent { .. } => Kind::Beside,
        };
        let inside = Inside { subject: subject.clone(), witness, kind };
        inside.occupy();
        // A queue without an engine drops what is sent, and still runs sync calls.
        let may_lack = subject.ledger.is_ending();
        let mut seen = subject.seen.lock().unwrap();
        let seen = seen.entry(witness.lane).or_default();
        match self.order {
            Order::Plain { number, concurrent_before } => {
                let Seen { plain_started, concurrent_ended } = *seen;
                let all_came = plain_started + 1 == number;
                witness.check(all_came || (plain_started < number && may_lack), || {
                    format!(
                        "blocks start in the order of their lane, on {name}: number {number} comes \
                         after {plain_started}"
                    )
                });
                let all_ended = concurrent_ended == concurrent_before;
                witness.check(
                    all_ended || (concurrent_ended < concurrent_before && may_lack),
                    || {
                        format!(
                            "a block starts after the concurrent ones sent before it, on {name}: \
                         {concurrent_ended} of {concurrent_before} have ended"
                        )
                    },
                );
                seen.plain_started = number;
            }
            Order::Concurrent { plain_before } => {
                let started = seen.plain_started;
                let kept = started == plain_before || (started < plain_before && may_lack);
                witness.check(kept, || {
                    format!(
                        "a concurrent block starts between its plain neighbours, on {name}: \
                         {started} have started, {plain_before} were sent before it"
                    )
                });
                subject.ledger.tally.concurrent.one();
            }
        }
        inside
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ran {
            let name = self.subject.queue.name();
            self.witness.check(self.subject.is_over(), || {
                format!("no block is dropped while its queue lives, on {name}")
            });
            self.subject.ledger.tally.dropped.one();
        }
    }
}

impl Inside {
    pub fn is_alone(&self) -> bool {
        self.kind == Kind::Exclusive
    }

    fn occupy(&self) {
        let subject = &self.subject;
        let (alone, change) = match self.kind {
            Kind::Outside => return,
            Kind::Exclusive => (true, EXCLUSIVE),
            Kind::Beside => (false, 1),
        };
        let others = subject.inside.fetch_add(change, SeqCst);
        let kept = if alone { others == 0 } else { others & EXCLUSIVE == 0 };
        self.witness.check(kept, || {
            let beside = if others & EXCLUSIVE == 0 { "concurrent" } else { "plain" };
            format!("one block at a time, on {}: a {beside} one runs", subject.queue.name())
        });
    }

    fn leave(&self) {
        match self.kind {
            Kind::Outside => {}
            Kind::Exclusive => {
                let inside = self.subject.inside.fetch_sub(EXCLUSIVE, SeqCst);
                self.witness.check(inside == EXCLUSIVE, || {
                    format!("a plain block is alone to its end, on {}", self.subject.queue.name())
                });
            }
            Kind::Beside => {
                let mut seen = self.subject.seen.lock().unwrap();
                seen.entry(self.witness.lane).or_default().concurrent_ended += 1;
                self.subject.inside.fetch_sub(1, SeqCst);
            }
        }
    }

    /// Sleeps on an event. `false` when the sleep was aborted: the queue is not held any more.
    pub fn sleep(&mut self, event: usize, deadline: Option<(Clock, u64)>) -> bool {
        let (subject, witness) = (self.subject.clone(), self.witness);
        let (queue, tally) = (&subject.queue, &subject.ledger.tally);
        let nap = Arc::new(Nap { timed: deadline.is_some(), woken: AtomicBool::new(false) });
        subject.naps.lock().unwrap().entry(event).or_default().push_back(nap.clone());
        subject.ledger.asleep.fetch_add(1, SeqCst);
        self.leave();
        let slept = queue.sleep(event, deadline);
        subject.ledger.asleep.fetch_sub(1, SeqCst);
        let (name, woken) = (queue.name(), nap.woken.load(SeqCst));
        let holds = slept != Err(IOReturn::ABORTED);
        witness.check(queue.on_queue() == holds, || {
            format!("a sleep on {name} that says {slept:?} holds the queue: {holds}")
        });
        if !holds {
            self.kind = Kind::Outside;
        }
        self.occupy();
        match slept {
            Ok(()) => {
                witness.check(woken, || format!("somebody was told that he woke it, on {name}"));
                tally.slept.one();
            }
            Err(IOReturn::TIMEOUT) => {
                witness.check(!woken, || {
                    format!("a sleep on {name} that was woken says so, and not TIMEOUT")
                });
                let early = deadline.is_none_or(|(clock, at)| queue.now(clock) < at);
                witness.check(!early, || format!("no TIMEOUT before the deadline, on {name}"));
                tally.timed_out.one();
            }
            Err(IOReturn::ABORTED) => {
                witness.check(subject.is_over(), || {
                    format!("no sleep is aborted while its queue lives, on {name}")
                });
                tally.sleeps_aborted.one();
            }
            Err(err) => witness.broken(format!("a sleep is permitted on {name}: {err:?}")),
        }
        let mut naps = subject.naps.lock().unwrap();
        naps.entry(event).or_default().retain(|other| !Arc::ptr_eq(other, &nap));
        holds
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A cancel's handler.
struct Cancel {
    subject: Arc<Subject>,
    witness: Witness,
    number: u64,
    ran: bool,
}

impl Cancel {
    fn run(mut self) {
        self.ran = true;
        let (subject, name) = (&self.subject, self.subject.queue.name());
        subject.ledger.tally.cancels_ran.one();
        let before = subject.cancels_ran.fetch_add(1, SeqCst);
        self.witness.check(before == self.number, || {
            format!("cancel handlers run in order: number {} of {name} after {before}", self.number)
        });
        let inside = subject.inside.load(SeqCst);
        self.witness.check(inside == 0, || {
            format!("a cancel handler runs after the work in progress, on {name}: {inside:#x}")
        });
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        if !self.ran {
            self.witness.check(self.subject.ledger.is_ending(), || {
                format!("no cancel handler is dropped, on {}", self.subject.queue.name())
            });
            self.subject.ledger.tally.cancels_dropped.one();
        }
    }
}

/// A completion on its way, of an enable, a disable or a cancel of a source.
#[derive(Debug)]
pub struct Completion {
    subject: Arc<Subject>,
    witness: Witness,
    ran: bool,
}

impl Completion {
    pub fn new(subject: &Arc<Subject>, witness: Witness) -> Self {
        subject.ledger.completions_open.fetch_add(1, SeqCst);
        Self { subject: subject.clone(), witness, ran: false }
    }

    /// The completion runs.
    pub fn run(mut self) {
        self.ran = true;
        drop(self.subject.enter(self.witness));
        self.subject.ledger.tally.completions.one();
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.witness.check(self.ran || self.subject.is_over(), || {
            format!("no completion is dropped while its queue lives, {}", self.subject.queue.name())
        });
        self.subject.ledger.completions_open.fetch_sub(1, SeqCst);
    }
}
