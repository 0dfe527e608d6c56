//! From a device's line or message to the eventfd its user waits on.
//!
//! INTx behaves as behind VFIO: level-triggered, masked at each interrupt, and interrupting again
//! at the unmask if the device still asserts the line (`vfio_intx_handler` and
//! `vfio_pci_intx_unmask_handler` in the kernel's `vfio_pci_intrs.c`).

use std::fmt;
use std::fs::File;
use std::io::Write;

use log::warn;

/// The ways in which these functions interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// The level-triggered line.
    IntX,
    /// Message signalled.
    Msi,
    /// Message signalled with a table of vectors.
    MsiX,
}

impl fmt::Display for InterruptKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InterruptKind::IntX => "INTx",
            InterruptKind::Msi => "MSI",
            InterruptKind::MsiX => "MSI-X",
        })
    }
}

/// What the user of a function enabled, and the state of its line.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    line: Option<File>,
    asserted: bool,
    masked: bool,
    msi: Vec<Option<File>>,
    msi_x: Vec<Option<File>>,
}

impl Interrupts {
    /// Sets the triggers of vectors `start..`; those at other vectors stay.
    pub(crate) fn set(&mut self, kind: InterruptKind, start: usize, triggers: Vec<Option<File>>) {
        let messages = match kind {
            InterruptKind::IntX => {
                self.line = triggers.into_iter().next().flatten();
                self.masked = false;
                return self.signal_line();
            }
            InterruptKind::Msi => &mut self.msi,
            InterruptKind::MsiX => &mut self.msi_x,
        };
        let end = start + triggers.len();
        if messages.len() < end {
            messages.resize_with(end, || None);
        }
        messages.splice(start..end, triggers);
    }

    pub(crate) fn disable(&mut self, kind: InterruptKind) {
        match kind {
            InterruptKind::IntX => (self.line, self.masked) = (None, false),
            InterruptKind::Msi => self.msi.clear(),
            InterruptKind::MsiX => self.msi_x.clear(),
        }
    }

    /// Whether any vector has a trigger.
    pub(crate) fn enabled(&self, kind: InterruptKind) -> bool {
        match kind {
            InterruptKind::IntX => self.line.is_some(),
            InterruptKind::Msi => self.msi.iter().any(Option::is_some),
            InterruptKind::MsiX => self.msi_x.iter().any(Option::is_some),
        }
    }

    pub(crate) fn mask_line(&mut self) {
        self.masked = true;
    }

    pub(crate) fn unmask_line(&mut self) {
        self.masked = false;
        self.signal_line();
    }

    pub(crate) fn set_line(&mut self, asserted: bool) {
        self.asserted = asserted;
        self.signal_line();
    }

    pub(crate) fn send_msi(&mut self, vector: u8) {
        if let Some(Some(trigger)) = self.msi.get(usize::from(vector)) {
            signal(trigger);
        }
    }

    pub(crate) fn send_msi_x(&mut self, vector: u16) {
        if let Some(Some(trigger)) = self.msi_x.get(usize::from(vector)) {
            signal(trigger);
        }
    }

    fn signal_line(&mut self) {
        if self.asserted
            && !self.masked
            && let Some(trigger) = &self.line
        {
            signal(trigger);
            self.masked = true;
        }
    }
}

fn signal(mut trigger: &File) {
    // A trigger that does not work is its owner's loss; there is nobody else to tell.
    if let Err(err) = trigger.write_all(&1u64.to_ne_bytes()) {
        warn!(err:%; "an interrupt trigger cannot be signalled");
    }
}
