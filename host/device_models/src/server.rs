//! A function at a socket, for one client after another.
//!
//! The protocol is the `vfio_user` crate's. Around it stands what an emulated device needs to
//! outlive its users: when a client goes, or breaks the protocol, the function forgets what that
//! client set up, resets, and waits for the next.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{info, warn};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, Error as ProtocolError, IrqInfo, Server, ServerBackend,
    ServerRegion,
};

use crate::dma::DmaMemory;
use crate::function::{Function, FunctionError};
use crate::interrupt::InterruptKind;
use crate::model::DeviceModel;

/// A socket at which a function can be had. Removed from the file system on drop.
#[derive(Debug)]
pub struct DeviceServer {
    listener: OwnedFd,
    stopper: Stopper,
}

/// Ends a [`DeviceServer::run`] from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Socket>);

#[derive(Debug)]
struct Socket {
    listener: OwnedFd,
    path: PathBuf,
    /// Device and inode, so that a successor's socket at the same path is left alone.
    identity: (u64, u64),
    stopping: AtomicBool,
}

/// Why a function cannot be offered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Another server answers there.
    #[error("another process already listens at {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is there; it is not ours to remove.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// What was to be the socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("listening at {}", path.display())]
    Listen {
        /// What was to be the socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No further client can be accepted.
    #[error("accepting a client at {}", path.display())]
    Accept {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Offers `model` at `path` until the process ends: [`DeviceServer::bind`] and
/// [`DeviceServer::run`].
pub fn serve(path: &Path, model: impl DeviceModel) -> Result<(), ServeError> {
    DeviceServer::bind(path)?.run(&Function::new(model))
}

impl DeviceServer {
    /// Makes the socket. A socket file that a dead server left behind is replaced.
    ///
    /// Errors: `InUse`, `NotASocket`, `Listen`.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Listen { path: path.to_owned(), source };
        remove_stale(path)?;
        let listener: OwnedFd = UnixListener::bind(path).map_err(failed)?.into();
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let socket = Socket {
            listener: listener.try_clone().map_err(failed)?,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            stopping: AtomicBool::new(false),
        };
        Ok(Self { listener, stopper: Stopper(Arc::new(socket)) })
    }

    /// What ends [`run`](Self::run).
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves clients, one at a time; others wait in the socket's backlog.
    ///
    /// When a client goes, for whatever reason, its DMA mappings and interrupt triggers are
    /// dropped and the function is reset ([`Function::disconnect`]).
    ///
    /// Returns once stopped. Errors: `Accept`.
    pub fn run<M: DeviceModel>(self, function: &Function<M>) -> Result<(), ServeError> {
        let Self { listener, stopper } = &self;
        let listener = listener.try_clone().map_err(|source| stopper.accept_error(source))?;
        let server = Server::from_owned_fd(listener, true, irqs(function), regions(function));
        loop {
            let mut client = Client { function };
            // The crate panics on a version message without its final NUL, among others; that
            // must cost its sender the connection and nobody else the device.
            let outcome = catch_unwind(AssertUnwindSafe(|| server.run(&mut client)));
            function.disconnect();
            if stopper.0.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            match outcome {
                Ok(Ok(())) => info!("the client has left, the device is reset"),
                Ok(Err(ProtocolError::SocketAccept(source))) => match source.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(stopper.accept_error(source)),
                },
                Ok(Err(err)) => warn!(err:%; "the client is lost, the device is reset"),
                Err(_) => warn!("the client broke the protocol, the device is reset"),
            }
        }
    }
}

impl Drop for DeviceServer {
    fn drop(&mut self) {
        self.stopper.0.remove_file();
    }
}

impl Stopper {
    /// Removes the socket's file and accepts no further client. A client that is being served is
    /// served until it leaves; [`DeviceServer::run`] returns after that.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.remove_file();
        // Wakes an `accept` that waits, with EINVAL. It can only fail where there is none.
        let _ = shutdown(self.0.listener.as_raw_fd(), Shutdown::Both);
    }

    fn accept_error(&self, source: io::Error) -> ServeError {
        ServeError::Accept { path: self.0.path.clone(), source }
    }
}

