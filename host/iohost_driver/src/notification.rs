//! Notification sources: services that come and go, and named items of a service's state.
//!
//! Both call a handler that carries nothing: it says "look", once, however much there is to see.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use iohost_interface::IOReturn;

use crate::{Error, IODispatchQueue, OSAction, Result, abi};

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no code of the driver runs under this lock";

/// What calls a source's handler: an action without arguments, never twice on its way.
struct Caller(Mutex<Calls>);

struct Calls {
    action: OSAction<()>,
    /// A call was sent and has not begun.
    outstanding: bool,
}

impl Caller {
    fn new<S: Send + 'static>(
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Arc<Self>> {
        let idle = OSAction::create(queue, (), |_, (), ()| {})?;
        let caller = Arc::new(Self(Mutex::new(Calls { action: idle, outstanding: false })));
        caller.replace(queue, handler)?;
        Ok(caller)
    }

    /// Puts another handler in place; a call on its way to the old one is dropped.
    fn replace<S: Send + 'static>(
        self: &Arc<Self>,
        queue: &IODispatchQueue<S>,
        mut handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<()> {
        // Weak: the action is ours, so it must not hold us.
        let caller = Arc::downgrade(self);
        let action = OSAction::create(queue, (), move |state, (), ()| {
            if let Some(caller) = caller.upgrade() {
                // Before the handler looks: what comes from here on needs another call.
                caller.calls().outstanding = false;
            }
            handler(state);
        })?;
        let mut calls = self.calls();
        let old = std::mem::replace(&mut *calls, Calls { action, outstanding: false });
        drop(calls);
        drop(old);
        Ok(())
    }

    fn call(&self) {
        let mut calls = self.calls();
        if !std::mem::replace(&mut calls.outstanding, true) {
            // Refused after cancel only, when nobody is to be called.
            let _ = calls.action.invoke(());
        }
    }

    fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        let calls = self.calls();
        calls.action.cancel(queue, done);
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().expect(NO_PANIC)
    }
}

/// `IOServiceNotificationDispatchSource`: hears of services that begin and end to run.
///
/// A service is a device with a driver that runs, under this daemon; the driver's own service
/// counts as any other. Services that run when the source is made are news too. Each news waits
/// until the driver asks for it; a service that came and went before it asked is no news at all.
/// Dropping the source ends it.
pub struct IOServiceNotificationDispatchSource {
    news: Arc<News>,
    _watch: abi::Watch,
}

/// Which services a source is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceMatching {
    /// The one of this name. `IONameMatch`.
    Name(String),
    /// Those that serve the interface of this name.
    Interface(String),
}

/// A service, as other drivers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceInfo {
    /// Its name in the daemon's configuration.
    pub name: String,
    /// Its driver's name.
    pub driver: String,
    /// The name of the interface it serves; empty for none.
    pub interface: String,
}

/// What happened to a service. The numbers are DriverKit's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ServiceNotification {
    /// It runs no more. `kIOServiceNotificationTypeTerminated`.
    Terminated = 0,
    /// It runs. `kIOServiceNotificationTypeMatched`.
    Matched = 1,
}

struct News {
    matching: ServiceMatching,
    pending: Mutex<Pending>,
    caller: Arc<Caller>,
}

#[derive(Default)]
struct Pending {
    terminated: VecDeque<ServiceInfo>,
    matched: VecDeque<ServiceInfo>,
}

impl IOServiceNotificationDispatchSource {
    /// Watches services from now on. `ready` (`ServiceNotificationReady`) runs on `queue` when
    /// the list of the terminated or that of the matched goes from empty to non-empty, and once
    /// for both if it has not begun by then: take everything, with
    /// [`deliver_notifications`](Self::deliver_notifications), or the rest stays unannounced.
    pub fn create<S: Send + 'static>(
        matching: ServiceMatching,
        queue: &IODispatchQueue<S>,
        ready: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Self> {
        let caller = Caller::new(queue, ready)?;
        let news = Arc::new(News { matching, pending: Mutex::default(), caller });
        let hearing = news.clone();
        let watch = abi::Watch::create(queue.raw(), move |began, service| {
            hearing.hear(began, service);
        })?;
        Ok(Self { news, _watch: watch })
    }

    /// Replaces the handler. When news wait, the new one is called for them.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        ready: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<()> {
        self.news.caller.replace(queue, ready)?;
        let pending = self.news.pending();
        if !pending.terminated.is_empty() || !pending.matched.is_empty() {
            self.news.caller.call();
        }
        Ok(())
    }

    /// Gives `take` each news that waits, and forgets it: all that ended, then all that began.
    /// A service that restarted is in both.
    pub fn deliver_notifications(&self, mut take: impl FnMut(ServiceNotification, &ServiceInfo)) {
        let Pending { terminated, matched } = std::mem::take(&mut *self.news.pending());
        terminated.iter().for_each(|gone| take(ServiceNotification::Terminated, gone));
        matched.iter().for_each(|new| take(ServiceNotification::Matched, new));
    }

    /// Ends the source. `done` runs on `queue` once no handler runs or will run.
    pub fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        self.news.caller.cancel(queue, done);
    }
}

impl ServiceMatching {
    fn matches(&self, service: &ServiceInfo) -> bool {
        match self {
            Self::Name(name) => service.name == *name,
            Self::Interface(interface) => service.interface == *interface,
        }
    }
}

