//! When a driver host that died is started again.
//!
//! At once the first time, because most deaths are accidents; then after a pause that doubles,
//! because a device or a driver that keeps failing should not keep the machine busy; and not at
//! all after too many deaths in a while, because then a person has to look.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often and how soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Restarts within `window` before the device is left alone.
    pub most: usize,
    /// How long a death counts.
    pub window: Duration,
    /// The pause before the second restart; each further one is twice as long.
    pub pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            most: 5,
            window: Duration::from_secs(30 * 60),
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(30),
        }
    }
}

/// What to do about a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start again after a pause.
    RestartAfter(Duration),
    /// Leave the device alone until somebody asks.
    Quarantine,
}

impl RestartPolicy {
    /// Decides about the death that makes `deaths` within the window, itself included.
    pub fn decide(&self, deaths: usize) -> Decision {
        if deaths > self.most {
            return Decision::Quarantine;
        }
        let pause = match deaths {
            0 | 1 => Duration::ZERO,
            // Any shift that large is over the longest pause anyway.
            _ => self.pause.saturating_mul(1 << (deaths - 2).min(20)),
        };
        Decision::RestartAfter(pause.min(self.longest_pause))
    }
}

/// The deaths of one device's driver hosts.
#[derive(Debug, Default)]
pub(crate) struct Deaths {
    times: VecDeque<Instant>,
}

impl Deaths {
    /// Adds a death and decides about it.
    pub(crate) fn add(&mut self, now: Instant, policy: &RestartPolicy) -> Decision {
        self.times.push_back(now);
        self.times.retain(|time| now.duration_since(*time) < policy.window);
        policy.decide(self.times.len())
    }

    /// Forgets them: a person has looked.
    pub(crate) fn forget(&mut self) {
        self.times.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_then_comes_quarantine() {
        let policy = RestartPolicy { most: 8, ..RestartPolicy::default() };
        let decisions: Vec<_> = (1..=9).map(|deaths| policy.decide(deaths)).collect();
        let mut expected: Vec<_> = [0, 1, 2, 4, 8, 16, 30, 30]
            .map(|seconds| Decision::RestartAfter(Duration::from_secs(seconds)))
            .into();
        expected.push(Decision::Quarantine);
        assert_eq!(decisions, expected);
    }

    #[test]
    fn a_death_counts_for_the_length_of_the_window() {
        let policy = RestartPolicy::default();
        let start = Instant::now();
        let mut deaths = Deaths::default();
        for _ in 0..5 {
            deaths.add(start, &policy);
        }
        let just_inside = start + policy.window - Duration::from_nanos(1);
        assert_eq!(deaths.add(just_inside, &policy), Decision::Quarantine);

        // All but the last one are forgotten by then.
        let second = Decision::RestartAfter(Duration::from_secs(1));
        assert_eq!(deaths.add(start + policy.window, &policy), second);
    }
}
