//! Tests of the block store: from dirty to clean, references, what a crash between two steps leaves.

use std::path::PathBuf;

use super::*;
use crate::format::local::SegmentValue;
use crate::format::record::Op;
use crate::format::tables::FrameLoc;
use crate::format::tables::segment_key;
use crate::ids::{Epoch, SegmentNo};
use crate::journal::Options;

const BS: u32 = 65536;

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    limit: u64,
    journal: Arc<Journal>,
    store: Arc<BlockStore>,
}

fn open_at(path: &Path, limit: u64) -> (Arc<Journal>, Arc<BlockStore>) {
    let (journal, _) = Journal::open(Options::new(path, Arc::new(|_| Ok(())))).unwrap();
    let store = BlockStore::open(&path.join("slots"), BS, limit, Arc::clone(&journal)).unwrap();
    (journal, store)
}

impl Fixture {
    fn new(limit: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let (journal, store) = open_at(&path, limit);
        Self { _dir: dir, path, limit, journal, store }
    }

    /// Closes and opens everything, as after a crash of the process behind a barrier.
    fn reopen(self) -> Self {
        let Self { _dir, path, limit, journal, store } = self;
        journal.barrier(journal.last_lsn()).unwrap();
        drop(store);
        journal.close().unwrap();
        drop(journal);
        let (journal, store) = open_at(&path, limit);
        Self { _dir, path, limit, journal, store }
    }

