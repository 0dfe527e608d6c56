//! PCI functions that come and go, as the kernel announces them.
//!
//! Source: Linux, `lib/kobject_uevent.c` (`kobject_uevent_env`: a line `ACTION@DEVPATH`, then
//! `KEY=value`, each ended by a zero byte) and netlink(7), `NETLINK_KOBJECT_UEVENT`, group 1.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};

use crate::{PciAddress, Sysfs};

/// What happened to a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hotplug {
    /// It is on the bus now; its driver may come next.
    Added(PciAddress),
    /// A kernel driver has it now.
    Bound(PciAddress, String),
    /// Announcements were lost, as nobody read them: anything may have happened.
    Missed,
}

/// The kernel's announcements. Needs no rights.
#[derive(Debug)]
pub struct HotplugSocket(OwnedFd);

/// The kernel's own limit is 2048 bytes of variables and a path.
const LONGEST: usize = 8192;

/// The kernel speaks to this group; udev to another one.
const KERNEL_GROUP: u32 = 1;

impl HotplugSocket {
    /// Listens from now on, to what is announced of the functions of `sysfs`: by the kernel, or, of
    /// a tree that a test made, by whoever sends to the datagram socket `uevents` in it.
    ///
    /// Errors: what `socket` and `bind` say; `EPROTONOSUPPORT` from a kernel without networking.
    pub fn open(sysfs: &Sysfs) -> io::Result<Self> {
        if !sysfs.is_the_kernels() {
            let socket = UnixDatagram::bind(sysfs.root().join("uevents"))?;
            socket.set_nonblocking(true)?;
            return Ok(Self(socket.into()));
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(fd))
    }

    /// The next announcement of a PCI function that is one of [`Hotplug`]; `None` when there is
    /// none for now.
    pub fn next_event(&self) -> Option<Hotplug> {
        let mut buffer = [0; LONGEST];
        loop {
            match recvfrom::<NetlinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                // Of a process, which is not to be believed.
                Ok((_, Some(sender))) if sender.pid() != 0 => {}
                Ok((len, _)) => {
                    if let Some(event) = parse(&buffer[..len]) {
                        return Some(event);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Some(Hotplug::Missed),
                Err(_) => return None,
            }
        }
    }
}

impl AsFd for HotplugSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn parse(text: &[u8]) -> Option<Hotplug> {
    let text = std::str::from_utf8(text).ok()?;
    let value = |key: &str| {
        let mut variables = text.split('\0').skip(1).filter_map(|pair| pair.split_once('='));
        variables.find(|(name, _)| *name == key).map(|(_, value)| value)
    };
    if value("SUBSYSTEM") != Some("pci") {
        return None;
    }
    let address = value("PCI_SLOT_NAME")?.parse().ok()?;
    match value("ACTION")? {
        "add" => Some(Hotplug::Added(address)),
        "bind" => Some(Hotplug::Bound(address, value("DRIVER")?.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(lines: &[&str]) -> Option<Hotplug> {
        parse(lines.iter().map(|line| format!("{line}\0")).collect::<String>().as_bytes())
    }

    #[test]
    fn functions_that_come_and_their_drivers_are_told_and_nothing_else() {
        let path = "/devices/pci0000:00/0000:00:02.0/0000:01:00.0";
        let at = |action: &str| format!("{action}@{path}");
        let address: PciAddress = "0000:01:00.0".parse().unwrap();
        let slot = "PCI_SLOT_NAME=0000:01:00.0";
        let of = |action: &str, more: &[&str]| {
            let action_line = format!("ACTION={action}");
            let head = at(action);
            let mut lines = vec![head.as_str(), &action_line, "SUBSYSTEM=pci", slot];
            lines.extend(more);
            announcement(&lines)
        };
        assert_eq!(of("add", &[]), Some(Hotplug::Added(address)));
        let bound = of("bind", &["DRIVER=vfio-pci"]);
        assert_eq!(bound, Some(Hotplug::Bound(address, "vfio-pci".to_owned())));
        assert_eq!(of("bind", &[]), None);
        assert_eq!(of("remove", &[]), None);
        assert_eq!(announcement(&["add@/devices/x", "ACTION=add", "SUBSYSTEM=usb", slot]), None);
        assert_eq!(announcement(&["add@/devices/x", "ACTION=add", "SUBSYSTEM=pci"]), None);
        assert_eq!(parse(&[0xff, 0xfe]), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn a_socket_that_nothing_was_announced_on_has_nothing_to_tell() {
        let socket = HotplugSocket::open(&Sysfs::default()).unwrap();
        // Whatever this machine does meanwhile, the call returns.
        while socket.next_event().is_some() {}
    }
}
