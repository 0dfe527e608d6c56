//! What an `edu` device can do for a client.

#![forbid(unsafe_code)]
