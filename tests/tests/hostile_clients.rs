//! What a client may do wrong, to the daemon and to a driver: only its own session ends.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{Call, LONGEST, ReplyPacket, encode_offer, encode_withdraw};
use iohost_interface::{Arguments, IOReturn};
use iohost_memory::SharedMemory;
use iohost_tests::{Emulated, System, eventually};

/// The driver still serves others, in the process it was in.
fn assert_alive(system: &System, host: u32) {
    let session = system.connect().open("edu0").unwrap();
    let client = session.client::<edu_api::Client>().unwrap();
    // The device may still work for one that has left.
    eventually("the device is free", || match client.factorial(5).wait() {
        Err(IOReturn::BUSY) => false,
        answer => {
            assert_eq!(answer, Ok(120));
            true
        }
    });
    assert_eq!(system.service("edu0").pid, Some(host), "the driver host lives on");
}

fn factorial(id: u64, n: u64) -> Call {
    Call { id, selector: 0, arguments: Arguments { scalars: vec![n], ..Default::default() } }
}

fn reply(socket: &Packets) -> Result<ReplyPacket, PacketError> {
    let mut buffer = [0; LONGEST];
    let packet = socket.receive(&mut buffer, 0)?;
    Ok(ReplyPacket::decode(&buffer[..packet.len]).unwrap())
}

#[test]
fn a_session_that_sends_what_is_no_call_ends_and_no_other_one_does() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let good = factorial(1, 5).encode().unwrap();
    let mut counted = good.clone();
    counted[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let offences: Vec<(&str, Vec<u8>)> = vec![
        ("garbage", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("half a message", good[..good.len() / 2].to_vec()),
        ("one byte", vec![0]),
        ("a wrong length", [&good[..], &[0; 8]].concat()),
        ("a count that cannot be", counted),
        ("more than any call has", vec![0x49; LONGEST + 1]),
    ];
    for (offence, packet) in offences {
        let (socket, _queues) = system.open_raw("edu0");
        socket.send(&good, &[]).unwrap();
        assert!(reply(&socket).is_ok(), "the session works before {offence}");
        socket.send(&packet, &[]).unwrap();
        assert!(matches!(reply(&socket), Err(PacketError::Closed)), "{offence} ends the session");
        assert_alive(&system, host);
    }
}

#[test]
fn a_session_that_sends_descriptors_nobody_asked_for_ends() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let (socket, queues) = system.open_raw("edu0");
    let fds: Vec<BorrowedFd<'_>> = queues.iter().map(AsFd::as_fd).collect();
    socket.send(&factorial(1, 5).encode().unwrap(), &fds).unwrap();
    assert!(matches!(reply(&socket), Err(PacketError::Closed)));
    assert_alive(&system, host);
}

#[test]
fn a_session_that_offers_what_is_no_memory_ends_and_no_other_one_does() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let sealed = SharedMemory::create(c"offer", 100).unwrap();
    let pipe = std::io::pipe().unwrap();
    let loose = std::fs::File::open("/proc/self/exe").unwrap();
    let good: &dyn Fn(&Packets, u64) = &|socket, memory| {
        socket.send(&encode_offer(memory, false), &[sealed.as_fd()]).unwrap();
    };
    type Offence<'a> = (&'a str, &'a dyn Fn(&Packets));
    let offences: [Offence<'_>; 8] = [
        ("no file", &|socket| socket.send(&encode_offer(2, false), &[]).unwrap()),
        ("a pipe", &|socket| socket.send(&encode_offer(2, false), &[pipe.0.as_fd()]).unwrap()),
        ("no sealed file", &|socket| {
            socket.send(&encode_offer(2, true), &[loose.as_fd()]).unwrap();
        }),
        ("two files", &|socket| {
            let two = [sealed.as_fd(), sealed.as_fd()];
            socket.send(&encode_offer(2, false), &two).unwrap();
        }),
        ("a number twice", &|socket| good(socket, 1)),
        ("more than there may be", &|socket| (2..=65).for_each(|memory| good(socket, memory))),
        ("back what was not offered", &|socket| {
            socket.send(&encode_withdraw(2), &[]).unwrap();
        }),
        ("a file with what has none", &|socket| {
            socket.send(&encode_withdraw(1), &[sealed.as_fd()]).unwrap();
        }),
    ];
    for (offence, commit) in offences {
        let (socket, _queues) = system.open_raw("edu0");
        good(&socket, 1);
        socket.send(&factorial(1, 5).encode().unwrap(), &[]).unwrap();
        assert!(reply(&socket).is_ok(), "the session works before {offence}");
        commit(&socket);
        assert!(matches!(reply(&socket), Err(PacketError::Closed)), "{offence} ends the session");
        assert_alive(&system, host);
    }
}

