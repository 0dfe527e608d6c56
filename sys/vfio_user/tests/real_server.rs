//! The client against the server of the `vfio_user` crate, which our device models use.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use iohost_memory::SharedMemory;
use iohost_vfio_user::{Client, IrqKind, VfioUserError};
use nix::sys::eventfd::EventFd;
use vfio_bindings::bindings::vfio::{vfio_region_info, vfio_region_sparse_mmap_area};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

/// What the backend was asked, as seen from the test.
#[derive(Debug, PartialEq)]
enum Seen {
    Map { address: u64, size: u64, offset: u64, first_byte: u8 },
    Unmap { address: u64, size: u64 },
    SetIrqs { index: u32, flags: u32, start: u32, count: u32, descriptors: usize },
    Reset,
}

/// Sixteen registers that keep what is written; a write to the last one signals all triggers.
struct Registers {
    bar: [u8; 128],
    config: [u8; 256],
    triggers: Vec<File>,
    seen: Sender<Seen>,
}

impl ServerBackend for Registers {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let source = if region == 7 { &self.config[..] } else { &self.bar[..] };
        let from = source.get(offset as usize..).and_then(|rest| rest.get(..data.len()));
        data.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let target = if region == 7 { &mut self.config[..] } else { &mut self.bar[..] };
        let to = target.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..data.len()));
        to.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        if region == 0 && offset == 120 {
            for mut trigger in &self.triggers {
                trigger.write_all(&1u64.to_ne_bytes())?;
            }
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let memory = fd.ok_or(io::ErrorKind::InvalidInput)?;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, offset)?;
        let _ = self.seen.send(Seen::Map { address, size, offset, first_byte: byte[0] });
        if address == 0xbad000 { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let _ = self.seen.send(Seen::Unmap { address, size });
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.bar = [0; 128];
        let _ = self.seen.send(Seen::Reset);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        let descriptors = fds.len();
        let _ = self.seen.send(Seen::SetIrqs { index, flags, start, count, descriptors });
        self.triggers = fds;
        Ok(())
    }
}

/// Serves one client at `path`. `mapped` is offered for mapping as BAR 2.
fn serve(path: &Path, mapped: &SharedMemory) -> Receiver<Seen> {
    let irq = |index, flags, count| IrqInfo { index, flags, count };
    let region = |index: u32| {
        let size = [128, 0, 0x3000, 0, 0, 0, 0, 256][index as usize];
        let flags = if index == 2 { 7 } else { 3 };
        let area = vfio_region_sparse_mmap_area { offset: 0x1000, size: 0x2000 };
        ServerRegion {
            region_info: vfio_region_info { argsz: 32, flags, index, size, ..Default::default() },
            sparse_areas: if index == 2 { vec![SparseArea { area }] } else { Vec::new() },
            mmap_fd: (index == 2).then(|| mapped.as_raw_fd()),
        }
    };
    let irqs = vec![irq(0, 7, 1), irq(1, 1, 2), irq(2, 1, 0)];
    let server = Server::new(path, true, irqs, (0..8).map(region).collect()).unwrap();
    let (seen, sight) = channel();
    let mut backend = Registers { bar: [0; 128], config: [0; 256], triggers: Vec::new(), seen };
    std::thread::spawn(move || server.run(&mut backend));
    sight
}

struct Rig {
    client: Client,
    seen: Receiver<Seen>,
    mapped: SharedMemory,
    _folder: tempfile::TempDir,
}

fn rig() -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device");
    let mapped = SharedMemory::create(c"bar", 0x3000).unwrap();
    let seen = serve(&path, &mapped);
    Rig { client: Client::connect(&path).unwrap(), seen, mapped, _folder: folder }
}

#[test]
fn registers_keep_what_is_written_at_every_width() {
    let rig = rig();
    for len in [1, 2, 4, 8] {
        let written: Vec<u8> = (1..=len as u8).collect();
        rig.client.region_write(0, 16, &written).unwrap();
        let mut read = vec![0; len];
        rig.client.region_read(0, 16, &mut read).unwrap();
        assert_eq!(read, written);
    }
    rig.client.config_write(4, &[6, 0]).unwrap();
    let mut command = [0; 2];
    rig.client.config_read(4, &mut command).unwrap();
    assert_eq!(command, [6, 0]);
}

#[test]
fn dma_memory_reaches_the_server_with_its_descriptor() {
    let rig = rig();
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    memory.write_at(0, &[0x77]);
    rig.client.dma_map(0x40000, &memory).unwrap();
    let expected = Seen::Map { address: 0x40000, size: 0x2000, offset: 0, first_byte: 0x77 };
    assert_eq!(rig.seen.recv().unwrap(), expected);

    rig.client.dma_unmap(0x40000, 0x2000).unwrap();
    assert_eq!(rig.seen.recv().unwrap(), Seen::Unmap { address: 0x40000, size: 0x2000 });
}

#[test]
fn a_mapping_the_server_refuses_is_an_error_and_the_connection_goes_on() {
    let rig = rig();
    let memory = SharedMemory::create(c"dma", 0x2000).unwrap();
    let err = rig.client.dma_map(0xbad000, &memory).unwrap_err();
    assert!(matches!(err, VfioUserError::Refused { .. }), "{err}");
    rig.client.dma_map(0x40000, &memory).unwrap();
}

#[test]
fn interrupts_arrive_at_the_eventfds_and_stop_when_disabled() {
    let rig = rig();
    let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    rig.client.enable_irqs(IrqKind::Msi, &[events[0].as_fd()]).unwrap();
    let expected = Seen::SetIrqs { index: 1, flags: 0x24, start: 0, count: 1, descriptors: 1 };
    assert_eq!(rig.seen.recv().unwrap(), expected);
    rig.client.region_write(0, 120, &[1; 8]).unwrap();
    assert_eq!(events[0].read().unwrap(), 1);

    rig.client.disable_irqs(IrqKind::Msi).unwrap();
    let expected = Seen::SetIrqs { index: 1, flags: 0x21, start: 0, count: 0, descriptors: 0 };
    assert_eq!(rig.seen.recv().unwrap(), expected);

    rig.client.unmask_intx().unwrap();
    let expected = Seen::SetIrqs { index: 0, flags: 0x11, start: 0, count: 1, descriptors: 0 };
    assert_eq!(rig.seen.recv().unwrap(), expected);
}

#[test]
fn a_reset_reaches_the_device() {
    let rig = rig();
    rig.client.region_write(0, 0, &[9; 4]).unwrap();
    rig.client.reset().unwrap();
    assert_eq!(rig.seen.recv().unwrap(), Seen::Reset);
    let mut data = [9; 4];
    rig.client.region_read(0, 0, &mut data).unwrap();
    assert_eq!(data, [0; 4]);
}

#[test]
fn a_sparse_area_is_mapped_and_shows_the_servers_memory() {
    let rig = rig();
    assert_eq!(rig.client.region(2).unwrap().mappable(), std::slice::from_ref(&(0x1000..0x3000)));
    let bar = rig.client.map_region(2, 0x2000..0x3000).unwrap();
    bar.write::<u32>(4, 0x1234_5678).unwrap();
    let mut data = [0; 4];
    rig.mapped.read_at(0x2004, &mut data);
    assert_eq!(u32::from_ne_bytes(data), 0x1234_5678);
}
