//! The client against servers that lie, stall and die.

mod peer;

use std::io::Read;
use std::os::fd::AsFd;

use iohost_memory::SharedMemory;
use iohost_vfio_user::{Client, Command, IrqKind, VfioUserError};
use peer::*;

/// Connects to a server that is honest but for its answer number `at`.
fn connect_to_a_liar(
    at: usize,
    lie: impl Fn(&mut Reply) + Send + 'static,
) -> Result<Client, VfioUserError> {
    let server = Server::start(move |mut peer| {
        peer.behave(at);
        if let Some(request) = peer.next() {
            let mut reply = honest(&request);
            lie(&mut reply);
            peer.send(&reply);
        }
        peer.behave(EXCHANGES);
    });
    let result = server.connect();
    result.inspect(|_| drop(server))
}

#[test]
fn an_honest_server_is_described_as_it_is() {
    let server = Server::start_connected(|mut peer| peer.behave(usize::MAX));
    let client = server.connect().unwrap();

    assert_eq!(client.region(0).unwrap().size(), BAR_SIZE);
    assert_eq!(client.region(7).unwrap().size(), 256);
    assert!(client.region(1).is_none() && client.region(8).is_none());
    assert!(client.region(0).unwrap().mappable().is_empty());
    let counts = [IrqKind::IntX, IrqKind::Msi, IrqKind::MsiX].map(|kind| client.irq(kind).count);
    assert_eq!(counts, [1, 4, 0]);
    assert!(client.irq(IrqKind::IntX).masks_itself() && !client.irq(IrqKind::Msi).masks_itself());
    assert!(client.resettable());
}

#[test]
fn a_refusal_at_any_step_carries_its_error_number() {
    for at in 0..EXCHANGES {
        let err = connect_to_a_liar(at, |reply| {
            (reply.flags, reply.errno) = (REPLY | ERROR, EINVAL);
            reply.payload.clear();
        })
        .unwrap_err();
        let VfioUserError::Refused { source, .. } = &err else { panic!("step {at}: {err}") };
        assert_eq!(source.raw_os_error(), Some(EINVAL as i32), "step {at}");
    }
}

#[test]
fn a_wrong_message_number_at_any_step_is_not_taken_for_the_answer() {
    for at in 0..EXCHANGES {
        let err = connect_to_a_liar(at, |reply| reply.id ^= 0x8000).unwrap_err();
        assert!(matches!(err, VfioUserError::NotTheReply { .. }), "step {at}: {err}");
    }
}

#[test]
fn a_wrong_command_at_any_step_is_not_taken_for_the_answer() {
    for at in 0..EXCHANGES {
        let err = connect_to_a_liar(at, |reply| reply.command ^= 0x40).unwrap_err();
        assert!(matches!(err, VfioUserError::NotTheReply { .. }), "step {at}: {err}");
    }
}

#[test]
fn a_message_of_unknown_type_at_any_step_is_refused() {
    for at in 0..EXCHANGES {
        let err = connect_to_a_liar(at, |reply| reply.flags = 2).unwrap_err();
        assert!(matches!(err, VfioUserError::NotTheReply { flags: 2, .. }), "step {at}: {err}");
    }
}

#[test]
fn a_size_that_cannot_be_is_refused_at_any_step_before_anything_is_allocated_for_it() {
    for at in 0..EXCHANGES {
        for size in [0, 15, 16, 17, 1 << 20, 0x7fff_ffff, u32::MAX] {
            let err = connect_to_a_liar(at, move |reply| reply.size = Some(size)).unwrap_err();
            let VfioUserError::WrongSize { actual, .. } = err else {
                panic!("step {at}, {size} bytes: {err}");
            };
            assert_eq!(actual, size, "step {at}");
        }
    }
}

#[test]
fn a_server_that_dies_at_any_step_is_noticed() {
    for at in 0..EXCHANGES {
        let server = Server::start(move |mut peer| peer.behave(at));
        let err = server.connect().unwrap_err();
        assert!(matches!(err, VfioUserError::Closed { .. }), "step {at}: {err}");
        server.join();
    }
}

#[test]
fn a_server_that_dies_in_the_middle_of_an_answer_is_noticed_at_any_step() {
    for at in 0..EXCHANGES {
        for cut in [1, 15, 17] {
            let server = Server::start(move |mut peer| {
                peer.behave(at);
                let bytes = honest(&peer.next().unwrap()).bytes();
                std::io::Write::write_all(&mut peer.stream, &bytes[..cut]).unwrap();
            });
            let err = server.connect().unwrap_err();
            assert!(matches!(err, VfioUserError::Closed { .. }), "step {at}, {cut} bytes: {err}");
            server.join();
        }
    }
}

