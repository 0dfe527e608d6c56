//! `[restart]`, of all devices or of one: when drivers are started again, and its times.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::ConfigError;
use super::source::Source;
use crate::restart::{RestartChoices, RestartPolicy};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRestart {
    most: Option<usize>,
    window_seconds: Option<Seconds>,
    pause_seconds: Option<Seconds>,
    longest_pause_seconds: Option<Seconds>,
    hang_seconds: Option<Seconds>,
    hang_cap_seconds: Option<Seconds>,
    hook: Option<PathBuf>,
    hook_seconds: Option<Seconds>,
}

/// A time in seconds, whole or with a fraction.
struct Seconds(Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Longer than any daemon runs; and sums of such times stay far from any limit.
        const MOST: f64 = 365.0 * 24.0 * 3600.0;
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Seconds;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "seconds from 0 to {MOST}")
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Seconds, E> {
                if !(0.0..=MOST).contains(&value) {
                    return Err(E::invalid_value(serde::de::Unexpected::Float(value), &self));
                }
                Ok(Seconds(Duration::from_secs_f64(value)))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Seconds, E> {
                self.visit_f64(value as f64)
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Seconds, E> {
                self.visit_f64(value as f64)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Source<'_> {
    /// What a table of restarts says, in place of `policy`.
    pub(super) fn check_restart(
        &self,
        raw: Option<Spanned<RawRestart>>,
        policy: &RestartPolicy,
    ) -> Result<RestartChoices, ConfigError> {
        let Some(raw) = raw else { return Ok(RestartChoices::default()) };
        let span = raw.span();
        let raw = raw.into_inner();
        let time = |seconds: Option<Seconds>| seconds.map(|Seconds(time)| time);
        let choices = RestartChoices {
            most: raw.most,
            window: time(raw.window_seconds),
            pause: time(raw.pause_seconds),
            longest_pause: time(raw.longest_pause_seconds),
            hang: time(raw.hang_seconds),
            hang_cap: time(raw.hang_cap_seconds),
            hook: raw.hook,
            hook_limit: time(raw.hook_seconds),
        };
        match policy.with(&choices).mistake() {
            None => Ok(choices),
            Some((key, why)) => Err(self.error(
                self.line_of(&span, key),
                format!("key `{key}`: {why}"),
                "correct it, or leave it out for the default",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{complaint, parse};

    #[test]
    fn a_restart_table_is_for_all_devices_and_one_of_a_device_for_that_one() {
        let config = parse(
            "[restart]\nmost = 3\npause_seconds = 0.5\nhook = \"/bin/true\"\n\
             [[device]]\nname = \"a\"\nsocket = \"/a\"\ndriver = \"edu\"\n\
             [device.restart]\nhang_seconds = 0\n\
             [[device]]\nname = \"b\"\nsocket = \"/b\"\ndriver = \"edu\"\n",
        );
        let config = config.unwrap();
        let half = Duration::from_millis(500);
        assert_eq!((config.restart.most, config.restart.pause), (Some(3), Some(half)));
        assert_eq!(config.restart.hook, Some("/bin/true".into()));
        assert_eq!(config.devices[0].restart.hang, Some(Duration::ZERO));
        assert_eq!(config.devices[1].restart, RestartChoices::default());
    }

    #[test]
    fn a_restart_table_that_makes_no_sense_is_refused_with_key_and_line() {
        assert_eq!(
            complaint("\n[restart]\nmost = 2\npause_seconds = -1\n"),
            "iohost.toml:4: key `pause_seconds`: invalid value: floating point `-1.0`, expected \
             seconds from 0 to 31536000\n  next: correct that line and start again"
        );
        assert_eq!(
            complaint("[restart]\nmost = 2\n\nlongest_pause_seconds = 10\npause_seconds = 60\n"),
            "iohost.toml:5: key `pause_seconds`: the first pause of 60s is longer than the longest \
             one of 10s\n  next: correct it, or leave it out for the default"
        );
        // Of all devices and of one together.
        let err = parse(
            "[restart]\nhang_seconds = 5\n[[device]]\nsocket = \"/a\"\ndriver = \"edu\"\n\
             restart = { hang_cap_seconds = 4 }\n",
        );
        let err = err.unwrap_err();
        assert_eq!((err.line, err.message.starts_with("key `hang_cap_seconds`")), (Some(6), true));
        assert_eq!(
            complaint("[restart]\nhooks = \"/bin/true\"\n"),
            "iohost.toml:2: unknown key `hooks`\n  next: did you mean `hook`?"
        );
        let err = parse("[restart]\nmost = -1\n").unwrap_err();
        assert!(err.to_string().starts_with("iohost.toml:2: key `most`"), "{err}");
    }
}
