//! A host for the controller: memory, queues and doorbells, with nothing checked.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use iohost_device_models::nvme::{Namespace, Nvme, Options};
use iohost_device_models::{DmaMemory, Function, InterruptKind};
use iohost_memory::SharedMemory;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Where the controller finds the memory; the first pages are for data.
pub(crate) const MEMORY: u64 = 0x10_0000;
pub(crate) const PAGE: u64 = 4096;
/// From this page on there are the queues.
const QUEUES: u64 = 16;
const PAGES: u64 = 40;

/// The admin queues have as many entries.
const ADMIN_ENTRIES: u32 = 16;

pub(crate) struct Host {
    pub(crate) function: Function<Nvme>,
    pub(crate) memory: SharedMemory,
    queues: BTreeMap<u16, Pair>,
    stride: u64,
    next_id: u16,
}

/// Where a pair is, in pages of the memory, and how far it is.
struct Pair {
    page: u64,
    entries: u32,
    tail: u32,
    head: u32,
    phase: u16,
    rings_head: bool,
}

/// A command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) opcode: u8,
    pub(crate) flags: u8,
    pub(crate) id: u16,
    pub(crate) nsid: u32,
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
    /// Dwords 10 to 12.
    pub(crate) dwords: [u32; 3],
}

/// The result, or code type and code.
pub(crate) type Answer = Result<u32, u16>;

/// How often an event was signalled since the last look.
pub(crate) fn count(event: &EventFd) -> u64 {
    match event.read() {
        Ok(count) => count,
        Err(Errno::EAGAIN) => 0,
        Err(errno) => panic!("reading an eventfd: {errno}"),
    }
}

impl Host {
    /// A controller that is not enabled, as bus master.
    pub(crate) fn new(options: Options, namespaces: Vec<Namespace>) -> Self {
        let stride = 4 << options.doorbell_stride;
        let function = Function::new(Nvme::new(options, namespaces));
        let memory = SharedMemory::create(c"dma", (PAGES * PAGE) as usize).unwrap();
        function.dma_map(MEMORY, DmaMemory::try_from(&memory).unwrap()).unwrap();
        function.config_write(0x04, &0x0006_u16.to_le_bytes()).unwrap();
        Self { function, memory, queues: BTreeMap::new(), stride, next_id: 0 }
    }

    pub(crate) fn started(options: Options, namespaces: Vec<Namespace>) -> Self {
        let mut host = Self::new(options, namespaces);
        host.enable();
        host
    }

    pub(crate) fn enable(&mut self) {
        self.queues.clear();
        self.add_pair(0, ADMIN_ENTRIES);
        let sizes = (ADMIN_ENTRIES - 1) | (ADMIN_ENTRIES - 1) << 16;
        self.write(0x24, sizes);
        self.write_long(0x28, self.place(QUEUES));
        self.write_long(0x30, self.place(QUEUES + 1));
        self.write(0x14, 6 << 16 | 4 << 20 | 1);
        assert_eq!(self.read(0x1c), 1, "CSTS");
    }

    /// Makes an I/O queue pair.
    pub(crate) fn make_queue_pair(&mut self, id: u16, entries: u32, vector: Option<u32>) {
        self.add_pair(id, entries);
        let page = self.queues[&id].page;
        let dw10 = u32::from(id) | (entries - 1) << 16;
        let interrupt = vector.map_or(0, |vector| 2 | vector << 16);
        assert_eq!(self.admin(0x05, 0, self.place(page + 1), 0, [dw10, 1 | interrupt]), Ok(0));
        let completion = 1 | u32::from(id) << 16;
        assert_eq!(self.admin(0x01, 0, self.place(page), 0, [dw10, completion]), Ok(0));
    }

    /// Makes room for a pair, of which the controller hears nothing.
    pub(crate) fn add_pair(&mut self, id: u16, entries: u32) {
        let page = QUEUES + 2 * u64::from(id);
        self.memory.write_at((page * PAGE) as usize, &[0; 2 * PAGE as usize]);
        let pair = Pair { page, entries, tail: 0, head: 0, phase: 1, rings_head: true };
        self.queues.insert(id, pair);
    }

    fn place(&self, page: u64) -> u64 {
        MEMORY + page * PAGE
    }

    /// A command for namespace 1 and the first pages of the memory.
    pub(crate) fn io(&self, opcode: u8, first: u64, blocks: u32) -> Entry {
        let dwords = [first as u32, (first >> 32) as u32, blocks - 1];
        Entry { opcode, nsid: 1, prp1: MEMORY, prp2: MEMORY + PAGE, dwords, ..Entry::default() }
    }

    pub(crate) fn submit(&mut self, queue: u16, entry: &Entry) {
        self.submit_quietly(queue, entry);
        let tail = self.queues[&queue].tail;
        self.ring_tail(queue, tail);
    }

