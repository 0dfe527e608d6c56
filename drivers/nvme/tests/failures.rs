//! The driver on a controller that fails or lies: a typed error or a controller that works again,
//! never a panic and never a request that is not answered.

mod rig;

use std::time::Duration;

use block_api::{Completion, Operation, Request, Status};
use iohost_device_models::nvme::{Faults, Lie, Nvme as Model, Options};
use iohost_driver::IOReturn;
use iohost_testkit::Rig;
use nvme::Nvme;

use rig::{Client, client, disk, request};

/// Longer than the driver waits for a command, an abort and a reset together.
const LONG: u32 = 60;

fn read() -> Request {
    request(Operation::Read, 0, 512)
}

fn with(client: &Client, change: impl FnOnce(&mut Faults)) {
    client.rig.model(|model, _| change(model.faults()));
}

/// Starts the driver on a controller with something wrong from the start.
fn started(change: impl FnOnce(&mut Faults)) -> Result<Rig<Nvme, Model>, String> {
    let mut model = Model::new(Options::default(), vec![disk(512, 100)]);
    change(model.faults());
    Rig::start(model).map_err(|err| err.to_string())
}

/// What the calls of a driver end in, after as much time as it takes.
fn given_up(rig: &Rig<Nvme, Model>) -> Option<Result<Vec<u8>, IOReturn>> {
    let mut disks = rig.client::<block_api::Client>().disks();
    for _ in 0..4 * LONG {
        rig.advance(Duration::from_millis(250));
    }
    disks.poll()
}

fn outcome(completions: &[Completion]) -> Result<(), Status> {
    let [completion] = completions else { panic!("{completions:?}") };
    completion.outcome.clone().map_err(|failure| failure.status)
}

#[test]
fn a_medium_error_is_told_with_its_place_and_leaves_the_rest_alone() {
    let options = Options { mdts: 1, ..Options::default() };
    let mut client = Client::of(options, vec![disk(512, 2048)]);
    client.rig.model(|model, _| model.namespace(1).unwrap().break_blocks(100..101));
    let failure = client.run(request(Operation::Read, 0, 128 * 512)).unwrap_err();
    assert_eq!(failure.status, Status::Medium);
    assert_eq!(
        failure.words,
        "unrecovered read error (status 2h/81h), at byte 49152 of the request"
    );
    assert_eq!(client.failure(request(Operation::Write, 100 * 512, 512)), Status::Medium);
    client.run(request(Operation::Read, 101 * 512, 512)).unwrap();
}

#[test]
fn what_may_pass_is_tried_again_and_not_for_ever() {
    let mut client = client();
    let internal = Lie::Status(0x006);
    with(&client, |faults| faults.lies.extend([internal; 2]));
    client.run(read()).unwrap();
    with(&client, |faults| faults.lies.extend([internal; 3]));
    assert_eq!(client.failure(read()), Status::Device);
    with(&client, |faults| faults.lies.push_back(Lie::Status(0x4006)));
    assert_eq!(client.failure(read()), Status::Device, "the controller says: do not retry");
    client.run(read()).unwrap();
}

#[test]
fn a_reserved_status_is_an_error_like_any_other() {
    let mut client = client();
    for status in [0x07f, 0x1ff, 0x2ff, 0x4aa, 0x5aa, 0x6aa, 0x7aa] {
        with(&client, |faults| faults.lies.extend([Lie::Status(status | 0x4000)]));
        assert!(client.run(read()).is_err(), "{status:#x}");
    }
    client.run(read()).unwrap();
}

#[test]
fn a_command_that_never_completes_is_aborted_or_done_again_after_a_reset() {
    let mut client = client();
    // Held: the controller can abort it, and it is tried again until it was often enough.
    client.rig.model(|model, _| model.hold_io());
    client.send(read());
    assert_eq!(outcome(&client.wait(LONG)), Err(Status::NotResponding));
    client.rig.model(|model, bus| model.release_io(bus));

    // Lost: the abort finds nothing, so the controller is reset, and the command done again.
    with(&client, |faults| faults.swallow_io = 1);
    client.send(read());
    assert_eq!(outcome(&client.wait(LONG)), Ok(()));
    client.run(read()).unwrap();
}

