//! What every backend must do, shown on an `edu` device.
//!
//! Each function is one test that any [`DeviceBackend`] with QEMU's `edu` behind it has to pass;
//! [`all`] runs them in order. A backend's own tests call them, and so does a guest with the real
//! device. They panic with what was wrong, as tests do, and leave the device quiet.
//!
//! Not every backend has everything. What one says that it has, has to work; what it says that it
//! lacks, it has to refuse in the right words; and [`row`] is what it says, which
//! `docs/backends.md` repeats for all of them.
//!
//! Source for the device: QEMU, `docs/specs/edu.rst`, and `hw/misc/edu.c` where that is silent.

use std::os::fd::{AsFd, BorrowedFd};

use iohost_memory::SharedMemory;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config_space::{BUS_MASTER, COMMAND, MEMORY_SPACE, change_command};
use crate::quiesce::{Outcome, Quiesced, SavedBars, quiesce};
use crate::{DeviceBackend, DeviceError, DeviceEvent, InterruptKind, IovaSpace};

/// One test. Panics when the backend does not pass it.
pub type Test = fn(&dyn DeviceBackend);

/// Every test with its name.
pub const TESTS: &[(&str, Test)] = &[
    ("configuration_space_names_the_device", configuration_space_names_the_device),
    ("a_bad_configuration_access_is_refused", a_bad_configuration_access_is_refused),
    ("bar_0_is_the_only_one_and_has_its_size", bar_0_is_the_only_one_and_has_its_size),
    ("registers_answer_in_their_width", registers_answer_in_their_width),
    ("a_bad_register_access_is_refused", a_bad_register_access_is_refused),
    ("a_mapping_shows_the_same_registers", a_mapping_shows_the_same_registers),
    ("vectors_are_counted_and_limited", vectors_are_counted_and_limited),
    ("msi_signals_until_it_is_disabled", msi_signals_until_it_is_disabled),
    ("intx_is_masked_until_it_is_unmasked", intx_is_masked_until_it_is_unmasked),
    ("one_kind_of_interrupt_replaces_another", one_kind_of_interrupt_replaces_another),
    ("dma_goes_both_ways", dma_goes_both_ways),
    ("a_bad_dma_mapping_is_refused", a_bad_dma_mapping_is_refused),
    ("a_part_of_memory_is_mapped_and_no_more", a_part_of_memory_is_mapped_and_no_more),
    ("what_is_not_mapped_is_not_reached", what_is_not_mapped_is_not_reached),
    ("a_reset_leaves_the_device_quiet", a_reset_leaves_the_device_quiet),
    (
        "a_device_in_the_middle_of_its_work_is_made_safe",
        a_device_in_the_middle_of_its_work_is_made_safe,
    ),
    ("the_documentation_says_what_there_is", the_documentation_says_what_there_is),
];

/// The page that says what each backend has.
const DOCUMENTATION: &str = include_str!("../../../docs/backends.md");

/// The first column of the table, then what [`offers`] finds.
const BACKEND: &str = "backend";

/// The backends that the documentation has to have, in its order.
pub const BACKENDS: [&str; 6] =
    ["vfio-cdev", "vfio-group", "vfio-no-iommu", "uio", "vfio-user", "fake"];

