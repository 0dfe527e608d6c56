//! The driver on an emulated controller, step by step: what works.

mod rig;

use std::time::Duration;

use block_api::{Health, Operation, Status};
use iohost_device_backend::InterruptKind;
use iohost_device_models::nvme::{Nvme as Model, Options};
use iohost_driver::IOReturn;
use iohost_testkit::Rig;
use nvme::Nvme;
use proptest::prelude::*;

use rig::{Client, client, disk, request};

#[test]
fn what_is_written_is_read_again_and_is_on_the_disk() {
    let mut client = client();
    let data = client.fill(0, 4096, 1);
    client.run(request(Operation::Write, 1024, 4096)).unwrap();
    assert_eq!(client.on_disk(1, 1024, 4096), data);
    client.memory.write_at(0, &[0; 4096]);
    client.run(request(Operation::Read, 1024, 4096)).unwrap();
    assert_eq!(client.bytes(0, 4096), data);
    assert_eq!(client.rig.function().blocked_dma(), 0, "all of it went to memory that is mapped");
}

#[test]
fn it_tells_of_its_disks() {
    let disks = vec![disk(512, 2048), disk(4096, 100).read_only()];
    let client = Client::of(Options { mdts: 3, ..Options::default() }, disks);
    assert_eq!(client.disks(), [1, 2]);
    let first = client.describe(1);
    assert_eq!((first.block, first.blocks, first.is_read_only), (512, 2048, false));
    assert_eq!((first.most_at_once, first.bytes()), (32768, 1 << 20));
    assert_eq!(
        (first.model.as_str(), first.serial.as_str()),
        ("iohost emulated NVMe", "IOHOST0001")
    );
    let second = client.describe(2);
    assert_eq!((second.block, second.blocks, second.is_read_only), (4096, 100, true));
    let mut none = client.rig.client::<block_api::Client>().describe(3);
    client.rig.settle();
    assert_eq!(none.poll(), Some(Err(IOReturn::NOT_FOUND)));
}

#[test]
fn health_is_what_the_controller_says() {
    let mut client = client();
    client.run(request(Operation::Write, 0, 512)).unwrap();
    let calls = client.rig.client::<block_api::Client>();
    let mut answers = [calls.health(), calls.health()];
    client.rig.settle();
    for answer in &mut answers {
        let health = Health::from_bytes(&answer.poll().unwrap().unwrap()).unwrap();
        assert_eq!((health.temperature, health.spare, health.used), (313, 100, 3));
        assert_eq!((health.written_units, health.power_cycles), (1, 1));
    }
}

#[test]
fn all_operations_do_what_they_say_on_both_block_sizes() {
    for block in [512, 4096] {
        let mut client = Client::of(Options::default(), vec![disk(block, 256)]);
        let length = u64::from(block) * 8;
        let data = client.fill(0, length as usize, 3);
        client.run(request(Operation::WriteThrough, 0, length)).unwrap();
        client.run(request(Operation::Flush, 0, 0)).unwrap();
        assert_eq!(client.on_disk(1, 0, length as usize), data);
        client.run(request(Operation::WriteZeroes, 0, block.into())).unwrap();
        client.run(request(Operation::Discard, u64::from(block) * 2, block.into())).unwrap();
        let mut expected = data;
        expected[..block as usize].fill(0);
        expected[block as usize * 2..block as usize * 3].fill(0);
        assert_eq!(client.on_disk(1, 0, length as usize), expected);
    }
}

#[test]
fn a_long_request_is_cut_to_what_the_controller_takes() {
    let options = Options { mdts: 1, ..Options::default() };
    let mut client = Client::of(options, vec![disk(512, 8192)]);
    let data = client.fill(0, 1 << 20, 5);
    client.run(request(Operation::Write, 512, 1 << 20)).unwrap();
    assert_eq!(client.on_disk(1, 512, 1 << 20), data);
    assert_eq!(client.rig.model(|model, _| model.io_commands()), 128);
    client.run(request(Operation::WriteZeroes, 512, 1 << 20)).unwrap();
    assert_eq!(client.on_disk(1, 512, 1 << 20), vec![0; 1 << 20]);
}

