//! The NVMe controller, by its registers and queues, against NVM Express 1.4.

mod host;

use iohost_device_models::InterruptKind;
use iohost_device_models::nvme::{Lie, Namespace, Options};

use host::{Host, MEMORY, PAGE};

fn disk() -> Namespace {
    Namespace::in_memory(512, 2048).unwrap()
}

fn host(options: Options) -> Host {
    Host::started(options, vec![disk()])
}

/// A host with an I/O queue pair of 16 entries.
fn with_queue() -> Host {
    let mut host = host(Options::default());
    host.make_queue_pair(1, 16, None);
    host
}

#[test]
fn capabilities_say_what_the_options_said() {
    let options =
        Options { queue_entries: 64, doorbell_stride: 2, ready_timeout: 9, ..Options::default() };
    let host = Host::new(options, vec![disk()]);
    let cap = host.read_long(0x00);
    assert_eq!(cap & 0xffff, 63, "MQES");
    assert_eq!(cap >> 24 & 0xff, 9, "TO");
    assert_eq!(cap >> 32 & 0xf, 2, "DSTRD");
    assert_eq!(cap >> 37 & 0xff, 1, "CSS: the NVM command set");
    assert_eq!(host.read(0x08), 0x0001_0400, "VS");
    assert_eq!(host.read(0x04), (cap >> 32) as u32, "in two halves as well");
}

#[test]
fn ready_follows_enable_and_a_reset_forgets_the_queues() {
    let mut host = with_queue();
    assert_eq!(host.read(0x1c) & 1, 1);
    host.write(0x14, 0);
    assert_eq!(host.read(0x1c), 0, "CSTS");
    assert_eq!(host.function.with_model(|nvme, _| nvme.io_queue_count()), 0);
    host.enable();
    // The queue is not there: a command in it is not fetched.
    host.add_pair(1, 16);
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host.completion(1), None);
}

#[test]
fn wrong_entry_sizes_or_pages_are_fatal() {
    let host = Host::new(Options::default(), vec![disk()]);
    for cc in [5 << 16 | 4 << 20 | 1, 6 << 16 | 4 << 20 | 9 << 7 | 1] {
        host.write(0x14, cc);
        assert_eq!(host.read(0x1c) & 3, 2, "CFS and not RDY for CC {cc:#x}");
        host.write(0x14, 0);
    }
}

#[test]
fn a_shutdown_ends_as_complete() {
    let host = host(Options::default());
    host.write(0x14, host.read(0x14) | 1 << 14);
    assert_eq!(host.read(0x1c) >> 2 & 3, 2, "SHST");
}

