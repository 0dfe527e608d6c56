//! Notification sources, through the SDK, on a driver in a rig: the rows of the reference's
//! section 7.

use std::cell::RefCell;

use iohost_device_models::edu::{Edu as EduModel, Timing};
use iohost_driver::prelude::*;
use iohost_driver::{
    IOServiceNotificationDispatchSource, IOServiceState, IOServiceStateNotificationDispatchSource,
    ServiceMatching, ServiceNotification, StateItem,
};
use iohost_testkit::Rig;

/// A driver that counts the calls of its handlers.
struct Probe {
    calls: u32,
}

thread_local! {
    /// The default queue of the probe that this thread started last.
    static QUEUE: RefCell<Option<IODispatchQueue<Probe>>> = const { RefCell::new(None) };
}

impl IOService for Probe {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(_device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        QUEUE.set(Some(queue.clone()));
        Ok(Self { calls: 0 })
    }
}

iohost_driver::export_driver!(Probe);

fn probe() -> (Rig<Probe, EduModel>, IODispatchQueue<Probe>) {
    let rig = Rig::start(EduModel::new(Timing::Manual)).unwrap();
    let queue = QUEUE.take().unwrap();
    (rig, queue)
}

fn count(probe: &mut Probe) {
    probe.calls += 1;
}

fn calls(rig: &Rig<Probe, EduModel>, queue: &IODispatchQueue<Probe>) -> u32 {
    rig.settle();
    queue.dispatch_sync(|probe| probe.calls).unwrap()
}

fn news(source: &IOServiceNotificationDispatchSource) -> Vec<(ServiceNotification, String)> {
    let mut news = Vec::new();
    source.deliver_notifications(|kind, service| news.push((kind, service.name.clone())));
    news
}

use ServiceNotification::{Matched, Terminated};

fn disks(queue: &IODispatchQueue<Probe>) -> IOServiceNotificationDispatchSource {
    let matching = ServiceMatching::Interface("disk".to_owned());
    IOServiceNotificationDispatchSource::create(matching, queue, count).unwrap()
}

#[test]
fn ready_is_called_once_when_a_list_of_news_stops_being_empty() {
    let (rig, queue) = probe();
    let source = disks(&queue);
    assert_eq!(calls(&rig, &queue), 0);
    rig.service_began("disk0", "disk");
    assert_eq!(calls(&rig, &queue), 1);
    rig.service_began("disk1", "disk");
    assert_eq!(calls(&rig, &queue), 1, "the list was not empty");

    assert_eq!(news(&source), [(Matched, "disk0".into()), (Matched, "disk1".into())]);
    assert_eq!(news(&source), [], "delivered is delivered");
    rig.service_ended("disk0");
    assert_eq!(calls(&rig, &queue), 2);
    rig.service_began("disk2", "disk");
    assert_eq!(calls(&rig, &queue), 3, "the other list was empty");
}

#[test]
fn ready_is_never_on_its_way_twice() {
    let (rig, queue) = probe();
    let source = disks(&queue);
    rig.service_began("disk0", "disk");
    rig.settle();
    news(&source);
    rig.service_ended("disk0");
    rig.service_began("disk1", "disk");
    assert_eq!(calls(&rig, &queue), 2, "one call for both lists");
}

#[test]
fn the_terminated_are_delivered_before_the_matched() {
    let (rig, queue) = probe();
    let source = disks(&queue);
    rig.service_began("disk0", "disk");
    news(&source);
    rig.service_began("disk1", "disk");
    rig.service_ended("disk0");
    assert_eq!(news(&source), [(Terminated, "disk0".into()), (Matched, "disk1".into())]);
    drop(rig);
}

#[test]
fn a_service_that_restarts_has_ended_and_begun_and_one_that_only_passed_by_is_no_news() {
    let (rig, queue) = probe();
    let source = disks(&queue);
    rig.service_began("disk0", "disk");
    news(&source);
    rig.service_began("disk0", "disk");
    assert_eq!(news(&source), [(Terminated, "disk0".into()), (Matched, "disk0".into())]);
    rig.service_began("disk1", "disk");
    rig.service_ended("disk1");
    assert_eq!(news(&source), []);
    drop(queue);
}

#[test]
fn services_that_run_already_are_news_and_others_than_those_that_match_are_none() {
    let (rig, queue) = probe();
    rig.service_began("disk0", "disk");
    rig.service_began("net0", "net");
    assert_eq!(news(&disks(&queue)), [(Matched, "disk0".into())]);
    let by_name = ServiceMatching::Name("net0".to_owned());
    let by_name = IOServiceNotificationDispatchSource::create(by_name, &queue, count).unwrap();
    assert_eq!(news(&by_name), [(Matched, "net0".into())]);
    rig.service_ended("disk0");
    assert_eq!(news(&by_name), []);
}

