//! The stream of one session: entries out of one data queue, through the device, into the other.

use iohost_driver::prelude::*;
use iohost_driver::{Consumer, Producer};

use crate::{Edu, dma};

/// Both queues of a session.
///
/// An entry leaves the one at the moment at which it is in the other, so none is lost and none comes
/// back twice, also when this process dies. Until then it is looked at and stays where it is: that is
/// why the next one has to wait.
pub struct Stream {
    upload: IODataQueueDispatchSource<Consumer>,
    download: IODataQueueDispatchSource<Producer>,
    /// Came back from the device, and found no room.
    returning: Option<Vec<u8>>,
}

impl Stream {
    pub fn open(session: &mut Session, queue: &IODispatchQueue<Edu>) -> Result<Self> {
        let upload = session.consumer(edu_api::UPLOAD)?;
        let download = session.producer(edu_api::DOWNLOAD)?;
        Ok(Self {
            upload: IODataQueueDispatchSource::create(upload, queue, Edu::pump)?,
            download: IODataQueueDispatchSource::create(download, queue, Edu::pump)?,
            returning: None,
        })
    }

    /// Exchanges the entry that was looked at last for what came of it, now or when there is room.
    pub fn give_back(&mut self, data: Vec<u8>) {
        // Overrun: `DataServiced` calls `Edu::pump` once the client has taken something. A queue
        // that the client has broken stays so, and ends with its session.
        if self.download.exchange(&mut self.upload, &data).is_err() {
            self.returning = Some(data);
        }
    }

    /// The next entry for the device, if it can have one. An entry that the device cannot take
    /// comes back empty.
    pub fn next_entry(&mut self, device_is_idle: bool) -> Option<Vec<u8>> {
        loop {
            if let Some(data) = self.returning.take() {
                self.give_back(data);
            }
            if self.returning.is_some() || !device_is_idle {
                return None;
            }
            let data = self.upload.peek(|entry| entry.to_vec()).ok()?;
            if dma::fits(&data) {
                return Some(data);
            }
            self.give_back(Vec::new());
        }
    }
}
