//! Clean blocks: the LRU, its index in the tables, and making room on the disk.
//!
//! Owns what may be thrown away and when. Dirty blocks are out of its reach.

use super::*;

/// Smaller blocks are not worth a write of their own past the kernel's cache.
const LARGE: usize = 256 << 10;

impl BlockStore {
    /// Puts a verified raw block into the cache.
    pub fn insert_clean(&self, entry: &BlockEntry, raw: &[u8]) -> Result<(), StoreError> {
        self.insert(entry, raw, |slot| slot.write(0, raw))
    }

    /// As [`BlockStore::insert_clean`], for a block that was fetched ahead and will be read in a moment, all of it: from memory.
    pub(super) fn insert_ahead(&self, entry: &BlockEntry, raw: &Bytes) -> Result<(), StoreError> {
        if raw.len() < LARGE {
            return self.insert_clean(entry, raw);
        }
        // First: who finds the block in the cache is to find it here.
        if !self.is_cached(&entry.hash) {
            self.recent.put(entry.hash, raw.clone());
        }
        self.insert(entry, raw, |slot| slot.fill_clean(raw))
    }

    fn insert(
        &self,
        entry: &BlockEntry,
        raw: &[u8],
        write: impl FnOnce(&Slot) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        if self.is_cached(&entry.hash) || raw.len() as u64 > self.space.limit() {
            return Ok(());
        }
        self.space.note_written(raw.len() as u64);
        if self.space.is_measure_due() {
            self.measure();
        }
        match self.space.on_disk() {
            Admission::Now => {}
            // One comes, one goes, as long as the disk has some room.
            Admission::After(_) => _ = self.evict_one(),
            Admission::Full => return Ok(()),
        }
        let slot = self.slots.allocate();
        write(&slot)?;
        self.keep_clean(entry.hash, Arc::new(slot), raw.len() as u32);
        Ok(())
    }

    pub(super) fn keep_clean(&self, hash: BlockHash, slot: Arc<Slot>, len: u32) {
        let value = CachedValue { slot: slot.index(), len };
        {
            let mut clean = self.clean.lock();
            if clean.contains(&hash) {
                return;
            }
            slot.only_cached();
            clean.put(hash, Clean { slot, len, verified: true });
            self.space.add_clean(u64::from(len));
            self.index_changes.lock().insert(hash, Some(value));
        }
        self.evict();
    }

    /// Notes that a clean block left the LRU, whose lock the caller holds.
    pub(super) fn left(&self, hash: &BlockHash, c: &Clean) {
        self.space.sub_clean(u64::from(c.len));
        self.index_changes.lock().insert(*hash, None);
    }

    pub(super) fn drop_clean(&self, hash: &BlockHash) {
        let mut clean = self.clean.lock();
        if let Some(c) = clean.pop(hash) {
            self.left(hash, &c);
        }
    }

    /// Evicts the least recently used clean blocks until the allowance is kept.
    pub fn evict(&self) {
        while self.space.excess() > 0 {
            if self.evict_one().is_none() {
                return;
            }
        }
    }

    pub(super) fn evict_one(&self) -> Option<u64> {
        let mut clean = self.clean.lock();
        let (hash, c) = clean.pop_lru()?;
        self.left(&hash, &c);
        Some(u64::from(c.len))
    }

    /// May a writer go on? Looks at the disk when the last look is old.
    pub fn admit(&self) -> Admission {
        if self.space.is_measure_due() {
            self.measure();
        }
        self.space.admit()
    }

    /// A writer is refused: clean blocks give way to it, when it is the disk that lacks room. Answers whether it may go on. Waits for
    /// the local disk.
    pub fn give_way(&self) -> bool {
        let freeing = self.slots.in_limbo() as u64 * u64::from(self.block_size);
        let short = self.space.shortage(freeing);
        if self.space.on_disk() != Admission::Full || (short == 0 && freeing == 0) {
            return false;
        }
        self.make_space(short);
        self.measure();
        self.space.admit() != Admission::Full
    }

