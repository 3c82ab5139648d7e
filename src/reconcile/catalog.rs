//! What the reconciler asks of whoever knows the volume.
//!
//! Owns no behaviour.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::format::checkpoint::ManifestHash;
use crate::format::segment::SegmentHash;
use crate::format::tables::BlockEntry;
use crate::ids::{Epoch, SegmentNo};
use crate::replica::Staged;

/// A sealed segment, as the local tables know it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sealed {
    /// Number, epoch, length, and where its file lies if it is still on local disk.
    pub staged: Staged,
    /// Its hash; `None` when a restore did not read the segment.
    pub hash: Option<SegmentHash>,
}

/// Checkpoints with the hashes of their manifests.
pub type NamedCheckpoints = BTreeMap<(SegmentNo, Epoch), ManifestHash>;

/// What the volume holds, and a place for the reconciler's memory. Blocking.
pub trait Catalog: Send + Sync {
    /// Every sealed segment with a number above `after`, in order, at most `limit`.
    fn segments(&self, after: SegmentNo, limit: usize) -> Result<Vec<Sealed>, String>;
    /// Every checkpoint that the log names, with the hash of its manifest.
    fn checkpoints(&self) -> Result<NamedCheckpoints, String>;
    /// The raw content of a block, its hash checked, if it is at hand locally; asks no replica.
    fn cached(&self, block: &BlockEntry) -> Option<Bytes>;
    /// Checkpoint `number` is nowhere whole any more: one newer than that is to be made, if there
    /// is none.
    fn want_checkpoint(&self, number: SegmentNo);
    /// What was last saved under `key`.
    fn load(&self, key: &str) -> Result<Option<Vec<u8>>, String>;
    /// Saves bytes under `key`, durably.
    fn save(&self, key: &str, bytes: &[u8]) -> Result<(), String>;
}
