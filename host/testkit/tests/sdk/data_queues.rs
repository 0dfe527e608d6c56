//! `IODataQueueDispatchSource`: when its handler runs. The ring itself is tested in
//! `sys/memory/tests`.

use std::sync::{Arc, Mutex};

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

fn code<T>(result: Result<T>) -> Option<IOReturn> {
    result.err().map(|err| err.code())
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
fn checking_for_work_calls_the_handler_once_if_there_are_entries_and_is_not_ready_otherwise() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    assert_eq!(code(source.check_for_work()), Some(IOReturn::NOT_READY), "empty");
    queues.upload.enqueue(b"entry").unwrap();
    assert_eq!(bench.settled(), ["available"]);
    assert_eq!(source.check_for_work(), Ok(()));
    assert!(bench.seen.take().is_empty(), "not inside the call");
    assert_eq!(bench.settled(), ["available"]);
    source.remove_handler();
    assert_eq!(code(source.check_for_work()), Some(IOReturn::NOT_READY), "nobody to call");
    source.dequeue(&mut Vec::new()).unwrap();
    let mut producer = serviced(&bench, &mut queues);
    while producer.enqueue(b"0123456789").is_ok() {}
    assert_eq!(code(producer.check_for_work()), Some(IOReturn::NOT_READY), "nothing to look at");
    assert!(bench.settled().is_empty());
}

#[test]
fn a_replaced_data_available_handler_is_called_at_once_only_if_there_are_entries() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("second"));
    assert!(bench.settled().is_empty(), "empty");
    queues.upload.enqueue(b"entry").unwrap();
    assert_eq!(bench.settled(), ["second"]);
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("third"));
    assert_eq!(bench.settled(), ["third"], "an entry is unread");
    source.dequeue(&mut Vec::new()).unwrap();
    queues.upload.enqueue(b"entry").unwrap();
    assert_eq!(bench.settled(), ["third"], "the others are gone");
}

#[test]
fn without_a_handler_nobody_is_called_and_a_new_one_hears_of_unread_entries_only() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    source.remove_handler();
    queues.upload.enqueue(b"entry").unwrap();
    assert!(bench.settled().is_empty());
    source.dequeue(&mut Vec::new()).unwrap();
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("new"));
    assert!(bench.settled().is_empty(), "read meanwhile");
    source.remove_handler();
    queues.upload.enqueue(b"entry").unwrap();
    bench.rig.settle();
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("new"));
    assert_eq!(bench.settled(), ["new"]);
}

#[test]
fn a_replaced_data_serviced_handler_is_called_for_what_came_while_there_was_none() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = serviced(&bench, &mut queues);
    while source.enqueue(b"0123456789").is_ok() {}
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("second"));
    assert!(bench.settled().is_empty(), "a request that is not answered calls nobody");
    source.remove_handler();
    queues.download.dequeue(&mut Vec::new()).unwrap();
    assert!(bench.settled().is_empty());
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("third"));
    assert_eq!(bench.settled(), ["third"]);
    source.remove_handler();
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("fourth"));
    assert!(bench.settled().is_empty(), "told once");
}

#[test]
fn what_is_announced_to_a_disabled_data_queue_is_one_call_when_it_is_enabled() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    let done = |note: &'static str| move |probe: &mut Probe| probe.note(note);
    source.set_enable_with_completion(&bench.queue, true, done("was enabled")).unwrap();
    assert_eq!(bench.settled(), ["was enabled"], "also when nothing changed");
    source.set_enable_with_completion(&bench.queue, false, done("disabled")).unwrap();
    assert_eq!(bench.settled(), ["disabled"]);
    for _ in 0..2 {
        queues.upload.enqueue(b"entry").unwrap();
        bench.rig.settle();
        source.dequeue(&mut Vec::new()).unwrap();
    }
    assert!(bench.settled().is_empty());
    assert_eq!(code(source.check_for_work()), Some(IOReturn::NOT_READY));
    source.set_enable(true).unwrap();
    assert_eq!(bench.settled(), ["available"]);
    source.set_enable(false).unwrap();
    source.set_enable(true).unwrap();
    assert!(bench.settled().is_empty(), "told once");
}

#[test]
fn a_cancelled_data_queue_calls_nobody_after_the_completion_and_its_end_still_works() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let mut source = available(&bench, &mut queues);
    let done = |note: &'static str| move |probe: &mut Probe| probe.note(note);
    queues.upload.enqueue(b"before").unwrap();
    source.cancel(&bench.queue, done("cancelled"));
    assert!(bench.seen.take().is_empty(), "not inside the call");
    queues.upload.enqueue(b"after").unwrap();
    assert_eq!(bench.settled(), ["cancelled"]);
    source.cancel(&bench.queue, done("again"));
    assert_eq!(bench.settled(), ["again"]);
    assert_eq!(code(source.set_enable(true)), Some(IOReturn::UNSUPPORTED));
    source.set_handler(&bench.queue, |probe: &mut Probe| probe.note("new"));
    assert!(bench.settled().is_empty());
    let mut entry = Vec::new();
    source.dequeue(&mut entry).unwrap();
    source.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"after");
}

