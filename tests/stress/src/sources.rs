//! Sources under test, with what has to be true of them.
//!
//! - A handler starts only while its source is enabled: never once the completion of a disable or
//!   of a cancel has run. It is never called while it runs.
//! - Interrupts and descriptor events: the counts add up, none too many at any time, none missing
//!   in the end. A level line is unmasked once for each time it was masked.
//! - Timers: one call per arming at the most and none before the deadline; an arming that was
//!   neither replaced nor taken back is called in the end. What only holds on the timer's own queue
//!   is checked for the exact ones, which are operated from there; the others from anywhere.
//!
//! A source is operated by one thread at a time, and one whose queue was cancelled is replaced.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use fastrand::Rng;
use iohost_dispatch::{
    Block, Clock, DescriptorSource, InterruptEvent, InterruptLine, InterruptSource, Signal,
    TimerSource,
};
use iohost_interface::IOReturn;

use crate::actor::Actor;
use crate::subject::{Completion, Inside, Lane, Ledger, Subject};
use crate::witness::Witness;
use crate::world::World;

/// Whether a source's handler may start.
#[derive(Debug)]
struct Gate {
    ledger: Arc<Ledger>,
    state: Mutex<GateState>,
    rng: Mutex<Rng>,
    calls: AtomicU64,
}

#[derive(Debug, Default)]
struct GateState {
    /// Goes up with each change, so that the completion of an earlier one changes nothing.
    changes: u64,
    /// The completion of a disable or a cancel has run.
    shut: bool,
    /// The handler runs, or sleeps.
    running: bool,
}

impl Gate {
    fn new(ledger: &Arc<Ledger>, shut: bool, rng: Rng) -> Arc<Self> {
        Arc::new(Self {
            ledger: ledger.clone(),
            state: Mutex::new(GateState { shut, ..GateState::default() }),
            rng: Mutex::new(rng),
            calls: AtomicU64::new(0),
        })
    }

    /// The source is about to be enabled.
    fn open(&self) {
        let mut state = self.state.lock().unwrap();
        state.changes += 1;
        state.shut = false;
    }

    /// The source is about to be disabled or cancelled. The completion shuts the gate, if anybody
    /// asks for one.
    fn shut(
        self: &Arc<Self>,
        subject: &Arc<Subject>,
        witness: Witness,
        asked: bool,
    ) -> Option<Block> {
        let mut state = self.state.lock().unwrap();
        state.changes += 1;
        let change = state.changes;
        drop(state);
        asked.then(|| -> Block {
            let (gate, completion) = (self.clone(), Completion::new(subject, witness));
            Box::new(move || {
                completion.run();
                let mut state = gate.state.lock().unwrap();
                state.shut |= state.changes == change;
            })
        })
    }

    /// The handler starts. What is returned is dropped at its end.
    fn pass(self: &Arc<Self>, subject: &Arc<Subject>, what: &'static str) -> (Inside, Passing) {
        let inside = subject.enter(subject.lane.begins(what));
        let mut state = self.state.lock().unwrap();
        let (running, shut) = (state.running, state.shut);
        inside.witness.check(!running, || "a handler is not called while it runs".to_owned());
        inside.witness.check(!shut, || {
            "no handler starts after the completion of a disable or cancel".to_owned()
        });
        state.running = true;
        self.calls.fetch_add(1, SeqCst);
        (inside, Passing(self.clone()))
    }

    /// What a handler does after its checks.
    fn handle(&self, world: &Weak<World>, inside: Inside) {
        let rng = self.rng.lock().unwrap().fork();
        if let Some(world) = world.upgrade() {
            Actor::handler(&world, inside, rng, 1).handle();
        }
    }

    fn describe(&self) -> String {
        let GateState { shut, running, .. } = *self.state.lock().unwrap();
        format!("shut {shut}, running {running}, {} calls", self.calls.load(SeqCst))
    }
}

struct Passing(Arc<Gate>);

impl Drop for Passing {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().running = false;
    }
}

// ---- Timers ----

/// A timer, or those that took its place one after the other.
pub struct Timer {
    number: usize,
    /// Operated in blocks of its own queue only.
    pub exact: bool,
    life: Mutex<TimerLife>,
}

