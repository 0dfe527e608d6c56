//! The actions of one session: those of the driver that the client holds, those of the client
//! that the driver holds, and the invocations of the latter on their way.
//!
//! # How much may be on its way
//!
//! The driver invokes from its own queue and never waits for a client. So invocations stand in
//! line here, and go into the socket only as far as the client has taken the earlier ones
//! (`IOT1`): that leaves room in the socket for replies, and a client that is slow costs itself.
//! A line that is full makes `invoke` fail with `BUSY`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use iohost_event::{PacketError, Packets};
use iohost_interface::packet::{Invocation, encode_release};
use iohost_interface::{ActionTarget, Arguments, IOReturn, PassedAction};

/// The most invocations of one session that wait for their client.
const LONGEST_LINE: usize = 4096;

/// What invocations that the client has not taken may cost, of the 208 KiB that a socket holds.
const MOST_UNTAKEN: usize = 96 * 1024;

/// The most actions of one client that a driver holds.
const MOST_HELD: usize = 1024;

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no foreign code runs under a lock of a session's actions";

pub(crate) struct SessionActions {
    given: Mutex<Given>,
    line: Mutex<Line>,
}

/// Actions of the driver, by the number that the client knows them by.
struct Given {
    targets: HashMap<u64, Arc<dyn ActionTarget>>,
    next: u64,
    is_over: bool,
}

struct Line {
    packets: VecDeque<Packet>,
    /// What was sent and not taken: the cost of each invocation, by action, in order.
    untaken: HashMap<u64, VecDeque<usize>>,
    untaken_cost: usize,
    /// Actions of the client that the driver holds.
    held: usize,
}

struct Packet {
    bytes: Vec<u8>,
    /// The action, if this invokes one.
    invokes: Option<u64>,
}

impl Packet {
    /// About what the kernel charges for it.
    fn cost(&self) -> usize {
        1024 + 2 * self.bytes.len()
    }
}

impl SessionActions {
    pub(crate) fn new() -> Self {
        let given = Given { targets: HashMap::new(), next: 1, is_over: false };
        let line =
            Line { packets: VecDeque::new(), untaken: HashMap::new(), untaken_cost: 0, held: 0 };
        Self { given: Mutex::new(given), line: Mutex::new(line) }
    }

    /// Numbers the actions among results, for the client.
    pub(crate) fn give(&self, results: &mut Arguments) {
        let mut unwanted = Vec::new();
        let mut given = self.given.lock().expect(NO_PANIC);
        for PassedAction { scalar, target } in &mut results.actions {
            let Some(target) = target.take() else { continue };
            results.scalars[*scalar] = given.next;
            given.next += 1;
            if given.is_over {
                unwanted.push(target);
            } else {
                let number = results.scalars[*scalar];
                given.targets.insert(number, target);
            }
        }
        drop(given);
        // Not under the lock: the end of a handle can run code of the driver.
        drop(unwanted);
    }

    /// An action of the driver's that the client has.
    pub(crate) fn target(&self, action: u64) -> Option<Arc<dyn ActionTarget>> {
        self.given.lock().expect(NO_PANIC).targets.get(&action).cloned()
    }

    /// The client holds an action no more; `None` when it held none of that number.
    pub(crate) fn take_back(&self, action: u64) -> Option<Arc<dyn ActionTarget>> {
        self.given.lock().expect(NO_PANIC).targets.remove(&action)
    }

    /// The client holds nothing any more.
    pub(crate) fn end(&self) {
        let mut given = self.given.lock().expect(NO_PANIC);
        given.is_over = true;
        let targets = std::mem::take(&mut given.targets);
        drop(given);
        self.line.lock().expect(NO_PANIC).packets.clear();
        drop(targets);
    }

    /// Counts an action of the client's that the driver will hold; `false` when it is one too
    /// many.
    pub(crate) fn hold(&self) -> bool {
        let mut line = self.line.lock().expect(NO_PANIC);
        line.held += 1;
        line.held <= MOST_HELD
    }

    /// Sends an invocation of a client's action, or puts it in line.
    ///
    /// Errors: `BUSY` when the line is full; what the packet says of its arguments. The inner
    /// error ends the session.
    pub(crate) fn invoke(
        &self,
        socket: &Packets,
        invocation: &Invocation,
    ) -> Result<Result<(), PacketError>, IOReturn> {
        let bytes = invocation.encode()?;
        let mut line = self.line.lock().expect(NO_PANIC);
        if line.packets.len() >= LONGEST_LINE {
            return Err(IOReturn::BUSY);
        }
        line.packets.push_back(Packet { bytes, invokes: Some(invocation.action) });
        Ok(line.advance(socket))
    }

    /// Tells the client, behind the invocations, that the driver holds its action no more.
    pub(crate) fn release(&self, socket: &Packets, action: u64) -> Result<(), PacketError> {
        let mut line = self.line.lock().expect(NO_PANIC);
        line.held -= 1;
        line.packets.push_back(Packet { bytes: encode_release(action), invokes: None });
        line.advance(socket)
    }

    /// The client has taken invocations. `None` when there were none to take.
    pub(crate) fn taken(
        &self,
        socket: &Packets,
        action: u64,
        count: u64,
    ) -> Option<Result<(), PacketError>> {
        let mut line = self.line.lock().expect(NO_PANIC);
        let untaken = line.untaken.get_mut(&action)?;
        let count = usize::try_from(count).ok().filter(|count| *count <= untaken.len())?;
        let cost: usize = untaken.drain(..count).sum();
        if untaken.is_empty() {
            line.untaken.remove(&action);
        }
        line.untaken_cost -= cost;
        Some(line.advance(socket))
    }
}

impl Line {
    /// Sends what may go now.
    fn advance(&mut self, socket: &Packets) -> Result<(), PacketError> {
        while let Some(packet) = self.packets.front() {
            let cost = packet.cost();
            if self.untaken_cost > 0 && self.untaken_cost + cost > MOST_UNTAKEN {
                return Ok(());
            }
            match socket.send(&packet.bytes, &[]) {
                Ok(()) => {}
                // Goes on with the next that the client takes.
                Err(PacketError::WouldBlock) if self.untaken_cost > 0 => return Ok(()),
                Err(err) => return Err(err),
            }
            if let Some(action) = packet.invokes {
                self.untaken.entry(action).or_default().push_back(cost);
                self.untaken_cost += cost;
            }
            self.packets.pop_front();
        }
        Ok(())
    }
}
