//! Disks end to end: an emulated NVMe controller, its driver, the daemon and clients, each in its
//! own process.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use iohost_block::{BlockDevice, BlockError, Operation, Pipeline, Request, Requests, Status, Work};
use iohost_client::varlink::State;
use iohost_tests::{Emulated, System};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A daemon with the driver on a controller with a disk in a file of 16 MiB and one in memory.
fn system() -> (System, Emulated) {
    let mut system = System::new();
    fs::write(system.path("disk"), vec![0; 16 << 20]).unwrap();
    let file = format!("file:{}", system.path("disk").display());
    let device = system.start_nvme_device("nvme0", &[&file, "memory:4,4096,ro"]);
    system.install_driver("nvme");
    system.start(&system.device_config("nvme0", "nvme"));
    system.await_ready("nvme0");
    (system, device)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 4096) as u8).collect()
}

fn open(system: &System, disk: u32) -> BlockDevice {
    BlockDevice::open(system.connect().open("nvme0").unwrap(), disk).unwrap()
}

#[test]
fn what_a_client_writes_is_in_the_file_and_read_by_the_next_one() {
    let (mut system, _device) = system();
    let data = pattern(9 << 20);
    let mut disk = open(&system, 1);
    assert_eq!((disk.info().bytes(), disk.info().block), (16 << 20, 512));
    disk.write(512, &data).unwrap();
    disk.flush().unwrap();
    let file = fs::read(system.path("disk")).unwrap();
    assert!(file[512..][..data.len()] == data, "the file has what was written");
    disk.write_zeroes(1024, 4096).unwrap();
    disk.discard(8192, 4096).unwrap();
    drop(disk);

    let mut expected = data;
    expected[512..][..4096].fill(0);
    expected[8192 - 512..][..4096].fill(0);
    let mut read = vec![0; expected.len()];
    open(&system, 1).read(512, &mut read).unwrap();
    assert!(read == expected);
    assert_eq!(system.stop(), Some(0));
}

#[test]
fn operations_under_way_together_each_have_their_own_bytes_and_end() {
    let (system, _device) = system();
    let mut disk = Pipeline::open(system.connect().open("nvme0").unwrap(), 1).unwrap();
    let data = pattern(5 << 20);
    let work = |operation, offset, length, data: &[u8]| Work {
        operation,
        offset,
        length,
        data: data.to_vec(),
    };
    let mut run = |works: Vec<Work>| {
        let count = works.len();
        for (tag, work) in (0..).zip(works) {
            disk.begin(tag, work).unwrap();
        }
        let mut all: Vec<_> = (0..count).map(|_| smol::block_on(disk.ended()).unwrap()).collect();
        all.sort_by_key(|ended| ended.tag);
        let tags: Vec<_> = all.iter().map(|ended| ended.tag).collect();
        assert!(tags.iter().copied().eq(0..count as u64), "each of them once: {tags:?}");
        all
    };
    // More than the memory has room for at a time.
    let parts = data.chunks(1 << 20).zip((0..).step_by(1 << 20));
    let writes = parts.map(|(part, at)| work(Operation::Write, at, part.len() as u64, part));
    assert!(run(writes.collect()).iter().all(|ended| ended.outcome.is_ok()));
    let mut reads = vec![work(Operation::Read, 512, 4 << 20, &[])];
    reads.extend((0..200).map(|at| work(Operation::Read, at * 512, 512, &[])));
    reads.push(work(Operation::Flush, 0, 0, &[]));
    let ended = run(reads);
    assert!(ended[0].data == data[512..][..4 << 20]);
    for (at, one) in ended[1..201].iter().enumerate() {
        assert!(one.data == data[at * 512..][..512], "read {at}");
    }
    let beyond = disk.begin(7, work(Operation::Read, 16 << 20, 512, &[]));
    let Err(BlockError::Failed(failure)) = beyond else { panic!("{beyond:?}") };
    assert_eq!(failure.status, Status::OutOfRange);
}

