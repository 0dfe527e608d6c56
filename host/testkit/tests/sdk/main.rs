//! The rules of DriverKit's classes, as drivers meet them: through the SDK and both ends of the
//! plugin ABI, one test per rule.
//!
//! `tests/checklist.md` says which rule is shown by which test.

#![forbid(unsafe_code)]

mod board;
mod data_queues;
mod device_events;
mod dma;
mod interrupts;
mod memory;
mod pci_device;
mod probe;
mod queues;
mod quiesce;
mod raw_queues;
mod services;
mod sources;
mod timers;
