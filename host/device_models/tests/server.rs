//! An `edu` at a socket, driven by our own client.

mod rig;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::{DeviceServer, Function, ServeError, Stopper};
use iohost_memory::SharedMemory;
use iohost_vfio_user::{Client, IrqKind, VfioUserError};
use rig::*;

/// A device being served in a thread of this process.
struct Served {
    function: Arc<Function<Edu>>,
    path: PathBuf,
    stopper: Stopper,
    thread: JoinHandle<Result<(), ServeError>>,
    _folder: tempfile::TempDir,
}

fn serve(timing: Timing) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edu");
    let server = DeviceServer::bind(&path).unwrap();
    let stopper = server.stopper();
    let function = Arc::new(Function::new(Edu::new(timing)));
    let served = function.clone();
    let thread = std::thread::spawn(move || server.run(&served));
    Served { function, path, stopper, thread, _folder: folder }
}

impl Served {
    fn connect(&self) -> Driver {
        let client = Client::connect(&self.path).unwrap();
        client.config_write(COMMAND, &BUS_MASTER.to_le_bytes()).unwrap();
        Driver { client }
    }
}

/// The client, with the register accesses of a driver.
struct Driver {
    client: Client,
}

impl Driver {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.client.region_read(0, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    fn dma(&self, source: u64, destination: u64, count: u64, command: u64) {
        let registers = [DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND];
        for (register, value) in registers.into_iter().zip([source, destination, count, command]) {
            self.client.region_write(0, register, &value.to_le_bytes()).unwrap();
        }
    }

    fn map(&self) -> SharedMemory {
        let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
        self.client.dma_map(IOVA, &memory).unwrap();
        memory
    }
}

fn bytes(memory: &SharedMemory, offset: usize, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    memory.read_at(offset, &mut data);
    data
}

#[test]
fn the_client_finds_qemus_device() {
    let served = serve(Timing::Immediate);
    let client = served.connect().client;
    let mut id = [0; 4];
    client.config_read(0, &mut id).unwrap();
    assert_eq!(id, [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(client.region(0).unwrap().size(), 0x10_0000);
    assert_eq!(client.region(7).unwrap().size(), 256);
    assert!((1..7).all(|index| client.region(index).is_none()));
    let counts = [IrqKind::IntX, IrqKind::Msi, IrqKind::MsiX].map(|kind| client.irq(kind).count);
    assert_eq!(counts, [1, 1, 0]);
    assert!(client.irq(IrqKind::IntX).masks_itself() && client.resettable());
}

#[test]
fn a_factorial_is_answered_by_a_message() {
    let served = serve(Timing::Real { dma: Duration::ZERO });
    let driver = served.connect();
    let event = event();
    driver.client.enable_irqs(IrqKind::Msi, &[event.as_fd()]).unwrap();
    driver.write(STATUS, 0x80);
    for (operand, result) in [(5, 120), (10, 3_628_800), (u32::MAX, 0)] {
        driver.write(FACTORIAL, operand);
        wait(&event);
        assert_eq!(driver.read(CAUSES), 0x001);
        driver.write(ACKNOWLEDGE, 0x001);
        assert_eq!(driver.read(FACTORIAL), result);
    }
}

#[test]
fn dma_goes_both_ways_and_interrupts() {
    let served = serve(Timing::Real { dma: Duration::from_millis(1) });
    let driver = served.connect();
    let memory = driver.map();
    let event = event();
    driver.client.enable_irqs(IrqKind::Msi, &[event.as_fd()]).unwrap();
    memory.write_at(0, b"over the socket");
    for (source, destination, command) in
        [(IOVA, BUFFER, TO_DEVICE), (BUFFER, IOVA + 0x1000, TO_MEMORY)]
    {
        driver.dma(source, destination, 15, command | INTERRUPT);
        wait(&event);
        assert_eq!(driver.read(CAUSES), 0x100);
        driver.write(ACKNOWLEDGE, 0x100);
    }
    assert_eq!(bytes(&memory, 0x1000, 15), b"over the socket");
}

/// Descriptors that a program started by this process would have, and that are not `known`.
fn inheritable(known: &BTreeSet<String>) -> BTreeSet<String> {
    let flags = |descriptor: &String| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim().to_owned();
        i64::from_str_radix(&flags, 8).ok()
    };
    let all = fs::read_dir("/proc/self/fd").unwrap();
    all.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|descriptor| flags(descriptor).is_some_and(|it| it & 0o2_000_000 == 0))
        .filter(|descriptor| !known.contains(descriptor))
        .collect()
}

#[test]
fn what_a_client_sends_is_not_inherited_by_programs() {
    // The same process again, without tests beside this one, whose servers receive as well.
    let this = "what_a_client_sends_is_not_inherited_by_programs";
    if std::env::var_os("ALONE").is_none() {
        let alone = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", this])
            .env("ALONE", "1")
            .status();
        assert!(alone.unwrap().success());
        return;
    }
    let known = inheritable(&BTreeSet::new());
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    let _memory = driver.map();
    let event = event();
    driver.client.enable_irqs(IrqKind::Msi, &[event.as_fd()]).unwrap();
    assert_eq!(inheritable(&known), BTreeSet::new());
}

#[test]
fn the_intx_line_stays_masked_and_fires_again_while_asserted() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    let event = event();
    driver.client.enable_irqs(IrqKind::IntX, &[event.as_fd()]).unwrap();
    driver.write(RAISE, 1);
    driver.write(RAISE, 2);
    assert_eq!(count(&event), 1);
    driver.client.unmask_intx().unwrap();
    assert_eq!(count(&event), 1, "still asserted");
    driver.write(ACKNOWLEDGE, 3);
    driver.client.unmask_intx().unwrap();
    assert_eq!(count(&event), 0);
    driver.write(RAISE, 1);
    assert_eq!(count(&event), 1);
}