struct TimerLife {
    subject: Arc<Subject>,
    source: TimerSource,
    facts: Arc<TimerFacts>,
    enabled: bool,
    cancelled: bool,
}

#[derive(Debug)]
struct TimerFacts {
    gate: Arc<Gate>,
    exact: bool,
    state: Mutex<TimerState>,
}

#[derive(Debug, Default)]
struct TimerState {
    arms: u64,
    calls: u64,
    /// The arming that was not called yet.
    armed: Option<(Clock, u64)>,
    /// It was disabled after it came due: the call may have been taken back.
    maybe_taken_back: bool,
    /// For an exact timer, to the moment.
    disabled: bool,
}

impl Timer {
    pub fn new(
        world: &Weak<World>,
        number: usize,
        exact: bool,
        subject: &Arc<Subject>,
        rng: Rng,
    ) -> Self {
        let life = Mutex::new(TimerLife::new(world, number, exact, subject, rng));
        Self { number, exact, life }
    }

    fn life(&self) -> MutexGuard<'_, TimerLife> {
        self.life.lock().unwrap()
    }

    /// The queue it is on now; a new one if that was cancelled, or the timer was.
    pub fn subject(&self, world: &Arc<World>) -> Arc<Subject> {
        self.going_on(world).subject.clone()
    }

    /// A life that was not cancelled, and is not while the caller has it.
    fn going_on(&self, world: &Arc<World>) -> MutexGuard<'_, TimerLife> {
        let mut life = self.life();
        if life.cancelled || life.subject.is_over() {
            let subject = world.subject(life.subject.rank);
            let rng = life.facts.gate.rng.lock().unwrap().fork();
            let weak = Arc::downgrade(world);
            *life = TimerLife::new(&weak, self.number, self.exact, &subject, rng);
        }
        life
    }

    /// From anywhere.
    pub fn operate(&self, world: &Arc<World>, lane: &Lane, rng: &mut Rng) {
        self.going_on(world).operate(lane.begins("timer"), rng);
    }

    /// In a block of its queue.
    pub fn operate_here(&self, inside: &Inside, rng: &mut Rng) {
        let mut life = self.life();
        if Arc::ptr_eq(&life.subject, &inside.subject) && !life.cancelled {
            life.operate(inside.witness, rng);
        }
    }

    /// Enables it for the end of a round, in a block of its queue.
    pub fn enable_at_last(&self, inside: &Inside) {
        let mut life = self.life();
        if Arc::ptr_eq(&life.subject, &inside.subject) && !life.cancelled {
            life.enable(inside.witness, true);
        }
    }

    /// Whether everything that has to be called was.
    pub fn is_done(&self) -> bool {
        let life = self.life();
        let state = life.facts.state.lock().unwrap();
        !self.exact
            || life.cancelled
            || life.subject.is_over()
            || state.armed.is_none()
            || state.maybe_taken_back
    }

    pub fn describe(&self) -> String {
        let life = self.life();
        format!(
            "timer {} ({}) on {}: {:?}, {}; now {}",
            self.number,
            if self.exact { "exact" } else { "from anywhere" },
            life.subject.queue.name(),
            life.facts.state.lock().unwrap(),
            life.facts.gate.describe(),
            life.subject.queue.now(Clock::Uptime),
        )
    }
}

impl TimerLife {
    fn new(
        world: &Weak<World>,
        number: usize,
        exact: bool,
        subject: &Arc<Subject>,
        rng: Rng,
    ) -> Self {
        let gate = Gate::new(&subject.ledger, false, rng);
        let facts = Arc::new(TimerFacts { gate, exact, state: Mutex::default() });
        let (fired, on, world) = (facts.clone(), subject.clone(), world.clone());
        let handler = move |time| fired.fired(&world, number, &on, time);
        Self {
            source: TimerSource::create(&subject.queue, handler),
            subject: subject.clone(),
            facts,
            enabled: true,
            cancelled: false,
        }
    }

    fn operate(&mut self, witness: Witness, rng: &mut Rng) {
        match rng.u32(..16) {
            0..9 => self.arm(witness, rng),
            9..12 => self.disable(witness, rng.bool()),
            12..15 => self.enable(witness, rng.bool()),
            _ => self.cancel(witness),
        }
    }