#[test]
fn a_copy_of_a_handler_calls_it_and_there_is_none_without_a_handler() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let (up, down) = (available(&bench, &mut queues), serviced(&bench, &mut queues));
    up.copy_handler().unwrap().ring().unwrap();
    assert_eq!(bench.settled(), ["available"]);
    down.copy_handler().unwrap().ring().unwrap();
    assert_eq!(bench.settled(), ["serviced"]);
    up.remove_handler();
    assert_eq!(code(up.copy_handler()), Some(IOReturn::NOT_READY));
    down.cancel(&bench.queue, |_: &mut Probe| {});
    assert_eq!(code(down.copy_handler()), Some(IOReturn::NOT_READY));
}

#[test]
fn the_copied_memory_of_a_data_queue_outlives_the_source() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let source = available(&bench, &mut queues);
    queues.upload.enqueue(b"here").unwrap();
    let memory = source.copy_memory();
    drop((source, queues));
    let mut entry = [0; 8];
    memory.read_at(128, &mut entry);
    assert_eq!(entry, *b"\x04\0\0\0here");
}

#[test]
fn what_the_client_announces_while_the_handler_runs_is_one_more_call_and_no_system_call() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let end = queues.driver.consumer(api::UPLOAD).unwrap();
    let upload = Arc::new(Mutex::new(queues.upload));
    let own: Arc<Mutex<Option<IODataQueueDispatchSource<Consumer>>>> = Arc::default();
    let (client, driver) = (upload.clone(), own.clone());
    let mut calls = 0;
    let source = IODataQueueDispatchSource::create(end, &bench.queue, move |probe: &mut Probe| {
        let (mut driver, mut client) = (driver.lock().unwrap(), client.lock().unwrap());
        let source = driver.as_mut().unwrap();
        // What rang before the handler ran.
        source.copy_handler().unwrap().clear().unwrap();
        let mut taken = 0;
        while source.dequeue(&mut Vec::new()).is_ok() {
            taken += 1;
        }
        calls += 1;
        if calls == 1 {
            client.enqueue(b"announced").unwrap();
            client.enqueue(b"not announced").unwrap();
        }
        probe.note(format!("took {taken}"));
    });
    let bell = own.lock().unwrap().insert(source.unwrap()).copy_handler().unwrap();
    upload.lock().unwrap().enqueue(b"first").unwrap();
    upload.lock().unwrap().enqueue(b"second").unwrap();
    assert_eq!(bench.settled(), ["took 2", "took 2"]);
    assert!(!bell.clear().unwrap(), "it ran");
    upload.lock().unwrap().enqueue(b"third").unwrap();
    assert_eq!(bench.settled(), ["took 1"], "it ran no more");
    let source = own.lock().unwrap().take();
    drop(source);
}

#[test]
fn what_the_client_services_while_the_handler_runs_is_one_more_call_and_no_system_call() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let end = queues.driver.producer(api::DOWNLOAD).unwrap();
    let download = Arc::new(Mutex::new(queues.download));
    let own: Arc<Mutex<Option<IODataQueueDispatchSource<Producer>>>> = Arc::default();
    let (client, driver) = (download.clone(), own.clone());
    let mut calls = 0;
    let source = IODataQueueDispatchSource::create(end, &bench.queue, move |probe: &mut Probe| {
        let (mut driver, mut client) = (driver.lock().unwrap(), client.lock().unwrap());
        let source = driver.as_mut().unwrap();
        // What rang before the handler ran.
        source.copy_handler().unwrap().clear().unwrap();
        while source.enqueue(b"0123456789").is_ok() {}
        calls += 1;
        if calls == 1 {
            client.dequeue(&mut Vec::new()).unwrap();
        }
        probe.note(format!("call {calls}"));
    });
    let bell = own.lock().unwrap().insert(source.unwrap()).copy_handler().unwrap();
    bell.ring().unwrap();
    assert_eq!(bench.settled(), ["call 1", "call 2"]);
    assert!(!bell.clear().unwrap(), "it ran");
    download.lock().unwrap().dequeue(&mut Vec::new()).unwrap();
    assert_eq!(bench.settled(), ["call 3"], "it ran no more");
    let source = own.lock().unwrap().take();
    drop(source);
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

#[test]
fn the_drivers_ends_of_a_session_that_is_over_say_offline_once_what_was_sent_is_read() {
    let mut bench = Bench::new();
    let mut queues = open(&mut bench);
    let (mut up, mut down) = (available(&bench, &mut queues), serviced(&bench, &mut queues));
    let mut entry = Vec::new();
    queues.upload.enqueue(b"last words").unwrap();
    bench.rig.close_session(queues.client);
    bench.settled();
    up.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"last words");
    assert_eq!(up.dequeue(&mut entry), Err(QueueError::Offline));
    assert_eq!(up.dequeue(&mut entry), Err(QueueError::Offline), "for ever");
    // Nobody takes anything from here any more, so there is no room at some time.
    let refusal = std::iter::repeat_with(|| down.enqueue(b"to nobody")).find_map(Result::err);
    assert_eq!(refusal, Some(QueueError::Offline));
}
