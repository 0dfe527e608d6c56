//! When a driver host that died is started again, and when one that runs counts as hung.
//!
//! At once the first time, because most deaths are accidents; then after a pause that doubles,
//! because a device or a driver that keeps failing should not keep the machine busy; and not at
//! all after too many deaths in a while, because then a person has to look. The deaths are
//! forgotten when one has (`iohost bind`), and when the device is plugged in anew.
//!
//! Nothing here looks at a clock: whoever asks says what time it is.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often and how soon, and what a hang is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Restarts within `window` before the device is left alone.
    pub most: usize,
    /// How long a death counts.
    pub window: Duration,
    /// The pause before the second restart; each further one is twice as long.
    pub pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// How long one piece of work of a driver may take without a sign of life; zero for as long as
    /// it likes.
    pub hang: Duration,
    /// How long it may take however much progress it reports.
    pub hang_cap: Duration,
    /// A program to run at each death; none where there is none.
    pub hook: Option<PathBuf>,
    /// How long that program may take before it is killed.
    pub hook_limit: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            most: 5,
            window: Duration::from_secs(30 * 60),
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(30),
            hang: Duration::from_secs(2),
            hang_cap: Duration::from_secs(60),
            hook: None,
            hook_limit: Duration::from_secs(10),
        }
    }
}

