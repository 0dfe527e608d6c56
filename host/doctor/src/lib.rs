//! What stands between iohost and a device, and the command that removes it.
//!
//! Three steps, each in its own file: [`Facts::gather`] reads what the kernel shows and changes
//! nothing; [`Report::of`] turns facts into findings by rules that read nothing more; the
//! [`Code`] of a finding leads to its explanation. The same codes stand in the refusals of the
//! daemon and the driver host ([`refusal`]), so that `iohost explain` serves them too.
//!
//! Invariant: a finding with a command is gone once that command has run (as root, and where it
//! says so after a reboot). `tests/vm/doctor*.sh` run the commands of twelve prepared defects.

#![forbid(unsafe_code)]

mod boot;
mod catalogue;
mod facts;
mod function;
mod machine;
mod process;
pub mod refusal;
mod report;
mod rules;
#[cfg(test)]
mod tree;

pub use catalogue::{Code, Explanation, Severity};
pub use facts::{
    Daemon, Facts, Function, Group, Iommu, Machine, Member, Module, Node, Opener, Owned, Question,
    Subject,
};
pub use process::may_lock;
pub use report::{DeviceReport, Finding, Report};
