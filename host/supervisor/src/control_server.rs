//! The service behind the control socket, on a thread of its own.
//!
//! Each connection is a task with its own `zlink` server, so that one that is slow, silent or
//! hostile holds up nobody: `zlink`'s server of many connections waits for every reply to be
//! written before it reads the next call of anyone. What a connection asks goes to the actor.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::Duration;

use iohost_control::host::{Failure, PowerState, QueueStatistics, Statistics};
use iohost_control::socket::{GuardedSocket, Limits};
use iohost_control::varlink::{
    BindOptions, Bound, Description, Device, DeviceList, Error, EventKind, Opened, Powered,
    Properties, Queue, Reason, Reloaded, Service, ServiceEvent, State, Status, Unbound, Upgraded,
};
use iohost_event::Peer;
use log::{debug, warn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smol::stream::{self, Stream, StreamExt};
use smol::{Async, LocalExecutor, Timer, channel, future};
use zlink::{ReadyListener, Reply};

use crate::access::{Clients, Connection};
use crate::config;
use crate::request::{Answer, Asker, Request};

/// How soon a connection that has something to read is looked at again for its end.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Serves connections until `stop` closes. Calls that wait for an answer then get one, because
/// the actor answers or ends.
pub(crate) fn serve(
    listener: UnixListener,
    asker: Asker,
    limits: config::Limits,
    stop: channel::Receiver<()>,
) {
    let executor = Rc::new(LocalExecutor::new());
    let accepting = accept(listener, asker, limits, executor.clone());
    let stopped = async {
        let _ = stop.recv().await;
    };
    smol::block_on(executor.run(future::or(accepting, stopped)));
}

async fn accept(
    listener: UnixListener,
    asker: Asker,
    limits: config::Limits,
    executor: Rc<LocalExecutor<'static>>,
) {
    let listener = match Async::new(listener) {
        Ok(listener) => listener,
        Err(err) => return warn!(error:% = err; "no control interface"),
    };
    let clients = Clients::new(limits);
    loop {
        let stream = match listener.accept().await.and_then(|(stream, _)| stream.into_inner()) {
            Ok(stream) => stream,
            Err(err) => {
                // Out of descriptors, most likely: wait for some to come back.
                warn!(error:% = err; "no connection accepted");
                Timer::after(Duration::from_secs(1)).await;
                continue;
            }
        };
        let connection = match Peer::of(&stream) {
            Ok(peer) => clients.connect(peer),
            Err(err) => {
                debug!(error:% = err; "a connection of nobody closed");
                continue;
            }
        };
        let connection = match connection {
            Ok(connection) => connection,
            Err(failure) => {
                refuse(stream, failure);
                continue;
            }
        };
        let guarded = |stream: UnixStream| -> zlink::Result<_> {
            let end = Async::new(stream.try_clone()?)?;
            Ok((end, GuardedSocket::new(stream, Limits::SERVER)?))
        };
        let (end, socket) = match guarded(stream) {
            Ok(both) => both,
            Err(err) => {
                warn!(error:% = err; "no connection set up");
                continue;
            }
        };
        let control = Control { asker: asker.clone(), connection };
        let server = zlink::Server::new(ReadyListener::new(socket), control);
        let task = async move {
            let served = async {
                if let Err(err) = server.run().await {
                    debug!(error:% = err; "a connection ended badly");
                }
            };
            future::or(served, hang_up(&end)).await;
        };
        executor.spawn(task).detach();
    }
}

/// Waits until a client is gone. The server itself looks for that only while it waits for a call,
/// so without this, one that left a watch would be kept until there is something to tell it.
async fn hang_up(client: &Async<UnixStream>) {
    loop {
        let watched = client.readable().await;
        // Closed on both sides; a client that has only ended its own may still want its answers.
        let mut polled = [PollFd::new(client.as_fd(), PollFlags::empty())];
        let asked = poll(&mut polled, PollTimeout::ZERO);
        let is_gone = polled[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLHUP));
        if watched.is_err() || asked.is_err() || is_gone {
            return;
        }
        // It is the server that reads what is there, and until then it stays readable.
        Timer::after(LOOK_AGAIN).await;
    }
}

/// Answers what a client is going to ask on a connection that it may not have, and hangs up.
fn refuse(mut stream: UnixStream, failure: Failure) {
    let mut text = serde_json::to_vec(&Error::from(failure)).expect("an error has a text form");
    text.push(0);
    // It fits into a new socket's buffer; who does not hear it hears the end.
    let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&text));
}

/// The methods of `io.iohost`; documented at `iohost_control::varlink::Daemon`.
struct Control {
    asker: Asker,
    connection: Connection,
}

impl Control {
    /// Asks the actor, unless this client asks too often.
    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, Failure> {
        self.connection.request()?;
        self.asker.ask(request).await
    }

    fn client(&self) -> Peer {
        self.connection.peer().clone()
    }
}

