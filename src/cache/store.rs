//! The block store: dirty blocks pinned, clean blocks in an LRU, both in the slot file.
//!
//! Owns which block lives where and how many references it has; knows neither files nor replicas (a
//! [`FrameSource`] answers misses). Dirty blocks are not in the LRU, so nothing can address them for eviction.

mod clean;
mod frames;
mod misses;
mod patched;
mod sealing;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use self::frames::unuse_frame;
use super::dirty::{Base, Content, DirtyBlock, DirtyValue, Piece};
use super::near::Near;
use super::recent::Recent;
use super::slots::{Slot, SlotFile};
use super::space::{Admission, Space};
use crate::format::codec::FormatError;
use crate::format::local::{CachedValue, FrameValue};
use crate::format::tables::{
    BlockEntry, FrameLoc, block_key, block_refs_key, cached_key, dirty_key, frame_key, number_of_key,
    prefix_range, table, volume_key,
};
use crate::ids::{BlockHash, BlockId, Lsn};
use crate::journal::{Journal, JournalError, Numbers, Tx};
use crate::replica::{FetchError, FrameSource};
use crate::trace::{self, Stage};

/// Why block content cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The block is only on replicas: fetch it, then ask again.
    #[error("block {} is not local", .0.entry.hash)]
    Miss(Box<Missing>),
    /// The journal refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The slot file failed.
    #[error("slot file: {0}")]
    Io(#[from] io::Error),
    /// A table holds bytes that cannot be.
    #[error("local tables are damaged: {0}")]
    Format(#[from] FormatError),
    /// A table names a block that is nowhere.
    #[error(
        "block {0} is referenced but neither dirty nor sealed; run with an empty state directory to rebuild"
    )]
    Dangling(BlockId),
    /// No replica could give it.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// A sealed block that is not local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Where it lies.
    pub entry: BlockEntry,
    /// Its number, when it was asked for by that.
    pub id: Option<BlockId>,
}

/// Content already fetched for one request, so that a small cache cannot starve it.
pub type Supply = HashMap<BlockHash, Bytes>;

struct Clean {
    slot: Arc<Slot>,
    len: u32,
    /// Its hash was checked since this process started.
    verified: bool,
}

/// Counters for status.
#[derive(Debug, Default)]
pub struct Counters {
    /// Block reads answered locally.
    pub hits: AtomicU64,
    /// Block reads that needed a replica.
    pub misses: AtomicU64,
    /// Local clean blocks whose hash did not match (dropped, fetched again).
    pub corrupt: AtomicU64,
    /// Dirty blocks whose rest is lost on all replicas, as of the last seal: replicas have them without content.
    pub lost: AtomicU64,
}

/// All local block content.
pub struct BlockStore {
    journal: Arc<Journal>,
    slots: Arc<SlotFile>,
    block_size: u32,
    dirty: RwLock<HashMap<BlockId, Arc<DirtyBlock>>>,
    clean: Mutex<LruCache<BlockHash, Clean>>,
    /// Changes of the cached-block table not yet in the journal.
    index_changes: Mutex<HashMap<BlockHash, Option<CachedValue>>>,
    /// Held while they are written, so that a later change is never overtaken.
    housekeeping: Mutex<()>,
    txg: AtomicU64,
    numbers: Numbers,
    source: OnceLock<Arc<dyn FrameSource>>,
    /// Frames of which no replica had an intact copy when they were asked for: no new block may rest on them.
    lost_frames: Mutex<HashSet<FrameLoc>>,
    /// How much is fetched along with small blocks.
    near: Mutex<Near>,
    /// What was fetched ahead just now.
    recent: Recent,
    /// The allowance of local disk.
    pub space: Space,
    /// Counters for status.
    pub counters: Counters,
}

pub(crate) const NEXT_BLOCK: &str = "next_block";
/// Changes of the cached-block table written by one record.
const INDEX_STEP: usize = 2000;

