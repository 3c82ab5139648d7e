//! What commands see of the reconciler, as JSON.
//!
//! Owns the words only.

use serde::{Deserialize, Serialize};

use crate::ids::ReplicaName;

/// What a pass over a replica has met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Objects looked at; in a deep pass, read.
    pub examined: u64,
    /// Their bytes.
    pub examined_bytes: u64,
    /// Objects to look at in all.
    pub total: u64,
    /// Their bytes.
    pub total_bytes: u64,
    /// Objects found missing, of the wrong size, or damaged.
    pub bad: u64,
    /// Of these, how many were mended.
    pub repaired: u64,
    /// Bytes written for that.
    pub repaired_bytes: u64,
    /// Of the bad ones, how many could not be mended.
    pub left: u64,
    /// Objects that mirrorfs did not make; left alone.
    pub foreign: u64,
    /// Objects with names of the volume's own that no writer made, as far as the log says: never copied, left alone.
    #[serde(default)]
    pub forged: u64,
    /// Objects of lost branches, interrupted self-tests and unfinished checkpoints; they do no harm and are left alone.
    pub left_over: u64,
}

/// What is done about a replica at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// Nothing; the next pass comes when it is due.
    #[default]
    Idle,
    /// A pass is under way.
    Running,
    /// A pass waits for the replica to answer or to be filled.
    Waiting,
    /// Nothing is done until it is resumed.
    Paused,
}

/// One thing that a pass found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingText {
    /// The object, relative to the replica's root.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// What became of it: `repaired`, `left`, `found` (dry run), `left alone`.
    pub outcome: String,
}

/// How a pass ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Whether every byte was read.
    pub deep: bool,
    /// Whether nothing was to be changed.
    #[serde(default)]
    pub dry_run: bool,
    /// Seconds since 1970.
    pub started_at: f64,
    /// Seconds since 1970.
    pub finished_at: f64,
    /// What it met.
    pub counters: Counters,
    /// Why it ended early, if it did.
    #[serde(default)]
    pub error: Option<String>,
}

/// The reconciler's work on one replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// The replica.
    pub replica: ReplicaName,
    /// What is done now.
    pub state: ScrubState,
    /// What it waits for, or what went wrong last.
    pub detail: Option<String>,
    /// Whether the pass under way reads every byte.
    pub deep: bool,
    /// Whether the pass under way changes nothing.
    pub dry_run: bool,
    /// Number of the pass that was asked for last, by a command; it is over when `done` has reached it.
    pub asked: u64,
    /// Number of the last pass asked for that is over, or was stopped.
    pub done: u64,
    /// Seconds since 1970 at which the pass under way began.
    pub started_at: Option<f64>,
    /// What the pass under way, or the last one, has met.
    pub counters: Counters,
    /// Bytes per second of the pass under way.
    pub rate: f64,
    /// Seconds that it will probably still take.
    pub eta_seconds: Option<f64>,
    /// What was found, the newest at the end; only the last hundred.
    pub findings: Vec<FindingText>,
    /// The last pass that came to its end.
    pub last: Option<Summary>,
    /// When the next deep pass is due, in seconds since 1970.
    pub next_deep_at: Option<f64>,
}

/// "Begin a pass."
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRequest {
    /// Over this replica only; over all of them otherwise.
    pub replica: Option<ReplicaName>,
    /// Read and verify every byte.
    #[serde(default)]
    pub deep: bool,
    /// Find, but change nothing.
    #[serde(default)]
    pub dry_run: bool,
}
