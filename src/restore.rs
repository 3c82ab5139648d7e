//! Bringing a volume back from its replicas alone.
//!
//! Owns the way from a list of stores to metadata tables (*survey* → *plan* → *load*) and from tables to a folder of files
//! (*tree*, *write*; *salvage* writes only what some records changed). Knows no mount and no local state; writes nothing to replicas.
//!
//! ```text
//! stores ─ survey ─▶ inventories ─ plan (pure) ─▶ plan ─ load ─▶ sink: tables ─ tree ─▶ list of entries
//!                                                                  └──────── write ─▶ files, with content
//! ```

mod anchor;
mod content;
pub(crate) mod fetch;
mod load;
mod plan;
mod sound;
mod survey;
mod tables;
#[cfg(test)]
mod testing;
mod tree;
mod trust;
mod write;

pub use anchor::{Anchor, anchor, load_through};
pub use content::Source;
pub use load::{LoadError, Loaded, Lost, SegmentSeen, Sink, load};
pub use plan::{Place, Plan, PlanError, Start, plan, plan_by, valid_epoch};
pub use sound::{Flaw, wrong_counter};
pub use survey::{Found, Inventory, SurveyError, survey};
pub use tables::Tables;
pub(crate) use tree::text;
pub use tree::{Entry, Filter, Listed, TreeError, list, walk};
pub use trust::{Doubt, Trust};
pub use write::salvage::{BlockContent, Changes, Incomplete, MissingPiece, Saved, Wanted, save};
pub use write::{Options, Problem, ProblemKind, Progress, Report, RestoreError, restore};

use crate::ids::ReplicaName;

/// An object that a replica holds but that is not what it should be: material for a repair.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The replica.
    pub replica: ReplicaName,
    /// The object's path.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
}