impl Socket {
    fn remove_file(&self) {
        let found = fs::symlink_metadata(&self.path).map(|found| (found.dev(), found.ino()));
        if found.is_ok_and(|found| found == self.identity) {
            // Somebody else may remove it between the two lines; either way it is gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket at which nobody answers.
fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let failed = |source| ServeError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(failed(err)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ServeError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ServeError::InUse { path: path.to_owned() }),
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => {
            info!(path = path.display().to_string().as_str(); "replacing a stale socket");
            fs::remove_file(path).map_err(failed)
        }
        Err(err) => Err(failed(err)),
    }
}

fn irqs<M: DeviceModel>(function: &Function<M>) -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS)
        .map(|index| {
            let (flags, count) = match kind(index) {
                Some(kind @ InterruptKind::IntX) => (
                    VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
                    function.interrupt_count(kind),
                ),
                Some(kind @ (InterruptKind::Msi | InterruptKind::MsiX)) => {
                    (VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE, function.interrupt_count(kind))
                }
                None => (0, 0),
            };
            IrqInfo { index, flags, count }
        })
        .collect()
}

fn regions<M: DeviceModel>(function: &Function<M>) -> Vec<ServerRegion> {
    (0..VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let bar = function.identity().bars.get(index as usize).copied().flatten();
            let size = match bar {
                Some(bar) => bar.size.into(),
                None if index == VFIO_PCI_CONFIG_REGION_INDEX => function.config_size().into(),
                None => 0,
            };
            let flags = match size {
                0 => 0,
                _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            };
            let argsz = size_of::<vfio_region_info>() as u32;
            let region_info = vfio_region_info { argsz, flags, index, size, ..Default::default() };
            ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
        })
        .collect()
}

fn kind(index: u32) -> Option<InterruptKind> {
    match index {
        VFIO_PCI_INTX_IRQ_INDEX => Some(InterruptKind::IntX),
        VFIO_PCI_MSI_IRQ_INDEX => Some(InterruptKind::Msi),
        VFIO_PCI_MSIX_IRQ_INDEX => Some(InterruptKind::MsiX),
        _ => None,
    }
}

/// One client's requests, on their way to the function.
struct Client<'a, M: DeviceModel> {
    function: &'a Function<M>,
}

/// The widest access to a BAR.
const WIDEST: usize = 8;

impl<M: DeviceModel> ServerBackend for Client<'_, M> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            return self.function.config_read(config_offset(offset)?, data).map_err(refused);
        }
        self.function.bar_read(bar_index(region, data.len())?, offset, data).map_err(refused)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            return self.function.config_write(config_offset(offset)?, data).map_err(refused);
        }
        self.function.bar_write(bar_index(region, data.len())?, offset, data).map_err(refused)
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        // Without a descriptor we would have to ask the client for each byte, which the crate
        // cannot; and memory for one direction only would need its own checks. Nobody asks.
        let (Some(file), true) = (fd, flags.contains(DmaMapFlags::READ_WRITE)) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        keep_from_programs([&file])?;
        self.function.dma_map(address, DmaMemory::new(file, offset, size)).map_err(refused)
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.function.dma_unmap_all();
            return Ok(());
        }
        self.function.dma_unmap(address, size).map_err(refused)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.function.reset();
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        const DISABLE: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        const ENABLE: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        const MASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK;
        const UNMASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;

        // Other kinds have no vectors, and clients disable them all the same.
        let Some(kind) = kind(index) else {
            let nothing = flags == DISABLE && count == 0;
            return if nothing { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) };
        };
        match flags {
            DISABLE if count == 0 => self.function.set_irqs(kind, &[]).map_err(refused),
            // No descriptor takes the triggers of these vectors away.
            ENABLE if fds.is_empty() || fds.len() == count as usize => {
                let available = self.function.interrupt_count(kind);
                if count > available {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                keep_from_programs(&fds)?;
                let mut triggers: Vec<_> = fds.into_iter().map(Some).collect();
                triggers.resize_with(count as usize, || None);
                self.function.set_some_irqs(kind, start, triggers).map_err(refused)
            }
            MASK if kind == InterruptKind::IntX => {
                self.function.mask_intx();
                Ok(())
            }
            UNMASK if kind == InterruptKind::IntX => {
                self.function.unmask_intx();
                Ok(())
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// The crate receives descriptors without `MSG_CMSG_CLOEXEC`. What a client sends is for this process
/// alone, and not for programs that it starts later.
fn keep_from_programs<'a>(fds: impl IntoIterator<Item = &'a File>) -> io::Result<()> {
    for fd in fds {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok(())
}

fn config_offset(offset: u64) -> io::Result<u16> {
    u16::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn bar_index(region: u32, len: usize) -> io::Result<u8> {
    match u8::try_from(region) {
        Ok(index) if len <= WIDEST => Ok(index),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn refused(err: FunctionError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, err)
}
