//! The structures of `Identify` (section 5.15.2).

use super::namespace::Namespace;
use super::{EVENT_REQUESTS, Options, VENDOR};

/// Bytes of each structure.
pub(super) const SIZE: usize = 4096;

/// A structure being filled in.
struct Structure(Vec<u8>);

impl Structure {
    fn new() -> Self {
        Self(vec![0; SIZE])
    }

    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }

    /// ASCII, padded by spaces (section 1.5).
    fn text(&mut self, at: usize, len: usize, text: &str) {
        let padded = format!("{text:<len$}");
        self.0[at..at + len].copy_from_slice(padded.as_bytes());
    }
}

/// Figure 247.
pub(super) fn controller(options: &Options, namespaces: u32) -> Vec<u8> {
    let mut data = Structure::new();
    data.put(0, VENDOR.to_le_bytes());
    data.put(2, 0x1af4_u16.to_le_bytes());
    data.text(4, 20, "IOHOST0001");
    data.text(24, 40, "iohost emulated NVMe");
    data.text(64, 8, env!("CARGO_PKG_VERSION"));
    data.put(77, [options.mdts]);
    data.put(80, 0x0001_0400_u32.to_le_bytes()); // VER
    data.put(92, (1_u32 << 8).to_le_bytes()); // OAES: namespace attribute notices
    data.put(111, [1]); // CNTRLTYPE: an I/O controller
    let optional_admin = u16::from(options.shadow_doorbells) << 8;
    data.put(256, optional_admin.to_le_bytes());
    data.put(258, [3]); // ACL: four aborts at a time
    data.put(259, [EVENT_REQUESTS as u8 - 1]);
    data.put(260, [0x03]); // FRMW: one firmware slot, which is read only
    data.put(261, [0x04]); // LPA: extended data for get log page
    data.put(262, [super::logs::ERROR_ENTRIES as u8 - 1]);
    data.put(266, 343_u16.to_le_bytes()); // WCTEMP, in kelvin
    data.put(268, 353_u16.to_le_bytes()); // CCTEMP
    data.put(512, [0x66]); // SQES: 64 bytes
    data.put(513, [0x44]); // CQES: 16 bytes
    data.put(516, namespaces.to_le_bytes());
    let optional_io = if options.optional_commands { 1_u16 << 2 | 1 << 3 } else { 0 };
    data.put(520, optional_io.to_le_bytes());
    data.put(525, [1]); // VWC: there is a volatile write cache
    data.put(536, u32::from(options.sgls).to_le_bytes()); // SGLS: wherever a host likes
    let name = b"nqn.2024-01.org.iohost:emulated";
    data.0[768..768 + name.len()].copy_from_slice(name);
    data.put(2048, 2500_u16.to_le_bytes()); // power state 0: 25 W at most
    data.0
}

/// Figure 245.
pub(super) fn namespace(namespace: &Namespace, nsid: u32) -> Vec<u8> {
    let mut data = Structure::new();
    for at in [0, 8, 16] {
        data.put(at, namespace.blocks().to_le_bytes()); // NSZE, NCAP, NUSE
    }
    data.put(33, [0x09]); // DLFEAT: deallocated blocks read as zeros, also by write zeroes
    data.put(99, [u8::from(namespace.is_read_only())]); // NSATTR: write protected
    data.put(120, eui64(nsid));
    data.put(130, [namespace.block().trailing_zeros() as u8]); // LBAF0: LBADS
    data.0
}

/// Figure 248: an EUI-64, which is what 1.4 asks for at least one of.
pub(super) fn descriptors(nsid: u32) -> Vec<u8> {
    let mut data = Structure::new();
    data.put(0, [1, 8, 0, 0]);
    data.put(4, eui64(nsid));
    data.0
}

/// Figure 249: namespaces after one of them.
pub(super) fn list(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut data = Structure::new();
    for (at, number) in (0..SIZE).step_by(4).zip(numbers) {
        data.put(at, number.to_le_bytes());
    }
    data.0
}

/// Of QEMU's organisation (52:54:00), and our own numbers.
fn eui64(nsid: u32) -> [u8; 8] {
    let [a, b, c, d] = nsid.to_be_bytes();
    [0x52, 0x54, 0x00, 0x49, a, b, c, d]
}
