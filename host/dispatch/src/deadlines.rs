//! The deadlines of all timers of an engine.
//!
//! Per clock: the deadlines, and one timer of the kernel that is set to the earliest moment at
//! which some timer must have fired (its deadline plus its leeway). When it expires, every timer
//! whose deadline has passed fires, also those whose leeway would have let them wait: that is how
//! leeway saves wake-ups. On virtual time a number stands for the kernel's timer, and expires as it
//! would.
//!
//! Timers are armed, moved and taken back far more often than they fire, so that is what is
//! cheap, however many there are: a place in a table holds the truth about a timer, and two heaps
//! hold notes that say when to look at the place. A note can be out of date. It then says too
//! early (the timer was moved to later: the note is written again when its time comes) or names a
//! place that is somebody else's (the timer was taken back: the note is dropped).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::{Mutex, Weak};

use iohost_event::{Clock, Timer};

use crate::clocks::Clocks;
use crate::{EngineClock, NO_PANIC};

/// A timer, seen from the engine.
pub(crate) trait Expire: Send + Sync {
    /// The deadline armed with this generation has passed. Called on a worker.
    fn expired(&self, generation: u64);
}

/// The deadlines of one engine.
pub(crate) struct Deadlines {
    tables: [Table; CLOCKS.len()],
    clocks: Clocks,
}

const CLOCKS: [Clock; 3] = [Clock::Uptime, Clock::Continuous, Clock::Wall];

/// The token of the first table's timer; the others follow.
const FIRST_TOKEN: u64 = 1;

/// Fewer notes than this are never sorted out.
const FEW_NOTES: usize = 64;

struct Table {
    clock: Clock,
    timer: Timer,
    waiting: Mutex<Waiting>,
}

/// Invariant: every place that is taken has a valid note in `by_latest` whose time is not after
/// the place's `latest`; and, if it has leeway, one in `by_deadline` not after its `deadline`.
#[derive(Default)]
struct Waiting {
    places: Vec<Place>,
    free: Vec<u32>,
    by_latest: BinaryHeap<Reverse<Note>>,
    /// For those that may fire before they must.
    by_deadline: BinaryHeap<Reverse<Note>>,
    /// What the kernel's timer is set to, or would be.
    set_to: Option<u64>,
}

struct Place {
    deadline: u64,
    latest: u64,
    generation: u64,
    /// `None` while the place is free.
    timer: Option<Weak<dyn Expire>>,
    /// Goes up when the place is taken, or moved to earlier. Notes with another number are out of
    /// date.
    stamp: u32,
}

/// Look at a place at a time. Ordered by the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Note {
    time: u64,
    place: u32,
    stamp: u32,
}

/// Where a deadline stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Armed {
    table: u8,
    place: u32,
    stamp: u32,
}

/// When a timer is to fire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    pub(crate) clock: Clock,
    pub(crate) at: u64,
    pub(crate) leeway: u64,
}

impl Deadlines {
    pub(crate) fn new(clock: EngineClock) -> io::Result<Self> {
        let [a, b, c] = CLOCKS;
        Ok(Self {
            tables: [Table::new(a)?, Table::new(b)?, Table::new(c)?],
            clocks: Clocks::new(clock),
        })
    }

    /// The kernel's timers, with the token each is to be watched under.
    pub(crate) fn timers(&self) -> impl Iterator<Item = (u64, &Timer)> {
        (FIRST_TOKEN..).zip(self.tables.iter().map(|table| &table.timer))
    }

    pub(crate) fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    pub(crate) fn now(&self, clock: Clock) -> u64 {
        self.clocks.now(clock)
    }

    /// Has a timer fire at a deadline.
    pub(crate) fn arm(
        &self,
        deadline: Deadline,
        timer: Weak<dyn Expire>,
        generation: u64,
    ) -> Armed {
        let table = table_of(deadline.clock);
        let mut waiting = self.tables[table].waiting.lock().expect(NO_PANIC);
        let (place, stamp) = waiting.take_place(deadline, timer, generation);
        self.set_timer(table, &mut waiting, deadline.latest());
        Armed { table: table as u8, place, stamp }
    }

