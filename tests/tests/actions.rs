//! Actions between processes: completions from the driver, and what happens when either side of
//! an action dies.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use iohost_client::{Action, OSAction, Session};
use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{Call, FromDriver, Invocation, encode_release, encode_taken};
use iohost_interface::{Arguments, IOReturn, PassedAction, Results};
use iohost_tests::{Emulated, System, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a client waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

fn system() -> (System, Emulated) {
    System::with_driver("probe")
}

fn open(system: &System) -> (Session, probe_api::Client) {
    let session = system.connect().open("edu0").unwrap();
    let probe = session.client().unwrap();
    (session, probe)
}

fn noted(probe: &probe_api::Client) -> Vec<u32> {
    let bytes = probe.noted().wait().unwrap();
    bytes.as_chunks().0.iter().map(|number| u32::from_ne_bytes(*number)).collect()
}

/// A client in a process of its own, once it has exchanged its actions.
fn start_client(system: &System) -> Child {
    let mut client = Command::new(env!("CARGO_BIN_EXE_iohost-test-client"))
        .arg(system.socket())
        .arg("edu0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "ready\n");
    client
}

#[test]
fn repeated_completions_arrive_in_order() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let action = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    probe.subscribe(action.handle()).wait().unwrap();
    // More than the socket holds, short ones and the longest there are.
    for (count, bytes) in [(2000, 0), (200, 4096)] {
        assert_eq!(probe.complete(count, bytes).wait(), Ok(count));
        for number in 0..count {
            let expected = (number, vec![number as u8; bytes as usize]);
            assert_eq!(action.next_within(PATIENCE), Ok(expected));
        }
    }
    probe.forget().wait().unwrap();
    assert_eq!(action.next_within(PATIENCE), Err(IOReturn::ABORTED), "the driver holds it no more");
}

#[test]
fn a_client_that_does_not_take_its_completions_holds_up_nobody_and_loses_only_new_ones() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let action = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    probe.subscribe(action.handle()).wait().unwrap();
    let accepted = probe.complete(20_000, 0).wait().unwrap();
    assert!(accepted < 20_000, "all {accepted} accepted, without a limit");
    assert!(noted(&probe).is_empty(), "calls on the same session are answered all the while");
    for number in 0..accepted {
        assert_eq!(action.next_within(PATIENCE), Ok((number, Vec::new())));
    }
    assert_eq!(probe.complete(1, 0).wait(), Ok(1), "there is room again");
    assert_eq!(action.next_within(PATIENCE), Ok((0, Vec::new())));
}

#[test]
fn a_client_invokes_a_drivers_action_in_order_and_lets_go_of_it() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let action = probe.offer().wait().unwrap();
    let other = action.clone();
    let numbers: Vec<u32> = (0..500).collect();
    for number in &numbers {
        // Busy: the driver host reads only as much as the driver has done.
        eventually("room for an invocation", || action.invoke(*number).is_ok());
    }
    drop(action);
    eventually("the driver's notes", || noted(&probe).len() == numbers.len());
    assert_eq!(noted(&probe), numbers);
    assert_eq!(probe.aborted().wait(), Ok(0), "there is a second handle");
    drop(other);
    eventually("the aborted handler", || probe.aborted().wait() == Ok(1));
}

#[test]
fn killing_a_client_calls_the_aborted_handler_of_each_action_it_held_exactly_once() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let kept = probe.offer().wait().unwrap();
    let mut client = start_client(&system);
    kill(Pid::from_raw(client.id() as i32), Signal::SIGKILL).unwrap();
    client.wait().unwrap();
    eventually("both handlers", || probe.aborted().wait() == Ok(2));
    // The dead client's own action is there no more; completing it harms nobody.
    probe.complete(10, 0).wait().unwrap();
    assert_eq!(noted(&probe), [7, 7], "what it sent before was run");
    kept.invoke(8).unwrap();
    eventually("the invocation by the living", || noted(&probe) == [7, 7, 8]);
    assert_eq!(probe.aborted().wait(), Ok(2));
}

#[test]
fn a_client_that_leaves_in_order_lets_go_of_its_actions_too() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let mut client = start_client(&system);
    assert_eq!(probe.aborted().wait(), Ok(0));
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success());
    eventually("both handlers", || probe.aborted().wait() == Ok(2));
}

#[test]
fn killing_the_driver_host_aborts_the_clients_actions_and_takes_the_drivers_offline() {
    let (system, _device) = system();
    let host = system.await_ready("edu0");
    let (_session, probe) = open(&system);
    let own = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    probe.subscribe(own.handle()).wait().unwrap();
    let theirs = probe.offer().wait().unwrap();
    assert_eq!(probe.complete(2, 0).wait(), Ok(2));
    assert_eq!(own.next_within(PATIENCE), Ok((0, Vec::new())));

    kill(Pid::from_raw(host as i32), Signal::SIGKILL).unwrap();
    assert_eq!(own.next_within(PATIENCE), Ok((1, Vec::new())), "what came before the end");
    assert_eq!(own.next_within(PATIENCE), Err(IOReturn::ABORTED));
    assert_eq!(theirs.invoke(1), Err(IOReturn::OFFLINE));
    // The session goes on, with actions of the next driver.
    let theirs = probe.offer().wait().unwrap();
    assert_eq!(theirs.invoke(1), Ok(()));
    probe.subscribe(own.handle()).wait().unwrap();
    assert_eq!(probe.complete(1, 0).wait(), Ok(1));
    assert_eq!(own.next_within(PATIENCE), Ok((0, Vec::new())));
}

