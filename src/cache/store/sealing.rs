//! From dirty to clean: what sealing asks of the block store, and what it says when it is done.
//!
//! Owns the steps by which frozen blocks are read, entered into the tables and become clean. Knows no segment: where a block's frame lies
//! is told.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::frames::use_frame;
use super::{BlockStore, StoreError, Supply, scan_table};
use crate::cache::dirty::{Content, DirtyBlock};
use crate::format::local::FrameValue;
use crate::format::tables::{BlockEntry, Extents, block_key, dirty_key, frame_key, number_of_key, table};
use crate::ids::{BlockHash, BlockId, Ino, Lsn};
use crate::journal::Tx;

impl BlockStore {
    /// Ends the collecting txg: what is dirty now is frozen. The caller holds off all writers.
    pub fn freeze(&self) -> Vec<Arc<DirtyBlock>> {
        let ended = self.txg.fetch_add(1, Ordering::AcqRel);
        let dirty = self.dirty.read();
        let mut frozen: Vec<_> = dirty.values().filter(|b| b.txg <= ended).cloned().collect();
        frozen.sort_by_key(|b| b.id);
        frozen
    }

    /// The whole content of a frozen block; asks replicas for what is not local. Blocks.
    pub fn seal_content(&self, block: &DirtyBlock) -> Result<Vec<u8>, StoreError> {
        if let Some(whole) = block.with(Content::read_whole) {
            return Ok(whole?);
        }
        let mut out = vec![0; block.len() as usize];
        let mut supply = Supply::new();
        loop {
            match self.read_dirty(block, 0, &mut out, &supply) {
                Ok(()) => return Ok(out),
                Err(StoreError::Miss(missing)) => {
                    let raw = self.fetch(&missing.entry, &[])?;
                    supply.insert(missing.entry.hash, raw);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The frame that holds this content already, if any, and if it is not known to be lost.
    pub fn frame(&self, hash: &BlockHash) -> Result<Option<BlockEntry>, StoreError> {
        Ok(match self.journal.get(&frame_key(hash))? {
            Some(value) => {
                Some(FrameValue::decode(&value)?.entry).filter(|e| !self.lost_frames.lock().contains(&e.loc))
            }
            None => None,
        })
    }

    /// Enters blocks that were sealed without content into the tables within `tx`. They stay dirty: this machine has a part
    /// of them, which is sealed as soon as the rest can be had.
    pub fn register_lost(&self, tx: &mut Tx<'_>, lost: &[(BlockId, BlockEntry)]) -> Result<(), StoreError> {
        for (id, entry) in lost {
            if tx.get(&dirty_key(*id))?.is_some() {
                tx.put(block_key(*id), entry.encode());
            }
        }
        Ok(())
    }

    /// The inode that names a block. Reads the whole table of extents: for rare messages only.
    pub fn owner(&self, id: BlockId) -> Result<Option<Ino>, StoreError> {
        let mut owner = None;
        scan_table::<StoreError>(&self.journal, table::EXTENT, |key, value| {
            if Extents::decode(value)?.0.contains(&id) {
                owner = number_of_key(key).map(Ino);
            }
            Ok(())
        })?;
        Ok(owner)
    }

    /// Enters sealed blocks into the tables within `tx`; those that died meanwhile (or are in already) are left out.
    pub fn register(
        &self,
        tx: &mut Tx<'_>,
        sealed: &[(Arc<DirtyBlock>, BlockEntry)],
    ) -> Result<(), StoreError> {
        for (block, entry) in sealed {
            // The table knows it, not the memory: the transaction that released the block may have been committed a
            // moment ago, and its owner not yet have come to say so here.
            if tx.get(&dirty_key(block.id))?.is_none() {
                continue;
            }
            tx.put(block_key(block.id), entry.encode());
            Self::delete_dirty(tx, block);
            use_frame(tx, entry)?;
        }
        Ok(())
    }

    /// Turns registered blocks from dirty to clean.
    pub fn after_register(&self, lsn: Lsn, sealed: &[(Arc<DirtyBlock>, BlockEntry)]) {
        self.slots.advance(lsn);
        for (block, entry) in sealed {
            block.set_sealed();
            let removed = self.dirty.write().remove(&block.id);
            if removed.is_none() {
                continue;
            }
            self.space.sub_dirty(block.uncount());
            let slot = block.with(|c| {
                (c.valid.covers(0, c.len) && c.len == entry.loc.raw_len).then(|| Arc::clone(&c.slot))
            });
            if let Some(slot) = slot {
                self.keep_clean(entry.hash, slot, entry.loc.raw_len);
            }
        }
        self.evict();
    }

    /// Whether sealing what is dirty takes more than twice the bytes that were changed: it seals whole blocks.
    pub fn is_sparse(&self) -> bool {
        let enough = self.space.dirty().saturating_mul(2);
        let mut sealed = 0;
        self.dirty.read().values().any(|block| {
            sealed += u64::from(block.len());
            sealed > enough
        })
    }
}
