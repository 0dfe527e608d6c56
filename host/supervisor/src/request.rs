//! What the control interface asks of the actor.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;

use iohost_control::host::{Failure, PowerState, Statistics};
use iohost_control::varlink::{
    BindOptions, Bound, Description, DeviceList, Opened, Powered, Properties, Reloaded,
    ServiceEvent, Status, Unbound, Upgraded,
};
use iohost_event::{Peer, Signal};
use smol::channel;

/// A question, each with the place for its answer.
#[derive(Debug)]
pub(crate) enum Request {
    Devices(Answer<DeviceList>),
    Status(Answer<Status>),
    Bind {
        device: String,
        options: BindOptions,
        client: Peer,
        answer: Answer<Bound>,
    },
    Unbind {
        device: String,
        client: Peer,
        answer: Answer<Unbound>,
    },
    Statistics {
        service: String,
        answer: Answer<Statistics>,
    },
    Describe {
        service: String,
        answer: Answer<Description>,
    },
    Properties {
        service: String,
        answer: Answer<Properties>,
    },
    Power {
        service: String,
        state: PowerState,
        client: Peer,
        answer: Answer<Powered>,
    },
    Reload {
        client: Peer,
        answer: Answer<Reloaded>,
    },
    /// The plugin is a file.
    Upgrade {
        service: String,
        plugin: PathBuf,
        client: Peer,
        answer: Answer<Upgraded>,
    },
    Watch(Answer<channel::Receiver<ServiceEvent>>),
    /// Wanted are the bytes of each queue, and the kind of client.
    Open {
        service: String,
        wanted: (Option<Vec<u32>>, u64),
        client: Peer,
        answer: Answer<(Opened, Vec<OwnedFd>)>,
    },
}

/// Where an answer goes. Dropped without one, the asker is told that the daemon stops.
#[derive(Debug)]
pub(crate) struct Answer<T>(channel::Sender<Result<T, Failure>>);

impl<T> Answer<T> {
    /// Answers. An asker that has gone meanwhile does not matter.
    pub(crate) fn give(self, result: Result<T, Failure>) {
        let _ = self.0.try_send(result);
    }
}

/// The asking side: cheap to clone, for the thread of the control interface.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    requests: mpsc::Sender<Request>,
    wake: Arc<Signal>,
}

/// The answering side.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) requests: mpsc::Receiver<Request>,
    /// Raised after each request.
    pub(crate) wake: Arc<Signal>,
}

/// Both sides.
pub(crate) fn pair() -> std::io::Result<(Asker, Inbox)> {
    let (sender, receiver) = mpsc::channel();
    let wake = Arc::new(Signal::new()?);
    Ok((Asker { requests: sender, wake: wake.clone() }, Inbox { requests: receiver, wake }))
}

impl Asker {
    /// Asks and waits for the answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(Answer<T>) -> Request,
    ) -> Result<T, Failure> {
        let (sender, receiver) = channel::bounded(1);
        if self.requests.send(request(Answer(sender))).is_ok() {
            self.wake.raise();
        }
        // The actor answers every request or ends, which drops the sender.
        receiver.recv().await.unwrap_or_else(|_| Err(stopping()))
    }
}

/// The answer while the daemon stops.
pub(crate) fn stopping() -> Failure {
    Failure::new("stopping", "the daemon is stopping", "start it again: iohost daemon")
}
