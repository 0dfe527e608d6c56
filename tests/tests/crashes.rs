//! Drivers that die in every way, and what the daemon says and does about it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use iohost_interface::IOReturn;
use iohost_tests::{Emulated, System, copy_program, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A system with the `probe` driver on some devices, started again at once and as often as needed.
fn system(devices: &[&str], restart: &str) -> (System, Vec<Emulated>) {
    system_in("sandbox = \"on\"", devices, restart)
}

fn system_in(sandbox: &str, devices: &[&str], restart: &str) -> (System, Vec<Emulated>) {
    let mut system = System::new();
    let processes = devices.iter().map(|name| system.start_edu_device(name)).collect();
    system.install_driver("probe");
    let config = config(&system, sandbox, devices, restart);
    system.start(&config);
    for name in devices {
        system.await_ready(name);
    }
    (system, processes)
}

fn config(system: &System, sandbox: &str, devices: &[&str], restart: &str) -> String {
    let state = system.path("state");
    let mut config = format!("state_directory = {state:?}\n{sandbox}\n[restart]\n{restart}\n");
    for name in devices {
        config += &system.device_config(name, "probe");
    }
    config
}

const OFTEN: &str = "most = 1000\npause_seconds = 0";

fn crashes(system: &System, arguments: &[&str]) -> Value {
    let state = system.path("state");
    let arguments = [&["--json", "crashes", "--state-dir", state.to_str().unwrap()], arguments];
    let shown = system.iohost(&arguments.concat());
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    serde_json::from_str(&shown.stdout).unwrap()
}

/// Waits for a report, complete with what became of the device.
fn await_crash(system: &System, number: usize) -> Value {
    let is_complete = || {
        let list = crashes(system, &[]);
        list["crashes"].get(number - 1).is_some_and(|crash| !crash["device_after"].is_null())
    };
    eventually("a crash report", is_complete);
    crashes(system, &["show", &number.to_string()])
}

/// Has a driver die in the middle of a call.
fn call(system: &System, device: &str, method: &str, arguments: &[&str]) {
    let died = system.iohost(&[&["call", device, method], arguments].concat());
    assert_eq!(died.code, Some(1), "{}", died.stdout);
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn queue<'a>(crash: &'a Value, name: &str) -> &'a Value {
    let queues = crash["queues"].as_array().unwrap();
    queues.iter().find(|queue| queue["queue"] == name).unwrap_or_else(|| panic!("{crash:#}"))
}

fn events(queue: &Value) -> Vec<&str> {
    queue["events"].as_array().unwrap().iter().map(|event| text(&event["what"])).collect()
}

#[test]
fn each_way_to_die_in_a_call_is_told_with_its_cause_the_call_and_what_came_before() {
    let (system, _devices) = system(&["edu0"], OFTEN);
    let ways = [
        ("0", "signal", "was killed by signal 11 (SIGSEGV"),
        ("1", "signal", "was killed by signal 6 (SIGABRT"),
        ("2", "panic", "panicked: the probe was asked to, at drivers/probe/src/lib.rs:"),
        ("3", "exit", "exited with code 3"),
    ];
    for (number, (how, reason, words)) in ways.into_iter().enumerate() {
        system.await_ready("edu0");
        call(&system, "edu0", "die", &[how]);
        let crash = await_crash(&system, number + 1);
        assert_eq!(crash["reason"], reason, "{crash:#}");
        assert!(text(&crash["message"]).contains(words), "{crash:#}");
        assert_eq!((&crash["device"], &crash["driver"]), (&"edu0".into(), &"probe".into()));
        assert_eq!(crash["incarnation"], number + 1);
        assert_eq!(crash["decision"]["restart"]["pause_ms"], 0);
        assert_eq!(crash["device_before"]["outcome"], "reset");
        assert_eq!(crash["device_after"]["outcome"], "reset");
        let left = text(&crash["device_after"]["left"]);
        assert!(left.starts_with("command 0x") && !left.contains("bus master"), "{crash:#}");

        let default = queue(&crash, "Default");
        let events = events(default);
        assert!(events.contains(&"the driver's start"), "{crash:#}");
        assert_eq!(events[0], "the driver's start", "oldest first: {crash:#}");
        assert!(events.iter().any(|what| what.ends_with(" opened")), "{crash:#}");
        if reason == "panic" {
            assert_eq!(crash["in_flight"], serde_json::json!([]), "a panic answers its caller");
            assert!(text(&crash["panic"]).contains("the probe was asked to"));
            assert_eq!(text(&crash["ended"]), "exited with code 101");
        } else {
            assert!(text(&default["doing"]).starts_with("call die of session"), "{crash:#}");
            let in_flight = crash["in_flight"].as_array().unwrap();
            assert_eq!(in_flight.len(), 1, "{crash:#}");
            assert_eq!(
                (&in_flight[0]["method"], &in_flight[0]["stage"]),
                (&"die".into(), &"running".into())
            );
            assert!(text(&in_flight[0]["fate"]).contains("NO_COMPLETION"));
        }
    }
    let shown = system.iohost(&["crashes", "--state-dir", system.path("state").to_str().unwrap()]);
    for (_, reason, _) in ways {
        assert!(shown.stdout.contains(reason), "{}", shown.stdout);
    }
}

