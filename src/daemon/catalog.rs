//! What the reconciler may know of the volume, out of the local tables.
//!
//! Owns the place of its memory in the local table. Decides nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::cache::BlockStore;
use crate::format::checkpoint::ManifestHash;
use crate::format::tables::{BlockEntry, local_key, prefix_range, split_checkpoint_key, table};
use crate::ids::SegmentNo;
use crate::journal::{Journal, JournalError};
use crate::reconcile::{Catalog, NamedCheckpoints, Sealed};
use crate::replica::{Outbox, Staged};
use crate::txg::Staging;

/// Rows read at a time.
const PAGE: usize = 1000;

/// The local tables as the reconciler sees them.
pub(super) struct Tables {
    pub journal: Arc<Journal>,
    pub staging: Arc<Staging>,
    pub blocks: Arc<BlockStore>,
    /// The newest checkpoint that is to be replaced.
    pub wanted: Arc<AtomicU64>,
}

/// Name of what is remembered under `key` in the local table.
fn name(key: &str) -> Bytes {
    local_key(&format!("scrub of {key}"))
}

impl Catalog for Tables {
    fn segments(&self, after: SegmentNo, limit: usize) -> Result<Vec<Sealed>, String> {
        let staged = self.staging.known_after(after, limit);
        let sealed = |staged: Staged| {
            let hash = self.staging.hash(staged.number);
            Sealed { staged, hash }
        };
        Ok(staged.into_iter().map(sealed).collect())
    }

    fn checkpoints(&self) -> Result<NamedCheckpoints, String> {
        let mut named = NamedCheckpoints::new();
        let (mut start, end) = prefix_range(&[table::CHECKPOINT]);
        loop {
            let page = self.journal.scan(&start, &end, PAGE).map_err(|e| e.to_string())?;
            let Some((last, _)) = page.last() else { return Ok(named) };
            start = [&last[..], &[0]].concat().into();
            for (key, value) in &page {
                let id = split_checkpoint_key(key).ok_or("a bad key in the table of checkpoints")?;
                named.insert(id, ManifestHash::from_value(value).map_err(|e| e.to_string())?);
            }
        }
    }

    fn cached(&self, block: &BlockEntry) -> Option<Bytes> {
        self.blocks.cached(block)
    }

    fn want_checkpoint(&self, number: SegmentNo) {
        self.wanted.fetch_max(number.0, Ordering::Relaxed);
    }

    fn load(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
        Ok(self.journal.get(&name(key)).map_err(|e| e.to_string())?.map(|v| v.to_vec()))
    }

    fn save(&self, key: &str, bytes: &[u8]) -> Result<(), String> {
        let key = name(key);
        let saved = self.journal.transact::<_, JournalError>(|tx| {
            tx.put(key, bytes.to_vec());
            Ok(())
        });
        let (_, lsn) = saved.map_err(|e| e.to_string())?;
        self.journal.barrier(lsn).map_err(|e| e.to_string())
    }
}
