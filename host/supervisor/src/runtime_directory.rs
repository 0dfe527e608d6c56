//! The runtime directory: one daemon in it at a time, and its control socket.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use iohost_control::host::Failure;
use iohost_control::varlink::INTERFACE;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The longest path a Unix socket can have, without its terminator (`sun_path`, unix(7)).
const LONGEST_SOCKET_PATH: usize = 107;

/// The directory, held for as long as this lives; then the socket is removed.
#[derive(Debug)]
pub(crate) struct RuntimeDirectory {
    socket: PathBuf,
    /// The kernel drops the lock with the process, however it ends.
    _lock: Flock<File>,
}

impl RuntimeDirectory {
    /// Makes the directory if it is not there, and holds it.
    pub(crate) fn hold(directory: &Path) -> Result<Self, Failure> {
        let socket = directory.join(INTERFACE);
        if socket.as_os_str().len() > LONGEST_SOCKET_PATH {
            return Err(Failure::new(
                "path-too-long",
                format!(
                    "the control socket's path {} has {} bytes, a socket's can have {}",
                    socket.display(),
                    socket.as_os_str().len(),
                    LONGEST_SOCKET_PATH
                ),
                "name a shorter directory with --runtime-dir",
            ));
        }
        let refused = |what: &str, err: io::Error| {
            Failure::new(
                "runtime-directory",
                format!("the runtime directory {} {what}: {err}", directory.display()),
                "run the daemon as root, or name a directory of yours with --runtime-dir",
            )
        };
        std::fs::create_dir_all(directory).map_err(|err| refused("cannot be made", err))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(directory.join("lock"))
            .map_err(|err| refused("cannot be written to", err))?;
        let mut lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut held, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let _ = held.read_to_string(&mut pid);
                return Err(Failure::new(
                    "already-running",
                    format!(
                        "a daemon with process id {} has the runtime directory {} already",
                        pid.trim(),
                        directory.display()
                    ),
                    "use that one, stop it first, or give this one its own --runtime-dir",
                ));
            }
            Err((_, err)) => return Err(refused("cannot be locked", err.into())),
        };
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        written.map_err(|err| refused("cannot be written to", err))?;
        Ok(Self { socket, _lock: lock })
    }

    /// Listens on the control socket. A socket that a dead daemon left is replaced: nobody else
    /// can be behind it while we hold the lock.
    pub(crate) fn listen(&self) -> Result<UnixListener, Failure> {
        let refused = |err: io::Error| {
            Failure::new(
                "control-socket",
                format!("the control socket {} cannot be made: {err}", self.socket.display()),
                "remove what is in its place, or name another directory with --runtime-dir",
            )
        };
        match std::fs::remove_file(&self.socket) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(refused(err)),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket).map_err(refused)?;
        // Connecting takes write permission: owner and group, nobody else.
        std::fs::set_permissions(&self.socket, Permissions::from_mode(0o660)).map_err(refused)?;
        Ok(listener)
    }

    /// The control socket's path.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for RuntimeDirectory {
    fn drop(&mut self) {
        // A socket that stays is refused by the kernel and replaced by the next daemon.
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_told_the_process_id_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let _first = RuntimeDirectory::hold(directory.path()).unwrap();
        let failure = RuntimeDirectory::hold(directory.path()).unwrap_err();
        let expected = format!("a daemon with process id {}", std::process::id());
        assert!(failure.message.starts_with(&expected), "{}", failure.message);
    }

    #[test]
    fn what_a_dead_daemon_left_is_in_nobodys_way() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("lock"), "1\n").unwrap();
        drop(UnixListener::bind(directory.path().join(INTERFACE)).unwrap());
        let held = RuntimeDirectory::hold(directory.path()).unwrap();
        held.listen().unwrap();
        assert!(held.socket().exists());
        drop(held);
        assert!(!directory.path().join(INTERFACE).exists());
    }

    #[test]
    fn a_path_no_socket_can_have_is_refused_with_both_lengths() {
        let failure =
            RuntimeDirectory::hold(Path::new(&format!("/tmp/{}", "x".repeat(120)))).unwrap_err();
        assert_eq!(failure.code, "path-too-long");
        assert!(failure.message.contains("has 135 bytes, a socket's can have 107"), "{failure}");
    }
}
