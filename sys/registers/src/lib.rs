//! Device registers: mapped regions and typed register maps.
//!
//! A mapped region is reached by volatile accesses of the register's own width, never through a
//! reference. `register_map!` gives each register a type, a width and an access right, so that a
//! driver cannot read a write-only register or write four bytes where the device takes two.

mod region;

pub use region::MappedRegion;