/// What a backend has of all that one can have, with the name of each.
pub fn offers(device: &dyn DeviceBackend) -> [(&'static str, bool); 7] {
    let bars_can_be_mapped = device.bar(0).is_some_and(|bar| !bar.mappable.is_empty());
    [
        ("BARs can be mapped", bars_can_be_mapped),
        ("INTx", device.interrupt_count(InterruptKind::IntX) > 0),
        ("MSI and MSI-X", has_msi(device)),
        ("DMA", has_dma(device)),
        ("reaches mapped memory only", device.is_isolated()),
        ("reset", !matches!(device.reset(), Err(DeviceError::NoReset { .. }))),
        ("tells of removal", tells_of_removal(device)),
    ]
}

/// The backend's row in the table of the documentation.
pub fn row(device: &dyn DeviceBackend) -> String {
    let answer = |(_, has)| if has { "yes" } else { "no" }.to_owned();
    cells(std::iter::once(format!("`{}`", device.kind())).chain(offers(device).map(answer)))
}

/// Panics unless the documentation has one row for each of [`BACKENDS`] under the right heading.
/// `device` is any backend.
pub fn the_documentation_is_complete(device: &dyn DeviceBackend) {
    let names = offers(device).map(|(name, _)| name.to_owned());
    let heading = cells(std::iter::once(BACKEND.to_owned()).chain(names));
    let mut table = DOCUMENTATION.lines().skip_while(|line| !line.starts_with('|'));
    assert_eq!(table.next(), Some(heading.as_str()));
    table.next(); // the rule below the heading
    let rows = table.take_while(|line| line.starts_with('|'));
    let backends: Vec<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    assert_eq!(backends, BACKENDS);
}

fn cells(cells: impl Iterator<Item = String>) -> String {
    cells.fold("|".to_owned(), |row, cell| format!("{row} {cell} |"))
}

fn has_msi(device: &dyn DeviceBackend) -> bool {
    device.interrupt_count(InterruptKind::Msi) > 0
}

/// Whether somebody who wants the device back is heard of before it is gone.
fn tells_of_removal(device: &dyn DeviceBackend) -> bool {
    device.watch(DeviceEvent::RemovalRequested, Trigger::new().fd()).unwrap()
}

fn has_dma(device: &dyn DeviceBackend) -> bool {
    !device.iova_ranges().is_empty()
}

/// Runs every test. Panics at the first that fails.
pub fn all(device: &dyn DeviceBackend) {
    for (_, test) in TESTS {
        test(device);
    }
}

// Registers of BAR 0.
const ID: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const IRQ_STATUS: u64 = 0x24;
const IRQ_RAISE: u64 = 0x60;
const IRQ_ACK: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

const BAR_SIZE: u64 = 0x10_0000;
const ONBOARD: u64 = 0x4_0000;
const ADDRESS_BITS: u8 = 28;
const DMA_START: u64 = 0x01;
const DMA_FROM_DEVICE: u64 = 0x02;
const DMA_INTERRUPT: u64 = 0x04;

/// A transfer that every version of QEMU makes: 7.2 stops the machine at one of 4096 bytes.
const TRANSFER: usize = 1024;
const PAGE: usize = 4096;

/// How long an interrupt may take before it counts as lost. A transfer takes 100 ms.
const DEADLINE_MS: u16 = 20_000;

/// Vendor 1234, device 11e8.
pub fn configuration_space_names_the_device(device: &dyn DeviceBackend) {
    let mut whole = [0; 4];
    device.config_read(0, &mut whole).unwrap();
    let mut half = [0; 2];
    device.config_read(2, &mut half).unwrap();
    assert_eq!(whole, [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(half, [0xe8, 0x11]);
}

/// Three bytes, off the natural alignment, eight bytes, past the end.
pub fn a_bad_configuration_access_is_refused(device: &dyn DeviceBackend) {
    for (offset, len) in [(0, 3), (2, 4), (0, 8), (0, 0), (0x1000, 4), (0xfffc, 4)] {
        let err = device.config_read(offset, &mut [0; 8][..len]).unwrap_err();
        assert!(matches!(err, DeviceError::Range { .. }), "{len} bytes at {offset:#x}: {err}");
        let err = device.config_write(offset, &[0; 8][..len]).unwrap_err();
        assert!(matches!(err, DeviceError::Range { .. }), "{len} bytes at {offset:#x}: {err}");
    }
}

/// 1 MiB of memory, 32 bit, not prefetchable; no other BAR, no ROM.
pub fn bar_0_is_the_only_one_and_has_its_size(device: &dyn DeviceBackend) {
    let bar = device.bar(0).expect("edu has a BAR 0");
    assert_eq!((bar.size, bar.kind), (BAR_SIZE, 0x00));
    for index in (1..=6).chain([7, 255]) {
        assert_eq!(device.bar(index), None, "BAR {index}");
    }
}

/// The liveness register answers the inverse; the DMA registers are 64 bits wide.
pub fn registers_answer_in_their_width(device: &dyn DeviceBackend) {
    wake(device);
    assert_eq!(read32(device, ID), 0x0100_00ed);
    write32(device, LIVENESS, 0x1234_5678);
    assert_eq!(read32(device, LIVENESS), !0x1234_5678);
    // Two halves instead of one access would lose the upper one.
    write64(device, DMA_SOURCE, 0x0123_4567_89ab_cdef);
    assert_eq!(read64(device, DMA_SOURCE), 0x0123_4567_89ab_cdef);
}

/// A BAR that is not there, an offset past the end, off the natural alignment, a strange width.
pub fn a_bad_register_access_is_refused(device: &dyn DeviceBackend) {
    for index in [1, 7, 255] {
        let err = device.bar_read(index, 0, &mut [0; 4]).unwrap_err();
        assert!(matches!(err, DeviceError::NoSuchBar { .. }), "BAR {index}: {err}");
    }
    for (offset, len) in [(BAR_SIZE, 4), (BAR_SIZE - 4, 8), (2, 4), (0, 3), (u64::MAX - 3, 4)] {
        let err = device.bar_read(0, offset, &mut [0; 8][..len]).unwrap_err();
        assert!(matches!(err, DeviceError::Range { .. }), "{len} bytes at {offset:#x}: {err}");
        let err = device.bar_write(0, offset, &[0; 8][..len]).unwrap_err();
        assert!(matches!(err, DeviceError::Range { .. }), "{len} bytes at {offset:#x}: {err}");
    }
}

/// Whatever can be mapped shows what calls show, and nothing else can be mapped.
pub fn a_mapping_shows_the_same_registers(device: &dyn DeviceBackend) {
    wake(device);
    let mappable = device.bar(0).expect("edu has a BAR 0").mappable.clone();
    for range in &mappable {
        let region = device.map_bar(0, range.clone()).unwrap();
        assert_eq!(region.len() as u64, range.end - range.start);
        if range.start == 0 {
            write32(device, LIVENESS, 0xa5a5_0000);
            assert_eq!(region.read::<u32>(ID as usize), Some(0x0100_00ed));
            assert_eq!(region.read::<u32>(LIVENESS as usize), Some(!0xa5a5_0000));
        }
    }
    for bad in [0..BAR_SIZE + PAGE as u64, BAR_SIZE..BAR_SIZE + 4096, 1..PAGE as u64, 0..0] {
        let err = device.map_bar(0, bad.clone()).unwrap_err();
        assert!(matches!(err, DeviceError::NotMappable { .. }), "{bad:x?}: {err}");
    }
    let err = device.map_bar(1, 0..4096).unwrap_err();
    assert!(matches!(err, DeviceError::NoSuchBar { index: 1 }), "{err}");
}

/// One INTx, one MSI or none, no MSI-X; nothing beyond that can be enabled.
pub fn vectors_are_counted_and_limited(device: &dyn DeviceBackend) {
    let count = |kind| device.interrupt_count(kind);
    assert_eq!(count(InterruptKind::IntX), 1);
    assert!(count(InterruptKind::Msi) <= 1, "{} MSI", count(InterruptKind::Msi));
    assert_eq!(count(InterruptKind::MsiX), 0);

    let trigger = Trigger::new();
    let two = [trigger.fd(), trigger.fd()];
    let has = count(InterruptKind::Msi);
    let too_many = device.enable_interrupts(InterruptKind::Msi, &two).unwrap_err();
    assert_eq!(too_many.to_string(), format!("2 MSI vectors of a device that has {has}"));
    let too_many = device.enable_interrupts(InterruptKind::IntX, &two).unwrap_err();
    assert_eq!(too_many.to_string(), "2 INTx vectors of a device that has 1");
    let none = device.enable_interrupts(InterruptKind::MsiX, &two[..1]).unwrap_err();
    assert_eq!(none.to_string(), "1 MSI-X vectors of a device that has 0");
    let empty = device.enable_interrupts(InterruptKind::Msi, &[]).unwrap_err();
    assert!(matches!(empty, DeviceError::NoSuchInterrupt { asked: 0, .. }), "{empty}");
}

/// Each interrupt signals once; a disabled one does not.
pub fn msi_signals_until_it_is_disabled(device: &dyn DeviceBackend) {
    if !has_msi(device) {
        let refused = device.enable_interrupts(InterruptKind::Msi, &[Trigger::new().fd()]);
        let refused = refused.unwrap_err();
        assert!(matches!(refused, DeviceError::NoSuchInterrupt { .. }), "{refused}");
        return device.disable_interrupts(InterruptKind::Msi).unwrap();
    }
    wake(device);
    let trigger = Trigger::new();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.fd()]).unwrap();
    for cause in [0x8, 0x10] {
        write32(device, IRQ_RAISE, cause);
        trigger.wait("MSI");
        assert_eq!(read32(device, IRQ_STATUS), cause);
        acknowledge(device);
    }

    device.disable_interrupts(InterruptKind::Msi).unwrap();
    write32(device, IRQ_RAISE, 0x20);
    assert!(!trigger.is_signalled_after_a_round_trip(device), "signalled though disabled");
    acknowledge(device);
    device.disable_interrupts(InterruptKind::Msi).unwrap();
}

/// The line is silent from its interrupt until it is unmasked, and then speaks if it still has
/// something to say.
pub fn intx_is_masked_until_it_is_unmasked(device: &dyn DeviceBackend) {
    wake(device);
    let trigger = Trigger::new();
    device.enable_interrupts(InterruptKind::IntX, &[trigger.fd()]).unwrap();

    write32(device, IRQ_RAISE, 0x1);
    trigger.wait("INTx");
    write32(device, IRQ_RAISE, 0x2);
    assert!(!trigger.is_signalled_after_a_round_trip(device), "signalled though masked");

    device.unmask_intx().unwrap();
    trigger.wait("INTx that is still asserted");

    acknowledge(device);
    device.unmask_intx().unwrap();
    assert!(!trigger.is_signalled_after_a_round_trip(device), "signalled with nothing to say");

    write32(device, IRQ_RAISE, 0x4);
    trigger.wait("INTx after it was acknowledged and unmasked");
    acknowledge(device);
    device.disable_interrupts(InterruptKind::IntX).unwrap();
}

/// Enabling MSI while INTx is enabled, and back, leaves the last one.
pub fn one_kind_of_interrupt_replaces_another(device: &dyn DeviceBackend) {
    wake(device);
    let (line, message) = (Trigger::new(), Trigger::new());
    device.enable_interrupts(InterruptKind::IntX, &[line.fd()]).unwrap();
    if !has_msi(device) {
        // What is refused replaces nothing.
        device.enable_interrupts(InterruptKind::Msi, &[message.fd()]).unwrap_err();
        device.disable_interrupts(InterruptKind::Msi).unwrap();
        write32(device, IRQ_RAISE, 0x1);
        line.wait("INTx after MSI was refused");
        acknowledge(device);
        return device.disable_interrupts(InterruptKind::IntX).unwrap();
    }
    device.enable_interrupts(InterruptKind::Msi, &[message.fd()]).unwrap();
    // Not the kind that is enabled: nothing happens.
    device.disable_interrupts(InterruptKind::IntX).unwrap();
    write32(device, IRQ_RAISE, 0x1);
    message.wait("MSI after INTx");
    assert!(!line.is_signalled_after_a_round_trip(device), "INTx signalled though replaced");
    acknowledge(device);

    device.enable_interrupts(InterruptKind::IntX, &[line.fd()]).unwrap();
    write32(device, IRQ_RAISE, 0x1);
    line.wait("INTx after MSI");
    acknowledge(device);
    device.disable_interrupts(InterruptKind::IntX).unwrap();
}

/// Bytes go from one page to the device and from there to another page.
pub fn dma_goes_both_ways(device: &dyn DeviceBackend) {
    let memory = SharedMemory::create(c"conformance", 2 * PAGE).unwrap();
    if !has_dma(device) {
        return refuses_dma(device, &memory);
    }
    wake(device);
    let sent: Vec<u8> = (0..TRANSFER).map(|index| (index * 7) as u8).collect();
    memory.write_at(0, &sent);
    let iova = IovaSpace::new(device.iova_ranges())
        .allocate(memory.len() as u64, ADDRESS_BITS, 1)
        .expect("a device without mappings has room");
    device.dma_map(iova, &memory).unwrap();
    let trigger = Trigger::new();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.fd()]).unwrap();

    transfer(device, &trigger, iova, ONBOARD, 0);
    transfer(device, &trigger, ONBOARD, iova + PAGE as u64, DMA_FROM_DEVICE);

    let mut received = vec![0; TRANSFER];
    memory.read_at(PAGE, &mut received);
    assert_eq!(received, sent);
    device.disable_interrupts(InterruptKind::Msi).unwrap();
    device.dma_unmap(iova, memory.len() as u64).unwrap();
}

