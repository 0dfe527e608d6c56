//! What an operator may get wrong: each refusal names what is wrong and what to do, with a stable
//! code, and nothing is left behind.

use std::fs;
use std::os::unix::net::UnixListener;

use iohost_tests::{Ended, System, eventually};

/// A refused start: exit code 2, the words asked for, and no socket left behind.
fn assert_refused(system: &System, ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "no {word:?} in:\n{}", ended.stderr);
    }
    assert!(ended.stderr.contains("next:"), "{}", ended.stderr);
    assert!(!system.socket().exists());
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let system = System::new();
    let ended = system.start_refused("[[device]]\nname = \"edu0\"\nsokcet = \"/x\"\n");
    assert_refused(&system, &ended, &["iohost.toml:5", "sokcet"]);
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_line() {
    let system = System::new();
    let ended = system.start_refused("[limits]\nsessions_per_service = \"many\"\n");
    assert_refused(&system, &ended, &["iohost.toml:4"]);
}

#[test]
fn a_driver_that_is_not_there_is_named() {
    let system = System::new();
    let ended = system.start_refused(&system.edu_config("edu0"));
    assert_refused(&system, &ended, &["edu", "drivers"]);
}

#[test]
fn a_missing_configuration_is_named() {
    let system = System::new();
    let ended = system.iohost(&["daemon", "--config", "/nowhere/iohost.toml"]);
    assert_refused(&system, &ended, &["/nowhere/iohost.toml"]);
}

/// The reason a service gives for not running, once it has one.
fn reason(system: &System, service: &str) -> (String, String, String) {
    let mut found = None;
    eventually("the reason why the service does not run", || {
        found = system.service(service).reason;
        found.is_some()
    });
    let reason = found.expect("waited for");
    (reason.code, reason.message, reason.next)
}

#[test]
fn a_device_server_that_is_not_there_is_reported_and_bind_tries_again() {
    let mut system = System::new();
    system.install_edu_driver();
    system.start(&system.edu_config("edu0"));
    let (code, message, next) = reason(&system, "edu0");
    assert_eq!(code, "device-server");
    assert!(message.contains("edu0"), "{message}");
    assert!(next.contains("vfio-user server"), "{next}");

    let _device = system.start_edu_device("edu0");
    let bound = system.iohost(&["bind", "edu0"]);
    assert_eq!(bound.code, Some(0), "{}", bound.stderr);
    system.await_ready("edu0");
}

#[test]
fn a_device_server_that_answers_nothing_costs_its_own_service_only() {
    let mut system = System::new();
    let _device = system.start_edu_device("edu0");
    let silent = UnixListener::bind(system.path("silent")).unwrap();
    system.install_edu_driver();
    system.start(&(system.edu_config("edu0") + &system.edu_config("silent")));
    system.await_ready("edu0");
    let (_, message, _) = reason(&system, "silent");
    assert!(message.contains("silent"), "{message}");
    drop(silent);
}

#[test]
fn a_file_that_is_no_plugin_is_passed_over_with_a_warning() {
    let mut system = System::new();
    let _device = system.start_edu_device("edu0");
    system.install_edu_driver();
    fs::write(system.path("drivers/notes.so"), "not a plugin").unwrap();
    system.start(&system.edu_config("edu0"));
    system.await_ready("edu0");
    assert!(system.daemon_log().contains("notes.so"), "{}", system.daemon_log());
}

#[test]
fn a_service_that_is_not_there_is_refused_by_name() {
    let (system, _device) = System::with_edu();
    let call = system.iohost(&["--json", "call", "nowhere", "factorial", "5"]);
    assert_eq!(call.code, Some(1));
    let failure: serde_json::Value = serde_json::from_str(&call.stderr).unwrap();
    assert!(failure["message"].as_str().unwrap().contains("nowhere"), "{failure}");
    assert!(failure["next"].as_str().is_some_and(|next| !next.is_empty()), "{failure}");
}

#[test]
fn a_second_daemon_in_the_same_folder_is_refused_with_the_process_of_the_first() {
    let (system, _device) = System::with_edu();
    let first = system.connect().status().unwrap().pid;
    let second = system.start_refused(&system.edu_config("edu0"));
    assert_ne!(second.code, Some(0));
    assert!(second.stderr.contains(&first.to_string()), "{}", second.stderr);
    system.await_ready("edu0");
}

#[test]
fn without_a_daemon_a_client_is_told_how_to_start_one() {
    let system = System::new();
    let status = system.iohost(&["status"]);
    assert_eq!(status.code, Some(1));
    assert!(status.stderr.contains("iohost daemon"), "{}", status.stderr);
}

#[test]
fn a_plugin_that_is_replaced_while_it_runs_goes_on_and_the_next_start_has_the_new_one() {
    let (system, _device) = System::with_edu();
    let plugin = system.path("drivers/libedu.so");
    let whole = fs::read(&plugin).unwrap();
    // As an installer does it, and as one does it who was interrupted.
    fs::write(system.path("half"), &whole[..whole.len() / 2]).unwrap();
    fs::rename(system.path("half"), &plugin).unwrap();
    let call = system.iohost(&["call", "edu0", "factorial", "5"]);
    assert_eq!((call.code, call.stdout.trim()), (Some(0), "120"), "{}", call.stderr);
    assert_eq!(system.iohost(&["unbind", "edu0"]).code, Some(0));
    let refused = system.iohost(&["--json", "bind", "edu0"]);
    let failure: serde_json::Value = serde_json::from_str(&refused.stderr).unwrap();
    assert_eq!(refused.code, Some(1));
    assert!(failure["code"].as_str().unwrap().starts_with("plugin-"), "{failure}");
    assert!(failure["message"].as_str().unwrap().contains("libedu.so"), "{failure}");

    fs::write(system.path("whole"), &whole).unwrap();
    fs::rename(system.path("whole"), &plugin).unwrap();
    assert_eq!(system.iohost(&["bind", "edu0"]).code, Some(0));
    system.await_ready("edu0");
}

#[test]
fn a_daemon_without_descriptors_refuses_sessions_by_name_and_goes_on() {
    use nix::sys::resource::Resource;
    let (system, _device) = System::with_edu();
    let mut daemon = system.connect();
    let pid = daemon.status().unwrap().pid;
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    limit(pid, Resource::RLIMIT_NOFILE, open + 8);
    let mut sessions = Vec::new();
    let refused = loop {
        match daemon.open("edu0") {
            Ok(session) => sessions.push(session),
            Err(iohost_client::ClientError::Refused(failure)) => break failure,
            Err(other) => panic!("{other}"),
        }
        assert!(sessions.len() < 16, "it never ran out");
    };
    assert_eq!(refused.code, "no-resources");
    assert!(refused.next.contains("open files"), "{}", refused.next);
    assert!(daemon.status().is_ok(), "it goes on");
    sessions.clear();
    limit(pid, Resource::RLIMIT_NOFILE, open + 200);
    eventually("a session again", || daemon.open("edu0").is_ok());
}

/// Sets a limit of another process.
fn limit(pid: u32, resource: nix::sys::resource::Resource, value: u64) {
    let name = match resource {
        nix::sys::resource::Resource::RLIMIT_NOFILE => "--nofile",
        other => panic!("no such limit: {other:?}"),
    };
    let mut command = std::process::Command::new("prlimit");
    let done = command.args(["--pid", &pid.to_string(), &format!("{name}={value}:")]).status();
    assert!(done.expect("util-linux is installed").success());
}