#[test]
fn a_call_of_a_method_that_is_not_there_or_with_wrong_arguments_is_answered() {
    let (system, _device) = System::with_edu();
    let (socket, _queues) = system.open_raw("edu0");
    let none = Arguments::default();
    let unknown = Call { id: 1, selector: 99, arguments: none.clone() };
    let missing = Call { id: 2, selector: 0, arguments: none };
    let large = factorial(3, 1 << 32);
    let expected =
        [(1, IOReturn::BAD_MESSAGE_ID), (2, IOReturn::BAD_ARGUMENT), (3, IOReturn::BAD_ARGUMENT)];
    for (call, (id, status)) in [unknown, missing, large].iter().zip(expected) {
        socket.send(&call.encode().unwrap(), &[]).unwrap();
        assert_eq!(reply(&socket).unwrap(), ReplyPacket { id, answer: Err(status) });
    }
}

#[test]
fn a_client_that_never_reads_its_answers_only_loses_its_session() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let (socket, _queues) = system.open_raw("edu0");
    socket.set_nonblocking().unwrap();
    let bytes = vec![1; edu_api::LONGEST_ENTRY];
    let arguments = Arguments { structure: bytes, ..Default::default() };
    let call = Call { id: 1, selector: 1, arguments }.encode().unwrap();
    // Until the answers have filled the socket, and the session is ended for it.
    eventually("the end of the session", || {
        matches!(socket.send(&call, &[]), Err(PacketError::Closed | PacketError::Socket(_)))
    });
    assert_alive(&system, host);
}

#[test]
fn a_client_that_scribbles_over_its_queues_only_loses_them() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    for fill in [0x00, 0x7f, 0xff] {
        let (_socket, queues) = system.open_raw("edu0");
        // Memory and both bells of each queue: all bytes the same, then every bell it can ring.
        for queue in queues.chunks(3) {
            nix::sys::uio::pwrite(&queue[0], &[fill; 4096], 0).unwrap();
            let ring = |bell: &&OwnedFd| nix::unistd::write(bell, &1_u64.to_ne_bytes()).is_ok();
            assert_eq!(queue[1..].iter().filter(ring).count(), 1, "the other one it hears only");
        }
        assert_alive(&system, host);
    }
}

#[test]
fn a_client_may_leave_at_any_step() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    for step in 0..50 {
        let stream = UnixStream::connect(system.socket()).unwrap();
        let request = b"{\"method\":\"io.iohost.Open\",\"parameters\":{\"service\":\"edu0\"}}\0";
        (&stream).write_all(&request[..request.len() * step / 25 % (request.len() + 1)]).unwrap();
    }
    for step in 0..4 {
        let (socket, queues) = system.open_raw("edu0");
        (0..step).for_each(|id| socket.send(&factorial(id, 5).encode().unwrap(), &[]).unwrap());
        drop(queues);
    }
    assert_alive(&system, host);
    eventually("the end of their sessions", || system.service("edu0").sessions == 0);
}

#[test]
fn garbage_on_the_control_socket_only_costs_its_sender_the_connection() {
    let (system, _device) = System::with_edu();
    let host = system.await_ready("edu0");
    let offences: [&[u8]; 5] = [
        b"\0",
        b"not json\0",
        b"{\"method\":\"io.iohost.NoSuch\"}\0",
        b"{\"method\":\"io.iohost.Open\",\"parameters\":{\"service\":7}}\0",
        &[0xff; 4096],
    ];
    for offence in offences {
        let mut stream = UnixStream::connect(system.socket()).unwrap();
        stream.write_all(offence).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut answer = Vec::new();
        // An error reply or none; in any case the end of the connection.
        stream.read_to_end(&mut answer).unwrap();
        assert_alive(&system, host);
    }
    // A message without an end is not collected without a limit.
    let mut stream = UnixStream::connect(system.socket()).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    let endless = vec![b' '; 64 * 1024];
    eventually("the daemon to hang up", || stream.write_all(&endless).is_err());
    assert_alive(&system, host);
}

#[test]
fn more_sessions_than_the_limit_are_refused_with_the_number() {
    let mut system = System::new();
    let _device = system.start_edu_device("edu0");
    system.install_edu_driver();
    system.start(&format!("[limits]\nsessions_per_service = 2\n{}", system.edu_config("edu0")));
    system.await_ready("edu0");
    let _sessions = [system.open_raw("edu0"), system.open_raw("edu0")];
    let refused = system.connect().open("edu0").unwrap_err().failure();
    assert!(refused.message.contains('2'), "{refused}");
}

