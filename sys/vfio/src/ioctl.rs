//! The calls on VFIO's groups and devices, and on iommufd.

#![expect(unsafe_code)]
// UNSAFETY: ioctls hand the kernel addresses of our memory.

use std::ffi::{CStr, c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::VfioContainer;

/// What comes back in `argsz` is believed up to here; no reply of Linux comes near it.
const LONGEST_REPLY: usize = 1 << 20;

/// More than any fixed part of a VFIO structure, which the kernel reads before it looks at
/// `argsz`.
const SHORTEST_BUFFER: usize = 128;

/// An open `/dev/vfio/N`. The kernel lets one process at a time have it.
#[derive(Debug)]
pub(crate) struct GroupFile(File);

/// An open `/dev/vfio/vfio` that has no IOMMU driver of type 1.
#[derive(Debug)]
pub(crate) struct ContainerFile(File);

/// An open device, as its group hands it out, or its own node once it is bound to an iommufd.
#[derive(Debug)]
pub(crate) struct DeviceFile(File);

/// An open `/dev/iommu`.
#[derive(Debug)]
pub(crate) struct IommuFile(File);

/// A structure of VFIO or iommufd: its size in the first word, then fields of 32 and 64 bits,
/// perhaps followed by a list or by capabilities.
///
/// Invariant: `words` is at least `SHORTEST_BUFFER` bytes long and at least as long as the size
/// in its first word when it goes to the kernel.
#[derive(Debug)]
pub(crate) struct Message {
    words: Vec<u32>,
    len: usize,
}

/// The calls on a device that take a [`Message`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceCall {
    GetInfo = 7,
    GetRegionInfo = 8,
    GetInterruptInfo = 9,
    SetInterrupts = 10,
    GetHotResetInfo = 12,
    HotReset = 13,
    BindIommufd = 18,
    AttachIommufd = 19,
}

/// The calls on an iommufd that take a [`Message`]. Source: Linux, `include/uapi/linux/iommufd.h`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum IommuCall {
    AllocateIoas = 0x81,
    Unmap = 0x86,
}

/// `IOMMU_IOAS_IOVA_RANGES` and `IOMMU_IOAS_MAP`, whose structures hold addresses of ours.
const IOVA_RANGES: u32 = 0x84;
const MAP: u32 = 0x85;

/// `iommu_ioas_iova_ranges`: size, address space, count, reserved word, address of the list,
/// alignment.
const IOVA_RANGES_LEN: usize = 32;

/// `iommu_ioas_map`: size, flags, address space, reserved word, our address, length, its address.
const MAP_LEN: usize = 40;

/// More ranges than this, no IOMMU has.
const MOST_RANGES: u32 = 4096;

const GROUP_GET_STATUS: u32 = 3;
const GROUP_SET_CONTAINER: u32 = 4;
const GROUP_GET_DEVICE_FD: u32 = 6;
const SET_IOMMU: u32 = 2;
const DEVICE_RESET: u32 = 11;
const IOMMU_GET_INFO: u32 = 12;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
const fn request(number: u32) -> c_ulong {
    const VFIO_BASE: u32 = 100;
    (uapi::VFIO_TYPE as c_ulong) << 8 | (VFIO_BASE + number) as c_ulong
}

/// `_IO(IOMMUFD_TYPE, number)`. It is VFIO's type too: the numbers keep them apart.
const fn iommu_request(number: u32) -> c_ulong {
    (b';' as c_ulong) << 8 | number as c_ulong
}

impl GroupFile {
    /// Opens the node of a group.
    pub(crate) fn open(node: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(node).map(Self)
    }

    /// Whether every device of the group is in hands that VFIO trusts.
    pub(crate) fn is_viable(&self) -> io::Result<bool> {
        let mut status = Message::of::<uapi::vfio_group_status>();
        exchange(self.0.as_fd(), request(GROUP_GET_STATUS), &mut status)?;
        let flags = status.u32(std::mem::offset_of!(uapi::vfio_group_status, flags));
        Ok(flags & uapi::VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    /// Puts the group into a container.
    pub(crate) fn set_container(&self, container: &impl AsRawFd) -> io::Result<()> {
        let container: RawFd = container.as_raw_fd();
        // SAFETY:
        // 1. The group's descriptor is open: `self` owns it.
        // 2. This call reads one `int` through its argument, which outlives the call.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), request(GROUP_SET_CONTAINER), &raw const container)
        };
        check(result).map(drop)
    }

    /// Opens one device of the group, by its name in sysfs.
    pub(crate) fn device(&self, name: &CStr) -> io::Result<DeviceFile> {
        // SAFETY:
        // 1. The group's descriptor is open: `self` owns it.
        // 2. This call reads a string up to its end through its argument; `name` has one and
        //    outlives the call.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request(GROUP_GET_DEVICE_FD), name.as_ptr()) };
        let fd = check(result)?;
        // SAFETY: the call made a descriptor for us, which nobody else knows of.
        let device = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DeviceFile(device.into()))
    }