#[test]
fn a_server_that_stalls_at_any_step_costs_one_deadline() {
    for at in 0..EXCHANGES {
        let server = Server::start(move |mut peer| {
            peer.behave(at);
            peer.next();
            // The client gives up and closes; until then nothing is sent.
            assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
        });
        let err = server.connect_impatiently().unwrap_err();
        assert!(matches!(err, VfioUserError::Timeout { .. }), "step {at}: {err}");
        server.join();
    }
}

#[test]
fn half_an_answer_and_then_nothing_costs_one_deadline() {
    let server = Server::start(|mut peer| {
        peer.behave(DEVICE_INFO);
        let bytes = honest(&peer.next().unwrap()).bytes();
        std::io::Write::write_all(&mut peer.stream, &bytes[..20]).unwrap();
        assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
    });
    let err = server.connect_impatiently().unwrap_err();
    assert!(matches!(err, VfioUserError::Timeout { command: Command::DeviceInfo, .. }), "{err}");
    server.join();
}

#[test]
fn a_server_that_trickles_or_keeps_asking_cannot_stretch_the_deadline() {
    let server = Server::start(|mut peer| {
        peer.behave(DEVICE_INFO);
        peer.next();
        let nonsense =
            Reply { id: 1, command: 99, size: None, flags: 0x10, errno: 0, payload: Vec::new() };
        // Each request wants no reply, so this only ends when the client closes.
        while std::io::Write::write_all(&mut peer.stream, &nonsense.bytes()).is_ok() {
            std::thread::yield_now();
        }
    });
    let err = server.connect_impatiently().unwrap_err();
    assert!(matches!(err, VfioUserError::Timeout { .. }), "{err}");
    server.join();
}

#[test]
fn an_answer_in_single_bytes_is_an_answer() {
    let server = Server::start(|mut peer| {
        for _ in 0..EXCHANGES {
            for byte in honest(&peer.next().unwrap()).bytes() {
                std::io::Write::write_all(&mut peer.stream, &[byte]).unwrap();
            }
        }
    });
    server.connect().unwrap();
    server.join();
}

#[test]
fn another_major_version_is_refused_and_any_minor_one_accepted() {
    let err = connect_to_a_liar(VERSION, |reply| reply.payload[0] = 1).unwrap_err();
    assert_eq!(err.to_string(), "the server speaks vfio-user 1.1, this client 0.1");
    for minor in [0, 1, 2] {
        connect_to_a_liar(VERSION, move |reply| reply.payload[2] = minor).unwrap();
    }
}

#[test]
fn version_data_may_be_absent_but_not_malformed() {
    connect_to_a_liar(VERSION, |reply| reply.payload.truncate(4)).unwrap();
    for text in ["{", "[]x", "{\"capabilities\":{\"max_msg_fds\":-1}}", "\u{0}\u{0}"] {
        let err = connect_to_a_liar(VERSION, move |reply| {
            reply.payload.truncate(4);
            reply.payload.extend(text.bytes());
        })
        .unwrap_err();
        assert!(matches!(err, VfioUserError::Capabilities { .. }), "{text:?}: {err}");
    }
}

#[test]
fn a_server_that_takes_no_descriptor_or_no_data_is_of_no_use() {
    for limit in ["max_msg_fds", "max_data_xfer_size"] {
        let err = connect_to_a_liar(VERSION, move |reply| {
            reply.payload.truncate(4);
            reply.payload.extend(format!("{{\"capabilities\":{{\"{limit}\":0}}}}").bytes());
        })
        .unwrap_err();
        let VfioUserError::Limit { name, value: 0, .. } = err else { panic!("{err}") };
        assert_eq!(name, limit);
    }
}

#[test]
fn a_device_that_is_not_pci_is_refused() {
    let err = connect_to_a_liar(DEVICE_INFO, |reply| reply.payload[4] = 1).unwrap_err();
    assert!(matches!(err, VfioUserError::NotPci { flags: 1 }), "{err}");
}

#[test]
fn fewer_regions_and_interrupts_than_usual_are_absent_and_many_are_not_asked_for() {
    for (regions, irqs) in [(1, 0), (u32::MAX, u32::MAX)] {
        let client = connect_to_a_liar(DEVICE_INFO, move |reply| {
            reply.payload = words(&[16, 3, regions, irqs]);
        })
        .unwrap();
        assert_eq!(client.region(7).is_some(), regions > 7);
        assert_eq!(client.irq(IrqKind::IntX).count, u32::from(irqs > 0));
    }
}

