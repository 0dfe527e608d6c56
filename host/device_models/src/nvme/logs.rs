//! Log pages (section 5.14.1), and what they count.

use super::command::{Command, Status};
use super::{Nvme, data};
use crate::model::Bus;

const ERRORS: u8 = 0x01;
const HEALTH: u8 = 0x02;
const FIRMWARE: u8 = 0x03;
const CHANGED_NAMESPACES: u8 = 0x04;
const EFFECTS: u8 = 0x05;

/// Entries of the error log (`ELPE` + 1).
pub(super) const ERROR_ENTRIES: usize = 16;

/// What the health log counts.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    pub(super) blocks_read: u64,
    pub(super) blocks_written: u64,
    pub(super) read_commands: u64,
    pub(super) write_commands: u64,
    pub(super) media_errors: u64,
    pub(super) errors: u64,
    pub(super) doorbells: u64,
    pub(super) disablings: u64,
}

/// An entry of the error log.
#[derive(Clone, Copy, Debug)]
pub(super) struct ErrorEntry {
    count: u64,
    queue: u16,
    id: u16,
    status: Status,
    lba: u64,
}

impl Nvme {
    /// Keeps an error for the log; the newest comes first (figure 193).
    pub(super) fn note_error(&mut self, queue: u16, id: u16, status: Status, lba: u64) {
        self.statistics.errors += 1;
        let count = self.statistics.errors;
        self.errors.push_front(ErrorEntry { count, queue, id, status, lba });
        self.errors.truncate(ERROR_ENTRIES);
    }

    /// `Get Log Page`.
    pub(super) fn get_log_page(
        &mut self,
        bus: &mut Bus<'_>,
        command: &Command,
    ) -> Result<u32, Status> {
        let page = command.dword(10) as u8;
        let retains_event = command.dword(10) >> 15 & 1 == 1;
        let dwords =
            u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let bytes = (dwords + 1) * 4;
        let offset = u64::from(command.dword(12)) | u64::from(command.dword(13)) << 32;
        let mut data = match page {
            ERRORS => self.error_log(),
            HEALTH => self.health_log(),
            FIRMWARE => firmware_log(),
            CHANGED_NAMESPACES => self.changed_log(retains_event),
            EFFECTS => self.effects_log(),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        if offset > data.len() as u64 || !offset.is_multiple_of(4) || bytes > 1 << 20 {
            return Err(Status::INVALID_FIELD);
        }
        data.drain(..offset as usize);
        data.resize(bytes as usize, 0);
        let page_size = self.registers.page();
        let runs = data::resolve(bus, page_size, command, bytes)?;
        data::write(bus, &runs, &data);
        Ok(0)
    }

    fn error_log(&self) -> Vec<u8> {
        let mut data = vec![0; ERROR_ENTRIES * 64];
        for (entry, error) in data.chunks_exact_mut(64).zip(&self.errors) {
            entry[0..8].copy_from_slice(&error.count.to_le_bytes());
            entry[8..10].copy_from_slice(&error.queue.to_le_bytes());
            entry[10..12].copy_from_slice(&error.id.to_le_bytes());
            entry[12..14].copy_from_slice(&(error.status.bits() << 1).to_le_bytes());
            entry[14..16].copy_from_slice(&u16::MAX.to_le_bytes()); // of no parameter
            entry[16..24].copy_from_slice(&error.lba.to_le_bytes());
        }
        data
    }

    /// Figure 194.
    fn health_log(&self) -> Vec<u8> {
        let mut data = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
        let Self { statistics, errors, .. } = self;
        put(1, &313_u16.to_le_bytes()); // 40 °C, in kelvin
        put(3, &[100, 10, 3]); // spare, its threshold, used: percent
        // In thousands of 512 bytes, rounded up.
        put(32, &statistics.blocks_read.div_ceil(1000).to_le_bytes());
        put(48, &statistics.blocks_written.div_ceil(1000).to_le_bytes());
        put(64, &statistics.read_commands.to_le_bytes());
        put(80, &statistics.write_commands.to_le_bytes());
        put(112, &1_u64.to_le_bytes());
        put(160, &statistics.media_errors.to_le_bytes());
        put(176, &statistics.errors.to_le_bytes());
        debug_assert!(errors.len() as u64 <= statistics.errors);
        data
    }

    /// The namespaces that changed since this was read last (figure 198).
    fn changed_log(&mut self, retains_event: bool) -> Vec<u8> {
        let mut changed = std::mem::take(&mut self.changed_namespaces);
        changed.sort_unstable();
        changed.dedup();
        if !retains_event {
            self.event_is_masked = false;
        }
        super::identify::list(changed.into_iter())
    }

    /// Which commands there are (figure 199), all without further effects but for writing.
    fn effects_log(&self) -> Vec<u8> {
        const SUPPORTED: u32 = 1;
        const WRITES: u32 = 1 << 1;
        let mut data = vec![0; 4096];
        let mut put = |at: usize, effects: u32| {
            data[at * 4..at * 4 + 4].copy_from_slice(&effects.to_le_bytes());
        };
        for opcode in [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c] {
            put(opcode, SUPPORTED);
        }
        if self.options.shadow_doorbells {
            put(0x7c, SUPPORTED);
        }
        put(256, SUPPORTED);
        put(256 + 1, SUPPORTED | WRITES);
        put(256 + 2, SUPPORTED);
        if self.options.optional_commands {
            put(256 + 8, SUPPORTED | WRITES);
            put(256 + 9, SUPPORTED | WRITES);
        }
        data
    }
}

/// Figure 197: slot 1 is active.
fn firmware_log() -> Vec<u8> {
    let mut data = vec![0; 512];
    data[0] = 1;
    let revision = format!("{:<8}", env!("CARGO_PKG_VERSION"));
    data[8..16].copy_from_slice(revision.as_bytes());
    data
}
