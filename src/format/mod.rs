//! Bytes of everything that lies on a replica or in the local tables.
//!
//! Pure: no I/O, no clock, no randomness. `docs/format.md` describes each byte.

pub mod brief;
pub mod checkpoint;
pub mod codec;
pub mod frame;
mod json;
pub mod limits;
pub mod local;
pub mod names;
pub mod record;
pub mod segment;
pub mod tables;
mod unpack;
pub mod volume;

/// Largest JSON object (volume, claim, manifest) that is read, in bytes.
pub use json::MAX_LEN as MAX_JSON;