    fn arm(&mut self, witness: Witness, rng: &mut Rng) {
        let clock = rng.choice([Clock::Uptime, Clock::Continuous, Clock::Wall]).expect("three");
        let ahead = rng.choice([0, 20_000, 500_000, 5_000_000]).expect("four");
        let leeway = if rng.bool() { 0 } else { rng.u64(..1_000_000) };
        let at = self.subject.queue.now(clock) + rng.u64(..=ahead);
        let mut state = self.facts.state.lock().unwrap();
        state.arms += 1;
        state.armed = Some((clock, at));
        state.maybe_taken_back = false;
        drop(state);
        let armed = self.source.wake_at(clock, at, leeway);
        let expected = if self.cancelled { Err(IOReturn::UNSUPPORTED) } else { Ok(()) };
        witness.check(armed == expected, || format!("wake_at says {expected:?}, not {armed:?}"));
        self.subject.ledger.tally.timer_arms.one();
    }

    fn disable(&mut self, witness: Witness, tell: bool) {
        let mut state = self.facts.state.lock().unwrap();
        state.disabled = true;
        drop(state);
        let done = self.facts.gate.shut(&self.subject, witness, tell);
        let disabled = self.source.set_enable(false, done);
        let now = |clock| self.subject.queue.now(clock);
        let mut state = self.facts.state.lock().unwrap();
        state.maybe_taken_back |= state.armed.is_some_and(|(clock, at)| now(clock) >= at);
        drop(state);
        self.check_change(&witness, false, disabled);
    }

    fn enable(&mut self, witness: Witness, tell: bool) {
        self.facts.gate.open();
        self.facts.state.lock().unwrap().disabled = false;
        let done = completion(&self.subject, witness, tell);
        let enabled = self.source.set_enable(true, done);
        self.check_change(&witness, true, enabled);
    }

    fn check_change(&mut self, witness: &Witness, enable: bool, said: Result<(), IOReturn>) {
        let refused = self.cancelled && enable;
        let expected = if refused { Err(IOReturn::UNSUPPORTED) } else { Ok(()) };
        witness.check(said == expected, || {
            format!("set_enable({enable}) of a timer says {expected:?}, not {said:?}")
        });
        self.enabled = enable;
    }

    fn cancel(&mut self, witness: Witness) {
        if !self.cancelled {
            self.cancelled = true;
            self.subject.ledger.tally.timers_cancelled.one();
            let mut state = self.facts.state.lock().unwrap();
            state.disabled = true;
            drop(state);
            self.source.cancel(self.facts.gate.shut(&self.subject, witness, true));
        }
    }
}

impl TimerFacts {
    fn fired(&self, world: &Weak<World>, number: usize, subject: &Arc<Subject>, time: u64) {
        let (inside, _passing) = self.gate.pass(subject, "timer handler");
        let witness = inside.witness;
        subject.ledger.tally.timer_calls.one();
        let queue = &subject.queue;
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        let TimerState { arms, calls, disabled, .. } = *state;
        witness.check(calls <= arms, || format!("one call per arming: {calls} for {arms} armings"));
        witness.check(time <= queue.now(Clock::Uptime), || "fired at a time to come".to_owned());
        let armed = state.armed.take();
        if self.exact {
            witness.check(!disabled, || "no call of a timer that is disabled".to_owned());
            let Some((clock, at)) = armed else {
                witness.broken("one call for each arming: this one has been called")
            };
            let now = queue.now(clock);
            witness.check(now >= at, || {
                format!("never early: {} ns before the deadline on {clock:?}", at - now)
            });
        }
        drop(state);
        if self.exact
            && let Some(world) = world.upgrade()
            && !world.is_closing()
            && self.gate.rng.lock().unwrap().bool()
        {
            // As drivers do: the handler arms its timer again.
            let mut rng = self.gate.rng.lock().unwrap().fork();
            world.timers[number].operate_here(&inside, &mut rng);
        }
        self.gate.handle(world, inside);
    }
}

