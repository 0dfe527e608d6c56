//! What a driver and its clients share: status codes, call arguments, method declarations, errors in
//! words.
//!
//! A driver's interface is written once, with [`interface!`], in a crate of its own. The driver
//! implements the `Server` trait it generates, clients call the methods of its `Client`, and the
//! daemon hands its [`Description`] to whoever wants to call a method by name.
//!
//! This crate has no system call and no `unsafe`; both ends of a session depend on it and on
//! nothing of each other.

#![forbid(unsafe_code)]

mod action;
mod arguments;
mod call;
mod declaration;
mod description;
mod io_return;
pub mod packet;
mod with_sources;

pub use action::{Action, ActionTarget, Completion, PassedAction};
pub use arguments::{Argument, Arguments, Results, Taken};
pub use call::{
    Answer, AnswerFuture, Caller, ClientFile, InterfaceClient, PendingAnswer, Reply, ReplySink,
    answer_pair,
};
pub use declaration::{ToClient, ToDriver};
pub use description::{Description, DescriptionError, Direction, Method, Queue};
pub use io_return::IOReturn;
pub use with_sources::with_sources;