#[test]
fn requests_that_cannot_be_are_refused_with_their_kind() {
    let disks = vec![disk(4096, 100), disk(512, 100).read_only()];
    let mut client = Client::of(Options::default(), disks);
    let read = request(Operation::Read, 0, 4096);
    let most = super_large();
    for (wrong, status) in [
        (block_api::Request { offset: 512, ..read }, Status::NotAligned),
        (block_api::Request { length: 100, ..read }, Status::NotAligned),
        (block_api::Request { length: 0, ..read }, Status::NotAligned),
        (block_api::Request { at: 2, ..read }, Status::NotAligned),
        (block_api::Request { offset: 100 * 4096, ..read }, Status::OutOfRange),
        (block_api::Request { offset: most, ..read }, Status::OutOfRange),
        (block_api::Request { length: most, ..read }, Status::OutOfRange),
        (block_api::Request { disk: 3, ..read }, Status::NoSuchDisk),
        (block_api::Request { disk: 3, ..request(Operation::Flush, 0, 0) }, Status::NoSuchDisk),
        (block_api::Request { memory: 1, ..read }, Status::NoSuchMemory),
        (block_api::Request { generation: 0, ..read }, Status::Stale),
        (block_api::Request { at: rig::MEMORY as u64 - 4, ..read }, Status::NoSuchMemory),
        (block_api::Request { at: u64::MAX - 3, ..read }, Status::NoSuchMemory),
        (block_api::Request { disk: 2, ..request(Operation::Write, 0, 512) }, Status::ReadOnly),
        (block_api::Request { disk: 2, ..request(Operation::Discard, 0, 512) }, Status::ReadOnly),
    ] {
        assert_eq!(client.failure(wrong), status, "{wrong:?}");
    }
    client.send_raw(&[1, 2, 3]);
    client.send_raw(&[0xff; block_api::REQUEST_LENGTH]);
    client.send_raw(&[0; block_api::REQUEST_LENGTH + 1]);
    client.rig.settle();
    let statuses: Vec<_> =
        client.completions().into_iter().map(|c| c.outcome.unwrap_err().status).collect();
    assert_eq!(statuses, [Status::Malformed; 3]);
    assert_eq!(client.rig.model(|model, _| model.io_commands()), 0, "the controller saw nothing");
    client.run(read).unwrap();
}

/// A number whose sums with others overflow, and which is whole in blocks.
fn super_large() -> u64 {
    u64::MAX - 4095
}

#[test]
fn a_controller_without_optional_commands_says_so() {
    let options = Options { optional_commands: false, ..Options::default() };
    let mut client = Client::of(options, vec![disk(512, 100)]);
    assert!(!client.describe(1).can_discard && !client.describe(1).can_write_zeroes);
    assert_eq!(client.failure(request(Operation::Discard, 0, 512)), Status::Unsupported);
    assert_eq!(client.failure(request(Operation::WriteZeroes, 0, 512)), Status::Unsupported);
}

#[test]
fn queues_and_vectors_follow_the_controller_and_the_line_will_do() {
    let line = [InterruptKind::IntX];
    let all = [InterruptKind::IntX, InterruptKind::Msi, InterruptKind::MsiX];
    let options = Options::default();
    for (options, kinds, queues) in [
        (options.clone(), &all[..], 5),
        (Options { io_queues: 1, ..options.clone() }, &all[..], 1),
        (Options { io_queues: 2, ..options.clone() }, &all[..], 2),
        (Options { msi_x_vectors: 2, ..options.clone() }, &all[..], 5),
        (Options { msi_x_vectors: 1, ..options.clone() }, &all[..], 5),
        (Options { msi_x_vectors: 0, msi_vectors: 8, ..options.clone() }, &all[..], 5),
        (Options { msi_x_vectors: 0, ..options.clone() }, &line[..], 5),
        (Options { doorbell_stride: 3, ..options.clone() }, &all[..], 5),
        (Options { queue_entries: 2, ..options.clone() }, &all[..], 5),
        (Options { shadow_doorbells: true, ..options.clone() }, &all[..], 5),
        (Options { shadow_doorbells: true, msi_x_vectors: 0, ..options }, &line[..], 5),
    ] {
        let model = Model::new(options.clone(), vec![disk(512, 1000)]);
        let rig = Rig::<Nvme, _>::start_with(model, kinds).unwrap();
        let mut client = Client::on(rig);
        assert_eq!(client.rig.model(|model, _| model.io_queue_count()), queues, "{options:?}");
        assert_eq!(
            client.rig.model(|model, _| model.has_shadow_doorbells()),
            options.shadow_doorbells
        );
        for round in 0..600_u64 {
            let data = client.fill(0, 512, round as u8);
            client.run(request(Operation::Write, round * 512, 512)).unwrap();
            assert_eq!(client.on_disk(1, round * 512, 512), data, "{options:?}");
        }
    }
}

