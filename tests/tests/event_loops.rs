//! A client's data queues and calls in the program's own loop: epoll, mio, tokio, and futures on two
//! executors. In each loop an end of a queue moves only when its own descriptor says so, through
//! rings that are nearly always full or empty, and hears of the end of the driver.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use edu_api::{DOWNLOAD, UPLOAD};
use iohost_client::{
    AsyncDaemon, EventKind, OSAction, QueueConsumer, QueueError, QueueProducer, Session, WaitError,
};
use iohost_interface::IOReturn;
use iohost_tests::{Emulated, System};
use mio::unix::SourceFd;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

/// Entries that go through the device and come back.
const COUNT: usize = 2000;

/// Bytes of each ring: room for a few entries.
const RING: u32 = 512;

/// After this a loop that waits has lost a wake-up; nothing here takes this long.
const WATCHDOG: Duration = Duration::from_secs(60);

fn entry(number: usize) -> Vec<u8> {
    vec![number as u8; 1 + number % 100]
}

fn is_offline(err: &WaitError) -> bool {
    matches!(err, WaitError::Queue(QueueError::Offline))
}

struct Setup {
    system: System,
    _device: Emulated,
    session: Session,
    upload: QueueProducer,
    download: QueueConsumer,
}

fn setup() -> Setup {
    let (system, device) = System::with_edu();
    let session = system.connect().open_with_queues("edu0", &[RING, RING]).unwrap();
    let upload = session.producer(UPLOAD).unwrap();
    let download = session.consumer(DOWNLOAD).unwrap();
    Setup { system, _device: device, session, upload, download }
}

fn kill_driver(system: &System) {
    let host = system.service("edu0").pid.unwrap();
    kill(Pid::from_raw(host as i32), Signal::SIGKILL).unwrap();
}

/// Ends the service, and the session with it.
fn end_service(system: &System) {
    system.connect().unbind("edu0").unwrap();
}

/// Both ends, and how far they are.
struct Stream {
    upload: QueueProducer,
    download: QueueConsumer,
    sent: usize,
    received: usize,
    buffer: Vec<u8>,
    is_half_done: bool,
}

impl Stream {
    fn new(upload: QueueProducer, download: QueueConsumer) -> Self {
        let is_half_done = false;
        Self { upload, download, sent: 0, received: 0, buffer: Vec::new(), is_half_done }
    }

    /// Once: kills the driver in the middle, which the loop is not to notice.
    fn kill_driver_half_way(&mut self, system: &System) {
        if !self.is_half_done && self.received >= COUNT / 2 {
            self.is_half_done = true;
            kill_driver(system);
        }
    }