#[test]
fn the_description_of_another_region_or_interrupt_is_refused() {
    for at in [FIRST_REGION_INFO, FIRST_IRQ_INFO] {
        let err = connect_to_a_liar(at, |reply| reply.payload[8] = 3).unwrap_err();
        let VfioUserError::WrongContent { field: "index", actual: 3, expected: 0, .. } = err else {
            panic!("step {at}: {err}");
        };
    }
}

/// A description of BAR 0 with a capability list.
fn with_capabilities(cap_offset: u32, list: Vec<u8>) -> impl Fn(&mut Reply) + Send + 'static {
    move |reply| {
        let size = 32 + list.len() as u32;
        reply.payload =
            [words(&[size, 0xf, 0, cap_offset]), longs(&[BAR_SIZE, 0]), list.clone()].concat();
    }
}

fn sparse(next: u32, count: u32, areas: &[u64]) -> Vec<u8> {
    [words(&[1 | 1 << 16, next, count, 0]), longs(areas)].concat()
}

#[test]
fn malformed_capability_lists_are_refused() {
    let cases = [
        ("starts inside the region info", 24, sparse(0, 1, &[0, 0x1000])),
        ("starts past the end", 4000, sparse(0, 1, &[0, 0x1000])),
        ("starts at the very end of numbers", u32::MAX, sparse(0, 1, &[0, 0x1000])),
        ("has a header cut short", 32, vec![1, 0, 1, 0]),
        ("has no count", 32, words(&[1 | 1 << 16, 0])),
        ("counts more than it holds", 32, sparse(0, 2, &[0, 0x1000])),
        ("counts as much as it can", 32, sparse(0, u32::MAX, &[0, 0x1000])),
        ("names itself as the next", 32, words(&[9, 32, 0, 0])),
        ("has an area past the region", 32, sparse(0, 1, &[0x3000, 0x2000])),
        ("has an area past all numbers", 32, sparse(0, 1, &[u64::MAX - 0xfff, 0x2000])),
    ];
    for (name, offset, list) in cases {
        let err = connect_to_a_liar(FIRST_REGION_INFO, with_capabilities(offset, list));
        let err = err.expect_err(name);
        assert!(matches!(err, VfioUserError::RegionCapability { region: 0, .. }), "{name}: {err}");
    }
}

#[test]
fn capabilities_longer_than_we_take_are_refused_with_their_length() {
    let err = connect_to_a_liar(FIRST_REGION_INFO, |reply| {
        reply.payload[..4].copy_from_slice(&5000u32.to_ne_bytes());
    })
    .unwrap_err();
    assert!(matches!(err, VfioUserError::WrongContent { actual: 5000, .. }), "{err}");
}

#[test]
fn areas_without_a_descriptor_are_not_offered() {
    let list = sparse(0, 1, &[0, 0x1000]);
    let client = connect_to_a_liar(FIRST_REGION_INFO, with_capabilities(32, list)).unwrap();
    assert!(client.region(0).unwrap().mappable().is_empty());
    let err = client.map_region(0, 0..0x1000).unwrap_err();
    assert!(matches!(err, VfioUserError::NotMappable { .. }), "{err}");
}

/// A server whose BAR 0 is described with a descriptor beside it.
fn server_with_file(file: SharedMemory, count: usize, list: Vec<u8>) -> Server {
    Server::start(move |mut peer| {
        peer.behave(FIRST_REGION_INFO);
        let mut reply = honest(&peer.next().unwrap());
        with_capabilities(32, list)(&mut reply);
        peer.send_with(&reply, &vec![file.as_fd(); count]);
        peer.behave(usize::MAX);
    })
}

#[test]
fn an_area_is_mapped_from_the_servers_file() {
    let file = SharedMemory::create(c"bar", BAR_SIZE as usize).unwrap();
    file.write_at(0x1010, b"seen");
    let server = server_with_file(file, 1, sparse(0, 1, &[0x1000, 0x2000]));
    let client = server.connect().unwrap();

    assert_eq!(client.region(0).unwrap().mappable(), std::slice::from_ref(&(0x1000..0x3000)));
    let mapped = client.map_region(0, 0x1000..0x2000).unwrap();
    assert_eq!(mapped.read::<u32>(0x10), Some(u32::from_ne_bytes(*b"seen")));
    let inside_out = (0x2000, 0x1000);
    for (start, end) in
        [(0, 0x1000), (0x2000, 0x4000), (0x1800, 0x2000), inside_out, (0x1000, 0x1000)]
    {
        let err = client.map_region(0, start..end).unwrap_err();
        assert!(matches!(err, VfioUserError::NotMappable { .. }), "{start:#x}..{end:#x}: {err}");
    }
}