    /// Moves a timer that is armed to another deadline. `None` when it is not armed any more, or
    /// the deadline is on another clock.
    pub(crate) fn rearm(&self, armed: Armed, deadline: Deadline, generation: u64) -> Option<Armed> {
        let table = usize::from(armed.table);
        if table != table_of(deadline.clock) {
            return None;
        }
        let mut waiting = self.tables[table].waiting.lock().expect(NO_PANIC);
        let stamp = waiting.move_place(armed, deadline, generation)?;
        self.set_timer(table, &mut waiting, deadline.latest());
        Some(Armed { stamp, ..armed })
    }

    /// Takes a deadline back; one that has just expired is not there any more, which is fine.
    /// The kernel's timer stays set: one wake-up for nothing is cheaper than setting it anew.
    pub(crate) fn disarm(&self, armed: Armed) {
        let mut waiting = self.tables[usize::from(armed.table)].waiting.lock().expect(NO_PANIC);
        if waiting.find(armed).is_some() {
            let timer = waiting.leave_place(armed.place);
            waiting.sort_out();
            drop(waiting);
            // Its last reference may be this one, and what it owns can be anything.
            drop(timer);
        }
    }

    /// The timer with this token expired.
    pub(crate) fn expire(&self, token: u64) {
        self.expire_table((token - FIRST_TOKEN) as usize);
    }

    /// Does what the kernel's timers would do on virtual time; nothing on real time.
    pub(crate) fn expire_virtual(&self) {
        if self.clocks.are_real() {
            return;
        }
        for (number, table) in self.tables.iter().enumerate() {
            let set_to = table.waiting.lock().expect(NO_PANIC).set_to;
            if set_to.is_some_and(|set_to| set_to <= self.now(table.clock)) {
                self.expire_table(number);
            }
        }
    }

    fn expire_table(&self, table: usize) {
        let now = self.now(self.tables[table].clock);
        let mut waiting = self.tables[table].waiting.lock().expect(NO_PANIC);
        let mut due = waiting.take_due(now);
        waiting.set_to = None;
        if let Some(next) = waiting.next_latest() {
            self.set_timer(table, &mut waiting, next);
        }
        drop(waiting);
        // In the order of their deadlines, and without the lock: a timer may arm itself anew.
        due.sort_by_key(|due| due.deadline);
        for due in due {
            if let Some(timer) = due.timer.upgrade() {
                timer.expired(due.generation);
            }
        }
    }

    /// Sees that the kernel's timer expires at `latest` or before.
    fn set_timer(&self, table: usize, waiting: &mut Waiting, latest: u64) {
        if waiting.set_to.is_none_or(|set_to| latest < set_to) {
            waiting.set_to = Some(latest);
            if self.clocks.are_real() {
                self.tables[table].timer.arm(latest).expect("a timerfd takes any deadline");
            }
        }
    }
}

fn table_of(clock: Clock) -> usize {
    match clock {
        Clock::Uptime => 0,
        Clock::Continuous => 1,
        Clock::Wall => 2,
    }
}

impl Deadline {
    fn latest(&self) -> u64 {
        self.at.saturating_add(self.leeway)
    }
}

impl Table {
    fn new(clock: Clock) -> io::Result<Self> {
        Ok(Self { clock, timer: Timer::new(clock)?, waiting: Mutex::default() })
    }
}

/// A timer that is to fire now.
struct Due {
    deadline: u64,
    timer: Weak<dyn Expire>,
    generation: u64,
}

