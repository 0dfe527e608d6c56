//! The life of a driver as the rules of `IOService` have it: start, stop, registration, kinds of
//! clients, properties, busy and power states; through the SDK and both ends of the plugin ABI.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::time::Duration;

use iohost_device_models::edu::{Edu, Timing};
use iohost_driver::prelude::*;
use iohost_driver::{
    PowerAcknowledgement, PowerState, Properties, ServiceEntry, Stopping, export_driver,
};
use iohost_driver_host::{PowerNews, PowerState as HostPower};
use iohost_testkit::Rig;
use serde_json::{Value, json};

mod work_api {
    iohost_interface::interface! {
        /// What ordinary clients do.
        pub interface work;

        methods {
            /// The number 1.
            0 => fn one() -> u32;
        }

        queues {
            /// To the driver.
            0 => UP: ToDriver;
        }
    }
}

mod care_api {
    iohost_interface::interface! {
        /// What those do who take care of the driver.
        pub interface care;

        methods {
            /// The number 2.
            0 => fn two() -> u32;
        }

        queues {}
    }
}

thread_local! {
    static QUEUE: RefCell<Option<IODispatchQueue<Life>>> = const { RefCell::new(None) };
    static START: Cell<Start> = const { Cell::new(Start::Plain) };
    static NOTES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy, Default)]
enum Start {
    #[default]
    Plain,
    Registers,
    RegistersAndFails,
}

fn note(text: impl Into<String>) {
    NOTES.with_borrow_mut(|notes| notes.push(text.into()));
}

fn notes() -> Vec<String> {
    NOTES.take()
}

/// A driver that takes its time.
struct Life {
    queue: IODispatchQueue<Life>,
    timer: IOTimerDispatchSource,
    stopping: Option<Stopping>,
    /// Acknowledged when the timer fires, or at once if it is not to be late.
    power: Option<PowerAcknowledgement>,
    is_slow: bool,
}

impl IOService for Life {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];
    const REGISTERS_ITSELF: bool = true;

    fn start(_: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        let start = START.take();
        if !matches!(start, Start::Plain) {
            queue.service().register()?;
            note("registered");
        }
        if let Start::RegistersAndFails = start {
            return Err(Error::new(IOReturn::NO_DEVICE, "another board"));
        }
        let timer = IOTimerDispatchSource::create(queue, |life: &mut Self, _| {
            note("timer");
            life.stopping = None;
            life.power = None;
        })?;
        QUEUE.set(Some(queue.clone()));
        Ok(Self { queue: queue.clone(), timer, stopping: None, power: None, is_slow: false })
    }

    fn stop_later(&mut self, stopping: Stopping) {
        note("stop");
        if self.is_slow {
            self.stopping = Some(stopping);
            self.fire_after(Duration::from_secs(3));
        }
    }

    fn set_power_state(&mut self, state: PowerState, acknowledgement: PowerAcknowledgement) {
        note(format!("power {state:?}"));
        if self.is_slow {
            self.power = Some(acknowledgement);
        }
    }

    fn client_crashed(&mut self, session: SessionId) {
        note(format!("client of {session} crashed"));
    }

    fn session_opened(&mut self, session: Session) -> Result<()> {
        note(format!("session {} of type {}", session.id(), session.client_type()));
        Ok(())
    }

    fn session_closed(&mut self, session: SessionId) {
        note(format!("session {session} closed"));
    }
}

impl Life {
    fn fire_after(&self, time: Duration) {
        let now = self.queue.now(IOTimerClock::UptimeRaw);
        let deadline = now + time.as_nanos() as u64;
        self.timer.wake_at_time(IOTimerClock::UptimeRaw, deadline, 0).unwrap();
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        note("dropped");
    }
}

impl work_api::Server for Life {
    fn one(&mut self, reply: Reply<u32>) {
        reply.complete(1);
    }
}

impl care_api::Server for Life {
    fn two(&mut self, reply: Reply<u32>) {
        reply.complete(2);
    }
}

export_driver!(Life, serves work_api, care_api);

fn rig() -> Rig<Life, Edu> {
    notes();
    Rig::start(Edu::new(Timing::Immediate)).unwrap()
}

fn queue() -> IODispatchQueue<Life> {
    QUEUE.take().unwrap()
}

/// A driver, and itself as others see it.
fn service() -> (Rig<Life, Edu>, ServiceEntry) {
    let rig = rig();
    (rig, queue().service())
}

