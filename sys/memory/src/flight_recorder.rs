//! What the queues of a process did last, in memory that outlives the process.
//!
//! The daemon makes the memory and gives it to a driver host at its start ([`Recorder::create`]).
//! There each dispatch queue has a *lane* ([`Lane`]): words that say whether it is at work and how
//! far it has come, and a ring of the last [`EVENTS`] things that it did. The thread that runs the
//! queue writes them by plain stores, which cost a few nanoseconds. The daemon reads: now and then
//! while there is work, to see a queue that hangs ([`Recorder::look`]), and once when the process has
//! died, whatever it died of ([`Recorder::remains`]).
//!
//! # When the daemon looks
//!
//! A process that does nothing is not looked at, and nobody wakes up. A lane that begins to work
//! finds the word `WATCHED` clear, sets it, and rings a bell of the daemon's; that is one system call
//! for all that follows until the daemon, having seen no work for a while, clears the word
//! ([`Recorder::rest`]). The lane's two accesses (at work; is it watched?) have no fence between them,
//! since that would cost more than all the rest: so the word may be cleared just as a lane begins,
//! and neither see the other. The daemon therefore looks once more, a period after it cleared the
//! word, and by then every store has arrived.
//!
//! # Trust
//!
//! The process that writes runs a driver, which can write anything anywhere in it, here too. So
//! whoever reads takes every word once, uses it as a number or as text of ours, and never as an index
//! beyond a mask, nor as a length beyond a bound. The worst that a scribbler gets is a report that
//! says nonsense, or to be taken for hung.
//!
//! # Layout
//!
//! Words of eight bytes, in the machine's order. All that is not written is zero.
//!
//! | From byte | What |
//! | --- | --- |
//! | 0 | [`MAGIC`] |
//! | 8 | `WATCHED`: 1 while the daemon looks by itself |
//! | 16 | calls that found no slot |
//! | 24 | first panic: 0 none, 1 being written, 2 written |
//! | 32 | bytes of its text |
//! | 40 | its text, up to [`PANIC_BYTES`] |
//! | 4088 | lanes from the first one that have been in use ever; the others are not touched |
//! | 4096 | [`CALLS`] slots of 4 words: stage (0 free), session, selector, ticks |
//! | 12288 | [`LANES`] lanes of [`LANE_BYTES`] each |
//!
//! A lane: in use; at work; concurrent blocks at work; pieces of work done; progress reported;
//! events ever; the event it is in the middle of, plus one (0: work that is no event); a spare word;
//! its name in 64 bytes; [`EVENTS`] events of 4 words: ticks, kind, and two numbers.

#![expect(unsafe_code)]
// UNSAFETY: the words belong to two processes, so they are made from raw pointers into a mapping.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex};

use iohost_event::{Signal, ticks};

use crate::{AttachError, SharedMemory};

/// The first word; another layout has another one.
pub const MAGIC: u64 = u64::from_ne_bytes(*b"iohFR\0\0\x01");
/// Queues that are recorded at the same time. Others run unrecorded, and unwatched.
pub const LANES: usize = 128;
/// Events that each lane keeps.
pub const EVENTS: usize = 64;
/// Calls that are remembered while they wait for their answer.
pub const CALLS: usize = 256;
/// The longest text of a panic.
pub const PANIC_BYTES: usize = 2048;
/// Bytes of a lane.
pub const LANE_BYTES: usize = EVENTS_AT + EVENTS * EVENT_BYTES;

const WATCHED: usize = 8;
const CALLS_LEFT_OUT: usize = 16;
const PANIC: usize = 24;
const PANIC_LEN: usize = 32;
const PANIC_TEXT: usize = 40;
const LANES_EVER: usize = CALLS_AT - 8;
const CALLS_AT: usize = 4096;
const CALL_BYTES: usize = 32;
const LANES_AT: usize = CALLS_AT + CALLS * CALL_BYTES;

const IN_USE: usize = 0;
const AT_WORK: usize = 8;
const BESIDE: usize = 16;
const DONE: usize = 24;
const PROGRESS: usize = 32;
const EVENTS_EVER: usize = 40;
const IN_THE_MIDDLE_OF: usize = 48;
const NAME: usize = 64;
const NAME_BYTES: usize = 64;
const EVENTS_AT: usize = NAME + NAME_BYTES;
const EVENT_BYTES: usize = 32;

