//! What is done when the controller does not do what it should.
//!
//! A command that takes too long is aborted; one that cannot be aborted, a fatal status, or a
//! completion that cannot be, lead to a reset of the controller, after which what was under way is
//! done again. A controller that is gone, does not come back, or needs reset after reset, is given
//! up: everything is answered with the reason, now and later, until the driver is started again.

use std::thread;
use std::time::Duration;

use block_api::{Failure, Status};
use iohost_driver::prelude::*;

use crate::admin::Asked;
use crate::bring_up::State;
use crate::command::{Command, admin};
use crate::regs::{self, Configuration};
use crate::{MOST_RESETS, Nvme};

/// Nanoseconds of a tick, and how late one may be.
const TICK: u64 = 500_000_000;
const TICK_LEEWAY: u64 = 50_000_000;

/// Ticks that a command may take before it is aborted: 10 s.
pub const PATIENCE: u32 = 20;

/// Ticks that an abort may take before the controller is reset: 2 s.
const ABORT_PATIENCE: u32 = 4;

impl Nvme {
    /// Has the controller begin anew, as it did something that it must not do.
    pub(crate) fn trouble(&mut self, words: &str) {
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        self.resets += 1;
        if self.resets > MOST_RESETS {
            let words = format!("given up after {MOST_RESETS} resets: {words}");
            return self.fail(Failure::new(Status::NotResponding, words));
        }
        warn!(reason = words, reset = self.resets; "the controller is reset");
        self.begin_reset();
    }

    /// Gives the controller up, and tells everybody who waits for it.
    pub(crate) fn fail(&mut self, failure: Failure) {
        error!(reason:% = failure; "the controller is given up");
        // What it still writes meets no memory: it is no bus master any more.
        self.transfers.doorbells.bar.write(regs::CC, Configuration::empty());
        self.device.set_bus_master(false);
        self.keep_what_is_under_way();
        self.state = State::Failed(failure.clone());
        self.transfers.namespaces.clear();
        self.transfers.fail_what_was_kept(&failure);
        self.answer_all();
        for place in 0..self.clients.count() {
            self.take_requests(place);
        }
        self.answer_what_has_ended();
    }

    /// Takes everything out of the queues, to be done again; but what was tried often enough.
    pub(crate) fn keep_what_is_under_way(&mut self) {
        self.transfers.keep_what_is_under_way();
        self.scan = Default::default();
        for reply in self.health_calls.drain(..) {
            reply.fail(IOReturn::ABORTED);
        }
    }

    /// Puts what was kept into the queues of its clients.
    pub(crate) fn house_what_was_kept(&mut self) {
        self.transfers.house_what_was_kept();
        for place in 0..self.clients.count() {
            self.take_requests(place);
        }
    }

    /// Has the time looked at, if there is anything that may take too long.
    pub(crate) fn watch(&mut self) {
        let is_waited_for = |nvme: &Self| {
            let queues = &nvme.transfers.queues[..nvme.transfers.count];
            nvme.admin.is_waited_for() || queues.iter().any(|queue| !queue.is_idle())
        };
        if !self.timer_is_set && is_waited_for(self) {
            let now = self.queue.now(IOTimerClock::UptimeRaw);
            self.wake_at(now + TICK, TICK_LEEWAY);
        }
    }

    /// Has [`Nvme::time_has_come`] called.
    pub(crate) fn wake_at(&mut self, deadline: u64, leeway: u64) {
        let set = self.timer.wake_at_time(IOTimerClock::UptimeRaw, deadline, leeway);
        self.timer_is_set = set.is_ok();
    }

    /// The timer: a look at the registers on the way up, or a tick.
    pub(crate) fn time_has_come(&mut self) {
        self.timer_is_set = false;
        match self.state {
            State::Quieting { .. } | State::Enabling { .. } => self.look_at_state(),
            State::Failed(_) => return,
            State::Identifying | State::Running => self.tick(),
        }
        self.settle();
    }

    /// Half a second has passed with something under way.
    fn tick(&mut self) {
        self.transfers.ticks = self.transfers.ticks.wrapping_add(1);
        let status = self.transfers.doorbells.bar.read(regs::CSTS);
        if status.bits() == regs::NOBODY {
            return self.fail(Failure::new(Status::Gone, "its registers read as all ones"));
        }
        if status.contains(regs::Status::FATAL) {
            return self.trouble("fatal status");
        }
        // An interrupt may have got lost: what is there is taken, and is not late.
        self.look_at_admin();
        for place in 0..self.transfers.count {
            self.look_at(place);
        }
        if let Some(asked) = self.admin.overdue(self.transfers.ticks, PATIENCE) {
            let words = format!("it has not answered to an admin command ({asked:?})");
            return self.trouble(&words);
        }
        for place in 0..self.transfers.count {
            if let Err(words) = self.abort_what_is_late(place) {
                return self.trouble(&words);
            }
        }
    }

    fn abort_what_is_late(&mut self, place: usize) -> Result<(), String> {
        let now = self.transfers.ticks;
        let mut aborts = self.controller.aborts.saturating_sub(self.admin.under_way(Asked::Abort));
        let queue = self.transfers.queues[place].rings.id();
        let mut late = Vec::new();
        for (id, slot) in self.transfers.queues[place].under_way() {
            let age = now.wrapping_sub(slot.issued);
            if slot.is_being_aborted && age >= ABORT_PATIENCE {
                return Err(format!("command {id} of queue {queue} is late, and was not aborted"));
            }
            if !slot.is_being_aborted && age >= PATIENCE && aborts > 0 {
                aborts -= 1;
                slot.is_being_aborted = true;
                slot.issued = now;
                late.push(id);
            }
        }
        for id in late {
            warn!(queue, command = id; "a command is late, it is aborted");
            let dwords = [u32::from(queue) | u32::from(id) << 16, 0, 0, 0];
            let command = Command { opcode: admin::ABORT, dwords, ..Command::default() };
            self.ask(Asked::Abort, command);
        }
        Ok(())
    }

    /// Has the controller write what it has cached (section 7.6.2), and disables it. Waits, as this
    /// is the last that happens, but not for long.
    pub(crate) fn shut_down(&mut self) {
        if matches!(self.state, State::Failed(_)) {
            return;
        }
        let bar = &self.transfers.doorbells.bar;
        let until = |what: &str, is_so: &dyn Fn(regs::Status) -> bool| {
            const LOOKS: u32 = 200;
            for _ in 0..LOOKS {
                let status = bar.read(regs::CSTS);
                if status.bits() == regs::NOBODY || is_so(status) {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
            warn!(what; "the controller did not end in time");
        };
        if matches!(self.state, State::Running) {
            bar.write(regs::CC, bar.read(regs::CC) | Configuration::SHUTDOWN);
            until("its shutdown", &|status| status.shutdown() == 2);
        }
        bar.write(regs::CC, Configuration::empty());
        until("being ready", &|status| !status.contains(regs::Status::READY));
    }
}