    fn transact(&self, f: impl FnOnce(&mut Tx<'_>) -> Result<(), StoreError>) -> Lsn {
        self.journal.transact::<_, StoreError>(f).unwrap().1
    }

    /// A dirty block with this content that no table names yet.
    fn written(&self, raw: &[u8]) -> Arc<DirtyBlock> {
        let block = self.store.create(None, 0).unwrap();
        self.store.write(&block, 0, raw).unwrap();
        block
    }

    /// The same, in the tables as a file's flush leaves it.
    fn dirty(&self, raw: &[u8]) -> Arc<DirtyBlock> {
        let block = self.written(raw);
        self.put(&block, false);
        block
    }

    /// Registers frozen blocks, as the sealer does.
    fn register(&self, blocks: &[Arc<DirtyBlock>]) -> Vec<(Arc<DirtyBlock>, BlockEntry)> {
        let sealed: Vec<_> = blocks
            .iter()
            .map(|b| {
                let raw = self.store.seal_content(b).unwrap();
                self.store.fill(b, &raw).unwrap();
                (Arc::clone(b), entry(&raw))
            })
            .collect();
        let lsn = self.transact(|tx| self.store.register(tx, &sealed));
        self.store.after_register(lsn, &sealed);
        sealed
    }

    fn release(&self, id: BlockId) -> bool {
        let mut gone = Vec::new();
        let lsn = self.transact(|tx| self.store.release(tx, id, &mut gone));
        self.store.after_commit(lsn, &gone);
        !gone.is_empty()
    }

    fn read(&self, id: BlockId, len: usize) -> Result<Vec<u8>, StoreError> {
        let mut out = vec![0xee; len];
        self.store.read(id, 0, &mut out, &Supply::new()).map(|()| out)
    }

    fn uses(&self, raw: &[u8]) -> u64 {
        let value = self.journal.get(&frame_key(&BlockHash::of(raw))).unwrap();
        value.map_or(0, |v| FrameValue::decode(&v).unwrap().uses)
    }
}

fn entry(raw: &[u8]) -> BlockEntry {
    let loc = FrameLoc {
        segment: SegmentNo(1),
        epoch: Epoch(1),
        offset: 128,
        stored_len: raw.len() as u32 + 20,
        raw_len: raw.len() as u32,
        codec: 0,
    };
    BlockEntry { hash: BlockHash::of(raw), loc }
}

#[test]
fn a_block_is_dirty_then_frozen_then_clean() {
    let f = Fixture::new(1 << 20);
    let block = f.dirty(&[7; 5000]);
    assert!(f.store.writable(block.id).is_some());
    assert_eq!((f.store.space.dirty(), f.store.space.clean()), (5000, 0));
    let frozen = f.store.freeze();
    assert_eq!(frozen.iter().map(|b| b.id).collect::<Vec<_>>(), [block.id]);
    assert!(f.store.writable(block.id).is_none(), "a frozen block is not written in place");
    f.register(&frozen);
    assert_eq!((f.store.space.dirty(), f.store.space.clean()), (0, 5000));
    assert_eq!(f.store.counts(), (1, 0));
    assert_eq!(f.read(block.id, 6000).unwrap(), [vec![7; 5000], vec![0; 1000]].concat());
    assert_eq!(f.store.block_len(block.id).unwrap(), 5000);

    // The clean block survives a restart once housekeeping has noted it.
    f.store.housekeep().unwrap();
    let (id, f) = (block.id, {
        drop((block, frozen));
        f.reopen()
    });
    assert_eq!(f.store.counts(), (1, 0));
    assert_eq!(f.read(id, 5000).unwrap(), vec![7; 5000]);
}

#[test]
fn rewriting_a_frozen_block_leaves_it_as_it_was() {
    let f = Fixture::new(1 << 20);
    let old = f.dirty(&[1; 1000]);
    f.store.freeze();
    let new = f.store.create(Some(old.id), u32::MAX).unwrap();
    f.store.write(&new, 10, &[2; 10]).unwrap();
    assert_eq!(f.store.seal_content(&old).unwrap(), vec![1; 1000]);
    assert_eq!(f.read(new.id, 1000).unwrap(), [vec![1; 10], vec![2; 10], vec![1; 980]].concat());
    // And one that begins with less of it.
    let short = f.store.create(Some(old.id), 5).unwrap();
    f.store.write(&short, 8, &[3]).unwrap();
    assert_eq!(f.read(short.id, 10).unwrap(), [1, 1, 1, 1, 1, 0, 0, 0, 3, 0]);
}

#[test]
fn eviction_takes_clean_blocks_only() {
    let f = Fixture::new(100_000);
    let clean: Vec<Vec<u8>> = (0..4).map(|i| vec![i; 20_000]).collect();
    for raw in &clean {
        f.store.insert_clean(&entry(raw), raw).unwrap();
    }
    assert_eq!((f.store.counts(), f.store.space.clean()), ((4, 0), 80_000));
    let dirty: Vec<_> = (10..13).map(|i| f.dirty(&[i; 50_000])).collect();
    f.store.evict();
    assert_eq!((f.store.counts(), f.store.space.clean()), ((0, 3), 0), "dirty blocks exceed the allowance");
    for (i, block) in dirty.iter().enumerate() {
        assert_eq!(f.read(block.id, 50_000).unwrap(), vec![10 + i as u8; 50_000]);
    }
    // What is clean by now is the first to go.
    let frozen = f.store.freeze();
    f.register(&frozen[..1]);
    assert!(f.store.space.clean() <= 50_000 && f.store.counts().1 == 2);
    assert!(matches!(f.read(frozen[0].id, 10), Err(StoreError::Miss(_)) | Ok(_)));
}

#[test]
fn the_least_recently_used_goes_first() {
    let f = Fixture::new(60_000);
    let raws: Vec<Vec<u8>> = (0..3).map(|i| vec![i; 20_000]).collect();
    raws.iter().for_each(|raw| f.store.insert_clean(&entry(raw), raw).unwrap());
    let mut byte = [9];
    f.store.read_sealed(&entry(&raws[0]), 5, &mut byte, &Supply::new()).unwrap();
    f.store.insert_clean(&entry(&[8; 20_000]), &[8; 20_000]).unwrap();
    let cached: Vec<bool> = raws.iter().map(|raw| f.store.is_cached(&BlockHash::of(raw))).collect();
    assert_eq!(cached, [true, false, true]);
}

#[test]
fn references_count_down_to_the_last() {
    let f = Fixture::new(1 << 20);
    f.transact(|tx| {
        let value =
            SegmentValue { epoch: Epoch(1), len: 1, blake3: [0; 32], commit: Lsn(1), cut_at: 0.0, live: 0 };
        tx.put(segment_key(SegmentNo(1)), value.encode());
        Ok(())
    });
    let live = |f: &Fixture| {
        SegmentValue::decode(&f.journal.get(&segment_key(SegmentNo(1))).unwrap().unwrap()).unwrap().live
    };
    let raw = vec![5; 3000];
    let (a, b) = (f.dirty(&raw), f.dirty(&raw));
    f.transact(|tx| f.store.share(tx, a.id));
    f.transact(|tx| f.store.share(tx, a.id));
    assert!(f.store.writable(a.id).is_none(), "a shared block is not written in place");
    assert!(f.store.writable(b.id).is_some());
    let frozen = f.store.freeze();
    f.register(&frozen);
    assert_eq!((f.uses(&raw), live(&f)), (2, 3020), "two blocks, one frame");
    assert_eq!([f.release(a.id), f.release(a.id), f.release(a.id)], [false, false, true]);
    assert_eq!((f.uses(&raw), live(&f)), (1, 3020));
    assert!(f.journal.get(&block_refs_key(a.id)).unwrap().is_none());
    assert!(f.release(b.id));
    assert_eq!((f.uses(&raw), live(&f)), (0, 0));
    assert!(f.journal.get(&block_key(b.id)).unwrap().is_none());
}

#[test]
fn a_shared_block_stays_shared_over_a_restart() {
    let f = Fixture::new(1 << 20);
    let id = f.dirty(&[1; 100]).id;
    f.transact(|tx| f.store.share(tx, id));
    let f = f.reopen();
    assert!(f.store.writable(id).is_none());
    assert_eq!([f.release(id), f.release(id)], [false, true]);
    assert_eq!((f.store.counts(), f.store.space.dirty()), ((0, 0), 0));
}

#[test]
fn a_block_released_while_it_is_registered_is_not_entered() {
    let f = Fixture::new(1 << 20);
    let raw = vec![4; 2000];
    let block = f.dirty(&raw);
    let frozen = f.store.freeze();
    // The release is committed; its owner has not come to `after_commit` yet.
    let mut gone = Vec::new();
    let lsn = f.transact(|tx| f.store.release(tx, block.id, &mut gone));
    f.register(&frozen);
    f.store.after_commit(lsn, &gone);
    assert!(f.journal.get(&block_key(block.id)).unwrap().is_none());
    assert_eq!((f.uses(&raw), f.store.space.dirty(), f.store.counts().1), (0, 0, 0));
}

#[test]
fn registering_twice_counts_once() {
    let f = Fixture::new(1 << 20);
    let raw = vec![4; 2000];
    f.dirty(&raw);
    let frozen = f.store.freeze();
    f.register(&frozen);
    f.register(&frozen);
    assert_eq!((f.uses(&raw), f.store.space.dirty()), (1, 0));
}

#[test]
fn filling_a_block_that_dies_leaves_the_sum_right() {
    let f = Fixture::new(1 << 20);
    let block = f.dirty(&[1; 100]);
    f.store.write(&block, 5000, &[2; 100]).unwrap();
    f.put(&block, false);
    assert_eq!(f.store.space.dirty(), 200);
    let frozen = f.store.freeze();
    let raw = f.store.seal_content(&frozen[0]).unwrap();
    assert!(f.release(block.id));
    f.store.fill(&frozen[0], &raw).unwrap();
    assert_eq!(f.store.space.dirty(), 0);
}

#[test]
fn a_crash_between_register_steps_leaves_the_rest_dirty() {
    let f = Fixture::new(1 << 20);
    let raws = [vec![1; 3000], vec![2; 3000]];
    let ids: Vec<BlockId> = raws.iter().map(|raw| f.dirty(raw).id).collect();
    let frozen = f.store.freeze();
    f.register(&frozen[..1]);
    drop(frozen);
    let f = f.reopen();
    assert_eq!(f.store.counts().1, 1);
    // The first is sealed; its slot was in no table, so it is free, and replicas have it.
    assert!(
        matches!(f.read(ids[0], 10), Err(StoreError::Miss(e)) if e.entry.hash == BlockHash::of(&raws[0]))
    );
    assert_eq!(f.read(ids[1], 3000).unwrap(), raws[1]);
    // The second may be in a segment already: it is not written in place, and the log must take it away.
    assert!(f.store.writable(ids[1]).is_none());
    let before = f.journal.last_lsn();
    assert!(f.release(ids[1]));
    let records: Vec<_> =
        f.journal.records(before, f.journal.last_lsn()).unwrap().map(|r| r.unwrap()).collect();
    assert!(records.iter().any(|r| r.ops.contains(&Op::delete(block_key(ids[1])))), "{records:?}");
    // Numbers go on above all that were ever given.
    assert!(f.store.create(None, 0).unwrap().id > ids[1]);
}

#[test]
fn stale_cached_entries_are_dropped() {
    let f = Fixture::new(1 << 20);
    let (good, bad) = (vec![1; 1000], vec![2; 1000]);
    f.store.insert_clean(&entry(&good), &good).unwrap();
    f.store.insert_clean(&entry(&bad), &bad).unwrap();
    let dirty = f.dirty(&[3; 1000]);
    f.store.housekeep().unwrap();
    let slot_of = |raw: &[u8]| f.store.clean.lock().peek(&BlockHash::of(raw)).unwrap().slot.index();
    // A dead entry that names a dirty block's slot, two that name one slot, and one whose bytes are others.
    let claims: [(&[u8], u32); 3] = [(b"x", dirty.with(|c| c.slot.index())), (b"y", 77), (b"z", 77)];
    f.transact(|tx| {
        for (raw, slot) in claims {
            tx.put(cached_key(&BlockHash::of(raw)), CachedValue { slot, len: 1 }.encode());
        }
        Ok(())
    });
    f.store.clean.lock().peek(&BlockHash::of(&bad)).unwrap().slot.write(500, b"!").unwrap();
    assert_ne!(slot_of(&good), slot_of(&bad));
    drop(dirty);
    let f = f.reopen();
    assert_eq!(f.store.counts(), (2, 1));
    let mut out = vec![0; 1000];
    f.store.read_sealed(&entry(&good), 0, &mut out, &Supply::new()).unwrap();
    assert_eq!(out, good);
    let answer = f.store.read_sealed(&entry(&bad), 0, &mut out, &Supply::new());
    assert!(matches!(answer, Err(StoreError::Miss(_))), "never wrong bytes");
    assert_eq!(f.store.counters.corrupt.load(Ordering::Relaxed), 1);
    f.store.housekeep().unwrap();
    let mut left = Vec::new();
    scan_table::<StoreError>(&f.journal, table::CACHED, |key, _| {
        left.push(key[1..].to_vec());
        Ok(())
    })
    .unwrap();
    assert_eq!(left, [BlockHash::of(&good).0.to_vec()]);
}

#[test]
fn slots_come_back_when_what_freed_them_is_durable() {
    let f = Fixture::new(10 << 20);
    let mut highest = 0;
    for round in 0..20 {
        let blocks: Vec<_> = (0..5).map(|i| f.dirty(&[round * 5 + i; 4096])).collect();
        highest = blocks.iter().map(|b| b.with(|c| c.slot.index())).max().unwrap().max(highest);
        let ids: Vec<_> = blocks.iter().map(|b| b.id).collect();
        drop(blocks);
        assert!(ids.into_iter().all(|id| f.release(id)));
        f.journal.barrier(f.journal.last_lsn()).unwrap();
        f.store.housekeep().unwrap();
    }
    assert_eq!(f.store.slots().in_limbo(), 0);
    assert!(highest < 10, "slots are used again: the highest was {highest}");
}

#[test]
fn written_blocks_without_their_file_are_an_error_never_zeros() {
    let f = Fixture::new(1 << 20);
    f.dirty(&[7; 5000]);
    let Fixture { _dir, path, limit, journal, store } = f;
    journal.barrier(journal.last_lsn()).unwrap();
    drop(store);
    std::fs::remove_file(path.join("slots")).unwrap();
    for _ in 0..2 {
        let error = BlockStore::open(&path.join("slots"), BS, limit, Arc::clone(&journal)).err().unwrap();
        assert!(error.to_string().contains("is gone, and with it 1 written"), "{error}");
    }
}

impl Fixture {
    /// As a file's flush does: answers the mark that the record rests on.
    fn put(&self, block: &DirtyBlock, small: bool) -> u64 {
        let mark = std::cell::Cell::new(0);
        self.transact(|tx| {
            self.store.put_dirty(tx, block.id, small)?;
            mark.set(tx.mark());
            Ok(())
        });
        self.store.after_put([&block.id]);
        mark.get()
    }

