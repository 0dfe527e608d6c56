//! Device registers: mapped regions and typed register maps.
//!
//! A mapped region is reached by volatile accesses of the register's own width, never through a
//! reference. [`register_map!`] gives each register a type, a width and an access right, so that
//! a driver cannot read a write-only register or write four bytes where the device takes two.
//!
//! ```
//! mod regs {
//!     use iohost_registers::{register_bits, register_map};
//!
//!     register_map! {
//!         /// BAR 0 of a small device.
//!         pub struct Uart[0x100] {
//!             0x00 Ro ID:      u32,
//!             0x04 Rw CONTROL: Control,
//!             0x08 Wo DATA:    u8,
//!         }
//!     }
//!
//!     register_bits! {
//!         pub struct Control: u32 {
//!             const ENABLE = 0x01;
//!             fn divisor = 8..=23;
//!         }
//!     }
//! }
//! use regs::Control;
//! # use std::cell::RefCell;
//! # use iohost_registers::{RegisterSpace, Width};
//! # struct Fake(RefCell<[u64; 32]>);
//! # impl RegisterSpace for Fake {
//! #     type Error = std::convert::Infallible;
//! #     fn load<W: Width>(&self, at: u64) -> Result<W, Self::Error> { Ok(W::from_u64(self.0.borrow()[at as usize])) }
//! #     fn store<W: Width>(&self, at: u64, v: W) -> Result<(), Self::Error> { self.0.borrow_mut()[at as usize] = v.to_u64(); Ok(()) }
//! # }
//! # let bar = Fake(RefCell::new([0; 32]));
//!
//! regs::CONTROL.write(&bar, Control::ENABLE.with_divisor(26))?;
//! let control = regs::CONTROL.read(&bar)?;
//! assert!(control.contains(Control::ENABLE));
//! assert_eq!(control.divisor(), 26);
//! # Ok::<(), std::convert::Infallible>(())
//! ```

mod bits;
mod fault;
mod map;
mod region;
mod register;

pub use fault::lost_accesses;
pub use region::{MapWindow, MappedRegion, RegisterWindow};
pub use register::{
    OutOfRegion, Readable, Register, RegisterArray, RegisterMap, RegisterSpace, RegisterValue, Ro,
    Rw, Width, Wo, Writable,
};

/// What the macros of this crate expand to; not for use by hand.
#[doc(hidden)]
pub mod expansion {
    pub use crate::map::{Entry, check};
    pub use crate::register::{register, register_array};
    pub use pastey::paste;
}
