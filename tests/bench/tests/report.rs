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

#[test]
fn every_promised_figure_is_printed_once_beside_its_peer() {
    let lines = lines(&["--json"]);
    let figures: Vec<_> = lines
        .iter()
        .map(|line| (text(line, "bench"), text(line, "metric"), text(line, "peer_name")))
        .collect();
    let expected = [
        ("dispatch", "async_ops_per_s", "crossbeam-channel"),
        ("dispatch", "driver_async_ops_per_s", "crossbeam-channel"),
        ("events", "handler_p50_ns", "epoll_wait + read"),
        ("events", "handler_p99_ns", "epoll_wait + read"),
        ("queue", "messages_per_s", "Unix seqpacket socket"),
        ("queue", "round_trip_p50_ns", "Unix seqpacket socket"),
        ("queue", "round_trip_p99_ns", "Unix seqpacket socket"),
    ];
    assert_eq!(figures, expected);
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
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| text(line, "bench") == "queue"));
}

#[test]
fn an_area_that_is_not_there_is_said_to_be_planned_or_unknown() {
    for (area, complaint) in [("timers", "no benchmark of `timers` yet"), ("time", "no such area")]
    {
        let output = bench(&["dispatch", area]);
        assert_eq!(output.status.code(), Some(2), "{area}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(complaint), "{stderr}");
        assert!(stderr.contains("there are: dispatch, events, queue"), "{stderr}");
        assert_eq!(output.stdout, b"", "nothing ran");
    }
}
