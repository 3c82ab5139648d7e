//! Content that is not local: asking the replicas for it, and for what lies beside it.
//!
//! Owns which neighbours are looked at; how many of them come along is decided in `near`, from whom they come is the source's.

use super::*;
use crate::cache::near;

/// By how much the numbers of blocks may differ that are looked at as neighbours.
const BESIDE: u64 = 512;

impl BlockStore {
    /// Asks the replicas for what a reader lacks; along with a small block come those that lie beside it. Blocks.
    pub fn fetch_missing(&self, missing: &Missing) -> Result<Bytes, StoreError> {
        let Missing { entry, id } = missing;
        let beside = match id {
            Some(id) if near::is_small(&entry.loc) => self.beside(*id, entry)?,
            _ => Vec::new(),
        };
        self.fetch(entry, &beside)
    }

    /// Blocks that lie beside a small one in its segment and are not local.
    fn beside(&self, id: BlockId, entry: &BlockEntry) -> Result<Vec<BlockEntry>, StoreError> {
        let stretch = self.near.lock().stretch(&entry.loc);
        let first = block_key(BlockId(id.0.saturating_sub(BESIDE)));
        let last = block_key(BlockId(id.0.saturating_add(BESIDE)));
        let found = self.journal.scan(&first, &last, 2 * BESIDE as usize)?;
        let found = found.iter().filter_map(|(_, value)| BlockEntry::decode(value).ok());
        let chosen = near::choose(&entry.loc, &stretch, found.collect(), self.space.limit() / 8);
        Ok(chosen.into_iter().filter(|e| !self.is_cached(&e.hash)).collect())
    }

    /// Asks the replicas for blocks that a reader in order will want next; at least the first of them comes. Blocks.
    pub fn fetch_ahead(&self, first: &BlockEntry, others: &[BlockEntry]) -> Result<(), StoreError> {
        self.fetch_into(first, others, &|e, raw| self.insert_ahead(e, raw)).map(|_| ())
    }

    /// Asks the replicas for a block (and perhaps for those `ahead`) and keeps what comes. Blocks.
    pub fn fetch(&self, entry: &BlockEntry, ahead: &[BlockEntry]) -> Result<Bytes, StoreError> {
        self.fetch_into(entry, ahead, &|e, raw| self.insert_clean(e, raw))
    }

    fn fetch_into(
        &self,
        entry: &BlockEntry,
        ahead: &[BlockEntry],
        keep: &dyn Fn(&BlockEntry, &Bytes) -> Result<(), StoreError>,
    ) -> Result<Bytes, StoreError> {
        if entry.is_without_content() {
            let detail = "the rest of it was lost when it was overwritten in part".into();
            return Err(FetchError::Lost { what: "a block".into(), detail }.into());
        }
        let source = self.source.get().ok_or_else(|| FetchError::Unavailable {
            what: format!("block {}", entry.hash),
            detail: "no replica is attached".into(),
        })?;
        self.counters.misses.fetch_add(1, Ordering::Relaxed);
        let deliver = |e: &BlockEntry, raw: Bytes| {
            if let Err(error) = keep(e, &raw) {
                log::warn!("block {} was fetched but cannot be cached: {error}", e.hash);
            }
        };
        let raw = match trace::stage(Stage::Replicas, || source.fetch(entry, ahead, &deliver)) {
            Err(lost @ FetchError::Lost { .. }) => {
                self.lost_frames.lock().insert(entry.loc);
                // The same content may have been stored again, elsewhere.
                let frame = self.journal.get(&frame_key(&entry.hash))?;
                let frame = frame.map(|v| FrameValue::decode(&v)).transpose()?;
                let other = frame.map(|f| f.entry).filter(|e| e.loc != entry.loc).ok_or(lost)?;
                source.fetch(&other, &[], &deliver)?
            }
            other => other?,
        };
        deliver(entry, raw.clone());
        Ok(raw)
    }
}
