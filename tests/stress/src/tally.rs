//! How often what happened.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

macro_rules! tally {
    ($($name:ident: $words:literal,)+) => {
        /// The events of a round, or of the whole run.
        #[derive(Debug, Default)]
        pub struct Tally {
            $(pub $name: Count,)+
        }

        impl Tally {
            /// Adds the events of a round.
            pub fn add(&self, round: &Tally) {
                $(self.$name.0.fetch_add(round.$name.get(), Relaxed);)+
            }

            /// What has not happened once.
            pub fn never_happened(&self) -> Vec<&'static str> {
                let counts = [$(($words, self.$name.get()),)+];
                counts.into_iter().filter(|(_, count)| *count == 0).map(|(words, _)| words).collect()
            }
        }

        impl fmt::Display for Tally {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $(writeln!(f, "{:>12} {}", self.$name.get(), $words)?;)+
                Ok(())
            }
        }
    };
}

tally! {
    sent: "blocks sent",
    ran: "blocks run",
    dropped: "blocks dropped unrun",
    concurrent: "concurrent blocks run",
    inline: "sync calls on a held queue",
    aborted: "sync calls told ABORTED",
    panics_meant: "panics in blocks",
    panics_told: "panics told to the queues' owner",
    slept: "sleeps ended by a wakeup",
    timed_out: "sleeps ended by their deadline",
    sleeps_aborted: "sleeps ended by a cancel",
    woken: "sleepers woken",
    refused: "misuses refused",
    queues_cancelled: "queues cancelled",
    cancels_sent: "cancel handlers given",
    cancels_ran: "cancel handlers run",
    cancels_dropped: "cancel handlers dropped with their engine",
    timer_arms: "timers armed",
    timer_calls: "timer handlers called",
    timers_cancelled: "timers cancelled",
    interrupts_raised: "interrupts raised",
    interrupts_counted: "interrupts counted by handlers",
    interrupt_calls: "interrupt handlers called",
    interrupts_cancelled: "interrupt sources cancelled",
    signals_raised: "descriptor events raised",
    signals_counted: "descriptor events counted",
    descriptors_dropped: "descriptor sources dropped",
    completions: "completions of enable, disable and cancel",
    ended_quiet: "rounds that ended quietly",
    ended_cancelled: "rounds that ended by cancelling all",
    ended_dropped: "rounds that ended by dropping the engine",
}

/// A counter.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub fn one(&self) {
        self.many(1);
    }

    pub fn many(&self, count: u64) {
        self.0.fetch_add(count, SeqCst);
        crate::watchdog::alive();
    }

    pub fn get(&self) -> u64 {
        self.0.load(SeqCst)
    }
}
