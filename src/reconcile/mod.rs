//! Looking after replicas: what they should hold, what they hold, and mending the difference.
//!
//! ```text
//!  catalog (what is sealed) ─┐
//!  inventory (a listing) ────┼─▶ plan (pure) ─▶ pass: read, check (pure), repair ─▶ counters, memory
//!  peers' checkpoints ───────┘                        ▲
//!  damage met while reading ──────────────────────────┘
//! ```
//!
//! Owns passes over replicas: shallow ones compare names and sizes, deep ones read and verify every stored byte. Writes only copies of what
//! the volume holds anyway, deletes nothing, and touches no replica of another volume. How far a replica's cursor is, and filling one that
//! lacks its newest segments, is the shipper's business: it is only told to look again. Knows neither files nor the journal nor keys.

mod catalog;
mod check;
mod inventory;
pub mod memory;
mod mend;
mod pass;
pub mod plan;
mod repair;
mod runner;
mod types;

pub use catalog::{Catalog, NamedCheckpoints, Sealed};
pub use check::{Known, Verdict, check};
pub use runner::{Reconciler, Settings, Shared};
pub use types::{Counters, FindingText, ScrubRequest, ScrubState, ScrubStatus, Summary};