#[test]
fn a_new_handler_is_called_for_news_that_wait_and_only_then() {
    let (rig, queue) = probe();
    let source = disks(&queue);
    let ten = |probe: &mut Probe| probe.calls += 10;
    source.set_handler(&queue, ten).unwrap();
    assert_eq!(calls(&rig, &queue), 0);
    rig.service_began("disk0", "disk");
    source.set_handler(&queue, count).unwrap();
    assert_eq!(calls(&rig, &queue), 1, "the old one's call went with it");
}

#[test]
fn a_cancelled_or_dropped_source_of_services_calls_nobody() {
    let (rig, queue) = probe();
    let cancelled = disks(&queue);
    cancelled.cancel(&queue, |probe| probe.calls += 100);
    drop(disks(&queue));
    rig.service_began("disk0", "disk");
    assert_eq!(calls(&rig, &queue), 100, "nothing but the cancel handler");
}

fn value(text: &str) -> StateItem {
    StateItem::from([("value".to_owned(), text.to_owned())])
}

/// A source for the item `link` whose handler counts, and arms it again if that is wanted.
fn link() -> (IOServiceState, Rig<Probe, EduModel>, IODispatchQueue<Probe>) {
    let (rig, queue) = probe();
    let state = IOServiceState::new();
    state.state_notification_item_create("link").unwrap();
    (state, rig, queue)
}

#[test]
fn a_state_source_calls_once_for_each_arming_and_once_at_the_start() {
    let (state, rig, queue) = link();
    let source = IOServiceStateNotificationDispatchSource::create(&state, &["link"], &queue, count);
    let source = source.unwrap();
    assert_eq!(calls(&rig, &queue), 1, "the first, to arm it");
    state.state_notification_item_set("link", value("up")).unwrap();
    assert_eq!(calls(&rig, &queue), 1, "not armed");

    source.state_notification_begin();
    assert_eq!(calls(&rig, &queue), 1, "no change since");
    for text in ["down", "up"] {
        state.state_notification_item_set("link", value(text)).unwrap();
    }
    assert_eq!(calls(&rig, &queue), 2, "one for both changes");
    state.state_notification_item_set("link", value("down")).unwrap();
    assert_eq!(calls(&rig, &queue), 2, "one for each arming");
    source.state_notification_begin();
    source.state_notification_begin();
    state.state_notification_item_set("link", value("down")).unwrap();
    state.state_notification_item_set("link", value("up")).unwrap();
    assert_eq!(calls(&rig, &queue), 3, "arming twice is arming once");
}

#[test]
fn a_state_source_hears_of_its_own_items_only() {
    let (state, rig, queue) = link();
    state.state_notification_item_create("power").unwrap();
    let source = IOServiceStateNotificationDispatchSource::create(&state, &["link"], &queue, count);
    source.as_ref().unwrap().state_notification_begin();
    rig.settle();
    state.state_notification_item_set("power", value("off")).unwrap();
    assert_eq!(calls(&rig, &queue), 1);
    drop(source);
    state.state_notification_item_set("link", value("up")).unwrap();
    assert_eq!(calls(&rig, &queue), 1, "nor after its end");
}

#[test]
fn a_new_handler_of_a_state_source_is_called_once_armed_or_not() {
    let (state, rig, queue) = link();
    let source = IOServiceStateNotificationDispatchSource::create(&state, &["link"], &queue, count);
    let source = source.unwrap();
    rig.settle();
    source.set_handler(&queue, |probe| probe.calls += 10).unwrap();
    assert_eq!(calls(&rig, &queue), 11);
    source.cancel(&queue, |probe| probe.calls += 100);
    source.state_notification_begin();
    state.state_notification_item_set("link", value("up")).unwrap();
    assert_eq!(calls(&rig, &queue), 111, "after cancel, the cancel handler alone");
}

#[test]
fn a_state_item_reads_as_it_was_set_and_is_not_found_before() {
    let (state, _rig, _queue) = link();
    let code = |result: Result<StateItem>| result.unwrap_err().code();
    assert_eq!(code(state.state_notification_item_copy("link")), IOReturn::NOT_FOUND);
    state.state_notification_item_set("link", value("up")).unwrap();
    assert_eq!(state.state_notification_item_copy("link"), Ok(value("up")));
    assert_eq!(code(state.state_notification_item_copy("none")), IOReturn::NOT_FOUND);
    let unknown = state.state_notification_item_set("none", value("up"));
    assert_eq!(unknown.unwrap_err().code(), IOReturn::NOT_FOUND);
    let twice = state.state_notification_item_create("link");
    assert_eq!(twice.unwrap_err().code(), IOReturn::BUSY);
}
