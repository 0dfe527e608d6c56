//! The deadlines of all timers of an engine.
//!
//! Per clock: the deadlines, and one timer of the kernel that is set to the earliest moment at
//! which some timer must have fired (its deadline plus its leeway). When it expires, every timer
//! whose deadline has passed fires, also those whose leeway would have let them wait: that is how
//! leeway saves wake-ups. On virtual time a number stands for the kernel's timer, and expires as it
//! would.
//!
//! Timers are armed, moved and taken back far more often than they fire, so that is what is
//! cheap, however many there are. The timer alone knows what it wants. Two lists hold notes that
//! say when to ask it, and a note may come too early: to move a timer to a later time, or to take
//! it back, changes the timer and nothing here. When the time of a note has come, and before the
//! kernel's timer is set to that of the earliest one, the timer is asked, and the note goes or is
//! written again.
//!
//! Locks: a timer's own comes before a table's. No timer is asked under a table's lock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::num::NonZeroU32;
use std::sync::{Mutex, Weak};

use iohost_event::{Clock, Timer};

use crate::clocks::Clocks;
use crate::{EngineClock, NO_PANIC};

/// A timer, seen from the engine. Called on a worker.
pub(crate) trait Expire: Send + Sync {
    /// The time of a note has come, or is about to: what does the timer want?
    ///
    /// With [`Answer::Due`] and [`Answer::Nothing`] its [`Armed`] is not valid any more; with
    /// [`Answer::Later`] the note is written again.
    fn ask(&self, note: NoteOf, now: u64) -> Answer;

    /// It was due, in this generation, and those with earlier deadlines have fired.
    fn expired(&self, generation: u32);
}

/// What a timer wants.
pub(crate) enum Answer {
    /// To fire: the time has come that it was armed for, in this generation.
    Due { deadline: u64, generation: u32 },
    /// To be asked again.
    Later(u64),
    /// Nothing. The note is not that of its last arming, or it was taken back.
    Nothing,
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

/// Invariant: a place that is taken has one valid note in `by_latest`, and if the timer was armed
/// with leeway, one in `by_deadline`, but for notes whose timer is being asked.
#[derive(Default)]
struct Waiting {
    places: Vec<Place>,
    free: Vec<u32>,
    by_latest: Notes,
    /// For those that may fire before they must.
    by_deadline: Notes,
    /// What the kernel's timer is set to, or would be.
    set_to: Option<u64>,
}

struct Place {
    /// `None` while the place is free.
    timer: Option<Weak<dyn Expire>>,
    /// Goes up whenever the notes for the place become invalid, which have the number before.
    stamp: NonZeroU32,
}

/// Ask the timer of a place at a time. Ordered by the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Note {
    time: u64,
    place: u32,
    stamp: NonZeroU32,
}

/// Notes, the earliest first. Most are replaced before anybody asks for them, so they are put in
/// order only then: among a hundred thousand each step up a heap is a line of memory.
#[derive(Default)]
struct Notes {
    in_order: BinaryHeap<Reverse<Note>>,
    written: Vec<Note>,
}

impl Notes {
    fn write(&mut self, note: Note) {
        self.written.push(note);
    }

    fn earliest(&mut self) -> Option<Note> {
        self.in_order.extend(self.written.drain(..).map(Reverse));
        self.in_order.peek().map(|Reverse(note)| *note)
    }

    /// Takes out the one that [`earliest`](Self::earliest) has just given.
    fn take_earliest(&mut self) {
        self.in_order.pop();
    }

    fn len(&self) -> usize {
        self.in_order.len() + self.written.len()
    }

    fn retain(&mut self, is_kept: impl Fn(&Note) -> bool) {
        self.in_order.retain(|Reverse(note)| is_kept(note));
        self.written.retain(is_kept);
    }
}

/// Which note it is that a timer is asked about.
#[derive(Clone, Copy)]
pub(crate) struct NoteOf {
    list: List,
    spot: Spot,
    stamp: NonZeroU32,
}

