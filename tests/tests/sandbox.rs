//! What a hostile driver gets at: nothing (`docs/sandbox.md`).

use std::fs;

use hostile_plugin::api;
use iohost_client::varlink::State;
use iohost_tests::{Emulated, System, eventually};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::Uid;

/// Service `hostile0` with the hostile driver, and `other0` with another one.
fn hostile(sandbox: &str) -> (System, [Emulated; 2]) {
    let mut system = System::new();
    let devices = [system.start_edu_device("hostile0"), system.start_edu_device("other0")];
    system.install_driver("hostile_plugin");
    system.install_edu_driver();
    let config = config(&system, sandbox);
    system.start(&config);
    (system, devices)
}

fn config(system: &System, sandbox: &str) -> String {
    format!(
        "sandbox = {sandbox:?}\n{}{}",
        system.device_config("hostile0", "hostile_plugin"),
        system.edu_config("other0"),
    )
}

/// Each attempt's name and what became of it.
fn attempts(system: &System) -> Vec<(String, String)> {
    system.await_ready("hostile0");
    let other = system.await_ready("other0");
    let folder = system.path("");
    fs::write(system.path("victim"), "untouched").unwrap();
    let session = system.connect().open("hostile0").unwrap();
    let client = session.client::<api::Client>().unwrap();
    let places = format!("{}\n{}", folder.display(), system.socket().display());
    let daemon = system.connect().status().unwrap().pid;
    let count = client.aim(daemon, other, places);
    let attempt = |number| {
        let told = client.attempt(number).wait().unwrap();
        let (name, outcome) = told.split_once('\t').unwrap();
        (name.to_owned(), outcome.to_owned())
    };
    (0..count.wait().unwrap()).map(attempt).collect()
}

#[test]
fn every_way_out_of_the_sandbox_is_closed_and_stands_in_the_documentation() {
    let (system, _devices) = hostile("on");
    let host = system.await_ready("hostile0");
    let attempts = attempts(&system);

    assert!(attempts.len() >= 30, "{}", attempts.len());
    let escaped: Vec<_> = attempts.iter().filter(|it| it.1.starts_with("ESCAPED")).collect();
    let sandbox = system.service("hostile0").sandbox;
    assert!(escaped.is_empty(), "in {sandbox:?}: {escaped:#?}");

    let mut table = "| tried | refused with |\n| --- | --- |\n".to_owned();
    for (name, outcome) in &attempts {
        table += &format!("| {name} | {outcome} |\n");
    }
    let documentation = include_str!("../../docs/sandbox.md");
    assert!(documentation.contains(&table), "docs/sandbox.md has another table than:\n\n{table}");

    let service = system.service("hostile0");
    for call in ["ptrace", "process_vm_readv", "socket", "kill", "mount", "execve", "openat"] {
        assert!(service.refused_calls.iter().any(|it| it == call), "{call}: {service:?}");
        assert!(system.daemon_log().contains(&format!("call={call}")), "{call} is in the log");
    }
    assert_eq!(service.pid, Some(host), "it lives, in the process it was in");
    assert_eq!(system.service("other0").incarnation, 1);
    assert_eq!(fs::read_to_string(system.path("victim")).unwrap(), "untouched");
}

/// Were the attempts no real ones, the test above would prove nothing.
#[test]
fn without_the_sandbox_the_same_ways_are_open() {
    let (system, _devices) = hostile("off");
    let attempts = attempts(&system);
    let open = attempts.iter().filter(|it| it.1.starts_with("ESCAPED")).count();
    // Some are closed to whoever is not root.
    let least = if Uid::effective().is_root() { 70 } else { 40 };
    assert!(open >= least, "{open} of {}: {attempts:#?}", attempts.len());
    assert_eq!(system.service("hostile0").sandbox.as_deref(), Some("off"));
    assert!(system.daemon_log().contains("the sandbox is off"));
}

