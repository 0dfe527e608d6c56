//! Looking for a while before sleeping.

use std::time::{Duration, Instant};

/// How long an end looks at the ring before it sleeps: about what a sleep and a wake-up cost.
const SPIN: Duration = Duration::from_micros(10);

/// The pauses between looks. Each look takes the line of memory from the other end, which is busy
/// writing it, so the first comes after about the time in which nothing can have come anyway (a
/// line's way there and back), and the later ones further and further apart.
pub(super) struct Spin {
    until: Option<Instant>,
    pauses: u32,
}

const FIRST_PAUSES: u32 = 3;
const MOST_PAUSES: u32 = 32;

impl Spin {
    /// Not beyond `deadline`.
    pub(super) fn until(deadline: Option<Instant>) -> Self {
        let until = Instant::now() + SPIN;
        Self { until: Some(deadline.map_or(until, |at| at.min(until))), pauses: FIRST_PAUSES }
    }

    /// Waits a moment. Whether another look makes sense.
    pub(super) fn again(&mut self) -> bool {
        if cfg!(loom) || self.until.is_some_and(|at| Instant::now() >= at) {
            return false;
        }
        for _ in 0..self.pauses {
            std::hint::spin_loop();
        }
        self.pauses = (self.pauses + self.pauses / 2).min(MOST_PAUSES);
        true
    }
}
