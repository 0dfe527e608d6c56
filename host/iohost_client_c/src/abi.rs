//! The functions of `include/iohost.h`: everything that crosses, and nothing else.
//!
//! # The contract this module rests on
//!
//! The C program promises, in the header:
//!
//! 1. An object it passes is one that we gave it and that it has not closed; it closes each once.
//!    Sessions and memory may be used by several threads at once, other objects by one at a time.
//! 2. A pointer and a count are valid for the call, for reading, or for writing where we write.
//!    Texts end with a zero.
//! 3. Pointers for results can be written, or are null where the header says so.
//!
//! Our side: an object is a `Box` turned into a pointer; no pointer is kept beyond the call; a null
//! pointer is an error, not a crash; no panic crosses, since `extern "C"` ends the process.

#![expect(unsafe_code)]
// UNSAFETY: the other side of every call here is foreign code.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::slice;
use std::time::Duration;

use iohost_client::{DEFAULT_SOCKET, Daemon};
use iohost_interface::{Arguments, IOReturn, ToClient, ToDriver};

use crate::status::{Problem, finish, latest_words, words_of};
use crate::{ConsumerObject, DaemonObject, MemoryObject, ProducerObject, SessionObject};

type Result<T> = std::result::Result<T, Problem>;

#[unsafe(no_mangle)]
extern "C" fn iohost_error_text() -> *const c_char {
    latest_words()
}

