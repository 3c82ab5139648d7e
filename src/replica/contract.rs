//! What this folder asks of its neighbours and offers to them, as traits, so that each side is tested alone.
//!
//! Owns no behaviour. The block cache asks a [`FrameSource`]; a shipper asks an [`Outbox`] and a [`CursorStore`].

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::shelf::Shelf;
use crate::format::segment::SegmentHash;
use crate::format::tables::BlockEntry;
use crate::ids::{Epoch, ReplicaName, SegmentNo};

/// Why a block's content could not be had from any replica.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// No replica that holds it answered; trying later may help.
    #[error("no replica could be reached for {what}: {detail}")]
    Unavailable {
        /// The block or object asked for.
        what: String,
        /// What each replica said.
        detail: String,
    },
    /// Every replica answered, and none has intact bytes.
    #[error("no replica holds an intact copy of {what}: {detail}")]
    Lost {
        /// The block or object asked for.
        what: String,
        /// What each replica said.
        detail: String,
    },
    /// The daemon is shutting down.
    #[error("shutting down")]
    Closed,
}

/// Gives the raw, verified content of sealed blocks. Blocking: never called from async code.
pub trait FrameSource: Send + Sync {
    /// The raw content of `wanted`, its hash checked. `ahead` are blocks that will probably be asked for next; the
    /// source may fetch them in the same request, or ignore them. What was fetched it may hand to `deliver`, too, also what was wanted.
    fn fetch(
        &self,
        wanted: &BlockEntry,
        ahead: &[BlockEntry],
        deliver: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError>;
}

/// What a staged object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StagedKind {
    /// A segment.
    Segment,
    /// A checkpoint as of the end of segment `number`; `path` is a folder of parts and a manifest.
    Checkpoint,
}

/// One sealed object that lies on local disk and waits to be shipped.
#[derive(Clone, Debug, PartialEq)]
pub struct Staged {
    /// Its kind.
    pub kind: StagedKind,
    /// Its number.
    pub number: SegmentNo,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where its bytes lie. The file never changes; it may be gone once every replica holds it, or when space was
    /// short (then another replica holds it).
    pub path: PathBuf,
    /// Bytes in all.
    pub len: u64,
    /// Seconds since 1970 (with fraction) of the cut it belongs to.
    pub cut_at: f64,
}

/// The sealed objects, in order. Implemented by staging.
pub trait Outbox: Send + Sync {
    /// Up to `limit` segments with numbers above `after`, in order, without gaps from `after + 1` on.
    fn segments_after(&self, after: SegmentNo, limit: usize) -> Vec<Staged>;
    /// Bytes and count of all segments with numbers above `after`, and the cut time of the oldest of them.
    fn backlog(&self, after: SegmentNo) -> Backlog;
    /// The newest checkpoint whose number is at most `cursor` and above `after`, if one is staged.
    fn checkpoint(&self, after: SegmentNo, cursor: SegmentNo) -> Option<Staged>;
    /// The hash of a sealed segment, when it is known; `None` when a restore did not read it.
    fn hash(&self, number: SegmentNo) -> Option<SegmentHash>;
    /// Takes note of what the chain of hashes says of a segment that a restore did not read.
    fn learned(&self, _number: SegmentNo, _epoch: Epoch, _hash: SegmentHash, _len: Option<u64>) {}
    /// Where segments stand that are still in memory, when they are kept.
    fn shelf(&self) -> Option<Arc<Shelf>> {
        None
    }
    /// Number of the newest sealed segment; changes wake the watcher.
    fn watch(&self) -> tokio::sync::watch::Receiver<SegmentNo>;
}

/// What one replica still lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Backlog {
    /// Segments not yet there.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When the oldest of them was cut, in seconds since 1970; 0 when there is none.
    pub oldest_cut_at: f64,
}

/// Remembers, durably, how far each replica is. Blocking.
pub trait CursorStore: Send + Sync {
    /// The replica's cursor as last saved; `SegmentNo(0)` when there is none.
    fn load(&self, replica: &ReplicaName) -> Result<SegmentNo, String>;
    /// Saves the cursor; it need not be durable at return, but never gets ahead of the truth.
    fn save(&self, replica: &ReplicaName, cursor: SegmentNo) -> Result<(), String>;
    /// The filesystem on which a folder replica was last seen, as [`CursorStore::save_filesystem`] was given it. Without it a
    /// folder whose disk is not mounted looks like one that was wiped.
    fn load_filesystem(&self, _replica: &ReplicaName) -> Result<Option<String>, String> {
        Ok(None)
    }
    /// Saves it; it need not be durable at return, but must not be lost where a later cursor is kept.
    fn save_filesystem(&self, _replica: &ReplicaName, _filesystem: &str) -> Result<(), String> {
        Ok(())
    }
}
