//! What is done to a device between one driver and the next.
//!
//! A driver can end in any way, in the middle of anything: it has stopped, panicked, hung and was
//! killed, or its device broke. Whoever has the device next runs [`quiesce`] first, and nothing
//! of the driver's is believed: neither that it stopped its device, nor that the device still
//! answers. The order matters; each step makes the next one safe.
//!
//! 1. Disarm every interrupt trigger. The eventfds stay: whoever waits on one hears nothing more.
//! 2. Restore the base address registers, where they are not what they were.
//! 3. Clear memory-space and bus-master enable: nothing reaches the device, and it starts no
//!    transfer.
//! 4. Wait until the device says that no transaction of its own is pending, for a second at most.
//! 5. Wait for writes that it had posted already.
//! 6. Reset it, by the gentlest way that works: [`DeviceBackend::resets`].
//! 7. Read the vendor id again: all ones, and the device does not answer. Compare the base address
//!    registers: a reset keeps them, or the device is not where its bridge thinks.
//!
//! Only after that is memory unmapped that the device could reach; that is the caller's. What came
//! of it is one of three [`Outcome`]s.
//!
//! Source: PCI Local Bus Specification 3.0, sections 6.2.2 and 6.2.5; PCI Express Base
//! Specification 4.0, section 7.5.3.5 (Transactions Pending) and 6.6.2 (Function Level Reset: a
//! driver clears bus master and waits for pending transactions first).

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use iohost_interface::with_sources;
use log::{debug, info, warn};

use crate::config_space::{self, BUS_MASTER, COMMAND, EXPRESS, MEMORY_SPACE};
use crate::{DeviceBackend, DeviceError, InterruptKind, Reset, registers};

/// What is left of a device after [`quiesce`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is quiet and answers. It was not reset, as it has no reset of its own.
    Clean,
    /// It is quiet, was reset, and answers.
    Reset,
    /// It may still do harm, or does not answer: nobody should use it.
    Quarantined,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Clean => "clean",
            Outcome::Reset => "reset",
            Outcome::Quarantined => "quarantined",
        })
    }
}

/// An [`Outcome`], and how it came about. The words are for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quiesced {
    /// What is left.
    pub outcome: Outcome,
    /// How it was reset, or why it was not, or what is wrong with it.
    pub how: String,
    /// What its registers said before: `command 0x0006 (memory, bus master), status 0x0010, MSI on`.
    pub found: String,
    /// And after.
    pub left: String,
}

/// The base address registers, to be found again after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedBars([u32; 6]);

impl SavedBars {
    /// Those that the device has now.
    pub fn of(device: &dyn DeviceBackend) -> Result<Self, DeviceError> {
        let mut bars = [0; 6];
        for (register, bar) in bar_registers().zip(&mut bars) {
            *bar = config_space::read(device, register, 4)?;
        }
        Ok(Self(bars))
    }
}

/// Configuration space.
const VENDOR: u16 = 0x00;
/// Device status, in the capability of PCI Express.
const DEVICE_STATUS: u16 = 0x0a;
const TRANSACTIONS_PENDING: u16 = 1 << 5;

/// How long a function may take to end its transactions (PCI Express 4.0, section 2.8: a
/// completion times out after 50 ms at the most by default; the kernel waits longer as well).
const PENDING_LIMIT: Duration = Duration::from_secs(1);
const PENDING_PAUSE: Duration = Duration::from_millis(10);

/// The six base address registers.
fn bar_registers() -> impl Iterator<Item = u16> {
    (0x10..0x28).step_by(4)
}

/// Makes a device safe for its next user, whatever its last one did. `saved` is what its base
/// address registers were when it was well.
///
/// Takes up to a few seconds. Memory that the device could reach stays mapped, for the caller to
/// take back afterwards. The device decodes no memory then and is no bus master.
pub fn quiesce(device: &dyn DeviceBackend, saved: &SavedBars) -> Quiesced {
    let found = registers::in_words(device);
    let (outcome, how) = make_safe(device, saved);
    Quiesced { outcome, how, found, left: registers::in_words(device) }
}

fn make_safe(device: &dyn DeviceBackend, saved: &SavedBars) -> (Outcome, String) {
    disarm(device);
    let quieted = quiet(device, saved);
    if let Err(reason) = &quieted {
        warn!(reason = reason.as_str(); "the device is not quiet, it has to be reset");
    }
    let reset = climb(device);
    let verified = match (&reset, &quieted) {
        // Nothing else is left that could have made it quiet.
        (Climbed::NoWay(_), Err(reason)) => Err(reason.clone()),
        (Climbed::Failed(reason), _) => Err(reason.clone()),
        (Climbed::Done(_), _) | (Climbed::NoWay(_), Ok(())) => verify(device, saved),
    };
    match (verified, reset) {
        (Err(how), _) => (Outcome::Quarantined, how),
        (Ok(()), Climbed::Done(how)) => (Outcome::Reset, how),
        (Ok(()), Climbed::NoWay(how) | Climbed::Failed(how)) => (Outcome::Clean, how),
    }
}