impl News {
    fn hear(&self, began: bool, service: ServiceInfo) {
        if !self.matching.matches(&service) {
            return;
        }
        let mut pending = self.pending();
        let unheard = pending.matched.iter().position(|new| new.name == service.name);
        let list = match (began, unheard) {
            // The driver never heard of its beginning.
            (false, Some(unheard)) => {
                pending.matched.remove(unheard);
                return;
            }
            (false, None) => &mut pending.terminated,
            (true, _) => &mut pending.matched,
        };
        list.push_back(service);
        if list.len() == 1 {
            self.caller.call();
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().expect(NO_PANIC)
    }
}

impl fmt::Debug for IOServiceNotificationDispatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IOServiceNotificationDispatchSource").field(&self.news.matching).finish()
    }
}

/// The value of a state item: a dictionary.
pub type StateItem = BTreeMap<String, String>;

/// Named items of a service's state, which its queues can watch:
/// `StateNotificationItemCreate`, `...Set`, `...Copy`.
///
/// A value of this type is a handle; clones are the same items. They belong to one driver; other
/// drivers do not see them. Callable from any thread.
#[derive(Clone, Default)]
pub struct IOServiceState {
    items: Arc<Mutex<Items>>,
}

#[derive(Default)]
struct Items {
    /// `None` for an item that was made and never set.
    values: BTreeMap<String, Option<StateItem>>,
    watchers: Vec<std::sync::Weak<StateWatcher>>,
}

impl IOServiceState {
    /// No items yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes an item, without a value yet. Errors: `BUSY` when there is one of that name.
    pub fn state_notification_item_create(&self, name: &str) -> Result<()> {
        let mut items = self.items();
        if items.values.contains_key(name) {
            return Err(Error::new(IOReturn::BUSY, format!("there is a state item {name:?}")));
        }
        items.values.insert(name.to_owned(), None);
        Ok(())
    }

    /// Sets an item, to the value it has or to another one, and notifies each source that
    /// watches it and is armed. Errors: `NOT_FOUND` when there is none of that name.
    pub fn state_notification_item_set(&self, name: &str, value: StateItem) -> Result<()> {
        let mut items = self.items();
        *items.values.get_mut(name).ok_or_else(|| no_item(name))? = Some(value);
        items.watchers.retain(|watcher| watcher.strong_count() > 0);
        let watchers: Vec<_> = items.watchers.iter().filter_map(std::sync::Weak::upgrade).collect();
        drop(items);
        watchers.iter().filter(|watcher| watcher.watches(name)).for_each(|each| each.notify());
        Ok(())
    }

    /// The value of an item. Errors: `NOT_FOUND` when there is none of that name, or it was never
    /// set.
    pub fn state_notification_item_copy(&self, name: &str) -> Result<StateItem> {
        let value = self.items().values.get(name).cloned().flatten();
        value.ok_or_else(|| no_item(name))
    }

    fn items(&self) -> MutexGuard<'_, Items> {
        self.items.lock().expect(NO_PANIC)
    }
}

fn no_item(name: &str) -> Error {
    Error::new(IOReturn::NOT_FOUND, format!("no state item {name:?} with a value"))
}

impl fmt::Debug for IOServiceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IOServiceState").finish_non_exhaustive()
    }
}

/// `IOServiceStateNotificationDispatchSource`: hears of changes of state items.
///
/// The handler is called once for each arming at the most. It calls
/// [`state_notification_begin`](Self::state_notification_begin) first and reads the values then:
/// what changes before is read, what changes later is announced. Dropping the source ends it.
pub struct IOServiceStateNotificationDispatchSource {
    watcher: Arc<StateWatcher>,
}

struct StateWatcher {
    names: Vec<String>,
    armed: Mutex<bool>,
    caller: Arc<Caller>,
}

impl IOServiceStateNotificationDispatchSource {
    /// Watches the items of these names; they need not exist yet. `handler` runs on `queue`, the
    /// first time at once, so that it arms the source and sees how things are.
    pub fn create<S: Send + 'static>(
        state: &IOServiceState,
        names: &[&str],
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<Self> {
        let watcher = Arc::new(StateWatcher {
            names: names.iter().map(ToString::to_string).collect(),
            armed: Mutex::new(false),
            caller: Caller::new(queue, handler)?,
        });
        state.items().watchers.push(Arc::downgrade(&watcher));
        watcher.caller.call();
        Ok(Self { watcher })
    }

    /// Replaces the handler, and has the new one called once.
    pub fn set_handler<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        handler: impl FnMut(&mut S) + Send + 'static,
    ) -> Result<()> {
        self.watcher.caller.replace(queue, handler)?;
        self.watcher.caller.call();
        Ok(())
    }

    /// Arms the source for one notification. `StateNotificationBegin`.
    pub fn state_notification_begin(&self) {
        *self.watcher.armed.lock().expect(NO_PANIC) = true;
    }

    /// Ends the source. `done` runs on `queue` once no handler runs or will run.
    pub fn cancel<S: Send + 'static>(
        &self,
        queue: &IODispatchQueue<S>,
        done: impl FnOnce(&mut S) + Send + 'static,
    ) {
        self.watcher.caller.cancel(queue, done);
    }
}

impl StateWatcher {
    fn watches(&self, name: &str) -> bool {
        self.names.iter().any(|watched| watched == name)
    }

    fn notify(&self) {
        let was_armed = std::mem::take(&mut *self.armed.lock().expect(NO_PANIC));
        if was_armed {
            self.caller.call();
        }
    }
}

impl fmt::Debug for IOServiceStateNotificationDispatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = &self.watcher.names;
        f.debug_tuple("IOServiceStateNotificationDispatchSource").field(names).finish()
    }
}
