//! Local block content: the slot file, dirty blocks, the LRU of clean ones, the allowance of disk.
//!
//! Knows neither files nor replicas.

pub mod dirty;
mod near;
mod patches;
pub mod ranges;
mod recent;
pub mod slots;
pub mod space;
pub mod store;

/// Whether an error says that disk or quota is exhausted.
pub fn is_full(e: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

pub use store::{BlockStore, Missing, StoreError, Supply};
