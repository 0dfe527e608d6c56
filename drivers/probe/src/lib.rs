//! A driver that does nothing with its device, and with its clients what they ask it to: for
//! tests of what runs between a driver and a client.
//!
//! It takes the `edu` device, since that is the one every test can have.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use iohost_driver::prelude::*;
use iohost_driver::{
    ClientMemory, Consumer, DeviceEvent, DeviceEventSource, IOMemoryDescriptor,
    IOServiceNotificationDispatchSource, Producer, Properties, Results, SavedState,
    ServiceMatching, ServiceNotification, Stopping,
};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{Signal, raise};
use probe_api::{echo, registering};

mod regs {
    use iohost_driver::register_map;

    register_map! {
        /// The start of BAR 0.
        pub struct First[0x4] {
            0x00 Ro FIRST: u32,
        }
    }
}

/// The command register of configuration space, and its bit that has the device decode memory.
const COMMAND: u64 = 0x04;
const MEMORY_SPACE: u16 = 0x0002;

/// Stands in the plugin's file once.
#[used]
static HOW_IT_STARTS: [u8; 24] = probe_api::HOW_IT_STARTS;

/// How this version starts; read from memory, since a test may have changed the file.
fn how_it_starts() -> u8 {
    std::hint::black_box(&HOW_IT_STARTS)[probe_api::HOW]
}

/// The form of what is saved.
const SAVED: u32 = 1;

/// The probe. Everything here runs on its default queue.
pub struct Probe {
    queue: IODispatchQueue<Self>,
    device: IOPCIDevice,
    _device_events: DeviceEventSource,
    events: Vec<DeviceEvent>,
    bar: Option<Bar<regs::First>>,
    /// Actions of clients.
    kept: Vec<Action<(u32, Vec<u8>)>>,
    /// Actions of ours that clients were given.
    offered: Vec<OSAction<u32>>,
    noted: Vec<u32>,
    aborted: u32,
    services: Option<IOServiceNotificationDispatchSource>,
    news: Vec<String>,
    /// Replies that are never given.
    held: Vec<Reply<()>>,
    crashed_clients: u32,
    stop_timer: IOTimerDispatchSource,
    stop_after: u32,
    stopping: Option<Stopping>,
    counted: u64,
    /// By type.
    memory: [IOBufferMemoryDescriptor; 2],
    echoes: BTreeMap<SessionId, Echo>,
    given_back: u64,
    leaked_memory: Vec<Vec<u8>>,
    leaked_descriptors: Vec<EventFd>,
}

/// Both queues of a session of type [`ECHO`].
struct Echo {
    upload: IODataQueueDispatchSource<Consumer>,
    download: IODataQueueDispatchSource<Producer>,
}

/// The place of `echo` among the interfaces.
const ECHO: u64 = 2;

/// What memory is leaked by.
const LEAKED_BYTES: usize = 1 << 20;

impl IOService for Probe {
    const PERSONALITIES: &'static [Personality] = &[Personality::pci(0x1234, 0x11e8)];

    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self> {
        match how_it_starts() {
            b'e' => return Err(Error::new(IOReturn::NO_DEVICE, "this version does not start")),
            b'p' => panic!("this version panics"),
            b'x' => std::process::exit(9),
            b'h' => loop {
                std::thread::park();
            },
            _ => {}
        }
        let note = |probe: &mut Self, event| probe.events.push(event);
        Ok(Self {
            queue: queue.clone(),
            _device_events: DeviceEventSource::create(&device, queue, note)?,
            device,
            events: Vec::new(),
            bar: None,
            kept: Vec::new(),
            offered: Vec::new(),
            noted: Vec::new(),
            aborted: 0,
            services: None,
            news: Vec::new(),
            held: Vec::new(),
            crashed_clients: 0,
            stop_timer: IOTimerDispatchSource::create(queue, |probe: &mut Self, _| {
                probe.stopping = None;
            })?,
            stop_after: 0,
            stopping: None,
            counted: 0,
            memory: [
                IOBufferMemoryDescriptor::create(probe_api::MEMORY_BYTES)?,
                IOBufferMemoryDescriptor::create(probe_api::MEMORY_BYTES)?,
            ],
            echoes: BTreeMap::new(),
            given_back: 0,
            leaked_memory: Vec::new(),
            leaked_descriptors: Vec::new(),
        })
    }