#[test]
fn calls_that_wait_and_calls_that_are_owed_are_told_apart_from_the_one_that_ran() {
    let (system, _devices) = system(&["edu0"], OFTEN);
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    let held = probe.hold();
    assert_eq!(probe.aborted().wait(), Ok(0), "an answered call is none in flight");
    let spins = probe.spin(0, 1);
    let waits = probe.aborted();
    eventually("the call that waits to be read", || {
        let queues = system.iohost(&["--json", "status", "edu0"]).stdout;
        let queues: Value = serde_json::from_str(&queues).unwrap_or_default();
        let default = queues["queues"].as_array().into_iter().flatten();
        default.filter(|queue| queue["name"] == "Default").any(|queue| queue["depth"] == 2)
    });
    kill_process(system.service("edu0").pid.unwrap(), Signal::SIGKILL);
    for call in [held.wait(), spins.wait()] {
        assert_eq!(call, Err(IOReturn::NO_COMPLETION));
    }
    assert_eq!(waits.wait(), Ok(0), "the next driver host gets what was not begun");
    let crash = await_crash(&system, 1);
    assert_eq!(crash["reason"], "signal");
    let stages: BTreeMap<_, _> = crash["in_flight"]
        .as_array()
        .unwrap()
        .iter()
        .map(|call| (text(&call["method"]), text(&call["stage"])))
        .collect();
    assert_eq!(stages, [("hold", "taken"), ("spin", "running"), ("aborted", "queued")].into());
}

#[test]
fn a_driver_that_turns_in_a_circle_is_found_killed_and_started_again() {
    let (system, _devices) = system(&["edu0"], &format!("{OFTEN}\nhang_seconds = 0.4"));
    call(&system, "edu0", "spin", &["0", "0"]);
    let crash = await_crash(&system, 1);
    assert_eq!(crash["reason"], "hang", "{crash:#}");
    let message = text(&crash["message"]);
    assert!(message.contains("queue \"Default\" is in call spin of session"), "{message}");
    assert!(message.ends_with("for 400ms"), "{message}");
    assert_eq!(text(&crash["ended"]), "was killed by signal 9 (SIGKILL)");
    system.await_ready("edu0");
    assert_eq!(system.iohost(&["call", "edu0", "aborted"]).code, Some(0));
}

#[test]
fn a_driver_host_of_an_earlier_daemon_is_watched_and_its_death_is_told_like_any_others() {
    let restart = format!("{OFTEN}\nhang_seconds = 0.4");
    let (mut system, _devices) = system(&["edu0"], &restart);
    let config = config(&system, "sandbox = \"on\"", &["edu0"], &restart);
    let ways = [("spin", ["0", "0"].as_slice(), "hang"), ("die", ["0"].as_slice(), "exit")];
    for (number, (method, arguments, reason)) in ways.into_iter().enumerate() {
        let host = system.await_ready("edu0");
        system.kill_daemon();
        system.start(&config);
        assert_eq!(system.await_ready("edu0"), host);
        assert!(system.service("edu0").taken_over);
        call(&system, "edu0", method, arguments);
        let crash = await_crash(&system, number + 1);
        assert_eq!((&crash["reason"], &crash["pid"]), (&reason.into(), &host.into()), "{crash:#}");
        assert_eq!(text(&crash["ended"]), "ended; how is unknown, an earlier daemon started it");
        assert_eq!(crash["device_before"]["outcome"], "reset");
        let default = queue(&crash, "Default");
        assert_eq!(events(default)[0], "the driver's start", "of before: {crash:#}");
        let doing = format!("call {method} of session");
        assert!(text(&default["doing"]).starts_with(&doing), "{crash:#}");
        eventually("one of the new daemon's own", || !system.service("edu0").taken_over);
    }
}

