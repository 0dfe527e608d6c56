//! Many devices at once that nobody uses: what that costs. A file of its own, because it looks at
//! all that its processes do. `IOHOST_IDLE_SECONDS` says for how long; 5 without it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use iohost_tests::{System, eventually};

const DEVICES: usize = 64;

/// How often each thread of these processes has run, by its folder in /proc.
fn runs(processes: &[u32]) -> BTreeMap<PathBuf, u64> {
    let mut runs = BTreeMap::new();
    for process in processes {
        for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let task = task.unwrap().path();
            let status = fs::read_to_string(task.join("status")).unwrap();
            // Source: proc(5): each time it was put to sleep, or was put aside.
            let counts = status.lines().filter(|line| line.contains("ctxt_switches:"));
            let numbers = counts.map(|line| line.rsplit('\t').next().unwrap().parse::<u64>());
            let count = numbers.map(Result::unwrap).sum();
            runs.insert(task, count);
        }
    }
    assert!(runs.values().sum::<u64>() > 0, "the kernel counts");
    runs
}

/// The threads that have run within a time, and how often.
fn runs_within(processes: &[u32], time: Duration) -> Vec<(PathBuf, u64)> {
    let before = runs(processes);
    // There is no event to wait for where nothing is to happen.
    std::thread::sleep(time);
    let mut after = runs(processes);
    after.retain(|task, count| before.get(task) != Some(count));
    after.into_iter().map(|(task, n)| (task.clone(), n - before.get(&task).unwrap_or(&0))).collect()
}

/// The memory of a process, what it shares with others divided among them (proc(5)).
fn proportional_kib(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

#[test]
fn sixty_four_devices_on_one_daemon_work_and_when_idle_nothing_wakes_up() {
    let seconds = std::env::var("IOHOST_IDLE_SECONDS").ok().map_or(5, |text| text.parse().unwrap());
    let mut system = System::new();
    let names: Vec<String> = (0..DEVICES).map(|number| format!("edu{number}")).collect();
    let _devices: Vec<_> = names.iter().map(|name| system.start_edu_device(name)).collect();
    // Not `edu`, which has a timer that ticks always.
    system.install_driver("probe");
    let config: String = names.iter().map(|name| system.device_config(name, "probe")).collect();
    system.start(&config);
    let mut processes: Vec<u32> = names.iter().map(|name| system.await_ready(name)).collect();
    for name in &names {
        let session = system.connect().open(name).unwrap();
        let client = session.client::<probe_api::Client>().unwrap();
        // Source: QEMU, `docs/specs/edu.rst`: the identification.
        assert_eq!(client.register().wait(), Ok(0x0100_00ed), "{name}");
    }
    let status = system.connect().status().unwrap();
    assert!(status.services.iter().all(|service| service.incarnation == 1));
    processes.push(status.pid);

    // The last connections and sessions are on their way out.
    eventually("rest", || runs_within(&processes, Duration::from_secs(1)).is_empty());
    let ran = runs_within(&processes, Duration::from_secs(seconds));
    let hosts = &processes[..DEVICES];
    let kib: u64 = hosts.iter().map(|process| proportional_kib(*process)).sum();
    println!(
        "{} processes: {} threads ran in {seconds} s; {} KiB for each driver host",
        processes.len(),
        ran.len(),
        kib / DEVICES as u64
    );
    assert!(ran.is_empty(), "(thread, how often) in {seconds} s: {ran:?}");
}
