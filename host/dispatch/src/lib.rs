//! The dispatch engine: serial queues and the sources that feed them.