/// A place in one of the tables: four times the place, plus the table. The tables count their
/// places and stamps each for itself, so a place alone names no timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spot(u32);

#[derive(Clone, Copy, PartialEq, Eq)]
enum List {
    ByLatest,
    ByDeadline,
}

/// Where an armed timer stands, and what its notes say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Armed {
    spot: Spot,
    stamp: NonZeroU32,
    /// In `by_latest`.
    latest: u64,
    /// In `by_deadline`; `u64::MAX` without leeway.
    deadline: u64,
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

    /// Has a timer asked for a deadline.
    pub(crate) fn arm(&self, deadline: Deadline, timer: Weak<dyn Expire>) -> Armed {
        let table = &self.tables[table_of(deadline.clock)];
        let mut waiting = table.waiting.lock().expect(NO_PANIC);
        let place = waiting.take_place(timer);
        let armed = waiting.write_notes(place, deadline);
        self.set_timer(table, &mut waiting, armed.latest);
        armed
    }

    /// Has a timer that is armed asked for another deadline. `None`, and not armed any more, when
    /// that is on another clock.
    pub(crate) fn rearm(&self, armed: Armed, deadline: Deadline) -> Option<Armed> {
        if armed.spot.table() != table_of(deadline.clock) {
            self.disarm(armed);
            return None;
        }
        let table = &self.tables[armed.spot.table()];
        let mut waiting = table.waiting.lock().expect(NO_PANIC);
        let armed = waiting.write_notes(armed.spot.place(), deadline);
        waiting.sort_out();
        self.set_timer(table, &mut waiting, armed.latest);
        Some(armed)
    }

    /// Forgets a timer. The kernel's timer stays set: one wake-up for nothing is cheaper than
    /// setting it anew.
    pub(crate) fn disarm(&self, armed: Armed) {
        let mut waiting = self.tables[armed.spot.table()].waiting.lock().expect(NO_PANIC);
        waiting.leave_place(armed.spot.place(), armed.stamp);
        waiting.sort_out();
    }

    /// The timer with this token expired.
    pub(crate) fn expire(&self, token: u64) {
        self.expire_table(&self.tables[(token - FIRST_TOKEN) as usize]);
    }

    /// Does what the kernel's timers would do on virtual time; nothing on real time.
    pub(crate) fn expire_virtual(&self) {
        if self.clocks.are_real() {
            return;
        }
        for table in &self.tables {
            let set_to = table.waiting.lock().expect(NO_PANIC).set_to;
            if set_to.is_some_and(|set_to| set_to <= self.now(table.clock)) {
                self.expire_table(table);
            }
        }
    }

    fn expire_table(&self, table: &Table) {
        let now = self.now(table.clock);
        let mut due = Vec::new();
        // The earliest note, once its timer has said that it is right.
        let mut right = None;
        let mut waiting = table.waiting.lock().expect(NO_PANIC);
        // Who arms a timer meanwhile sets the kernel's.
        waiting.set_to = None;
        while let Some((note, list)) = waiting.take_note(now, right) {
            let timer = waiting.places[note.place as usize].timer.clone();
            drop(waiting);
            let timer = timer.and_then(|timer| timer.upgrade());
            let spot = Spot::new(table.clock, note.place);
            let of = NoteOf { list, spot, stamp: note.stamp };
            let answer = timer.as_ref().map_or(Answer::Nothing, |timer| timer.ask(of, now));
            if let (Answer::Due { deadline, generation }, Some(timer)) = (&answer, timer) {
                due.push((*deadline, *generation, timer));
            }
            waiting = table.waiting.lock().expect(NO_PANIC);
            if let Answer::Later(time) = answer {
                let again = Note { time, ..note };
                waiting.put_back(again, list);
                if list == List::ByLatest && again == note {
                    right = Some(note);
                }
            } else {
                waiting.leave_place(note.place, note.stamp);
            }
        }
        if let Some(next) = waiting.by_latest.earliest() {
            self.set_timer(table, &mut waiting, next.time);
        }
        drop(waiting);
        // In the order of their deadlines, and without the lock: a timer may arm itself anew.
        due.sort_by_key(|(deadline, ..)| *deadline);
        for (_, generation, timer) in due {
            timer.expired(generation);
        }
    }

    /// Sees that the kernel's timer expires at `latest` or before.
    fn set_timer(&self, table: &Table, waiting: &mut Waiting, latest: u64) {
        if waiting.set_to.is_none_or(|set_to| latest < set_to) {
            waiting.set_to = Some(latest);
            if self.clocks.are_real() {
                table.timer.arm(latest).expect("a timerfd takes any deadline");
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

    /// What a timer that is armed for this deadline wants, in a generation. Takes down what its
    /// note says if that is written again.
    pub(crate) fn answer(
        &self,
        armed: &mut Armed,
        note: NoteOf,
        generation: u32,
        now: u64,
    ) -> Answer {
        if self.at <= now {
            return Answer::Due { deadline: self.at, generation };
        }
        let (noted, wanted) = match note.list {
            List::ByLatest => (&mut armed.latest, self.latest()),
            List::ByDeadline => (&mut armed.deadline, self.at),
        };
        *noted = wanted;
        Answer::Later(wanted)
    }
}

impl Spot {
    fn new(clock: Clock, place: u32) -> Self {
        Self(4 * place + table_of(clock) as u32)
    }

    fn table(self) -> usize {
        (self.0 % 4) as usize
    }

    fn place(self) -> u32 {
        self.0 / 4
    }
}

impl Armed {
    /// Whether this is one of the notes of the last arming.
    pub(crate) fn has(&self, note: NoteOf) -> bool {
        (self.spot, self.stamp) == (note.spot, note.stamp)
    }

    /// Whether the notes there are will do for a deadline.
    pub(crate) fn is_asked_in_time_for(&self, deadline: Deadline) -> bool {
        self.spot.table() == table_of(deadline.clock)
            && self.latest <= deadline.latest()
            && (deadline.leeway == 0 || self.deadline <= deadline.at)
    }
}

/// The stamp after another one.
fn after(stamp: NonZeroU32) -> NonZeroU32 {
    stamp.checked_add(1).unwrap_or(NonZeroU32::MIN)
}

impl Table {
    fn new(clock: Clock) -> io::Result<Self> {
        Ok(Self { clock, timer: Timer::new(clock)?, waiting: Mutex::default() })
    }
}

impl Waiting {
    fn take_place(&mut self, timer: Weak<dyn Expire>) -> u32 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { timer: None, stamp: NonZeroU32::MIN });
            (self.places.len() - 1) as u32
        });
        self.places[place as usize].timer = Some(timer);
        place
    }

    /// Writes notes for a deadline; those there were become invalid.
    fn write_notes(&mut self, place: u32, deadline: Deadline) -> Armed {
        let stamp = after(self.places[place as usize].stamp);
        self.places[place as usize].stamp = stamp;
        let latest = deadline.latest();
        self.by_latest.write(Note { time: latest, place, stamp });
        if latest > deadline.at {
            self.by_deadline.write(Note { time: deadline.at, place, stamp });
        }
        let spot = Spot::new(deadline.clock, place);
        let noted = if latest > deadline.at { deadline.at } else { u64::MAX };
        Armed { spot, stamp, latest, deadline: noted }
    }

    /// Gives a place up, unless its notes are others by now.
    fn leave_place(&mut self, place: u32, stamp: NonZeroU32) {
        let left = &mut self.places[place as usize];
        if left.stamp == stamp {
            left.stamp = after(stamp);
            left.timer = None;
            self.free.push(place);
        }
    }

    /// Takes out a note whose timer is to be asked: one whose time has come, or else the earliest
    /// one of all unless it is `right`.
    fn take_note(&mut self, now: u64, right: Option<Note>) -> Option<(Note, List)> {
        let next = self.earliest(List::ByLatest);
        if next.is_some_and(|note| note.time <= now) {
            self.by_latest.take_earliest();
            return next.zip(Some(List::ByLatest));
        }
        let due = self.earliest(List::ByDeadline).filter(|note| note.time <= now);
        if due.is_some() {
            self.by_deadline.take_earliest();
            return due.zip(Some(List::ByDeadline));
        }
        if next.is_some() && next != right {
            self.by_latest.take_earliest();
            return next.zip(Some(List::ByLatest));
        }
        None
    }

    /// The earliest note of a list that is valid; drops those before it.
    fn earliest(&mut self, list: List) -> Option<Note> {
        let (notes, places) = self.list(list);
        loop {
            let note = notes.earliest()?;
            if places[note.place as usize].stamp == note.stamp {
                return Some(note);
            }
            notes.take_earliest();
        }
    }

    /// Puts a note into a list again, unless it has become invalid.
    fn put_back(&mut self, note: Note, list: List) {
        let (notes, places) = self.list(list);
        if places[note.place as usize].stamp == note.stamp {
            notes.write(note);
        }
    }

    fn list(&mut self, list: List) -> (&mut Notes, &[Place]) {
        let notes = match list {
            List::ByLatest => &mut self.by_latest,
            List::ByDeadline => &mut self.by_deadline,
        };
        (notes, &self.places)
    }

    /// Drops invalid notes once they are most of what there is.
    fn sort_out(&mut self) {
        let taken = self.places.len() - self.free.len();
        for list in [List::ByLatest, List::ByDeadline] {
            let (notes, places) = self.list(list);
            if notes.len() > FEW_NOTES && notes.len() > 4 * taken {
                notes.retain(|note| places[note.place as usize].stamp == note.stamp);
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

    /// A timer that keeps the generations in which it fired.
    struct Shot {
        wanted: Mutex<Option<(Deadline, u32, Armed)>>,
        fired: Arc<Mutex<Vec<u32>>>,
    }

    impl Shot {
        fn arm(
            deadlines: &Deadlines,
            deadline: Deadline,
            number: u32,
            fired: &Arc<Mutex<Vec<u32>>>,
        ) -> Arc<Self> {
            let shot = Arc::new(Self { wanted: Mutex::new(None), fired: fired.clone() });
            let timer: Weak<dyn Expire> = Arc::downgrade(&shot) as Weak<dyn Expire>;
            let armed = deadlines.arm(deadline, timer);
            *shot.wanted.lock().unwrap() = Some((deadline, number, armed));
            shot
        }

        fn rearm(&self, deadlines: &Deadlines, deadline: Deadline, number: u32) {
            let mut wanted = self.wanted.lock().unwrap();
            let (_, _, mut armed) = wanted.unwrap();
            if !armed.is_asked_in_time_for(deadline) {
                armed = deadlines.rearm(armed, deadline).unwrap();
            }
            *wanted = Some((deadline, number, armed));
        }

        fn disarm(&self, deadlines: &Deadlines) {
            let (_, _, armed) = self.wanted.lock().unwrap().take().unwrap();
            deadlines.disarm(armed);
        }
    }

    impl Expire for Shot {
        fn ask(&self, note: NoteOf, now: u64) -> Answer {
            let mut wanted = self.wanted.lock().unwrap();
            let Some((deadline, number, armed)) = &mut *wanted else { return Answer::Nothing };
            assert!(armed.has(note), "invalid notes are not asked for");
            let answer = deadline.answer(armed, note, *number, now);
            if !matches!(answer, Answer::Later(_)) {
                *wanted = None;
            }
            answer
        }

        fn expired(&self, generation: u32) {
            self.fired.lock().unwrap().push(generation);
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
        let fired = Arc::default();
        // What a plain list would know.
        let mut expected: BTreeMap<u32, (Arc<Shot>, Deadline)> = BTreeMap::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        for generation in 0..20_000_u32 {
            let now = deadlines.now(Clock::Uptime);
            let at = now + random(&mut seed) % 5_000;
            let leeway = [0, 0, random(&mut seed) % 2_000][(random(&mut seed) % 3) as usize];
            let deadline = Deadline { clock: Clock::Uptime, at, leeway };
            let some = expected.keys().nth(random(&mut seed) as usize % 50).copied();
            match (random(&mut seed) % 4, some) {
                (0, Some(old)) => expected.remove(&old).unwrap().0.disarm(deadlines),
                (1, Some(old)) => {
                    let (shot, _) = expected.remove(&old).unwrap();
                    shot.rearm(deadlines, deadline, generation);
                    expected.insert(generation, (shot, deadline));
                }
                _ => {
                    let shot = Shot::arm(deadlines, deadline, generation, &fired);
                    expected.insert(generation, (shot, deadline));
                }
            }
            engine.advance(Duration::from_nanos(random(&mut seed) % 200));
            deadlines.expire_virtual();
            let now = deadlines.now(Clock::Uptime);
            let one_must = expected.values().any(|(_, deadline)| deadline.latest() <= now);
            let due = expected.iter().filter(|(_, (_, deadline))| deadline.at <= now);
            let mut due: Vec<_> =
                due.map(|(number, (_, deadline))| (deadline.at, *number)).collect();
            let seen = std::mem::take(&mut *fired.lock().unwrap());
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
            let fired = Arc::default();
            let start = deadlines.now(clock);
            let arm = |number| {
                // From 0 to 20 ms; the end of the leeway is at 50 ms or later, for each one.
                let at = start + u64::from(number) * 7_919 % 100 * MS / 5;
                let leeway = 50 * MS + u64::from(number) % 3 * MS;
                Shot::arm(&deadlines, Deadline { clock, at, leeway }, number, &fired)
            };
            let _shots: Vec<_> = (0..100).map(arm).collect();
            let mut expirations = 0;
            let mut ready = Ready::new(1);
            while fired.lock().unwrap().len() < 100 {
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
    fn a_timer_that_moves_to_another_clock_while_it_is_asked_is_not_taken_for_due_by_the_first() {
        let deadlines = Deadlines::new(EngineClock::Real).unwrap();
        let on = |clock, at| Deadline { clock, at, leeway: 0 };
        let armed = deadlines.arm(on(Clock::Wall, 1), Weak::<Shot>::new());
        // The engine has taken this note out, to ask the timer whether it is due by the wall clock.
        let note = NoteOf { list: List::ByLatest, spot: armed.spot, stamp: armed.stamp };
        assert!(armed.has(note));
        // Another thread is faster, and its timer stands in the same place of the other table.
        let later = on(Clock::Uptime, deadlines.now(Clock::Uptime) + 3_600_000_000_000);
        assert!(deadlines.rearm(armed, later).is_none());
        let moved = deadlines.arm(later, Weak::<Shot>::new());
        assert_eq!((moved.spot.place(), moved.stamp), (armed.spot.place(), armed.stamp));
        assert!(!moved.has(note));
    }

    #[test]
    fn a_timer_that_is_moved_a_million_times_leaves_no_heap_of_notes() {
        let deadlines = Deadlines::new(EngineClock::Virtual).unwrap();
        let at = |at| Deadline { clock: Clock::Uptime, at, leeway: 0 };
        let shot = Shot::arm(&deadlines, at(u64::MAX / 2), 0, &Arc::default());
        for number in 0..1_000_000 {
            // Each one earlier than the one before: the dear direction.
            shot.rearm(&deadlines, at(u64::MAX / 2 - u64::from(number)), number);
        }
        let waiting = deadlines.tables[0].waiting.lock().unwrap();
        assert!(waiting.by_latest.len() <= 2 * FEW_NOTES, "{}", waiting.by_latest.len());
    }
}