#[test]
fn an_area_past_the_end_of_the_servers_file_is_not_mapped() {
    let file = SharedMemory::create(c"bar", 0x1000).unwrap();
    let server = server_with_file(file, 1, sparse(0, 1, &[0, 0x2000]));
    let client = server.connect().unwrap();
    let err = client.map_region(0, 0..0x2000).unwrap_err();
    assert_eq!(err.to_string(), "region 0 ends at 0x2000 of a file of 0x1000 bytes");
}

#[test]
fn areas_that_are_not_whole_pages_are_not_offered() {
    let file = SharedMemory::create(c"bar", BAR_SIZE as usize).unwrap();
    let areas = sparse(0, 3, &[0x10, 0x1000, 0, 0x800, 0x2000, 0x1000]);
    let client = server_with_file(file, 1, areas).connect().unwrap();
    assert_eq!(client.region(0).unwrap().mappable(), std::slice::from_ref(&(0x2000..0x3000)));
}

#[test]
fn more_descriptors_than_belong_to_an_answer_are_refused_and_closed() {
    let file = SharedMemory::create(c"bar", BAR_SIZE as usize).unwrap();
    // A pipe tells when the last descriptor of its writing end is closed.
    let (mut reader, writer) = std::io::pipe().unwrap();
    let server = Server::start(move |mut peer| {
        peer.behave(FIRST_REGION_INFO);
        let reply = honest(&peer.next().unwrap());
        peer.send_with(&reply, &[file.as_fd(), writer.as_fd()]);
    });
    let err = server.connect().unwrap_err();
    assert!(matches!(err, VfioUserError::WrongDescriptors { actual: 2, most: 1, .. }), "{err}");
    server.join();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "a descriptor was leaked");
}

#[test]
fn a_descriptor_beside_an_answer_that_has_none_is_refused() {
    let file = SharedMemory::create(c"bar", 0x1000).unwrap();
    let server = Server::start_connected(move |mut peer| {
        let reply = honest(&peer.next().unwrap());
        peer.send_with(&reply, &[file.as_fd()]);
    });
    let err = server.connect().unwrap().region_read(0, 0, &mut [0; 4]).unwrap_err();
    assert!(matches!(err, VfioUserError::WrongDescriptors { actual: 1, most: 0, .. }), "{err}");
}

#[test]
fn every_byte_value_of_an_answer_has_an_end() {
    // Each byte of each answer of the connect, replaced by a few values: never a panic or a hang.
    for at in 0..EXCHANGES {
        for byte in 0..64 {
            for value in [0x00, 0x01, 0x7f, 0xff] {
                let server = Server::start(move |mut peer| {
                    peer.behave(at);
                    let mut bytes = honest(&peer.next().unwrap()).bytes();
                    if let Some(byte) = bytes.get_mut(byte) {
                        *byte = value;
                    }
                    let _ = std::io::Write::write_all(&mut peer.stream, &bytes);
                    // What is wanted of a longer message never comes: the stream ends here.
                    let _ = peer.stream.shutdown(std::net::Shutdown::Write);
                });
                let result = server.connect();
                // The server speaks no further, so only the last answer can complete a connect.
                assert!(result.is_err() || at == EXCHANGES - 1, "step {at}, byte {byte}: {value}");
                server.join();
            }
        }
    }
}

type Call<'a> = &'a dyn Fn(&Client) -> Result<(), VfioUserError>;

