//! I/O commands of the NVM command set (section 6).

use super::command::{Command, Status};
use super::{Namespace, Nvme, data};
use crate::model::Bus;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// `Flush` of all namespaces.
const BROADCAST: u32 = u32::MAX;

impl Nvme {
    pub(super) fn execute_io(&mut self, bus: &mut Bus<'_>, queue: u16, command: Command) {
        let result = command.check_flags(self.options.sgls).and_then(|()| self.io(bus, &command));
        if matches!(result, Err(Status::UNRECOVERED_READ | Status::WRITE_FAULT)) {
            self.statistics.media_errors += 1;
        }
        self.complete(bus, queue, command.id, result.map(|()| 0));
    }

    fn io(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<(), Status> {
        if command.opcode == FLUSH && command.nsid == BROADCAST {
            // All of them, also after one that fails.
            let failed = self.namespaces.values_mut().filter_map(|it| (!it.flush()).then_some(()));
            return done(failed.count() == 0);
        }
        let namespace = self.namespaces.get_mut(&command.nsid).ok_or(Status::INVALID_NAMESPACE)?;
        let optional = self.options.optional_commands;
        match command.opcode {
            FLUSH => done(namespace.flush()),
            READ | WRITE => self.transfer(bus, command),
            WRITE_ZEROES if optional => {
                let (first, count) = blocks(command);
                check_write(namespace, first, count)?;
                self.statistics.write_commands += 1;
                namespace.clear(first, count).map_err(|_| Status::WRITE_FAULT)
            }
            DATASET_MANAGEMENT if optional => self.deallocate(bus, command),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Sections 6.9 and 6.15.
    fn transfer(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<(), Status> {
        let page = self.registers.page();
        let namespace = self.namespaces.get_mut(&command.nsid).ok_or(Status::INVALID_NAMESPACE)?;
        let (first, count) = blocks(command);
        let bytes = count * namespace.block();
        if self.options.mdts > 0 && bytes > 4096 << self.options.mdts {
            return Err(Status::INVALID_FIELD);
        }
        let units = bytes / 512;
        if command.opcode == READ {
            if !namespace.has(first, count) {
                return Err(Status::OUT_OF_RANGE);
            }
            let runs = data::resolve(bus, page, command, bytes)?;
            let mut data = vec![0; bytes as usize];
            namespace.read(first, &mut data).map_err(|_| Status::UNRECOVERED_READ)?;
            data::write(bus, &runs, &data);
            self.statistics.read_commands += 1;
            self.statistics.blocks_read += units;
            return Ok(());
        }
        check_write(namespace, first, count)?;
        let runs = data::resolve(bus, page, command, bytes)?;
        namespace.write(first, &data::read(bus, &runs)).map_err(|_| Status::WRITE_FAULT)?;
        self.statistics.write_commands += 1;
        self.statistics.blocks_written += units;
        let force_unit_access = command.dword(12) >> 30 & 1 == 1;
        done(!force_unit_access || namespace.flush())
    }

    /// Dataset management (section 6.7); all but "deallocate" are hints that change nothing.
    fn deallocate(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<(), Status> {
        let ranges = u64::from(command.dword(10) & 0xff) + 1;
        let page = self.registers.page();
        let runs = data::resolve(bus, page, command, ranges * 16)?;
        let list = data::read(bus, &runs);
        if command.dword(11) & 1 << 2 == 0 {
            return Ok(());
        }
        let namespace = self.namespaces.get_mut(&command.nsid).ok_or(Status::INVALID_NAMESPACE)?;
        let range = |entry: &[u8]| {
            let count = u32::from_le_bytes(entry[4..8].try_into().expect("four bytes"));
            let first = u64::from_le_bytes(entry[8..16].try_into().expect("eight bytes"));
            (first, u64::from(count))
        };
        let ranges: Vec<_> = list.chunks_exact(16).map(range).collect();
        for (first, count) in &ranges {
            check_write(namespace, *first, *count)?;
        }
        for (first, count) in ranges {
            namespace.clear(first, count).map_err(|_| Status::WRITE_FAULT)?;
        }
        self.statistics.write_commands += 1;
        Ok(())
    }
}

/// First block and how many, of a command that has them in dwords 10 to 12.
fn blocks(command: &Command) -> (u64, u64) {
    let first = u64::from(command.dword(10)) | u64::from(command.dword(11)) << 32;
    (first, u64::from(command.dword(12) & 0xffff) + 1)
}

fn check_write(namespace: &Namespace, first: u64, count: u64) -> Result<(), Status> {
    if !namespace.has(first, count) {
        return Err(Status::OUT_OF_RANGE);
    }
    if namespace.is_read_only() { Err(Status::WRITE_PROTECTED) } else { Ok(()) }
}

fn done(is_done: bool) -> Result<(), Status> {
    if is_done { Ok(()) } else { Err(Status::INTERNAL_ERROR) }
}
