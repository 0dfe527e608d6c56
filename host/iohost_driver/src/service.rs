//! A driver's life, and its clients.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use iohost_interface::{Arguments, IOReturn, ReplySink, ToClient, ToDriver};
use iohost_memory::ring::{Bell, Consumer, HangUp, Ledger, Producer, Ring};

use crate::data_queue::RingEnd;
use crate::{
    ClientMemory, Error, IODispatchQueue, IOPCIDevice, PowerAcknowledgement, PowerState, Result,
    Stopping, abi,
};

/// Why the lock of the open sessions is never poisoned.
const NO_PANIC: &str = "no foreign code runs under this lock";

/// `IOService`: a driver.
///
/// Everything here runs on the driver's default queue, one call at a time.
pub trait IOService: Sized + Send + 'static {
    /// The devices the driver is for.
    const PERSONALITIES: &'static [Personality];

    /// Only drivers of one category compete for a device, and a device has one driver. Most have
    /// the category without a name; one of another is for devices whose configuration says
    /// `category`. At most 63 bytes. `IOMatchCategory`, where DriverKit would run one driver of
    /// each category on a device: ours has one owner.
    const MATCH_CATEGORY: &'static str = "";

    /// What the driver cannot do without. Where a device is reached in a way that lacks it, the
    /// driver is not started, and the reason says so.
    const NEEDS: Needs = Needs::NOTHING;

    /// Whether the driver says itself when clients and other drivers may see it, with
    /// [`ServiceEntry::register`](crate::ServiceEntry::register); said in `start`, that is when `start` has returned. Else they may
    /// as soon as it has started: in DriverKit every driver calls `RegisterService`, and almost all
    /// do so in `Start`.
    const REGISTERS_ITSELF: bool = false;

    /// Starts the driver: returns a working driver, or why there is none. The device was reset
    /// before. Handlers of sources made here run after `start` has returned.
    fn start(device: IOPCIDevice, queue: &IODispatchQueue<Self>) -> Result<Self>;

    /// Quiets the device. Called once, before the driver is dropped. Callers whose replies the
    /// driver still holds are told `ABORTED` when it is.
    fn stop(&mut self) {}

    /// As [`stop`](Self::stop), for a driver that cannot stop at once: it keeps `stopping`, cancels
    /// its sources and drops `stopping` in the last completion. It gets no calls and no news of
    /// sessions meanwhile, only the handlers of its sources, and is dropped after that. The daemon
    /// waits 5 s, then it kills the process. What DriverKit has as `Stop`, which calls that of its
    /// parent when it has finished.
    fn stop_later(&mut self, stopping: Stopping) {
        self.stop();
        drop(stopping);
    }

    /// The power state is to be another one: make the device ready for it, then drop
    /// `acknowledgement`, which may be later. After 20 s without, the operator is told that the
    /// driver is late. `SetPowerState`; its answer `NotReady`, of a driver that acknowledges what it
    /// was not told, cannot come about.
    ///
    /// A driver begins in [`PowerState::On`]. The host does not touch the device's own power state.
    fn set_power_state(&mut self, state: PowerState, acknowledgement: PowerAcknowledgement) {
        let _ = (state, acknowledgement);
    }

    /// The process of a session's client has died, and did not close the session, which is told
    /// next. `ClientCrashed`.
    fn client_crashed(&mut self, session: SessionId) {
        let _ = session;
    }

    /// Another version of the driver is to take this one's place (`iohost upgrade`): what it has to
    /// know. Called before [`stop`](Self::stop), when every call was answered; clients wait meanwhile.
    ///
    /// Also without it nothing of a session is lost but what the driver itself knows of it.
    fn save(&mut self) -> Option<SavedState> {
        None
    }

    /// What the version before this one saved; right after [`start`](Self::start), before the sessions
    /// come. Its version may be any: one that this driver does not know it can do without.
    ///
    /// With an error the driver has not started, and the version before it is started again, with the
    /// same.
    fn restore(&mut self, state: SavedState) -> Result<()> {
        drop(state);
        Ok(())
    }

    /// A client opened a session; its data queues are in `session`. An error refuses it.
    ///
    /// Called too, right after the start, for each session that survived the driver before this one:
    /// [`Session::generation`] tells. The queues are as that one left them. Calls of the client that
    /// were not begun come again. An error ends such a session.
    fn session_opened(&mut self, session: Session) -> Result<()> {
        drop(session);
        Ok(())
    }

    /// A client wants to map memory of the driver's, by a number that driver and client agree on.
    /// `CopyClientMemoryForType`. The same type has to lead to the same memory each time.
    ///
    /// Any error reaches the client as `BAD_ARGUMENT`, as in DriverKit. Unless a driver says
    /// otherwise there is no memory of any type.
    fn copy_client_memory_for_type(
        &mut self,
        session: SessionId,
        memory_type: u64,
    ) -> Result<ClientMemory> {
        let _ = (session, memory_type);
        Err(Error::new(IOReturn::UNSUPPORTED, "no memory for clients"))
    }

    /// A session that was accepted is over: drop what belongs to it.
    fn session_closed(&mut self, session: SessionId) {
        let _ = session;
    }
}