    /// Whether names may be added: they take little, but a full disk must keep room for the journal.
    pub fn has_room_for_names(&self) -> bool {
        self.space.note_written(4096);
        if self.space.is_measure_due() {
            self.measure();
        }
        if self.space.is_disk_full() {
            // Clean blocks give way to names, too.
            let short = self.space.shortage(0);
            if short > 0 {
                self.make_space(short);
            }
            self.measure();
        }
        !self.space.is_disk_full()
    }

    pub(super) fn measure(&self) {
        match self.slots.disk() {
            Ok(disk) => self.space.measured(disk),
            Err(e) => log::debug!("the disk of the slot file cannot be measured: {e}"),
        }
    }

    /// Gives up clean blocks when the disk gets full, whatever fills it.
    pub(super) fn make_room(&self) {
        self.measure();
        let freeing = self.slots.in_limbo() as u64 * u64::from(self.block_size);
        let mut short = self.space.shortage(freeing);
        while short > 0 {
            let Some(len) = self.evict_one() else { return };
            short = short.saturating_sub(len);
        }
    }

    /// Drops every clean block (they can be fetched again).
    pub fn drop_all_clean(&self) {
        let all: Vec<BlockHash> = self.clean.lock().iter().map(|(h, _)| *h).collect();
        all.iter().for_each(|h| self.drop_clean(h));
    }

    /// Frees slots whose freeing is durable, gives up clean blocks when the disk gets full, and writes the changes of the
    /// cached-block table into the journal. Called every second or so.
    pub fn housekeep(&self) -> Result<(), StoreError> {
        self.recent.tick();
        // Sealing fills slots for which nobody waits: else the next fsync that rests on the slots would pay for it.
        self.slots.sync_all().inspect_err(|e| {
            // What the kernel could not write it may take for written from now on.
            self.journal.poison(&format!("syncing block data failed: {e}"));
        })?;
        // First what needs no space, so that a full disk cannot keep it from being done.
        let freed = self.slots.reclaim(self.journal.durable_lsn());
        self.make_room();
        let written = self.write_index();
        freed?;
        self.slots.reclaim(self.journal.durable_lsn())?;
        written
    }

    pub(super) fn write_index(&self) -> Result<(), StoreError> {
        let _turn = self.housekeeping.lock();
        let changes: Vec<_> = self.index_changes.lock().drain().collect();
        for (n, part) in changes.chunks(INDEX_STEP).enumerate() {
            let written = self.journal.transact::<_, JournalError>(|tx| {
                for (hash, change) in part {
                    match change {
                        Some(value) => tx.put(cached_key(hash), value.encode()),
                        None => tx.delete(cached_key(hash)),
                    }
                }
                Ok(())
            });
            if let Err(e) = written {
                let mut waiting = self.index_changes.lock();
                for (hash, change) in &changes[n * INDEX_STEP..] {
                    waiting.entry(*hash).or_insert(*change);
                }
                return Err(e.into());
            }
        }
        Ok(())
    }

    /// The disk is full, whatever the allowance says: gives up clean blocks worth `bytes`, least recently used first, and
    /// frees their slots. Answers whether that freed anything. Waits for the local disk.
    pub fn make_space(&self, bytes: u64) -> bool {
        let mut given = 0;
        while given < bytes {
            let Some(len) = self.evict_one() else { break };
            given += len.max(1);
        }
        // Slots wait until what they held before is durably named elsewhere.
        if let Err(e) = self.journal.barrier(self.journal.last_lsn()) {
            log::debug!("making space: {e}");
        }
        match self.slots.reclaim(self.journal.durable_lsn()) {
            Ok(n) => n > 0,
            Err(e) => {
                log::warn!("slots cannot be freed: {e}");
                false
            }
        }
    }
}
