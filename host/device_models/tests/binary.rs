//! `iohost-edu-device` as people start it.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use iohost_vfio_user::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running device, which does not outlive its test.
struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        // It may have ended by itself, as most tests expect of it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(socket: &Path) -> Device {
    let child = Command::new(env!("CARGO_BIN_EXE_iohost-edu-device"))
        .arg("--socket")
        .arg(socket)
        .args(["--dma-latency-ms", "0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Device(child)
}

/// Connects as soon as the process listens; the limit is a watchdog.
fn connect(socket: &Path) -> Client {
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        match Client::connect(socket) {
            Ok(client) => return client,
            Err(err) => assert!(Instant::now() < limit, "{err}"),
        }
        std::thread::yield_now();
    }
}

/// What the process said, and how it ended.
fn end(device: &mut Device) -> (String, Option<i32>) {
    let mut text = String::new();
    device.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (text, device.0.wait().unwrap().code())
}

#[test]
fn serves_clients_one_after_another_and_leaves_at_sigterm_without_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("edu.sock");
    let mut device = start(&socket);
    for _ in 0..2 {
        let mut id = [0; 4];
        connect(&socket).region_read(0, 0, &mut id).unwrap();
        assert_eq!(u32::from_le_bytes(id), 0x0100_00ed);
    }
    let _connected = connect(&socket);
    kill(Pid::from_raw(device.0.id() as i32), Signal::SIGTERM).unwrap();
    let (log, code) = end(&mut device);
    assert_eq!(code, Some(0), "{log}");
    assert!(!socket.exists());
    assert!(log.contains("listening") && log.contains("SIGTERM"), "{log}");
}

#[test]
fn replaces_the_socket_of_a_killed_predecessor() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("edu.sock");
    let first = start(&socket);
    drop(connect(&socket));
    drop(first);
    assert!(socket.exists(), "killed, it removes nothing");

    let _second = start(&socket);
    drop(connect(&socket));
}

#[test]
fn says_in_words_why_it_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("edu.sock");
    let _first = start(&socket);
    drop(connect(&socket));
    let mut second = start(&socket);
    let (log, code) = end(&mut second);
    assert_eq!(code, Some(1));
    let expected =
        format!("iohost-edu-device: another process already listens at {}", socket.display());
    assert!(log.contains(&expected), "{log}");
    let nowhere = folder.path().join("no/such/folder/edu.sock");
    let mut third = start(&nowhere);
    let (log, code) = end(&mut third);
    assert_eq!(code, Some(1));
    assert!(log.contains("listening at") && log.contains("No such file"), "{log}");
}