#[test]
fn an_abort_that_is_not_answered_leads_to_a_reset() {
    let mut client = client();
    with(&client, |faults| (faults.swallow_io, faults.swallow_admin) = (1, 1));
    client.send(read());
    assert_eq!(outcome(&client.wait(LONG)), Ok(()));
}

#[test]
fn a_lost_interrupt_costs_time_and_nothing_else() {
    let mut client = client();
    client.rig.model(|model, _| model.hold_io());
    let tag = client.send(read());
    client.rig.settle();
    // Executed while nobody can be told: its message is lost.
    let messages = iohost_device_models::InterruptKind::MsiX;
    client.rig.function().set_irqs(messages, &[]).unwrap();
    client.rig.model(|model, bus| model.release_io(bus));
    client.rig.settle();
    assert_eq!(client.completions(), []);
    let found = client.wait(2);
    assert_eq!((found.len(), found[0].tag), (1, tag));
    assert_eq!(found[0].outcome, Ok(()));
}

#[test]
fn fatal_status_leads_to_a_reset_and_everything_is_done_again() {
    let mut client = client();
    client.rig.model(|model, _| model.hold_io());
    let data = client.fill(0, 8192, 6);
    for part in 0..16 {
        let write = request(Operation::Write, part * 512, 512);
        client.send(Request { at: part * 512, ..write });
    }
    client.rig.settle();
    client.rig.model(|model, bus| {
        model.break_down();
        // What is held is lost, as the controller does nothing any more.
        model.release_io(bus);
    });
    let found = client.wait(LONG);
    assert_eq!(found.len(), 16);
    assert!(found.iter().all(|completion| completion.outcome.is_ok()), "{found:?}");
    assert_eq!(client.on_disk(1, 0, 8192), data);
}

#[test]
fn what_completes_while_the_controller_is_disabled_is_not_taken_for_what_comes_after() {
    let mut client = client();
    with(&client, |faults| faults.completes_when_disabled = true);
    // So that those completions are behind what the same commands get when they are done again.
    for _ in 0..8 {
        client.run(read()).unwrap();
    }
    client.rig.model(|model, _| model.hold_io());
    for _ in 0..16 {
        client.send(read());
    }
    client.rig.settle();
    client.rig.model(|model, _| model.break_down());
    let found = client.wait(LONG);
    assert_eq!(found.len(), 16);
    assert!(found.iter().all(|completion| completion.outcome.is_ok()), "{found:?}");
    for _ in 0..16 {
        client.run(read()).unwrap();
    }
    assert_eq!(client.rig.model(|model, _| model.disablings()), 1, "for the fatal status only");
}

#[test]
fn completions_that_cannot_be_lead_to_a_reset_and_no_request_is_lost() {
    let mut garbage = [0xff; 16];
    garbage[14] = 0x01;
    for lie in [
        Lie::CommandId(0xffff),
        Lie::CommandId(200),
        Lie::Twice,
        Lie::Garbage([0xff; 16]),
        Lie::Garbage(garbage),
        Lie::Garbage([0; 16]),
    ] {
        let mut client = client();
        with(&client, |faults| faults.lies.push_back(lie));
        client.send(read());
        assert_eq!(outcome(&client.wait(LONG)), Ok(()), "{lie:?}");
        client.run(read()).unwrap();
    }
}

#[test]
fn heads_and_queues_in_completions_are_of_no_use_to_us_and_harmless() {
    for lie in [Lie::Head(0xffff), Lie::Queue(999)] {
        let mut client = client();
        with(&client, |faults| faults.lies.push_back(lie));
        client.run(read()).unwrap();
        client.run(read()).unwrap();
    }
}