/// Bytes of the whole.
pub const RECORDER_BYTES: usize = LANES_AT + LANES * LANE_BYTES;

const _: () = assert!(PANIC_TEXT + PANIC_BYTES <= LANES_EVER && EVENTS.is_power_of_two());
const _: () = assert!(LANES_AT.is_multiple_of(64) && LANE_BYTES.is_multiple_of(64));

/// What an event is; with what its two numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Kind {
    /// The queue began to run what stood on it: how many times in a row, nothing.
    Turn = 1,
    /// An interrupt's handler: interrupts since the last one, nothing.
    Interrupt = 2,
    /// A timer's handler: when it was called, nothing.
    Timer = 3,
    /// The handler of a data queue or of another descriptor: nothing, nothing.
    Bell = 4,
    /// A call of a client: session, selector.
    Call = 5,
    /// An answer to one: session, selector.
    Answer = 6,
    /// A session was opened: its number, nothing.
    SessionOpened = 7,
    /// A session was closed: its number, nothing.
    SessionClosed = 8,
    /// An event of the device: 1 an error, 2 it is wanted back, 3 it is gone; nothing.
    Device = 9,
    /// The driver's start, nothing, nothing.
    Start = 10,
    /// The driver's stop, nothing, nothing.
    Stop = 11,
}

impl Kind {
    /// The kind that a number in the memory stands for.
    pub fn of(number: u64) -> Option<Self> {
        use Kind::*;
        let all = [
            Turn,
            Interrupt,
            Timer,
            Bell,
            Call,
            Answer,
            SessionOpened,
            SessionClosed,
            Device,
            Start,
            Stop,
        ];
        all.into_iter().find(|kind| *kind as u64 == number)
    }
}

/// How far a call has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum CallStage {
    /// It waits for its turn.
    Queued = 1,
    /// The driver is in it.
    Running = 2,
    /// The driver returned from it and owes the answer.
    Taken = 3,
}

/// The memory of one process's recorder, in the daemon or in that process.
pub struct Recorder {
    /// The start of `memory`. Invariant: `RECORDER_BYTES` from here are mapped for writing, page
    /// aligned, as long as `memory` lives.
    base: NonNull<u8>,
    memory: SharedMemory,
    bell: Signal,
    free_lanes: Mutex<Vec<u16>>,
    free_calls: Mutex<Vec<u16>>,
}

// SAFETY: `base` points into the mapping that `memory` owns; both may be used from any thread.
unsafe impl Send for Recorder {}
// SAFETY: everything that `&Recorder` offers is an atomic, a lock, or a copy that `SharedMemory`
// allows from any thread.
unsafe impl Sync for Recorder {}

/// Why the lists are never poisoned.
const NO_PANIC: &str = "nothing under this lock can fail";

impl Recorder {
    /// Makes the memory of a recorder, and a bell.
    pub fn create() -> io::Result<Self> {
        let memory = SharedMemory::create(c"iohost-flight-recorder", RECORDER_BYTES)?;
        let recorder = Self::over(memory, Signal::new()?);
        recorder.word(0).store(MAGIC, Relaxed);
        Ok(recorder)
    }

    /// A recorder whose memory and bell somebody else made.
    ///
    /// Errors: what [`SharedMemory::attach`] says; `Map` for a bell that is no eventfd, or memory
    /// that is no recorder's.
    pub fn attach(memory: OwnedFd, bell: OwnedFd) -> Result<Self, AttachError> {
        let memory = SharedMemory::attach(memory, RECORDER_BYTES)?;
        let recorder = Self::over(memory, Signal::try_from(bell)?);
        if recorder.word(0).load(Relaxed) != MAGIC {
            let other = "this is the memory of no recorder, or of another version's";
            return Err(io::Error::new(io::ErrorKind::InvalidData, other).into());
        }
        Ok(recorder)
    }

    fn over(memory: SharedMemory, bell: Signal) -> Self {
        assert_eq!(memory.len(), RECORDER_BYTES);
        let base = NonNull::new(memory.address()).expect("a mapping is never at address 0");
        // From behind, so that the first is taken first.
        let numbers = |count: usize| Mutex::new((0..count as u16).rev().collect());
        Self { base, memory, bell, free_lanes: numbers(LANES), free_calls: numbers(CALLS) }
    }

