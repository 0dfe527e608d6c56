//! A client's stream through a device and back, and whether it came back as it went.

use std::time::Duration;

use iohost_client::{ClientError, QueueConsumer, QueueProducer, Session, WaitError};
use iohost_interface::{ToClient, ToDriver};

/// Entries through both data queues, in order.
pub(crate) struct Stream {
    upload: QueueProducer,
    download: QueueConsumer,
    sent: u64,
    judge: Judge,
    entry: Vec<u8>,
}

/// Knows which entry has to come next.
#[derive(Default)]
struct Judge {
    /// How many have come back, or will not.
    received: u64,
    account: Account,
}

/// What became of the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) entries: u64,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    /// Came back with other bytes, while the device did things wrong.
    pub(crate) damaged: u64,
    /// Came back with other bytes though it did not.
    pub(crate) corrupt: u64,
}

/// Whether the device does things wrong. Then the bytes of an entry are not its driver's fault, but
/// that it comes back, once, in its turn, and how long it is, is the driver's business alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Lies,
    TellsTheTruth,
}

/// Nothing has come back for a while.
#[derive(Debug)]
pub(crate) enum Halt {
    Standstill,
    Broken(WaitError),
}

impl From<WaitError> for Halt {
    fn from(err: WaitError) -> Self {
        match err {
            WaitError::TimedOut { .. } => Self::Standstill,
            err => Self::Broken(err),
        }
    }
}

impl Stream {
    pub(crate) fn open(
        session: &Session,
        upload: ToDriver,
        download: ToClient,
    ) -> Result<Self, ClientError> {
        Ok(Self {
            upload: session.producer(upload)?,
            download: session.consumer(download)?,
            sent: 0,
            judge: Judge::default(),
            entry: Vec::new(),
        })
    }

    /// Sends up to `count` entries, as far as there is room.
    pub(crate) fn send(&mut self, count: u64) -> Result<(), Halt> {
        for _ in 0..count {
            if !self.upload.try_send(&entry(self.sent))? {
                break;
            }
            self.sent += 1;
        }
        Ok(())
    }

    /// Receives until everything that was sent has come back. A standstill is one that lasts
    /// `patience`.
    pub(crate) fn receive_all(&mut self, device: Device, patience: Duration) -> Result<(), Halt> {
        while self.judge.received < self.sent {
            self.download.receive_within(&mut self.entry, patience)?;
            self.judge.judge(&self.entry, device);
        }
        // Nothing more may come; what does is found here or at the next call.
        while self.download.try_receive(&mut self.entry)? {
            self.judge.account.doubled += 1;
        }
        Ok(())
    }

    pub(crate) fn account(&self) -> Account {
        Account { entries: self.judge.received, ..self.judge.account }
    }

    /// Gives the entries up that have not come back.
    pub(crate) fn give_up(&mut self) {
        self.judge.account.lost += self.sent - self.judge.received;
        self.judge.received = self.sent;
    }
}

impl Judge {
    /// Something came back.
    fn judge(&mut self, found: &[u8], device: Device) {
        let expected = entry(self.received);
        let is_right = match device {
            Device::TellsTheTruth => found == expected,
            Device::Lies => found.len() == expected.len(),
        };
        if is_right {
            self.account.damaged += u64::from(found != expected);
            self.received += 1;
            return;
        }
        // Which one is it? Far more are never under way at a time.
        let near = self.received.saturating_sub(1000)..self.received + 1000;
        match near.into_iter().find(|number| entry(*number) == found) {
            Some(number) if number < self.received => self.account.doubled += 1,
            Some(number) => {
                self.account.lost += number - self.received;
                self.received = number + 1;
            }
            None => {
                self.account.corrupt += 1;
                self.received += 1;
            }
        }
    }
}

/// Entry `number`: bytes that belong to it alone, of a length that its neighbours rarely have.
fn entry(number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut bytes = number.to_ne_bytes().to_vec();
    bytes.resize(8 + random.usize(..120), 0);
    random.fill(&mut bytes[8..]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(came: impl IntoIterator<Item = Vec<u8>>, device: Device) -> (u64, Account) {
        let mut judge = Judge::default();
        came.into_iter().for_each(|found| judge.judge(&found, device));
        (judge.received, judge.account)
    }

    #[test]
    fn what_comes_back_as_it_went_is_no_news() {
        for device in [Device::Lies, Device::TellsTheTruth] {
            assert_eq!(account((0..100).map(entry), device), (100, Account::default()));
        }
    }

    #[test]
    fn an_entry_that_is_left_out_or_comes_twice_or_is_changed_is_found() {
        let truth = Device::TellsTheTruth;
        let lost = account((0..10).filter(|number| *number != 4).map(entry), truth);
        assert_eq!(lost, (10, Account { lost: 1, ..Account::default() }));
        let doubled = account([0, 1, 1, 2].map(entry), truth);
        assert_eq!(doubled, (3, Account { doubled: 1, ..Account::default() }));
        let mut changed = [0, 1, 2].map(entry);
        changed[1][0] ^= 1;
        let corrupt = account(changed.clone(), truth);
        assert_eq!(corrupt, (3, Account { corrupt: 1, ..Account::default() }));
        let damaged = account(changed, Device::Lies);
        assert_eq!(damaged, (3, Account { damaged: 1, ..Account::default() }));
    }

    #[test]
    fn a_device_that_lies_hides_no_loss() {
        let lost = account((0..10).filter(|number| *number != 4).map(entry), Device::Lies);
        assert_eq!(lost, (10, Account { lost: 1, ..Account::default() }));
    }
}