/// What one version of a driver leaves to the next: 16 MiB at the most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// Of the data's form, as the driver counts them.
    pub version: u32,
    /// In a form that only versions of the driver know.
    pub data: Vec<u8>,
}

/// Devices a driver is for. What it names has all to agree; alternatives are personalities of
/// their own.
///
/// Of several drivers the one that names most of the device wins, unless a
/// [score](Self::with_probe_score) says otherwise; `iohost status` shows who competed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Personality {
    dwords: abi::Personality,
    score: i32,
}

/// Nothing of it counts.
pub(crate) const ANY_DEVICE: abi::Personality = abi::Personality {
    primary: 0,
    primary_mask: 0,
    subsystem: 0,
    subsystem_mask: 0,
    class: 0,
    class_mask: 0,
};

impl Personality {
    /// A PCI function by vendor and device id. `IOPCIPrimaryMatch`.
    pub const fn pci(vendor: u16, device: u16) -> Self {
        Self::pci_masked((device as u32) << 16 | vendor as u32, u32::MAX)
    }

    /// PCI functions whose first dword of configuration space (device id in the upper half, vendor
    /// id in the lower) has these bits. `IOPCIPrimaryMatch` with a mask.
    pub const fn pci_masked(ids: u32, mask: u32) -> Self {
        let dwords = abi::Personality { primary: ids, primary_mask: mask, ..ANY_DEVICE };
        Self { dwords, score: 0 }
    }

    /// PCI functions by class, subclass and programming interface: 24 bits. `IOPCIClassMatch`.
    pub const fn pci_class(class: u32) -> Self {
        Self { dwords: ANY_DEVICE, score: 0 }.with_class(class, 0xff_ffff)
    }

    /// Of these, only those of this class, in the bits of `mask`, 24 each. `IOPCIClassMatch` with
    /// a mask.
    pub const fn with_class(mut self, class: u32, mask: u32) -> Self {
        assert!(class <= 0xff_ffff && mask <= 0xff_ffff, "a class code has 24 bits");
        self.dwords.class = class << 8 | self.dwords.class & 0xff;
        self.dwords.class_mask = mask << 8 | self.dwords.class_mask & 0xff;
        self
    }

    /// Of these, only those of this revision. `IOPCIClassMatch` with a mask of the lower 8 bits.
    pub const fn with_revision(mut self, revision: u8) -> Self {
        self.dwords.class = self.dwords.class & 0xffff_ff00 | revision as u32;
        self.dwords.class_mask |= 0xff;
        self
    }

    /// Of these, only those with these subsystem ids. `IOPCISecondaryMatch`.
    pub const fn with_subsystem(mut self, vendor: u16, device: u16) -> Self {
        self.dwords.subsystem = (device as u32) << 16 | vendor as u32;
        self.dwords.subsystem_mask = u32::MAX;
        self
    }

    /// What the driver is worth beyond how closely it fits: a device's id alone is worth 1000.
    /// `IOProbeScore`.
    pub const fn with_probe_score(mut self, score: i32) -> Self {
        self.score = score;
        self
    }

    pub(crate) const fn for_abi(self) -> (abi::Personality, i32) {
        (self.dwords, self.score)
    }
}

/// What a driver cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    pub(crate) dma_bytes: u64,
    pub(crate) messages: bool,
}

impl Needs {
    /// Any device will do, however it is reached.
    pub const NOTHING: Self = Self { dma_bytes: 0, messages: false };

    /// Memory that the device reaches: the most at a time, in bytes. The daemon compares it with
    /// what its processes may lock (`RLIMIT_MEMLOCK`) before it opens the device.
    pub const fn dma(self, most_bytes: usize) -> Self {
        Self { dma_bytes: most_bytes as u64, ..self }
    }

