//! The cheapest clock there is, for measuring how long things take.

use crate::Clock;

/// The processor's time stamp counter where there is one, nanoseconds elsewhere. Steady on every
/// machine whose kernel uses it as its clock; elsewhere what is measured with it is rough.
#[inline]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        time_stamp_counter()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        Clock::Uptime.now()
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code)]
// UNSAFETY: an instruction has no safe name.
#[inline]
fn time_stamp_counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; it touches no memory, and Linux leaves
    // it to programs unless they ask to be forbidden it (`PR_SET_TSC`).
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// What a tick is worth, measured against the kernel's clock since this was made.
#[derive(Clone, Copy, Debug)]
pub struct TickScale {
    ticks: u64,
    ns: u64,
}

impl TickScale {
    /// Starts measuring.
    pub fn start() -> Self {
        Self { ticks: ticks(), ns: Clock::Uptime.now() }
    }

    /// What ticks are worth, as far as is known now. The longer ago the start, the more exact.
    pub fn rate(&self) -> TickRate {
        let ticks = (ticks() - self.ticks).max(1);
        TickRate { ticks, ns: Clock::Uptime.now() - self.ns }
    }
}

/// So many ticks are so many nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickRate {
    ticks: u64,
    ns: u64,
}

impl TickRate {
    /// A number of ticks in nanoseconds.
    pub fn ns(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * u128::from(self.ns) / u128::from(self.ticks)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_measure_what_the_clock_measures() {
        let scale = TickScale::start();
        let (ticks_before, ns_before) = (ticks(), Clock::Uptime.now());
        while Clock::Uptime.now() < ns_before + 20_000_000 {}
        let (measured, passed) =
            (scale.rate().ns(ticks() - ticks_before), Clock::Uptime.now() - ns_before);
        let off = measured.abs_diff(passed);
        assert!(off < passed / 10, "{measured} ns by ticks, {passed} ns by the clock");
    }
}
