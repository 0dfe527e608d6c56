//! A campaign of faults on the real processes. More of them, and from a seed:
//!
//! ```sh
//! iohost faults run --count 1000000 --devices 16 --seed N
//! ```

use std::fs;
use std::process::Stdio;

use iohost_tests::{System, eventually, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

#[test]
fn a_campaign_of_faults_loses_nothing_and_leaves_nothing_behind() {
    let system = System::new();
    system.install_driver("edu");
    system.install_driver("probe");
    let drivers = system.path("drivers");
    let seed = fastrand::u64(..).to_string();
    println!("again with: iohost faults run --count 1000 --devices 8 --seed {seed}");
    let campaign =
        ["--json", "faults", "run", "--count", "1000", "--devices", "8", "--seed", &seed];
    let ended =
        system.iohost(&[&campaign[..], &["--driver-dir", drivers.to_str().unwrap()]].concat());
    assert_eq!(ended.code, Some(0), "{} {}", ended.stdout, ended.stderr);
    let score: Value = serde_json::from_str(&ended.stdout).unwrap();
    let count = |key: &str| score[key].as_u64().unwrap_or_else(|| panic!("no {key}: {score}"));
    assert!(count("faults") >= 1000 && count("device_faults") > 500, "{score}");
    // Each flaw of the two probes once, at least.
    assert!(count("inner_faults") >= 11, "{score}");
    assert!(count("entries") > 0 && count("damaged_entries") > 0, "{score}");
    for nothing in ["host_deaths", "lost_entries", "doubled_entries", "corrupt_entries"] {
        assert_eq!(count(nothing), 0, "{nothing}: {score}");
    }
    assert_eq!(count("unclean_devices"), 0, "{score}");
    assert_eq!(score["leaks"].as_array().map(Vec::len), Some(0), "{score}");
}

#[test]
fn a_campaign_that_is_told_to_end_gives_its_score_and_leaves_nothing_behind() {
    let system = System::new();
    system.install_driver("edu");
    system.install_driver("probe");
    let folder = system.path("campaign");
    fs::create_dir(&folder).unwrap();
    let campaign = program("iohost")
        .args(["--json", "faults", "run", "--count", "1000000000", "--driver-dir"])
        .arg(system.path("drivers"))
        .env("TMPDIR", &folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the campaign's daemon", || {
        let mut campaigns = fs::read_dir(&folder).unwrap();
        campaigns.any(|campaign| campaign.unwrap().path().join("run/io.iohost").exists())
    });
    kill(Pid::from_raw(campaign.id() as i32), Signal::SIGTERM).unwrap();
    let ended = campaign.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("\"faults-stopped\""), "{said}");
    let score: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert!(score["inner_faults"].as_u64() >= Some(11), "the probes' first round: {score}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "the campaign's folder is left");
}

#[test]
fn a_campaign_against_a_driver_that_is_not_there_says_so() {
    let ended = System::new().iohost(&["faults", "run", "--against", "nobody"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("libnobody.so"), "{}", ended.stderr);
}
