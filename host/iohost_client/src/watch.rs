//! News of services: a driver that ended, and why, and one that is there again.

use std::path::PathBuf;
use std::time::Duration;

use iohost_control::socket::GuardedSocket;
use iohost_control::varlink::{ServiceEvent, begin_watch, next_event};
use smol::{Timer, block_on, future};
use zlink::Connection;

use crate::daemon::{broken, refused};
use crate::{AsyncDaemon, ClientError};

/// News of services, in order: first those that run already, as `Began`, then each one that begins
/// or ends. One that restarts ends, with the reason, and begins with a higher incarnation.
///
/// A session outlives the end of a driver that is started again. One that ends, because the service is
/// over, has no reason to tell (`OFFLINE`); it is here.
///
/// Not read for a long time (1024 events), it ends with `Broken`, as it does when the daemon ends.
/// [`resume`](Self::resume) goes on then.
#[derive(Debug)]
pub struct ServiceWatch(AsyncServiceWatch);

/// [`ServiceWatch`] for any executor.
#[derive(Debug)]
pub struct AsyncServiceWatch {
    connection: Connection<GuardedSocket>,
    socket: PathBuf,
}

impl ServiceWatch {
    /// Waits for the next event.
    ///
    /// Errors: `Broken` when the daemon ended, `Refused` when it is about to.
    pub fn next_event(&mut self) -> Result<ServiceEvent, ClientError> {
        block_on(self.0.next_event())
    }

    /// Watches again, once the daemon that was watched has ended and another one runs: from the
    /// beginning, with what runs then. A service that an earlier daemon started has the incarnation
    /// that it had.
    ///
    /// Errors: as [`Daemon::connect`](crate::Daemon::connect).
    pub fn resume(&mut self) -> Result<(), ClientError> {
        block_on(self.0.resume())
    }

    /// As [`next_event`](Self::next_event), but `None` when nothing happened within `timeout`; nothing is lost
    /// then.
    pub fn next_event_within(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<ServiceEvent>, ClientError> {
        let next = async { self.0.next_event().await.map(Some) };
        block_on(future::or(next, async {
            Timer::after(timeout).await;
            Ok(None)
        }))
    }
}

impl From<AsyncServiceWatch> for ServiceWatch {
    fn from(watch: AsyncServiceWatch) -> Self {
        Self(watch)
    }
}

impl AsyncServiceWatch {
    pub(crate) async fn begin(
        mut connection: Connection<GuardedSocket>,
        socket: PathBuf,
    ) -> Result<Self, ClientError> {
        begin_watch(&mut connection).await.map_err(broken)?;
        Ok(Self { connection, socket })
    }

    /// As [`ServiceWatch::resume`].
    pub async fn resume(&mut self) -> Result<(), ClientError> {
        *self = AsyncDaemon::connect(&self.socket).await?.watch().await?;
        Ok(())
    }

    /// The next event. A future that is dropped before it is ready has taken none. Errors: as
    /// [`ServiceWatch::next_event`].
    pub async fn next_event(&mut self) -> Result<ServiceEvent, ClientError> {
        next_event(&mut self.connection).await.map_err(broken)?.map_err(refused)
    }
}
