//! Kernel events: eventfd, epoll, timerfd, pidfd, clocks, and packets that carry descriptors.
//!
//! Thin, owned, safe. What waits takes a deadline or says that it blocks for ever.

mod clock;
mod packet_listener;
mod packets;
mod peer;
mod poller;
mod process;
mod signal;
mod ticks;
mod timer;

pub use clock::Clock;
pub use packet_listener::PacketListener;
pub use packets::{Packet, PacketError, Packets};
pub use peer::Peer;
pub use poller::{Poller, Ready};
pub use process::{ProcessHandle, close_on_exec, process_start};
pub use signal::Signal;
pub use ticks::{TickRate, TickScale, ticks};
pub use timer::Timer;
