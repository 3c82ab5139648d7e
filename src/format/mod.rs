//! Bytes of everything that lies on a replica or in the local tables.
//!
//! Pure: no I/O, no clock, no randomness. `docs/format.md` describes each byte.

pub mod codec;
pub mod local;
pub mod record;
pub mod tables;