/// Twice at one address, a part, something that is not mapped.
pub fn a_bad_dma_mapping_is_refused(device: &dyn DeviceBackend) {
    let memory = SharedMemory::create(c"conformance", 2 * PAGE).unwrap();
    if !has_dma(device) {
        return refuses_dma(device, &memory);
    }
    let len = memory.len() as u64;
    let iova = IovaSpace::new(device.iova_ranges()).allocate(len, ADDRESS_BITS, 1).unwrap();
    device.dma_map(iova, &memory).unwrap();

    let twice = device.dma_map(iova, &memory).unwrap_err();
    assert!(matches!(twice, DeviceError::Refused { .. }), "{twice}");
    let partly = device.dma_unmap(iova, PAGE as u64).unwrap_err();
    assert!(matches!(partly, DeviceError::NotMapped { .. }), "{partly}");
    device.dma_unmap(iova, len).unwrap();
    let again = device.dma_unmap(iova, len).unwrap_err();
    assert!(matches!(again, DeviceError::NotMapped { .. }), "{again}");
    // The first refusal left nothing behind.
    device.dma_map(iova, &memory).unwrap();
    device.dma_unmap(iova, len).unwrap();
}

/// The device finds the part where it was put, and does not reach the pages on either side.
pub fn a_part_of_memory_is_mapped_and_no_more(device: &dyn DeviceBackend) {
    let memory = SharedMemory::create(c"conformance", 4 * PAGE).unwrap();
    if !has_dma(device) {
        return refuses_dma(device, &memory);
    }
    wake(device);
    memory.write_at(0, &[0x5a; 4 * PAGE]);
    let (page, part) = (PAGE as u64, PAGE as u64..3 * PAGE as u64);
    let whole = IovaSpace::new(device.iova_ranges()).allocate(4 * page, ADDRESS_BITS, 1).unwrap();
    let iova = whole + page;
    device.dma_map_part(iova, &memory, part.clone()).unwrap();
    let trigger = Trigger::new();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.fd()]).unwrap();

    // The device's own memory, which is in an unknown state, is not like what is there already.
    memory.write_at(PAGE, &[0xa5; TRANSFER]);
    transfer(device, &trigger, iova, ONBOARD, 0);
    for target in [whole, iova + page, iova + 2 * page] {
        transfer(device, &trigger, ONBOARD, target, DMA_FROM_DEVICE);
    }

    let start = |page: usize| {
        let mut bytes = [0; TRANSFER];
        memory.read_at(page * PAGE, &mut bytes);
        bytes
    };
    assert_eq!(start(2), [0xa5; TRANSFER], "inside of the part");
    assert_eq!(start(0), [0x5a; TRANSFER], "the page before the part");
    assert_eq!(start(3), [0x5a; TRANSFER], "the page behind the part");
    device.disable_interrupts(InterruptKind::Msi).unwrap();
    device.dma_unmap(iova, part.end - part.start).unwrap();
}