#[test]
fn disabled_interrupts_stay_silent() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    for kind in [IrqKind::IntX, IrqKind::Msi] {
        let event = event();
        driver.client.enable_irqs(kind, &[event.as_fd()]).unwrap();
        driver.client.disable_irqs(kind).unwrap();
        driver.write(RAISE, 1);
        assert_eq!(count(&event), 0, "{kind}");
        driver.write(ACKNOWLEDGE, 1);
    }
}

#[test]
fn a_dma_to_an_unmapped_address_is_dropped_and_counted_and_completes() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    let memory = driver.map();
    memory.write_at(0, &[9; 0x2000]);
    driver.dma(BUFFER, IOVA + 0x2000, 64, TO_MEMORY);
    driver.dma(BUFFER, 0, 64, TO_MEMORY | INTERRUPT);
    assert_eq!((driver.read(DMA_COMMAND), driver.read(CAUSES)), (0b110, 0x100));
    assert_eq!(served.function.blocked_dma(), 2);

    driver.client.dma_unmap(IOVA, 0x2000).unwrap();
    driver.dma(BUFFER, IOVA, 64, TO_MEMORY);
    assert_eq!(served.function.blocked_dma(), 3);
    assert_eq!(bytes(&memory, 0, 0x2000), [9; 0x2000]);
}

#[test]
fn accesses_of_a_wrong_width_are_answered_as_by_qemu() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    let read = |offset, len| {
        let mut data = vec![0x55; len];
        driver.client.region_read(0, offset, &mut data).unwrap();
        data
    };
    assert_eq!(read(0, 1), [0]);
    assert_eq!(read(0, 2), [0; 2]);
    assert_eq!(read(0, 8), [0xff; 8]);
    assert_eq!(read(0x80, 4), [0; 4]);
    assert_eq!(read(0x80, 8), [0; 8]);
}

#[test]
fn an_access_the_client_would_not_send_is_refused_and_the_server_goes_on() {
    let served = serve(Timing::Immediate);
    let mut stream = UnixStream::connect(&served.path).unwrap();
    // Region read of 16 bytes at offset 0 of BAR 0, then of 4 bytes past its end.
    for (offset, count) in [(0u64, 16u32), (0x10_0000, 4), (2, 0xffff_ffff)] {
        let header = [&1u16.to_ne_bytes()[..], &9u16.to_ne_bytes(), &32u32.to_ne_bytes(), &[0; 8]];
        let access = [&offset.to_ne_bytes()[..], &0u32.to_ne_bytes(), &count.to_ne_bytes()];
        stream.write_all(&[header.concat(), access.concat()].concat()).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[8..12], 0x21u32.to_ne_bytes(), "an error reply");
    }
    drop(stream);
    assert_eq!(served.connect().read(ID), 0x0100_00ed);
}

#[test]
fn a_reset_disables_interrupts_and_keeps_mappings() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    let memory = driver.map();
    let old = event();
    driver.client.enable_irqs(IrqKind::Msi, &[old.as_fd()]).unwrap();
    driver.client.reset().unwrap();

    let mut command = [0xff; 2];
    driver.client.config_read(COMMAND, &mut command).unwrap();
    assert_eq!(command, [0, 0]);
    driver.client.config_write(COMMAND, &BUS_MASTER.to_le_bytes()).unwrap();
    driver.write(RAISE, 1);
    assert_eq!(count(&old), 0);
    let new = event();
    driver.client.enable_irqs(IrqKind::Msi, &[new.as_fd()]).unwrap();
    memory.write_at(0, b"kept");
    driver.dma(IOVA, BUFFER, 4, TO_DEVICE | INTERRUPT);
    assert_eq!((count(&new), served.function.blocked_dma()), (1, 0));
}