#[test]
fn a_driver_host_has_no_right_of_its_daemon_left() {
    let (system, _devices) = hostile("on");
    let hosts = [system.await_ready("hostile0"), system.await_ready("other0")];
    let field = |host: u32, name: &str| {
        let status = fs::read_to_string(format!("/proc/{host}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    for host in hosts {
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(host, set), "0000000000000000", "{set}");
        }
        assert_eq!((field(host, "NoNewPrivs"), field(host, "Seccomp")), ("1".into(), "2".into()));
        for task in fs::read_dir(format!("/proc/{host}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2"), "every thread is inside: {status}");
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        }
    }
    if Uid::effective().is_root() {
        assert_eq!(field(hosts[0], "CapBnd"), "0000000000000000");
        assert_eq!(field(hosts[0], "Groups"), "");
        let [one, other] = hosts.map(|host| field(host, "Uid"));
        assert_ne!(one, other, "each has a user of its own");
        assert!(!one.split_whitespace().any(|uid| uid == "0"), "{one}");
    }
}

#[test]
fn a_driver_host_has_nothing_that_its_daemon_inherited() {
    let mut system = System::new();
    let _device = system.start_edu_device("edu0");
    system.install_edu_driver();
    let secret = system.path("secret");
    fs::write(&secret, "for the daemon's parent").unwrap();
    let file = fs::File::open(&secret).unwrap();
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    system.start(&system.edu_config("edu0"));
    let host = system.await_ready("edu0");
    let has_secret = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).any(|file| file == secret)
    };
    assert!(has_secret(system.connect().status().unwrap().pid), "or there is nothing to pass on");
    assert!(!has_secret(host));
}

#[test]
fn a_device_does_not_reach_what_was_not_mapped_for_it() {
    let (system, _devices) = hostile("on");
    system.await_ready("hostile0");
    let session = system.connect().open("hostile0").unwrap();
    let client = session.client::<api::Client>().unwrap();
    for address in [0x0, 0x80_0000, 0xfff_f000] {
        let back = client.dma(address).wait().unwrap();
        assert!(back.iter().all(|byte| *byte == 0), "from {address:#x}: {back:?}");
    }
    let log = fs::read_to_string(system.path("hostile0.log")).unwrap();
    assert!(log.contains("a dma transfer was blocked"), "{log}");
}

#[test]
fn a_refused_call_is_the_end_of_a_strict_driver_host_and_is_named_as_its_reason() {
    let (system, _devices) = hostile("strict");
    if !Uid::effective().is_root() {
        eventually("the refusal", || system.service("hostile0").reason.is_some());
        let reason = system.service("hostile0").reason.unwrap();
        assert_eq!(reason.code, "sandbox-incomplete");
        return;
    }
    system.await_ready("hostile0");
    let session = system.connect().open("hostile0").unwrap();
    let client = session.client::<api::Client>().unwrap();
    assert!(client.misbehave().wait().is_err(), "its driver host is gone");
    eventually("the next one", || system.service("hostile0").incarnation > 1);
    let log = system.daemon_log();
    let reason = format!("seccomp: system call {} (reboot)", libc::SYS_reboot);
    assert!(log.contains("was killed by signal 31 (SIGSYS)"), "{log}");
    assert!(log.contains(&reason), "{reason}: {log}");
    eventually("it runs again", || system.service("hostile0").state == State::Running);
}

#[test]
fn the_next_daemon_knows_the_sandbox_and_hears_of_what_it_refuses() {
    let (mut system, _devices) = hostile("on");
    let host = system.await_ready("hostile0");
    let session = system.connect().open("hostile0").unwrap();
    let client = session.client::<api::Client>().unwrap();
    // Told to the first daemon, and not to the next one before it is refused again.
    client.misbehave().wait().unwrap();
    eventually("the refusal", || system.service("hostile0").refused_calls == ["reboot"]);
    let before = system.service("hostile0");
    let config = config(&system, "on");
    system.kill_daemon();
    // To nobody.
    client.misbehave().wait().unwrap();
    system.start(&config);
    assert_eq!(system.await_ready("hostile0"), host);
    let now = system.service("hostile0");
    assert_eq!((&now.sandbox, now.taken_over), (&before.sandbox, true));
    assert_eq!(now.refused_calls, Vec::<String>::new(), "the handover itself needs none");
    client.misbehave().wait().unwrap();
    eventually("the refusal", || system.service("hostile0").refused_calls == ["reboot"]);
    assert_eq!(system.await_ready("hostile0"), host);
}