/// Memory that was taken back stays as it is, whatever the device is told. A backend that cannot
/// map any may not claim that: nothing but the device's own good behaviour would stand behind it.
pub fn what_is_not_mapped_is_not_reached(device: &dyn DeviceBackend) {
    let memory = SharedMemory::create(c"conformance", PAGE).unwrap();
    if !has_dma(device) {
        assert!(!device.is_isolated(), "isolation that nobody can show");
        return refuses_dma(device, &memory);
    }
    assert!(device.is_isolated());
    wake(device);
    memory.write_at(0, &[0x5a; TRANSFER]);
    let len = memory.len() as u64;
    let iova = IovaSpace::new(device.iova_ranges()).allocate(len, ADDRESS_BITS, 1).unwrap();
    device.dma_map(iova, &memory).unwrap();
    device.dma_unmap(iova, len).unwrap();
    let trigger = Trigger::new();
    device.enable_interrupts(InterruptKind::Msi, &[trigger.fd()]).unwrap();

    transfer(device, &trigger, ONBOARD, iova, DMA_FROM_DEVICE);

    let mut after = vec![0; TRANSFER];
    memory.read_at(0, &mut after);
    assert_eq!(after, [0x5a; TRANSFER], "the device wrote where nothing is mapped");
    device.disable_interrupts(InterruptKind::Msi).unwrap();
}