    pub(crate) fn submit_quietly(&mut self, queue: u16, entry: &Entry) {
        let mut bytes = [0; 64];
        bytes[0] = entry.opcode;
        bytes[1] = entry.flags;
        bytes[2..4].copy_from_slice(&entry.id.to_le_bytes());
        bytes[4..8].copy_from_slice(&entry.nsid.to_le_bytes());
        bytes[24..32].copy_from_slice(&entry.prp1.to_le_bytes());
        bytes[32..40].copy_from_slice(&entry.prp2.to_le_bytes());
        for (at, dword) in (40..).step_by(4).zip(entry.dwords) {
            bytes[at..at + 4].copy_from_slice(&dword.to_le_bytes());
        }
        let pair = self.queues.get_mut(&queue).unwrap();
        let at = pair.page * PAGE + u64::from(pair.tail) * 64;
        self.memory.write_at(at as usize, &bytes);
        pair.tail = (pair.tail + 1) % pair.entries;
    }

    pub(crate) fn ring_tail(&self, queue: u16, tail: u32) {
        self.write(0x1000 + 2 * u64::from(queue) * self.stride, tail);
    }

    /// The next completion: the command's id and its outcome.
    pub(crate) fn completion(&mut self, queue: u16) -> Option<(u16, Answer)> {
        let pair = self.queues.get_mut(&queue).unwrap();
        let at = (pair.page + 1) * PAGE + u64::from(pair.head) * 16;
        let mut entry = [0; 16];
        self.memory.read_at(at as usize, &mut entry);
        let status = u16::from_le_bytes([entry[14], entry[15]]);
        if status & 1 != pair.phase {
            return None;
        }
        pair.head = (pair.head + 1) % pair.entries;
        if pair.head == 0 {
            pair.phase ^= 1;
        }
        let (head, rings) = (pair.head, pair.rings_head);
        if rings {
            self.ring_head(queue, head);
        }
        let id = u16::from_le_bytes([entry[12], entry[13]]);
        let result = u32::from_le_bytes(entry[0..4].try_into().unwrap());
        let code = status >> 1 & 0x7ff;
        Some((id, if code == 0 { Ok(result) } else { Err(code) }))
    }

    /// Tells the controller no more of completions that were taken.
    pub(crate) fn hold_doorbells(&mut self, queue: u16) {
        self.queues.get_mut(&queue).unwrap().rings_head = false;
    }

    pub(crate) fn let_doorbells_go(&mut self, queue: u16) {
        let pair = self.queues.get_mut(&queue).unwrap();
        pair.rings_head = true;
        let head = pair.head;
        self.ring_head(queue, head);
    }

    fn ring_head(&self, queue: u16, head: u32) {
        self.write(0x1000 + (2 * u64::from(queue) + 1) * self.stride, head);
    }

    /// Submits a command and takes its completion.
    pub(crate) fn run(&mut self, queue: u16, entry: &Entry) -> Answer {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        self.submit(queue, &Entry { id, ..*entry });
        let (completed, answer) = self.completion(queue).expect("a completion");
        assert_eq!(completed, id);
        answer
    }

    pub(crate) fn admin(
        &mut self,
        opcode: u8,
        nsid: u32,
        prp1: u64,
        prp2: u64,
        [dw10, dw11]: [u32; 2],
    ) -> Answer {
        let dwords = [dw10, dw11, 0];
        self.run(0, &Entry { opcode, nsid, prp1, prp2, dwords, ..Entry::default() })
    }

    /// A structure of `Identify`.
    pub(crate) fn identify(&mut self, cns: u32, nsid: u32) -> Result<Vec<u8>, u16> {
        self.admin(0x06, nsid, MEMORY, 0, [cns, 0])?;
        Ok(self.bytes(0, 4096))
    }

    pub(crate) fn log_page(&mut self, page: u32, len: u32) -> Result<Vec<u8>, u16> {
        self.admin(0x02, u32::MAX, MEMORY, 0, [page | (len / 4 - 1) << 16, 0])?;
        Ok(self.bytes(0, len as usize))
    }

    pub(crate) fn enable_kind(&self, kind: InterruptKind) -> EventFd {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        self.function.set_irqs(kind, &[event.as_fd()]).unwrap();
        event
    }

    pub(crate) fn enable_messages(&self, count: usize) -> Vec<EventFd> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let events: Vec<_> = (0..count).map(|_| EventFd::from_flags(flags).unwrap()).collect();
        let triggers: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        self.function.set_irqs(InterruptKind::MsiX, &triggers).unwrap();
        events
    }

    pub(crate) fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_at(at, &mut data);
        data
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub(crate) fn read_long(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data).unwrap();
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.function.bar_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn write_long(&self, offset: u64, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()).unwrap();
    }
}
