//! Waiting for a device that the kernel itself works on.
//!
//! To open a device and to reset it the kernel needs its lock, for which it does not wait: it says
//! `EAGAIN`. The lock is held while the kernel recovers from an error that the device has reported,
//! which is just when a driver host hears of that error and may be told to reset the device for it.
//!
//! Source: Linux, `pci_try_reset_function`, `pci_reset_bus`, `vfio_pci_core_enable`,
//! `report_error_detected`.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than a link takes to come back after the kernel has reset it (PCI Express 4.0, section 6.6.1:
/// a device answers within a second).
const LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// Does something to a device as soon as it can be locked.
///
/// Errors: `EAGAIN` for one that stayed locked for two seconds; what else `call` says.
pub(crate) fn once_unlocked<T>(call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    within(LIMIT, call)
}

fn within<T>(limit: Duration, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let start = Instant::now();
    loop {
        let result = call();
        let is_locked = matches!(&result, Err(err) if err.raw_os_error() == Some(libc::EAGAIN));
        if !is_locked || start.elapsed() >= limit {
            return result;
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a call was made that has these answers, and what came of it.
    fn made(limit: Duration, answers: &[i32]) -> (usize, Option<i32>) {
        let mut answers = answers.iter();
        let mut count = 0;
        let result = within(limit, || {
            count += 1;
            match answers.next().expect("no call after the last answer") {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(*error)),
            }
        });
        (count, result.err().and_then(|err| err.raw_os_error()))
    }

    #[test]
    fn a_locked_device_is_waited_for() {
        let locked = libc::EAGAIN;
        assert_eq!(made(Duration::MAX, &[0]), (1, None));
        assert_eq!(made(Duration::MAX, &[locked, locked, 0]), (3, None));
        assert_eq!(made(Duration::MAX, &[locked, libc::EIO]), (2, Some(libc::EIO)));
        assert_eq!(made(Duration::ZERO, &[locked]), (1, Some(locked)), "not for ever");
    }
}
