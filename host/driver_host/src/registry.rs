//! The registry of a driver's process: its device, the driver's own entry, and those it makes.
//!
//! What a driver says of itself is kept here and told on: names, properties, whether it is busy,
//! whether others may see it. Entries are known by numbers that are never used again.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Mutex, MutexGuard};

use iohost_dispatch::Queue;
use iohost_interface::IOReturn;
use serde_json::{Map, Value};

/// A dictionary of properties.
pub type Properties = Map<String, Value>;

/// The longest name in bytes: an `IOServiceName` has 128 with its end.
const LONGEST_NAME: usize = 127;

/// The most entries a driver has at a time.
const MOST_ENTRIES: usize = 4096;

/// The most bytes that the driver's properties of one entry have as text.
const MOST_PROPERTY_BYTES: usize = 16 * 1024;

/// The option of `SearchProperty` that goes on with the providers.
const SEARCH_PARENTS: u64 = 1;

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no foreign code runs under this lock";

/// What the daemon is told of a driver that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Clients and other drivers may see it.
    Registered,
    /// It became busy, or idle.
    Busy(bool),
    /// It wants to end.
    Terminate,
}

/// The registry of one driver. Callable from any thread.
pub struct Registry {
    known: Mutex<Known>,
    /// Held while `tell` runs, so that what is told comes in its order.
    tell: Mutex<Option<Tell>>,
}

type Tell = Box<dyn FnMut(Told) + Send>;

struct Known {
    device: u64,
    own: u64,
    next: u64,
    entries: BTreeMap<u64, Entry>,
    phase: Phase,
    /// Queues by the names that the driver gave them.
    queues: HashMap<String, Queue>,
}

/// Where the driver is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Started,
    Stopped,
}

#[derive(Default)]
struct Entry {
    provider: Option<u64>,
    name: Option<String>,
    /// What the host says of it.
    given: Properties,
    /// What the driver says.
    own: Properties,
    /// Its own count, and one for each busy entry that it provides for.
    busy: u32,
    is_registered: bool,
}

impl Entry {
    fn merged(&self) -> Properties {
        let mut merged = self.given.clone();
        merged.extend(self.own.clone());
        merged
    }

    fn property(&self, name: &str) -> Option<&Value> {
        self.own.get(name).or_else(|| self.given.get(name))
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::starting_at(0)
    }
}

impl Registry {
    /// A registry with a device and a driver that has not started. Numbers are higher than `base`.
    pub fn starting_at(base: u64) -> Self {
        let (device, own) = (base + 1, base + 2);
        let driver = Entry { provider: Some(device), ..Entry::default() };
        let known = Known {
            device,
            own,
            next: base + 3,
            entries: BTreeMap::from([(device, Entry::default()), (own, driver)]),
            phase: Phase::Starting,
            queues: HashMap::new(),
        };
        Self { known: Mutex::new(known), tell: Mutex::new(None) }
    }

    /// Has what follows told on: any thread, one call at a time. It must not call back.
    pub fn telling(self, tell: impl FnMut(Told) + Send + 'static) -> Self {
        *self.tell.lock().expect(NO_PANIC) = Some(Box::new(tell));
        self
    }

    /// Says what the host knows of device and driver, before the driver starts on `queue`.
    pub(crate) fn describe(&self, device: Properties, driver: Properties, queue: &Queue) {
        let mut known = self.known();
        known.queues.insert(DEFAULT_QUEUE.to_owned(), queue.clone());
        let (device_entry, own) = (known.device, known.own);
        known.entry(device_entry).expect("never removed").given = device;
        known.entry(own).expect("never removed").given = driver;
    }

    /// The driver has started. It is visible from now on, unless it says so itself.
    pub(crate) fn started(&self, registers_itself: bool) {
        let mut known = self.known();
        known.phase = Phase::Started;
        let own = known.own;
        known.entry(own).expect("never removed").is_registered |= !registers_itself;
    }

    /// The driver has stopped: nothing is found here any more.
    pub(crate) fn stopped(&self) {
        let mut known = self.known();
        known.phase = Phase::Stopped;
        let queues = std::mem::take(&mut known.queues);
        drop(known);
        drop(queues);
    }

    /// Whether clients and other drivers may see the driver.
    pub fn is_registered(&self) -> bool {
        let known = self.known();
        known.phase == Phase::Started && known.entries[&known.own].is_registered
    }

