//! What a driver has of services: its own registry and power state, which others run, and who wants
//! to hear of changes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use iohost_control::host::RunningService;

use crate::power::{Power, PowerNews};
use crate::registry::Registry;

/// The services that run, as the daemon tells them, and the watchers among the driver's sources.
///
/// The daemon is asked to tell once the first watcher is there.
pub struct Services {
    registry: Registry,
    power: Arc<Power>,
    known: Mutex<Known>,
    /// Held while watchers are told, so that each hears of changes in their order.
    telling: Mutex<()>,
}

#[derive(Default)]
struct Known {
    running: BTreeMap<String, RunningService>,
    watchers: Vec<Weak<dyn Watcher>>,
    subscribe: Option<Box<dyn FnOnce() + Send>>,
}

/// A source that hears of services. Called on any thread, one call at a time; must not call back.
pub(crate) trait Watcher: Send + Sync {
    fn began(&self, service: &RunningService);
    fn ended(&self, service: &RunningService);
}

/// Why the locks here are never poisoned.
const NO_PANIC: &str = "no panic crosses the plugin ABI";

impl Services {
    /// Nothing known yet. `subscribe` is called once, when the first watcher comes.
    pub fn new(subscribe: impl FnOnce() + Send + 'static) -> Self {
        let known = Known { subscribe: Some(Box::new(subscribe)), ..Known::default() };
        Self {
            registry: Registry::default(),
            power: Arc::new(Power::new(|_| {})),
            known: Mutex::new(known),
            telling: Mutex::default(),
        }
    }

    /// The same with another registry.
    pub fn with_registry(self, registry: Registry) -> Self {
        Self { registry, ..self }
    }

    /// The same, and what becomes of changes of the power state is told on, on any thread. It must
    /// not call back.
    pub fn telling_power(self, tell: impl Fn(PowerNews) + Send + Sync + 'static) -> Self {
        Self { power: Arc::new(Power::new(tell)), ..self }
    }

    /// What the driver says of itself.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn power(&self) -> &Arc<Power> {
        &self.power
    }

    /// A service runs now. One that ran before under that name has ended.
    pub fn began(&self, service: RunningService) {
        let _telling = self.telling.lock().expect(NO_PANIC);
        let mut known = self.known.lock().expect(NO_PANIC);
        let old = known.running.insert(service.name.clone(), service.clone());
        let watchers = known.watchers();
        drop(known);
        for watcher in watchers {
            if let Some(old) = &old {
                watcher.ended(old);
            }
            watcher.began(&service);
        }
    }

    /// A service runs no more.
    pub fn ended(&self, name: &str) {
        let _telling = self.telling.lock().expect(NO_PANIC);
        let mut known = self.known.lock().expect(NO_PANIC);
        let Some(old) = known.running.remove(name) else { return };
        let watchers = known.watchers();
        drop(known);
        watchers.iter().for_each(|watcher| watcher.ended(&old));
    }

    /// The services known to run, by name with their incarnations; `None` if the daemon was not asked.
    pub(crate) fn known(&self) -> Option<BTreeMap<String, u64>> {
        let known = self.known.lock().expect(NO_PANIC);
        let running = || known.running.values();
        let told =
            || running().map(|service| (service.name.clone(), service.incarnation)).collect();
        known.subscribe.is_none().then(told)
    }

    /// Tells a watcher of what runs now, then of every change until it is dropped.
    pub(crate) fn watch(&self, watcher: Arc<dyn Watcher>) {
        let _telling = self.telling.lock().expect(NO_PANIC);
        let mut known = self.known.lock().expect(NO_PANIC);
        known.watchers.push(Arc::downgrade(&watcher));
        let subscribe = known.subscribe.take();
        let running: Vec<_> = known.running.values().cloned().collect();
        drop(known);
        running.iter().for_each(|service| watcher.began(service));
        if let Some(subscribe) = subscribe {
            subscribe();
        }
    }
}

impl Default for Services {
    fn default() -> Self {
        Self::new(|| {})
    }
}

impl Known {
    fn watchers(&mut self) -> Vec<Arc<dyn Watcher>> {
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        self.watchers.iter().filter_map(Weak::upgrade).collect()
    }
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}