/// What each call of a connected client makes of one answer.
fn each_call(
    script: impl Fn(&mut Peer) + Clone + Send + 'static,
    connect: impl Fn(&Server) -> Result<Client, VfioUserError>,
    check: impl Fn(&str, VfioUserError, &Client),
) {
    let memory = SharedMemory::create(c"dma", 0x1000).unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let calls: [(&str, Call<'_>); 9] = [
        ("config read", &|client| client.config_read(0, &mut [0; 4])),
        ("config write", &|client| client.config_write(4, &[0; 2])),
        ("bar read", &|client| client.region_read(0, 8, &mut [0; 8])),
        ("bar write", &|client| client.region_write(0, 8, &[0; 8])),
        ("dma map", &|client| client.dma_map(0x1000, &memory)),
        ("enable", &|client| client.enable_irqs(IrqKind::Msi, &[event.as_fd()])),
        ("disable", &|client| client.disable_irqs(IrqKind::Msi)),
        ("unmask", &|client| client.unmask_intx()),
        ("reset", &|client| client.reset()),
    ];
    for (name, call) in calls {
        let script = script.clone();
        let server = Server::start_connected(move |mut peer| script(&mut peer));
        let client = connect(&server).unwrap();
        check(name, call(&client).expect_err(name), &client);
    }
}

#[test]
fn a_refused_call_leaves_the_connection_usable() {
    each_call(
        |peer| {
            let mut reply = honest(&peer.next().unwrap());
            (reply.flags, reply.errno) = (REPLY | ERROR, EINVAL);
            reply.payload.clear();
            peer.send(&reply);
            // A refused `enable` is followed by a `disable`.
            peer.behave(3);
        },
        Server::connect,
        |name, err, client| {
            let VfioUserError::Refused { source, .. } = &err else { panic!("{name}: {err}") };
            assert_eq!(source.raw_os_error(), Some(EINVAL as i32), "{name}");
            assert!(!err.ends_connection());
            let mut data = [0; 4];
            client.region_read(0, 0, &mut data).unwrap();
            assert_eq!(data, [0xab; 4], "{name}");
        },
    );
}

#[test]
fn a_refusal_without_an_error_number_is_still_a_refusal() {
    for errno in [0, 0xffff_ffff] {
        let server = Server::start_connected(move |mut peer| {
            let mut reply = honest(&peer.next().unwrap());
            (reply.flags, reply.errno) = (REPLY | ERROR, errno);
            reply.payload.clear();
            peer.send(&reply);
        });
        let err = server.connect().unwrap().reset().unwrap_err();
        assert!(matches!(err, VfioUserError::Refused { command: Command::DeviceReset, .. }));
    }
}

#[test]
fn after_a_broken_exchange_every_call_says_gone_and_why() {
    each_call(
        |peer| {
            let mut reply = honest(&peer.next().unwrap());
            reply.id ^= 1;
            peer.send(&reply);
            // The client has closed its end, not only stopped using it.
            assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
        },
        Server::connect,
        |name, err, client| {
            assert!(matches!(err, VfioUserError::NotTheReply { .. }), "{name}: {err}");
            let VfioUserError::Gone { reason } = client.config_read(0, &mut [0; 4]).unwrap_err()
            else {
                panic!("{name}");
            };
            assert_eq!(reason, err.to_string(), "{name}");
        },
    );
}

#[test]
fn a_stalled_call_ends_at_the_deadline_and_takes_the_connection_with_it() {
    each_call(
        |peer| {
            peer.next().unwrap();
            assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
        },
        Server::connect_impatiently,
        |name, err, client| {
            assert!(matches!(err, VfioUserError::Timeout { .. }), "{name}: {err}");
            let err = client.reset().unwrap_err();
            assert!(matches!(err, VfioUserError::Gone { .. }), "{name}: {err}");
        },
    );
}

#[test]
fn a_server_that_dies_during_a_call_is_noticed() {
    each_call(
        |peer| {
            peer.next().unwrap();
        },
        Server::connect,
        |name, err, _| assert!(matches!(err, VfioUserError::Closed { .. }), "{name}: {err}"),
    );
}

#[test]
fn an_answer_about_another_access_is_refused() {
    for (byte, field) in [(0, "offset"), (8, "region"), (12, "count")] {
        let server = Server::start_connected(move |mut peer| {
            let mut reply = honest(&peer.next().unwrap());
            reply.payload[byte] ^= 1;
            peer.send(&reply);
        });
        let err = server.connect().unwrap().region_read(0, 0x10, &mut [0; 4]).unwrap_err();
        let VfioUserError::WrongContent { field: actual, .. } = err else { panic!("{err}") };
        assert_eq!(actual, field);
    }
}

#[test]
fn a_second_answer_is_not_taken_for_the_next_one() {
    let server = Server::start_connected(|mut peer| {
        let reply = honest(&peer.next().unwrap());
        peer.send(&reply);
        peer.send(&reply);
        peer.next();
    });
    let client = server.connect().unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    let err = client.region_read(0, 0, &mut [0; 4]).unwrap_err();
    assert!(matches!(err, VfioUserError::NotTheReply { .. }), "{err}");
}

#[test]
fn accesses_that_do_not_fit_are_refused_without_a_message() {
    let server = Server::start_connected(|mut peer| {
        assert!(peer.next().is_none(), "nothing was to be sent");
    });
    let client = server.connect().unwrap();
    for (offset, len) in [(BAR_SIZE, 4), (BAR_SIZE - 4, 8), (2, 4), (0, 3), (0, 16), (u64::MAX, 1)]
    {
        let err = client.region_read(0, offset, &mut vec![0; len]).unwrap_err();
        assert!(matches!(err, VfioUserError::Range { index: 0, .. }), "{offset:#x}, {len}: {err}");
        let err = client.region_write(0, offset, &vec![0; len]).unwrap_err();
        assert!(matches!(err, VfioUserError::Range { index: 0, .. }), "{offset:#x}, {len}: {err}");
    }
    let err = client.region_read(0, 0, &mut []).unwrap_err();
    assert!(matches!(err, VfioUserError::Range { len: 0, .. }), "{err}");
    let err = client.config_read(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(err, VfioUserError::Range { index: 7, len: 8, .. }), "{err}");
    let err = client.region_read(1, 0, &mut [0; 4]).unwrap_err();
    assert!(matches!(err, VfioUserError::NoSuchRegion { index: 1 }), "{err}");
    drop(client);
    server.join();
}

#[test]
fn vectors_that_are_not_there_are_refused_without_a_message() {
    let server = Server::start_connected(|mut peer| {
        assert!(peer.next().is_none(), "nothing was to be sent");
    });
    let client = server.connect().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    for (kind, asked) in [(IrqKind::Msi, 0), (IrqKind::Msi, 5), (IrqKind::MsiX, 1)] {
        let err = client.enable_irqs(kind, &vec![event.as_fd(); asked as usize]).unwrap_err();
        let VfioUserError::NoSuchInterrupt { asked: actual, .. } = err else { panic!("{err}") };
        assert_eq!(actual, asked);
    }
    client.disable_irqs(IrqKind::MsiX).unwrap();
    drop(client);
    server.join();
}

#[test]
fn a_server_that_takes_one_descriptor_at_a_time_gets_its_vectors_one_by_one() {
    let server = Server::start_connected(|mut peer| {
        for vector in 0..3 {
            let request = peer.next().unwrap();
            assert_eq!(request.payload, words(&[20, 0x24, 1, vector, 1]));
            peer.send(&honest(&request));
        }
        // A smaller set replaces the larger one whole.
        for expected in [[20, 0x21, 1, 0, 0], [20, 0x24, 1, 0, 1]] {
            let request = peer.next().unwrap();
            assert_eq!(request.payload, words(&expected));
            peer.send(&honest(&request));
        }
    });
    let client = server.connect().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    client.enable_irqs(IrqKind::Msi, &[event.as_fd(); 3]).unwrap();
    client.enable_irqs(IrqKind::Msi, &[event.as_fd()]).unwrap();
    drop(client);
    server.join();
}

#[test]
fn a_vector_refused_half_way_leaves_the_kind_disabled() {
    let server = Server::start_connected(|mut peer| {
        peer.behave(1);
        let mut reply = honest(&peer.next().unwrap());
        (reply.flags, reply.errno) = (REPLY | ERROR, EINVAL);
        peer.send(&reply);
        let request = peer.next().unwrap();
        assert_eq!(request.payload, words(&[20, 0x21, 1, 0, 0]));
        peer.send(&honest(&request));
    });
    let client = server.connect().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let err = client.enable_irqs(IrqKind::Msi, &[event.as_fd(); 2]).unwrap_err();
    assert!(matches!(err, VfioUserError::Refused { command: Command::SetIrqs, .. }), "{err}");
    drop(client);
    server.join();
}

const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;

/// A client with `memory` mapped at 0x10000, whose next call the script interrupts.
fn with_mapped(
    memory: &SharedMemory,
    script: impl FnOnce(&mut Peer) + Send + 'static,
) -> (Server, Client) {
    let server = Server::start_connected(move |mut peer| {
        peer.behave(1);
        let request = peer.next().unwrap();
        script(&mut peer);
        peer.send(&honest(&request));
        peer.behave(usize::MAX);
    });
    let client = server.connect().unwrap();
    client.dma_map(0x10000, memory).unwrap();
    (server, client)
}

#[test]
fn the_server_reads_mapped_memory_by_message_while_a_call_waits() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    memory.write_at(0x1ffc, b"tail");
    let (_server, client) = with_mapped(&memory, |peer| {
        let (flags, _, payload) = peer.ask(DMA_READ, longs(&[0x11ffc, 4]));
        assert_eq!(flags, REPLY);
        assert_eq!(payload, [longs(&[0x11ffc, 4]), b"tail".to_vec()].concat());
    });
    client.region_read(0, 0, &mut [0; 4]).unwrap();
}