impl Waiting {
    fn take_place(
        &mut self,
        deadline: Deadline,
        timer: Weak<dyn Expire>,
        generation: u64,
    ) -> (u32, u32) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place {
                deadline: 0,
                latest: 0,
                generation: 0,
                timer: None,
                stamp: 0,
            });
            (self.places.len() - 1) as u32
        });
        let place = &mut self.places[index as usize];
        place.stamp = place.stamp.wrapping_add(1);
        place.timer = Some(timer);
        place.generation = generation;
        place.deadline = deadline.at;
        place.latest = deadline.latest();
        let stamp = place.stamp;
        self.write_notes(index);
        (index, stamp)
    }

    fn move_place(&mut self, armed: Armed, deadline: Deadline, generation: u64) -> Option<u32> {
        let place = self.find(armed)?;
        let had_leeway = place.latest > place.deadline;
        let later = deadline.latest() >= place.latest
            && (deadline.leeway == 0 || (had_leeway && deadline.at >= place.deadline));
        place.generation = generation;
        place.deadline = deadline.at;
        place.latest = deadline.latest();
        if later {
            // The notes there are say too early, which is no harm.
            return Some(armed.stamp);
        }
        place.stamp = place.stamp.wrapping_add(1);
        let stamp = place.stamp;
        self.write_notes(armed.place);
        self.sort_out();
        Some(stamp)
    }

    fn find(&mut self, armed: Armed) -> Option<&mut Place> {
        let place = &mut self.places[armed.place as usize];
        (place.stamp == armed.stamp && place.timer.is_some()).then_some(place)
    }

    fn write_notes(&mut self, index: u32) {
        let &Place { deadline, latest, stamp, .. } = &self.places[index as usize];
        self.by_latest.push(Reverse(Note { time: latest, place: index, stamp }));
        if deadline < latest {
            self.by_deadline.push(Reverse(Note { time: deadline, place: index, stamp }));
        }
    }

    fn leave_place(&mut self, index: u32) -> Option<Weak<dyn Expire>> {
        let timer = self.places[index as usize].timer.take();
        if timer.is_some() {
            self.free.push(index);
        }
        timer
    }

    /// Takes every timer whose deadline has passed.
    fn take_due(&mut self, now: u64) -> Vec<Due> {
        let mut due = Vec::new();
        for by_latest in [true, false] {
            loop {
                let notes = if by_latest { &mut self.by_latest } else { &mut self.by_deadline };
                match notes.peek() {
                    Some(Reverse(note)) if note.time <= now => {}
                    _ => break,
                }
                let Some(Reverse(note)) = notes.pop() else { break };
                let place = &self.places[note.place as usize];
                if place.stamp != note.stamp || place.timer.is_none() {
                    continue;
                }
                if place.deadline > now {
                    // Moved to later since the note was written.
                    let time = if by_latest { place.latest } else { place.deadline };
                    notes.push(Reverse(Note { time, ..note }));
                    continue;
                }
                let (deadline, generation) = (place.deadline, place.generation);
                due.extend(self.leave_place(note.place).map(|timer| Due {
                    deadline,
                    timer,
                    generation,
                }));
            }
        }
        due
    }

    /// The earliest moment at which some timer must have fired.
    fn next_latest(&mut self) -> Option<u64> {
        loop {
            let Reverse(note) = *self.by_latest.peek()?;
            let place = &self.places[note.place as usize];
            let valid = place.stamp == note.stamp && place.timer.is_some();
            if valid && place.latest <= note.time {
                return Some(note.time);
            }
            let latest = place.latest;
            self.by_latest.pop();
            if valid {
                self.by_latest.push(Reverse(Note { time: latest, ..note }));
            }
        }
    }

    /// Drops notes that are out of date once they are most of what there is.
    fn sort_out(&mut self) {
        let taken = self.places.len() - self.free.len();
        for notes in [&mut self.by_latest, &mut self.by_deadline] {
            if notes.len() > FEW_NOTES && notes.len() > 4 * taken {
                let places = &self.places;
                notes.retain(|Reverse(note)| {
                    let place = &places[note.place as usize];
                    place.stamp == note.stamp && place.timer.is_some()
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::Duration;

    use iohost_event::{Poller, Ready};

    use super::*;
    use crate::Engine;

    #[derive(Default)]
    struct Fired(Mutex<Vec<u64>>);

    impl Expire for Fired {
        fn expired(&self, generation: u64) {
            self.0.lock().unwrap().push(generation);
        }
    }

    /// A generator with the statistics of none and the repeatability of all (Marsaglia, 2003).
    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    #[test]
    fn any_mix_of_arming_moving_and_taking_back_fires_all_that_are_due_whenever_one_must_fire() {
        let engine = Engine::manual(EngineClock::Virtual).unwrap();
        let deadlines = &engine.shared().deadlines;
        let fired = Arc::new(Fired::default());
        let timer: Weak<dyn Expire> = Arc::downgrade(&fired) as Weak<dyn Expire>;
        // What a plain list would know.
        let mut expected: BTreeMap<u64, (Armed, Deadline)> = BTreeMap::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        for generation in 0..20_000 {
            let now = deadlines.now(Clock::Uptime);
            let at = now + random(&mut seed) % 5_000;
            let leeway = [0, 0, random(&mut seed) % 2_000][(random(&mut seed) % 3) as usize];
            let deadline = Deadline { clock: Clock::Uptime, at, leeway };
            let some = expected.keys().nth(random(&mut seed) as usize % 50).copied();
            match (random(&mut seed) % 4, some) {
                (0, Some(old)) => deadlines.disarm(expected.remove(&old).unwrap().0),
                (1, Some(old)) => {
                    let (armed, _) = expected.remove(&old).unwrap();
                    let armed = deadlines.rearm(armed, deadline, generation).unwrap();
                    expected.insert(generation, (armed, deadline));
                }
                _ => {
                    let armed = deadlines.arm(deadline, timer.clone(), generation);
                    expected.insert(generation, (armed, deadline));
                }
            }
            engine.advance(Duration::from_nanos(random(&mut seed) % 200));
            deadlines.expire_virtual();
            let now = deadlines.now(Clock::Uptime);
            let one_must = expected.values().any(|(_, deadline)| deadline.latest() <= now);
            let due = expected.iter().filter(|(_, (_, deadline))| deadline.at <= now);
            let mut due: Vec<_> =
                due.map(|(number, (_, deadline))| (deadline.at, *number)).collect();
            let seen = std::mem::take(&mut *fired.0.lock().unwrap());
            let mut seen: Vec<_> =
                seen.iter().map(|number| (expected[number].1.at, *number)).collect();
            assert!(seen.is_sorted_by_key(|(at, _)| at), "{seen:?}");
            if seen.is_empty() {
                assert!(!one_must, "{due:?} at {now}");
                continue;
            }
            // Equal deadlines have no order.
            seen.sort();
            due.sort();
            assert_eq!(seen, due);
            for (_, number) in due {
                expected.remove(&number);
            }
        }
    }

    #[test]
    fn deadlines_with_leeway_that_overlap_cost_the_kernels_timer_one_expiration() {
        const MS: u64 = 1_000_000;
        for clock in CLOCKS {
            let deadlines = Deadlines::new(EngineClock::Real).unwrap();
            let poller = Poller::new().unwrap();
            deadlines.timers().for_each(|(token, timer)| poller.watch(timer, token).unwrap());
            let fired = Arc::new(Fired::default());
            let timer: Weak<dyn Expire> = Arc::downgrade(&fired) as Weak<dyn Expire>;
            let start = deadlines.now(clock);
            for number in 0..100 {
                // From 0 to 20 ms; the end of the leeway is at 50 ms or later, for each one.
                let at = start + number * 7_919 % 100 * MS / 5;
                let leeway = 50 * MS + number % 3 * MS;
                deadlines.arm(Deadline { clock, at, leeway }, timer.clone(), number);
            }
            let mut expirations = 0;
            let mut ready = Ready::new(1);
            while fired.0.lock().unwrap().len() < 100 {
                poller.wait(&mut ready, None).unwrap();
                ready.tokens().for_each(|token| {
                    expirations += 1;
                    deadlines.expire(token);
                });
            }
            assert_eq!(expirations, 1, "{clock:?}");
        }
    }

    #[test]
    fn a_timer_that_is_moved_a_million_times_leaves_no_heap_of_notes() {
        let deadlines = Deadlines::new(EngineClock::Virtual).unwrap();
        let fired = Arc::new(Fired::default());
        let timer: Weak<dyn Expire> = Arc::downgrade(&fired) as Weak<dyn Expire>;
        let at = |at| Deadline { clock: Clock::Uptime, at, leeway: 0 };
        let mut armed = deadlines.arm(at(u64::MAX / 2), timer, 0);
        for generation in 0..1_000_000 {
            // Each one earlier than the one before: the dear direction.
            armed = deadlines.rearm(armed, at(u64::MAX / 2 - generation), generation).unwrap();
        }
        let waiting = deadlines.tables[0].waiting.lock().unwrap();
        assert!(waiting.by_latest.len() <= 2 * FEW_NOTES, "{}", waiting.by_latest.len());
    }
}