/// The completion of an enable, if anybody asks for one.
fn completion(subject: &Arc<Subject>, witness: Witness, asked: bool) -> Option<Block> {
    asked.then(|| -> Block {
        let completion = Completion::new(subject, witness);
        Box::new(move || completion.run())
    })
}

// ---- Interrupts ----

/// An interrupt source, or those that took its place one after the other.
pub struct Interrupt {
    number: usize,
    level: bool,
    life: Mutex<InterruptLife>,
}

struct InterruptLife {
    subject: Arc<Subject>,
    source: InterruptSource,
    facts: Arc<InterruptFacts>,
    cancelled: bool,
    world: Weak<World>,
}

/// A device with one interrupt line, and what its handler saw of it.
#[derive(Debug)]
struct InterruptFacts {
    gate: Arc<Gate>,
    signal: Arc<Signal>,
    level: bool,
    raised: AtomicU64,
    counted: AtomicU64,
    last_time: AtomicU64,
    /// A level line that interrupted and waits for the unmasking.
    masked: AtomicBool,
}

impl Interrupt {
    pub fn new(
        world: &Weak<World>,
        number: usize,
        level: bool,
        subject: &Arc<Subject>,
        rng: Rng,
    ) -> Self {
        let life = InterruptLife::new(world, level, subject, rng);
        Self { number, level, life: Mutex::new(life) }
    }

    fn life(&self) -> MutexGuard<'_, InterruptLife> {
        self.life.lock().unwrap()
    }

    pub fn operate(&self, world: &Arc<World>, lane: &Lane, rng: &mut Rng) {
        let mut life = self.life();
        if life.cancelled || life.subject.is_over() {
            let subject = world.subject(life.subject.rank);
            *life = InterruptLife::new(&life.world.clone(), self.level, &subject, rng.fork());
        }
        let witness = lane.begins("interrupt");
        match rng.u32(..16) {
            0..8 => {
                let facts = life.facts.clone();
                drop(life);
                (0..rng.u32(1..4)).for_each(|_| facts.raise());
            }
            8..10 => life.disable(witness, rng.bool()),
            10..13 => life.enable(witness, rng.bool()),
            13 => life.look(&witness),
            14 => life.replace_handler(rng.bool()),
            _ => life.cancel(witness),
        }
    }

    /// Has everything delivered that came, for the end of a round.
    pub fn enable_at_last(&self, lane: &Lane) {
        let mut life = self.life();
        if !life.cancelled && !life.subject.is_over() {
            life.enable(lane.begins("interrupt, enabled at last"), true);
            if !life.subject.reentrant {
                life.replace_handler(true);
            }
        }
    }

    /// Whether everything that came was delivered.
    pub fn is_done(&self) -> bool {
        let life = self.life();
        let facts = &life.facts;
        life.cancelled
            || life.subject.is_over()
            || (facts.counted.load(SeqCst) == facts.raised.load(SeqCst)
                && !facts.masked.load(SeqCst))
    }

    pub fn describe(&self) -> String {
        let life = self.life();
        let facts = &life.facts;
        format!(
            "interrupt {} ({}){}{} on {}: {} raised, {} counted, masked {}, {}",
            self.number,
            if self.level { "level" } else { "edge" },
            if life.cancelled { " cancelled" } else { "" },
            if life.subject.is_over() { " over" } else { "" },
            life.subject.queue.name(),
            facts.raised.load(SeqCst),
            facts.counted.load(SeqCst),
            facts.masked.load(SeqCst),
            facts.gate.describe(),
        )
    }
}

impl InterruptLife {
    fn new(world: &Weak<World>, level: bool, subject: &Arc<Subject>, rng: Rng) -> Self {
        let facts = Arc::new(InterruptFacts {
            gate: Gate::new(&subject.ledger, true, rng),
            signal: Arc::new(Signal::new().expect("an eventfd")),
            level,
            raised: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            last_time: AtomicU64::new(0),
            masked: AtomicBool::new(false),
        });
        let line = match level {
            false => InterruptLine::Edge,
            true => {
                let (facts, subject) = (facts.clone(), subject.clone());
                InterruptLine::Level(Box::new(move || facts.unmask(&subject)))
            }
        };
        let handler = facts.handler(world, subject);
        let (queue, signal) = (&subject.queue, facts.signal.clone());
        let source = InterruptSource::create(queue, signal, line, Clock::Uptime, handler);
        let (source, subject) = (source.expect("an eventfd can be watched"), subject.clone());
        Self { subject, source, facts, cancelled: false, world: world.clone() }
    }

