//! One replica: its object store, error classes, health, shipper and reader.
//!
//! Owns everything that crosses a network; knows neither files nor the journal.

mod absence;
mod attach;
pub mod belief;
pub mod chain;
mod contract;
mod digest;
mod error;
pub mod fault;
mod fence;
mod folder;
pub mod health;
pub mod limit;
mod pace;
pub mod read_plan;
mod reader;
mod roster;
mod shared;
mod shelf;
pub mod ship_plan;
mod shipper;
mod sight;
mod store;
mod target;
#[cfg(test)]
mod testing;
mod throttle;
mod transfer;
pub mod volume;

pub use absence::Absence;
pub use attach::Identity;
pub use contract::{Backlog, CursorStore, FetchError, FrameSource, Outbox, Staged, StagedKind};
pub use error::{ErrorKind, StoreError};
pub use fence::{Fence, FenceNote, FenceReason, Fenced, confirm, look_for_rivals, release};
pub use reader::{DEADLINE, Local, Reader};
pub use roster::Roster;
pub use shared::{Damage, DamageKind, LastError, Replica, ReplicaState, ReplicaStatus, jitter, unix_now};
pub use shelf::Shelf;
pub use shipper::{Shipper, Tuning, status};
pub use sight::footer_of;
pub use store::{Conditional, Created, Limits, ObjectInfo, RawSpeed, RawWork, Requests, Store};
pub use target::{Place, ReplicaSpec, Scheme, TargetError, check_distinct, same_place};