    fn patches(&self) -> usize {
        let (start, end) = prefix_range(&[table::PATCH]);
        self.journal.scan(&start, &end, 1000).unwrap().len()
    }

    /// Closes, takes from the slot file all that was not synced, and opens.
    fn lose_slots(self, synced: &[u8]) -> Self {
        self.journal.barrier(self.journal.last_lsn()).unwrap();
        self.journal.close().unwrap();
        std::fs::write(self.path.join("slots"), synced).unwrap();
        self.reopen()
    }

    fn slots(&self) -> Vec<u8> {
        std::fs::read(self.path.join("slots")).unwrap()
    }
}

#[test]
fn what_a_record_holds_itself_needs_no_sync_of_the_slots() {
    let f = Fixture::new(1 << 30);
    let block = f.written(&[1; 1000]);
    assert_ne!(f.put(&block, false), 0);
    let synced = f.slots();
    f.store.write(&block, 10, &[2; 100]).unwrap();
    assert_eq!(f.put(&block, true), 0);
    f.store.write(&block, 50, &[3; 100]).unwrap();
    assert_eq!(f.put(&block, true), 0);
    // Beyond the old end, and then something that no record speaks of.
    f.store.write(&block, 5000, &[4; 10]).unwrap();
    assert_eq!(f.put(&block, true), 0);
    f.store.write(&block, 60, &[5; 10]).unwrap();
    let mut expected = vec![1; 1000];
    expected.resize(5010, 0);
    expected[10..50].fill(2);
    expected[50..150].fill(3);
    expected[5000..].fill(4);
    let id = block.id;
    drop(block);
    let f = f.lose_slots(&synced);
    assert_eq!(f.read(id, 5010).unwrap(), expected);
    // And once more: nothing has been synced yet.
    let f = f.lose_slots(&synced);
    assert_eq!(f.read(id, 5010).unwrap(), expected);
    assert_eq!(f.patches(), 3);
}

#[test]
fn a_change_that_is_synced_ends_the_patches_before_it() {
    let f = Fixture::new(1 << 30);
    let block = f.dirty(&[1; 1000]);
    f.store.write(&block, 0, &[2; 10]).unwrap();
    f.put(&block, true);
    assert_eq!(f.patches(), 1);
    f.store.write(&block, 5, &[3; 10]).unwrap();
    let mark = f.put(&block, false);
    assert_eq!(f.patches(), 0);
    f.store.slots().sync(mark).unwrap();
    let synced = f.slots();
    let id = block.id;
    drop(block);
    let f = f.lose_slots(&synced);
    assert_eq!(f.read(id, 16).unwrap(), [[2; 5].as_slice(), &[3; 10], &[1]].concat());
    // What stands in another file's record is no reason to sync.
    f.transact(|tx| {
        tx.put("\u{1}x", "1");
        assert_eq!(tx.mark(), 0);
        Ok(())
    });
}

#[test]
fn patches_go_with_their_block() {
    let f = Fixture::new(1 << 30);
    let (sealed, released) = (f.written(&[1; 100]), f.written(&[2; 100]));
    for block in [&sealed, &released] {
        assert_eq!(f.put(block, true), 0);
    }
    assert_eq!(f.patches(), 2);
    f.release(released.id);
    assert_eq!(f.patches(), 1);
    let copy = f.store.create(Some(sealed.id), 50).unwrap();
    assert_eq!(f.put(&copy, true), 0, "bytes taken over are bytes that changed");
    assert_eq!(f.patches(), 2);
    let frozen = f.store.freeze();
    f.register(&frozen);
    assert_eq!(f.patches(), 0);
    // Of a block that is not dirty: no daemon leaves such.
    f.transact(|tx| {
        tx.put(crate::format::tables::patch_key(BlockId(999), 0), vec![0; 8]);
        Ok(())
    });
    assert_eq!(f.reopen().patches(), 0);
}
