//! Windows' timers, as a driver meets them: through the SDK and both ends of the plugin ABI.
//!
//! On virtual time, so each tick is one the test takes; `real_time.rs` is the exception.

#![forbid(unsafe_code)]

mod bench;
mod cost;
mod dpcs;
mod io_timers;
mod kernel_timers;
mod real_time;
