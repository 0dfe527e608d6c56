//! A driver that tries to get out of its process, one way at a time, and tells how it went.
//!
//! Every way that is open to it has to be harmless: the tests also run it without a sandbox, to see
//! that it is the sandbox that keeps it in. So it signals with signal 0, changes what it puts back,
//! and asks for what needs a right with arguments that are refused once the right is there.

#![deny(unsafe_code)]

mod attempts;

use iohost_driver::prelude::*;

use crate::attempts::{ATTEMPTS, Outcome, Target};

/// What a test can ask it for.
pub mod api {
    iohost_interface::interface! {
        /// Ways out.
        pub interface hostile;

        methods {
            /// Whom to try them on: the process of the daemon, that of another driver host, a folder
            /// with a file called `victim` and, behind a line's end, the daemon's control socket. How
            /// many there are.
            0 => fn aim(daemon: u32, other: u32, places: String) -> u32;

            /// Tries one, by its number from 0. Its name and what became of it, with a tab between.
            1 => fn attempt(number: u32) -> String;

            /// Has the device copy from where nothing is mapped for it. What came back.
            2 => fn dma(address: u64) -> Vec<u8>;

            /// Makes a system call that no policy allows, for its report.
            3 => fn misbehave();
        }

        queues {}
    }
}

mod regs {
    use iohost_driver::register_map;

    register_map! {
        /// The DMA engine of `edu`. Source: QEMU, `docs/specs/edu.rst`.
        pub struct Edu[0x10_0000] {
            0x80 Rw DMA_SOURCE:  u64,
            0x88 Rw DMA_TARGET:  u64,
            0x90 Rw DMA_COUNT:   u64,
            0x98 Rw DMA_COMMAND: u64,
        }
    }

    pub const ONBOARD: u64 = 0x4_0000;
    pub const START: u64 = 0x1;
    pub const TO_MEMORY: u64 = 0x2;
}

const BYTES: usize = 64;

/// The driver.
pub struct Hostile {
    bar: Bar<regs::Edu>,
    buffer: PreparedDma,
    target: Option<Target>,
}

impl IOService for Hostile {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(device: IOPCIDevice, _: &IODispatchQueue<Self>) -> Result<Self> {
        let command = IODMACommand::create(&device, 28)?;
        let buffer = IOBufferMemoryDescriptor::create(BYTES)?;
        device.set_bus_master(true);
        let bar = device.map_bar(0)?;
        Ok(Self { bar, buffer: command.prepare_for_dma(buffer)?, target: None })
    }
}

impl Hostile {
    fn copy(&self, source: u64, target: u64, command: u64) {
        self.bar.write(regs::DMA_SOURCE, source);
        self.bar.write(regs::DMA_TARGET, target);
        self.bar.write(regs::DMA_COUNT, BYTES as u64);
        self.bar.write(regs::DMA_COMMAND, command | regs::START);
        while self.bar.read(regs::DMA_COMMAND) & regs::START != 0 {
            std::thread::yield_now();
        }
    }
}

impl api::Server for Hostile {
    fn aim(&mut self, daemon: u32, other: u32, places: String, reply: Reply<u32>) {
        let (folder, control) = places.split_once('\n').expect("two places");
        let (folder, control) = (folder.to_owned(), control.to_owned());
        self.target = Some(Target { daemon, other, folder, control });
        reply.complete(ATTEMPTS.len() as u32);
    }

    fn attempt(&mut self, number: u32, reply: Reply<String>) {
        let Some(target) = &self.target else { return reply.fail(IOReturn::NOT_READY) };
        let (name, attempt) = ATTEMPTS[number as usize];
        let outcome = match attempt(target) {
            Outcome::Refused(by) => by.to_owned(),
            Outcome::Escaped(how) => format!("ESCAPED: {how}"),
        };
        reply.complete(format!("{name}\t{outcome}"));
    }

    fn dma(&mut self, address: u64, reply: Reply<Vec<u8>>) {
        let mut back = vec![0; BYTES];
        self.buffer.write_at(0, &[0x5a; BYTES]).expect("it fits");
        self.copy(address, regs::ONBOARD, 0);
        self.copy(regs::ONBOARD, self.buffer.address(), regs::TO_MEMORY);
        self.buffer.read_at(0, &mut back).expect("it fits");
        reply.complete(back);
    }

    fn misbehave(&mut self, reply: Reply<()>) {
        attempts::misbehave();
        reply.complete(());
    }
}

iohost_driver::export_driver!(Hostile, serves api);
