//! Code of a plugin that the host runs: once, or for each event.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use crate::HostPanic;

/// Words of a [`Work`] that are the plugin's.
pub const WORK_WORDS: usize = 5;

/// Where a [`Work`] keeps what it needs; the host moves it as bytes.
pub type WorkSpace = MaybeUninit<[usize; WORK_WORDS]>;

/// Code of the plugin that runs at most once, on any thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What can be done with it. A null pointer: there is no work.
    pub functions: *const WorkFunctions,
    /// The plugin's.
    pub space: WorkSpace,
}

/// The functions of a kind of [`Work`]. Each consumes the space. They stay where they are for the
/// life of the process.
#[repr(C)]
#[derive(Debug)]
pub struct WorkFunctions {
    /// Runs it. When it panicked, `panic` has been told.
    pub call: unsafe extern "C" fn(space: *mut WorkSpace, panic: *mut HostPanic),
    /// Drops it unrun.
    pub drop: unsafe extern "C" fn(space: *mut WorkSpace),
}

/// Code of the plugin that runs for each event, never twice at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Handler {
    /// Runs it. What the two numbers are, the function that takes the handler says. When it
    /// panicked, `panic` has been told.
    pub call:
        unsafe extern "C" fn(context: *mut c_void, first: u64, second: u64, panic: *mut HostPanic),
    /// Frees the context.
    pub drop: unsafe extern "C" fn(context: *mut c_void),
    /// The plugin's.
    pub context: *mut c_void,
}