    /// The memory's descriptor, to be given away.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The bell: readable when a lane began to work while nobody looked. It need not be read by
    /// who watches it edge-triggered.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// A word of the memory. Panics when it is not inside.
    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset <= RECORDER_BYTES - 8);
        // SAFETY: the assertion keeps it inside of the mapping.
        let word = unsafe { self.base.add(offset) }.cast::<u64>();
        // SAFETY:
        // 1. Aligned: the mapping starts on a page, and the offset is a multiple of eight.
        // 2. Valid for reads and writes as long as `self` lives, which holds `memory`.
        // 3. Nobody on this side accesses it but by atomics.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    /// As [`word`](Self::word), for an offset that is known to be right.
    ///
    /// # Safety
    ///
    /// `offset` is a multiple of eight, and eight bytes from it are inside the memory.
    #[inline]
    unsafe fn word_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the caller's promise.
        let word = unsafe { self.base.add(offset) }.cast::<u64>();
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    // ---- The process that is recorded ----

    /// A lane for a queue, or `None` when all are taken. `name` is cut to 64 bytes.
    pub fn lane(self: &Arc<Self>, name: &str) -> Option<Lane> {
        let number = self.free_lanes.lock().expect(NO_PANIC).pop()?;
        let start = LANES_AT + usize::from(number) * LANE_BYTES;
        for offset in (0..EVENTS_AT).step_by(8) {
            self.word(start + offset).store(0, Relaxed);
        }
        let name = &name.as_bytes()[..name.len().min(NAME_BYTES)];
        self.memory.write_at(start + NAME, name);
        self.word(start + IN_USE).store(1, Relaxed);
        self.word(LANES_EVER).fetch_max(u64::from(number) + 1, Relaxed);
        // SAFETY: a lane lies inside of the memory.
        let words = unsafe { self.base.add(start) };
        Some(Lane { recorder: self.clone(), number, words })
    }

    /// Remembers a call until the slot is dropped; `None` when there is no room, which is counted.
    pub fn call(self: &Arc<Self>, session: u64, selector: u64) -> Option<CallSlot> {
        let Some(number) = self.free_calls.lock().expect(NO_PANIC).pop() else {
            self.word(CALLS_LEFT_OUT).fetch_add(1, Relaxed);
            return None;
        };
        let slot = CallSlot { recorder: self.clone(), number };
        slot.word(8).store(session, Relaxed);
        slot.word(16).store(selector, Relaxed);
        slot.word(24).store(ticks(), Relaxed);
        slot.set(CallStage::Queued);
        Some(slot)
    }

    /// Keeps the words of the first panic.
    pub fn panicked(&self, text: &str) {
        let state = self.word(PANIC);
        if state.compare_exchange(0, 1, SeqCst, Relaxed).is_ok() {
            let text = &text.as_bytes()[..text.len().min(PANIC_BYTES)];
            self.memory.write_at(PANIC_TEXT, text);
            self.word(PANIC_LEN).store(text.len() as u64, Relaxed);
            state.store(2, SeqCst);
        }
    }

    #[cold]
    fn ring(&self) {
        if self.word(WATCHED).swap(1, SeqCst) == 0 {
            self.bell.raise();
        }
    }

    // ---- The daemon ----

    /// How far each lane has come, in the order of their numbers, up to the last one that was ever in
    /// use; `None` for one that nobody uses.
    pub fn look(&self) -> Vec<Option<Pulse>> {
        let pulse = |number: usize| {
            let at = |offset| self.word(LANES_AT + number * LANE_BYTES + offset).load(Relaxed);
            (at(IN_USE) != 0).then(|| Pulse {
                is_at_work: at(AT_WORK) != 0 || at(BESIDE) != 0,
                done: at(DONE),
                progress: at(PROGRESS),
            })
        };
        // To read a page of the memory is to have it: the others would be there for nothing.
        let lanes = self.word(LANES_EVER).load(Relaxed).min(LANES as u64);
        (0..lanes as usize).map(pulse).collect()
    }

    /// Looks by itself from now on: nobody rings.
    pub fn watch(&self) {
        self.word(WATCHED).store(1, SeqCst);
    }

    /// Looks no more by itself: the next lane that begins to work rings. Look once more a while
    /// later: see the head of this file.
    pub fn rest(&self) {
        self.word(WATCHED).store(0, SeqCst);
    }

    /// The name of a lane, whatever stands there.
    pub fn name(&self, lane: usize) -> String {
        let mut name = [0; NAME_BYTES];
        self.memory.read_at(LANES_AT + (lane % LANES) * LANE_BYTES + NAME, &mut name);
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        printable(&name[..len])
    }

    /// What a lane is in the middle of, if that is an event.
    pub fn doing(&self, lane: usize) -> Option<Event> {
        let start = LANES_AT + (lane % LANES) * LANE_BYTES;
        match self.word(start + IN_THE_MIDDLE_OF).load(Relaxed) {
            0 => None,
            number => Some(self.event(start, number.wrapping_sub(1))),
        }
    }

    fn event(&self, start: usize, number: u64) -> Event {
        let at = start + EVENTS_AT + (number as usize & (EVENTS - 1)) * EVENT_BYTES;
        let word = |offset| self.word(at + offset).load(Relaxed);
        Event { ticks: word(0), kind: word(8), first: word(16), second: word(24) }
    }

    /// Everything that is there, of at most `events` events of each lane.
    pub fn remains(&self, events: usize) -> Remains {
        let panic = (self.word(PANIC).load(SeqCst) == 2).then(|| {
            let len = (self.word(PANIC_LEN).load(Relaxed) as usize).min(PANIC_BYTES);
            let mut text = vec![0; len];
            self.memory.read_at(PANIC_TEXT, &mut text);
            printable(&text)
        });
        let call = |number: usize| {
            let word = |offset| self.word(CALLS_AT + number * CALL_BYTES + offset).load(Relaxed);
            let stage = match word(0) {
                0 => return None,
                1 => CallStage::Queued,
                3 => CallStage::Taken,
                _ => CallStage::Running,
            };
            Some(OpenCall { stage, session: word(8), selector: word(16), ticks: word(24) })
        };
        let lane = |(number, pulse): (usize, Option<Pulse>)| {
            let pulse = pulse?;
            let start = LANES_AT + number * LANE_BYTES;
            let ever = self.word(start + EVENTS_EVER).load(Relaxed);
            let kept = ever.min(EVENTS.min(events) as u64);
            let events = (0..kept).map(|back| self.event(start, ever - kept + back));
            Some(LaneRemains {
                name: self.name(number),
                pulse,
                doing: self.doing(number),
                events: events.collect(),
            })
        };
        Remains {
            panic,
            calls: (0..CALLS).filter_map(call).collect(),
            calls_left_out: self.word(CALLS_LEFT_OUT).load(Relaxed),
            lanes: self.look().into_iter().enumerate().filter_map(lane).collect(),
        }
    }
}