#[test]
fn a_driver_that_reports_progress_is_left_alone_up_to_the_cap() {
    let restart = format!("{OFTEN}\nhang_seconds = 0.4\nhang_cap_seconds = 4");
    let (system, _devices) = system(&["edu0"], &restart);
    // Well over the time that one may take without.
    let worked = system.iohost(&["call", "edu0", "spin", "1500", "1"]);
    assert_eq!(worked.code, Some(0), "{}", worked.stderr);
    assert_eq!(system.service("edu0").incarnation, 1);
    call(&system, "edu0", "spin", &["0", "1"]);
    let crash = await_crash(&system, 1);
    assert_eq!(crash["reason"], "hang");
    let message = text(&crash["message"]);
    assert!(message.contains("for 4s, which is the most"), "{message}");
}

#[test]
fn a_process_that_is_stopped_with_nothing_to_do_is_found() {
    let (system, _devices) = system(&["edu0"], &format!("{OFTEN}\nhang_seconds = 0.4"));
    let first = system.await_ready("edu0");
    kill_process(first, Signal::SIGSTOP);
    let crash = await_crash(&system, 1);
    assert_eq!(crash["reason"], "hang");
    assert!(text(&crash["message"]).contains("was stopped by a signal"), "{crash:#}");
    assert_ne!(system.await_ready("edu0"), first);
}

#[test]
fn a_process_that_is_stopped_and_goes_on_in_time_is_left_alone() {
    let (system, _devices) = system(&["edu0"], &format!("{OFTEN}\nhang_seconds = 30"));
    let first = system.await_ready("edu0");
    for _ in 0..20 {
        kill_process(first, Signal::SIGSTOP);
        kill_process(first, Signal::SIGCONT);
    }
    assert_eq!(system.iohost(&["call", "edu0", "aborted"]).code, Some(0));
    assert_eq!(system.await_ready("edu0"), first);
}

#[test]
fn hang_detection_can_be_switched_off() {
    let (system, _devices) =
        system(&["edu0"], &format!("{OFTEN}\nhang_seconds = 0\nhang_cap_seconds = 0"));
    let worked = system.iohost(&["call", "edu0", "spin", "3000", "0"]);
    assert_eq!(worked.code, Some(0), "{}", worked.stderr);
}

#[test]
fn whatever_a_driver_writes_into_its_recorder_there_is_a_report() {
    // The driver reaches all of it by a file, which the sandbox would not open.
    let (system, _devices) = system_in("sandbox = \"off\"", &["edu0"], OFTEN);
    for (number, byte) in ["255", "127", "0", "1"].into_iter().enumerate() {
        system.await_ready("edu0");
        call(&system, "edu0", "scribble", &[byte]);
        let crash = await_crash(&system, number + 1);
        assert_eq!(crash["reason"], "signal", "{crash:#}");
        assert!(text(&crash["message"]).contains("SIGSEGV"), "{crash:#}");
        let shown = system.iohost(&[
            "crashes",
            "--state-dir",
            system.path("state").to_str().unwrap(),
            "show",
            &(number + 1).to_string(),
        ]);
        assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    }
}

#[test]
fn the_hook_gets_the_device_the_reason_the_incarnation_and_the_decision() {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let hook = script(
        folder.path(),
        &format!("echo \"$*|$IOHOST_DRIVER|$IOHOST_PAUSE_MS|$IOHOST_CRASH\" >> {}", said.display()),
    );
    let restart = format!("most = 1\npause_seconds = 0\nhook = {hook:?}");
    let (system, _devices) = system(&["edu0"], &restart);
    call(&system, "edu0", "die", &["0"]);
    system.await_ready_again("edu0", 2);
    call(&system, "edu0", "die", &["2"]);
    let expected = "edu0 signal 1 restart|probe|0|1\nedu0 panic 2 quarantine|probe|0|2\n";
    eventually("the hook to have run twice", || {
        fs::read_to_string(&said).is_ok_and(|said| said == expected)
    });
    eventually("quarantine", || format!("{:?}", system.service("edu0").state) == "Quarantined");
}