    /// For a hot reset, which wants it as a proof of ownership.
    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl ContainerFile {
    /// Opens the node of containers.
    pub(crate) fn open(node: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(node).map(Self)
    }
}

impl AsRawFd for ContainerFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl IommuFile {
    /// Opens the node of iommufd; each open is a world of its own.
    pub(crate) fn open(node: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(node).map(Self)
    }

    /// One call that sends a message and gets it back with the answer in it.
    pub(crate) fn call(&self, call: IommuCall, message: &mut Message) -> io::Result<()> {
        exchange(self.0.as_fd(), iommu_request(call as u32), message)
    }

    /// The addresses that an address space can map, first and last of each range.
    pub(crate) fn iova_ranges(&self, ioas: u32) -> io::Result<Vec<[u64; 2]>> {
        let mut count: u32 = 16;
        loop {
            let mut ranges = vec![[0_u64; 2]; count as usize];
            let mut message = Message::with_len(IOVA_RANGES_LEN);
            message
                .set(4, ioas)
                .set(8, count)
                .set64(16, ranges.as_mut_ptr().expose_provenance() as u64);
            message.words[0] = message.len as u32;
            // SAFETY:
            // 1. The descriptor is open: `self` owns it.
            // 2. The kernel reads and writes no more than the size in the first word, which the
            //    buffer of the message is longer than.
            // 3. It writes at most `count` pairs of 64-bit numbers from the address at 16 on:
            //    `ranges` has that many, outlives the call, is not looked at before its end, and
            //    is of a type for which every bit pattern is a value.
            let result = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    iommu_request(IOVA_RANGES),
                    message.words.as_mut_ptr(),
                )
            };
            match check(result) {
                Ok(_) => {
                    ranges.truncate(message.u32(8) as usize);
                    return Ok(ranges);
                }
                // The count is then that of all there are.
                Err(err)
                    if err.raw_os_error() == Some(libc::EMSGSIZE)
                        && (count + 1..=MOST_RANGES).contains(&message.u32(8)) =>
                {
                    count = message.u32(8);
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// Maps `len` bytes of this process from `address` on at `iova`, for reading and writing.
    ///
    /// # Safety
    ///
    /// The bytes `address..address + len` are mapped in this process, nobody has a reference to
    /// them, and none is made while the mapping lasts: a device can write there.
    pub(crate) unsafe fn map(
        &self,
        ioas: u32,
        iova: u64,
        address: *mut u8,
        len: u64,
    ) -> io::Result<()> {
        const FIXED_IOVA: u32 = 1;
        const WRITEABLE: u32 = 2;
        const READABLE: u32 = 4;
        let mut message = Message::with_len(MAP_LEN);
        message
            .set(4, FIXED_IOVA | WRITEABLE | READABLE)
            .set(8, ioas)
            .set64(16, address.expose_provenance() as u64)
            .set64(24, len)
            .set64(32, iova);
        exchange(self.0.as_fd(), iommu_request(MAP), &mut message)
    }
}

impl AsRawFd for IommuFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl DeviceFile {
    /// Opens the node of a device.
    pub(crate) fn open(node: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(node).map(Self)
    }

    /// One call that sends a message and gets it back with the answer in it.
    pub(crate) fn call(&self, call: DeviceCall, message: &mut Message) -> io::Result<()> {
        exchange(self.0.as_fd(), request(call as u32), message)
    }

    /// The same, once more with the room that the kernel asked for, if it did.
    pub(crate) fn call_with_room(&self, call: DeviceCall, message: &mut Message) -> io::Result<()> {
        self.call(call, message)?;
        if message.wants_room() {
            message.make_room()?;
            self.call(call, message)?;
        }
        Ok(())
    }

    /// Resets the function, if its `RESET` flag says that it can be.
    pub(crate) fn reset(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open, `self` owns it; this call has no argument.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request(DEVICE_RESET)) };
        check(result).map(drop)
    }

