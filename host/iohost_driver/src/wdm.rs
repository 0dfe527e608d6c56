//! Windows' timers, for drivers that come from there: one [`IoTimer`] per device object, the finer
//! [`KernelTimer`], and its [`Dpc`].
//!
//! They stand on this SDK's own queues and timer sources. Where Windows hands a routine a pointer
//! to the device extension and leaves the locking to its author, a routine here gets `&mut` to the
//! state of a queue, and the queue is the lock:
//!
//! ```
//! use iohost_driver::prelude::*;
//! use iohost_driver::wdm::{DeviceObject, IoTimer};
//!
//! /// The watchdog that `IoTimer` is made for: -1 is idle, 0 is too late.
//! struct Disk {
//!     seconds_left: i32,
//!     timer: IoTimer,
//! }
//!
//! # impl IOService for Disk {
//! #     const PERSONALITIES: &'static [Personality] = &[Personality::pci(1, 2)];
//! fn start(_: IOPCIDevice, queue: &IODispatchQueue<Disk>) -> Result<Disk> {
//!     let device = DeviceObject::create(queue)?;
//!     let timer = IoTimer::initialize(&device, Disk::once_per_second)?;
//!     timer.start()?;
//!     Ok(Disk { seconds_left: -1, timer })
//! }
//! # }
//!
//! impl Disk {
//!     fn request_begins(&mut self) {
//!         self.seconds_left = 5 + 1; // one more, since a tick may come at once
//!     }
//!
//!     fn once_per_second(&mut self, _: &DeviceObject<Self>) {
//!         if self.seconds_left > 0 {
//!             self.seconds_left -= 1;
//!             if self.seconds_left == 0 {
//!                 warn!("the device does not answer");
//!             }
//!         }
//!     }
//! }
//! ```
//!
//! # Where a routine runs
//!
//! On the queue of its [`DeviceObject`], in turn with everything else there. A hidden queue `wdm`
//! beside it keeps the time: the second's tick, and timers that expire. So a routine waits while
//! the driver is in a handler, and a driver that wants its DPCs to run meanwhile, as Windows runs
//! them, gives them a device object on a queue of their own.
//!
//! # IRQL
//!
//! There is none; the rules that came with it are kept where they catch mistakes. Code in an
//! [`IoTimer`] routine or a [`Dpc`] counts as `DISPATCH_LEVEL`: it should be short and must not
//! wait. All other code counts as `PASSIVE_LEVEL`. Calls that Windows allows at passive level only
//! are refused at the other one.
//!
//! # Names
//!
//! | Windows | Here |
//! | --- | --- |
//! | `IoCreateDevice`, `IoDeleteDevice` | [`DeviceObject::create`], [`DeviceObject::delete`] |
//! | `IoInitializeTimer` | [`IoTimer::initialize`] |
//! | `IoStartTimer`, `IoStopTimer` | [`IoTimer::start`], [`IoTimer::stop`] |
//! | `IO_TIMER_ROUTINE` | the closure given to [`IoTimer::initialize`] |
//! | `KeInitializeTimer`, `KeInitializeTimerEx` | [`KernelTimer::initialize`] |
//! | `KeSetTimer`, `KeSetTimerEx` | [`KernelTimer::set`], [`KernelTimer::set_ex`] |
//! | `KeSetCoalescableTimer` | [`KernelTimer::set_coalescable`] |
//! | `KeCancelTimer`, `KeReadStateTimer` | [`KernelTimer::cancel`], [`KernelTimer::read_state`] |
//! | `KeWaitForSingleObject` on a timer | [`KernelTimer::wait`] |
//! | `KeInitializeDpc`, `CustomTimerDpc` | [`Dpc::initialize`] and the closure given to it |
//! | `KeFlushQueuedDpcs` | [`DeviceObject::flush_queued_dpcs`] |
//!
//! `KeInsertQueueDpc` is left out: a timer's DPC must never be given to it, and other work has
//! [`IODispatchQueue::dispatch_async`](crate::IODispatchQueue::dispatch_async).
//!
//! Sources: the Windows driver documentation of the routines named here (`wdm.h`), "Timer Objects
//! and DPCs", and, for what it leaves open, the behaviour of ReactOS (`iomgr/iotimer.c`,
//! `ke/timerobj.c`). Each method says which rules are this host's own.

mod device_object;
mod dpc;
mod due_time;
mod error;
mod io_timer;
mod irql;
mod kernel_timer;
mod signal;
mod system;

pub use device_object::DeviceObject;
pub use dpc::Dpc;
pub use due_time::DueTime;
pub use error::Error;
pub use io_timer::IoTimer;
pub use kernel_timer::KernelTimer;
pub use signal::TimerType;

/// The result of a call here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no foreign code runs under this lock";