#[test]
fn a_hook_that_hangs_harms_nobody_and_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let hook = script(folder.path(), &format!("echo $$ >> {}\nexec sleep 1000", pids.display()));
    let restart = format!("{OFTEN}\nhook = {hook:?}\nhook_seconds = 1");
    let (mut system, _devices) = system(&["edu0", "edu1"], &restart);
    let other = system.connect().open("edu1").unwrap();
    let other = other.client::<probe_api::Client>().unwrap();
    for incarnation in 1..=3 {
        system.await_ready_again("edu0", incarnation);
        call(&system, "edu0", "die", &["0"]);
        assert_eq!(other.aborted().wait(), Ok(0));
    }
    eventually("the hooks to be killed", || {
        let log = system.daemon_log();
        log.matches("killed, as it took over 1s").count() >= 2
    });
    for pid in fs::read_to_string(&pids).unwrap().lines().take(2) {
        let is_gone = !Path::new(&format!("/proc/{pid}")).exists();
        assert!(is_gone, "one at a time, and the first two are over");
    }
    drop(other);
    assert_eq!(system.stop(), Some(0), "the daemon does not wait for a hook");
}

#[test]
fn a_driver_that_dies_again_and_again_costs_the_clients_of_another_nothing() {
    let (system, _devices) = system(&["edu0", "edu1"], OFTEN);
    let session = system.connect().open("edu1").unwrap();
    let other = session.client::<probe_api::Client>().unwrap();
    let (mut calls, first) = (0, system.await_ready("edu1"));
    thread::scope(|scope| {
        let crashing = scope.spawn(|| {
            for incarnation in 1..=15 {
                system.await_ready_again("edu0", incarnation);
                call(&system, "edu0", "die", &["0"]);
            }
        });
        while !crashing.is_finished() {
            assert_eq!(other.aborted().wait(), Ok(0), "after {calls} calls");
            calls += 1;
        }
        crashing.join().unwrap();
    });
    assert!(calls > 15, "{calls}");
    assert_eq!(system.await_ready("edu1"), first);
    assert!(crashes(&system, &[])["crashes"].as_array().unwrap().len() >= 15);
}

#[test]
fn a_report_that_cannot_be_written_is_a_line_in_the_log_and_the_driver_starts_again() {
    let (system, _devices) = system(&["edu0"], OFTEN);
    fs::create_dir_all(system.path("state")).unwrap();
    fs::write(system.path("state/crashes"), "in the way").unwrap();
    call(&system, "edu0", "die", &["0"]);
    system.await_ready_again("edu0", 2);
    eventually("the log", || system.daemon_log().contains("crash report not written"));
    assert_eq!(system.iohost(&["call", "edu0", "aborted"]).code, Some(0));
}

#[test]
fn daemon_and_driver_host_never_wake_up_while_there_is_nothing_to_do() {
    let (system, _devices) = system(&["edu0"], OFTEN);
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client::<probe_api::Client>().unwrap();
    // Some work, so that the watch is awake, and has to find rest again.
    for _ in 0..100 {
        assert_eq!(probe.aborted().wait(), Ok(0));
    }
    let host = system.await_ready("edu0");
    let daemon = system.connect().status().unwrap().pid;
    let both = || [runs(daemon), runs(host)];
    let still = |time| {
        let before = both();
        thread::sleep(time);
        both() == before
    };
    eventually("rest", || still(Duration::from_millis(1500)));
    let before = both();
    thread::sleep(Duration::from_secs(5));
    assert_eq!(both(), before, "(thread, times it ran), of daemon and driver host");
    assert_eq!(probe.aborted().wait(), Ok(0), "and they are there when there is");
}

/// How often each thread of a process has run: it has left its processor as often
/// (`proc_pid_status(5)`).
fn runs(pid: u32) -> BTreeMap<String, u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_thread = |thread: PathBuf| {
        let status = fs::read_to_string(thread.join("status")).ok()?;
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            value.trim().parse::<u64>().unwrap()
        };
        let name = fs::read_to_string(thread.join("comm")).ok()?;
        let number = thread.file_name()?.to_str()?.to_owned();
        let runs = field("voluntary_ctxt_switches:") + field("nonvoluntary_ctxt_switches:");
        Some((format!("{number} {}", name.trim()), runs))
    };
    threads.filter_map(|thread| of_thread(thread.unwrap().path())).collect()
}

fn kill_process(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

fn script(folder: &Path, text: &str) -> PathBuf {
    let (draft, file) = (folder.join("draft"), folder.join("hook"));
    fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
    copy_program(&draft, &file);
    file
}