    fn stop_later(&mut self, stopping: Stopping) {
        let clock = IOTimerClock::UptimeRaw;
        let time = self.queue.now(clock) + 1_000_000 * u64::from(self.stop_after);
        // Without a timer the stop is complete at once.
        if self.stop_after > 0 && self.stop_timer.wake_at_time(clock, time, 0).is_ok() {
            info!("stopping, slowly");
            self.stopping = Some(stopping);
        }
    }

    fn session_opened(&mut self, mut session: Session) -> Result<()> {
        if session.client_type() == ECHO {
            let upload = session.consumer(echo::UPLOAD)?;
            let download = session.producer(echo::DOWNLOAD)?;
            let upload = IODataQueueDispatchSource::create(upload, &self.queue, Self::pump)?;
            let download = IODataQueueDispatchSource::create(download, &self.queue, Self::pump)?;
            self.echoes.insert(session.id(), Echo { upload, download });
        }
        Ok(())
    }

    fn session_closed(&mut self, session: SessionId) {
        self.echoes.remove(&session);
    }

    fn client_crashed(&mut self, _session: SessionId) {
        self.crashed_clients += 1;
    }

    fn save(&mut self) -> Option<SavedState> {
        Some(SavedState { version: SAVED, data: self.counted.to_ne_bytes().into() })
    }

    fn restore(&mut self, state: SavedState) -> Result<()> {
        let unusable = || Error::new(IOReturn::UNSUPPORTED, "a state of another form");
        if state.version != SAVED || how_it_starts() == b'r' {
            return Err(unusable());
        }
        self.counted = u64::from_ne_bytes(state.data.try_into().map_err(|_| unusable())?);
        Ok(())
    }

    fn copy_client_memory_for_type(
        &mut self,
        _session: SessionId,
        memory_type: u64,
    ) -> Result<ClientMemory> {
        match memory_type {
            probe_api::SHARED => ClientMemory::read_write(self.memory(memory_type)?),
            probe_api::PUBLISHED => ClientMemory::read_only(self.memory(memory_type)?),
            _ => Err(Error::new(IOReturn::NOT_FOUND, "the probe has two")),
        }
    }
}

impl probe_api::Server for Probe {
    fn subscribe(&mut self, action: Action<(u32, Vec<u8>)>, reply: Reply<()>) {
        self.kept.push(action);
        reply.complete(());
    }

    fn complete(&mut self, count: u32, bytes: u32, reply: Reply<u32>) {
        let mut accepted = 0;
        for number in 0..count {
            for action in &self.kept {
                let invoked = action.invoke((number, vec![number as u8; bytes as usize]));
                accepted += u32::from(invoked.is_ok());
            }
        }
        reply.complete(accepted);
    }

    fn forget(&mut self, reply: Reply<()>) {
        self.kept.clear();
        reply.complete(());
    }

    fn offer(&mut self, reply: Reply<Action<u32>>) {
        reply.finish(self.make_action().map_err(|err| err.code()));
    }

    fn noted(&mut self, reply: Reply<Vec<u8>>) {
        reply.complete(self.noted.iter().flat_map(|number| number.to_ne_bytes()).collect());
    }

    fn aborted(&mut self, reply: Reply<u32>) {
        reply.complete(self.aborted);
    }

    fn cancel(&mut self, reply: Reply<u64>) {
        for action in &self.offered {
            action.cancel(&self.queue, |_| {});
        }
        reply.complete(self.offered.iter().map(OSAction::dropped).sum());
    }