/// The devices that iohost drives, and sessions with them.
///
/// Every refusal is the error Refused: a stable code, a sentence, and what to do next.
#[zlink::service(
    interface = "io.iohost",
    vendor = "iohost",
    product = "iohost",
    version = env!("CARGO_PKG_VERSION"),
    types = [Device, Service, State, PowerState, Reason, Queue, QueueStatistics, EventKind]
)]
impl Control {
    /// The devices the daemon can see.
    async fn devices(&self) -> Result<DeviceList, Error> {
        Ok(self.ask(Request::Devices).await?)
    }

    /// The daemon and its services.
    async fn status(&self) -> Result<Status, Error> {
        Ok(self.ask(Request::Status).await?)
    }

    /// Takes a device and starts its driver. The address is that of a PCI function, or the name
    /// of a service that is down or quarantined. Answered once the driver runs. With group, the
    /// whole IOMMU group is taken with it or nothing is; with force, also what the machine uses;
    /// with persist, the next daemon takes it again. Each absent for no.
    async fn bind(
        &self,
        address: String,
        group: Option<bool>,
        force: Option<bool>,
        persist: Option<bool>,
    ) -> Result<Bound, Error> {
        let options = BindOptions {
            group: group.unwrap_or_default(),
            force: force.unwrap_or_default(),
            persist: persist.unwrap_or_default(),
        };
        let client = self.client();
        Ok(self.ask(|answer| Request::Bind { device: address, options, client, answer }).await?)
    }

    /// Stops a device's driver, resets the device, and gives it back to its kernel driver.
    async fn unbind(&self, address: String) -> Result<Unbound, Error> {
        let client = self.client();
        Ok(self.ask(|answer| Request::Unbind { device: address, client, answer }).await?)
    }

    /// Reads the configuration and the plugins again, and does what has changed: services begin,
    /// end, or start again, and no other one is disturbed. With a mistake nothing changes.
    async fn reload(&self) -> Result<Reloaded, Error> {
        let client = self.client();
        Ok(self.ask(|answer| Request::Reload { client, answer }).await?)
    }

    /// Puts another version of its driver into a service that runs: the plugin in a file that the
    /// daemon can read. Sessions go on. Answered once the new version runs and is installed; or
    /// refused, with the version before it running as before. For the daemon's own user and for root
    /// alone, since the file becomes code that the daemon starts.
    async fn upgrade(&self, service: String, plugin: String) -> Result<Upgraded, Error> {
        let (plugin, client) = (plugin.into(), self.client());
        Ok(self.ask(|answer| Request::Upgrade { service, plugin, client, answer }).await?)
    }

    /// What a service's driver host counts: its sessions and its dispatch queues.
    async fn statistics(&self, service: String) -> Result<Statistics, Error> {
        Ok(self.ask(|answer| Request::Statistics { service, answer }).await?)
    }

    /// What a service's driver says of itself.
    async fn properties(&self, service: String) -> Result<Properties, Error> {
        Ok(self.ask(|answer| Request::Properties { service, answer }).await?)
    }

    /// Has a service's driver go into a power state. Answered once it has acknowledged that, or
    /// refused with power-late after 20 s.
    async fn power(&self, service: String, state: PowerState) -> Result<Powered, Error> {
        let client = self.client();
        Ok(self.ask(|answer| Request::Power { service, state, client, answer }).await?)
    }

    /// The interface that a service serves.
    async fn describe(&self, service: String) -> Result<Description, Error> {
        Ok(self.ask(|answer| Request::Describe { service, answer }).await?)
    }

    /// Tells of every service that runs, then of every one that begins or ends, until the
    /// connection ends. Asked for without `more`, of one. A client that does not read what it is
    /// told is told no more.
    #[zlink(more)]
    async fn watch(
        &self,
        more: bool,
    ) -> impl Stream<Item = Result<Reply<ServiceEvent>, Error>> + Unpin {
        let events = match self.ask(Request::Watch).await {
            Ok(events) => events.map(Ok).boxed(),
            Err(failure) => stream::once(Err(failure.into())).boxed(),
        };
        let most = if more { usize::MAX } else { 1 };
        events.take(most).map(move |event: Result<ServiceEvent, Error>| {
            event.map(|event| Reply::new(Some(event)).set_continues(Some(more)))
        })
    }

    /// Opens a session. queue_bytes are the bytes of each queue's ring, in the order of the
    /// interface; absent for the default. client_type is the kind of client; absent for the first.
    /// Beside the reply: the session's socket, then for each
    /// queue its memory, its data-available bell and its data-serviced bell: an eventfd to ring, an
    /// epoll set to hear. The session ends when its socket closes.
    #[zlink(return_fds)]
    async fn open(
        &self,
        service: String,
        queue_bytes: Option<Vec<u32>>,
        client_type: Option<u64>,
    ) -> (Result<Opened, Error>, Vec<OwnedFd>) {
        let wanted = (queue_bytes, client_type.unwrap_or_default());
        let client = self.client();
        match self.ask(|answer| Request::Open { service, wanted, client, answer }).await {
            Ok((opened, fds)) => (Ok(opened), fds),
            Err(failure) => (Err(failure.into()), Vec::new()),
        }
    }
}
