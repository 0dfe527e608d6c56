//! The SDK for people who write drivers.
//!
//! A driver is a value that one serial queue owns. Every handler of the queue's sources gets
//! `&mut self`; so a driver has no lock, no atomic and no `unsafe`. Its parts:
//!
//! - [`IOService`]: what it is for, how it starts and stops; [`ServiceEntry`]: what it says of itself.
//! - [`IOPCIDevice`] and [`Bar`]: its device; [`DeviceEventSource`]: what happens to it.
//! - [`IODispatchQueue`], [`IOInterruptDispatchSource`], [`IOTimerDispatchSource`],
//!   [`IODataQueueDispatchSource`]: when its code runs.
//! - [`OSAction`] and [`Action`]: methods of it that others can invoke.
//! - [`IOServiceNotificationDispatchSource`], [`IOServiceStateNotificationDispatchSource`]: news of
//!   other services, and of its own state.
//! - [`IOMemoryDescriptor`], [`IOBufferMemoryDescriptor`], [`IOMemoryMap`]: memory, and
//!   [`IODMACommand`] and [`DmaArena`] to share it with the device.
//! - [`Session`], [`Reply`]: its clients. The calls they can make come from
//!   [`iohost_interface::interface!`].
//! - [`export_driver!`]: makes the crate a plugin.
//!
//! The names are DriverKit's, the methods its selectors in snake_case; out-parameters are
//! `Result`s, and reference counts are `Clone` and `Drop`.

mod abi;
mod action;
mod data_queue;
mod device_event;
mod dispatch_queue;
mod dispatch_source;
mod dma;
mod error;
mod expected_interrupt;
mod interrupt;
mod logger;
mod memory;
mod notification;
mod panic_place;
mod pci;
mod raw_queue;
mod service;
mod service_entry;
mod timer;
pub mod wdm;

pub use action::{ActionWait, OSAction};
pub use data_queue::IODataQueueDispatchSource;
pub use device_event::{DeviceEvent, DeviceEventSource};
pub use dispatch_queue::IODispatchQueue;
pub use dispatch_source::IODispatchSource;
pub use dma::{AddressSegment, DmaOperation, DmaSpecification, IODMACommand, PreparedDma};
pub use error::{Error, Result};
pub use expected_interrupt::ExpectedInterrupt;
pub use interrupt::{EventfdInterrupt, IOInterruptDispatchSource, InterruptEvent, InterruptType};
pub use iohost_interface::{Action, IOReturn, Reply, ReplySink, Results, ToClient, ToDriver};
pub use iohost_memory::SharedMemory;
pub use iohost_memory::ring::{Bell, Consumer, Entry, Producer, QueueError, Slot};
pub use iohost_registers::{MapWindow, RegisterMap, register_bits, register_map};
pub use log;
pub use memory::{
    CacheMode, ClientMemory, DmaArena, DmaArenaOptions, IOBufferMemoryDescriptor,
    IOMemoryDescriptor, IOMemoryMap, MappingOptions, MemoryDirection,
};
pub use notification::{
    IOServiceNotificationDispatchSource, IOServiceState, IOServiceStateNotificationDispatchSource,
    ServiceInfo, ServiceMatching, ServiceNotification, StateItem,
};
pub use pci::{
    AspmStates, Bar, BarInfo, Capability, Command, DevicePowerState, IOPCIDevice, LinkStatus,
    ResetType,
};
pub use raw_queue::IORawDispatchQueue;
pub use service::{
    Exported, IOService, Needs, Personality, QueueEnd, SavedState, Session, SessionId,
};
pub use service_entry::{PowerAcknowledgement, PowerState, Properties, ServiceEntry, Stopping};
pub use timer::{IOTimerClock, IOTimerDispatchSource};

/// What almost every driver needs.
pub mod prelude {
    pub use crate::{
        Action, Bar, Error, IOBufferMemoryDescriptor, IODMACommand, IODataQueueDispatchSource,
        IODispatchQueue, IODispatchSource, IOInterruptDispatchSource, IOPCIDevice, IOReturn,
        IOService, IOTimerClock, IOTimerDispatchSource, InterruptEvent, InterruptType, Needs,
        OSAction, Personality, PreparedDma, Reply, Result, Session, SessionId, ensure,
    };
    pub use log::{debug, error, info, trace, warn};
}

/// What the macros of this crate expand to; not for use by hand.
#[doc(hidden)]
pub mod expansion {
    pub use crate::abi::{DriverDescriptor, descriptor};
    pub use iohost_interface::Arguments;

    /// The SDK and the compiler that build a plugin.
    pub const BUILT_WITH: &str =
        concat!("iohost_driver ", env!("CARGO_PKG_VERSION"), ", ", env!("IOHOST_RUSTC"));
}