    fn watch(&mut self, interface: String, reply: Reply<()>) {
        let matching = ServiceMatching::Interface(interface);
        let source = IOServiceNotificationDispatchSource::create(
            matching,
            &self.queue,
            Self::services_ready,
        );
        reply.finish(source.map(|source| self.services = Some(source)).map_err(|err| err.code()));
    }

    fn news(&mut self, reply: Reply<String>) {
        reply.complete(self.news.join(" "));
    }

    fn hold(&mut self, reply: Reply<()>) {
        self.held.push(reply);
    }

    fn peek(&mut self, memory: u64, offset: u32, len: u32, reply: Reply<Vec<u8>>) {
        let mut data = vec![0; len as usize];
        let read = self.memory(memory).and_then(|it| it.read_at(offset as usize, &mut data));
        reply.finish(read.map(|()| data).map_err(|err| err.code()));
    }

    fn reverse(&mut self, from: u64, to: u64, reply: Reply<u64>) {
        let reversed = Self::reverse_memory(&reply, from, to);
        reply.finish(reversed.map_err(|err| err.code()));
    }

    fn look_for_memory_of_held(&mut self, memory: u64, reply: Reply<i32>) {
        let Some(held) = self.held.first() else { return reply.fail(IOReturn::NOT_FOUND) };
        let found = IOMemoryDescriptor::from_client(held, memory);
        reply.complete(found.map_or_else(|err| err.code().0, |_| 0));
    }

    fn poke(&mut self, memory: u64, offset: u32, data: Vec<u8>, reply: Reply<()>) {
        let memory = self.memory.get_mut(memory as usize);
        let memory = memory.ok_or(IOReturn::NOT_FOUND);
        reply.finish(
            memory.and_then(|it| it.write_at(offset as usize, &data).map_err(|err| err.code())),
        );
    }

    fn hang(&mut self, reply: Reply<()>) {
        reply.complete(());
        loop {
            std::thread::park();
        }
    }

    fn crashed_clients(&mut self, reply: Reply<u32>) {
        reply.complete(self.crashed_clients);
    }

    fn describe(&mut self, colour: String, reply: Reply<()>) {
        let service = self.queue.service();
        let properties = Properties::from_iter([("colour".to_owned(), colour.into())]);
        let described = service.set_properties(properties);
        let described = described.and_then(|()| service.adjust_busy(1));
        reply.finish(described.map_err(|err| err.code()));
    }

    fn stop_after(&mut self, milliseconds: u32, reply: Reply<()>) {
        self.stop_after = milliseconds;
        reply.complete(());
    }

    fn terminate(&mut self, reply: Reply<()>) {
        reply.finish(self.queue.service().terminate(0).map_err(|err| err.code()));
    }

    fn die(&mut self, how: u32, _reply: Reply<()>) {
        match how {
            0 => segfault(),
            1 => std::process::abort(),
            2 => panic!("the probe was asked to"),
            _ => std::process::exit(3),
        }
    }

    fn spin(&mut self, milliseconds: u64, progress: u32, reply: Reply<()>) {
        let (start, time) = (Instant::now(), Duration::from_millis(milliseconds));
        while milliseconds == 0 || start.elapsed() < time {
            if progress != 0 {
                self.queue.report_progress();
            }
            std::thread::yield_now();
        }
        reply.complete(());
    }

    fn scribble(&mut self, byte: u32, reply: Reply<()>) {
        let file = recorder_file().and_then(|file| {
            let file = OpenOptions::new().write(true).open(file)?;
            let len = file.metadata()?.len() as usize;
            file.write_all_at(&vec![byte as u8; len], 0)
        });
        match file {
            Ok(()) => segfault(),
            Err(err) => {
                error!("no flight recorder to write to: {err}");
                reply.fail(IOReturn::NOT_FOUND);
            }
        }
    }

    fn count(&mut self, reply: Reply<u64>) {
        self.counted += 1;
        reply.complete(self.counted);
    }