/// Interrupts and bus mastering are off, memory stays mapped, the device answers again.
pub fn a_reset_leaves_the_device_quiet(device: &dyn DeviceBackend) {
    wake(device);
    let memory = SharedMemory::create(c"conformance", PAGE).unwrap();
    let len = memory.len() as u64;
    let iova = has_dma(device).then(|| {
        let iova = IovaSpace::new(device.iova_ranges()).allocate(len, ADDRESS_BITS, 1).unwrap();
        device.dma_map(iova, &memory).unwrap();
        iova
    });
    let kind = if has_msi(device) { InterruptKind::Msi } else { InterruptKind::IntX };
    let trigger = Trigger::new();
    device.enable_interrupts(kind, &[trigger.fd()]).unwrap();

    device.reset().unwrap();

    let mut command = [0; 2];
    device.config_read(COMMAND, &mut command).unwrap();
    assert_eq!(u16::from_le_bytes(command) & BUS_MASTER, 0, "bus mastering is on");
    wake(device);
    assert_eq!(read32(device, ID), 0x0100_00ed);
    write32(device, IRQ_RAISE, 0x1);
    assert!(!trigger.is_signalled_after_a_round_trip(device), "signalled after the reset");
    acknowledge(device);

    device.enable_interrupts(kind, &[trigger.fd()]).unwrap();
    write32(device, IRQ_RAISE, 0x2);
    trigger.wait("an interrupt enabled anew after the reset");
    acknowledge(device);
    device.disable_interrupts(kind).unwrap();
    if let Some(iova) = iova {
        device.dma_unmap(iova, len).unwrap();
    }
}