#[test]
fn the_server_writes_mapped_memory_by_message_while_a_call_waits() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let (_server, client) = with_mapped(&memory, |peer| {
        let payload = [longs(&[0x10008, 5]), b"hello".to_vec()].concat();
        let (flags, _, payload) = peer.ask(DMA_WRITE, payload);
        assert_eq!((flags, payload), (REPLY, longs(&[0x10008, 5])));
    });
    client.region_write(0, 0, &[0; 4]).unwrap();
    let mut data = [0; 5];
    memory.read_at(8, &mut data);
    assert_eq!(&data, b"hello");
}

#[test]
fn a_megabyte_by_message_arrives_whole() {
    let memory = SharedMemory::create(c"dma", 1 << 20).unwrap();
    let (_server, client) = with_mapped(&memory, |peer| {
        let data: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
        let payload = [longs(&[0x10000, 1 << 20]), data.clone()].concat();
        let (flags, ..) = peer.ask(DMA_WRITE, payload);
        assert_eq!(flags, REPLY);
        let (_, _, payload) = peer.ask(DMA_READ, longs(&[0x10000, 1 << 20]));
        assert!(payload[16..] == data);
    });
    client.region_read(0, 0, &mut [0; 4]).unwrap();
}

#[test]
fn a_write_that_wants_no_reply_gets_none() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let (_server, client) = with_mapped(&memory, |peer| {
        let payload = [longs(&[0x10000, 2]), b"ok".to_vec()].concat();
        let no_reply =
            Reply { id: 5, command: DMA_WRITE, size: None, flags: 0x10, errno: 0, payload };
        peer.send(&no_reply);
        // The next message from the client answers this one: nothing came in between.
        let (_, _, payload) = peer.ask(DMA_READ, longs(&[0x10000, 2]));
        assert_eq!(&payload[16..], b"ok");
    });
    client.region_read(0, 0, &mut [0; 4]).unwrap();
}