/// 1: no interrupt from here on.
fn disarm(device: &dyn DeviceBackend) {
    for kind in [InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX] {
        if device.interrupt_count(kind) > 0
            && let Err(err) = device.disable_interrupts(kind)
        {
            // The reset disarms it too.
            debug!(reason:% = with_sources(&err); "{kind} stays armed until the reset");
        }
    }
}

/// 2 to 5: no transfer from here on.
fn quiet(device: &dyn DeviceBackend, saved: &SavedBars) -> Result<(), String> {
    let in_words = |err: DeviceError| with_sources(&err);
    restore_bars(device, saved).map_err(in_words)?;
    let was_master = stop(device).map_err(in_words)?;
    if !was_master {
        return Ok(());
    }
    await_transactions(device)?;
    thread::sleep(device.posted_writes_take());
    Ok(())
}

fn restore_bars(device: &dyn DeviceBackend, saved: &SavedBars) -> Result<(), DeviceError> {
    for (register, bar) in bar_registers().zip(saved.0) {
        let now = config_space::read(device, register, 4)?;
        if now != bar && now != u32::MAX {
            warn!(register, was = bar, now; "a base address register was changed; restoring it");
            device.config_write(register, &bar.to_le_bytes())?;
        }
    }
    Ok(())
}

/// Whether the device was bus master until now.
fn stop(device: &dyn DeviceBackend) -> Result<bool, DeviceError> {
    let mut command = [0; 2];
    device.config_read(COMMAND, &mut command)?;
    let command = u16::from_le_bytes(command);
    device.config_write(COMMAND, &(command & !(MEMORY_SPACE | BUS_MASTER)).to_le_bytes())?;
    Ok(command & BUS_MASTER != 0)
}

fn await_transactions(device: &dyn DeviceBackend) -> Result<(), String> {
    let Some(express) = capability(device, EXPRESS).map_err(|err| with_sources(&err))? else {
        return Ok(());
    };
    let start = Instant::now();
    loop {
        let mut status = [0; 2];
        device
            .config_read(express + DEVICE_STATUS, &mut status)
            .map_err(|err| with_sources(&err))?;
        if u16::from_le_bytes(status) & TRANSACTIONS_PENDING == 0 {
            return Ok(());
        }
        if start.elapsed() >= PENDING_LIMIT {
            return Err(format!("it still has transactions pending after {PENDING_LIMIT:?}"));
        }
        thread::sleep(PENDING_PAUSE);
    }
}

/// What became of the attempts to reset.
enum Climbed {
    /// One worked, as far as it says itself.
    Done(String),
    /// There is no way that may be taken.
    NoWay(String),
    /// Every way that may be taken failed.
    Failed(String),
}

/// 6: the first way that works.
fn climb(device: &dyn DeviceBackend) -> Climbed {
    let mut failed = Vec::new();
    let mut barred = Vec::new();
    for reset in device.resets() {
        if let Some(others) = not_ours(&reset) {
            barred.push(format!("{reset} would reset {others}"));
            continue;
        }
        info!(reset:%; "resetting the device");
        match device.reset_by(reset.level) {
            // A device that does not answer is what the next way is for.
            Ok(()) if !answers(device) => failed.push(format!("{reset}: it does not answer")),
            Ok(()) => return Climbed::Done(reset.to_string()),
            Err(DeviceError::NoReset { reason }) => barred.push(reason),
            Err(err) => failed.push(format!("{reset}: {}", with_sources(&err))),
        }
    }
    match (failed.is_empty(), barred.is_empty()) {
        (false, _) => Climbed::Failed(format!("its reset failed: {}", failed.join("; "))),
        (true, false) => Climbed::NoWay(barred.join("; ")),
        (true, true) => Climbed::NoWay("it has no reset".to_owned()),
    }
}

/// The devices that a reset must not touch, if it would.
fn not_ours(reset: &Reset) -> Option<String> {
    let others = reset.affected.iter().filter(|(_, is_ours)| !is_ours);
    let others: Vec<&str> = others.map(|(address, _)| address.as_str()).collect();
    (!others.is_empty()).then(|| others.join(", "))
}

/// 7: it is there, and where it was.
fn verify(device: &dyn DeviceBackend, saved: &SavedBars) -> Result<(), String> {
    if !answers(device) {
        return Err("it does not answer: its vendor id reads as all ones".to_owned());
    }
    restore_bars(device, saved).map_err(|err| with_sources(&err))?;
    let now = SavedBars::of(device).map_err(|err| with_sources(&err))?;
    if now != *saved {
        return Err("its base address registers are not what they were".to_owned());
    }
    Ok(())
}

/// Whether the device answers at all: a vendor id of all ones is that of nobody.
pub fn answers(device: &dyn DeviceBackend) -> bool {
    let mut vendor = [0; 2];
    device.config_read(VENDOR, &mut vendor).is_ok() && vendor != [0xff; 2]
}

/// Where a capability is, if the device has it.
fn capability(device: &dyn DeviceBackend, id: u8) -> Result<Option<u16>, DeviceError> {
    let mut capabilities = config_space::capabilities(device)?.into_iter();
    Ok(capabilities.find(|(found, _)| *found == id).map(|(_, at)| at))
}