    fn leak(&mut self, what: u32, reply: Reply<u32>) {
        if what == 0 {
            loop {
                self.leaked_memory.push(vec![1; LEAKED_BYTES]);
            }
        }
        while let Ok(descriptor) = EventFd::new() {
            self.leaked_descriptors.push(descriptor);
        }
        reply.complete(self.leaked_descriptors.len() as u32);
    }

    fn version(&mut self, reply: Reply<u32>) {
        reply.complete(u32::from(how_it_starts()));
    }

    fn events(&mut self, reply: Reply<String>) {
        let events: Vec<String> = self.events.iter().map(|event| format!("{event:?}")).collect();
        reply.complete(events.join(" "));
    }

    fn register(&mut self, reply: Reply<u32>) {
        let bar = match self.bar.take() {
            Some(bar) => Ok(bar),
            None => self.device.map_bar(0),
        };
        let read = bar.map(|bar| self.bar.insert(bar).read(regs::FIRST));
        reply.finish(read.map_err(|err| err.code()));
    }

    fn decode(&mut self, on: u32, reply: Reply<()>) {
        let command = self.device.configuration_read16(COMMAND);
        let command = if on == 0 { command & !MEMORY_SPACE } else { command | MEMORY_SPACE };
        self.device.configuration_write16(COMMAND, command);
        reply.complete(());
    }
}

/// Ends the process as a wild pointer does.
fn segfault() -> ! {
    loop {
        // The first one is taken by the standard library, which looks whether the stack ran over.
        let _ = raise(Signal::SIGSEGV);
    }
}

/// The memory of this process's flight recorder, as a driver can find it that means harm.
fn recorder_file() -> std::io::Result<PathBuf> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().contains("iohost-flight-recorder") {
            return Ok(path);
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}

impl Probe {
    fn reverse_memory<T: Results>(reply: &Reply<T>, from: u64, to: u64) -> Result<u64> {
        let (from, to) = (
            IOMemoryDescriptor::from_client(reply, from)?,
            IOMemoryDescriptor::from_client(reply, to)?,
        );
        let mut bytes = vec![0; from.length() as usize];
        from.read_at(0, &mut bytes)?;
        bytes.reverse();
        to.write_at(0, &bytes)?;
        Ok(from.length())
    }

    /// Gives back what is there, as far as there is room.
    fn pump(&mut self) {
        for Echo { upload, download } in self.echoes.values_mut() {
            while let Ok(entry) = upload.peek(|entry| entry.to_vec())
                && download.exchange(upload, &entry).is_ok()
            {
                self.given_back += 1;
            }
        }
    }

    fn memory(&self, memory_type: u64) -> Result<&IOBufferMemoryDescriptor> {
        let memory = self.memory.get(memory_type as usize);
        memory.ok_or_else(|| Error::new(IOReturn::NOT_FOUND, "the probe has two"))
    }

    fn make_action(&mut self) -> Result<Action<u32>> {
        let action = OSAction::create(&self.queue, (), |probe: &mut Self, (), number| {
            probe.noted.push(number);
        })?;
        action.set_aborted_handler(&self.queue, |probe| probe.aborted += 1);
        let handle = action.handle();
        self.offered.push(action);
        Ok(handle)
    }

    fn services_ready(&mut self) {
        let Some(services) = &self.services else { return };
        services.deliver_notifications(|kind, service| {
            let sign = match kind {
                ServiceNotification::Terminated => '-',
                ServiceNotification::Matched => '+',
            };
            self.news.push(format!("{sign}{}", service.name));
        });
    }
}

impl registering::Server for Probe {
    fn client_type(&mut self, reply: Reply<u32>) {
        reply.complete(1);
    }
}

impl echo::Server for Probe {
    fn given_back(&mut self, reply: Reply<u64>) {
        reply.complete(self.given_back);
    }
}

iohost_driver::export_driver!(Probe, serves probe_api, registering, echo);
