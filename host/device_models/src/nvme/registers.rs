//! The registers of section 3.1, and the interrupts of section 7.5.

use std::collections::BTreeSet;

use super::{Faults, Options};
use crate::model::Bus;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

const VERSION: u32 = 0x0001_0400;

const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 3 << 14;
/// Enable, command set, page size, arbitration, shutdown, entry sizes.
const CC_WRITABLE: u32 = 0x00ff_fff1;

const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;
const CSTS_SHUT_DOWN: u32 = 2 << 2;
const CSTS_SHUTDOWN_MASK: u32 = 3 << 2;

/// Entries of 64 and of 16 bytes.
const ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;

#[derive(Debug)]
pub(super) struct Registers {
    cap: u64,
    interrupt_mask: u32,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Completion queues with something unread, which hold the line.
    line_causes: BTreeSet<u16>,
}

/// What a write asks of the controller.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Nothing,
    Enable,
    Reset,
    Shutdown,
}

/// Where the admin queues are, and how many entries they have.
pub(super) struct AdminQueues {
    pub(super) submission: u64,
    pub(super) submission_size: u32,
    pub(super) completion: u64,
    pub(super) completion_size: u32,
}

impl Registers {
    pub(super) fn new(options: &Options) -> Self {
        /// Queues have to be physically contiguous (`CQR`); the NVM command set (`CSS`); pages of
        /// 4096 to 65536 bytes (`MPSMIN`, `MPSMAX`).
        const FIXED: u64 = 1 << 16 | 1 << 37 | 4 << 52;
        let cap = FIXED
            | u64::from(options.queue_entries - 1)
            | u64::from(options.ready_timeout) << 24
            | u64::from(options.doorbell_stride) << 32;
        Self {
            cap,
            interrupt_mask: 0,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            line_causes: BTreeSet::new(),
        }
    }

    /// Enabled, ready, and not broken or shut down.
    pub(super) fn is_running(&self) -> bool {
        self.cc & CC_ENABLE != 0
            && self.csts & (CSTS_READY | CSTS_FATAL | CSTS_SHUTDOWN_MASK) == CSTS_READY
    }

    pub(super) fn set_ready(&mut self) {
        let sizes_fit = self.cc & 0x00ff_0000 == ENTRY_SIZES || self.cc & 0x00ff_0000 == 0;
        let page_fits = (self.cc >> 7 & 0xf) <= 4;
        self.csts |= if sizes_fit && page_fits { CSTS_READY } else { CSTS_FATAL };
    }

    pub(super) fn set_fatal(&mut self) {
        self.csts |= CSTS_FATAL;
    }

    pub(super) fn set_shut_down(&mut self) {
        self.csts = self.csts & !CSTS_SHUTDOWN_MASK | CSTS_SHUT_DOWN;
    }

    /// Bytes of a memory page (`CC.MPS`).
    pub(super) fn page(&self) -> u64 {
        4096 << (self.cc >> 7 & 0xf)
    }

    pub(super) fn admin_queues(&self) -> AdminQueues {
        AdminQueues {
            submission: self.asq & !0xfff,
            submission_size: (self.aqa & 0xfff) + 1,
            completion: self.acq & !0xfff,
            completion_size: (self.aqa >> 16 & 0xfff) + 1,
        }
    }

    pub(super) fn entry_sizes_are_set(&self) -> bool {
        self.cc & 0x00ff_0000 == ENTRY_SIZES
    }

