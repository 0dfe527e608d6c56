//! Commands about devices, to `/dev/ublk-control`.

#![expect(unsafe_code)]
// UNSAFETY: a command names its buffer by address.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::Path;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::libc::Ioctl;

use crate::UblkError;

const NODE: &str = "/dev/ublk-control";

/// Bytes of `struct ublksrv_ctrl_cmd`.
const COMMAND_LENGTH: usize = 32;

/// What a command is, as `include/uapi/linux/ublk_cmd.h` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// The kernel writes the buffer.
    GetInfo,
    /// The kernel reads and writes the buffer.
    Add,
    Remove,
    Start,
    Stop,
    /// The kernel reads the buffer.
    SetParameters,
}

impl Command {
    /// Encoded as an ioctl's number, which the later kernels insist on.
    fn number(self) -> u32 {
        let reads = |number| nix::request_code_read!(b'u', number, COMMAND_LENGTH);
        let changes = |number| nix::request_code_readwrite!(b'u', number, COMMAND_LENGTH);
        let number: Ioctl = match self {
            Command::GetInfo => reads(0x02),
            Command::Add => changes(0x04),
            Command::Remove => changes(0x05),
            Command::Start => changes(0x06),
            Command::Stop => changes(0x07),
            Command::SetParameters => changes(0x08),
        };
        number as u32
    }
}

/// Has a command done, and waits for that. `device` is its number, or `u32::MAX` for one that the
/// kernel chooses; `data` is the command's own. The kernel reads or writes `buffer`.
pub(crate) fn command(
    command: Command,
    device: u32,
    data: u64,
    buffer: &mut [u8],
) -> Result<(), UblkError> {
    let control = open()?;
    match submit(&control, command, device, data, buffer) {
        Ok(()) => Ok(()),
        Err(err) if err.raw_os_error() == Some(nix::libc::ENODEV) => {
            Err(UblkError::NoSuchDevice { number: device })
        }
        Err(source) => {
            let operation = format!("{command:?} of ublk device {}", device.cast_signed());
            Err(UblkError::Kernel { operation, source })
        }
    }
}

fn open() -> Result<File, UblkError> {
    let node = Path::new(NODE).to_owned();
    OpenOptions::new().read(true).write(true).open(&node).map_err(|err| match err.kind() {
        ErrorKind::NotFound => UblkError::Missing { node },
        ErrorKind::PermissionDenied => UblkError::Permission { node },
        _ => UblkError::Kernel { operation: format!("opening {NODE}"), source: err },
    })
}

/// One ring for one command: they are rare, and may wait for each other.
fn submit(
    control: &File,
    command: Command,
    device: u32,
    data: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1)?;
    let mut bytes = [0; 80];
    // struct ublksrv_ctrl_cmd: device, queue (none), length and address of the buffer, data.
    bytes[0..4].copy_from_slice(&device.to_ne_bytes());
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(buffer.len() as u16).to_ne_bytes());
    bytes[8..16].copy_from_slice(&(buffer.as_mut_ptr().expose_provenance() as u64).to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    let control = types::Fd(control.as_raw_fd());
    let entry = opcode::UringCmd80::new(control, command.number()).cmd(bytes).build();
    // SAFETY: the file and the buffer, of the length that is said, are borrowed until this function
    // returns, and it does not return before the command has ended (or was never begun).
    unsafe { ring.submission().push(&entry) }.expect("a new ring has room for one");
    loop {
        let waited = ring.submit_and_wait(1);
        // A command that the kernel has taken is waited for whatever it says: it has the buffer.
        if let Err(err) = waited
            && err.kind() != ErrorKind::Interrupted
            && !ring.submission().is_empty()
        {
            return Err(err);
        }
        if let Some(done) = ring.completion().next() {
            return match done.result() {
                error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
                _ => Ok(()),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_header() {
        // As a C compiler has them from <linux/ublk_cmd.h>.
        assert_eq!(Command::GetInfo.number(), 0x8020_7502);
        assert_eq!(Command::Add.number(), 0xc020_7504);
        assert_eq!(Command::Remove.number(), 0xc020_7505);
        assert_eq!(Command::Start.number(), 0xc020_7506);
        assert_eq!(Command::Stop.number(), 0xc020_7507);
        assert_eq!(Command::SetParameters.number(), 0xc020_7508);
    }
}