    fn disable(&mut self, witness: Witness, tell: bool) {
        let done = self.facts.gate.shut(&self.subject, witness, tell);
        let said = self.source.set_enable(false, done);
        witness.check(said == Ok(()), || format!("an interrupt can be disabled: {said:?}"));
    }

    fn enable(&mut self, witness: Witness, tell: bool) {
        self.facts.gate.open();
        let said = self.source.set_enable(true, completion(&self.subject, witness, tell));
        witness.check(said == Ok(()), || format!("an interrupt can be enabled: {said:?}"));
    }

    fn look(&mut self, witness: &Witness) {
        let last = self.source.last_interrupt();
        let raised = self.facts.raised.load(SeqCst);
        witness.check(last.count <= raised, || {
            format!("last_interrupt counts no more than came: {} of {raised}", last.count)
        });
    }

    /// Puts another handler in place, or none for the time being: what comes stays counted.
    fn replace_handler(&mut self, present: bool) {
        // One that sleeps on its queue would be replaced in the middle.
        if !self.subject.reentrant {
            let handler = self.facts.handler(&self.world, &self.subject);
            self.source.set_handler(present.then_some(handler));
        }
    }

    fn cancel(&mut self, witness: Witness) {
        self.cancelled = true;
        self.subject.ledger.tally.interrupts_cancelled.one();
        self.source.cancel(self.facts.gate.shut(&self.subject, witness, true));
        let said = self.source.set_enable(true, None);
        witness.check(said == Err(IOReturn::UNSUPPORTED), || {
            format!("a cancelled interrupt is not enabled: {said:?}")
        });
    }
}

impl InterruptFacts {
    /// The device interrupts, unless its line is masked.
    fn raise(&self) {
        if !self.level || !self.masked.swap(true, SeqCst) {
            self.raised.fetch_add(1, SeqCst);
            self.gate.ledger.tally.interrupts_raised.one();
            self.signal.raise();
        }
    }

    fn unmask(&self, subject: &Subject) {
        let witness = subject.lane.begins("unmasking");
        let masked = self.masked.swap(false, SeqCst);
        witness.check(masked, || "a line is unmasked only once it was masked".to_owned());
    }

    fn handler(
        self: &Arc<Self>,
        world: &Weak<World>,
        subject: &Arc<Subject>,
    ) -> impl FnMut(InterruptEvent) + Send + 'static {
        let (facts, world, subject) = (self.clone(), world.clone(), subject.clone());
        move |event| facts.interrupted(&world, &subject, event)
    }

    fn interrupted(&self, world: &Weak<World>, subject: &Arc<Subject>, event: InterruptEvent) {
        let (inside, _passing) = self.gate.pass(subject, "interrupt handler");
        let witness = inside.witness;
        let tally = &subject.ledger.tally;
        tally.interrupt_calls.one();
        tally.interrupts_counted.many(event.count);
        witness.check(event.count > 0, || "an interrupt is counted at least once".to_owned());
        let counted = self.counted.fetch_add(event.count, SeqCst) + event.count;
        let raised = self.raised.load(SeqCst);
        witness.check(counted <= raised, || {
            format!("no interrupt too many: {counted} of {raised} were counted")
        });
        let last = self.last_time.swap(event.time, SeqCst);
        let now = subject.queue.now(Clock::Uptime);
        witness.check(last <= event.time && event.time <= now, || {
            format!("times go up: {last}, then {}, now {now}", event.time)
        });
        self.gate.handle(world, inside);
    }
}

// ---- Descriptors ----

/// A watched eventfd, by one source after the other.
pub struct Descriptor {
    number: usize,
    life: Mutex<DescriptorLife>,
}

struct DescriptorLife {
    subject: Arc<Subject>,
    source: Option<DescriptorSource<Arc<Signal>>>,
    gate: Arc<Gate>,
    events: Arc<Events>,
    world: Weak<World>,
}