#[test]
fn a_client_that_vanishes_leaves_the_next_one_a_clean_device() {
    let served = serve(Timing::Manual);
    let first = served.connect();
    let memory = first.map();
    let old = event();
    first.client.enable_irqs(IrqKind::Msi, &[old.as_fd()]).unwrap();
    first.dma(BUFFER, IOVA, 64, TO_MEMORY | INTERRUPT);
    memory.write_at(0, &[7; 64]);
    drop(first);

    let second = Client::connect(&served.path).unwrap();
    let mut command = [0xff; 2];
    second.config_read(COMMAND, &mut command).unwrap();
    assert_eq!(command, [0, 0], "reset before the next client");
    second.config_write(COMMAND, &BUS_MASTER.to_le_bytes()).unwrap();
    served.function.with_model(|edu, bus| edu.finish(bus));
    assert_eq!(served.function.blocked_dma(), 1, "the mapping went with its client");
    assert_eq!(count(&old), 0, "and so did the trigger");
    assert_eq!(bytes(&memory, 0, 64), [7; 64]);
    second.dma_map(IOVA, &memory).unwrap();
}

#[test]
fn a_client_that_vanishes_at_any_byte_of_a_message_leaves_a_working_device() {
    let served = serve(Timing::Immediate);
    let json = b"{\"capabilities\":{}}\0";
    let header = [&1u16.to_ne_bytes()[..], &1u16.to_ne_bytes(), &40u32.to_ne_bytes(), &[0; 8]];
    let version = [&header.concat()[..], &[0, 0, 1, 0], json].concat();
    for end in 0..=version.len() {
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.write_all(&version[..end]).unwrap();
    }
    assert_eq!(served.connect().read(ID), 0x0100_00ed);
}

#[test]
fn clients_that_send_garbage_lose_their_connection_and_nobody_else_the_device() {
    let served = serve(Timing::Immediate);
    let message = |command: u16, size: u32, payload: &[u8]| {
        let header =
            [&1u16.to_ne_bytes()[..], &command.to_ne_bytes(), &size.to_ne_bytes(), &[0; 8]];
        [&header.concat()[..], payload].concat()
    };
    let cases = [
        ("a version without its final NUL", message(1, 22, &[0, 0, 1, 0, b'{', b'}'])),
        ("a version smaller than a version", message(1, 16, &[0, 0, 1, 0])),
        ("a version that is no JSON", message(1, 22, &[0, 0, 1, 0, b'{', 0])),
        ("an unknown command", message(99, 16, &[])),
        ("nothing but ones", vec![0xff; 64]),
        ("a mapping without a descriptor", message(2, 48, &[0; 32])),
    ];
    for (name, garbage) in cases {
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.write_all(&garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // Until the server is done with us; it may have closed with our bytes unread.
        let _ = stream.read_to_end(&mut Vec::new());
        assert_eq!(served.connect().read(ID), 0x0100_00ed, "after {name}");
    }
}

#[test]
fn a_second_client_waits_for_the_first_to_leave() {
    let served = serve(Timing::Immediate);
    let first = served.connect();
    let options = iohost_vfio_user::Options { deadline: Duration::from_millis(50) };
    let err = Client::connect_with(&served.path, &options).unwrap_err();
    assert!(matches!(err, VfioUserError::Timeout { .. }), "{err}");
    drop(first);
    assert_eq!(served.connect().read(ID), 0x0100_00ed);
}

#[test]
fn a_stop_ends_an_idle_server_and_removes_its_socket() {
    let served = serve(Timing::Immediate);
    served.stopper.stop();
    served.thread.join().unwrap().unwrap();
    assert!(!served.path.exists());
}

#[test]
fn a_stop_lets_the_present_client_finish() {
    let served = serve(Timing::Immediate);
    let driver = served.connect();
    served.stopper.stop();
    assert_eq!(driver.read(ID), 0x0100_00ed);
    drop(driver);
    served.thread.join().unwrap().unwrap();
}

#[test]
fn a_socket_somebody_listens_at_is_refused_and_a_stale_one_replaced() {
    let served = serve(Timing::Immediate);
    let err = DeviceServer::bind(&served.path).unwrap_err();
    assert!(matches!(err, ServeError::InUse { .. }), "{err}");
    assert_eq!(served.connect().read(ID), 0x0100_00ed, "the probe did no harm");

    let folder = tempfile::tempdir().unwrap();
    let stale = folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    DeviceServer::bind(&stale).unwrap();
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let err = DeviceServer::bind(&path).unwrap_err();
    assert!(matches!(err, ServeError::NotASocket { .. }), "{err}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_successors_socket_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edu");
    let first = DeviceServer::bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _second = DeviceServer::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
}
