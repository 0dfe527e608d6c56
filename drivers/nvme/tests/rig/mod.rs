//! A client of the driver, on an emulated controller, step by step.

#![allow(dead_code, reason = "each test file uses its part of it")]

use std::time::Duration;

use block_api::{Completion, Disk, Failure, Operation, REQUESTS, Request, Status};
use iohost_device_models::nvme::{Namespace, Nvme as Model, Options};
use iohost_driver::{Consumer, Producer, SharedMemory};
use iohost_testkit::{Rig, RigSession};
use nvme::Nvme;

/// Bytes of the client's memory.
pub(crate) const MEMORY: usize = 4 << 20;

pub(crate) struct Client {
    pub(crate) rig: Rig<Nvme, Model>,
    session: Option<RigSession>,
    requests: Producer,
    completions: Consumer,
    pub(crate) memory: SharedMemory,
    next_tag: u64,
}

pub(crate) fn disk(block: u32, blocks: u64) -> Namespace {
    Namespace::in_memory(block, blocks).unwrap()
}

/// A client of a controller with one disk of 2048 blocks of 512 bytes.
pub(crate) fn client() -> Client {
    Client::of(Options::default(), vec![disk(512, 2048)])
}

/// A request for the first disk and the start of the memory, by its bytes.
pub(crate) fn request(operation: Operation, offset: u64, length: u64) -> Request {
    Request {
        tag: 0,
        operation,
        is_polled: false,
        memory: 0,
        disk: 1,
        offset,
        length,
        at: 0,
        generation: 1,
    }
}

impl Client {
    pub(crate) fn of(options: Options, namespaces: Vec<Namespace>) -> Self {
        Self::on(Rig::start(Model::new(options, namespaces)).unwrap())
    }

    pub(crate) fn on(mut rig: Rig<Nvme, Model>) -> Self {
        rig.settle();
        let mut session = rig.open_session(16384).unwrap();
        let memory_type = block_api::memory_type(0, MEMORY as u64);
        Self {
            memory: rig.map_memory(&session, memory_type).unwrap(),
            requests: session.producer(REQUESTS),
            completions: session.consumer(block_api::COMPLETIONS),
            session: Some(session),
            next_tag: 0,
            rig,
        }
    }

    /// Sends a request under a tag of its own, and lets nothing happen.
    pub(crate) fn send(&mut self, request: Request) -> u64 {
        self.next_tag += 1;
        let request = Request { tag: self.next_tag, ..request };
        self.requests.enqueue(&request.to_bytes()).unwrap();
        self.next_tag
    }

    pub(crate) fn send_raw(&mut self, entry: &[u8]) {
        self.requests.enqueue(entry).unwrap();
    }

    /// The completions there are, without the driver doing anything.
    pub(crate) fn completions(&mut self) -> Vec<Completion> {
        let mut found = Vec::new();
        let mut entry = Vec::new();
        while self.completions.dequeue(&mut entry).is_ok() {
            found.push(Completion::from_bytes(&entry).unwrap());
        }
        found
    }

    /// Sends a request and has everything happen that can; panics when it is not answered then.
    pub(crate) fn run(&mut self, request: Request) -> Result<(), Failure> {
        let tag = self.send(request);
        self.rig.settle();
        let completions = self.completions();
        let [completion] = &completions[..] else { panic!("{completions:?} for {request:?}") };
        assert_eq!(completion.tag, tag);
        completion.outcome.clone()
    }

    /// The kind of failure that a request ends in.
    pub(crate) fn failure(&mut self, request: Request) -> Status {
        self.run(request).expect_err("a failure").status
    }

    /// Time passes, up to so many seconds, until there is a completion.
    pub(crate) fn wait(&mut self, seconds: u32) -> Vec<Completion> {
        let mut found = self.completions();
        for _ in 0..seconds * 4 {
            if !found.is_empty() {
                break;
            }
            self.rig.advance(Duration::from_millis(250));
            found = self.completions();
        }
        found
    }

    pub(crate) fn fill(&self, at: usize, len: usize, seed: u8) -> Vec<u8> {
        let byte = |at: usize| (at as u8).wrapping_mul(7) ^ (at >> 8) as u8 ^ seed;
        let data: Vec<u8> = (0..len).map(byte).collect();
        self.memory.write_at(at, &data);
        data
    }

    pub(crate) fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_at(at, &mut data);
        data
    }

    /// What is on a disk.
    pub(crate) fn on_disk(&self, disk: u32, offset: u64, len: usize) -> Vec<u8> {
        self.rig.model(|model, _| model.namespace(disk).unwrap().peek(offset, len))
    }

    pub(crate) fn disks(&self) -> Vec<u32> {
        let mut answer = self.rig.client::<block_api::Client>().disks();
        self.rig.settle();
        let numbers = answer.poll().unwrap().unwrap();
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        numbers.chunks(4).map(number).collect()
    }

    pub(crate) fn describe(&self, disk: u32) -> Disk {
        let mut answer = self.rig.client::<block_api::Client>().describe(disk);
        self.rig.settle();
        Disk::from_bytes(&answer.poll().unwrap().unwrap()).unwrap()
    }

    pub(crate) fn close(&mut self) {
        self.rig.close_session(self.session.take().unwrap());
        self.rig.settle();
    }
}