#[test]
fn requests_outside_a_mapping_are_refused_and_touch_nothing() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    memory.write_at(0, &[0x5a; 0x2000]);
    let (_server, client) = with_mapped(&memory, |peer| {
        for (iova, count) in
            [(0, 4), (0xfffc, 8), (0x11ffd, 4), (0x12000, 1), (u64::MAX, 1), (u64::MAX, u64::MAX)]
        {
            let (flags, errno, payload) = peer.ask(DMA_READ, longs(&[iova, count]));
            assert_eq!(flags, REPLY | ERROR, "read of {count} at {iova:#x}");
            assert!(errno != 0 && payload.is_empty());
        }
        for (iova, len) in [(0xfffc, 8), (0x11ffd, 4), (0x12000, 1)] {
            let payload = [longs(&[iova, len as u64]), vec![0; len]].concat();
            let (flags, ..) = peer.ask(DMA_WRITE, payload);
            assert_eq!(flags, REPLY | ERROR, "write of {len} at {iova:#x}");
        }
    });
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    let mut data = vec![0; 0x2000];
    memory.read_at(0, &mut data);
    assert!(data.iter().all(|byte| *byte == 0x5a));
}

#[test]
fn malformed_and_unknown_requests_of_the_server_are_refused_and_the_call_goes_on() {
    let memory = SharedMemory::create(c"dma", 2 << 20).unwrap();
    let (_server, client) = with_mapped(&memory, |peer| {
        let cases = [
            ("read without a count", DMA_READ, longs(&[0x10000])),
            ("read with data", DMA_READ, longs(&[0x10000, 8, 0])),
            ("read of more than we allow", DMA_READ, longs(&[0x10000, (1 << 20) + 1])),
            ("read of more than there can be", DMA_READ, longs(&[0x10000, u64::MAX])),
            ("write of less than announced", DMA_WRITE, longs(&[0x10000, 16, 0])),
            ("write of more than announced", DMA_WRITE, longs(&[0x10000, 4, 0])),
            ("nothing at all", DMA_WRITE, Vec::new()),
            ("a command for servers", 9, longs(&[0, 0])),
            ("an unknown command", 999, Vec::new()),
        ];
        for (name, command, payload) in cases {
            let (flags, errno, _) = peer.ask(command, payload);
            assert_eq!(flags, REPLY | ERROR, "{name}");
            assert_ne!(errno, 0, "{name}");
        }
    });
    let mut data = [0; 4];
    client.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0xab; 4]);
}

