//! The iohost command.
