//! The messages between clients, daemon and driver hosts.
//!
//! Two conversations: [`varlink`] between a client (the CLI, `iohost_client`, `varlinkctl`) and
//! the daemon; [`host`] between the daemon and each driver host it started.

#![forbid(unsafe_code)]

pub mod host;