/// Text that a person can be shown, whatever bytes these are.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

/// Where one queue's doings are recorded. What says so is for one thread at a time, the one that
/// runs the queue; were it several, the record would be wrong, and nothing else.
pub struct Lane {
    recorder: Arc<Recorder>,
    number: u16,
    /// Invariant: the start of a lane in the memory of `recorder`, at a multiple of eight. Kept here, as
    /// to go there by way of the recorder costs as much as the rest of it all.
    words: NonNull<u8>,
}

// SAFETY: `words` points into the mapping that `recorder` keeps; both may be used from any thread.
unsafe impl Send for Lane {}
// SAFETY: everything that `&Lane` offers is made of atomics.
unsafe impl Sync for Lane {}

impl Lane {
    /// A word of the lane.
    #[inline]
    fn word<const OFFSET: usize>(&self) -> &AtomicU64 {
        const { assert!(OFFSET.is_multiple_of(8) && OFFSET < EVENTS_AT) };
        // SAFETY: by the assertion and the invariant, eight aligned bytes inside the memory.
        unsafe { self.word_at(OFFSET) }
    }

    /// # Safety
    ///
    /// `offset` is a multiple of eight, and eight bytes from it are inside the lane.
    #[inline]
    unsafe fn word_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the caller's promise.
        let word = unsafe { self.words.add(offset) }.cast::<u64>();
        // SAFETY: as in `Recorder::word`, of which this is one; `recorder` keeps the memory.
        unsafe { AtomicU64::from_ptr(word.as_ptr()) }
    }

    /// The queue works from now on. One thread at a time.
    #[inline]
    pub fn begin(&self) {
        self.word::<AT_WORK>().store(1, Relaxed);
        // SAFETY: a multiple of eight in the first page.
        let watched = unsafe { self.recorder.word_at(WATCHED) };
        if watched.load(Relaxed) == 0 {
            self.recorder.ring();
        }
    }

    /// The queue works no more, or gives itself up for a while. One thread at a time.
    #[inline]
    pub fn end(&self) {
        self.done();
        self.word::<AT_WORK>().store(0, Relaxed);
    }

    /// A piece of work has ended. One thread at a time.
    #[inline]
    pub fn done(&self) {
        let done = self.word::<DONE>();
        done.store(done.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// A block that may run beside others begins.
    pub fn begin_beside(&self) {
        self.word::<BESIDE>().fetch_add(1, Relaxed);
        if self.recorder.word(WATCHED).load(Relaxed) == 0 {
            self.recorder.ring();
        }
    }

    /// A block that may run beside others has ended.
    pub fn end_beside(&self) {
        self.word::<DONE>().fetch_add(1, Relaxed);
        self.word::<BESIDE>().fetch_sub(1, Relaxed);
    }

    /// The work in progress is getting on. Any thread.
    pub fn progress(&self) {
        self.word::<PROGRESS>().fetch_add(1, Relaxed);
    }

    /// The queue begins to run what stands on it, at a time in ticks. Several in a row are one event
    /// with a count. One thread at a time.
    #[inline]
    pub fn turn(&self, now: u64) {
        let ever = self.word::<EVENTS_EVER>().load(Relaxed);
        let last = self.event(ever.wrapping_sub(1));
        if last[1].load(Relaxed) == Kind::Turn as u64 {
            last[2].store(last[2].load(Relaxed).wrapping_add(1), Relaxed);
            last[0].store(now, Relaxed);
        } else {
            self.write(ever, now, Kind::Turn, 1, 0);
        }
    }

    /// Something happened. One thread at a time.
    #[inline]
    pub fn note(&self, kind: Kind, first: u64, second: u64) {
        let ever = self.word::<EVENTS_EVER>().load(Relaxed);
        self.write(ever, ticks(), kind, first, second);
    }

    /// As [`note`](Self::note), and that is what the queue does until what is returned is dropped.
    #[inline]
    pub fn during(&self, kind: Kind, first: u64, second: u64) -> During<'_> {
        let ever = self.word::<EVENTS_EVER>().load(Relaxed);
        self.write(ever, ticks(), kind, first, second);
        let outer = self.word::<IN_THE_MIDDLE_OF>().load(Relaxed);
        self.word::<IN_THE_MIDDLE_OF>().store(ever.wrapping_add(1), Relaxed);
        During { lane: self, outer }
    }

    #[inline]
    fn write(&self, number: u64, ticks: u64, kind: Kind, first: u64, second: u64) {
        let words = self.event(number);
        for (word, value) in words.into_iter().zip([ticks, kind as u64, first, second]) {
            word.store(value, Relaxed);
        }
        self.word::<EVENTS_EVER>().store(number.wrapping_add(1), Relaxed);
    }

    /// The words of an event, by its number, whatever that is.
    #[inline]
    fn event(&self, number: u64) -> [&AtomicU64; 4] {
        let at = EVENTS_AT + (number as usize & (EVENTS - 1)) * EVENT_BYTES;
        [0, 8, 16, 24].map(|offset| {
            // SAFETY: the mask keeps the event inside of the lane, and everything is a multiple of
            // eight.
            unsafe { self.word_at(at + offset) }
        })
    }

    /// The recorder it belongs to.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.word::<IN_USE>().store(0, Relaxed);
        self.recorder.free_lanes.lock().expect(NO_PANIC).push(self.number);
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lane").field(&self.number).finish()
    }
}