#[test]
fn requests_that_are_sent_together_are_each_answered_also_when_there_is_no_room_for_all() {
    let (system, _device) = system();
    let session = system.connect().open_with_queues("nvme0", &[4096, 1 << 16]).unwrap();
    let mut requests = Requests::new(session, 4096).unwrap();
    let all: Vec<Request> = (0..3000).map(|tag| read(tag, tag % 3 == 0)).collect();
    requests.send_all(&all).unwrap();
    let mut tags: Vec<u64> = (0..all.len())
        .map(|_| {
            let completion = requests.completion().unwrap();
            completion.outcome.unwrap();
            completion.tag
        })
        .collect();
    assert_eq!(requests.at_hand(), 0);
    tags.sort_unstable();
    assert!(tags.iter().copied().eq(0..all.len() as u64), "each of them once");
}

/// The pauses are those in which the driver goes on to look, ends that, and has ended it. Whatever
/// comes first on a busy machine, every request is answered; one that nobody saw would never be.
#[test]
fn a_request_that_comes_when_polling_ends_is_seen() {
    let (system, _device) = system();
    let session = system.connect().open("nvme0").unwrap();
    let mut requests = Requests::new(session, 4096).unwrap();
    for tag in 0..2000 {
        requests.send(&read(tag, true)).unwrap();
        let too_long = async {
            smol::Timer::after(Duration::from_secs(60)).await;
            panic!("request {tag} is not answered");
        };
        let completion = smol::block_on(smol::future::or(requests.completion_async(), too_long));
        assert_eq!(completion.unwrap().tag, tag);
        let until = Instant::now() + Duration::from_micros(tag * 7 % 200);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

/// Of the first disk, a block for each tag.
fn read(tag: u64, is_polled: bool) -> Request {
    Request {
        tag,
        operation: Operation::Read,
        is_polled,
        memory: 0,
        disk: 1,
        offset: 512 * tag,
        length: 512,
        at: 0,
        generation: 0,
    }
}

#[test]
fn a_client_is_told_what_is_wrong_by_kind() {
    let (system, _device) = system();
    let mut disk = open(&system, 2);
    assert!(disk.info().is_read_only);
    let status = |result: Result<(), BlockError>| match result {
        Err(BlockError::Failed(failure)) => failure.status,
        other => panic!("{other:?}"),
    };
    assert_eq!(status(disk.write(0, &[0; 4096])), Status::ReadOnly);
    assert_eq!(status(disk.read(512, &mut [0; 4096])), Status::NotAligned);
    assert_eq!(status(disk.read(4 << 20, &mut [0; 4096])), Status::OutOfRange);
    disk.read(0, &mut [0; 4096]).unwrap();
    let none = BlockDevice::open(system.connect().open("nvme0").unwrap(), 3);
    assert!(matches!(none, Err(BlockError::NoSuchDisk { disk: 3 })));
}

#[test]
fn a_disk_goes_on_under_every_driver_and_nothing_is_lost() {
    let (system, _device) = system();
    let (mut disk, socket) = (open(&system, 1), system.socket());
    let is_over = Arc::new(AtomicBool::new(false));
    let seen = is_over.clone();
    let killer = std::thread::spawn(move || {
        let mut killed = 0;
        let mut daemon = iohost_client::Daemon::connect(socket).unwrap();
        while killed < 3 {
            let service = daemon.status().unwrap().services.remove(0);
            if let (Some(pid), State::Running) = (service.pid, service.state)
                && service.incarnation > killed
            {
                killed = service.incarnation;
                // It has the time to bring its controller up, or not.
                std::thread::sleep(Duration::from_millis(40 * killed));
                kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        seen.store(true, SeqCst);
    });
    let mut rounds = 0_u8;
    let mut last = Vec::new();
    while rounds < 3 || !is_over.load(SeqCst) {
        rounds = rounds.wrapping_add(1);
        let data: Vec<u8> = pattern(5 << 20).iter().map(|byte| byte ^ rounds).collect();
        disk.write(4096, &data).unwrap();
        disk.flush().unwrap();
        let mut read = vec![0; data.len()];
        disk.read(4096, &mut read).unwrap();
        assert!(read == data, "round {rounds}");
        last = data;
    }
    killer.join().unwrap();
    let mut read = vec![0; last.len()];
    disk.read(4096, &mut read).unwrap();
    assert!(read == last, "the last driver was killed behind our back");
    assert!(system.service("nvme0").incarnation >= 3);
}

#[test]
fn the_command_lists_reads_writes_and_measures() {
    let (system, _device) = system();
    let ran = |arguments: &[&str]| {
        let ended = system.iohost(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        ended.stdout
    };
    let list = ran(&["block", "ls"]);
    assert!(list.contains("nvme0") && list.contains("read only"), "{list}");
    let described: serde_json::Value =
        serde_json::from_str(&ran(&["--json", "block", "info", "nvme0", "--disk", "2"])).unwrap();
    assert_eq!((&described["block"], &described["read_only"]), (&4096.into(), &true.into()));
    assert!(ran(&["block", "health", "nvme0"]).contains("40 °C"));

    // Neither begins nor ends with a part, and the last block is not full.
    let data = pattern((5 << 20) + 100);
    let (from, to) = (system.path("from"), system.path("to"));
    fs::write(&from, &data).unwrap();
    fs::write(system.path("disk"), vec![0xee; 16 << 20]).unwrap();
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    ran(&["block", "write", "nvme0", from, "--offset", "1K"]);
    let length = data.len().to_string();
    ran(&["block", "read", "nvme0", to, "--offset", "1024", "--length", &length]);
    assert!(fs::read(to).unwrap() == data);
    let file = fs::read(system.path("disk")).unwrap();
    assert!(file[1024 + data.len()..].iter().all(|byte| *byte == 0xee), "the rest is untouched");
    ran(&["block", "read", "nvme0", to, "--offset", "1030", "--length", "5"]);
    assert_eq!(fs::read(to).unwrap(), data[6..11]);

    let bench: serde_json::Value = serde_json::from_str(&ran(&[
        "--json",
        "block",
        "bench",
        "nvme0",
        "--seconds",
        "1",
        "--depth",
        "4",
        "--polled",
    ]))
    .unwrap();
    assert!(bench["requests"].as_u64().unwrap() >= 4, "{bench}");

    let refused = system.iohost(&["block", "write", "nvme0", to, "--disk", "2"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("read only"), "{}", refused.stderr);
    let beyond = system.iohost(&["block", "read", "nvme0", to, "--offset", "16M", "--length", "1"]);
    assert_eq!(beyond.code, Some(2), "{}", beyond.stderr);
}

#[test]
fn an_nbd_client_reads_and_writes_the_disk() {
    let (system, _device) = system();
    let socket = system.path("disk.nbd");
    let mut server = system.start_iohost(&["block", "export", "nvme0", socket.to_str().unwrap()]);
    let mut stream = None;
    iohost_tests::eventually("the NBD server", || {
        stream = UnixStream::connect(&socket).ok();
        stream.is_some()
    });
    let mut stream = stream.unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    // No zeroes, and the export by its name, which is what the oldest clients do.
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], (16_u64 << 20).to_be_bytes());

    let mut request = |command: u8, offset: u64, length: u32, data: &[u8]| {
        let mut packet = b"\x25\x60\x95\x13\0\0\0".to_vec();
        packet.push(command);
        packet.extend([1; 8]);
        packet.extend(offset.to_be_bytes());
        packet.extend(length.to_be_bytes());
        packet.extend(data);
        stream.write_all(&packet).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "command {command}");
        let mut read = vec![0; if command == 0 { length as usize } else { 0 }];
        stream.read_exact(&mut read).unwrap();
        read
    };
    let data = pattern(3 << 20);
    request(1, 4096, data.len() as u32, &data);
    request(3, 0, 0, &[]);
    assert!(fs::read(system.path("disk")).unwrap()[4096..][..data.len()] == data);
    assert!(request(0, 4096, data.len() as u32, &[]) == data);
    server.kill().unwrap();
    server.wait().unwrap();
}
