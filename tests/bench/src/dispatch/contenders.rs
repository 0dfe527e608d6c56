//! What runs closures one at a time: our queues, and what one would write without them.
//!
//! A contender is a process, so what is started here is never stopped: it ends with the process.

use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;

use anyhow::Result;
use iohost_dispatch::{Block, Engine, Queue};
use iohost_driver::IODispatchQueue;
use iohost_memory::flight_recorder::Recorder;

use crate::driver::{self, Lender};

/// Something to be compared.
pub trait Contender: Sync + Sized + 'static {
    const NAME: &'static str;

    /// Starts it. Its threads run where the calling one may.
    fn start() -> Result<&'static Self>;
}

/// Runs closures one at a time, in order, on a thread of its own.
pub trait Serial: Contender {
    /// Hands over a closure and does not wait for it.
    fn run_later(&self, block: impl FnOnce() + Send + 'static);
}

/// Runs closures one at a time, for whoever waits.
pub trait Synchronous: Contender {
    /// What one calling thread needs.
    type Caller;
    fn caller(&'static self) -> Self::Caller;

    /// Runs a closure and waits for its end.
    fn run_now(caller: &Self::Caller, block: impl FnOnce() + Send + 'static);
}

/// A queue of an engine as the driver host starts it.
impl Contender for Queue {
    const NAME: &'static str = "iohost_dispatch";

    fn start() -> Result<&'static Self> {
        let engine = Box::leak(Box::new(Engine::start()?));
        Ok(Box::leak(Box::new(Queue::create(engine, "bench", Default::default())?)))
    }
}

impl Serial for Queue {
    fn run_later(&self, block: impl FnOnce() + Send + 'static) {
        self.dispatch_async(block);
    }
}

impl Synchronous for Queue {
    type Caller = &'static Self;
    fn caller(&'static self) -> &'static Self {
        self
    }

    fn run_now(queue: &&'static Self, block: impl FnOnce() + Send + 'static) {
        queue.dispatch_sync(block).expect("nobody cancels the queue");
    }
}

/// The same, with what it does recorded, as in a driver host.
pub struct RecordedQueue(Queue);

impl Contender for RecordedQueue {
    const NAME: &'static str = "iohost_dispatch, recorded";

    fn start() -> Result<&'static Self> {
        let recorder = Recorder::create()?;
        // As while the daemon looks.
        recorder.watch();
        let engine = Box::leak(Box::new(Engine::start_recorded(Arc::new(recorder))?));
        Ok(Box::leak(Box::new(Self(Queue::create(engine, "bench", Default::default())?))))
    }
}

impl Serial for RecordedQueue {
    fn run_later(&self, block: impl FnOnce() + Send + 'static) {
        self.0.dispatch_async(block);
    }
}

impl Synchronous for RecordedQueue {
    type Caller = &'static Self;
    fn caller(&'static self) -> &'static Self {
        self
    }

    fn run_now(queue: &&'static Self, block: impl FnOnce() + Send + 'static) {
        queue.0.dispatch_sync(block).expect("nobody cancels the queue");
    }
}

/// The queue of a driver, through the plugin ABI, with the driver's state.
impl Contender for IODispatchQueue<Lender> {
    const NAME: &'static str = "iohost_driver";

    fn start() -> Result<&'static Self> {
        Ok(driver::lend()?.queue)
    }
}

impl Serial for IODispatchQueue<Lender> {
    fn run_later(&self, block: impl FnOnce() + Send + 'static) {
        self.dispatch_async(move |_: &mut Lender| block());
    }
}

impl Synchronous for IODispatchQueue<Lender> {
    type Caller = &'static Self;
    fn caller(&'static self) -> &'static Self {
        self
    }

    fn run_now(queue: &&'static Self, block: impl FnOnce() + Send + 'static) {
        queue.dispatch_sync(|_| block()).expect("nobody cancels the queue");
    }
}

/// Starts the thread that runs what comes out of a channel.
fn run_all(blocks: impl IntoIterator<Item = Block> + Send + 'static) {
    thread::spawn(move || blocks.into_iter().for_each(|block| block()));
}

/// The sending end of a channel of boxed closures.
macro_rules! channel {
    ($name:literal, $sender:ty, $make:expr) => {
        impl Contender for $sender {
            const NAME: &'static str = $name;

            fn start() -> Result<&'static Self> {
                let (blocks, waiting) = $make;
                run_all(waiting);
                Ok(Box::leak(Box::new(blocks)))
            }
        }

        impl Serial for $sender {
            fn run_later(&self, block: impl FnOnce() + Send + 'static) {
                let sent = self.send(Box::new(block));
                assert!(sent.is_ok(), "the thread takes all there is");
            }
        }
    };
}

channel!("std mpsc", mpsc::Sender<Block>, mpsc::channel());
channel!("crossbeam-channel", crossbeam_channel::Sender<Block>, crossbeam_channel::unbounded());
channel!("kanal", kanal::Sender<Block>, kanal::unbounded());
channel!("flume", flume::Sender<Block>, flume::unbounded());

/// A closure at a time, from thread to thread.
#[derive(Default)]
pub struct HandOver {
    block: Mutex<Option<Block>>,
    given: Condvar,
}

impl Contender for HandOver {
    const NAME: &'static str = "mutex + condvar";

    fn start() -> Result<&'static Self> {
        let hand_over: &Self = Box::leak(Box::default());
        thread::spawn(|| {
            loop {
                let block = hand_over.block.lock().expect(NO_PANIC);
                let nothing = |block: &mut Option<Block>| block.is_none();
                let block = hand_over.given.wait_while(block, nothing).expect(NO_PANIC).take();
                block.into_iter().for_each(|block| block());
            }
        });
        Ok(hand_over)
    }
}

impl Serial for HandOver {
    fn run_later(&self, block: impl FnOnce() + Send + 'static) {
        *self.block.lock().expect(NO_PANIC) = Some(Box::new(block));
        self.given.notify_one();
    }
}

const NO_PANIC: &str = "nothing panics under the lock";

/// A thread behind a channel, and a channel for each caller to be answered by.
macro_rules! request_and_reply {
    ($module:ident, $name:ident, $reply_channel:expr) => {
        impl Synchronous for $module::Sender<Block> {
            type Caller = (&'static Self, $module::$name<()>, $module::Receiver<()>);
            fn caller(&'static self) -> Self::Caller {
                let (reply, replies) = $reply_channel;
                (self, reply, replies)
            }

            fn run_now(
                (requests, reply, replies): &Self::Caller,
                block: impl FnOnce() + Send + 'static,
            ) {
                let reply = reply.clone();
                requests.run_later(move || {
                    block();
                    let _ = reply.send(());
                });
                replies.recv().expect("the caller has a sender too");
            }
        }
    };
}

request_and_reply!(mpsc, SyncSender, mpsc::sync_channel(1));
request_and_reply!(crossbeam_channel, Sender, crossbeam_channel::bounded(1));

/// A mutex, and a call under it.
impl Contender for Mutex<()> {
    const NAME: &'static str = "lock and call";

    fn start() -> Result<&'static Self> {
        Ok(Box::leak(Box::default()))
    }
}

impl Synchronous for Mutex<()> {
    type Caller = &'static Self;
    fn caller(&'static self) -> &'static Self {
        self
    }

    fn run_now(mutex: &&'static Self, block: impl FnOnce() + Send + 'static) {
        let _locked = mutex.lock().expect(NO_PANIC);
        block();
    }
}
