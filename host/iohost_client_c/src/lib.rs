//! `libiohost`: the client library for C programs, behind `include/iohost.h`.
//!
//! The header is the documentation, and the contract that `abi` rests on. Everything that a
//! C program has is one of the objects below, behind a pointer.

mod abi;
mod status;

use iohost_client::{ClientMemory, Daemon, QueueConsumer, QueueProducer, Session};

/// `iohost_daemon`.
struct DaemonObject(Daemon);

/// `iohost_session`.
struct SessionObject(Session);

/// `iohost_producer`.
struct ProducerObject(QueueProducer);

/// `iohost_consumer`.
struct ConsumerObject {
    queue: QueueConsumer,
    /// The latest entry; taken from the queue and not yet by the caller if `is_held`.
    entry: Vec<u8>,
    is_held: bool,
}

/// `iohost_memory`.
struct MemoryObject(ClientMemory);
