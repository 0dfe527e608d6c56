//! Clients: a session's data queues, and its memory, which the controller has too.

use std::collections::VecDeque;

use block_api::{
    COMPLETIONS, Completion, Failure, MOST_MEMORIES, MOST_MEMORY, REQUEST_LENGTH, REQUESTS, Status,
};
use iohost_driver::prelude::*;
use iohost_driver::{ClientMemory, Consumer, Producer, QueueError};

use crate::Nvme;
use crate::io_queue::Ended;
use crate::memory::PAGE;

/// One session.
pub struct Client {
    session: SessionId,
    /// Which driver this is for it: a request for the one before us is not ours to do.
    pub generation: u64,
    /// Its number among all sessions there were, which spreads them over the queues.
    pub turn: usize,
    requests: IODataQueueDispatchSource<Consumer>,
    completions: IODataQueueDispatchSource<Producer>,
    /// By number.
    memories: Vec<Option<Memory>>,
    /// Requests taken and not answered. Its memory is the controller's until there are none.
    pub under_way: usize,
    /// There may be requests that we did not want to take yet.
    pub has_more: bool,
    /// Completions that found no room.
    unsent: VecDeque<Vec<u8>>,
    must_notify: bool,
    /// It announces no requests, because we look for them.
    is_polled: bool,
    is_closed: bool,
}

/// Memory of a session, mapped for the controller as long as it is here.
struct Memory {
    prepared: PreparedDma,
    bytes: u64,
}

/// What one turn takes of a client's requests, at most.
const BATCH: usize = 64;

impl Client {
    /// Where the controller finds bytes of a memory.
    #[inline]
    pub fn address(&self, memory: u16, at: u64, length: u64) -> Result<u64, Failure> {
        let found = self.memories.get(usize::from(memory)).and_then(Option::as_ref);
        let found = found.ok_or_else(|| {
            Failure::new(Status::NoSuchMemory, format!("there is no memory {memory}"))
        })?;
        match at.checked_add(length) {
            Some(end) if end <= found.bytes => Ok(found.prepared.address() + at),
            _ => Err(Failure::new(
                Status::NoSuchMemory,
                format!("{length} bytes at {at} of memory {memory}, which has {}", found.bytes),
            )),
        }
    }

    /// Takes up to `most` requests, as they are. Whether there can be more.
    pub fn take(&mut self, most: usize, into: &mut Vec<Entry>) -> bool {
        // A client that takes none of its completions is given none.
        if self.is_closed || !self.send_what_waits() {
            return false;
        }
        let taken = self.requests.dequeue_batch(most.min(BATCH), |entry| {
            let mut bytes = [0; REQUEST_LENGTH];
            let len = entry.size().min(REQUEST_LENGTH);
            let is_whole = entry.size() == REQUEST_LENGTH;
            let read = entry.read_at(0, &mut bytes[..len]);
            debug_assert!(read.is_ok(), "as long as the entry");
            into.push(Entry { bytes, is_whole });
        });
        self.has_more = match taken {
            // What comes now is not announced, and we look again by ourselves.
            Ok(count) if self.is_polled => count == most.min(BATCH),
            Ok(_) => true,
            // A queue that is empty, broken or over has no more; the first will tell us when it has.
            Err(_) => false,
        };
        self.has_more
    }

    /// Whether there seem to be requests to take.
    #[inline]
    pub fn has_requests(&self) -> bool {
        self.has_more || self.requests.is_data_available()
    }

    /// Its requests are looked for from here on.
    #[inline]
    pub fn begin_polling(&mut self) {
        if !self.is_polled {
            self.is_polled = true;
            self.requests.begin_polling();
        }
    }

    /// Its requests are to be announced again. There may be some that were not.
    pub fn end_polling(&mut self) {
        if std::mem::take(&mut self.is_polled) {
            self.requests.end_polling();
            self.has_more = true;
        }
    }

    /// Puts completions into the queue back, together, and keeps those for which there is no room.
    pub fn answer_all(&mut self, ended: &[Ended]) {
        self.under_way -= ended.len();
        let mut sent = 0;
        if self.unsent.is_empty() {
            let put = self.completions.enqueue_batch(|batch| {
                for Ended { tag, failure, .. } in ended {
                    let put = match failure {
                        None => batch.enqueue(&Completion::done(*tag)),
                        Some(failure) => batch.enqueue(&Completion::failed(*tag, failure)),
                    };
                    if matches!(put, Err(QueueError::Overrun { .. })) {
                        break;
                    }
                    sent += 1;
                }
            });
            // A queue that is broken or over takes everything.
            if put.is_err() {
                sent = ended.len();
            }
        }
        for Ended { tag, failure, .. } in &ended[sent..] {
            self.unsent.push_back(match failure {
                None => Completion::done(*tag).to_vec(),
                Some(failure) => Completion::failed(*tag, failure),
            });
        }
    }

    /// Says that a request was not begun.
    pub fn refuse(&mut self, tag: u64, failure: Failure) {
        self.answer_all(&[Ended { client: 0, tag, failure: Some(failure) }]);
    }

