//! Due times, in Windows' units.

use std::time::{Duration, SystemTime};

use crate::IOTimerClock;

/// When a [`KernelTimer`](super::KernelTimer) expires: Windows' `LARGE_INTEGER DueTime`.
///
/// A negative one is relative, and changes of the time of day do not touch it. One of 0 or more is
/// a time of day and follows them. Relative time does not count while the system sleeps (the
/// host's choice: it is on [`IOTimerClock::UptimeRaw`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueTime {
    /// In units of 100 ns.
    units: i64,
}

const NS_PER_UNIT: u64 = 100;

/// From 1601, where Windows' time starts, to 1970, in units of 100 ns.
const UNITS_TO_1970: i64 = 116_444_736_000_000_000;
const SECONDS_TO_1970: Duration = Duration::from_secs(11_644_473_600);

impl DueTime {
    /// A due time as Windows has it, in units of 100 ns: negative is that long from now, else it
    /// is the time of day, since 1601 (UTC).
    pub const fn from_100ns(units: i64) -> Self {
        Self { units }
    }

    /// That long from now, rounded up to 100 ns. No time at all is due at once.
    pub fn after(delay: Duration) -> Self {
        let units = delay.as_nanos().div_ceil(u128::from(NS_PER_UNIT));
        Self { units: -i64::try_from(units).unwrap_or(i64::MAX) }
    }

    /// A time of day, rounded up to 100 ns. One before 1601 is due at once.
    pub fn at(time: SystemTime) -> Self {
        let year_1601 = SystemTime::UNIX_EPOCH - SECONDS_TO_1970;
        let since_1601 = time.duration_since(year_1601).unwrap_or_default();
        let units = since_1601.as_nanos().div_ceil(u128::from(NS_PER_UNIT));
        Self { units: i64::try_from(units).unwrap_or(i64::MAX) }
    }

    /// The due time in units of 100 ns.
    pub const fn as_100ns(self) -> i64 {
        self.units
    }

    /// The clock and the time on it, in nanoseconds. `uptime_now` is the time on
    /// [`IOTimerClock::UptimeRaw`]. What lies past the end of a clock is its end.
    pub(super) fn deadline(self, uptime_now: u64) -> (IOTimerClock, u64) {
        if self.units < 0 {
            let delay = self.units.unsigned_abs().saturating_mul(NS_PER_UNIT);
            return (IOTimerClock::UptimeRaw, uptime_now.saturating_add(delay));
        }
        // Before 1970 has passed in any case, and the clock has no number for it.
        let since_1970 = (self.units - UNITS_TO_1970).max(0).unsigned_abs();
        (IOTimerClock::RealTime, since_1970.saturating_mul(NS_PER_UNIT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use IOTimerClock::{RealTime, UptimeRaw};

    const NOW: u64 = 5_000_000_000;

    #[test]
    fn a_negative_due_time_counts_100_ns_units_from_now_on_the_uptime_clock() {
        let second = DueTime::from_100ns(-10_000_000);
        assert_eq!(second.deadline(NOW), (UptimeRaw, NOW + 1_000_000_000));
        assert_eq!(DueTime::from_100ns(-1).deadline(NOW), (UptimeRaw, NOW + 100));
    }

    #[test]
    fn an_absolute_due_time_counts_from_1601_and_is_on_the_time_of_day() {
        let second_of_1970 = DueTime::from_100ns(116_444_736_000_000_000 + 10_000_000);
        assert_eq!(second_of_1970.deadline(NOW), (RealTime, 1_000_000_000));
        // 2000-01-01 00:00:00 UTC is 946 684 800 s after 1970 and 125 911 584 000 000 000 units
        // after 1601.
        let year_2000 = DueTime::from_100ns(125_911_584_000_000_000);
        assert_eq!(year_2000.deadline(NOW), (RealTime, 946_684_800_000_000_000));
    }

    #[test]
    fn a_time_of_day_before_1970_has_passed() {
        assert_eq!(DueTime::from_100ns(0).deadline(NOW), (RealTime, 0));
        assert_eq!(DueTime::from_100ns(116_444_735_999_999_999).deadline(NOW), (RealTime, 0));
    }

    #[test]
    fn due_times_past_the_end_of_a_clock_are_its_end() {
        assert_eq!(DueTime::from_100ns(i64::MIN).deadline(NOW), (UptimeRaw, u64::MAX));
        assert_eq!(DueTime::from_100ns(i64::MAX).deadline(NOW), (RealTime, u64::MAX));
    }

    #[test]
    fn a_duration_becomes_a_relative_due_time_that_is_not_shorter() {
        assert_eq!(DueTime::after(Duration::from_secs(1)).as_100ns(), -10_000_000);
        assert_eq!(DueTime::after(Duration::from_nanos(101)).as_100ns(), -2);
        assert_eq!(DueTime::after(Duration::ZERO).as_100ns(), 0);
        assert_eq!(DueTime::after(Duration::MAX).as_100ns(), -i64::MAX);
    }

    #[test]
    fn a_system_time_becomes_an_absolute_due_time_that_is_not_earlier() {
        let epoch = SystemTime::UNIX_EPOCH;
        let at = |time| DueTime::at(time).as_100ns();
        assert_eq!(at(epoch), 116_444_736_000_000_000);
        assert_eq!(at(epoch + Duration::from_nanos(101)), 116_444_736_000_000_002);
        assert_eq!(at(epoch - Duration::from_nanos(101)), 116_444_735_999_999_999);
        assert_eq!(at(epoch - Duration::from_secs(370 * 366 * 86_400)), 0, "before 1601");
    }
}