/// A queue is in the middle of an event, until this is dropped.
#[derive(Debug)]
pub struct During<'a> {
    lane: &'a Lane,
    outer: u64,
}

impl Drop for During<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lane.word::<IN_THE_MIDDLE_OF>().store(self.outer, Relaxed);
    }
}

/// A call that has no answer; remembered until it is dropped.
pub struct CallSlot {
    recorder: Arc<Recorder>,
    number: u16,
}

impl CallSlot {
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.recorder.word(CALLS_AT + usize::from(self.number) * CALL_BYTES + offset)
    }

    fn set(&self, stage: CallStage) {
        self.word(0).store(stage as u64, Relaxed);
    }

    /// The driver is in it.
    pub fn running(&self) {
        self.set(CallStage::Running);
    }

    /// The driver has returned from it. One that was answered meanwhile stays so.
    pub fn taken(&self) {
        let (from, to) = (CallStage::Running as u64, CallStage::Taken as u64);
        let _ = self.word(0).compare_exchange(from, to, Relaxed, Relaxed);
    }

    /// It has its answer.
    pub fn answered(&self) {
        self.word(0).store(0, Relaxed);
    }
}

impl Drop for CallSlot {
    fn drop(&mut self) {
        self.word(0).store(0, Relaxed);
        self.recorder.free_calls.lock().expect(NO_PANIC).push(self.number);
    }
}