    /// Interrupts by message, MSI or MSI-X.
    pub const fn messages(self) -> Self {
        Self { messages: true, ..self }
    }
}

/// The number of a session; never used twice while a driver runs.
pub type SessionId = u64;

/// A client's session, as the driver first sees it.
pub struct Session {
    id: SessionId,
    generation: u64,
    client_type: u64,
    ends: Vec<Option<SessionEnds>>,
    ledger: Option<Ledger>,
    hang_up: HangUp,
}

/// A session, as it comes from the host.
pub(crate) struct OfferedSession {
    pub(crate) id: SessionId,
    pub(crate) client_type: u64,
    pub(crate) generation: u64,
    pub(crate) ends: Vec<Option<SessionEnds>>,
    pub(crate) ledger: Option<OwnedFd>,
}

/// What a data queue consists of, before one end of it is taken.
pub(crate) struct SessionEnds {
    pub(crate) bytes: u32,
    pub(crate) memory: OwnedFd,
    pub(crate) available: OwnedFd,
    pub(crate) serviced: OwnedFd,
}

/// One end of a data queue, for [`IODataQueueDispatchSource`](crate::IODataQueueDispatchSource).
///
/// When the session is over, its client has closed it or has died. From then on, and before
/// [`IOService::session_closed`], the end says [`QueueError::Offline`](crate::QueueError::Offline)
/// once nothing is left to be read, or there is no room left.
pub struct QueueEnd<End> {
    pub(crate) end: End,
    pub(crate) doorbell: OwnedFd,
}

impl Session {
    /// The session's number.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Which driver this is for the session: 1 when it is new, one more after each driver that died
    /// and left it behind. What that one knew of the session is gone.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Which kind of client this is: the place of its interface in
    /// [`export_driver!`](crate::export_driver), from 0. The `type` of `NewUserClient`.
    pub fn client_type(&self) -> u64 {
        self.client_type
    }

    /// The driver's end of a queue that the client puts entries in. Once.
    ///
    /// Errors: `NOT_FOUND` when the session has no such queue or its end was taken,
    /// `IPC_ERROR` when its memory is not usable.
    pub fn consumer(&mut self, queue: ToDriver) -> Result<QueueEnd<Consumer>> {
        let ends = self.take(queue.0)?;
        let mut end: QueueEnd<Consumer> =
            ends.end(&self.hang_up, |available, serviced| (serviced, available))?;
        if let Some(ledger) = &self.ledger {
            end.end = end.end.noted_in(ledger, queue.0);
        }
        Ok(end)
    }

    /// The driver's end of a queue that the client takes entries from. Once.
    ///
    /// Errors: as [`consumer`](Self::consumer).
    pub fn producer(&mut self, queue: ToClient) -> Result<QueueEnd<Producer>> {
        let ends = self.take(queue.0)?;
        let mut end: QueueEnd<Producer> =
            ends.end(&self.hang_up, |available, serviced| (available, serviced))?;
        if let Some(ledger) = &self.ledger {
            end.end = end.end.noted_in(ledger, queue.0);
        }
        Ok(end)
    }

    fn take(&mut self, place: usize) -> Result<SessionEnds> {
        let ends = self.ends.get_mut(place).and_then(Option::take);
        ends.ok_or_else(|| {
            Error::new(IOReturn::NOT_FOUND, format!("no data queue {place} to take"))
        })
    }
}

impl SessionEnds {
    /// `roles(available, serviced)`: which one this end rings, and which one rings for it.
    fn end<End: RingEnd>(
        self,
        hang_up: &HangUp,
        roles: impl FnOnce(OwnedFd, OwnedFd) -> (OwnedFd, OwnedFd),
    ) -> Result<QueueEnd<End>> {
        let unusable = |err: &dyn fmt::Display| Error::new(IOReturn::IPC_ERROR, err.to_string());
        let (rings, doorbell) = roles(self.available, self.serviced);
        let ring =
            Ring::attach(self.memory, u64::from(self.bytes)).map_err(|err| unusable(&err))?;
        let end = End::of(ring.until(hang_up.clone()), Bell::from(rings))
            .map_err(|err| unusable(&err))?;
        Ok(QueueEnd { end, doorbell })
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<End> fmt::Debug for QueueEnd<End> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QueueEnd")
    }
}

/// What [`export_driver!`](crate::export_driver) adds to a driver.
pub trait Exported: IOService {
    /// The descriptor, for a host that has the driver linked in.
    fn descriptor() -> &'static abi::DriverDescriptor;