fn dictionary(value: Value) -> Properties {
    match value {
        Value::Object(dictionary) => dictionary,
        other => panic!("{other}"),
    }
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> IOReturn {
    result.unwrap_err().code()
}

#[test]
fn a_stop_that_completes_later_is_waited_for_and_only_sources_run_meanwhile() {
    let mut rig = rig();
    queue().dispatch_sync(|life| life.is_slow = true).unwrap();
    let client = rig.client::<work_api::Client>();
    rig.stop();
    rig.settle();
    assert_eq!(notes(), ["stop"]);
    assert!(!rig.has_stopped());

    let call = client.one();
    rig.settle();
    assert_eq!(call.wait(), Err(IOReturn::NOT_READY));
    assert_eq!(rig.open_session(4096).unwrap_err(), IOReturn::NOT_READY);
    rig.stop();
    rig.advance(Duration::from_millis(2999));
    assert_eq!(notes(), [""; 0], "a second stop is none, and it is not time yet");

    rig.advance(Duration::from_millis(1));
    assert_eq!(notes(), ["timer", "dropped"]);
    assert!(rig.has_stopped());
}

#[test]
fn a_stop_that_is_complete_at_once_frees_the_driver_before_it_returns() {
    let mut rig = rig();
    rig.stop();
    assert_eq!(notes(), ["stop", "dropped"]);
    assert!(rig.has_stopped());
}

#[test]
fn a_driver_that_never_completes_its_stop_is_freed_with_its_process() {
    let mut rig = rig();
    queue().dispatch_sync(|life| life.is_slow = true).unwrap();
    rig.stop();
    drop(rig);
    assert_eq!(notes(), ["stop", "dropped"]);
}

#[test]
fn a_driver_that_registers_itself_is_visible_from_then_on_and_not_inside_start() {
    let rig = rig();
    assert!(!rig.registry().is_registered(), "it has started, and did not say so");
    queue().service().register().unwrap();
    assert!(rig.registry().is_registered());

    START.set(Start::Registers);
    let rig = self::rig();
    assert_eq!(notes(), ["registered"]);
    assert!(rig.registry().is_registered());

    START.set(Start::RegistersAndFails);
    let failed = Rig::<Life, Edu>::start(Edu::new(Timing::Immediate)).unwrap_err();
    assert_eq!(failed.status, IOReturn::NO_DEVICE, "and nobody saw it");
}

#[test]
fn each_kind_of_client_has_its_own_interface_and_an_unknown_one_is_unsupported() {
    let mut rig = rig();
    let work = rig.open_session(4096).unwrap();
    let care = rig.open_session_as(1, 4096).unwrap();
    assert_eq!(rig.open_session_as(2, 4096).unwrap_err(), IOReturn::UNSUPPORTED);
    assert_eq!(rig.open_session_as(u64::MAX, 4096).unwrap_err(), IOReturn::UNSUPPORTED);
    assert_eq!(notes(), ["session 1 of type 0", "session 2 of type 1"]);

    let (one, two) = (rig.client_of::<work_api::Client>(&work), rig.client_of(&care));
    let two: care_api::Client = two;
    let (one, two) = (one.one(), two.two());
    rig.settle();
    assert_eq!((one.wait(), two.wait()), (Ok(1), Ok(2)));
}

#[test]
fn a_client_that_died_is_told_before_its_session_is_closed() {
    let mut rig = rig();
    let [died, left] = [(); 2].map(|()| rig.open_session(4096).unwrap());
    notes();
    rig.client_crashed(&died);
    rig.close_session(died);
    rig.close_session(left);
    rig.settle();
    assert_eq!(notes(), ["client of 1 crashed", "session 1 closed", "session 2 closed"]);
}

#[test]
fn a_service_is_made_of_a_dictionary_that_its_provider_has() {
    let (_rig, life) = service();
    let port = json!({"IOClass": "Port", "number": 7});
    let properties = json!({"Port": port, "Text": "no dictionary", "Empty": {}});
    life.set_properties(dictionary(properties)).unwrap();

    let made = life.create(&life, "Port").unwrap();
    assert_eq!(made.property("number").unwrap(), 7);
    assert_eq!(made.provider().unwrap().registry_entry_id(), life.registry_entry_id());
    for key in ["Nothing", "Text", "Empty"] {
        assert_eq!(code(life.create(&life, key)), IOReturn::BAD_ARGUMENT, "{key}");
    }
    assert_eq!(code(life.create(&made, "Port")), IOReturn::UNSUPPORTED);
    assert_eq!(code(made.create(&made, "Port")), IOReturn::UNSUPPORTED);
    assert_eq!(code(life.create(&life.provider().unwrap(), "Port")), IOReturn::UNSUPPORTED);
}

#[test]
fn a_service_that_is_terminated_is_found_no_more() {
    let (_rig, life) = service();
    life.set_properties(dictionary(json!({"Port": {"IOClass": "Port"}}))).unwrap();
    let port = life.create(&life, "Port").unwrap();
    assert_eq!(code(port.terminate(1)), IOReturn::UNSUPPORTED);
    assert_eq!(code(life.terminate(1)), IOReturn::UNSUPPORTED);
    assert_eq!(code(life.provider().unwrap().terminate(0)), IOReturn::NOT_PERMITTED);
    port.adjust_busy(1).unwrap();
    assert_eq!(life.busy_state().unwrap(), 1);
    port.terminate(0).unwrap();
    assert_eq!(code(port.properties()), IOReturn::NOT_FOUND);
    assert_eq!(code(port.terminate(0)), IOReturn::NOT_FOUND);
    assert_eq!(life.busy_state().unwrap(), 0, "what is gone is not busy");
}

#[test]
fn no_number_of_a_service_is_used_twice() {
    let (_rig, life) = service();
    life.set_properties(dictionary(json!({"Port": {"IOClass": "Port"}}))).unwrap();
    let mut numbers = HashSet::from([life.registry_entry_id()]);
    assert!(numbers.insert(life.provider().unwrap().registry_entry_id()));
    for _ in 0..100_000 {
        let port = life.create(&life, "Port").unwrap();
        assert!(numbers.insert(port.registry_entry_id()));
        port.terminate(0).unwrap();
    }
}

#[test]
fn a_service_has_the_name_it_was_given_last() {
    let (_rig, life) = service();
    assert_eq!(code(life.name()), IOReturn::ERROR);
    life.set_name("first").unwrap();
    life.set_name(&"x".repeat(127)).unwrap();
    for name in ["", &"x".repeat(128), "with\0end"] {
        assert_eq!(code(life.set_name(name)), IOReturn::BAD_ARGUMENT);
    }
    assert_eq!(life.name().unwrap(), "x".repeat(127));
}

#[test]
fn own_properties_are_merged_over_those_of_the_host() {
    let (_rig, life) = service();
    let class = life.property("IOClass").unwrap();
    assert_eq!(life.property("IOProviderClass").unwrap(), "IOPCIDevice");
    life.set_properties(dictionary(json!({"a": 1, "b": [true, "x"], "IOClass": "Mine"}))).unwrap();
    life.set_properties(dictionary(json!({"a": 2}))).unwrap();
    let all = life.properties().unwrap();
    assert_eq!(
        [&all["a"], &all["b"], &all["IOClass"]],
        [&json!(2), &json!([true, "x"]), &json!("Mine")]
    );
    life.remove_property("IOClass").unwrap();
    assert_eq!(life.property("IOClass").unwrap(), class, "the host's is there again");
    assert_eq!(code(life.remove_property("IOClass")), IOReturn::NOT_WRITABLE);
    assert_eq!(code(life.remove_property("nothing")), IOReturn::NOT_FOUND);
    assert_eq!(code(life.property("nothing")), IOReturn::NOT_FOUND);
    let device = life.provider().unwrap();
    assert_eq!(code(device.set_properties(Properties::new())), IOReturn::NOT_PERMITTED);
    let large = dictionary(json!({"a": "x".repeat(20_000)}));
    assert_eq!(code(life.set_properties(large)), IOReturn::NO_MEMORY);
    assert_eq!(life.property("a").unwrap(), 2, "nothing has changed");
}

#[test]
fn a_property_is_searched_for_in_the_providers_up_to_the_device() {
    let (_rig, life) = service();
    life.set_properties(dictionary(json!({"Port": {"IOClass": "Port"}, "speed": 3}))).unwrap();
    let port = life.create(&life, "Port").unwrap();
    assert_eq!(code(port.property("speed")), IOReturn::NOT_FOUND);
    assert_eq!(port.search_property("speed").unwrap(), 3);
    assert_eq!(port.search_property("vendor-id").unwrap(), 0x1234);
    assert_eq!(port.search_property("IOClass").unwrap(), "Port", "the nearest");
    assert_eq!(code(port.search_property("nothing")), IOReturn::NOT_FOUND);
    let all = port.provider_properties().unwrap();
    let classes: Vec<_> = all.iter().map(|one| one["IOClass"].as_str().unwrap()).collect();
    assert_eq!((classes[0], classes.len(), classes[2]), ("Port", 3, "IOPCIDevice"));
}

#[test]
fn only_the_edges_of_the_busy_count_reach_the_provider() {
    let (rig, life) = service();
    let device = life.provider().unwrap();
    let counts = || (life.busy_state().unwrap(), device.busy_state().unwrap());
    assert!(!rig.registry().is_busy());
    for (delta, expected) in [(1, (1, 1)), (2, (3, 1)), (-2, (1, 1)), (-1, (0, 0)), (5, (5, 1))] {
        life.adjust_busy(delta).unwrap();
        assert_eq!(counts(), expected);
        assert_eq!(rig.registry().is_busy(), expected.1 == 1);
    }
    assert_eq!(code(life.adjust_busy(-6)), IOReturn::BAD_ARGUMENT);
    assert_eq!(counts(), (5, 1));
}

#[test]
fn a_queue_is_found_by_the_name_it_was_given_until_the_driver_stops() {
    let mut rig = rig();
    let default = queue();
    let life = default.service();
    let other = IODispatchQueue::create(&default, "work", ()).unwrap();
    life.set_dispatch_queue("Work", &other).unwrap();
    let found = life.copy_dispatch_queue("Work").unwrap();
    assert!(found.dispatch_sync(|| other.on_queue()).unwrap(), "it is that queue");
    let found = life.copy_dispatch_queue("Default").unwrap();
    assert!(found.dispatch_sync(|| default.on_queue()).unwrap());
    for name in ["", "Default", &"x".repeat(128)] {
        assert_eq!(code(life.set_dispatch_queue(name, &other)), IOReturn::BAD_ARGUMENT);
    }
    assert_eq!(code(life.copy_dispatch_queue("Other")), IOReturn::NOT_FOUND);
    rig.stop();
    assert_eq!(code(life.copy_dispatch_queue("Work")), IOReturn::ERROR);
    assert_eq!(code(life.set_dispatch_queue("Work", &other)), IOReturn::ERROR);
}

#[test]
fn a_power_state_is_reached_when_the_driver_acknowledges_it() {
    let rig = rig();
    let life = queue().service();
    rig.set_power_state(HostPower::Low);
    assert_eq!(notes(), [""; 0], "never inside the call");
    rig.settle();
    assert_eq!(notes(), ["power Low"]);
    assert_eq!(rig.power_news(), [PowerNews::Reached(HostPower::Low)]);
    // The driver asks for one itself.
    life.change_power_state(PowerState::On).unwrap();
    rig.settle();
    assert_eq!(notes(), ["power On"]);
    assert_eq!(rig.power_news(), [PowerNews::Reached(HostPower::On)]);
    for flags in [1, 3, 0x10002, u32::MAX] {
        assert_eq!(code(life.change_power_state_to(flags)), IOReturn::BAD_ARGUMENT);
    }
    rig.advance(Duration::from_secs(60));
    assert_eq!(rig.power_news(), [], "what is acknowledged is not late");
}

#[test]
fn an_acknowledgement_is_late_after_20_seconds_and_still_counts_when_it_comes() {
    let rig = rig();
    let queue = queue();
    queue.dispatch_sync(|life| life.is_slow = true).unwrap();
    rig.set_power_state(HostPower::Off);
    rig.advance(Duration::from_millis(19_999));
    assert_eq!(rig.power_news(), []);
    rig.advance(Duration::from_millis(1));
    assert_eq!(rig.power_news(), [PowerNews::Late(HostPower::Off)]);
    // What is asked for meanwhile is told when this one is over, the last of it.
    rig.set_power_state(HostPower::Low);
    rig.set_power_state(HostPower::On);
    rig.advance(Duration::from_secs(60));
    assert_eq!(notes(), ["power Off"]);
    queue.dispatch_sync(|life| life.power = None).unwrap();
    rig.settle();
    assert_eq!(notes(), ["power On"]);
    assert_eq!(rig.power_news(), [PowerNews::Reached(HostPower::Off)]);
}
