//! `IODataQueueDispatchSource`: when its handler runs. The ring itself is tested in
//! `sys/memory/tests`.

use iohost_driver::prelude::*;
use iohost_driver::{Consumer, Producer, QueueError};
use iohost_testkit::RigSession;

use crate::probe::{Bench, Probe, Seen, api};

/// A session, both ends of its queues, and the driver's not yet taken.
struct Queues {
    upload: Producer,
    download: Consumer,
    driver: Session,
    client: RigSession,
}

fn open(bench: &mut Bench) -> Queues {
    let mut client = bench.rig.open_session(64).unwrap();
    let (upload, download) = (client.producer(api::UPLOAD), client.consumer(api::DOWNLOAD));
    let driver = bench.queue.dispatch_sync(|probe| probe.session.take()).unwrap().unwrap();
    Queues { upload, download, driver, client }
}

fn available(bench: &Bench, queues: &mut Queues) -> IODataQueueDispatchSource<Consumer> {
    let end = queues.driver.consumer(api::UPLOAD).unwrap();
    let handler = |probe: &mut Probe| probe.note("available");
    IODataQueueDispatchSource::create(end, &bench.queue, handler).unwrap()
}

fn serviced(bench: &Bench, queues: &mut Queues) -> IODataQueueDispatchSource<Producer> {
    let end = queues.driver.producer(api::DOWNLOAD).unwrap();
    let handler = |probe: &mut Probe| probe.note("serviced");
    IODataQueueDispatchSource::create(end, &bench.queue, handler).unwrap()
}

#[test]
fn watching_a_queue_that_holds_entries_leads_to_one_call_and_an_empty_one_to_none() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    queues.upload.enqueue(b"early").unwrap();
    let _source = available(&bench, &mut queues);
    assert_eq!(bench.settled(), ["available"]);
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut send = false;
    queues
        .upload
        .enqueue_with_coalesce(5, &mut send, |slot| slot.write_at(0, b"quiet").unwrap())
        .unwrap();
    let _source = available(&bench, &mut queues);
    assert_eq!(bench.settled(), ["available"], "nobody had announced the entry");
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let _source = available(&bench, &mut queues);
    assert!(bench.settled().is_empty());
}

#[test]
fn an_entry_for_an_empty_queue_makes_one_call_and_those_after_it_while_unread_none() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    bench.rig.settle();
    bench.seen.take();
    queues.upload.enqueue(b"one").unwrap();
    assert_eq!(bench.settled(), ["available"]);
    queues.upload.enqueue(b"two").unwrap();
    assert!(bench.settled().is_empty(), "the first is unread");
    let mut entry = Vec::new();
    while source.dequeue(&mut entry).is_ok() {}
    assert_eq!(entry, b"two");
    queues.upload.enqueue(b"three").unwrap();
    assert_eq!(bench.settled(), ["available"]);
}

#[test]
fn a_driver_that_found_its_queue_full_is_called_after_the_first_entry_was_taken() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = serviced(&bench, &mut queues);
    assert!(bench.settled().is_empty(), "nothing was serviced yet");
    while source.enqueue(b"0123456789").is_ok() {}
    let mut entry = Vec::new();
    queues.download.dequeue(&mut entry).unwrap();
    assert_eq!(bench.settled(), ["serviced"]);
    queues.download.dequeue(&mut entry).unwrap();
    assert!(bench.settled().is_empty(), "nobody waits for room any more");
}

#[test]
fn a_data_queues_handler_runs_on_the_queue_given_to_create() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let side = IODispatchQueue::create(&bench.queue, "side", bench.seen.clone()).unwrap();
    let (own, default) = (side.clone(), bench.queue.clone());
    let end = queues.driver.consumer(api::UPLOAD).unwrap();
    let _source = IODataQueueDispatchSource::create(end, &side, move |seen: &mut Seen| {
        seen.note(format!("side {}, default {}", own.on_queue(), default.on_queue()));
    });
    queues.upload.enqueue(b"entry").unwrap();
    assert_eq!(bench.settled(), ["side true, default false"]);
}

#[test]
fn checking_for_work_calls_the_handler_once_more() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let source = available(&bench, &mut queues);
    bench.rig.settle();
    bench.seen.take();
    source.check_for_work();
    assert!(bench.seen.take().is_empty(), "not inside the call");
    assert_eq!(bench.settled(), ["available"]);
}

#[test]
fn a_data_queue_source_that_is_dropped_calls_nobody_and_its_end_is_taken_once() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let source = available(&bench, &mut queues);
    queues.upload.enqueue(b"entry").unwrap();
    drop(source);
    assert!(bench.settled().is_empty());
    assert_eq!(
        queues.driver.consumer(api::UPLOAD).err().map(|err| err.code()),
        Some(IOReturn::NOT_FOUND),
        "an end is taken once"
    );
}

#[test]
fn both_ends_of_a_sessions_queues_see_the_same_entries() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let (mut up, mut down) = (available(&bench, &mut queues), serviced(&bench, &mut queues));
    let mut entry = Vec::new();
    queues.upload.enqueue(b"there").unwrap();
    up.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"there");
    down.enqueue(b"and back").unwrap();
    queues.download.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"and back");
    assert!(matches!(up.dequeue(&mut entry), Err(QueueError::Underrun)));
}

#[test]
fn a_session_that_is_closed_is_told_to_the_driver_once_and_later() {
    let mut bench = Bench::new();
    let queues = open(&mut bench);
    let number = queues.client.number();
    bench.rig.close_session(queues.client);
    assert!(bench.seen.take().is_empty());
    assert_eq!(bench.settled(), [format!("session {number} closed")]);
}