/// A daemon with these `[limits]`, and an `edu`.
fn limited(limits: &str) -> (System, Emulated) {
    let mut system = System::new();
    let device = system.start_edu_device("edu0");
    system.install_edu_driver();
    system.start(&format!("[limits]\n{limits}\n{}", system.edu_config("edu0")));
    system.await_ready("edu0");
    (system, device)
}

/// Another process goes on, whatever this one does.
fn assert_another_goes_on(system: &System) {
    let other = system.iohost(&["call", "edu0", "factorial", "5"]);
    assert_eq!((other.code, other.stdout.trim()), (Some(0), "120"), "{}", other.stderr);
}

/// Writes on a connection, and gives what is answered up to the end of one message.
fn ask(stream: &mut UnixStream, request: &[u8]) -> String {
    // A connection that is refused may be closed already; its answer is there all the same.
    let _ = stream.write_all(request);
    answer(stream)
}

fn answer(stream: &mut UnixStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut text = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != [0] {
        text.extend_from_slice(&byte);
    }
    String::from_utf8(text).unwrap()
}

const STATUS: &[u8] = b"{\"method\":\"io.iohost.Status\"}\0";

#[test]
fn a_process_that_opens_more_sessions_than_its_share_is_refused_and_another_is_not() {
    let (system, _device) = limited("sessions_per_client = 2");
    let _sessions = [system.open_raw("edu0"), system.open_raw("edu0")];
    let refused = system.connect().open("edu0").unwrap_err().failure();
    assert_eq!(refused.code, "client-sessions");
    assert!(refused.message.contains("has 2 sessions already"), "{refused}");
    assert!(system.daemon_log().contains(&format!("pid={}", std::process::id())));
    assert_another_goes_on(&system);
}

#[test]
fn sessions_that_a_daemon_took_over_are_nobodys_and_new_ones_are_counted() {
    let (mut system, _device) = limited("sessions_per_client = 2");
    let _before = [system.open_raw("edu0"), system.open_raw("edu0")];
    system.kill_daemon();
    system.start(&format!("[limits]\nsessions_per_client = 2\n{}", system.edu_config("edu0")));
    system.await_ready("edu0");
    let _after = [system.open_raw("edu0"), system.open_raw("edu0")];
    assert_eq!(system.service("edu0").sessions, 4);
    assert_eq!(system.connect().open("edu0").unwrap_err().failure().code, "client-sessions");
}

#[test]
fn a_process_that_wants_more_memory_than_its_share_is_refused_and_another_is_not() {
    let (system, _device) = limited("memory_per_client = 3000000");
    let sessions = [system.open_raw("edu0")];
    let refused = system.connect().open("edu0").unwrap_err().failure();
    assert_eq!(refused.code, "client-memory");
    assert!(refused.message.contains("the most is 3000000"), "{refused}");
    assert_another_goes_on(&system);
    // What is given back counts no more.
    drop(sessions);
    eventually("room again", || system.connect().open("edu0").is_ok());
}

#[test]
fn a_process_with_too_many_connections_is_told_so_on_the_next_and_another_goes_on() {
    let (system, _device) = limited("connections_per_client = 4");
    let connect = || UnixStream::connect(system.socket()).unwrap();
    // Those of the start may still be on their way out.
    let mut all = Vec::new();
    eventually("four connections", || {
        all.clear();
        all = (0..4).map(|_| connect()).collect();
        all.iter_mut().all(|stream| ask(stream, STATUS).contains("\"services\""))
    });
    for _ in 0..100 {
        let told = ask(&mut connect(), STATUS);
        assert!(told.contains("too-many-connections"), "{told}");
        assert!(told.contains("has 4 connections already"), "{told}");
    }
    assert_another_goes_on(&system);
    drop(all);
    eventually("a connection again", || ask(&mut connect(), STATUS).contains("\"services\""));
}

#[test]
fn a_process_that_floods_the_daemon_with_requests_is_refused_most_and_another_goes_on() {
    let (system, _device) = limited("requests_per_second = 20");
    let mut stream = UnixStream::connect(system.socket()).unwrap();
    let (mut answered, mut refused) = (0, 0);
    // As fast as they are answered: without the limit all would be.
    eventually("refusals", || {
        match ask(&mut stream, STATUS).contains("too-many-requests") {
            true => refused += 1,
            false => answered += 1,
        }
        refused >= 100
    });
    assert!(answered > 0, "what the limit allows is answered");
    assert_another_goes_on(&system);
    assert!(system.daemon_log().contains("it makes too many requests"));
}

