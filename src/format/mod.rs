//! Bytes of everything that lies on a replica or in the local tables.
//!
//! Pure: no I/O, no clock, no randomness. `docs/format.md` describes each byte.

pub mod checkpoint;
pub mod codec;
pub mod frame;
mod json;
pub mod names;
pub mod record;
pub mod segment;
pub mod tables;
pub mod volume;