#[test]
fn sessions_have_queues_of_their_own_in_turn_and_do_not_disturb_each_other() {
    let mut first = client();
    let mut other = first.rig.open_session(4096).unwrap();
    let memory = block_api::memory_type(3, 8192);
    let memory = first.rig.map_memory(&other, memory).unwrap();
    memory.write_at(4096, &[9; 512]);
    let (mut requests, mut completions) =
        (other.producer(block_api::REQUESTS), other.consumer(block_api::COMPLETIONS));
    let write =
        block_api::Request { tag: 77, memory: 3, at: 4096, ..request(Operation::Write, 0, 512) };
    requests.enqueue(&write.to_bytes()).unwrap();
    assert_eq!(first.failure(block_api::Request { memory: 3, ..write }), Status::NoSuchMemory);
    let mut entry = Vec::new();
    completions.dequeue(&mut entry).unwrap();
    assert_eq!(entry, block_api::Completion::done(77));
    assert_eq!(first.on_disk(1, 0, 512), vec![9; 512]);
    first.rig.close_session(other);
    first.run(request(Operation::Read, 0, 512)).unwrap();
    assert_eq!(first.bytes(0, 512), vec![9; 512]);
}

#[test]
fn memory_is_the_same_each_time_and_has_its_limits() {
    let mut client = client();
    let session = client.rig.open_session(4096).unwrap();
    let map = |number, bytes| {
        client.rig.map_memory(&session, block_api::memory_type(number, bytes)).map(|m| m.len())
    };
    assert_eq!(map(0, 4096), Ok(4096));
    assert_eq!(map(0, 4096), Ok(4096));
    for (number, bytes) in [
        (0, 8192),
        (1, 0),
        (1, 100),
        (block_api::MOST_MEMORIES, 4096),
        (1, block_api::MOST_MEMORY),
        (1, (1 << 48) - 4096),
    ] {
        assert_eq!(map(number, bytes), Err(IOReturn::BAD_ARGUMENT), "{number} {bytes}");
    }
}

#[test]
fn a_client_that_leaves_takes_its_memory_away_only_when_the_controller_is_done() {
    let mut client = client();
    client.rig.model(|model, _| model.hold_io());
    client.send(request(Operation::Read, 0, 512));
    client.rig.settle();
    client.close();
    client.rig.model(|model, bus| model.release_io(bus));
    assert_eq!(client.rig.function().blocked_dma(), 0, "the memory was still mapped");
    client.rig.settle();
    let mut session = client.rig.open_session(4096).unwrap();
    session.producer(block_api::REQUESTS);
}

#[test]
fn more_requests_than_the_queue_holds_are_all_done_once() {
    let options = Options { io_queues: 1, queue_entries: 8, ..Options::default() };
    let mut client = Client::of(options, vec![disk(512, 4096)]);
    client.rig.model(|model, _| model.hold_io());
    let tags: Vec<u64> =
        (0..100).map(|n| client.send(request(Operation::Read, n * 512, 512))).collect();
    client.rig.settle();
    assert_eq!(client.rig.model(|model, _| model.held_commands()), 7, "one entry stays free");
    client.rig.model(|model, bus| model.release_io(bus));
    client.rig.settle();
    let mut done: Vec<u64> = client.completions().iter().map(|c| c.tag).collect();
    done.sort_unstable();
    assert_eq!(done, tags);
}

#[test]
fn completions_that_find_no_room_come_later_and_none_is_lost() {
    let mut rig =
        Rig::<Nvme, _>::start(Model::new(Options::default(), vec![disk(512, 100)])).unwrap();
    rig.settle();
    let mut session = rig.open_session(512).unwrap();
    rig.map_memory(&session, block_api::memory_type(0, 4096)).unwrap();
    let mut requests = session.producer(block_api::REQUESTS);
    let mut completions = session.consumer(block_api::COMPLETIONS);
    let (mut sent, mut done) = (0_u64, 0_u64);
    while done < 200 {
        let before = (sent, done);
        let read = |tag| block_api::Request { tag, ..request(Operation::Read, 0, 512) };
        while sent < 200 && requests.enqueue(&read(sent).to_bytes()).is_ok() {
            sent += 1;
            // The client takes nothing until its other queue is full as well.
            rig.settle();
        }
        let mut entry = Vec::new();
        while completions.dequeue(&mut entry).is_ok() {
            assert_eq!(entry, block_api::Completion::done(done));
            done += 1;
        }
        rig.settle();
        assert_ne!((sent, done), before, "it stands still");
    }
}