    /// The description of the interface for a kind of client, if the driver serves one.
    fn description(client_type: u64) -> Option<String>;

    /// Hands a call of such a client to the interface.
    fn serve(
        &mut self,
        client_type: u64,
        selector: u64,
        arguments: Arguments,
        sink: Box<dyn ReplySink>,
    );
}

/// A started driver, as the ABI holds it.
pub(crate) struct Instance<D: Exported> {
    queue: IODispatchQueue<D>,
    /// Of the sessions that are open.
    hang_ups: Mutex<HashMap<SessionId, HangUp>>,
    /// It was told to stop.
    stop_begun: AtomicBool,
}

impl<D: Exported> Instance<D> {
    pub(crate) fn start(device: abi::Device, queue: abi::Queue) -> Result<Self> {
        let queue = IODispatchQueue::without_state(queue);
        let driver = D::start(IOPCIDevice::new(device), &queue)?;
        queue.replace_state(Some(driver));
        Ok(Self { queue, hang_ups: Mutex::default(), stop_begun: AtomicBool::new(false) })
    }

    pub(crate) fn queue(&self) -> &abi::Queue {
        self.queue.raw()
    }

    pub(crate) fn begin_stop(&self, owed: abi::Acknowledgement) {
        self.stop_begun.store(true, Relaxed);
        let _ = self.queue.enter(|driver| driver.stop_later(Stopping(owed)));
    }

    pub(crate) fn set_power_state(&self, state: u32, owed: abi::Acknowledgement) {
        let acknowledgement = PowerAcknowledgement(owed);
        match PowerState::from_flags(state) {
            Some(state) => {
                let _ = self.queue.enter(|it| it.set_power_state(state, acknowledgement));
            }
            None => log::warn!("the host has a power state {state:#x} that this driver has not"),
        }
    }

    pub(crate) fn client_crashed(&self, session: u64) {
        let _ = self.queue.enter(|driver| driver.client_crashed(session));
    }

    /// Ends a driver, which has been told to stop or is told now.
    pub(crate) fn stop(&self) {
        if !self.stop_begun.swap(true, Relaxed) {
            let _ = self.queue.enter(IOService::stop);
        }
        // Dropped here, on the queue and outside of the state's lock: sources end, replies that
        // are still owed say `ABORTED`.
        drop(self.queue.replace_state(None));
    }

    pub(crate) fn save(&self) -> Option<SavedState> {
        self.queue.enter(IOService::save).ok().flatten()
    }

    pub(crate) fn restore(&self, state: SavedState) -> i32 {
        let restored = self.queue.enter(|driver| driver.restore(state));
        let restored = restored.map_err(Error::from).flatten();
        if let Err(err) = &restored {
            self.queue().failed(&err.to_string());
        }
        IOReturn::code(&restored.map_err(|err| err.code()))
    }

    pub(crate) fn call(
        &self,
        client_type: u64,
        selector: u64,
        arguments: Arguments,
        sink: Box<dyn ReplySink>,
    ) {
        // When the driver is stopped the sink is dropped with the closure, which answers.
        let _ = self.queue.enter(|driver| driver.serve(client_type, selector, arguments, sink));
    }

    pub(crate) fn session_opened(&self, offered: OfferedSession) -> i32 {
        let hang_up = HangUp::default();
        let OfferedSession { id, client_type, generation, ends, ledger } = offered;
        let ledger = ledger.map(Ledger::attach).transpose();
        let ledger = ledger.map_err(|err| Error::new(IOReturn::IPC_ERROR, err.to_string()));
        let opened = ledger.and_then(|ledger| {
            let hang_up = hang_up.clone();
            let session = Session { id, generation, client_type, ends, ledger, hang_up };
            self.queue.enter(|driver| driver.session_opened(session)).map_err(Error::from).flatten()
        });
        match &opened {
            Ok(()) => drop(self.hang_ups.lock().expect(NO_PANIC).insert(id, hang_up)),
            Err(err) => {
                hang_up.set();
                log::warn!("session refused: {err}");
            }
        }
        IOReturn::code(&opened.map_err(|err| err.code()))
    }

    pub(crate) fn copy_client_memory(
        &self,
        session: u64,
        memory_type: u64,
    ) -> std::result::Result<abi::ClientMemory, IOReturn> {
        let copied = self
            .queue
            .enter(|driver| driver.copy_client_memory_for_type(session, memory_type))
            .map_err(Error::from)
            .flatten();
        copied.map(ClientMemory::into_abi).map_err(|err| {
            log::debug!("no memory of type {memory_type} for a client: {err}");
            err.code()
        })
    }