    fn send(&mut self) -> Result<(), WaitError> {
        while self.sent < COUNT && self.upload.try_send(&entry(self.sent))? {
            self.sent += 1;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), WaitError> {
        while self.download.try_receive(&mut self.buffer)? {
            assert_eq!(self.buffer, entry(self.received));
            self.received += 1;
        }
        Ok(())
    }

    /// What a loop does with the number of a descriptor that is readable.
    fn advance(&mut self, token: u64) -> Result<(), WaitError> {
        if token == 0 { self.send() } else { self.receive() }
    }
}

fn stream_in_an_epoll_loop(trigger: EpollFlags) {
    let Setup { system, _device, session: _session, upload, download } = setup();
    let mut stream = Stream::new(upload, download);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let flags = EpollFlags::EPOLLIN | trigger;
    epoll.add(&stream.upload, EpollEvent::new(flags, 0)).unwrap();
    epoll.add(&stream.download, EpollEvent::new(flags, 1)).unwrap();
    let mut ready = [EpollEvent::empty(); 2];
    let mut wait = || {
        let timeout = EpollTimeout::try_from(WATCHDOG).unwrap();
        let count = epoll.wait(&mut ready, timeout).unwrap();
        assert!(count > 0, "a wake-up is missing");
        ready.map(|event| event.data())[..count].to_vec()
    };

    stream.send().unwrap();
    stream.receive().unwrap();
    while stream.received < COUNT {
        for token in wait() {
            stream.advance(token).unwrap();
            stream.kill_driver_half_way(&system);
            // Who has nothing to send does not ask for room.
            if token == 0 && stream.sent == COUNT {
                epoll.delete(&stream.upload).unwrap();
            }
        }
    }

    end_service(&system);
    let gone = loop {
        wait();
        if let Err(err) = stream.receive() {
            break err;
        }
    };
    assert!(is_offline(&gone));
    epoll.delete(&stream.download).unwrap();
    // It is readable from now on, for a sender who comes late too.
    epoll.add(&stream.upload, EpollEvent::new(flags, 0)).unwrap();
    assert_eq!(wait(), [0]);
    let gone = loop {
        // Into what room there is, until there is none.
        if let Err(err) = stream.upload.try_send(b"late") {
            break err;
        }
    };
    assert!(is_offline(&gone));
}

#[test]
fn a_plain_epoll_loop_moves_a_queue_across_its_drivers_death_and_hears_of_the_end() {
    stream_in_an_epoll_loop(EpollFlags::empty());
}

#[test]
fn an_edge_triggered_epoll_loop_does_too() {
    stream_in_an_epoll_loop(EpollFlags::EPOLLET);
}

#[test]
fn a_descriptor_is_quiet_once_everything_was_taken() {
    let Setup { system: _system, _device, session: _session, mut upload, mut download } = setup();
    upload.send_within(b"one", WATCHDOG).unwrap();
    download.wait(WATCHDOG).unwrap();
    let mut buffer = Vec::new();
    while download.try_receive(&mut buffer).unwrap() {}
    assert_eq!(buffer, b"one");
    let fd = nix::poll::PollFd::new(download.as_fd(), nix::poll::PollFlags::POLLIN);
    assert_eq!(nix::poll::poll(&mut [fd], 0_u8).unwrap(), 0, "nothing more to say");
}

#[test]
fn mio_moves_a_queue() {
    let Setup { system, _device, session: _session, upload, download } = setup();
    let mut stream = Stream::new(upload, download);
    let mut poll = mio::Poll::new().unwrap();
    for (fd, token) in [(stream.upload.as_raw_fd(), 0), (stream.download.as_raw_fd(), 1)] {
        let registry = poll.registry();
        registry.register(&mut SourceFd(&fd), mio::Token(token), mio::Interest::READABLE).unwrap();
    }
    let mut events = mio::Events::with_capacity(8);
    stream.send().unwrap();
    stream.receive().unwrap();
    while stream.received < COUNT {
        poll.poll(&mut events, Some(WATCHDOG)).unwrap();
        assert!(!events.is_empty(), "a wake-up is missing");
        for event in &events {
            stream.advance(event.token().0 as u64).unwrap();
        }
        stream.kill_driver_half_way(&system);
    }
    end_service(&system);
    let gone = loop {
        poll.poll(&mut events, Some(WATCHDOG)).unwrap();
        assert!(!events.is_empty(), "a wake-up is missing");
        if let Err(err) = stream.receive() {
            break err;
        }
    };
    assert!(is_offline(&gone));
}

/// tokio with its own reactor, and a limit on the time of the whole.
fn on_tokio<T>(task: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(WATCHDOG, task).await }).expect("in time")
}

/// smol's executor, which has no reactor to offer, with the same limit.
fn on_smol<T>(task: impl Future<Output = T>) -> T {
    let late = async {
        smol::Timer::after(WATCHDOG).await;
        None
    };
    smol::block_on(smol::future::or(async { Some(task.await) }, late)).expect("in time")
}

#[test]
#[expect(
    deprecated,
    reason = "the other form is unsafe; a queue owns its descriptor, so this is not"
)]
fn tokio_moves_a_queue_through_its_own_reactor() {
    let Setup { system, _device, session: _session, upload, download } = setup();
    on_tokio(async {
        let mut upload = AsyncFd::new(upload).unwrap();
        let mut download = AsyncFd::new(download).unwrap();
        let sending = async {
            let mut sent = 0;
            loop {
                while sent < COUNT && upload.get_mut().try_send(&entry(sent)).unwrap() {
                    sent += 1;
                }
                if sent == COUNT {
                    return;
                }
                upload.readable_mut().await.unwrap().clear_ready();
            }
        };
        let receiving = async {
            let (mut received, mut buffer) = (0, Vec::new());
            loop {
                let mut ready = download.readable_mut().await.unwrap();
                loop {
                    match ready.get_inner_mut().try_receive(&mut buffer) {
                        Ok(true) => {
                            assert_eq!(buffer, entry(received));
                            received += 1;
                            if received == COUNT / 2 {
                                kill_driver(&system);
                            }
                        }
                        Ok(false) => break,
                        Err(err) => return (received, err),
                    }
                }
                ready.clear_ready();
                if received == COUNT {
                    end_service(&system);
                }
            }
        };
        let ((), (received, gone)) = tokio::join!(sending, receiving);
        assert_eq!(received, COUNT);
        assert!(is_offline(&gone));
    });
}

