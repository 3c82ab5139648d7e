//! Local block content: the slot file, dirty blocks, the LRU of clean ones, the allowance of disk.
//!
//! Knows neither files nor replicas.

pub mod dirty;
pub mod ranges;
pub mod slots;
pub mod space;
pub mod store;

pub use store::{BlockStore, StoreError, Supply};
