//! Which driver a device gets, and devices that come while the daemon runs.

use crate::device_events::{REMOVAL, end, happen};
use crate::rig::{Rig, WATCHDOG};
use iohost_client::varlink::{EventKind, State};
use iohost_client::{ClientError, ServiceWatch, Session};
use nix::sys::signal::Signal::SIGTERM;

const FIRST: &str = "0000:04:00.0";
const SECOND: &str = "0000:05:00.0";

/// A daemon with these plugins and a `[[match]]` for their device.
fn daemon(plugins: &[&str]) -> Rig {
    let rig = Rig::start(&[]);
    plugins.iter().for_each(|plugin| rig.install(plugin));
    rig.configure("[[match]]\nprimary = \"0x11e81234\"\n");
    rig.connect().reload().unwrap();
    rig
}

fn choice(rig: &Rig, name: &str) -> String {
    rig.service(name).unwrap().choice.unwrap()
}

/// Waits until the next service runs.
fn began(watch: &mut ServiceWatch) -> (String, String) {
    loop {
        let event = watch.next_event_within(WATCHDOG).unwrap().expect("a service in a minute");
        if event.kind == EventKind::Began {
            return (event.service, event.driver);
        }
    }
}

#[test]
fn the_next_best_driver_is_tried_when_the_best_does_not_start() {
    for (best, says) in [
        ("edu-20-decline", "not for edu-20-decline"),
        ("edu-20-hang", "did not become ready within 3s"),
    ] {
        let rig = daemon(&[best, "edu-10-good", "edu-5-good"]);
        let mut watch = rig.connect().watch().unwrap();
        rig.add_edu(FIRST);
        rig.announce("add", FIRST, "");
        assert_eq!(began(&mut watch), (FIRST.to_owned(), "edu-10-good".to_owned()));
        let choice = choice(&rig, FIRST);
        for words in ["fits best of those that start", &format!("{best} (score 1021, not"), says] {
            assert!(choice.contains(words), "no {words:?} in {choice}");
        }
        assert_eq!(rig.service(FIRST).unwrap().incarnation, 2, "one try each");
    }
}

#[test]
fn when_no_driver_starts_each_ones_reason_is_told() {
    let mut rig = daemon(&["edu-20-decline", "edu-10-decline"]);
    rig.add_edu(FIRST);
    rig.announce("add", FIRST, "");
    rig.wait_for("driver not started");
    let service = rig.service(FIRST).unwrap();
    let reason = service.reason.unwrap();
    assert_eq!((service.state, &*reason.code), (State::Down, "driver-start"));
    assert_eq!(
        reason.message,
        "none of 2 drivers started: edu-20-decline: not for edu-20-decline; edu-10-decline: not \
         for edu-10-decline"
    );
    // A person who asks has them all tried again.
    let Err(ClientError::Refused(again)) = rig.connect().bind(FIRST) else { panic!("it runs") };
    assert_eq!(again.message, reason.message);
    assert_eq!(rig.service(FIRST).unwrap().incarnation, 4);
}

#[test]
fn a_driver_that_the_configuration_names_is_taken_whoever_fits_better() {
    let rig = daemon(&["edu-20-good", "edu-10-good"]);
    rig.configure(&format!("[[device]]\naddress = \"{FIRST}\"\ndriver = \"edu-10-good\"\n"));
    rig.add_edu(FIRST);
    let mut watch = rig.connect().watch().unwrap();
    rig.connect().reload().unwrap();
    assert_eq!(began(&mut watch).1, "edu-10-good");
    assert_eq!(choice(&rig, FIRST), "the configuration names it");
}

#[test]
fn a_choice_between_equals_is_explained() {
    let rig = daemon(&["edu-10-good", "edu-10-hang"]);
    let mut watch = rig.connect().watch().unwrap();
    rig.add_edu(FIRST);
    rig.announce("add", FIRST, "");
    assert_eq!(began(&mut watch).1, "edu-10-good");
    assert_eq!(
        choice(&rig, FIRST),
        "it fits best, the first by name among equals: edu-10-good (score 1011), edu-10-hang \
         (score 1011)"
    );
}