#[test]
fn a_session_that_is_closed_aborts_the_actions_that_went_with_it() {
    let (system, _device) = system();
    let (_other, probe) = open(&system);
    let (session, closing) = open(&system);
    let own = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    closing.subscribe(own.handle()).wait().unwrap();
    let theirs = closing.offer().wait().unwrap();
    drop(session);
    assert_eq!(own.next_within(PATIENCE), Err(IOReturn::ABORTED));
    eventually("the end of the connection", || theirs.invoke(1) == Err(IOReturn::OFFLINE));
    eventually("the aborted handler", || probe.aborted().wait() == Ok(1));
}

/// The probe's methods, for clients that keep to no types.
const SUBSCRIBE: u64 = 0;
const OFFER: u64 = 3;

fn call(id: u64, selector: u64, arguments: Arguments) -> Vec<u8> {
    Call { id, selector, arguments }.encode().unwrap()
}

/// A call that passes the action of that number.
fn subscribe(action: u64) -> Vec<u8> {
    let actions = vec![PassedAction { scalar: 0, target: None }];
    call(1, SUBSCRIBE, Arguments { scalars: vec![action], structure: Vec::new(), actions })
}

fn receive(socket: &Packets) -> Result<FromDriver, PacketError> {
    let mut buffer = [0; iohost_interface::packet::LONGEST];
    let packet = socket.receive(&mut buffer, 0)?;
    Ok(FromDriver::decode(&buffer[..packet.len]).unwrap())
}

/// A raw session that was offered an action, and the action's number.
fn offered(system: &System) -> (Packets, u64) {
    let (socket, _queues) = system.open_raw("edu0");
    socket.send(&call(1, OFFER, Arguments::default()), &[]).unwrap();
    let Ok(FromDriver::Reply(reply)) = receive(&socket) else { panic!("no reply") };
    (socket, reply.answer.unwrap().scalars[0])
}

#[test]
fn a_session_that_breaks_the_rules_of_actions_ends_and_no_other_one_does() {
    let (system, _device) = system();
    let host = system.await_ready("edu0");
    let (_session, probe) = open(&system);
    let invoke = |action, arguments| Invocation { action, arguments }.encode().unwrap();
    let offences = |action: u64| -> Vec<(&str, Vec<Vec<u8>>)> {
        let back = encode_release(action);
        vec![
            ("an action it was never given", vec![invoke(action + 1, 1_u32.into_arguments())]),
            ("a number that does not fit", vec![invoke(action, (1_u64 << 32).into_arguments())]),
            ("no arguments", vec![invoke(action, Arguments::default())]),
            ("giving back what it has not", vec![encode_release(action + 1)]),
            ("giving back twice", vec![back.clone(), back.clone()]),
            ("invoking what it gave back", vec![back, invoke(action, 1_u32.into_arguments())]),
            ("taking what was not sent", vec![encode_taken(5, 1)]),
            ("more actions than anybody needs", (0..1100).map(subscribe).collect()),
        ]
    };
    for offence in 0..offences(0).len() {
        let (socket, action) = offered(&system);
        let (name, packets) = offences(action).swap_remove(offence);
        socket.set_nonblocking().unwrap();
        for packet in packets {
            // Answers are read all the while, so that it is not for them that the session ends,
            // which may be before the last packet.
            eventually("room for a packet", || {
                while receive(&socket).is_ok() {}
                !matches!(socket.send(&packet, &[]), Err(PacketError::WouldBlock))
            });
        }
        eventually(name, || matches!(receive(&socket), Err(PacketError::Closed)));
        let aborted = offence as u32 + 1;
        eventually("the loss of its action", || probe.aborted().wait() == Ok(aborted));
        probe.forget().wait().unwrap();
    }
    assert!(noted(&probe).is_empty(), "nothing of it was run");
    assert_eq!(system.service("edu0").pid, Some(host), "the driver host lives on");
}

#[test]
fn a_flood_of_invocations_takes_no_more_than_its_turn() {
    let (system, _device) = system();
    let (_session, probe) = open(&system);
    let (socket, action) = offered(&system);
    let invocation = Invocation { action, arguments: 1_u32.into_arguments() }.encode().unwrap();
    // Cancelled, so that the driver has no work with them that would slow the flood.
    probe.cancel().wait().unwrap();
    let flood = std::thread::spawn(move || {
        (0..50_000).for_each(|_| socket.send(&invocation, &[]).unwrap());
        socket
    });
    for _ in 0..50 {
        assert_eq!(probe.aborted().wait(), Ok(0));
    }
    let socket = flood.join().unwrap();
    eventually("the count of what was dropped", || probe.cancel().wait() == Ok(50_000));
    drop(socket);
    eventually("the end of its session", || system.service("edu0").sessions == 1);
}

#[test]
fn a_handle_outlives_its_session_without_harm() {
    let (system, _device) = system();
    let kept: Vec<Action<u32>> = (0..3)
        .map(|_| {
            let (_session, probe) = open(&system);
            probe.offer().wait().unwrap()
        })
        .collect();
    for action in kept {
        assert_eq!(action.invoke(1), Err(IOReturn::OFFLINE));
    }
}
