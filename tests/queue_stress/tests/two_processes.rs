//! Two processes that exchange entries in handlers alone; ten times this and more by hand, see
//! `src/main.rs`.

use std::process::Command;

#[track_caller]
fn stream(entries: &str, queue_bytes: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_iohost_queue_stress"))
        .args(["stream", "--entries", entries, "--queue-bytes", queue_bytes])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    assert!(said.contains(&format!("{entries} entries out and {entries} in")), "{said}");
}

#[test]
fn a_million_entries_go_each_way_between_two_processes_that_are_only_notified() {
    stream("1000000", "4096");
}

#[test]
fn entries_go_each_way_through_queues_of_two_entries_between_processes_that_are_only_notified() {
    stream("50000", "152");
}