/// Everything that has a form for tasks, in one go.
async fn everything_async(system: &System) {
    let mut daemon = AsyncDaemon::connect(system.socket()).await.unwrap();
    let mut watch = daemon.watch().await.unwrap();
    let began = watch.next_event().await.unwrap();
    assert_eq!((began.kind, began.service.as_str()), (EventKind::Began, "edu0"));

    let session = daemon.open_with_queues("edu0", &[RING, RING]).await.unwrap();
    let edu = session.client::<edu_api::Client>().unwrap();
    let (three, four) = smol::future::zip(
        async { edu.factorial(3).await },
        // The device computes one at a time, so this one comes after.
        async {
            loop {
                match edu.factorial(4).await {
                    Err(IOReturn::BUSY) => smol::future::yield_now().await,
                    other => return other,
                }
            }
        },
    )
    .await;
    assert_eq!((three, four), (Ok(6), Ok(24)));
    let none = session.map_memory_async(0, None).await.unwrap_err();
    assert!(none.to_string().contains("no memory of type 0"), "{none}");

    let mut upload = session.producer(UPLOAD).unwrap();
    let mut download = session.consumer(DOWNLOAD).unwrap();
    let sending = async {
        for number in 0..COUNT {
            upload.send_async(&entry(number)).await.unwrap();
        }
    };
    let receiving = async {
        let mut buffer = Vec::new();
        for number in 0..COUNT {
            download.receive_async(&mut buffer).await.unwrap();
            assert_eq!(buffer, entry(number));
        }
    };
    smol::future::zip(sending, receiving).await;

    let action = OSAction::<u32>::create().unwrap();
    let handle = action.handle();
    let invoking = async {
        for number in 0..10 {
            handle.invoke(number).unwrap();
            smol::future::yield_now().await;
        }
        drop(handle);
    };
    let taking = async {
        for number in 0..10 {
            assert_eq!(action.next_async().await, Ok(number));
        }
        assert_eq!(action.next_async().await, Err(IOReturn::ABORTED));
    };
    smol::future::zip(taking, invoking).await;

    kill_driver(system);
    let ended = watch.next_event().await.unwrap();
    assert_eq!((ended.kind, ended.incarnation), (EventKind::Ended, 1));
    let began = watch.next_event().await.unwrap();
    assert_eq!((began.kind, began.incarnation), (EventKind::Began, 2));
    assert!(edu.ticks().await.is_ok(), "the next driver answers");
    upload.send_async(b"entry").await.unwrap();
    let mut entry = Vec::new();
    download.receive_async(&mut entry).await.unwrap();
    assert_eq!(entry, b"entry");

    end_service(system);
    let gone = download.receive_async(&mut Vec::new()).await.unwrap_err();
    assert!(is_offline(&gone));
    assert_eq!(edu.ticks().await, Err(IOReturn::OFFLINE));
}

#[test]
fn futures_run_on_smol() {
    let (system, _device) = System::with_edu();
    on_smol(everything_async(&system));
}

#[test]
fn the_same_futures_run_on_tokio() {
    let (system, _device) = System::with_edu();
    on_tokio(everything_async(&system));
}

#[test]
fn a_call_and_a_wait_that_are_given_up_take_nothing() {
    let Setup { system: _system, _device, session, mut upload, mut download } = setup();
    let edu = session.client::<edu_api::Client>().unwrap();
    on_smol(async {
        let mut buffer = Vec::new();
        // Nothing there, so the wait is what is dropped.
        let given_up = smol::future::poll_once(download.receive_async(&mut buffer)).await;
        assert!(given_up.is_none());
        drop(edu.factorial(5));
        upload.send_async(b"entry").await.unwrap();
        download.receive_async(&mut buffer).await.unwrap();
        assert_eq!(buffer, b"entry");
    });
}