#[test]
fn polled_requests_need_no_interrupt() {
    let mut client = client();
    let data = client.fill(0, 8192, 9);
    let before = client.rig.function().with_model(|model, _| model.doorbell_writes());
    for operation in [Operation::Write, Operation::Read] {
        let polled = block_api::Request { is_polled: true, ..request(operation, 0, 8192) };
        client.run(polled).unwrap();
    }
    assert_eq!(client.on_disk(1, 0, 8192), data);
    assert!(client.rig.model(|model, _| model.doorbell_writes()) > before);
}

#[test]
fn calls_wait_until_the_controller_works() {
    let rig = Rig::<Nvme, _>::start(Model::new(Options::default(), vec![disk(512, 100)])).unwrap();
    let mut disks = rig.client::<block_api::Client>().disks();
    assert_eq!(disks.poll(), None);
    rig.settle();
    assert_eq!(disks.poll(), Some(Ok(vec![1, 0, 0, 0])));
}

#[test]
fn a_driver_that_is_started_again_finds_what_was_written() {
    let mut client = client();
    let data = client.fill(0, 4096, 4);
    client.run(request(Operation::Write, 0, 4096)).unwrap();
    let function = client.rig.function();
    drop(client);
    let kinds = [InterruptKind::MsiX];
    let mut client = Client::on(Rig::start_on(function, &kinds).unwrap());
    client.run(request(Operation::Read, 0, 4096)).unwrap();
    assert_eq!(client.bytes(0, 4096), data);
}

#[test]
fn namespaces_that_come_and_go_are_noticed() {
    let mut client = client();
    client.rig.model(|model, bus| model.add_namespace(bus, 5, disk(4096, 50)));
    client.rig.settle();
    assert_eq!(client.disks(), [1, 5]);
    client.rig.model(|model, bus| {
        model.remove_namespace(bus, 1);
        model.remove_namespace(bus, 5)
    });
    client.rig.settle();
    assert!(client.disks().is_empty());
    assert_eq!(client.failure(request(Operation::Read, 0, 512)), Status::NoSuchDisk);
}

#[test]
fn an_idle_driver_does_nothing_as_time_passes() {
    let mut client = client();
    client.run(request(Operation::Read, 0, 512)).unwrap();
    let before = client.rig.model(|model, _| model.doorbell_writes());
    client.rig.advance(Duration::from_secs(3600));
    assert_eq!(client.rig.model(|model, _| model.doorbell_writes()), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a model of the disk: a vector.
    #[test]
    fn any_sequence_of_requests_does_what_it_would_do_to_bytes(
        block in prop_oneof![Just(512_u64), Just(4096)],
        mdts in 0_u8..4,
        entries in prop_oneof![Just(2_u16), Just(5), Just(64)],
        shadow_doorbells in any::<bool>(),
        sgls in any::<bool>(),
        steps in prop::collection::vec((0_u8..5, 0_u64..48, 1_u64..16, 0_u64..2048, any::<bool>()), 1..20),
    ) {
        const BLOCKS: u64 = 64;
        let options =
            Options { mdts, queue_entries: entries, shadow_doorbells, sgls, ..Options::default() };
        let mut client = Client::of(options, vec![disk(block as u32, BLOCKS)]);
        let mut expected = vec![0; (BLOCKS * block) as usize];
        for (seed, (operation, first, count, at, is_polled)) in steps.into_iter().enumerate() {
            let (offset, length, at) = (first * block, count * block, at * 4);
            let place = at as usize..(at + length) as usize;
            let span = offset as usize..(offset + length) as usize;
            let operation = [
                Operation::Read,
                Operation::Write,
                Operation::WriteThrough,
                Operation::WriteZeroes,
                Operation::Discard,
            ][usize::from(operation)];
            let data = client.fill(place.start, place.len(), seed as u8);
            let asked = block_api::Request { at, is_polled, ..request(operation, offset, length) };
            client.run(asked).unwrap();
            match operation {
                Operation::Read => {
                    prop_assert!(client.bytes(place.start, place.len()) == expected[span]);
                }
                Operation::Write | Operation::WriteThrough => {
                    expected[span].copy_from_slice(&data);
                }
                _ => expected[span].fill(0),
            }
        }
        prop_assert!(client.on_disk(1, 0, expected.len()) == expected);
        prop_assert_eq!(client.rig.function().blocked_dma(), 0);
    }
}
