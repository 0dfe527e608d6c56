//! The host's end of the C ABI: plugins, the objects they hold, the tables they call. This file
//! has the plugin and the table it is given first; the others, a file for each.
//!
//! # The contract this module and those in it rest on
//!
//! A plugin is trusted not to break its process, as any code in it must be; it is loaded into a
//! process that has one device and nothing else. What it promises, in `iohost_driver_abi`:
//!
//! 1. Its descriptor is a `DriverDescriptor` of our ABI version (read from the file before it is
//!    loaded), and stays where it is while the library is loaded.
//! 2. An object it passes is one that we gave it and that it has not released.
//! 3. `Work` and `Handler` hold functions that take their space or context, from any thread; so
//!    does what a queue is given to keep. A work's functions stay for ever, as the plugin does.
//! 4. Pointers it passes are valid for the call; out-parameters can be written.
//! 5. It uses a reply on one thread at a time. `DriverAction` holds functions that take their
//!    context from any thread, `invoke` also several at a time, `drop` last; so does
//!    `ServiceHandler`.
//! 6. A descriptor that it gives away is open, and ours from there on.
//!
//! Our side: objects are `Arc`s turned into pointers, so each release is matched; a context is
//! dropped exactly once because a Rust value with a `Drop` owns it; a panic in a function of a
//! table ends the process, since `extern "C"` lets none through.

#![expect(unsafe_code)]
// UNSAFETY: the other side of every call here is foreign code.

mod action;
mod descriptor;
mod device;
mod dispatch;
mod foreign;
mod instance;
mod interrupt;
mod memory;
mod object;
mod service;
mod services;
mod session;
mod timer;

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::mem::offset_of;
use std::ptr;
use std::sync::Arc;

use iohost_dispatch::Queue;
use iohost_driver_abi::{
    ABI_VERSION, ACTION, DEVICE, DISPATCH, DescriptorHeader, DriverDescriptor, DriverEntry,
    HostPanic, HostQueue, HostTable, LifeCycleEntry, REGISTERS_ITSELF, SERVICE, SERVICES, SESSION,
    SYMBOL,
};
use iohost_interface::IOReturn;
use log::Level;

pub(crate) use self::instance::Instance;
pub use self::instance::{NewSession, SessionQueue};

use self::action::ACTION_TABLE;
use self::device::DEVICE_TABLE;
use self::dispatch::{DISPATCH_TABLE, QueueObject};
use self::object::{Lent, object, text_of};
use self::service::SERVICE_TABLE;
use self::services::SERVICES_TABLE;
use self::session::SESSION_TABLE;
use crate::Device;
use crate::plugin_file::PluginFile;
use crate::services::Services;

/// A driver's code: a loaded file, or a driver that is linked in.
#[derive(Clone)]
pub struct Plugin {
    header: &'static DescriptorHeader,
    entry: DriverEntry,
    /// What a plugin of before them lacks.
    life_cycle: Option<LifeCycleEntry>,
    /// [`REGISTERS_ITSELF`], or 0.
    flags: u64,
    host: &'static HostTable,
}

/// A plugin file in memory. It is never unloaded: a driver's code must stay as long as any thread
/// may run it, and that is known to end with the process only.
#[derive(Debug)]
pub struct LoadedPlugin;

impl LoadedPlugin {
    /// Loads a file. Its initialisers run here, with the rights this process has left.
    pub fn load(file: &PluginFile) -> Result<Plugin, libloading::Error> {
        // SAFETY: contract: the file is a plugin, trusted with this process.
        let library = unsafe { libloading::Library::new(file.name_of_descriptor()) }?;
        // SAFETY: contract 1: the symbol is data of this type.
        let descriptor = unsafe { library.get::<*const DriverDescriptor>(SYMBOL) }?;
        // The symbol's address is the descriptor's; see `Symbol`'s deref.
        let descriptor = (*descriptor).cast::<DriverDescriptor>();
        std::mem::forget(library);
        // SAFETY: contract 1, and the library was just kept for ever.
        Ok(unsafe { Plugin::of(descriptor, &HOST_FOR_FILES) })
    }
}

impl Plugin {
    /// A driver that is part of this program, as a test has it.
    pub fn linked(descriptor: &'static DriverDescriptor) -> Self {
        // SAFETY: a whole one, which a reference is to.
        unsafe { Self::of(descriptor, &HOST_FOR_LINKED) }
    }

    /// # Safety
    ///
    /// Contract 1 holds for `descriptor`, of which there are as many bytes as its header says, and
    /// [`FIRST_DESCRIPTOR`](iohost_driver_abi::FIRST_DESCRIPTOR) at least.
    unsafe fn of(descriptor: *const DriverDescriptor, host: &'static HostTable) -> Self {
        // SAFETY: the caller's promise, in bounds of the first descriptors.
        let header = unsafe { &raw const (*descriptor).header };
        // SAFETY: the caller's promise: it stays where it is.
        let header = unsafe { &*header };
        // SAFETY: as for the header.
        let entry = unsafe { &raw const (*descriptor).entry };
        // SAFETY: the caller's promise.
        let entry = unsafe { entry.read() };
        let has = |end: usize| header.size as usize >= end;
        let (mut life_cycle, mut flags) = (None, 0);
        if has(offset_of!(DriverDescriptor, life_cycle)) {
            // SAFETY: the size says that these bytes are there.
            let matching = unsafe { &raw const (*descriptor).matching };
            // SAFETY: the same.
            flags = unsafe { matching.read() }.flags;
        }
        if has(size_of::<DriverDescriptor>()) {
            // SAFETY: the size says that these bytes are there.
            let functions = unsafe { &raw const (*descriptor).life_cycle };
            // SAFETY: the same.
            life_cycle = Some(unsafe { functions.read() });
        }
        Self { header, entry, life_cycle, flags, host }
    }