    /// Whether the driver, or something that it provides for, is busy.
    pub fn is_busy(&self) -> bool {
        let known = self.known();
        known.entries[&known.device].busy > 0
    }

    /// All there is, for a person: each entry with its number, name, properties and busy count.
    pub fn shown(&self) -> Value {
        let known = self.known();
        let entries = known.entries.iter().map(|(id, entry)| {
            serde_json::json!({
                "id": id,
                "provider": entry.provider,
                "name": entry.name,
                "registered": entry.is_registered,
                "busy": entry.busy,
                "properties": entry.merged(),
            })
        });
        Value::Array(entries.collect())
    }

    pub(crate) fn own(&self) -> u64 {
        self.known().own
    }

    /// `GetProvider`.
    pub(crate) fn provider(&self, entry: u64) -> Result<u64, IOReturn> {
        self.known().entry(entry)?.provider.ok_or(IOReturn::NOT_FOUND)
    }

    /// `RegisterService`.
    pub(crate) fn register(&self, entry: u64) -> Result<(), IOReturn> {
        let mut known = self.known();
        let was = std::mem::replace(&mut known.drivers(entry)?.is_registered, true);
        let is_news = entry == known.own && known.phase == Phase::Started && !was;
        drop(known);
        if is_news {
            self.tell(Told::Registered);
        }
        Ok(())
    }

