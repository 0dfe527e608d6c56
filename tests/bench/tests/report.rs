//! What `scripts/bench` promises to whoever reads its output. Nothing here is about speed.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_iohost_bench");
    Command::new(program).arg("--quick").args(arguments).output().unwrap()
}

/// The lines of a run that succeeded.
fn lines(arguments: &[&str]) -> Vec<Value> {
    let output = bench(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    let stdout = String::from_utf8(output.stdout).unwrap();
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text<'a>(line: &'a Value, key: &str) -> &'a str {
    line[key].as_str().unwrap_or_else(|| panic!("no {key} in {line}"))
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"))
}

const CHANNELS: &[&str] = &["crossbeam-channel", "kanal", "flume", "std mpsc"];
const HAND_OVERS: &[&str] = &["mutex + condvar", "crossbeam-channel", "std mpsc"];
const REPLIES: &[&str] = &["crossbeam-channel", "std mpsc"];
const WAITS: &[&str] = &["epoll_wait + read", "mio + read"];
const BETWEEN_PROCESSES: &[&str] = &["shmem-ipc", "pipe", "Unix seqpacket socket"];
const STREAMS: &[&str] = &["shmem-ipc", "pipe", "Unix seqpacket socket", "bbqueue"];
const UNRECORDED: &[&str] = &["iohost_dispatch"];

const POLLED: &[&str] = &["cache line there and back", "a cache line each way", "shmem-ipc"];
const SLEEPING: &[&str] = &["eventfd ping-pong", "eventfd + epoll_wait ping-pong"];

/// Area, metric, and the peers one of which is the best.
const PROMISED: &[(&str, &str, &[&str])] = &[
    ("device", "instructions_per_register_read", &["atomic word"]),
    ("device", "instructions_per_register_write", &["atomic word"]),
    ("device", "instructions_per_bar_read", &["atomic word"]),
    ("device", "instructions_per_bar_write", &["atomic word"]),
    ("device", "prepare_and_complete_ns", &["2 empty system calls"]),
    ("dispatch", "async_ops_per_s", CHANNELS),
    ("dispatch", "driver_async_ops_per_s", CHANNELS),
    ("dispatch", "async_2_producers_ops_per_s", CHANNELS),
    ("dispatch", "driver_async_2_producers_ops_per_s", CHANNELS),
    ("dispatch", "async_from_own_item_ns", CHANNELS),
    ("dispatch", "driver_async_from_own_item_ns", CHANNELS),
    ("dispatch", "async_to_idle_p50_ns", HAND_OVERS),
    ("dispatch", "driver_async_to_idle_p50_ns", HAND_OVERS),
    ("dispatch", "sync_idle_ns", &["lock and call"]),
    ("dispatch", "driver_sync_idle_ns", &["lock and call"]),
    ("dispatch", "sync_2_callers_ops_per_s", REPLIES),
    ("dispatch", "driver_sync_2_callers_ops_per_s", REPLIES),
    ("events", "handler_p50_ns", WAITS),
    ("events", "handler_p99_ns", WAITS),
    ("events", "driver_handler_p50_ns", WAITS),
    ("events", "driver_handler_p99_ns", WAITS),
    ("events", "system_calls_per_event", &["epoll_wait + read"]),
    ("events", "driver_system_calls_per_event", &["epoll_wait + read"]),
    ("nvme", "core_reads_per_s", &["rings by hand"]),
    ("nvme", "instructions_per_core_read", &["rings by hand"]),
    ("nvme", "client_reads_per_s", &["driver core alone"]),
    ("nvme", "system_calls_per_read", &["pread"]),
    ("queue", "stream_8_messages_per_s", STREAMS),
    ("queue", "stream_64_messages_per_s", STREAMS),
    ("queue", "stream_512_messages_per_s", STREAMS),
    ("queue", "stream_4096_messages_per_s", STREAMS),
    ("queue", "round_trip_p50_ns", BETWEEN_PROCESSES),
    ("queue", "round_trip_p99_ns", BETWEEN_PROCESSES),
    ("queue", "stream_64_system_calls", BETWEEN_PROCESSES),
    ("queue", "batched_64_messages_per_s", &["plain copy between two cores"]),
    ("queue", "polled_round_trip_ns", POLLED),
    ("queue", "sleeping_round_trip_p50_ns", SLEEPING),
    ("queue", "sleeping_round_trip_p99_ns", SLEEPING),
    ("recorder", "recorded_async_ops_per_s", UNRECORDED),
    ("recorder", "recorded_async_2_producers_ops_per_s", UNRECORDED),
    ("recorder", "recorded_async_from_own_item_ns", UNRECORDED),
    ("recorder", "recorded_async_to_idle_p50_ns", UNRECORDED),
    ("recorder", "recorded_sync_idle_ns", UNRECORDED),
    ("recorder", "recorded_sync_2_callers_ops_per_s", UNRECORDED),
    ("restart", "death_to_first_entry_p50_us", &["waitpid and spawn"]),
    ("restart", "death_to_first_entry_p99_us", &["waitpid and spawn"]),
    ("restart", "idle_driver_host_pss_kib", &["a process that waits"]),
    ("timers", "arm_of_100k_ns", &["ours of 100"]),
    ("timers", "rearm_of_100k_ns", &["ours of 100"]),
    ("timers", "put_off_of_100k_ns", &["ours of 100"]),
    ("timers", "cancel_of_100k_ns", &["ours of 100"]),
    ("timers", "put_off_of_1_ns", &["tokio"]),
    ("timers", "move_of_1_ns", &["tokio"]),
    ("timers", "put_off_of_10k_ns", &["tokio"]),
    ("timers", "move_of_10k_ns", &["tokio"]),
    ("timers", "late_at_1khz_p50_ns", &["timerfd + epoll_wait"]),
];

