//! One replica: its object store, error classes, health, shipper and reader.
//!
//! Owns everything that crosses a network; knows neither files nor the journal.

mod contract;
mod error;
pub mod fault;
mod folder;
pub mod health;
mod pace;
mod store;
mod target;

pub use contract::{Backlog, CursorStore, FetchError, FrameSource, Outbox, Staged, StagedKind};
pub use error::{ErrorKind, StoreError};
pub use store::{Conditional, Created, Limits, ObjectInfo, Requests, Store};
pub use target::{Place, ReplicaSpec, Scheme, TargetError, check_distinct, same_place};
