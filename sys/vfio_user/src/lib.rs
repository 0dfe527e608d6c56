//! Client side of the vfio-user protocol.