#[test]
fn half_requests_without_end_keep_nobody_else_waiting() {
    let (system, _device) = limited("connections_per_client = 64");
    let half = &STATUS[..STATUS.len() / 2];
    let mut all: Vec<UnixStream> = Vec::new();
    for _ in 0..50 {
        let mut stream = UnixStream::connect(system.socket()).unwrap();
        stream.write_all(half).unwrap();
        all.push(stream);
    }
    assert_another_goes_on(&system);
    // Each is hung up on when its patience is over.
    for stream in &mut all {
        assert_eq!(answer(stream), "");
    }
    assert_another_goes_on(&system);
}

#[test]
fn a_flood_of_descriptors_costs_its_sender_the_connection_and_the_daemon_none() {
    let (system, _device) = System::with_edu();
    let daemon = system.connect().status().unwrap().pid;
    let descriptors = || std::fs::read_dir(format!("/proc/{daemon}/fd")).unwrap().count();
    let pipe = std::io::pipe().unwrap();
    let many = vec![pipe.0.as_fd(); 200];
    eventually("its connections to be closed", || descriptors() < 40);
    let before = descriptors();
    for _ in 0..20 {
        let stream = UnixStream::connect(system.socket()).unwrap();
        let socket = Packets::from(std::os::fd::OwnedFd::from(stream));
        socket.send(STATUS, &many).unwrap();
        assert!(matches!(reply(&socket), Err(PacketError::Closed)), "it is hung up on");
    }
    assert_another_goes_on(&system);
    eventually("every descriptor to be closed", || descriptors() <= before);
}

#[test]
fn a_client_that_asks_and_never_reads_keeps_nobody_else_waiting() {
    let (system, _device) = limited("requests_per_second = 1000000");
    let mut stream = UnixStream::connect(system.socket()).unwrap();
    stream.set_nonblocking(true).unwrap();
    // Until the daemon, which waits for room, reads no more either.
    while stream.write_all(STATUS).is_ok() {}
    for _ in 0..3 {
        assert_another_goes_on(&system);
    }
}

/// Only root can be several users.
#[test]
fn who_may_open_a_service_and_who_may_bind_goes_by_user_and_group() {
    if !nix::unistd::Uid::effective().is_root() {
        return println!("not run: it takes root to be somebody else");
    }
    const NOBODY: u32 = 65_534;
    let mut system = System::new();
    let _devices = [system.start_edu_device("open0"), system.start_edu_device("closed0")];
    system.install_edu_driver();
    system.start(&format!(
        "{}allow_users = [{NOBODY}]\n{}allow_groups = [12345]\n",
        system.edu_config("open0"),
        system.edu_config("closed0"),
    ));
    system.await_ready("open0");
    system.await_ready("closed0");
    // Whoever may write to the socket may connect.
    let everybody = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(system.path(""), everybody(0o755)).unwrap();
    std::fs::set_permissions(system.socket(), everybody(0o666)).unwrap();
    let program = system.path("iohost");
    iohost_tests::copy_program(&iohost_tests::built_files().join("iohost"), &program);
    let as_nobody = |group: u32, arguments: &[&str]| {
        use std::os::unix::process::CommandExt;
        let mut command = std::process::Command::new(&program);
        command.arg("--runtime-dir").arg(system.path("run")).args(arguments);
        let output = command.uid(NOBODY).gid(group).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let factorial = |service| ["call", service, "factorial", "5"];

    let (done, text) = as_nobody(NOBODY, &factorial("open0"));
    assert!(done && text.contains("120"), "a user that is named: {text}");
    let (done, text) = as_nobody(12345, &factorial("closed0"));
    assert!(done && text.contains("120"), "a group that is named: {text}");
    let (done, text) = as_nobody(NOBODY, &factorial("closed0"));
    assert!(!done && text.contains("may not open service"), "{text}");
    assert!(text.contains("access-denied"), "{text}");
    for method in ["unbind", "bind"] {
        let (done, text) = as_nobody(NOBODY, &[method, "open0"]);
        assert!(!done && text.contains("admin-only"), "{text}");
    }
    let log = system.daemon_log();
    assert!(log.contains("may not open the service") && log.contains("uid=65534"), "{log}");
    assert_eq!(system.service("open0").incarnation, 1, "it was not unbound");
}
