//! What happens to a device that its driver did not cause, and who is told.
//!
//! The kernel's signals are armed before the driver starts and stay so: no driver can be too busy
//! to hear them, as a thread of its own waits for them. Who is told: whoever reports to the daemon,
//! which decides; and the driver, on its queue, if it asked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use iohost_device_backend::{DeviceBackend, DeviceEvent, quiesce};
use iohost_event::Signal;
use iohost_interface::with_sources;
use log::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Device;

/// What an event adds to a driver's eventfd: each kind has its own 16 bits of the count.
fn weight(event: DeviceEvent) -> u64 {
    match event {
        DeviceEvent::Error => 1,
        DeviceEvent::RemovalRequested => 1 << 16,
        DeviceEvent::Gone => 1 << 32,
    }
}

type Report = Box<dyn Fn(DeviceEvent) + Send + Sync>;

/// The signals of a device's events, and who hears of them.
pub(crate) struct Events {
    error: Signal,
    removal: Signal,
    /// One for each time the driver asked.
    drivers: Mutex<Vec<Signal>>,
    /// It was told that the device is gone: that happens once.
    gone: AtomicBool,
    report: OnceLock<Report>,
}

/// Why the list of the driver's eventfds is never poisoned.
const NO_PANIC: &str = "no foreign code runs under this lock";

impl Events {
    /// Arms what the backend has.
    pub(crate) fn arm(device: &dyn DeviceBackend) -> io::Result<Self> {
        let events = Self {
            error: Signal::new()?,
            removal: Signal::new()?,
            drivers: Mutex::default(),
            gone: AtomicBool::new(false),
            report: OnceLock::new(),
        };
        let signals =
            [(DeviceEvent::Error, &events.error), (DeviceEvent::RemovalRequested, &events.removal)];
        for (event, signal) in signals {
            if let Err(err) = device.watch(event, signal.as_fd()) {
                warn!(reason = with_sources(&err); "nobody will hear of {event:?} of the device");
            }
        }
        Ok(events)
    }

    /// An eventfd for the driver, which counts in the words of [`weight`].
    pub(crate) fn for_driver(&self) -> io::Result<OwnedFd> {
        let signal = Signal::new()?;
        let copy = signal.as_fd().try_clone_to_owned()?;
        if self.gone.load(SeqCst) {
            signal.add(weight(DeviceEvent::Gone));
        }
        self.drivers.lock().expect(NO_PANIC).push(signal);
        Ok(copy)
    }

    pub(crate) fn report_to(&self, report: Report) {
        // Whoever was first stays: there is one daemon.
        let _ = self.report.set(report);
    }

    pub(crate) fn tell(&self, event: DeviceEvent) {
        if event == DeviceEvent::Gone && self.gone.swap(true, SeqCst) {
            return;
        }
        warn!(event:?; "the device has news");
        for signal in &*self.drivers.lock().expect(NO_PANIC) {
            signal.add(weight(event));
        }
        if let Some(report) = self.report.get() {
            report(event);
        }
    }

    /// Takes what has been signalled, and tells of it.
    pub(crate) fn check(&self) {
        for (event, signal) in
            [(DeviceEvent::Error, &self.error), (DeviceEvent::RemovalRequested, &self.removal)]
        {
            if signal.take() > 0 {
                self.tell(event);
            }
        }
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("gone", &self.gone).finish_non_exhaustive()
    }
}

/// The thread that waits for a device's events. Dropping it ends the thread.
#[derive(Debug)]
pub struct EventWatch {
    stop: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl EventWatch {
    /// Starts the thread, and has `report` called on it for each event.
    pub fn start(
        device: &Arc<Device>,
        report: impl Fn(DeviceEvent) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        device.events().report_to(Box::new(report));
        let stop = Arc::new(Signal::new()?);
        let lost = iohost_registers::lost_accesses()?;
        let lost = Signal::try_from(lost)?;
        let (device, stopped) = (device.clone(), stop.clone());
        let thread = std::thread::Builder::new()
            .name("device-events".into())
            .spawn(move || wait(&device, &stopped, &lost))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for EventWatch {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say by its end.
            let _ = thread.join();
        }
    }
}

fn wait(device: &Device, stop: &Signal, lost: &Signal) {
    let events = device.events();
    loop {
        let all = [stop, &events.error, &events.removal, lost];
        let mut fds = all.map(|signal| PollFd::new(signal.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return warn!(err:%; "nobody listens to the device's events any more"),
        }
        if stop.take() > 0 {
            return;
        }
        events.check();
        if lost.take() > 0 {
            device.lost_access();
        }
    }
}

impl Device {
    /// Takes what the device has signalled of its events, and tells of it. For who has no
    /// [`EventWatch`].
    pub fn check_events(&self) {
        self.events().check();
    }

    /// A mapped register was accessed that nobody answers for.
    fn lost_access(&self) {
        match quiesce::answers(self.backend()) {
            false => self.events().tell(DeviceEvent::Gone),
            true => {
                warn!("a BAR was accessed while the device does not decode memory");
                self.events().tell(DeviceEvent::Error);
            }
        }
    }
}