    /// The file, for region access.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

/// Chooses the IOMMU driver of a container that has a group.
pub(crate) fn set_iommu(container: &impl AsRawFd, kind: u32) -> io::Result<()> {
    // SAFETY: the container's descriptor is open during the borrow; the argument of this call is
    // a number, not an address.
    let result =
        unsafe { libc::ioctl(container.as_raw_fd(), request(SET_IOMMU), c_ulong::from(kind)) };
    check(result).map(drop)
}

/// What a container's IOMMU can do, with its capabilities.
pub(crate) fn iommu_info(container: &VfioContainer) -> io::Result<Message> {
    // SAFETY: the container's descriptor is open during the borrow, which `fd` does not outlive.
    let fd = unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) };
    let mut info = Message::of::<uapi::vfio_iommu_type1_info>();
    exchange(fd, request(IOMMU_GET_INFO), &mut info)?;
    if info.wants_room() {
        info.make_room()?;
        exchange(fd, request(IOMMU_GET_INFO), &mut info)?;
    }
    Ok(info)
}

/// One call with a structure that starts with its own size. `request` is such a call of the kind
/// of file that `fd` is: the callers above see to that.
fn exchange(fd: BorrowedFd<'_>, request: c_ulong, message: &mut Message) -> io::Result<()> {
    message.words[0] = message.len as u32;
    // SAFETY:
    // 1. `fd` is open during the borrow.
    // 2. Each of these calls reads the fixed part of its structure, which is shorter than
    //    `SHORTEST_BUFFER`, and then reads and writes no more than the size in the first word;
    //    the buffer is at least as long as both, and nobody else refers to it.
    // 3. Every bit pattern is a value of `u32`, whatever the kernel writes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, message.words.as_mut_ptr()) };
    check(result).map(drop)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Message {
    /// A zeroed structure of the size of `T`.
    pub(crate) fn of<T>() -> Self {
        Self::with_len(size_of::<T>())
    }

    /// A zeroed structure of `len` bytes.
    pub(crate) fn with_len(len: usize) -> Self {
        Self { words: vec![0; len.max(SHORTEST_BUFFER).div_ceil(4)], len }
    }

    /// Whether the kernel has more to say than fits.
    pub(crate) fn wants_room(&self) -> bool {
        self.words[0] as usize > self.len
    }

    /// Grows to the size that the kernel put into the first word. The fields stay.
    pub(crate) fn make_room(&mut self) -> io::Result<()> {
        let len = self.words[0] as usize;
        if len > LONGEST_REPLY {
            return Err(io::Error::other(format!("the kernel asks for a reply of {len} bytes")));
        }
        self.len = self.len.max(len);
        self.words.resize(self.len.max(SHORTEST_BUFFER).div_ceil(4), 0);
        Ok(())
    }

    /// Sets the field at `offset` bytes.
    pub(crate) fn set(&mut self, offset: usize, value: u32) -> &mut Self {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len, "no field at {offset}");
        self.words[offset / 4] = value;
        self
    }

    /// Sets the 64-bit field at `offset` bytes.
    pub(crate) fn set64(&mut self, offset: usize, value: u64) -> &mut Self {
        let bytes = value.to_ne_bytes();
        let half = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        self.set(offset, u32::from_ne_bytes(half(0))).set(offset + 4, u32::from_ne_bytes(half(4)))
    }

    /// The field at `offset` bytes; 0 past the end of what the structure holds.
    pub(crate) fn u32(&self, offset: usize) -> u32 {
        let inside = offset.is_multiple_of(4) && offset + 4 <= self.len;
        if inside { self.words[offset / 4] } else { 0 }
    }

    /// The 64-bit field at `offset` bytes.
    pub(crate) fn u64(&self, offset: usize) -> u64 {
        let (first, second) = (self.u32(offset), self.u32(offset + 4));
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&first.to_ne_bytes());
        bytes[4..].copy_from_slice(&second.to_ne_bytes());
        u64::from_ne_bytes(bytes)
    }

    /// Bytes of the structure.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_grows_to_what_the_kernel_asks_for_and_keeps_its_fields() {
        let mut message = Message::with_len(16);
        message.set(8, 7);
        message.words[0] = 4096;
        assert!(message.wants_room());

        message.make_room().unwrap();

        assert_eq!((message.len(), message.u32(8), message.u32(4092)), (4096, 7, 0));
        assert!(message.words.len() * 4 >= 4096);
    }

    #[test]
    fn a_reply_of_a_size_that_no_kernel_has_is_refused() {
        let mut message = Message::with_len(16);
        message.words[0] = u32::MAX;
        assert!(message.make_room().is_err());
    }

    #[test]
    fn a_field_past_the_end_reads_as_nothing() {
        let message = Message::with_len(16);
        assert_eq!((message.u32(16), message.u64(12)), (0, 0));
    }
}