/// Whatever its last driver did, and without its help: no interrupt and no transfer any more, its
/// base addresses as they were, and it answers.
pub fn a_device_in_the_middle_of_its_work_is_made_safe(device: &dyn DeviceBackend) {
    let saved = SavedBars::of(device).unwrap();
    wake(device);
    let kind = if has_msi(device) { InterruptKind::Msi } else { InterruptKind::IntX };
    let trigger = Trigger::new();
    device.enable_interrupts(kind, &[trigger.fd()]).unwrap();
    write32(device, IRQ_RAISE, 0x1);
    trigger.wait("an interrupt");

    let Quiesced { outcome, how, .. } = quiesce(device, &saved);

    assert_eq!(outcome, Outcome::Reset, "{how}");
    assert_eq!(SavedBars::of(device).unwrap(), saved);
    let mut command = [0; 2];
    device.config_read(COMMAND, &mut command).unwrap();
    let command = u16::from_le_bytes(command);
    assert_eq!(command & (BUS_MASTER | MEMORY_SPACE), 0, "its command register is {command:#x}");
    wake(device);
    write32(device, IRQ_RAISE, 0x1);
    assert!(!trigger.is_signalled_after_a_round_trip(device), "signalled though disarmed");
    acknowledge(device);
}

/// The table in the documentation has the row that this backend has earned.
pub fn the_documentation_says_what_there_is(device: &dyn DeviceBackend) {
    let row = row(device);
    assert!(
        DOCUMENTATION.lines().any(|line| line == row),
        "docs/backends.md has another row for this backend than\n{row}"
    );
}

