//! The interrupt line, from `/dev/uioN` to an eventfd.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use iohost_event::Signal;
use log::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::UioError;

/// A thread that turns interrupts into signals, until it is dropped; nothing is signalled then.
#[derive(Debug)]
pub(crate) struct Line {
    stop: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// Forwards every interrupt that comes from here on to `trigger`; what came before does not
    /// count. `node` is `/dev/uioN`, non-blocking.
    pub(crate) fn forward(node: &File, trigger: BorrowedFd<'_>) -> Result<Self, UioError> {
        let failed = |source| UioError::device("forwarding interrupts".to_owned())(source);
        let trigger = Signal::try_from(trigger.try_clone_to_owned().map_err(failed)?);
        let trigger = trigger.map_err(failed)?;
        let node = node.try_clone().map_err(failed)?;
        let stop = Arc::new(Signal::new().map_err(failed)?);
        take(&node).map_err(failed)?;
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("interrupt line".to_owned())
            .spawn(move || run(&node, &trigger, &stopped))
            .map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            // It does not panic, and has nothing to say.
            let _ = thread.join();
        }
    }
}

fn run(node: &File, trigger: &Signal, stop: &Signal) {
    loop {
        let mut fds = [
            PollFd::new(node.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return warn!(reason:% = err; "interrupts of the line are lost"),
        }
        if fds[1].any() == Some(true) {
            return;
        }
        if fds[0].any() == Some(true) {
            match take(node) {
                Ok(true) => trigger.raise(),
                Ok(false) => {}
                // The device is gone.
                Err(err) => return warn!(reason:% = err; "no more interrupts of the line"),
            }
        }
    }
}

/// Takes the count of interrupts; whether there were any since the last time.
fn take(mut node: &File) -> std::io::Result<bool> {
    // Source: Linux, `drivers/uio/uio.c`, `uio_read`: no other length is accepted.
    let mut count = [0; 4];
    match node.read(&mut count) {
        Ok(_) => Ok(true),
        Err(err) if err.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(err) => Err(err),
    }
}

/// Opens a node for [`Line::forward`].
pub(crate) fn open(path: &Path) -> Result<File, UioError> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let opened = File::options().read(true).write(true).custom_flags(flags).open(path);
    opened.map_err(|source| UioError::open(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe is to the reader what the node is: readable once for each count written.
    fn node() -> (File, File) {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        (reader.into(), writer.into())
    }

    fn await_signal(signal: &Signal) -> u64 {
        let mut fds = [PollFd::new(signal.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 20_000_u16).unwrap(), 1, "waited in vain");
        signal.take()
    }

    #[test]
    fn an_interrupt_is_one_signal_and_what_came_before_is_none() {
        use std::io::Write;
        let (node, mut device) = node();
        let trigger = Signal::new().unwrap();
        device.write_all(&7_u32.to_ne_bytes()).unwrap();
        let line = Line::forward(&node, trigger.as_fd()).unwrap();
        for count in 8_u32..11 {
            device.write_all(&count.to_ne_bytes()).unwrap();
            assert_eq!(await_signal(&trigger), 1);
        }
        drop(line);
        device.write_all(&11_u32.to_ne_bytes()).unwrap();
        assert_eq!(trigger.take(), 0);
    }
}
