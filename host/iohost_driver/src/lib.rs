//! The SDK for people who write drivers.
