//! The process that runs one driver for one device.
//!
//! From the inside out: [`Device`] is a device as its driver sees it, over any backend,
//! and `device_events.rs` what happens to it;
//! `plugin.rs` and its folder are the host's end of the C ABI; [`Driver`] is a started driver
//! with its queue; `registry.rs` and `power.rs` have what it says of itself, `services.rs` what it may
//! know of others; `session.rs` carries the
//! calls of clients to it, and actions both ways (`session_actions.rs`); [`process`] is the
//! conversation with the daemon, or with one daemon after the other (`daemon.rs`), and what it is told
//! of failures (`failures.rs`); `confinement.rs` is what this process gives up before the plugin is
//! loaded. [`plugin_file`] reads a plugin's descriptor from its file, without running it.
//!
//! The testkit uses the same [`Driver`], with a device that is a Rust value.

#![deny(unsafe_code)]

mod confinement;
mod daemon;
mod device;
mod device_events;
mod driver;
mod failures;
mod plugin;
pub mod plugin_file;
mod power;
pub mod process;
mod registry;
mod saved_state;
mod services;
mod session;
mod session_actions;

pub use device::Device;
pub use device_events::EventWatch;
pub use driver::{Driver, StartError};
pub use plugin::{LoadedPlugin, NewSession, Plugin, SessionQueue};
pub use power::{ACKNOWLEDGEMENT_TIME, PowerNews, PowerState};
pub use registry::{Properties, Registry, Told};
pub use services::Services;