/// What a backend without DMA says to whoever tries.
fn refuses_dma(device: &dyn DeviceBackend, memory: &SharedMemory) {
    let refused = device.dma_map(0x1000, memory).unwrap_err();
    assert!(matches!(refused, DeviceError::NoDma { .. }), "{refused}");
    assert!(refused.to_string().contains(device.kind()), "{refused}");
    let refused = device.dma_unmap(0x1000, memory.len() as u64).unwrap_err();
    assert!(matches!(refused, DeviceError::NotMapped { .. }), "{refused}");
}

/// One transfer of `TRANSFER` bytes, awaited by its interrupt.
fn transfer(device: &dyn DeviceBackend, done: &Trigger, from: u64, to: u64, direction: u64) {
    write64(device, DMA_SOURCE, from);
    write64(device, DMA_TARGET, to);
    write64(device, DMA_COUNT, TRANSFER as u64);
    write64(device, DMA_COMMAND, DMA_START | direction | DMA_INTERRUPT);
    done.wait("the end of a transfer");
    assert_eq!(read32(device, IRQ_STATUS), 0x100);
    acknowledge(device);
}

/// Lets the device answer and start transfers, and takes back what it may have to say.
fn wake(device: &dyn DeviceBackend) {
    change_command(device, MEMORY_SPACE | BUS_MASTER, 0).unwrap();
    acknowledge(device);
}

fn acknowledge(device: &dyn DeviceBackend) {
    let cause = read32(device, IRQ_STATUS);
    write32(device, IRQ_ACK, cause);
    assert_eq!(read32(device, IRQ_STATUS), 0);
}

fn read32(device: &dyn DeviceBackend, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.bar_read(0, offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn write32(device: &dyn DeviceBackend, offset: u64, value: u32) {
    device.bar_write(0, offset, &value.to_le_bytes()).unwrap();
}

fn read64(device: &dyn DeviceBackend, offset: u64) -> u64 {
    let mut data = [0; 8];
    device.bar_read(0, offset, &mut data).unwrap();
    u64::from_le_bytes(data)
}

fn write64(device: &dyn DeviceBackend, offset: u64, value: u64) {
    device.bar_write(0, offset, &value.to_le_bytes()).unwrap();
}

/// An eventfd that a device signals.
struct Trigger(EventFd);

impl Trigger {
    fn new() -> Self {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Self(EventFd::from_flags(flags).expect("an eventfd can be made"))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for a signal and takes it. Panics when none comes.
    fn wait(&self, what: &str) {
        assert!(self.poll(DEADLINE_MS.into()), "waited {DEADLINE_MS} ms for {what}");
        let count = self.0.read().expect("a readable eventfd can be read");
        assert_eq!(count, 1, "one signal for {what}");
    }

    /// Whether there is a signal once the device has answered a read, which no interrupt that it
    /// sent before can be behind.
    fn is_signalled_after_a_round_trip(&self, device: &dyn DeviceBackend) -> bool {
        read32(device, ID);
        self.poll(PollTimeout::ZERO)
    }

    fn poll(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).expect("an eventfd can be polled") == 1
    }
}