impl fmt::Debug for CallSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CallSlot").field(&self.number).finish()
    }
}

/// How far a lane has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse {
    /// Whether it works now.
    pub is_at_work: bool,
    /// Pieces of work that it has done.
    pub done: u64,
    /// How often it has reported progress.
    pub progress: u64,
}

/// What is left of a recorder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remains {
    /// The words of the first panic.
    pub panic: Option<String>,
    /// Calls without an answer.
    pub calls: Vec<OpenCall>,
    /// Calls that there was no room for, ever.
    pub calls_left_out: u64,
    /// The lanes in use.
    pub lanes: Vec<LaneRemains>,
}

/// A call without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenCall {
    /// How far it had come.
    pub stage: CallStage,
    /// Its session.
    pub session: u64,
    /// Its method's number.
    pub selector: u64,
    /// When it came, in ticks.
    pub ticks: u64,
}

/// What is left of a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneRemains {
    /// Its queue's name.
    pub name: String,
    /// How far it had come.
    pub pulse: Pulse,
    /// What it was in the middle of, if that is an event.
    pub doing: Option<Event>,
    /// The last events, oldest first.
    pub events: Vec<Event>,
}

/// An event, as it stands in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, in ticks.
    pub ticks: u64,
    /// A [`Kind`], or anything.
    pub kind: u64,
    /// The first number that belongs to it.
    pub first: u64,
    /// The second one.
    pub second: u64,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn both() -> (Recorder, Arc<Recorder>) {
        let daemon = Recorder::create().unwrap();
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let process = Recorder::attach(own(daemon.memory()), own(daemon.bell())).unwrap();
        (daemon, Arc::new(process))
    }

    #[test]
    fn the_daemon_reads_what_the_process_left_when_that_is_gone() {
        let (daemon, process) = both();
        let lane = process.lane("Default").unwrap();
        lane.begin();
        lane.note(Kind::Interrupt, 3, 0);
        let during = lane.during(Kind::Call, 7, 2);
        let running = process.call(7, 2).unwrap();
        running.running();
        drop(process.call(7, 9));
        process.panicked("it broke\u{1b} at lib.rs:3");
        process.panicked("a second one");
        // It dies, and its destructors do not run.
        std::mem::forget((during.lane, running));
        std::mem::forget(during);
        let before = ticks();
        std::mem::forget(lane);
        drop(process);

        let remains = daemon.remains(16);
        assert_eq!(remains.panic.as_deref(), Some("it broke? at lib.rs:3"));
        let [call] = remains.calls[..] else { panic!("{:?}", remains.calls) };
        assert_eq!((call.stage, call.session, call.selector), (CallStage::Running, 7, 2));
        assert!(call.ticks <= before);
        let [lane] = &remains.lanes[..] else { panic!("{:?}", remains.lanes) };
        assert_eq!((lane.name.as_str(), lane.pulse.is_at_work), ("Default", true));
        let kinds: Vec<_> = lane.events.iter().map(|event| Kind::of(event.kind)).collect();
        assert_eq!(kinds, [Some(Kind::Interrupt), Some(Kind::Call)]);
        assert_eq!(lane.doing, Some(lane.events[1]));
        assert_eq!((lane.events[0].first, lane.events[1].second), (3, 2));
    }

    #[test]
    fn the_last_events_are_kept_in_order_and_turns_in_a_row_are_one() {
        let (daemon, process) = both();
        let lane = process.lane("q").unwrap();
        for number in 0..1000 {
            lane.note(Kind::Timer, number, 0);
        }
        (1..=5).for_each(|now| lane.turn(now));
        let events = &daemon.remains(EVENTS).lanes[0].events;
        assert_eq!(events.len(), EVENTS);
        let numbers: Vec<_> = events[..EVENTS - 1].iter().map(|event| event.first).collect();
        assert_eq!(numbers, (1000 - EVENTS as u64 + 1..1000).collect::<Vec<_>>());
        let last = events[EVENTS - 1];
        assert_eq!((last.kind, last.ticks, last.first), (Kind::Turn as u64, 5, 5));
        assert_eq!(daemon.remains(4).lanes[0].events, events[EVENTS - 4..]);
    }

    #[test]
    fn a_bell_is_rung_once_for_all_work_until_the_daemon_rests() {
        let (daemon, process) = both();
        let (one, other) = (process.lane("one").unwrap(), process.lane("other").unwrap());
        let rung = || daemon.bell.take();
        one.begin();
        other.begin();
        one.end();
        one.begin();
        assert_eq!(rung(), 1);
        daemon.rest();
        assert_eq!(rung(), 0);
        one.end();
        assert_eq!(rung(), 0, "an end is no reason to look");
        one.begin_beside();
        assert_eq!(rung(), 1);
        let pulses: Vec<_> = daemon.look().into_iter().flatten().collect();
        assert_eq!((pulses.len(), daemon.look().len()), (2, 2));
        assert!(pulses.iter().all(|pulse| pulse.is_at_work));
        one.end_beside();
        assert!(!daemon.look()[0].unwrap().is_at_work);
        daemon.watch();
        one.begin();
        assert_eq!(rung(), 0, "the daemon looks by itself");
    }

    #[test]
    fn lanes_and_calls_run_out_and_are_used_again() {
        let (daemon, process) = both();
        let mut lanes: Vec<_> =
            (0..LANES).map(|at| process.lane(&at.to_string()).unwrap()).collect();
        assert!(process.lane("one too many").is_none());
        lanes.remove(5);
        assert_eq!(daemon.remains(1).lanes.len(), LANES - 1);
        lanes.push(process.lane("again").unwrap());
        assert_eq!(daemon.name(5), "again");

        let mut calls: Vec<_> = (0..CALLS).map(|at| process.call(at as u64, 0).unwrap()).collect();
        assert!(process.call(0, 0).is_none());
        assert_eq!(daemon.remains(1).calls_left_out, 1);
        calls.pop();
        assert!(process.call(0, 0).is_some());
    }

    #[test]
    fn whatever_stands_in_the_memory_can_be_read_and_written_over() {
        let (daemon, process) = both();
        let lane = process.lane("Default").unwrap();
        for pattern in [0xff, 0x80, 0x7f, 0x01] {
            daemon.memory.write_at(0, &vec![pattern; RECORDER_BYTES]);
            let remains = daemon.remains(EVENTS);
            assert_eq!(remains.lanes.len(), LANES);
            assert_eq!(remains.calls.len(), CALLS);
            assert!(remains.lanes.iter().all(|lane| lane.events.len() <= EVENTS));
            daemon.look();
            // The process goes on as if nothing had happened.
            lane.begin();
            lane.turn(1);
            drop(lane.during(Kind::Bell, 0, 0));
            lane.end();
        }
    }

    #[test]
    fn memory_of_something_else_is_refused() {
        let daemon = Recorder::create().unwrap();
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let other = SharedMemory::create(c"other", RECORDER_BYTES).unwrap();
        let err = Recorder::attach(own(other.as_fd()), own(daemon.bell())).unwrap_err();
        assert!(matches!(err, AttachError::Map(_)), "{err:?}");
        assert!(Recorder::attach(own(daemon.memory()), own(daemon.memory())).is_err());
    }
}