#[test]
fn a_controller_that_only_lies_is_given_up_and_everybody_is_told() {
    for is_polled in [false, true] {
        let mut client = client();
        let read = block_api::Request { is_polled, ..read() };
        with(&client, |faults| faults.lies.extend([Lie::CommandId(0xffff); 20]));
        client.send(read);
        assert_eq!(outcome(&client.wait(LONG)), Err(Status::NotResponding));
        for _ in 0..2 {
            assert_eq!(client.failure(read), Status::NotResponding, "at once");
        }
        let mut health = client.rig.client::<block_api::Client>().health();
        client.rig.settle();
        assert_eq!(health.poll(), Some(Err(IOReturn::NOT_RESPONDING)));
    }
}

#[test]
fn a_controller_that_is_pulled_out_is_gone_for_everybody() {
    let mut client = client();
    client.rig.model(|model, _| model.hold_io());
    client.send(read());
    client.send(request(Operation::Write, 0, 1 << 20));
    client.rig.settle();
    with(&client, |faults| faults.gone = true);
    let mut found = client.wait(LONG);
    found.extend(client.wait(1));
    let statuses: Vec<_> = found.into_iter().map(|c| c.outcome.unwrap_err().status).collect();
    assert_eq!(statuses, [Status::Gone; 2]);
    assert_eq!(client.failure(read()), Status::Gone);
    let mut disks = client.rig.client::<block_api::Client>().disks();
    client.rig.settle();
    assert_eq!(disks.poll(), Some(Err(IOReturn::NO_DEVICE)));
}

#[test]
fn a_namespace_that_vanishes_under_a_request_is_no_disk_any_more() {
    let options = Options { queue_entries: 2, mdts: 1, ..Options::default() };
    let mut client = Client::of(options, vec![disk(512, 2048), disk(512, 100)]);
    client.rig.model(|model, _| model.hold_io());
    client.send(request(Operation::Read, 0, 1 << 19));
    client.rig.settle();
    client.rig.model(|model, bus| {
        model.remove_namespace(bus, 1);
        model.release_io(bus);
    });
    assert_eq!(outcome(&client.wait(LONG)), Err(Status::NoSuchDisk));
    client.run(Request { disk: 2, ..read() }).unwrap();
}

#[test]
fn registers_that_cannot_be_refuse_the_start_in_words() {
    type Change = fn(&mut Faults);
    let sound: u64 = 1 << 37 | 1 << 16 | 2 << 24 | 1023;
    let cases: [(Change, &str); 6] = [
        (|faults| faults.gone = true, "all ones"),
        (|faults| faults.version = Some(0), "version 0.0"),
        (|faults| faults.version = Some(0x0001_0000), "1.1 and later"),
        (|faults| faults.capabilities = Some(1023), "no NVM command set"),
        (|faults| faults.capabilities = Some(1 << 37 | 1023 | 1 << 48), "smallest page"),
        (|faults| faults.capabilities = Some(1 << 37), "queues of 1 entry"),
    ];
    for (change, words) in cases {
        let refused = started(change).err().unwrap_or_else(|| panic!("started: {words}"));
        assert!(refused.contains(words), "{refused}");
    }
    let far = started(|faults| faults.capabilities = Some(sound | 15 << 32)).unwrap_err();
    assert!(far.contains("bytes apart"), "{far}");
}

#[test]
fn a_controller_that_does_not_come_up_is_given_up_in_its_time() {
    type Change = fn(&mut Faults);
    let cases: [Change; 11] = [
        |faults| faults.never_ready = true,
        |faults| faults.swallow_admin = 100,
        |faults| faults.admin_status = vec![(0x06, 0x006)],
        |faults| faults.admin_status = vec![(0x09, 0x002)],
        |faults| faults.admin_status = vec![(0x05, 0x101)],
        |faults| faults.admin_status = vec![(0x01, 0x100)],
        |faults| faults.controller_bytes = vec![(512, vec![0x77, 0x44])],
        |faults| faults.controller_bytes = vec![(516, vec![0xff; 4])],
        |faults| faults.active_list = Some(vec![2, 1]),
        |faults| faults.active_list = Some(vec![1, 1]),
        |faults| faults.active_list = Some(vec![1, 0x1234_5678]),
    ];
    for (case, change) in cases.into_iter().enumerate() {
        let rig = started(change).unwrap();
        let answer = given_up(&rig);
        assert_eq!(answer, Some(Err(IOReturn::NOT_RESPONDING)), "case {case}");
        let mut client = Client::on(rig);
        assert_eq!(client.failure(read()), Status::NotResponding, "case {case}");
    }
}

