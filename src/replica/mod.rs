//! One replica: its object store, error classes, health, shipper and reader.
//!
//! Owns everything that crosses a network; knows neither files nor the journal.

mod contract;

pub use contract::{Backlog, CursorStore, FetchError, FrameSource, Outbox, Staged, StagedKind};
