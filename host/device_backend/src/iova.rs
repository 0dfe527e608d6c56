//! Which I/O virtual addresses are in use.
