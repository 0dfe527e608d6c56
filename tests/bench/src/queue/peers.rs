//! What data queues are compared with, between processes.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use iohost_event::Packets;
use iohost_memory::SharedMemory;
use iohost_memory::ring::{Bell, Doorway, Wait};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv, send};
use shmem_ipc::sharedring::{Receiver, Sender};

use super::{Line, QUEUE_BYTE_COUNT, check, message};

/// Two eventfds and no message: what a round trip with two sleeps costs at least. They block, so
/// that a sleep is one `read(2)`; nobody would see that the other end is gone.
pub struct Eventfds {
    to: Bell,
    from: Bell,
}

impl Line<64> for Eventfds {
    fn make(socket: Packets) -> Result<Self> {
        let blocking = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from);
        let (to, from) = (Bell::from(blocking()?), Bell::from(blocking()?));
        socket.send(b"eventfds", &[to.as_fd(), from.as_fd()])?;
        Ok(Self { to, from })
    }

    fn join(socket: Packets) -> Result<Self> {
        let mut fds = socket.receive(&mut [0; 16], 2)?.fds.into_iter();
        let (from, to) = (fds.next().context("a bell")?, fds.next().context("another")?);
        Ok(Self { to: to.into(), from: from.into() })
    }

    fn send(&mut self, _: u64) -> Result<()> {
        Ok(self.to.ring()?)
    }

    fn receive(&mut self, _: u64) -> Result<()> {
        let mut count = [0; 8];
        nix::unistd::read(&self.from, &mut count)?;
        Ok(())
    }
}

/// Two eventfds that do not block, each watched by an epoll set: what it costs at least to sleep such
/// that something else, as the other end's death, can end the sleep too. An epoll set may report a
/// ring twice, so the messages' numbers stand in shared memory.
pub struct WatchedEventfds {
    to: Bell,
    from: Doorway,
    numbers: SharedMemory,
    /// Offsets of what this end wrote last, and the other one.
    written: usize,
    read: usize,
}

impl WatchedEventfds {
    const BYTES: usize = 4096;
    const PLACES: [usize; 2] = [0, 128];

    fn new(to: Bell, from: Bell, numbers: SharedMemory, places: [usize; 2]) -> Result<Self> {
        let [written, read] = places;
        Ok(Self { to, from: Doorway::new(from, None)?, numbers, written, read })
    }
}

impl Line<64> for WatchedEventfds {
    fn make(socket: Packets) -> Result<Self> {
        let (to, from) = (Bell::new()?, Bell::new()?);
        let numbers = SharedMemory::create(c"numbers", Self::BYTES)?;
        socket.send(b"eventfds", &[to.as_fd(), from.as_fd(), numbers.as_fd()])?;
        Self::new(to, from, numbers, Self::PLACES)
    }

    fn join(socket: Packets) -> Result<Self> {
        let fds = socket.receive(&mut [0; 16], 3)?.fds;
        let Ok([from, to, numbers]) = <[OwnedFd; 3]>::try_from(fds) else {
            bail!("two bells and a memory have three descriptors");
        };
        let numbers = SharedMemory::attach(numbers, Self::BYTES)?;
        let [theirs, ours] = Self::PLACES;
        Self::new(to.into(), from.into(), numbers, [ours, theirs])
    }

    fn send(&mut self, number: u64) -> Result<()> {
        self.numbers.write_at(self.written, &(number + 1).to_ne_bytes());
        Ok(self.to.ring()?)
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut last = [0; 8];
        while u64::from_ne_bytes(last) != number + 1 {
            self.from.wait(None)?;
            self.numbers.read_at(self.read, &mut last);
        }
        Ok(())
    }
}

/// A ring of shmem-ipc in each direction.
pub struct SharedRings<const SIZE: usize> {
    sender: Sender<[u8; SIZE]>,
    receiver: Receiver<[u8; SIZE]>,
}

/// As many bytes as our ring has.
const fn items<const SIZE: usize>() -> usize {
    QUEUE_BYTE_COUNT as usize / SIZE
}

