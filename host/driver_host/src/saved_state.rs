//! What one version of a driver leaves to the next, on its way through the daemon, which does not look
//! into it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use iohost_control::host::StateSize;
use iohost_memory::SharedMemory;

/// The most bytes that a driver may leave.
const MOST: u64 = 16 * 1024 * 1024;

pub(crate) fn write(version: u32, data: &[u8]) -> io::Result<(StateSize, OwnedFd)> {
    let size = StateSize { version, bytes: data.len() as u64 };
    check(size)?;
    let file = SharedMemory::create(c"iohost-state", data.len().max(1))?;
    file.write_at(0, data);
    Ok((size, file.as_fd().try_clone_to_owned()?))
}

pub(crate) fn read(size: StateSize, file: OwnedFd) -> io::Result<Vec<u8>> {
    check(size)?;
    let mut data = vec![0; size.bytes as usize];
    // From the start, whoever has read the file before: the version before may need it again.
    File::from(file).read_exact_at(&mut data, 0)?;
    Ok(data)
}

fn check(size: StateSize) -> io::Result<()> {
    if size.bytes > MOST {
        let words = format!("{} bytes, the most is {MOST}", size.bytes);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, words));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_nothing_too_large_is() {
        for data in [&b""[..], b"state"] {
            let (size, file) = write(3, data).unwrap();
            // By the new version, and by the old one that runs again.
            for _ in 0..2 {
                assert_eq!(read(size, file.try_clone().unwrap()).unwrap(), data);
            }
        }
        assert!(write(1, &vec![0; MOST as usize + 1]).is_err());
    }
}
