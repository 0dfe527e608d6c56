//! The library for programs that use a driver.