macro_rules! shared_rings {
    ($($size:literal)+) => {$(
        impl Line<$size> for SharedRings<$size> {
            fn make(socket: Packets) -> Result<Self> {
                let (sender, receiver) = (Sender::new(items::<$size>())?, Receiver::new(items::<$size>())?);
                let fds = [
                    sender.memfd().as_file().as_fd(),
                    sender.empty_signal().as_fd(),
                    sender.full_signal().as_fd(),
                    receiver.memfd().as_file().as_fd(),
                    receiver.empty_signal().as_fd(),
                    receiver.full_signal().as_fd(),
                ];
                socket.send(b"rings", &fds)?;
                Ok(Self { sender, receiver })
            }

            fn join(socket: Packets) -> Result<Self> {
                let fds = socket.receive(&mut [0; 16], 6)?.fds;
                let files: Vec<File> = fds.into_iter().map(File::from).collect();
                let Ok([to_memory, to_empty, to_full, memory, empty, full]) =
                    <[File; 6]>::try_from(files)
                else {
                    bail!("two rings have six descriptors");
                };
                let receiver = Receiver::open(items::<$size>(), to_memory, to_empty, to_full)?;
                let sender = Sender::open(items::<$size>(), memory, empty, full)?;
                Ok(Self { sender, receiver })
            }

            #[inline]
            fn send(&mut self, number: u64) -> Result<()> {
                self.sender.block_until_writable()?;
                let message = message::<$size>(number);
                let status = self.sender.sender_mut().send_foreach(1, || message);
                if status.signal {
                    self.sender.empty_signal().write_all(&1_u64.to_ne_bytes())?;
                }
                Ok(())
            }

            #[inline]
            fn receive(&mut self, number: u64) -> Result<()> {
                self.receiver.block_until_readable()?;
                let mut taken = None;
                let status = self.receiver.receiver_mut().recv_foreach(1, |item| taken = Some(item));
                if status.signal {
                    self.receiver.full_signal().write_all(&1_u64.to_ne_bytes())?;
                }
                check::<$size>(&taken.context("a readable ring has an item")?, number)
            }
        }
    )+};
}

shared_rings!(8 64 512 4096);

/// Rings of shmem-ipc whose ends never sleep.
pub struct PolledSharedRings(SharedRings<64>);

impl Line<64> for PolledSharedRings {
    fn make(socket: Packets) -> Result<Self> {
        SharedRings::make(socket).map(Self)
    }

    fn join(socket: Packets) -> Result<Self> {
        SharedRings::join(socket).map(Self)
    }

    #[inline]
    fn send(&mut self, number: u64) -> Result<()> {
        let message = message::<64>(number);
        self.0.sender.sender_mut().send_foreach(1, || message);
        Ok(())
    }

    #[inline]
    fn receive(&mut self, number: u64) -> Result<()> {
        loop {
            let mut taken = None;
            self.0.receiver.receiver_mut().recv_foreach(1, |item| taken = Some(item));
            if let Some(taken) = taken {
                return check::<64>(&taken, number);
            }
            std::hint::spin_loop();
        }
    }
}

pub struct Pipes(PipeWriter, PipeReader);

impl<const SIZE: usize> Line<SIZE> for Pipes {
    fn make(socket: Packets) -> Result<Self> {
        let ((their_reader, writer), (reader, their_writer)) = (pipe()?, pipe()?);
        socket.send(b"pipes", &[their_writer.as_fd(), their_reader.as_fd()])?;
        Ok(Self(writer, reader))
    }

    fn join(socket: Packets) -> Result<Self> {
        let mut fds = socket.receive(&mut [0; 16], 2)?.fds.into_iter();
        let (writer, reader) = (fds.next().context("a pipe")?, fds.next().context("another")?);
        Ok(Self(writer.into(), reader.into()))
    }

    fn send(&mut self, number: u64) -> Result<()> {
        Ok(self.0.write_all(&message::<SIZE>(number))?)
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut entry = [0; SIZE];
        self.1.read_exact(&mut entry)?;
        check::<SIZE>(&entry, number)
    }
}

pub struct Socket(OwnedFd);

impl<const SIZE: usize> Line<SIZE> for Socket {
    fn make(socket: Packets) -> Result<Self> {
        Ok(Self(socket.into()))
    }

    fn join(socket: Packets) -> Result<Self> {
        Ok(Self(socket.into()))
    }

    fn send(&mut self, number: u64) -> Result<()> {
        let sent = send(self.0.as_raw_fd(), &message::<SIZE>(number), MsgFlags::MSG_NOSIGNAL)?;
        ensure!(sent == SIZE, "a packet of {SIZE} bytes was cut to {sent}");
        Ok(())
    }

    fn receive(&mut self, number: u64) -> Result<()> {
        let mut entry = [0; SIZE];
        let received = recv(self.0.as_raw_fd(), &mut entry, MsgFlags::empty())?;
        check::<SIZE>(&entry[..received], number)
    }
}
