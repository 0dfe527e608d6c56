//! Emulated devices, in process or as vfio-user servers.
