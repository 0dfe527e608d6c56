//! What a driver says of itself, and the services it makes.

use serde_json::{Map, Value};

use crate::{Error, IODispatchQueue, IORawDispatchQueue, IOReturn, Result, abi};

/// A dictionary of properties (`OSDictionary`), by name.
pub type Properties = Map<String, Value>;

/// A service in the registry: the driver itself ([`IODispatchQueue::service`]), or one it has made
/// ([`create`](Self::create)). The methods of `IOService` that DriverKit has a driver call on itself.
///
/// A value of this type is a handle; clones are the same service. Every method can be called from
/// any thread, and has its effect before it returns, unless it says otherwise. After the end of a
/// service that the driver has made, all say `NOT_FOUND`. `iohost properties` shows what is said.
#[derive(Clone, Debug)]
pub struct ServiceEntry {
    entry: abi::Entry,
}

/// A stop that is not complete. Dropped, it is: the driver is freed, later, on its queue.
#[must_use = "dropped, the driver has stopped"]
#[derive(Debug)]
pub struct Stopping(#[expect(dead_code, reason = "dropped")] pub(crate) abi::Acknowledgement);

/// A power state that the driver does not have yet. Dropped, it has.
#[must_use = "dropped, the driver has reached the state"]
#[derive(Debug)]
pub struct PowerAcknowledgement(
    #[expect(dead_code, reason = "dropped")] pub(crate) abi::Acknowledgement,
);

/// The power state of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PowerState {
    /// Everything is quiet: `kIOServicePowerCapabilityOff`, before the machine sleeps too.
    Off = 0,
    /// It works with less: `kIOServicePowerCapabilityLow`.
    Low = 0x10000,
    /// `kIOServicePowerCapabilityOn`.
    On = 2,
}

impl PowerState {
    /// The state that DriverKit's flags mean; `None` for others.
    pub fn from_flags(flags: u32) -> Option<Self> {
        [PowerState::Off, PowerState::Low, PowerState::On]
            .into_iter()
            .find(|state| *state as u32 == flags)
    }
}

impl<S: Send + 'static> IODispatchQueue<S> {
    /// The driver that the queue belongs to, as others see it.
    pub fn service(&self) -> ServiceEntry {
        ServiceEntry { entry: abi::Entry::own(self.raw()) }
    }
}

impl ServiceEntry {
    /// The service's number, which no other service of the daemon has or will have.
    /// `GetRegistryEntryID`.
    pub fn registry_entry_id(&self) -> u64 {
        self.entry.id
    }

    /// What the service is made for: of the driver its device, whose properties can be read; the
    /// device itself is what `start` was given. `GetProvider`.
    ///
    /// Errors: `NOT_FOUND` for the device, which is the root.
    pub fn provider(&self) -> Result<ServiceEntry> {
        Ok(Self { entry: self.entry.provider()? })
    }

    /// Makes the service visible to clients and other drivers. Before the driver's `start` has
    /// returned, that is when it has, and never if it fails. A second call does nothing.
    /// `RegisterService`.
    ///
    /// For the driver itself only where [`IOService::REGISTERS_ITSELF`](crate::IOService) says so;
    /// one that the driver has made is visible in `iohost properties` alone.
    pub fn register(&self) -> Result<()> {
        Ok(self.entry.register()?)
    }

    /// Makes a service of the dictionary that `provider` has as its property `key`: its properties.
    /// It has started at once. `Create`.
    ///
    /// Errors: `UNSUPPORTED` when `provider` is not this service, or this is not the driver itself;
    /// `BAD_ARGUMENT` when it has no such property, or one that is no dictionary, or has no text
    /// under `IOClass`; `NO_MEMORY` for more than some 4000 services at a time.
    pub fn create(&self, provider: &ServiceEntry, key: &str) -> Result<ServiceEntry> {
        if provider.registry_entry_id() != self.registry_entry_id() {
            return Err(Error::new(IOReturn::UNSUPPORTED, "a service is made by its provider"));
        }
        Ok(Self { entry: self.entry.create(provider.entry.id, key)? })
    }

    /// Ends the service. The driver itself is stopped later, as on an operator's request, and its
    /// device is given back. `Terminate`.
    ///
    /// Errors: `UNSUPPORTED` for `options` other than 0, of which there are none.
    pub fn terminate(&self, options: u32) -> Result<()> {
        Ok(self.entry.terminate(options)?)
    }

