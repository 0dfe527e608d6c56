//! What a client may do wrong, to the daemon and to a driver: only its own session ends.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{Call, LONGEST, ReplyPacket, encode_offer, encode_withdraw};
use iohost_interface::{Arguments, IOReturn};
use iohost_memory::SharedMemory;
use iohost_tests::{System, eventually};

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
        // Memory and both bells of each queue: all bytes the same, then every bell.
        for queue in queues.chunks(3) {
            nix::sys::uio::pwrite(&queue[0], &[fill; 4096], 0).unwrap();
            for bell in &queue[1..] {
                nix::unistd::write(bell, &1_u64.to_ne_bytes()).unwrap();
            }
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
