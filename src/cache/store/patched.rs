//! Dirty blocks in the tables: their values and their patches.
//!
//! Owns how a patch is found and written over its slot. What stands in one is decided in `cache/patches.rs`.

use std::collections::BTreeMap;

use super::*;
use crate::cache::patches::Patch;
use crate::format::local::PatchValue;
use crate::format::tables::{number_of_patch_key, patch_key};

/// More changed bytes than this in one transaction are not copied into its record.
const MOST_BYTES: u64 = 64 << 10;

/// The patches of one block with their numbers, which ascend.
pub(super) type Found = Vec<(u32, PatchValue)>;

impl BlockStore {
    /// Whether what changed in these blocks is little enough to be copied into a record.
    pub fn is_small<'a>(&self, ids: impl IntoIterator<Item = &'a BlockId>) -> bool {
        let fresh = ids.into_iter().filter_map(|id| self.dirty(*id)).map(|b| b.fresh_bytes());
        fresh.sum::<u64>() <= MOST_BYTES
    }

    /// Puts what the journal is to know of a dirty block into `tx`; nothing when it is none any more. `small`: the bytes themselves, if
    /// they are few, so that the record can be written without syncing the slots before. The caller holds off writers
    /// until it has called [`BlockStore::after_put`], or given up.
    pub fn put_dirty(&self, tx: &mut Tx<'_>, id: BlockId, small: bool) -> Result<(), StoreError> {
        let Some(block) = self.dirty(id) else { return Ok(()) };
        let saved = block.save(small)?;
        tx.put(dirty_key(id), saved.value);
        saved.obsolete.into_iter().for_each(|number| tx.delete(patch_key(id, number)));
        for (patch, bytes) in saved.patches {
            tx.put(patch_key(id, patch.number), PatchValue { start: patch.start, bytes }.encode());
        }
        tx.rest_on(saved.mark);
        Ok(())
    }

    /// A transaction with [`BlockStore::put_dirty`] of these blocks was committed.
    pub fn after_put<'a>(&self, ids: impl IntoIterator<Item = &'a BlockId>) {
        ids.into_iter().filter_map(|id| self.dirty(*id)).for_each(|block| block.saved());
    }

    /// Takes a dirty block out of the tables within `tx`.
    pub(super) fn delete_dirty(tx: &mut Tx<'_>, block: &DirtyBlock) {
        tx.delete(dirty_key(block.id));
        block.patches().into_iter().for_each(|number| tx.delete(patch_key(block.id, number)));
    }
}

/// All patches in the tables, by block.
pub(super) fn read(journal: &Journal, block_size: u32) -> Result<BTreeMap<BlockId, Found>, StoreError> {
    let mut found = BTreeMap::<BlockId, Found>::new();
    scan_table::<StoreError>(journal, table::PATCH, |key, value| {
        let value = PatchValue::decode(value, block_size)?;
        if let (Some(id), Some(number)) = (number_of_key(key), number_of_patch_key(key)) {
            found.entry(BlockId(id)).or_default().push((number, value));
        }
        Ok(())
    })?;
    Ok(found)
}

/// Writes a block's patches over its slot, in order: a loss of power may have left anything there that was not synced.
pub(super) fn apply(slot: &Slot, found: Found) -> io::Result<Vec<Patch>> {
    let apply = |(number, PatchValue { start, bytes }): (u32, PatchValue)| {
        slot.write(start, &bytes)?;
        Ok(Patch { number, start, end: start + bytes.len() as u32 })
    };
    found.into_iter().map(apply).collect()
}

/// Deletes patches of blocks that are not dirty: nothing leaves such, but they would never go.
pub(super) fn delete_stale(journal: &Journal, stale: &BTreeMap<BlockId, Found>) -> Result<(), StoreError> {
    let keys: Vec<Bytes> = stale
        .iter()
        .flat_map(|(id, found)| found.iter().map(|(number, _)| patch_key(*id, *number)))
        .collect();
    for some in keys.chunks(INDEX_STEP) {
        journal.transact::<_, JournalError>(|tx| {
            some.iter().for_each(|key| tx.delete(key.clone()));
            Ok(())
        })?;
    }
    Ok(())
}