#[test]
fn an_oversized_request_of_the_server_ends_the_connection() {
    let server = Server::start_connected(|mut peer| {
        peer.next().unwrap();
        let size = Some((1 << 20) + 33);
        let request =
            Reply { id: 0, command: DMA_WRITE, size, flags: 0, errno: 0, payload: Vec::new() };
        peer.send(&request);
        assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
    });
    let err = server.connect().unwrap().reset().unwrap_err();
    assert!(matches!(err, VfioUserError::WrongSize { .. }), "{err}");
    server.join();
}

#[test]
fn memory_is_out_of_reach_once_it_is_unmapped() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let server = Server::start_connected(|mut peer| {
        peer.behave(2);
        let request = peer.next().unwrap();
        let (flags, ..) = peer.ask(DMA_READ, longs(&[0x10000, 4]));
        assert_eq!(flags, REPLY | ERROR);
        peer.send(&honest(&request));
    });
    let client = server.connect().unwrap();
    client.dma_map(0x10000, &memory).unwrap();
    client.dma_unmap(0x10000, 0x2000).unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    server.join();
}

#[test]
fn memory_whose_mapping_was_refused_is_out_of_reach() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let server = Server::start_connected(|mut peer| {
        let mut reply = honest(&peer.next().unwrap());
        reply.flags = REPLY | ERROR;
        peer.send(&reply);
        let request = peer.next().unwrap();
        let (flags, ..) = peer.ask(DMA_READ, longs(&[0x10000, 4]));
        assert_eq!(flags, REPLY | ERROR);
        peer.send(&honest(&request));
    });
    let client = server.connect().unwrap();
    client.dma_map(0x10000, &memory).unwrap_err();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    server.join();
}

#[test]
fn overlapping_and_unknown_mappings_are_refused_without_a_message() {
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let server = Server::start_connected(|mut peer| {
        peer.behave(2);
        assert!(peer.next().is_none(), "nothing more was to be sent");
    });
    let client = server.connect().unwrap();
    client.dma_map(0x10000, &memory).unwrap();
    client.dma_map(0x12000, &memory).unwrap();
    for iova in [0xf000, 0x10000, 0x11000, 0x13000, u64::MAX - 0xfff] {
        let err = client.dma_map(iova, &memory).unwrap_err();
        assert!(matches!(err, VfioUserError::Overlap { len: 0x2000, .. }), "{iova:#x}: {err}");
    }
    for (iova, len) in [(0x10000, 0x1000), (0x11000, 0x1000), (0x20000, 0x2000)] {
        let err = client.dma_unmap(iova, len).unwrap_err();
        assert!(matches!(err, VfioUserError::NotMapped { .. }), "{iova:#x}: {err}");
    }
    drop(client);
    server.join();
}

#[test]
fn nobody_listening_is_said_with_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody");
    let err = Client::connect(&path).unwrap_err();
    assert_eq!(err.to_string(), format!("connecting to {}", path.display()));
}

#[test]
fn a_server_that_never_accepts_costs_one_deadline_even_when_its_backlog_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("busy");
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();

    let options = iohost_vfio_user::Options { deadline: std::time::Duration::from_millis(20) };
    let queued = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let err = Client::connect_with(&path, &options).unwrap_err();
    assert!(matches!(err, VfioUserError::Connect { .. }), "{err}");
    drop(queued);
}

#[test]
fn calls_from_several_threads_do_not_mix() {
    let server = Server::start_connected(|mut peer| {
        while let Some(request) = peer.next() {
            let mut reply = honest(&request);
            // The data says which offset it belongs to.
            let offset = request.payload[..8].to_vec();
            reply.payload.truncate(16);
            reply.payload.extend(offset);
            peer.send(&reply);
        }
    });
    let client = server.connect().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let client = &client;
            scope.spawn(move || {
                for turn in 0..200 {
                    let offset = (thread * 200 + turn) * 8;
                    let mut data = [0; 8];
                    client.region_read(0, offset, &mut data).unwrap();
                    assert_eq!(u64::from_ne_bytes(data), offset);
                }
            });
        }
    });
}