/// What the configuration says of a [`RestartPolicy`], for all devices or for one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestartChoices {
    /// [`RestartPolicy::most`], and so on.
    pub most: Option<usize>,
    /// [`RestartPolicy::window`].
    pub window: Option<Duration>,
    /// [`RestartPolicy::pause`].
    pub pause: Option<Duration>,
    /// [`RestartPolicy::longest_pause`].
    pub longest_pause: Option<Duration>,
    /// [`RestartPolicy::hang`].
    pub hang: Option<Duration>,
    /// [`RestartPolicy::hang_cap`].
    pub hang_cap: Option<Duration>,
    /// [`RestartPolicy::hook`].
    pub hook: Option<PathBuf>,
    /// [`RestartPolicy::hook_limit`].
    pub hook_limit: Option<Duration>,
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

    /// This policy, but for what was chosen.
    pub fn with(&self, choices: &RestartChoices) -> Self {
        let chosen = choices.clone();
        Self {
            most: chosen.most.unwrap_or(self.most),
            window: chosen.window.unwrap_or(self.window),
            pause: chosen.pause.unwrap_or(self.pause),
            longest_pause: chosen.longest_pause.unwrap_or(self.longest_pause),
            hang: chosen.hang.unwrap_or(self.hang),
            hang_cap: chosen.hang_cap.unwrap_or(self.hang_cap),
            hook: chosen.hook.or_else(|| self.hook.clone()),
            hook_limit: chosen.hook_limit.unwrap_or(self.hook_limit),
        }
    }

    /// What makes no sense of it: the key, and why.
    pub fn mistake(&self) -> Option<(&'static str, String)> {
        /// Looking more often than that costs more than a hang.
        const SHORTEST_HANG: Duration = Duration::from_millis(100);
        if self.window.is_zero() {
            let why = "no death would count, and a driver that crashes be started for ever";
            return Some(("window_seconds", why.to_owned()));
        }
        if self.pause > self.longest_pause {
            let why = format!(
                "the first pause of {:?} is longer than the longest one of {:?}",
                self.pause, self.longest_pause
            );
            return Some(("pause_seconds", why));
        }
        if !self.hang.is_zero() && self.hang < SHORTEST_HANG {
            let why = format!("{:?} is less than {SHORTEST_HANG:?}, and 0 is for never", self.hang);
            return Some(("hang_seconds", why));
        }
        if self.hang_cap < self.hang {
            let why = format!(
                "the cap of {:?} is below the {:?} after which a driver that reports nothing hangs",
                self.hang_cap, self.hang
            );
            return Some(("hang_cap_seconds", why));
        }
        if let Some(hook) = self.hook.as_ref().filter(|hook| !hook.is_absolute()) {
            return Some(("hook", format!("{} is not an absolute path", hook.display())));
        }
        if self.hook_limit.is_zero() {
            return Some(("hook_seconds", "a hook of no time cannot run".to_owned()));
        }
        None
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
        // More of them change no decision.
        while self.times.len() > policy.most.saturating_add(1) {
            self.times.pop_front();
        }
        policy.decide(self.times.len())
    }

    /// Forgets them: a person has looked, or it is another device.
    pub(crate) fn forget(&mut self) {
        self.times.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn after(seconds: u64) -> Decision {
        Decision::RestartAfter(SECOND * seconds as u32)
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_then_comes_quarantine() {
        let policy = RestartPolicy { most: 8, ..RestartPolicy::default() };
        let decisions: Vec<_> = (1..=9).map(|deaths| policy.decide(deaths)).collect();
        let mut expected: Vec<_> = [0, 1, 2, 4, 8, 16, 30, 30].map(after).into();
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
        assert_eq!(deaths.add(start + policy.window, &policy), after(1));
    }

    /// What happens at a second of a virtual clock, and what is to come of it.
    enum Step {
        Dies(u64, Decision),
        IsLookedAt,
    }

    #[test]
    fn each_history_of_deaths_leads_to_its_decisions() {
        use Step::{Dies, IsLookedAt};
        let default = RestartPolicy::default();
        let short = RestartPolicy {
            most: 2,
            window: 10 * SECOND,
            pause: 3 * SECOND,
            longest_pause: 4 * SECOND,
            ..RestartPolicy::default()
        };
        let never = RestartPolicy { most: 0, ..RestartPolicy::default() };
        let quarantine = Decision::Quarantine;
        let table = [
            // The defaults of the requirements: at once, then 1, 2, 4, 8; the sixth is one too many.
            (
                &default,
                vec![
                    Dies(0, after(0)),
                    Dies(1, after(1)),
                    Dies(3, after(2)),
                    Dies(6, after(4)),
                    Dies(11, after(8)),
                    Dies(20, quarantine),
                ],
            ),
            // Once an hour is an accident each time.
            (&default, (0..20).map(|hour| Dies(hour * 3600, after(0))).collect()),
            // A person who looked, or another device, starts from the beginning.
            (
                &default,
                vec![
                    Dies(0, after(0)),
                    Dies(1, after(1)),
                    IsLookedAt,
                    Dies(2, after(0)),
                    Dies(3, after(1)),
                ],
            ),
            // The window slides: of three deaths the first is out of it when the third comes.
            (&short, vec![Dies(0, after(0)), Dies(9, after(3)), Dies(10, after(3))]),
            (&short, vec![Dies(0, after(0)), Dies(5, after(3)), Dies(9, quarantine)]),
            // Quarantine holds as long as deaths go on inside of the window.
            (
                &short,
                vec![
                    Dies(0, after(0)),
                    Dies(0, after(3)),
                    Dies(0, quarantine),
                    Dies(1, quarantine),
                    IsLookedAt,
                    Dies(1, after(0)),
                ],
            ),
            (&never, vec![Dies(0, quarantine), IsLookedAt, Dies(1, quarantine)]),
        ];
        let start = Instant::now();
        for (row, (policy, steps)) in table.into_iter().enumerate() {
            let mut deaths = Deaths::default();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Dies(second, expected) => {
                        let now = start + SECOND * second as u32;
                        let decision = deaths.add(now, policy);
                        assert_eq!(decision, expected, "row {row}, step {number}");
                    }
                    IsLookedAt => deaths.forget(),
                }
            }
        }
    }

    #[test]
    fn what_one_device_does_moves_nothing_of_another() {
        let (policy, now) = (RestartPolicy::default(), Instant::now());
        let (mut looping, mut other) = (Deaths::default(), Deaths::default());
        for _ in 0..100 {
            looping.add(now, &policy);
        }
        assert_eq!(looping.add(now, &policy), Decision::Quarantine);
        assert_eq!(other.add(now, &policy), after(0));
    }

    #[test]
    fn what_is_chosen_for_a_device_goes_before_what_is_chosen_for_all() {
        let all = RestartChoices { most: Some(3), pause: Some(2 * SECOND), ..Default::default() };
        let one = RestartChoices { most: Some(1), ..Default::default() };
        let policy = RestartPolicy::default().with(&all).with(&one);
        let expected = RestartPolicy { most: 1, pause: 2 * SECOND, ..RestartPolicy::default() };
        assert_eq!(policy, expected);
    }

    #[test]
    fn a_policy_that_makes_no_sense_says_which_key() {
        let good = RestartPolicy::default();
        assert_eq!(good.mistake(), None);
        assert_eq!(RestartPolicy { hang: Duration::ZERO, ..good.clone() }.mistake(), None);
        for (key, bad) in [
            ("window_seconds", RestartPolicy { window: Duration::ZERO, ..good.clone() }),
            ("pause_seconds", RestartPolicy { pause: 31 * SECOND, ..good.clone() }),
            ("hang_seconds", RestartPolicy { hang: SECOND / 11, ..good.clone() }),
            ("hang_cap_seconds", RestartPolicy { hang_cap: SECOND, ..good.clone() }),
            ("hook", RestartPolicy { hook: Some("notify".into()), ..good.clone() }),
            ("hook_seconds", RestartPolicy { hook_limit: Duration::ZERO, ..good.clone() }),
        ] {
            assert_eq!(bad.mistake().map(|mistake| mistake.0), Some(key));
        }
    }
}
