//! The daemon: configuration, matching, binding, supervision, the control interface.