#[test]
fn identify_tells_of_the_controller_and_its_namespaces() {
    let blocks = |block, count| Namespace::in_memory(block, count).unwrap();
    let spaces = vec![blocks(512, 1000), blocks(4096, 50).read_only()];
    let options = Options { mdts: 3, shadow_doorbells: true, ..Options::default() };
    let mut host = Host::started(options, spaces);

    let controller = host.identify(1, 0).unwrap();
    assert_eq!(controller[77], 3, "MDTS");
    assert_eq!(controller[256..258], [0, 1], "OACS: doorbell buffer config");
    assert_eq!((controller[512], controller[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(controller[80..84], 0x0001_0400_u32.to_le_bytes(), "VER as the register");
    assert_eq!(controller[520] & 0b1100, 0b1100, "ONCS");
    assert_eq!(&controller[4..24], b"IOHOST0001          ", "padded by spaces");

    let first = host.identify(0, 1).unwrap();
    assert_eq!(first[0..8], 1000_u64.to_le_bytes(), "NSZE");
    assert_eq!(first[130], 9, "LBADS");
    let second = host.identify(0, 2).unwrap();
    assert_eq!((second[130], second[99]), (12, 1), "LBADS, and write protected");
    assert_eq!(host.identify(0, 3).unwrap(), vec![0; 4096], "one that is not active");
    assert_eq!(host.identify(0, 0), Err(0x00b), "no number at all");
    assert_eq!(host.identify(0, 1000), Err(0x00b), "above NN");

    let list = host.identify(2, 0).unwrap();
    assert_eq!(list[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(host.identify(2, 1).unwrap()[..8], [2, 0, 0, 0, 0, 0, 0, 0], "those after 1");
    assert_eq!(host.identify(3, 2).unwrap()[..4], [1, 8, 0, 0], "an EUI-64");
    assert_eq!(host.identify(0x55, 0), Err(0x002));
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let mut host = host(Options { io_queues: 2, queue_entries: 32, ..Options::default() });
    let make_cq = |id: u32, size: u32, flags: u32| [id | (size - 1) << 16, flags];
    for ([dw10, dw11], status) in [
        (make_cq(0, 16, 1), 0x101),
        (make_cq(3, 16, 1), 0x101),
        (make_cq(1, 33, 1), 0x102),
        (make_cq(1, 1, 1), 0x102),
        (make_cq(1, 16, 0), 0x002),
        (make_cq(1, 16, 3 | 9 << 16), 0x108),
    ] {
        let answer = host.admin(0x05, 0, MEMORY, 0, [dw10, dw11]);
        assert_eq!(answer, Err(status), "CQ {dw10:#x} {dw11:#x}");
    }
    assert_eq!(host.admin(0x05, 0, MEMORY + 8, 0, make_cq(1, 16, 1)), Err(0x013), "off its page");
    assert_eq!(host.admin(0x01, 0, MEMORY, 0, [1 | 15 << 16, 1 | 1 << 16]), Err(0x100));
    host.make_queue_pair(1, 16, None);
    assert_eq!(host.admin(0x05, 0, MEMORY, 0, make_cq(1, 16, 1)), Err(0x101), "it is there");
    assert_eq!(host.admin(0x04, 0, 0, 0, [1, 0]), Err(0x10c), "its submission queue is there");
    assert_eq!(host.admin(0x00, 0, 0, 0, [1, 0]), Ok(0));
    assert_eq!(host.admin(0x04, 0, 0, 0, [1, 0]), Ok(0));
    assert_eq!(host.admin(0x04, 0, 0, 0, [1, 0]), Err(0x101), "it is gone");
}

#[test]
fn it_grants_the_queues_it_has() {
    let mut host = host(Options { io_queues: 3, ..Options::default() });
    assert_eq!(host.admin(0x09, 0, 0, 0, [7, 7 << 16 | 7]), Ok(2 << 16 | 2), "0's based");
    assert_eq!(host.admin(0x0a, 0, 0, 0, [7, 0]), Ok(2 << 16 | 2));
    assert_eq!(host.admin(0x09, 0, 0, 0, [7, 0xffff]), Err(0x002));
    assert_eq!(host.admin(0x09, 0, 0, 0, [0x42, 0]), Err(0x002), "no such feature");
    assert_eq!(host.admin(0x77, 0, 0, 0, [0, 0]), Err(0x001), "no such command");
}

#[test]
fn blocks_come_back_as_they_were_written() {
    let mut host = with_queue();
    let data: Vec<u8> = (0..1024).map(|at| (at * 7 + at / 256) as u8).collect();
    host.memory.write_at(0, &data);
    assert_eq!(host.run(1, &host.io(0x01, 5, 2)), Ok(0));
    host.memory.write_at(0, &[0; 1024]);
    assert_eq!(host.run(1, &host.io(0x02, 5, 2)), Ok(0));
    assert_eq!(host.bytes(0, 1024), data);
    assert_eq!(host.run(1, &host.io(0x00, 0, 1)), Ok(0), "flush");
    assert_eq!(host.run(1, &host.io(0x08, 5, 1)), Ok(0), "write zeroes");
    assert_eq!(host.run(1, &host.io(0x02, 5, 2)), Ok(0));
    assert_eq!((host.bytes(0, 512), host.bytes(512, 512)), (vec![0; 512], data[512..].to_vec()));
}

#[test]
fn pages_of_a_list_are_used_in_their_order_also_across_lists() {
    let mut host = with_queue();
    // Four pages of data in reverse; the list's last two entries are on another page.
    let page = |number: u64| MEMORY + number * PAGE;
    let list = 8 * PAGE;
    let end_of_list = list + PAGE - 16;
    host.memory.write_at(end_of_list as usize, &page(6).to_le_bytes());
    host.memory.write_at(end_of_list as usize + 8, &(page(9)).to_le_bytes());
    host.memory.write_at(9 * PAGE as usize, &page(5).to_le_bytes());
    host.memory.write_at(9 * PAGE as usize + 8, &page(4).to_le_bytes());
    for (place, number) in [(7, 1), (6, 2), (5, 3), (4, 4)] {
        host.memory.write_at(place * PAGE as usize, &[number; PAGE as usize]);
    }
    let mut write = host.io(0x01, 0, 32);
    (write.prp1, write.prp2) = (page(7), MEMORY + end_of_list);
    assert_eq!(host.run(1, &write), Ok(0));
    let written = host.function.with_model(|nvme, _| nvme.namespace(1).unwrap().peek(0, 16384));
    for (part, number) in written.chunks(PAGE as usize).zip(1..) {
        assert!(part.iter().all(|byte| *byte == number), "page {number}");
    }
    for (prp1, prp2) in [(page(7) + 2, page(8)), (page(7), page(8) + 4)] {
        (write.prp1, write.prp2) = (prp1, prp2);
        assert_eq!(host.run(1, &write), Err(0x013), "{prp1:#x} {prp2:#x}");
    }
    // A list that points to itself for ever.
    let last = list as usize + PAGE as usize - 8;
    host.memory.write_at(last, &(MEMORY + last as u64).to_le_bytes());
    (write.prp1, write.prp2) = (page(7), MEMORY + last as u64);
    assert_eq!(host.run(1, &write), Err(0x013));
}

#[test]
fn data_is_found_by_scatter_gather_lists() {
    let mut host = Host::started(Options { sgls: true, ..Options::default() }, vec![disk()]);
    host.make_queue_pair(1, 16, None);
    let page = |number: u64| MEMORY + number * PAGE;
    for number in 0..3_u8 {
        host.memory.write_at(usize::from(number) * PAGE as usize, &[number + 1; PAGE as usize]);
    }
    let (block, segment, last) = (0x00_u64 << 56, 0x20_u64 << 56, 0x30_u64 << 56);
    let put = |place: u64, descriptors: &[(u64, u64)]| {
        let bytes = descriptors
            .iter()
            .flat_map(|(address, rest)| [address.to_le_bytes(), rest.to_le_bytes()].concat());
        host.memory.write_at((place - MEMORY) as usize, &bytes.collect::<Vec<u8>>());
    };
    // Nine blocks of 512 bytes: 512, nothing and 3072 bytes, a segment further on 1024.
    put(
        page(8) + 16,
        &[(page(2), block | 512), (0, block), (page(0), block | 3072), (page(9), last | 16)],
    );
    put(page(9), &[(page(1) + 4, block | 1024)]);
    put(page(10), &[(page(11), segment | 16)]);
    put(page(11), &[(page(10), segment | 16)]);
    put(page(12), &[(page(0), 0x10 << 56 | 512)]);
    let with = |first: u64, second: u64| host::Entry {
        flags: 0x40,
        prp1: first,
        prp2: second,
        ..host.io(0x01, 0, 9)
    };
    let (listed, direct) = (with(page(8) + 16, segment | 64), with(page(0) + 4, block | 4608));
    let wrong = [
        (with(page(0), block | 4096), 0x00f),
        (with(page(0), block | 5120), 0x00f),
        (with(page(9), last | 16), 0x00f),
        (with(page(9), last | 17), 0x00d),
        (with(page(9), last), 0x00d),
        (with(page(10), segment | 16), 0x00e),
        (with(page(9), last | 1 << 31), 0x00e),
        (with(page(0), 0x10 << 56 | 4608), 0x011),
        (with(page(12), last | 16), 0x011),
        (with(page(9), segment | 16), 0x011),
        (host::Entry { flags: 0x80, ..listed }, 0x002),
        (host::Entry { flags: 0xc0, ..listed }, 0x002),
    ];
    assert_eq!(host.run(1, &listed), Ok(0));
    let written = host.function.with_model(|nvme, _| nvme.namespace(1).unwrap().peek(0, 4608));
    let expected = [vec![3; 512], vec![1; 3072], vec![2; 1024]].concat();
    assert!(written == expected);
    for (entry, status) in wrong {
        assert_eq!(host.run(1, &entry), Err(status), "{entry:x?}");
    }
    assert_eq!(host.run(1, &direct), Ok(0));
    let written = host.function.with_model(|nvme, _| nvme.namespace(1).unwrap().peek(0, 4608));
    assert!(written == [vec![1; 4092], vec![2; 516]].concat());
}

#[test]
fn what_cannot_be_done_says_why() {
    let namespaces = vec![disk(), disk().read_only()];
    let mut host = Host::started(Options { mdts: 1, ..Options::default() }, namespaces);
    host.make_queue_pair(1, 16, None);
    host.function.with_model(|nvme, _| nvme.namespace(1).unwrap().break_blocks(100..101));
    let with_nsid = |nsid, mut entry: host::Entry| {
        entry.nsid = nsid;
        entry
    };
    for (entry, status) in [
        (host.io(0x02, 2047, 2), 0x080),
        (host.io(0x02, u64::MAX, 1), 0x080),
        (host.io(0x02, 0, 17), 0x002),
        (host.io(0x02, 99, 2), 0x281),
        (host.io(0x01, 100, 1), 0x280),
        (with_nsid(2, host.io(0x01, 0, 1)), 0x020),
        (with_nsid(2, host.io(0x08, 0, 1)), 0x020),
        (with_nsid(3, host.io(0x02, 0, 1)), 0x00b),
        (host.io(0x7f, 0, 1), 0x001),
        (host::Entry { flags: 0x40, ..host.io(0x02, 0, 1) }, 0x002),
    ] {
        assert_eq!(host.run(1, &entry), Err(status), "{entry:?}");
    }
    let errors = host.log_page(0x01, 64).unwrap();
    assert_eq!(errors[0..8], 10_u64.to_le_bytes(), "the newest error comes first");
    let health = host.log_page(0x02, 512).unwrap();
    assert_eq!(health[160..168], 2_u64.to_le_bytes(), "media errors");
    assert_eq!(host.log_page(0x99, 512), Err(0x109));
}

#[test]
fn deallocated_blocks_read_as_zeros() {
    let mut host = with_queue();
    host.memory.write_at(0, &[0xaa; 4096]);
    assert_eq!(host.run(1, &host.io(0x01, 0, 8)), Ok(0));
    let mut ranges = vec![0; 32];
    for (range, (first, count)) in ranges.chunks_exact_mut(16).zip([(1_u64, 2_u32), (6, 1)]) {
        range[4..8].copy_from_slice(&count.to_le_bytes());
        range[8..16].copy_from_slice(&first.to_le_bytes());
    }
    host.memory.write_at(0, &ranges);
    let entry = host::Entry { dwords: [1, 4, 0], ..host.io(0x09, 0, 1) };
    assert_eq!(host.run(1, &entry), Ok(0));
    let now = host.function.with_model(|nvme, _| nvme.namespace(1).unwrap().peek(0, 4096));
    let seen: Vec<u8> = now.chunks(512).map(|block| block[0]).collect();
    assert_eq!(seen, [0xaa, 0, 0, 0xaa, 0xaa, 0xaa, 0, 0xaa]);
}

#[test]
fn the_phase_changes_with_each_round_and_a_full_queue_holds_commands_back() {
    let mut host = host(Options::default());
    host.make_queue_pair(1, 4, None);
    for round in 0..5 {
        for _ in 0..3 {
            assert_eq!(host.run(1, &host.io(0x02, 0, 1)), Ok(0), "round {round}");
        }
    }
    host.hold_doorbells(1);
    let before = commands(&host);
    for _ in 0..3 {
        host.submit(1, &host.io(0x02, 0, 1));
    }
    assert_eq!(commands(&host) - before, 3);
    // Three are in the queue of four: it is full, and one more waits where it is.
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(commands(&host) - before, 3);
    assert_eq!(host.completion(1), Some((0, Ok(0))));
    host.let_doorbells_go(1);
    assert_eq!(commands(&host) - before, 4);
}

fn commands(host: &Host) -> u64 {
    host.function.with_model(|nvme, _| nvme.io_commands())
}

#[test]
fn a_message_goes_to_the_vector_of_the_queue_and_none_to_one_that_is_polled() {
    let mut host = host(Options::default());
    let events = host.enable_messages(3);
    host.make_queue_pair(1, 16, Some(2));
    host.make_queue_pair(2, 16, None);
    let admin = host::count(&events[0]);
    assert!(admin >= 4, "one per admin command");
    assert_eq!(host.run(1, &host.io(0x02, 0, 1)), Ok(0));
    assert_eq!(host.run(2, &host.io(0x02, 0, 1)), Ok(0));
    assert_eq!([1, 2].map(|vector| host::count(&events[vector])), [0, 1]);
}

#[test]
fn the_line_is_held_until_all_completions_are_taken() {
    let mut host = Host::started(Options { msi_x_vectors: 0, ..Options::default() }, vec![disk()]);
    let line = host.enable_kind(InterruptKind::IntX);
    host.make_queue_pair(1, 16, Some(0));
    assert!(host::count(&line) >= 1);
    host.function.unmask_intx();
    assert_eq!(host::count(&line), 0, "let go of: all was taken");
    host.hold_doorbells(1);
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host::count(&line), 1);
    host.function.unmask_intx();
    assert_eq!(host::count(&line), 1, "still asserted");
    host.write(0x0c, 1);
    host.function.unmask_intx();
    assert_eq!(host::count(&line), 0, "masked in the controller (INTMS)");
    host.write(0x10, 1);
    assert_eq!(host::count(&line), 1, "and let through (INTMC)");
    assert_eq!(host.completion(1), Some((0, Ok(0))));
    host.let_doorbells_go(1);
    host.function.unmask_intx();
    assert_eq!(host::count(&line), 0);
}

#[test]
fn a_command_that_is_held_can_be_aborted_and_no_other() {
    let mut host = with_queue();
    host.function.with_model(|nvme, _| nvme.hold_io());
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host.admin(0x08, 0, 0, 0, [1 | 77 << 16, 0]), Ok(1), "not that one");
    assert_eq!(host.completion(1), None);
    assert_eq!(host.admin(0x08, 0, 0, 0, [1, 0]), Ok(0));
    assert_eq!(host.completion(1), Some((0, Err(0x007))));
}

#[test]
fn an_event_tells_of_a_namespace_once_until_its_log_is_read() {
    let mut host = host(Options::default());
    assert_eq!(host.admin(0x09, 0, 0, 0, [0x0b, 1 << 8]), Ok(0));
    for id in 100..104 {
        host.submit(0, &host::Entry { id, opcode: 0x0c, ..Default::default() });
    }
    assert_eq!(host.completion(0), None);
    assert_eq!(host.admin(0x0c, 0, 0, 0, [0, 0]), Err(0x105), "more than AERL");
    host.function.with_model(|nvme, bus| {
        nvme.add_namespace(bus, 2, disk());
        nvme.remove_namespace(bus, 1);
    });
    assert_eq!(host.completion(0), Some((100, Ok(0x0004_0002))));
    assert_eq!(host.completion(0), None, "masked");
    assert_eq!(host.log_page(0x04, 12).unwrap(), [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    host.function.with_model(|nvme, bus| nvme.remove_namespace(bus, 2));
    assert_eq!(host.completion(0), Some((101, Ok(0x0004_0002))));
}

#[test]
fn shadow_doorbells_bring_commands_and_tell_when_to_ring() {
    let mut host = host(Options { shadow_doorbells: true, ..Options::default() });
    host.make_queue_pair(1, 16, None);
    let (shadow, indices) = (MEMORY + 10 * PAGE, MEMORY + 11 * PAGE);
    assert_eq!(host.admin(0x7c, 0, shadow, indices, [0, 0]), Ok(0));
    // Two commands in the shadow doorbell; one ring finds both.
    let rings = host.function.with_model(|nvme, _| nvme.doorbell_writes());
    host.hold_doorbells(1);
    host.submit_quietly(1, &host.io(0x02, 0, 1));
    host.submit_quietly(1, &host.io(0x02, 1, 1));
    host.memory.write_at(10 * PAGE as usize + 8, &2_u32.to_le_bytes());
    host.ring_tail(1, 1);
    assert!(host.completion(1).is_some() && host.completion(1).is_some());
    assert_eq!(host.bytes(11 * PAGE as usize + 8, 4), 2_u32.to_le_bytes(), "EventIdx");
    assert_eq!(host.function.with_model(|nvme, _| nvme.doorbell_writes()), rings + 1);
}

#[test]
fn a_doorbell_outside_of_its_queue_does_nothing() {
    let mut host = with_queue();
    host.ring_tail(1, 16);
    host.ring_tail(7, 1);
    assert_eq!(host.completion(1), None);
    assert_eq!(host.run(1, &host.io(0x02, 0, 1)), Ok(0), "it works on");
}

#[test]
fn what_is_broken_on_purpose_is_broken() {
    let mut host = with_queue();
    host.function.with_model(|nvme, _| nvme.faults().swallow_io = 1);
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host.completion(1), None);
    host.function.with_model(|nvme, _| nvme.faults().lies.push_back(Lie::CommandId(999)));
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host.completion(1), Some((999, Ok(0))));
    host.function.with_model(|nvme, _| nvme.break_down());
    assert_eq!(host.read(0x1c) & 2, 2, "CFS");
    host.submit(1, &host.io(0x02, 0, 1));
    assert_eq!(host.completion(1), None);
    host.function.with_model(|nvme, _| nvme.faults().gone = true);
    assert_eq!(host.read(0x1c), u32::MAX);
}

#[test]
fn a_file_keeps_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut host =
        Host::started(Options::default(), vec![Namespace::in_file(&path, 4096).unwrap()]);
    host.make_queue_pair(1, 16, None);
    host.memory.write_at(0, &[7; 4096]);
    assert_eq!(host.run(1, &host.io(0x01, 3, 1)), Ok(0));
    assert_eq!(host.run(1, &host.io(0x00, 0, 1)), Ok(0));
    let mut expected = vec![0; 1 << 20];
    expected[3 * 4096..4 * 4096].fill(7);
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_eq!(host.run(1, &host.io(0x08, 3, 1)), Ok(0));
    assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 20]);
    assert!(Namespace::in_file(&path, 1000).is_err());
    std::fs::write(&path, [0; 100]).unwrap();
    assert!(Namespace::in_file(&path, 512).is_err(), "no whole number of blocks");
}