    /// Gives the service a name. `SetName`.
    ///
    /// Errors: `BAD_ARGUMENT` for an empty one or one of more than 127 bytes.
    pub fn set_name(&self, name: &str) -> Result<()> {
        Ok(self.entry.set_name(name)?)
    }

    /// The name it was given. `CopyName`.
    ///
    /// Errors: `ERROR` when it was given none.
    pub fn name(&self) -> Result<String> {
        Ok(self.entry.name()?)
    }

    /// What the service says of itself, over what the host says of it. `CopyProperties`.
    pub fn properties(&self) -> Result<Properties> {
        read(&self.entry.properties(0)?)
    }

    /// The properties of the service, of its provider, and so on to the device.
    /// `CopyProviderProperties`; the choice of keys is left to the caller.
    pub fn provider_properties(&self) -> Result<Vec<Properties>> {
        read(&self.entry.properties(1)?)
    }

    /// Sets properties, and leaves others as they are. `SetProperties`; nobody but the driver can.
    ///
    /// Errors: `NO_MEMORY` when all that were set have more than 16 KiB as JSON. `BAD_ARGUMENT` for
    /// what is no dictionary cannot come about.
    pub fn set_properties(&self, properties: Properties) -> Result<()> {
        Ok(self.entry.set_properties(&Value::Object(properties).to_string())?)
    }

    /// Takes back a property that was set. `RemoveProperty`.
    ///
    /// Errors: `NOT_WRITABLE` for one of the host's, `NOT_FOUND` for none.
    pub fn remove_property(&self, name: &str) -> Result<()> {
        Ok(self.entry.remove_property(name)?)
    }

    /// A property of the service. `SearchProperty` without an option.
    ///
    /// Errors: `NOT_FOUND`.
    pub fn property(&self, name: &str) -> Result<Value> {
        read(&self.entry.search_property(name, 0)?)
    }

    /// A property of the service or, if it has none of that name, of the nearest provider that has.
    /// `SearchProperty` with the option to search parents.
    ///
    /// Errors: `NOT_FOUND`.
    pub fn search_property(&self, name: &str) -> Result<Value> {
        read(&self.entry.search_property(name, 1)?)
    }

    /// Adds to how often the service is busy. Its provider is told when it becomes busy and when it
    /// becomes idle, and so on; `iohost status` shows it of a driver. `AdjustBusy`.
    ///
    /// Errors: `BAD_ARGUMENT` for less than 0 in the end; the count is unchanged.
    pub fn adjust_busy(&self, delta: i32) -> Result<()> {
        Ok(self.entry.adjust_busy(delta)?)
    }

    /// How often it is busy, with one for each busy service that it is the provider of.
    /// `GetBusyState`.
    pub fn busy_state(&self) -> Result<u32> {
        Ok(self.entry.busy_state()?)
    }

    /// Asks for a power state: [`IOService::set_power_state`](crate::IOService::set_power_state) is
    /// called with it, later. `ChangePowerState`.
    pub fn change_power_state(&self, state: PowerState) -> Result<()> {
        self.change_power_state_to(state as u32)
    }

    /// As [`change_power_state`](Self::change_power_state), with DriverKit's flags.
    ///
    /// Errors: `BAD_ARGUMENT` for flags that are no state.
    pub fn change_power_state_to(&self, flags: u32) -> Result<()> {
        Ok(self.entry.change_power_state(flags)?)
    }

    /// Gives a queue a name for the length of the driver's life, in place of one that had it.
    /// `SetDispatchQueue`.
    ///
    /// Nothing runs on a queue by its name: a source or an action is made for its queue. It is for
    /// parts of a driver to find each other's.
    ///
    /// Errors: `BAD_ARGUMENT` for an empty name, one of more than 127 bytes, and `Default`; `ERROR`
    /// when the driver has stopped.
    pub fn set_dispatch_queue<S: Send>(
        &self,
        name: &str,
        queue: &IODispatchQueue<S>,
    ) -> Result<()> {
        Ok(self.entry.set_dispatch_queue(name, queue.raw())?)
    }

    /// The queue of that name, `Default` for the driver's; without its state, as a name has no type.
    /// `CopyDispatchQueue`.
    ///
    /// Errors: `NOT_FOUND`; `ERROR` when the driver has stopped.
    pub fn copy_dispatch_queue(&self, name: &str) -> Result<IORawDispatchQueue> {
        Ok(IORawDispatchQueue::of(self.entry.copy_dispatch_queue(name)?))
    }
}

fn read<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|err| Error::new(IOReturn::INTERNAL_ERROR, err.to_string()))
}
