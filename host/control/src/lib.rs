//! The messages between clients, daemon and driver hosts.
//!
//! Two conversations: [`varlink`] between a client (the CLI, `iohost_client`, `varlinkctl`) and
//! the daemon; [`host`] between the daemon and each driver host it started. Around them:
//! [`plugin`], what the daemon knows of a plugin before anything runs its code; [`socket`], a
//! Varlink transport that no peer can hold up or fill up; [`log_lines`], the form in which daemon
//! and driver hosts write to the operator.

#![forbid(unsafe_code)]

pub mod crash;
pub mod host;
pub mod log_lines;
pub mod plugin;
pub mod socket;
pub mod varlink;