    /// Reads of 4 and 8 bytes at their natural alignment; others are not defined and give zeros.
    pub(super) fn read(&self, faults: &Faults, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (at, part) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            part.copy_from_slice(&self.dword(faults, at).to_le_bytes());
        }
    }

    fn dword(&self, faults: &Faults, offset: u64) -> u32 {
        let cap = faults.capabilities.unwrap_or(self.cap);
        match offset {
            CAP => cap as u32,
            0x04 => (cap >> 32) as u32,
            VS => faults.version.unwrap_or(VERSION),
            INTMS | INTMC => self.interrupt_mask,
            CC => self.cc,
            CSTS => self.csts,
            AQA => self.aqa,
            ASQ => self.asq as u32,
            0x2c => (self.asq >> 32) as u32,
            ACQ => self.acq as u32,
            0x34 => (self.acq >> 32) as u32,
            _ => 0,
        }
    }

    /// Writes likewise; others do nothing.
    pub(super) fn write(
        &mut self,
        bus: &mut Bus<'_>,
        faults: &Faults,
        offset: u64,
        data: &[u8],
    ) -> Wanted {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return Wanted::Nothing;
        }
        let mut wanted = Wanted::Nothing;
        for (at, part) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(part.try_into().expect("four bytes"));
            wanted = self.write_dword(bus, faults, at, value);
        }
        wanted
    }

    fn write_dword(
        &mut self,
        bus: &mut Bus<'_>,
        faults: &Faults,
        offset: u64,
        value: u32,
    ) -> Wanted {
        let low = |register: u64| register & !0xffff_ffff | u64::from(value);
        let high = |register: u64| register & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            INTMS => self.mask(bus, self.interrupt_mask | value),
            INTMC => self.mask(bus, self.interrupt_mask & !value),
            CC => return self.configure(faults, value),
            AQA => self.aqa = value & 0x0fff_0fff,
            ASQ => self.asq = low(self.asq),
            0x2c => self.asq = high(self.asq),
            ACQ => self.acq = low(self.acq),
            0x34 => self.acq = high(self.acq),
            _ => {}
        }
        Wanted::Nothing
    }

    /// Controller configuration (section 3.1.5).
    fn configure(&mut self, faults: &Faults, value: u32) -> Wanted {
        let before = std::mem::replace(&mut self.cc, value & CC_WRITABLE);
        let enabled = |cc: u32| cc & CC_ENABLE != 0;
        match (enabled(before), enabled(self.cc)) {
            (false, true) => {
                self.csts &= !(CSTS_FATAL | CSTS_SHUTDOWN_MASK);
                Wanted::Enable
            }
            (true, false) => {
                // Everything but the admin queue registers is as at power-on (section 3.1.5).
                self.interrupt_mask = 0;
                if !faults.never_quiet {
                    self.csts = 0;
                }
                Wanted::Reset
            }
            _ if self.cc & !before & CC_SHUTDOWN != 0 => match faults.never_shut_down {
                true => Wanted::Nothing,
                false => Wanted::Shutdown,
            },
            _ => Wanted::Nothing,
        }
    }

    fn mask(&mut self, bus: &mut Bus<'_>, mask: u32) {
        self.interrupt_mask = mask;
        self.update_line(bus);
    }

    /// Sends the message of a vector. With the line there is nothing to send.
    pub(super) fn send_interrupt(&self, bus: &mut Bus<'_>, vector: u16) {
        if bus.msi_x_enabled() {
            bus.send_msi_x(vector);
        } else if bus.msi_enabled() && self.interrupt_mask >> (vector & 31) & 1 == 0 {
            // A vector that is masked is sent when it is unmasked on hardware; hosts that mask
            // look at their queues before they unmask.
            bus.send_msi(vector as u8);
        }
    }

    /// Whether a completion queue has something unread.
    pub(super) fn set_line_cause(&mut self, queue: u16, is_pending: bool) {
        match is_pending {
            true => self.line_causes.insert(queue),
            false => self.line_causes.remove(&queue),
        };
    }

    /// Brings the line up to date: asserted while a queue has something unread (section 7.5.1.1).
    pub(super) fn update_line(&self, bus: &mut Bus<'_>) {
        if bus.msi_enabled() || bus.msi_x_enabled() {
            return;
        }
        match !self.line_causes.is_empty() && self.interrupt_mask & 1 == 0 {
            true => bus.assert_intx(),
            false => bus.deassert_intx(),
        }
    }

    pub(super) fn clear_line(&mut self, bus: &mut Bus<'_>) {
        self.line_causes.clear();
        self.update_line(bus);
    }
}