#[unsafe(no_mangle)]
extern "C" fn iohost_status_name(status: i32) -> *const c_char {
    words_of(status).as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_connect(socket: *const c_char, daemon: *mut *mut DaemonObject) -> i32 {
    finish((|| {
        let socket = match socket.is_null() {
            true => DEFAULT_SOCKET,
            // SAFETY: contract 2.
            false => unsafe { text(socket) }?,
        };
        let connected = || Ok(DaemonObject(Daemon::connect(socket)?));
        // SAFETY: contract 3.
        unsafe { give(daemon, connected) }
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_disconnect(daemon: *mut DaemonObject) {
    // SAFETY: contract 1.
    unsafe { close(daemon) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_open(
    daemon: *mut DaemonObject,
    service: *const c_char,
    queue_bytes: *const u32,
    queue_count: usize,
    session: *mut *mut SessionObject,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let daemon = unsafe { object_mut(daemon) }?;
        // SAFETY: contract 2.
        let service = unsafe { text(service) }?;
        let sizes = match queue_bytes.is_null() {
            true => None,
            // SAFETY: contract 2.
            false => Some(unsafe { elements(queue_bytes, queue_count) }?),
        };
        let opened = || {
            Ok(SessionObject(match sizes {
                None => daemon.0.open(service)?,
                Some(sizes) => daemon.0.open_with_queues(service, sizes)?,
            }))
        };
        // SAFETY: contract 3.
        unsafe { give(session, opened) }
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_close(session: *mut SessionObject) {
    // SAFETY: contract 1.
    unsafe { close(session) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_generation(session: *const SessionObject) -> u64 {
    // SAFETY: contract 1.
    unsafe { object(session) }.map_or(0, |session| session.0.generation())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_call(
    session: *mut SessionObject,
    selector: u64,
    scalars: *const u64,
    scalar_count: usize,
    structure: *const c_void,
    structure_bytes: usize,
    result_scalars: *mut u64,
    result_scalar_count: *mut usize,
    result_structure: *mut c_void,
    result_structure_bytes: *mut usize,
    timeout_ns: u64,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let session = unsafe { object(session) }?;
        // SAFETY: contract 2.
        let scalars = unsafe { elements(scalars, scalar_count) }?.to_vec();
        // SAFETY: contract 2.
        let structure = unsafe { elements(structure.cast::<u8>(), structure_bytes) }?.to_vec();
        let arguments = Arguments { scalars, structure, ..Default::default() };
        let results = session.0.call(selector, arguments).wait(limit(timeout_ns))?;
        // SAFETY: contracts 2 and 3.
        let scalars = unsafe { put(&results.scalars, result_scalars, result_scalar_count) };
        let place = result_structure.cast::<u8>();
        // SAFETY: contracts 2 and 3.
        let structure = unsafe { put(&results.structure, place, result_structure_bytes) };
        scalars.and(structure)
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_producer_open(
    session: *mut SessionObject,
    place: usize,
    producer: *mut *mut ProducerObject,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let session = unsafe { object(session) }?;
        let opened = || Ok(ProducerObject(session.0.producer(ToDriver(place))?));
        // SAFETY: contract 3.
        unsafe { give(producer, opened) }
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_producer_close(producer: *mut ProducerObject) {
    // SAFETY: contract 1.
    unsafe { close(producer) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_send(
    producer: *mut ProducerObject,
    data: *const c_void,
    bytes: usize,
    timeout_ns: u64,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let producer = &mut unsafe { object_mut(producer) }?.0;
        // SAFETY: contract 2.
        let data = unsafe { elements(data.cast::<u8>(), bytes) }?;
        if timeout_ns == 0 {
            return match producer.try_send(data)? {
                true => Ok(()),
                false => Err(Problem::new(IOReturn::TIMEOUT, "the queue has no room now")),
            };
        }
        Ok(producer.send_within(data, limit(timeout_ns).unwrap_or(Duration::MAX))?)
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_producer_fd(producer: *const ProducerObject) -> c_int {
    // SAFETY: contract 1.
    match unsafe { object(producer) } {
        Ok(producer) => producer.0.as_raw_fd(),
        Err(_) => -1,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_consumer_open(
    session: *mut SessionObject,
    place: usize,
    consumer: *mut *mut ConsumerObject,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let session = unsafe { object(session) }?;
        let opened = || {
            let queue = session.0.consumer(ToClient(place))?;
            Ok(ConsumerObject { queue, entry: Vec::new(), is_held: false })
        };
        // SAFETY: contract 3.
        unsafe { give(consumer, opened) }
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_consumer_close(consumer: *mut ConsumerObject) {
    // SAFETY: contract 1.
    unsafe { close(consumer) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_receive(
    consumer: *mut ConsumerObject,
    data: *mut c_void,
    bytes: *mut usize,
    timeout_ns: u64,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let consumer = unsafe { object_mut(consumer) }?;
        if bytes.is_null() {
            return Err(null());
        }
        consumer.hold_next(timeout_ns)?;
        // SAFETY: contracts 2 and 3.
        unsafe { put(&consumer.entry, data.cast::<u8>(), bytes) }?;
        consumer.is_held = false;
        Ok(())
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_consumer_fd(consumer: *const ConsumerObject) -> c_int {
    // SAFETY: contract 1.
    match unsafe { object(consumer) } {
        Ok(consumer) => consumer.queue.as_raw_fd(),
        Err(_) => -1,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_map_memory(
    session: *mut SessionObject,
    memory_type: u64,
    bytes: usize,
    memory: *mut *mut MemoryObject,
) -> i32 {
    finish((|| {
        // SAFETY: contract 1.
        let session = unsafe { object(session) }?;
        let expected = (bytes != 0).then_some(bytes);
        let mapped = || Ok(MemoryObject(session.0.map_memory(memory_type, expected)?));
        // SAFETY: contract 3.
        unsafe { give(memory, mapped) }
    })())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_unmap_memory(memory: *mut MemoryObject) {
    // SAFETY: contract 1.
    unsafe { close(memory) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_memory_address(memory: *const MemoryObject) -> *mut c_void {
    // SAFETY: contract 1.
    match unsafe { object(memory) } {
        Ok(memory) => memory.0.address().cast(),
        Err(_) => std::ptr::null_mut(),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_memory_bytes(memory: *const MemoryObject) -> usize {
    // SAFETY: contract 1.
    unsafe { object(memory) }.map_or(0, |memory| memory.0.len())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn iohost_memory_is_writable(memory: *const MemoryObject) -> bool {
    // SAFETY: contract 1.
    unsafe { object(memory) }.is_ok_and(|memory| memory.0.is_writable())
}

impl ConsumerObject {
    /// Makes sure that an entry is held.
    fn hold_next(&mut self, timeout_ns: u64) -> Result<()> {
        if self.is_held {
            return Ok(());
        }
        if timeout_ns != 0 {
            let timeout = limit(timeout_ns).unwrap_or(Duration::MAX);
            self.queue.receive_within(&mut self.entry, timeout)?;
        } else if !self.queue.try_receive(&mut self.entry)? {
            return Err(Problem::new(IOReturn::TIMEOUT, "the queue is empty now"));
        }
        self.is_held = true;
        Ok(())
    }
}

/// `None` for `IOHOST_FOREVER`.
fn limit(timeout_ns: u64) -> Option<Duration> {
    (timeout_ns != u64::MAX).then(|| Duration::from_nanos(timeout_ns))
}

fn null() -> Problem {
    Problem::new(IOReturn::BAD_ARGUMENT, "a null pointer where none may be")
}

/// # Safety
///
/// Contract 2 holds for `text`, unless it is null.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(null());
    }
    // SAFETY: the caller's promise, and not null.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Problem::new(IOReturn::BAD_ARGUMENT, "a text that is not UTF-8"))
}

/// # Safety
///
/// Contract 2 holds for `first` and `count`, unless `first` is null.
unsafe fn elements<'a, T>(first: *const T, count: usize) -> Result<&'a [T]> {
    match (count, first.is_null()) {
        (0, _) => Ok(&[]),
        (_, true) => Err(null()),
        // SAFETY: the caller's promise, and not null.
        (_, false) => Ok(unsafe { slice::from_raw_parts(first, count) }),
    }
}

/// # Safety
///
/// Contract 1 holds for `object`, unless it is null.
unsafe fn object<'a, T>(object: *const T) -> Result<&'a T> {
    // SAFETY: the caller's promise: made by `give` and not closed.
    unsafe { object.as_ref() }.ok_or_else(null)
}

/// # Safety
///
/// Contract 1 holds for `object`, of a kind that one thread uses at a time, unless it is null.
unsafe fn object_mut<'a, T>(object: *mut T) -> Result<&'a mut T> {
    // SAFETY: the caller's promise: made by `give`, not closed, and nobody else uses it.
    unsafe { object.as_mut() }.ok_or_else(null)
}

/// Makes an object and gives it to the program. Nothing is made if there is no place for it.
///
/// # Safety
///
/// Contract 3 holds for `place`, unless it is null.
unsafe fn give<T>(place: *mut *mut T, make: impl FnOnce() -> Result<T>) -> Result<()> {
    if place.is_null() {
        return Err(null());
    }
    let object = Box::into_raw(Box::new(make()?));
    // SAFETY: the caller's promise, and not null.
    unsafe { place.write(object) };
    Ok(())
}

/// # Safety
///
/// Contract 1 holds for `object`, which is not used any more, unless it is null.
unsafe fn close<T>(object: *mut T) {
    if !object.is_null() {
        // SAFETY: the caller's promise: made by `give`, and closed once.
        drop(unsafe { Box::from_raw(object) });
    }
}

/// Copies results out. `count` says how many there is room for, and then how many there are; null
/// is no room.
///
/// Errors: `OVERRUN` when they do not fit, with nothing copied.
///
/// # Safety
///
/// Contract 3 holds for `count`, and contract 2 for `first` and what `count` says, unless null.
unsafe fn put<T: Copy>(from: &[T], first: *mut T, count: *mut usize) -> Result<()> {
    let room = match count.is_null() {
        true => 0,
        // SAFETY: the caller's promise, and not null.
        false => unsafe { count.replace(from.len()) },
    };
    if from.len() > room {
        let words = format!("{} results, with room for {room}", from.len());
        return Err(Problem::new(IOReturn::OVERRUN, words));
    }
    if from.is_empty() {
        return Ok(());
    }
    if first.is_null() {
        return Err(null());
    }
    // SAFETY: the caller's promise: room for as many and more; it is the program's memory, so none
    // of ours.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), first, from.len()) };
    Ok(())
}
