//! What counts as `DISPATCH_LEVEL`: the routines this module calls.

use std::cell::Cell;

use super::{Error, Result};

/// What the calling thread is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Anything but the two below.
    Passive,
    /// A DPC.
    Dpc,
    /// An I/O timer routine.
    IoTimerRoutine,
}

thread_local! {
    static LEVEL: Cell<Level> = const { Cell::new(Level::Passive) };
}

pub(super) fn level() -> Level {
    LEVEL.get()
}

/// Refuses a call, named as in Windows, that is for passive level.
pub(super) fn passive_only(call: &'static str) -> Result<()> {
    if level() == Level::Passive { Ok(()) } else { Err(Error::RaisedIrql { call }) }
}

/// Runs foreign code at a level. It may panic.
pub(super) fn run_at(level: Level, code: impl FnOnce()) {
    struct Back(Level);
    impl Drop for Back {
        fn drop(&mut self) {
            LEVEL.set(self.0);
        }
    }
    let _back = Back(LEVEL.replace(level));
    code();
}
