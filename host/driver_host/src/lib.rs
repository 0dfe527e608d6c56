//! The process that runs one driver for one device.