#[derive(Debug)]
struct Events {
    signal: Arc<Signal>,
    raised: AtomicU64,
    counted: AtomicU64,
}

impl Descriptor {
    pub fn new(world: &Weak<World>, number: usize, subject: &Arc<Subject>, rng: Rng) -> Self {
        Self { number, life: Mutex::new(DescriptorLife::new(world, subject, rng)) }
    }

    fn life(&self) -> MutexGuard<'_, DescriptorLife> {
        self.life.lock().unwrap()
    }

    pub fn operate(&self, world: &Arc<World>, lane: &Lane, rng: &mut Rng) {
        let mut life = self.life();
        if life.subject.is_over() {
            let subject = world.subject(life.subject.rank);
            *life = DescriptorLife::new(&life.world.clone(), &subject, rng.fork());
        }
        match rng.u32(..8) {
            0..5 => {
                let events = life.events.clone();
                drop(life);
                for _ in 0..rng.u32(1..4) {
                    events.raised.fetch_add(1, SeqCst);
                    world.ledger.tally.signals_raised.one();
                    events.signal.raise();
                }
            }
            5 => life.source.iter().for_each(DescriptorSource::nudge),
            6 => life.unwatch(lane.begins("dropping a descriptor source")),
            _ => life.watch(rng.fork()),
        }
    }

    /// Has everything delivered that came, for the end of a round.
    pub fn watch_at_last(&self, rng: &mut Rng) {
        let mut life = self.life();
        if !life.subject.is_over() {
            life.watch(rng.fork());
        }
    }

    /// Whether everything that came was delivered.
    pub fn is_done(&self) -> bool {
        let life = self.life();
        let events = &life.events;
        life.subject.is_over() || events.counted.load(SeqCst) == events.raised.load(SeqCst)
    }

    pub fn describe(&self) -> String {
        let life = self.life();
        format!(
            "descriptor {} on {}: {} raised, {} counted, {}",
            self.number,
            life.subject.queue.name(),
            life.events.raised.load(SeqCst),
            life.events.counted.load(SeqCst),
            life.gate.describe(),
        )
    }
}

impl DescriptorLife {
    fn new(world: &Weak<World>, subject: &Arc<Subject>, mut rng: Rng) -> Self {
        let events = Events {
            signal: Arc::new(Signal::new().expect("an eventfd")),
            raised: AtomicU64::new(0),
            counted: AtomicU64::new(0),
        };
        let mut life = Self {
            subject: subject.clone(),
            source: None,
            gate: Gate::new(&subject.ledger, false, rng.fork()),
            events: Arc::new(events),
            world: world.clone(),
        };
        life.watch(rng);
        life
    }

    /// Watches, unless a source does. A descriptor that is readable already leads to a call.
    fn watch(&mut self, rng: Rng) {
        if self.source.is_some() {
            return;
        }
        // A gate of its own: the handler of the source before may be asleep.
        self.gate = Gate::new(&self.subject.ledger, false, rng);
        let (gate, events) = (self.gate.clone(), self.events.clone());
        let (world, subject) = (self.world.clone(), self.subject.clone());
        let handler = move || {
            let (inside, _passing) = gate.pass(&subject, "descriptor handler");
            let count = events.signal.take();
            subject.ledger.tally.signals_counted.many(count);
            let counted = events.counted.fetch_add(count, SeqCst) + count;
            let raised = events.raised.load(SeqCst);
            inside.witness.check(counted <= raised, || {
                format!("no event too many: {counted} of {raised} were counted")
            });
            gate.handle(&world, inside);
        };
        let signal = self.events.signal.clone();
        let source = DescriptorSource::create(&self.subject.queue, signal, handler);
        self.source = Some(source.expect("an eventfd can be watched"));
    }

    /// Drops the source; once the queue has been free no handler starts.
    fn unwatch(&mut self, witness: Witness) {
        if self.source.take().is_some() {
            self.subject.ledger.tally.descriptors_dropped.one();
            if let Some(done) = self.gate.shut(&self.subject, witness, true) {
                self.subject.queue.dispatch_async(done);
            }
        }
    }
}