    /// `Create`.
    pub(crate) fn create(&self, provider: u64, key: &str) -> Result<u64, IOReturn> {
        let mut known = self.known();
        if provider != known.own {
            return Err(IOReturn::UNSUPPORTED);
        }
        let Some(Value::Object(dictionary)) = known.entries[&provider].property(key) else {
            return Err(IOReturn::BAD_ARGUMENT);
        };
        if !matches!(dictionary.get("IOClass"), Some(Value::String(_))) {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        if known.entries.len() >= MOST_ENTRIES {
            return Err(IOReturn::NO_MEMORY);
        }
        let given = dictionary.clone();
        let made = Entry { provider: Some(provider), given, ..Entry::default() };
        let id = known.next;
        known.next += 1;
        known.entries.insert(id, made);
        Ok(id)
    }

    /// `Terminate`.
    pub(crate) fn terminate(&self, entry: u64, options: u32) -> Result<(), IOReturn> {
        if options != 0 {
            return Err(IOReturn::UNSUPPORTED);
        }
        let mut known = self.known();
        known.drivers(entry)?;
        if entry == known.own {
            drop(known);
            self.tell(Told::Terminate);
            return Ok(());
        }
        let was_idle = known.is_idle();
        if let Some(removed) = known.entries.remove(&entry)
            && removed.busy > 0
            && let Some(provider) = removed.provider
        {
            known.add_busy(provider, -1);
        }
        let is_idle = known.is_idle();
        drop(known);
        self.tell_busy(was_idle, is_idle);
        Ok(())
    }

    /// `SetName`.
    pub(crate) fn set_name(&self, entry: u64, name: &str) -> Result<(), IOReturn> {
        if name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        self.known().drivers(entry)?.name = Some(name.to_owned());
        Ok(())
    }

    /// `CopyName`.
    pub(crate) fn name(&self, entry: u64) -> Result<String, IOReturn> {
        self.known().entry(entry)?.name.clone().ok_or(IOReturn::ERROR)
    }

    /// `CopyProperties`.
    pub(crate) fn properties(&self, entry: u64) -> Result<Properties, IOReturn> {
        Ok(self.known().entry(entry)?.merged())
    }

    /// `CopyProviderProperties`: those of the entry, then of each provider towards the root.
    pub(crate) fn provider_properties(&self, entry: u64) -> Result<Vec<Properties>, IOReturn> {
        let mut known = self.known();
        let mut next = Some(entry);
        let mut found = Vec::new();
        while let Some(entry) = next {
            let entry = known.entry(entry)?;
            found.push(entry.merged());
            next = entry.provider;
        }
        Ok(found)
    }

    /// `SetProperties`, from the driver: nobody else may.
    pub(crate) fn set_properties(&self, entry: u64, dictionary: &str) -> Result<(), IOReturn> {
        let Ok(Value::Object(dictionary)) = serde_json::from_str(dictionary) else {
            return Err(IOReturn::BAD_ARGUMENT);
        };
        let mut known = self.known();
        let entry = known.drivers(entry)?;
        let mut own = entry.own.clone();
        own.extend(dictionary);
        if serde_json::to_string(&own).map_or(usize::MAX, |text| text.len()) > MOST_PROPERTY_BYTES {
            return Err(IOReturn::NO_MEMORY);
        }
        entry.own = own;
        Ok(())
    }

    /// `RemoveProperty`.
    pub(crate) fn remove_property(&self, entry: u64, name: &str) -> Result<(), IOReturn> {
        let mut known = self.known();
        let entry = known.drivers(entry)?;
        match entry.own.remove(name) {
            Some(_) => Ok(()),
            None if entry.given.contains_key(name) => Err(IOReturn::NOT_WRITABLE),
            None => Err(IOReturn::NOT_FOUND),
        }
    }

    /// `SearchProperty`.
    pub(crate) fn search_property(
        &self,
        entry: u64,
        name: &str,
        options: u64,
    ) -> Result<Value, IOReturn> {
        if options & !SEARCH_PARENTS != 0 {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        let mut known = self.known();
        let mut next = Some(entry);
        while let Some(entry) = next {
            let entry = known.entry(entry)?;
            if let Some(value) = entry.property(name) {
                return Ok(value.clone());
            }
            next = entry.provider.filter(|_| options & SEARCH_PARENTS != 0);
        }
        Err(IOReturn::NOT_FOUND)
    }

    /// `AdjustBusy`.
    pub(crate) fn adjust_busy(&self, entry: u64, delta: i32) -> Result<(), IOReturn> {
        let mut known = self.known();
        let was_idle = known.is_idle();
        let busy = known.drivers(entry)?.busy;
        if busy.checked_add_signed(delta).is_none() {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        known.add_busy(entry, delta);
        let is_idle = known.is_idle();
        drop(known);
        self.tell_busy(was_idle, is_idle);
        Ok(())
    }

    /// `GetBusyState`.
    pub(crate) fn busy_state(&self, entry: u64) -> Result<u32, IOReturn> {
        Ok(self.known().entry(entry)?.busy)
    }

    /// `SetDispatchQueue`.
    pub(crate) fn set_dispatch_queue(&self, name: &str, queue: Queue) -> Result<(), IOReturn> {
        if name.is_empty() || name == DEFAULT_QUEUE || name.len() > LONGEST_NAME {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        let mut known = self.known();
        if known.phase == Phase::Stopped {
            return Err(IOReturn::ERROR);
        }
        let old = known.queues.insert(name.to_owned(), queue);
        drop(known);
        drop(old);
        Ok(())
    }

    /// `CopyDispatchQueue`.
    pub(crate) fn copy_dispatch_queue(&self, name: &str) -> Result<Queue, IOReturn> {
        let known = self.known();
        match known.phase {
            Phase::Stopped => Err(IOReturn::ERROR),
            _ => known.queues.get(name).cloned().ok_or(IOReturn::NOT_FOUND),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect(NO_PANIC)
    }

    fn tell(&self, told: Told) {
        if let Some(tell) = &mut *self.tell.lock().expect(NO_PANIC) {
            tell(told);
        }
    }

    fn tell_busy(&self, was_idle: bool, is_idle: bool) {
        if was_idle != is_idle {
            self.tell(Told::Busy(!is_idle));
        }
    }
}

/// The name of the queue that runs the driver.
const DEFAULT_QUEUE: &str = "Default";

impl Known {
    fn entry(&mut self, entry: u64) -> Result<&mut Entry, IOReturn> {
        self.entries.get_mut(&entry).ok_or(IOReturn::NOT_FOUND)
    }

    /// An entry that the driver may change: not its device's.
    fn drivers(&mut self, entry: u64) -> Result<&mut Entry, IOReturn> {
        if entry == self.device {
            return Err(IOReturn::NOT_PERMITTED);
        }
        self.entry(entry)
    }

    fn is_idle(&self) -> bool {
        self.entries[&self.device].busy == 0
    }

    /// Adds to an entry's count, and one to its provider's where it becomes busy, and so on. The
    /// count does not go below 0.
    fn add_busy(&mut self, entry: u64, delta: i32) {
        let Some(entry) = self.entries.get_mut(&entry) else { return };
        let old = entry.busy;
        entry.busy = old.saturating_add_signed(delta);
        let edge = i32::from(entry.busy > 0) - i32::from(old > 0);
        if let (Some(provider), true) = (entry.provider, edge != 0) {
            self.add_busy(provider, edge);
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}