#[test]
fn a_device_that_nobody_allowed_is_not_taken() {
    let mut rig = daemon(&["edu"]);
    rig.configure("[[match]]\nprimary = \"0x11e81235\"\n");
    rig.connect().reload().unwrap();
    rig.add_edu(FIRST);
    rig.announce("add", FIRST, "");
    // One that is allowed, and no plugin is for.
    rig.add_pci(SECOND, "0x1234", "0x11e9");
    rig.configure("[[match]]\nclass = \"0x00ff0000\"\nsecondary = \"0x11e91af4\"\n");
    rig.announce("add", SECOND, "");
    rig.connect().reload().unwrap();
    assert_eq!(rig.connect().status().unwrap().services, []);
    rig.signal(SIGTERM);
    assert_eq!(rig.exit_code(), 0);
}

#[test]
fn a_device_that_is_disabled_is_left_alone_though_a_match_is_for_it() {
    let rig = daemon(&["edu"]);
    rig.add_edu(FIRST);
    rig.configure(&format!(
        "[[device]]\naddress = \"{FIRST}\"\ndisabled = true\n[[match]]\nprimary = \
         \"0x11e81234\"\n"
    ));
    assert_eq!(rig.connect().reload().unwrap().started, [FIRST]);
    rig.announce("add", FIRST, "");
    let service = rig.service(FIRST).unwrap();
    let reason = service.reason.unwrap();
    assert_eq!((service.state, service.incarnation), (State::Down, 0));
    assert_eq!(reason.code, "disabled");
    assert!(reason.message.contains(&format!("in line {}", Rig::FIRST_LINE)), "{}", reason.message);
    let Err(ClientError::Refused(refused)) = rig.connect().bind(FIRST) else { panic!("bound") };
    assert_eq!(refused.code, "disabled");
}

#[test]
fn a_configured_device_that_was_not_there_starts_when_it_comes() {
    let mut rig = daemon(&["edu"]);
    for (bind, action, more) in [("true", "add", ""), ("false", "bind", "DRIVER=vfio-pci\0")] {
        let address = if bind == "true" { FIRST } else { SECOND };
        rig.configure(&format!("[[device]]\naddress = \"{address}\"\nbind = {bind}\n"));
        rig.connect().reload().unwrap();
        let reason = rig.service(address).unwrap().reason.unwrap();
        assert_eq!(reason.code, "no-such-device");
        rig.add_edu(address);
        rig.announce(action, address, more);
        rig.wait_for(&format!("driver running device={address}"));
    }
}

/// A device of a match that this plugin has driven, and that somebody wants back: a session with its
/// service, and news.
fn wanted_back(plugin: &str) -> (Rig, Session, ServiceWatch) {
    let rig = daemon(&[plugin]);
    let mut watch = rig.connect().watch().unwrap();
    rig.add_edu(FIRST);
    rig.announce("add", FIRST, "");
    began(&mut watch);
    let session = rig.connect().open(FIRST).unwrap();
    happen(&session, REMOVAL);
    assert_eq!(end(&mut watch), "removed");
    (rig, session, watch)
}

#[test]
fn a_device_that_is_back_before_its_driver_host_has_ended_is_driven_again() {
    let (rig, _session, mut watch) = wanted_back("edu-10-stubborn");
    rig.announce("add", FIRST, "");
    assert_eq!(began(&mut watch).0, FIRST);
}

#[test]
fn a_device_of_a_match_that_is_removed_is_driven_again_when_it_is_back() {
    let (rig, _session, mut watch) = wanted_back("edu");
    // A new configuration does not forget it meanwhile.
    assert_eq!(rig.connect().reload().unwrap().kept, [FIRST]);
    rig.announce("add", FIRST, "");
    assert_eq!(began(&mut watch).0, FIRST);
}