    pub(crate) fn session_closed(&self, session: u64) {
        if let Some(hang_up) = self.hang_ups.lock().expect(NO_PANIC).remove(&session) {
            hang_up.set();
        }
        let _ = self.queue.enter(|driver| driver.session_closed(session));
    }
}

impl<D: Exported> Drop for Instance<D> {
    /// Stops a driver that could not be stopped on its queue because it cancelled that. Its
    /// state refers to the queue, which owns the state, so it would never be freed.
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes the crate a plugin: exports `$driver`, and serves its clients the interface of the
/// module or crate `$interface`, for which the driver implements `$interface::Server`.
///
/// ```ignore
/// iohost_driver::export_driver!(Edu, serves edu_api);
/// ```
///
/// With more interfaces than one there are as many kinds of clients. A program says which it is when
/// it opens its session, 0 for the first; a number that no interface has is refused `UNSUPPORTED`.
///
/// ```ignore
/// iohost_driver::export_driver!(Edu, serves edu_api, edu_maintenance_api);
/// ```
///
/// A driver that is `linked` is no plugin, but is handed to the host by its own program, which may
/// have any number of them. It serves no interface.
///
/// ```ignore
/// iohost_driver::export_driver!(Lender, linked);
/// ```
#[macro_export]
macro_rules! export_driver {
    ($driver:ty) => {
        $crate::export_driver!(@export $driver);
        $crate::export_driver!(@serves_nobody $driver);
    };
    ($driver:ty, linked) => {
        static DESCRIPTOR: $crate::expansion::DriverDescriptor =
            $crate::expansion::descriptor::<$driver>(
                ::std::env!("CARGO_PKG_NAME"),
                $crate::expansion::BUILT_WITH,
            );
        $crate::export_driver!(@serves_nobody $driver);
    };
    (@serves_nobody $driver:ty) => {
        impl $crate::Exported for $driver {
            $crate::export_driver!(@descriptor);

            fn description(_: u64) -> ::std::option::Option<::std::string::String> {
                ::std::option::Option::None
            }

            fn serve(
                &mut self,
                _: u64,
                _: u64,
                _: $crate::expansion::Arguments,
                sink: ::std::boxed::Box<dyn $crate::ReplySink>,
            ) {
                sink.deliver(::std::result::Result::Err($crate::IOReturn::UNSUPPORTED));
            }
        }
    };
    ($driver:ty, serves $($interface:ident),+) => {
        $crate::export_driver!(@export $driver);

        impl $crate::Exported for $driver {
            $crate::export_driver!(@descriptor);

            fn description(
                client_type: u64,
            ) -> ::std::option::Option<::std::string::String> {
                let kinds: &[fn() -> ::std::string::String] = &[$($interface::description),+];
                ::std::option::Option::Some(kinds.get(client_type as usize)?())
            }

            fn serve(
                &mut self,
                client_type: u64,
                selector: u64,
                arguments: $crate::expansion::Arguments,
                sink: ::std::boxed::Box<dyn $crate::ReplySink>,
            ) {
                type Serve<Driver> = fn(
                    &mut Driver,
                    u64,
                    $crate::expansion::Arguments,
                    ::std::boxed::Box<dyn $crate::ReplySink>,
                );
                let kinds: &[Serve<Self>] = &[$(|driver, selector, arguments, sink| {
                    $interface::serve(driver, selector, arguments, sink)
                }),+];
                match kinds.get(client_type as usize) {
                    ::std::option::Option::Some(serve) => serve(self, selector, arguments, sink),
                    ::std::option::Option::None => {
                        sink.deliver(::std::result::Result::Err($crate::IOReturn::UNSUPPORTED));
                    }
                }
            }
        }
    };
    (@export $driver:ty) => {
        /// What the host reads from the file.
        #[unsafe(export_name = "iohost_driver")]
        static DESCRIPTOR: $crate::expansion::DriverDescriptor =
            $crate::expansion::descriptor::<$driver>(
                ::std::env!("CARGO_PKG_NAME"),
                $crate::expansion::BUILT_WITH,
            );
    };
    (@descriptor) => {
        fn descriptor() -> &'static $crate::expansion::DriverDescriptor {
            &DESCRIPTOR
        }
    };
}