#[test]
fn every_promised_figure_is_printed_once_beside_its_best_peer() {
    let lines = lines(&["--json"]);
    let figures = lines.iter().map(|line| (text(line, "bench"), text(line, "metric")));
    let promised = PROMISED.iter().map(|(bench, metric, _)| (*bench, *metric));
    assert!(figures.eq(promised), "{lines:#?}");
    for (line, (_, _, peers)) in lines.iter().zip(PROMISED) {
        assert!(peers.contains(&text(line, "peer_name")), "{line}");
    }
}

#[test]
fn the_table_names_every_peer() {
    let output = bench(&["device", "dispatch", "events"]);
    let table = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<&str> = table.lines().collect();
    // Between the heading and what a ratio means.
    for (row, (_, metric, peers)) in rows[1..rows.len() - 1].iter().zip(PROMISED) {
        assert!(peers.iter().all(|peer| row.contains(peer)), "{metric}: {row}");
    }
}

/// A count, not a time; what starting and ending cost varies by a few calls, so it is rounded.
#[test]
fn an_event_costs_two_system_calls() {
    let lines = lines(&["events", "--json"]);
    let is_count = |line: &&Value| text(line, "metric").ends_with("system_calls_per_event");
    let counts: Vec<_> = lines.iter().filter(is_count).collect();
    assert_eq!(counts.len(), 2);
    for line in counts {
        assert_eq!(number(line, "ours").round(), 2.0, "{line}");
        assert_eq!(number(line, "peer").round(), 2.0, "{line}");
    }
}

#[test]
fn a_ratio_over_one_is_in_our_favour() {
    for line in lines(&["--json"]) {
        let [ours, peer, ratio] = ["ours", "peer", "ratio"].map(|key| number(&line, key));
        assert!(ours > 0.0 && peer > 0.0, "{line}");
        let more_is_better = text(&line, "metric").ends_with("_per_s");
        let expected = if more_is_better { ours / peer } else { peer / ours };
        // As far as the printed digits go.
        assert!((ratio / expected - 1.0).abs() < 0.01, "{line}");
    }
}

#[test]
fn a_line_has_the_six_keys_and_no_more() {
    for line in lines(&["--json", "events"]) {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["bench", "metric", "ours", "peer", "peer_name", "ratio"]);
    }
}

#[test]
fn a_named_area_is_the_only_one_that_runs() {
    let lines = lines(&["queue", "--json"]);
    let promised = PROMISED.iter().filter(|(area, ..)| *area == "queue").count();
    assert_eq!(lines.len(), promised);
    assert!(lines.iter().all(|line| text(line, "bench") == "queue"));
}

#[test]
fn an_area_that_is_not_there_is_said_to_be_unknown() {
    let output = bench(&["dispatch", "time"]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let complaint = "no such area `time`; there are: device, dispatch, events, nvme, queue, recorder, \
                     restart, timers";
    assert!(stderr.contains(complaint), "{stderr}");
    assert_eq!(output.stdout, b"", "nothing ran");
}
