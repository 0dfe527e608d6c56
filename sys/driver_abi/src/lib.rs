//! The C ABI between the driver host and a plugin.