    /// Whether everything that waited is sent.
    fn send_what_waits(&mut self) -> bool {
        while let Some(entry) = self.unsent.pop_front() {
            if !self.enqueue(&entry) {
                self.unsent.push_front(entry);
                return false;
            }
        }
        true
    }

    /// Whether there was room. A queue that is broken or over takes everything.
    #[inline]
    fn enqueue(&mut self, entry: &[u8]) -> bool {
        let fill = |slot: &mut iohost_driver::Slot<'_>| slot.write_at(0, entry);
        let sent = self.completions.enqueue_with_coalesce(entry.len(), &mut self.must_notify, fill);
        !matches!(sent, Err(QueueError::Overrun { .. }))
    }

    fn notify(&mut self) {
        if std::mem::take(&mut self.must_notify) {
            self.completions.send_data_available();
        }
    }
}

/// An entry of a client's queue; `bytes` is filled as far as there was something.
pub struct Entry {
    pub bytes: [u8; REQUEST_LENGTH],
    pub is_whole: bool,
}

/// All sessions, at places that stay theirs.
#[derive(Default)]
pub struct Clients {
    places: Vec<Option<Client>>,
    turns: usize,
}

impl Clients {
    pub fn open(&mut self, mut session: Session, queue: &IODispatchQueue<Nvme>) -> Result<()> {
        let id = session.id();
        let (requests, completions) = (session.consumer(REQUESTS)?, session.producer(COMPLETIONS)?);
        let handler = move |nvme: &mut Nvme| nvme.serve(id);
        let client = Client {
            session: id,
            generation: session.generation(),
            turn: self.turns,
            requests: IODataQueueDispatchSource::create(requests, queue, handler)?,
            completions: IODataQueueDispatchSource::create(completions, queue, handler)?,
            memories: Vec::new(),
            under_way: 0,
            has_more: true,
            unsent: VecDeque::new(),
            must_notify: false,
            is_polled: false,
            is_closed: false,
        };
        self.turns += 1;
        match self.places.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(client),
            None => self.places.push(Some(client)),
        }
        Ok(())
    }

    /// Memory for a client to map, the same each time. See [`block_api::memory_type`].
    pub fn memory(
        &mut self,
        session: SessionId,
        memory_type: u64,
        device: &IOPCIDevice,
    ) -> Result<ClientMemory> {
        let (number, bytes) = block_api::memory_of_type(memory_type);
        let client = self.place(session).and_then(|place| self.get(place));
        let client = client.ok_or(IOReturn::NOT_FOUND)?;
        ensure!(
            number < MOST_MEMORIES,
            IOReturn::BAD_ARGUMENT,
            "memory {number}, there can be {MOST_MEMORIES}"
        );
        let place = usize::from(number);
        if client.memories.len() <= place {
            client.memories.resize_with(place + 1, || None);
        }
        if let Some(memory) = &client.memories[place] {
            ensure!(
                memory.bytes == bytes,
                IOReturn::BAD_ARGUMENT,
                "memory {number} has {} bytes, not {bytes}",
                memory.bytes
            );
            return ClientMemory::read_write(memory.prepared.memory());
        }
        let others: u64 = client.memories.iter().flatten().map(|memory| memory.bytes).sum();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(PAGE as u64) && bytes <= MOST_MEMORY - others,
            IOReturn::BAD_ARGUMENT,
            "{bytes} bytes beside {others}: it has to be whole pages, {MOST_MEMORY} at most"
        );
        let buffer = IOBufferMemoryDescriptor::create(bytes as usize)?;
        let prepared = IODMACommand::create(device, 0)?.prepare_for_dma(buffer)?;
        ensure!(
            prepared.segments().len() == 1,
            IOReturn::INTERNAL_ERROR,
            "a buffer is in {} segments",
            prepared.segments().len()
        );
        let memory = ClientMemory::read_write(prepared.memory())?;
        client.memories[place] = Some(Memory { prepared, bytes });
        Ok(memory)
    }

    pub fn close(&mut self, session: SessionId) {
        if let Some(place) = self.place(session) {
            if let Some(client) = self.get(place) {
                client.is_closed = true;
            }
            self.forget_if_done(place);
        }
    }

    /// Lets go of a closed client's memory once the controller does not write there any more.
    pub fn forget_if_done(&mut self, place: usize) {
        if self.get(place).is_some_and(|client| client.is_closed && client.under_way == 0) {
            self.places[place] = None;
        }
    }

    pub fn place(&self, session: SessionId) -> Option<usize> {
        let is_it = |client: &Option<Client>| client.as_ref().is_some_and(|c| c.session == session);
        self.places.iter().position(is_it)
    }

    #[inline]
    pub fn get(&mut self, place: usize) -> Option<&mut Client> {
        self.places.get_mut(place)?.as_mut()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Client> {
        self.places.iter_mut().flatten()
    }

    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Tells those who were answered, once each.
    pub fn notify(&mut self) {
        self.places.iter_mut().flatten().for_each(Client::notify);
    }
}
