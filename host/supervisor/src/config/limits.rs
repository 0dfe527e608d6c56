//! `[limits]`: what clients may ask for.

use serde::Deserialize;

/// What clients may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sessions of one service at the same time.
    pub sessions_per_service: usize,
    /// Bytes of a queue, where the client does not say.
    pub queue_bytes: u32,
    /// The most bytes of a queue that a client may ask for.
    pub largest_queue_bytes: u32,
    /// Sessions of one process with all services.
    pub sessions_per_client: usize,
    /// Bytes of the queues of these sessions.
    pub memory_per_client: u64,
    /// Connections of one process.
    pub connections_per_client: usize,
    /// Requests of one process, on all its connections.
    pub requests_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions_per_service: 16,
            queue_bytes: 1024 * 1024,
            largest_queue_bytes: 64 * 1024 * 1024,
            sessions_per_client: 16,
            memory_per_client: 256 * 1024 * 1024,
            connections_per_client: 64,
            requests_per_second: 1000,
        }
    }
}
