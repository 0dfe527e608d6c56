//! The daemon, driver hosts, an emulated device and clients, each in its own process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use iohost_client::{QueueError, WaitError};
use iohost_interface::IOReturn;
use iohost_tests::{System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn kill_process(pid: u32) {
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn a_client_calls_the_driver_and_streams_through_the_device() {
    let (mut system, _device) = System::with_edu();
    let session = system.connect().open("edu0").unwrap();
    let edu = session.client::<edu_api::Client>().unwrap();
    assert_eq!(edu.factorial(10).wait(), Ok(3_628_800));

    let mut upload = session.producer(edu_api::UPLOAD).unwrap();
    let mut download = session.consumer(edu_api::DOWNLOAD).unwrap();
    let mut entry = Vec::new();
    for round in 0..200_usize {
        let sent = vec![round as u8; 1 + round * 10];
        upload.send(&sent).unwrap();
        download.receive(&mut entry).unwrap();
        assert_eq!(entry, sent);
    }
    drop((session, edu, upload, download));
    assert_eq!(system.stop(), Some(0));
    assert!(!system.socket().exists(), "the control socket is gone");
}

#[test]
fn a_killed_driver_host_is_replaced_on_a_reset_device_and_its_clients_go_on() {
    let (system, _device) = System::with_edu();
    let first = system.await_ready("edu0");
    let session = system.connect().open("edu0").unwrap();
    let edu = session.client::<edu_api::Client>().unwrap();
    let mut upload = session.producer(edu_api::UPLOAD).unwrap();
    let mut download = session.consumer(edu_api::DOWNLOAD).unwrap();

    // In the middle of a stream: entries go in and out all the while.
    let flowing = Arc::new(AtomicBool::new(false));
    let seen = flowing.clone();
    let reader = std::thread::spawn(move || {
        let mut entry = Vec::new();
        loop {
            match download.receive(&mut entry) {
                Ok(()) => seen.store(true, SeqCst),
                Err(err) => return err,
            }
        }
    });
    let writer = std::thread::spawn(move || {
        loop {
            if let Err(err) = upload.send(&[7; 2048]) {
                return err;
            }
        }
    });
    eventually("entries to come back", || flowing.load(SeqCst));
    kill_process(first);

    // Neither of them notices, and both go on.
    assert_eq!(session.wait_for_generation(1, Duration::MAX), Ok(2));
    flowing.store(false, SeqCst);
    eventually("entries to come back again", || flowing.load(SeqCst));
    assert!(!reader.is_finished() && !writer.is_finished());
    assert_eq!(edu.factorial(5).wait(), Ok(120));

    let second = system.await_ready("edu0");
    assert_ne!(first, second);
    assert_eq!(system.service("edu0").incarnation, 2);
    assert_eq!(system.service("edu0").reset.as_deref(), Some("done"));
    let another = system.connect().open("edu0").unwrap();
    assert_eq!(another.client::<edu_api::Client>().unwrap().factorial(5).wait(), Ok(120));
    assert!(system.daemon_log().contains("SIGKILL"), "the daemon says what happened");

    // Only the end of the service is the end of the session.
    system.connect().unbind("edu0").unwrap();
    let gone = |err| matches!(err, WaitError::Queue(QueueError::Offline));
    assert!(gone(reader.join().unwrap()), "the reader hears that the service is over");
    assert!(gone(writer.join().unwrap()), "the writer hears that the service is over");
    assert_eq!(edu.factorial(5).wait(), Err(IOReturn::OFFLINE));
}

#[test]
fn a_session_that_its_client_drops_is_forgotten_and_others_go_on() {
    let (system, _device) = System::with_edu();
    let kept = system.connect().open("edu0").unwrap();
    let dropped = system.connect().open("edu0").unwrap();
    eventually("both sessions", || system.service("edu0").sessions == 2);
    drop(dropped);
    eventually("one session", || system.service("edu0").sessions == 1);
    assert_eq!(kept.client::<edu_api::Client>().unwrap().factorial(3).wait(), Ok(6));
}

#[test]
fn two_devices_have_two_driver_hosts_and_the_death_of_one_leaves_the_other_alone() {
    let mut system = System::new();
    let _devices = [system.start_edu_device("edu0"), system.start_edu_device("edu1")];
    system.install_edu_driver();
    system.start(&(system.edu_config("edu0") + &system.edu_config("edu1")));
    let (first, other) = (system.await_ready("edu0"), system.await_ready("edu1"));
    let session = system.connect().open("edu1").unwrap();

    kill_process(first);
    eventually("the replacement", || system.service("edu0").incarnation == 2);
    system.await_ready("edu0");
    assert_eq!(system.service("edu1").pid, Some(other));
    assert_eq!(session.client::<edu_api::Client>().unwrap().factorial(4).wait(), Ok(24));
}

#[test]
fn the_command_line_calls_lists_and_shows() {
    let (system, _device) = System::with_edu();
    let call = system.iohost(&["call", "edu0", "factorial", "5"]);
    assert_eq!((call.code, call.stdout.trim()), (Some(0), "120"));
    let status = system.iohost(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["services"][0]["name"], "edu0");
    let queues = system.iohost(&["--json", "status", "edu0"]);
    let queues: serde_json::Value = serde_json::from_str(&queues.stdout).unwrap();
    let default = queues["queues"].as_array().unwrap().iter().find(|it| it["name"] == "Default");
    assert!(default.unwrap()["executed"].as_u64().unwrap() > 0, "{queues}");
    let wrong = system.iohost(&["call", "edu0", "factorial", "many"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("next:"), "{}", wrong.stderr);
}