    /// Whether the driver says itself when it is to be visible.
    pub(crate) fn registers_itself(&self) -> bool {
        self.flags & REGISTERS_ITSELF != 0
    }

    pub(crate) fn name(&self) -> String {
        let name = &self.header.name;
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        String::from_utf8_lossy(&name[..len]).into_owned()
    }

    /// The interface's description; empty without one.
    pub(crate) fn describe(&self) -> String {
        self.describe_type(0).unwrap_or_default()
    }

    /// The description for a kind of client; `None` when the driver has no such kind.
    pub(crate) fn describe_type(&self, client_type: u64) -> Option<String> {
        unsafe extern "C" fn sink(context: *mut c_void, text: *const u8, len: usize) {
            // SAFETY: the context is the string below, which waits for this call.
            let into = unsafe { &mut *context.cast::<String>() };
            // SAFETY: contract 4.
            *into = unsafe { text_of(text, len) };
        }
        let mut text = String::new();
        let context = (&raw mut text).cast();
        match (client_type, self.life_cycle) {
            // SAFETY: contract 1; the sink gets the context it takes.
            (0, _) => unsafe { (self.entry.describe)(sink, context) },
            (_, Some(functions)) => {
                // SAFETY: the same.
                let status = unsafe { (functions.describe_type)(client_type, sink, context) };
                IOReturn(status).result().ok()?;
            }
            (_, None) => return None,
        }
        Some(text)
    }

    /// Calls the driver's `start`. Runs on `queue`.
    pub(crate) fn start(
        &self,
        queue: &Queue,
        services: &Arc<Services>,
        device: Arc<Device>,
    ) -> Result<Instance, IOReturn> {
        let queue = QueueObject { queue: queue.clone(), services: services.clone() };
        let queue = Arc::new(queue);
        let (queue, device) = (Lent::of(queue), Lent::of(device));
        let mut instance = ptr::null_mut();
        // SAFETY: contract 1; both objects are lent for the call, the table is for ever.
        let status = unsafe {
            (self.entry.start)(
                self.host,
                device.pointer.cast_mut().cast(),
                queue.pointer.cast_mut().cast(),
                &raw mut instance,
            )
        };
        IOReturn(status).result()?;
        Ok(Instance { entry: self.entry, life_cycle: self.life_cycle, instance })
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Plugin").field(&self.name()).finish()
    }
}

// ---- Tables ----

static HOST_FOR_FILES: HostTable = HostTable {
    abi_version: ABI_VERSION,
    size: size_of::<HostTable>() as u32,
    extension,
    log: Some(log_line),
    failed,
    panicked,
};

/// A driver that is linked in shares our logger; a line sent here would come back.
static HOST_FOR_LINKED: HostTable = HostTable {
    abi_version: ABI_VERSION,
    size: size_of::<HostTable>() as u32,
    extension,
    log: None,
    failed,
    panicked,
};

unsafe extern "C" fn extension(name: *const c_char) -> *const c_void {
    // SAFETY: contract 4: a C string.
    let name = unsafe { CStr::from_ptr(name) };
    if name == DISPATCH {
        (&raw const DISPATCH_TABLE).cast()
    } else if name == DEVICE {
        (&raw const DEVICE_TABLE).cast()
    } else if name == SESSION {
        (&raw const SESSION_TABLE).cast()
    } else if name == ACTION {
        (&raw const ACTION_TABLE).cast()
    } else if name == SERVICE {
        (&raw const SERVICE_TABLE).cast()
    } else if name == SERVICES {
        (&raw const SERVICES_TABLE).cast()
    } else {
        ptr::null()
    }
}

unsafe extern "C" fn log_line(level: u32, text: *const u8, len: usize) {
    // SAFETY: contract 4.
    let text = unsafe { text_of(text, len) };
    let levels = [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];
    let level = levels[(level as usize).clamp(1, levels.len()) - 1];
    log::log!(target: "driver", level, "{text}");
}

unsafe extern "C" fn failed(queue: *mut HostQueue, text: *const u8, len: usize) {
    // SAFETY: contract 2.
    let queue = unsafe { object::<QueueObject>(queue) };
    // SAFETY: contract 4.
    let text = unsafe { text_of(text, len) };
    queue.queue.report_failure(&text);
}

unsafe extern "C" fn panicked(panic: *mut HostPanic, text: *const u8, len: usize) {
    // SAFETY: made by `raising`, which waits for the call that got it.
    let panic = unsafe { &mut *panic.cast::<Option<String>>() };
    // SAFETY: contract 4.
    *panic = Some(unsafe { text_of(text, len) });
}