#[test]
fn a_controller_that_does_not_become_quiet_is_given_up() {
    let mut client = client();
    with(&client, |faults| {
        faults.never_quiet = true;
        faults.lies.push_back(Lie::CommandId(999));
    });
    client.send(read());
    assert_eq!(outcome(&client.wait(LONG)), Err(Status::NotResponding));
    with(&client, |faults| faults.never_quiet = false);
}

#[test]
fn structures_that_lie_are_survived() {
    type Change = fn(&mut Faults);
    // What is said of the namespace, and whether there is a disk.
    let cases: [(Change, bool); 10] = [
        (|faults| faults.granted_queues = Some(0xffff_ffff), true),
        (|faults| faults.granted_queues = Some(0), true),
        (|faults| faults.controller_bytes = vec![(77, vec![0xff])], true),
        (|faults| faults.controller_bytes = vec![(77, vec![63])], true),
        (|faults| faults.controller_bytes = vec![(4, vec![0; 68])], true),
        (|faults| faults.namespace_bytes = vec![(0, vec![0xff; 8])], false),
        (|faults| faults.namespace_bytes = vec![(0, vec![0; 8])], false),
        (|faults| faults.namespace_bytes = vec![(130, vec![63])], false),
        (|faults| faults.namespace_bytes = vec![(128, vec![8, 0])], false),
        (|faults| faults.namespace_bytes = vec![(26, vec![0xf])], false),
    ];
    for (case, (change, has_disk)) in cases.into_iter().enumerate() {
        let mut client = Client::on(started(change).unwrap());
        assert_eq!(!client.disks().is_empty(), has_disk, "case {case}");
        if has_disk {
            client.send(read());
            assert_eq!(outcome(&client.wait(LONG)), Ok(()), "case {case}");
        } else {
            assert_eq!(client.failure(read()), Status::NoSuchDisk, "case {case}");
        }
    }
}

#[test]
fn a_disk_that_is_shorter_than_it_says_is_an_error_of_range() {
    let longer = |faults: &mut Faults| faults.namespace_bytes = vec![(0, vec![0xff, 0xff, 0, 0])];
    let mut client = Client::on(started(longer).unwrap());
    let beyond = request(Operation::Read, 60_000 * 512, 512);
    assert_eq!(client.failure(beyond), Status::OutOfRange);
}

#[test]
fn requests_are_answered_when_the_driver_stops() {
    let mut client = client();
    client.rig.model(|model, _| model.hold_io());
    client.send(read());
    let mut disks = client.rig.client::<block_api::Client>().disks();
    client.rig.settle();
    client.rig.stop();
    assert!(disks.poll().is_some());
    let blocked = client.rig.function().blocked_dma();
    client.rig.model(|model, bus| model.release_io(bus));
    assert_eq!(client.rig.function().blocked_dma(), blocked, "nothing was left to be written");
}

#[test]
fn random_lies_end_in_answers() {
    // A small generator of our own, so that each run is the same.
    let mut state = 0x9e37_79b9_u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let mut client = client();
    for round in 0..300 {
        let lie = match random() % 5 {
            0 => Lie::CommandId(random() as u16),
            1 => Lie::Status(random() as u16),
            2 => Lie::Twice,
            3 => Lie::Head(random() as u16),
            _ => Lie::Garbage(std::array::from_fn(|_| random() as u8)),
        };
        with(&client, |faults| faults.lies.push_back(lie));
        let tag = client.send(read());
        let mut found = client.wait(LONG);
        // It may have been done, or not; it is answered once.
        found.extend(client.wait(0));
        assert_eq!(found.iter().map(|c| c.tag).collect::<Vec<_>>(), [tag], "{round}: {lie:?}");
        with(&client, |faults| faults.lies.clear());
        client.send(read());
        assert_eq!(client.wait(LONG).len(), 1, "{round}: {lie:?}");
    }
    assert_eq!(client.rig.failure(), None);
}