fn decode_u64(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// The counter of block numbers, above all that are in use.
fn open_numbers(journal: &Journal) -> Result<Numbers, JournalError> {
    let mut highest = None;
    for table in [table::BLOCK, table::DIRTY] {
        let (start, end) = prefix_range(&[table]);
        let last = journal.last_in(&start, &end)?;
        highest = highest.max(last.and_then(|(key, _)| number_of_key(&key)));
    }
    Numbers::open(journal, volume_key(NEXT_BLOCK), "block", 1, highest)
}

impl BlockStore {
    /// Opens the slot file at `path` and reads the dirty and cached tables of `journal`. `limit` is the allowance in
    /// bytes.
    pub fn open(
        path: &Path,
        block_size: u32,
        limit: u64,
        journal: Arc<Journal>,
    ) -> Result<Arc<Self>, StoreError> {
        let mut used = HashMap::new();
        let mut dirty_values = Vec::new();
        scan_table::<StoreError>(&journal, table::DIRTY, |key, value| {
            let value = DirtyValue::decode(value, block_size)?;
            let id = BlockId(number_of_key(key).unwrap_or(0));
            used.insert(value.slot, 2u8);
            dirty_values.push((id, value));
            Ok(())
        })?;
        let mut cached = Vec::new();
        scan_table::<StoreError>(&journal, table::CACHED, |key, value| {
            let value = CachedValue::decode(value)?;
            if let Ok(hash) = <[u8; 32]>::try_from(&key[1..]) {
                let claims = used.entry(value.slot).or_insert(0);
                *claims = (*claims + 1).min(3);
                cached.push((BlockHash(hash), value));
            }
            Ok(())
        })?;
        // A cached entry that shares its slot with anything is stale: forget it (its content can be fetched again).
        let (cached, stale): (Vec<_>, Vec<_>) =
            cached.into_iter().partition(|(_, v)| used.get(&v.slot) == Some(&1));
        let live: Vec<u32> =
            dirty_values.iter().map(|(_, v)| v.slot).chain(cached.iter().map(|(_, v)| v.slot)).collect();
        if !dirty_values.is_empty() && !path.exists() {
            // A new one would give zeros for what was written.
            let text = format!(
                "{} is gone, and with it {} written blocks that no replica may hold: put it back, or go on from the replicas with \
                 an empty state folder",
                path.display(),
                dirty_values.len()
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, text).into());
        }
        let slots = SlotFile::open(path, block_size, &live)?;
        let mut patches = patched::read(&journal, block_size)?;
        slots.advance(journal.last_lsn());
        let numbers = open_numbers(&journal)?;
        let store = Self {
            slots: Arc::clone(&slots),
            block_size,
            dirty: RwLock::new(HashMap::new()),
            clean: Mutex::new(LruCache::unbounded()),
            housekeeping: Mutex::new(()),
            index_changes: Mutex::new(stale.into_iter().map(|(h, _)| (h, None)).collect()),
            txg: AtomicU64::new(1),
            numbers,
            source: OnceLock::new(),
            lost_frames: Mutex::default(),
            near: Mutex::default(),
            recent: Recent::default(),
            space: Space::new(limit),
            counters: Counters::default(),
            journal,
        };
        for (id, v) in dirty_values {
            let shared = store.journal.get(&block_refs_key(id))?.is_some();
            store.space.add_dirty(v.valid.bytes());
            let slot = Arc::new(slots.claim(v.slot));
            let patches = patched::apply(&slot, patches.remove(&id).unwrap_or_default())?;
            let content = Content::found(slot, v, patches);
            // Of an earlier group than any of this run: a crash may have come between sealing and registering it, so a
            // segment may name it already.
            store.dirty.write().insert(id, Arc::new(DirtyBlock::new(id, 0, content, shared)));
        }
        patched::delete_stale(&store.journal, &patches)?;
        {
            let mut clean = store.clean.lock();
            for (hash, v) in cached {
                store.space.add_clean(u64::from(v.len));
                let slot = Arc::new(slots.claim(v.slot));
                slot.only_cached();
                clean.put(hash, Clean { slot, len: v.len, verified: false });
            }
        }
        store.evict();
        store.make_room();
        Ok(Arc::new(store))
    }

    /// Gives the store the replicas to ask. Once.
    pub fn set_source(&self, source: Arc<dyn FrameSource>) {
        let _ = self.source.set(source);
    }

    /// Size of a block in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The slot file.
    pub fn slots(&self) -> &Arc<SlotFile> {
        &self.slots
    }

    /// The dirty block `id`, if it is one.
    pub fn dirty(&self, id: BlockId) -> Option<Arc<DirtyBlock>> {
        self.dirty.read().get(&id).cloned()
    }

    /// The sealed block `id`'s entry.
    pub fn entry(&self, id: BlockId) -> Result<BlockEntry, StoreError> {
        match self.journal.get(&block_key(id))? {
            Some(value) => Ok(BlockEntry::decode(&value)?),
            None => Err(StoreError::Dangling(id)),
        }
    }

    /// Logical length of block `id` in bytes.
    pub fn block_len(&self, id: BlockId) -> Result<u32, StoreError> {
        match self.dirty(id) {
            Some(block) => Ok(block.len()),
            None => Ok(self.entry(id)?.loc.raw_len),
        }
    }

    // ---- reading -------------------------------------------------------------------------------------------------

    /// Copies bytes `[start, start + out.len())` of block `id` into `out`; zeros behind its end.
    pub fn read(&self, id: BlockId, start: u32, out: &mut [u8], supply: &Supply) -> Result<(), StoreError> {
        if let Some(block) = self.dirty(id) {
            return self.read_dirty(&block, start, out, supply);
        }
        match self.entry(id) {
            Ok(entry) => self.read_sealed(&entry, start, out, supply).map_err(|e| match e {
                StoreError::Miss(missing) => StoreError::Miss(Box::new(Missing { id: Some(id), ..*missing })),
                other => other,
            }),
            // Sealed or written between the two looks.
            Err(StoreError::Dangling(_)) => match self.dirty(id) {
                Some(block) => self.read_dirty(&block, start, out, supply),
                None => Err(StoreError::Dangling(id)),
            },
            Err(e) => Err(e),
        }
    }

    /// Whether [`BlockStore::shared`] may find anything. Costs no lock.
    pub fn has_shared(&self, supply: &Supply) -> bool {
        !supply.is_empty() || !self.recent.is_empty()
    }

    /// Bytes `[start, start + len)` of sealed block `id` without a copy, where all of them are in memory: in `supply`, or fetched ahead.
    pub fn shared(&self, id: BlockId, start: u32, len: usize, supply: &Supply) -> Option<Bytes> {
        if self.dirty(id).is_some() {
            return None;
        }
        let hash = self.entry(id).ok()?.hash;
        let raw = match supply.get(&hash) {
            Some(raw) => raw.clone(),
            None => {
                let raw = self.recent.get(&hash)?;
                // It was used, as if it had been read from its slot.
                let _ = self.clean.lock().get(&hash);
                self.counters.hits.fetch_add(1, Ordering::Relaxed);
                raw
            }
        };
        let start = start as usize;
        (start + len <= raw.len()).then(|| raw.slice(start..start + len))
    }

    fn read_dirty(
        &self,
        block: &DirtyBlock,
        start: u32,
        out: &mut [u8],
        supply: &Supply,
    ) -> Result<(), StoreError> {
        block.with(|c| {
            for piece in c.pieces(start, start + out.len() as u32) {
                match piece {
                    Piece::Slot { start: s, end: e } => {
                        c.slot.read(s, &mut out[(s - start) as usize..(e - start) as usize])?;
                    }
                    Piece::Zero { start: s, end: e } => {
                        out[(s - start) as usize..(e - start) as usize].fill(0)
                    }
                    Piece::Base { start: s, end: e, entry } => {
                        let part = &mut out[(s - start) as usize..(e - start) as usize];
                        self.read_sealed(&entry, s, part, supply)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Copies bytes of a sealed block out of the cache or `supply`.
    pub fn read_sealed(
        &self,
        entry: &BlockEntry,
        start: u32,
        out: &mut [u8],
        supply: &Supply,
    ) -> Result<(), StoreError> {
        let live = (entry.loc.raw_len.saturating_sub(start) as usize).min(out.len());
        out[live..].fill(0);
        if live == 0 {
            return Ok(());
        }
        if let Some(raw) = supply.get(&entry.hash) {
            let end = (start as usize + live).min(raw.len());
            let part = &raw[(start as usize).min(end)..end];
            out[..part.len()].copy_from_slice(part);
            return Ok(());
        }
        let found = self.clean.lock().get(&entry.hash).map(|c| (Arc::clone(&c.slot), c.len, c.verified));
        let miss = || Err(StoreError::Miss(Box::new(Missing { entry: *entry, id: None })));
        let Some((slot, len, verified)) = found else { return miss() };
        if !verified && !self.verify(entry, &slot, len)? {
            return miss();
        }
        self.counters.hits.fetch_add(1, Ordering::Relaxed);
        let recent = self.recent.get(&entry.hash);
        if let Some(part) = recent.as_ref().and_then(|raw| raw.get(start as usize..start as usize + live)) {
            out[..live].copy_from_slice(part);
            return Ok(());
        }
        slot.read(start, &mut out[..live])?;
        Ok(())
    }

    /// Checks a clean block that an earlier process left; drops it when it is not what its hash says.
    fn verify(&self, entry: &BlockEntry, slot: &Slot, len: u32) -> Result<bool, StoreError> {
        let mut raw = vec![0; len as usize];
        slot.read(0, &mut raw)?;
        if len == entry.loc.raw_len && BlockHash::of(&raw) == entry.hash {
            if let Some(c) = self.clean.lock().peek_mut(&entry.hash) {
                c.verified = true;
            }
            return Ok(true);
        }
        self.counters.corrupt.fetch_add(1, Ordering::Relaxed);
        log::warn!("cached block {} does not match its hash; dropped, a replica will be asked", entry.hash);
        self.drop_clean(&entry.hash);
        Ok(false)
    }

    /// Whether a sealed block is in the cache.
    pub fn is_cached(&self, hash: &BlockHash) -> bool {
        self.clean.lock().contains(hash)
    }

    /// The content of a sealed block if it is in the cache and matches its hash.
    pub fn cached(&self, entry: &BlockEntry) -> Option<Bytes> {
        let (slot, len) = self.clean.lock().peek(&entry.hash).map(|c| (Arc::clone(&c.slot), c.len))?;
        let mut raw = vec![0; len as usize];
        slot.read(0, &mut raw).ok()?;
        (len == entry.loc.raw_len && BlockHash::of(&raw) == entry.hash).then(|| raw.into())
    }

    // ---- writing -------------------------------------------------------------------------------------------------

    /// The transaction group that collects now.
    pub fn current_txg(&self) -> u64 {
        self.txg.load(Ordering::Acquire)
    }

    /// The dirty block `id`, when it may be written in place.
    pub fn writable(&self, id: BlockId) -> Option<Arc<DirtyBlock>> {
        self.dirty(id).filter(|b| b.is_writable(self.current_txg()))
    }

    /// A new dirty block, with the content of `below` up to `keep` bytes (nothing when there is none).
    pub fn create(&self, below: Option<BlockId>, keep: u32) -> Result<Arc<DirtyBlock>, StoreError> {
        let id = BlockId(self.numbers.take(&self.journal)?);
        let slot = Arc::new(self.slots.allocate());
        let mut content = Content::new(slot, 0, None);
        if let Some(below) = below.filter(|_| keep > 0) {
            match self.dirty(below) {
                Some(old) => old.with(|o| -> Result<(), StoreError> {
                    // Frozen or shared: take over what it has locally, and its base.
                    let len = o.len.min(keep);
                    let mut buf = Vec::new();
                    for (s, e) in o.valid.iter() {
                        let e = e.min(len);
                        if s < e {
                            buf.resize((e - s) as usize, 0);
                            o.slot.read(s, &mut buf)?;
                            content.copy(s, &buf)?;
                            content.valid.insert(s, e);
                        }
                    }
                    content.len = len;
                    content.base = o.base.map(|b| Base { entry: b.entry, limit: b.limit.min(len) });
                    Ok(())
                })?,
                None => {
                    let entry = self.entry(below)?;
                    let len = entry.loc.raw_len.min(keep);
                    content.len = len;
                    content.base = Some(Base { entry, limit: len });
                }
            }
        }
        self.space.add_dirty(content.valid.bytes());
        let block = Arc::new(DirtyBlock::new(id, self.current_txg(), content, false));
        self.dirty.write().insert(id, Arc::clone(&block));
        Ok(block)
    }

    /// Writes into a dirty block that [`BlockStore::writable`] or [`BlockStore::create`] gave.
    pub fn write(&self, block: &DirtyBlock, at: u32, data: &[u8]) -> Result<(), StoreError> {
        let grown = block.write(at, data)?;
        self.space.add_dirty(grown);
        Ok(())
    }

    /// Makes `[at, end)` of such a block zeros.
    pub fn zero(&self, block: &DirtyBlock, at: u32, end: u32) -> Result<(), StoreError> {
        let grown = block.zero(at, end)?;
        self.space.add_dirty(grown);
        Ok(())
    }

    /// Cuts such a block at `at`.
    pub fn truncate(&self, block: &DirtyBlock, at: u32) {
        let before = block.bytes();
        block.truncate(at);
        self.space.sub_dirty(before.saturating_sub(block.bytes()));
    }

    /// Joins the valid ranges of block `id` when it is a dirty one that has too many of them: what lies between is filled
    /// in from the block below (a [`StoreError::Miss`] asks for that one) or with zeros. The caller holds off writers.
    pub fn join_ranges(&self, id: BlockId, supply: &Supply) -> Result<(), StoreError> {
        let Some(block) = self.dirty(id).filter(|b| b.is_crowded()) else { return Ok(()) };
        let mut full = vec![0; block.len() as usize];
        self.read_dirty(&block, 0, &mut full, supply)?;
        self.fill(&block, &full)
    }

    /// Makes the slot of a frozen block hold all of its content `full`, so that it can serve as a clean one.
    pub fn fill(&self, block: &DirtyBlock, full: &[u8]) -> Result<(), StoreError> {
        let grown = block.fill(full)?;
        self.space.add_dirty(grown);
        Ok(())
    }

    /// Takes back a block from [`BlockStore::create`] that no file came to name.
    pub fn discard(&self, id: BlockId) {
        self.forget_dirty(&[id]);
    }

    // ---- references ----------------------------------------------------------------------------------------------

    /// Drops one reference of `id` within `tx`. When it was the last, the block goes; its number is added to `gone`, to
    /// be given to [`BlockStore::after_commit`].
    pub fn release(&self, tx: &mut Tx<'_>, id: BlockId, gone: &mut Vec<BlockId>) -> Result<(), StoreError> {
        let refs_key = block_refs_key(id);
        if let Some(value) = tx.get(&refs_key)? {
            let refs = decode_u64(&value);
            if refs > 1 {
                tx.put(refs_key, Bytes::copy_from_slice(&(refs - 1).to_le_bytes()));
            } else {
                tx.delete(refs_key);
            }
            if refs > 0 {
                return Ok(());
            }
        }
        if let Some(value) = tx.get(&block_key(id))? {
            let entry = BlockEntry::decode(&value)?;
            tx.delete(block_key(id));
            if !entry.is_without_content() {
                unuse_frame(tx, &entry)?;
            }
        }
        if let Some(block) = self.dirty(id) {
            Self::delete_dirty(tx, &block);
            if block.txg < self.current_txg() {
                // Its txg's index will name it; the log must take it away again.
                tx.delete(block_key(id));
            }
        }
        gone.push(id);
        Ok(())
    }

    /// Adds one reference to `id` within `tx`; from now on it is not written in place.
    pub fn share(&self, tx: &mut Tx<'_>, id: BlockId) -> Result<(), StoreError> {
        if let Some(block) = self.dirty(id) {
            block.set_shared();
        }
        let key = block_refs_key(id);
        let refs = tx.get(&key)?.map_or(0, |v| decode_u64(&v));
        tx.put(key, Bytes::copy_from_slice(&refs.saturating_add(1).to_le_bytes()));
        Ok(())
    }

    /// Lets go of what a committed transaction released. `lsn` is that transaction's.
    pub fn after_commit(&self, lsn: Lsn, gone: &[BlockId]) {
        self.slots.advance(lsn);
        self.forget_dirty(gone);
    }

    fn forget_dirty(&self, ids: &[BlockId]) {
        if ids.is_empty() {
            return;
        }
        let gone: Vec<_> = {
            let mut dirty = self.dirty.write();
            ids.iter().filter_map(|id| dirty.remove(id)).collect()
        };
        for block in gone {
            block.set_dead();
            self.space.sub_dirty(block.uncount());
        }
    }

    /// Number of clean blocks and of dirty blocks.
    pub fn counts(&self) -> (usize, usize) {
        (self.clean.lock().len(), self.dirty.read().len())
    }
}

/// Calls `f` for each entry of a table, in order.
pub fn scan_table<E: From<JournalError> + From<FormatError>>(
    journal: &Journal,
    table: u8,
    mut f: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (mut start, end) = prefix_range(&[table]);
    loop {
        let page = journal.scan(&start, &end, 4096)?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        let mut next = last.to_vec();
        next.push(0);
        for (key, value) in &page {
            f(key, value)?;
        }
        start = next.into();
    }
}
