//! Driver for QEMU's `edu` teaching device (PCI 1234:11e8).
//!
//! Two engines, one job each at a time: a factorial (a client asks, the device computes, its
//! interrupt lets us answer), and a copy between memory and the device's own buffer, which makes
//! the round trips in `dma.rs`. Every method here runs on the driver's default queue, which is
//! serial: that is why `&mut self` is enough and there is no lock.

#![forbid(unsafe_code)]

mod dma;
mod regs;
mod stream;

use std::collections::BTreeMap;

use dma::{Engine, Job};
use iohost_driver::prelude::*;
use regs::{Cause, Status};
use stream::Stream;

/// What the low half of the identification register reads on a real `edu`.
const SIGNATURE: u32 = 0x00ed;

/// Nanoseconds from one tick of the timer to the next, and how late one may be.
const TICK: u64 = 10_000_000;
const TICK_LEEWAY: u64 = 1_000_000;

/// One `edu` function. Owned by its queue from `start` until after `stop`.
pub struct Edu {
    bar: Bar<regs::Edu>,
    queue: IODispatchQueue<Self>,
    interrupt: IOInterruptDispatchSource,
    /// The caller the device computes a factorial for.
    waiting: Option<Reply<u32>>,
    dma: Engine,
    streams: BTreeMap<SessionId, Stream>,
    /// Whose entry went last, so that the next one is somebody else's.
    served_last: SessionId,
    timer: IOTimerDispatchSource,
    next_tick: u64,
    ticks: u64,
}

impl IOService for Edu {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];
    const NEEDS: Needs = Needs::NOTHING.dma(edu_api::LONGEST_ENTRY);

    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        let bar = device.map_bar::<regs::Edu>(0)?;
        let id = bar.read(regs::ID);
        ensure!(id.signature() == SIGNATURE, IOReturn::UNSUPPORTED, "not an edu device: {id:x?}");

        // A predecessor may have died mid-computation; its answer must not become ours.
        let idle = !bar.read(regs::STATUS).contains(Status::COMPUTING);
        ensure!(idle, IOReturn::BUSY, "still computing for a previous owner");
        bar.write(regs::IRQ_ACK, bar.read(regs::IRQ_STATUS));

        // MSI where the device may use it, its line where not.
        device
            .configure_interrupts(InterruptType::Messaged, 1, 1)
            .or_else(|_| device.configure_interrupts(InterruptType::Level, 1, 1))?;
        let interrupt =
            IOInterruptDispatchSource::create(&device, 0, queue, Self::interrupt_occurred)?;
        interrupt.set_enable(true)?;
        bar.write(regs::STATUS, Status::INTERRUPT_WHEN_DONE);

        let dma = Engine::new(&device, &bar)?;
        let timer = IOTimerDispatchSource::create(queue, Self::timer_occurred)?;
        let next_tick = queue.now(IOTimerClock::UptimeRaw) + TICK;
        timer.wake_at_time(IOTimerClock::UptimeRaw, next_tick, TICK_LEEWAY)?;

        let kind = IOInterruptDispatchSource::interrupt_type(&device, 0)?;
        info!(major = id.major(), minor = id.minor(), interrupt:? = kind; "started");
        Ok(Self {
            bar,
            queue: queue.clone(),
            interrupt,
            waiting: None,
            dma,
            streams: BTreeMap::new(),
            served_last: 0,
            timer,
            next_tick,
            ticks: 0,
        })
    }

    /// Quiets the device. A caller still waiting is told `ABORTED` by the drop of its reply.
    fn stop(&mut self) {
        self.bar.write(regs::STATUS, Status::empty());
        // Disabling an enabled source has nothing to refuse.
        let _ = self.interrupt.set_enable(false);
    }

    fn session_opened(&mut self, mut session: Session) -> Result<()> {
        let stream = Stream::open(&mut session, &self.queue)?;
        self.streams.insert(session.id(), stream);
        Ok(())
    }

    fn session_closed(&mut self, session: SessionId) {
        self.streams.remove(&session);
    }
}

impl edu_api::Server for Edu {
    fn factorial(&mut self, n: u32, reply: Reply<u32>) {
        if self.waiting.is_some() {
            return reply.fail(IOReturn::BUSY);
        }
        self.waiting = Some(reply);
        self.bar.write(regs::FACTORIAL, n);
    }

    fn dma_round_trip(&mut self, data: Vec<u8>, reply: Reply<Vec<u8>>) {
        if !dma::fits(&data) {
            return reply.fail(IOReturn::BAD_ARGUMENT);
        }
        if !self.dma.is_idle() {
            return reply.fail(IOReturn::BUSY);
        }
        self.dma.send(&self.bar, data, Job::Call(reply));
    }

    fn ticks(&mut self, reply: Reply<u64>) {
        reply.complete(self.ticks);
    }
}

impl Edu {
    fn interrupt_occurred(&mut self, _event: InterruptEvent) {
        let cause = self.bar.read(regs::IRQ_STATUS);
        self.bar.write(regs::IRQ_ACK, cause);

        if cause.contains(Cause::FACTORIAL)
            && let Some(reply) = self.waiting.take()
        {
            reply.complete(self.bar.read(regs::FACTORIAL));
        }
        if cause.contains(Cause::DMA)
            && let Some((data, job)) = self.dma.advance(&self.bar)
        {
            match job {
                Job::Call(reply) => reply.complete(data),
                Job::Predecessor => {}
                Job::Stream(session) => {
                    // A session that is gone by now wants nothing back.
                    if let Some(stream) = self.streams.get_mut(&session) {
                        stream.give_back(data);
                    }
                }
            }
            self.pump();
        }
    }

    /// Moves what can be moved: entries on their way back into their queues, and the next entry
    /// of some stream into the DMA engine, if that is idle. Sessions take turns.
    pub(crate) fn pump(&mut self) {
        let after = self.streams.range(self.served_last + 1..);
        let turns = after.chain(self.streams.range(..=self.served_last));
        let turns: Vec<_> = turns.map(|(session, _)| *session).collect();
        for session in turns {
            let Some(stream) = self.streams.get_mut(&session) else { continue };
            if let Some(data) = stream.next_entry(self.dma.is_idle()) {
                self.dma.send(&self.bar, data, Job::Stream(session));
                self.served_last = session;
            }
        }
    }

    fn timer_occurred(&mut self, _time: u64) {
        self.ticks += 1;
        self.dma.look(&self.bar);
        self.pump();
        // From the deadline, not from now, so that the period does not drift.
        self.next_tick += TICK;
        if let Err(err) =
            self.timer.wake_at_time(IOTimerClock::UptimeRaw, self.next_tick, TICK_LEEWAY)
        {
            warn!(reason:% = err; "the timer stopped");
        }
    }
}

iohost_driver::export_driver!(Edu, serves edu_api);
