//! Tests of sealing: what goes into segments, dedup, failures, what a crash leaves.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::format::local::FrameValue;
use crate::format::segment::{SegmentMeta, verify_whole};
use crate::format::tables::{
    block_key, cached_key, dirty_key, extent_key, frame_key, inode_key, orphan_key, volume_key,
};
use crate::ids::{BlockId, Ino};
use crate::journal::Options;
use crate::replica::{FetchError, FrameSource, Outbox, Staged, StagedKind};

const BS: u32 = 1 << 20;

/// A source that holds whole blocks, or none while it is "down".
#[derive(Default)]
struct Source {
    blocks: Mutex<HashMap<BlockHash, Bytes>>,
    down: Mutex<bool>,
}

impl FrameSource for Source {
    fn fetch(
        &self,
        wanted: &BlockEntry,
        _ahead: &[BlockEntry],
        _deliver: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError> {
        let what = wanted.hash.to_string();
        if *self.down.lock() {
            return Err(FetchError::Unavailable { what, detail: "down".into() });
        }
        let found = self.blocks.lock().get(&wanted.hash).cloned();
        found.ok_or(FetchError::Lost { what, detail: "never had it".into() })
    }
}

struct Fixture {
    dir: Arc<tempfile::TempDir>,
    journal: Arc<Journal>,
    blocks: Arc<BlockStore>,
    staging: Arc<Staging>,
    sealer: Sealer,
    source: Arc<Source>,
}

impl Fixture {
    fn new() -> Self {
        Self::open(Arc::new(tempfile::tempdir().unwrap()))
    }

    fn open(dir: Arc<tempfile::TempDir>) -> Self {
        let path = dir.path();
        let options = Options { tail_file_size: 256 << 10, ..Options::new(path, Arc::new(|_| Ok(()))) };
        let (journal, _) = Journal::open(options).unwrap();
        let blocks = BlockStore::open(&path.join("slots"), BS, 1 << 30, Arc::clone(&journal)).unwrap();
        let source = Arc::new(Source::default());
        blocks.set_source(Arc::clone(&source) as _);
        let staging = Staging::open(&path.join("staging"), &journal, Arc::clone(&blocks)).unwrap();
        let mark = journal.get(&local_key(SEALED_MARK)).unwrap();
        let mark = mark.map_or(SealedMark::default(), |v| SealedMark::decode(&v).unwrap());
        let volume = VolumeId::from_random([1; 16]);
        let (j, b, s) = (Arc::clone(&journal), Arc::clone(&blocks), Arc::clone(&staging));
        let sealer = Sealer::new(j, b, s, volume, Epoch(1), 1, mark).unwrap();
        Self { dir, journal, blocks, staging, sealer, source }
    }

    /// Everything durable, then closed and opened again.
    fn reopen(self) -> Self {
        let Self { dir, journal, blocks, staging, sealer, .. } = self;
        drop((sealer, staging, blocks));
        journal.close().unwrap();
        drop(journal);
        Self::open(dir)
    }

    fn put(&self, key: Bytes, value: &[u8]) -> Lsn {
        self.change(|tx| tx.put(key, value.to_vec()))
    }

    fn change(&self, f: impl FnOnce(&mut crate::journal::Tx<'_>)) -> Lsn {
        let done = self.journal.transact::<_, JournalError>(|tx| {
            f(tx);
            Ok(())
        });
        done.unwrap().1
    }

    fn dirty(&self, raw: &[u8]) -> BlockId {
        let block = self.blocks.create(None, 0).unwrap();
        self.blocks.write(&block, 0, raw).unwrap();
        self.note(block.id);
        block.id
    }

    /// Puts a dirty block into the tables, as a file's flush does.
    fn note(&self, id: BlockId) {
        self.journal.transact::<_, StoreError>(|tx| self.blocks.put_dirty(tx, id, false)).unwrap();
        self.blocks.after_put([&id]);
    }

    fn release(&self, id: BlockId) {
        let mut gone = Vec::new();
        let (_, lsn) =
            self.journal.transact::<_, StoreError>(|tx| self.blocks.release(tx, id, &mut gone)).unwrap();
        self.blocks.after_commit(lsn, &gone);
    }

    fn cut(&self) -> Cut {
        Cut { lsn: self.journal.last_lsn(), frozen: self.blocks.freeze() }
    }

    fn seal(&mut self) -> Option<SegmentNo> {
        let cut = self.cut();
        self.sealer.seal(&cut, Time { secs: 100, nanos: 0 }).unwrap()
    }

    fn files(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, out) } else { out.push(path) }
            }
        }
        let mut out = Vec::new();
        walk(&self.dir.path().join("staging/segments"), &mut out);
        out.sort();
        out
    }

    fn segment(&self, number: SegmentNo) -> SegmentMeta {
        verify_whole(&fs::read(self.staging.segment_path(number, Epoch(1))).unwrap()).unwrap()
    }
}

fn random(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

fn ops_of(meta: &SegmentMeta) -> Vec<Op> {
    meta.records.to_vec().unwrap().into_iter().flat_map(|r| r.ops).collect()
}

#[test]
fn only_replicated_operations_are_shipped_and_block_entries_only_by_the_index() {
    let mut f = Fixture::new();
    let raw = random(5000, 1);
    let id = f.dirty(&raw);
    f.put(inode_key(Ino(7)), b"inode");
    f.put(cached_key(&BlockHash([1; 32])), b"local");
    f.change(|tx| {
        tx.put(extent_key(Ino(7), 0), b"extent".to_vec());
        tx.delete(frame_key(&BlockHash([2; 32])));
        tx.delete(block_key(BlockId(999)));
    });
    assert_eq!(f.seal(), Some(SegmentNo(1)));
    let meta = f.segment(SegmentNo(1));
    assert_eq!(meta.index.iter().map(|(i, e)| (*i, e.hash)).collect::<Vec<_>>(), [(id, BlockHash::of(&raw))]);
    let shipped = ops_of(&meta);
    assert!(shipped.iter().all(is_shipped));
    for op in [
        Op::put(inode_key(Ino(7)), &b"inode"[..]),
        Op::put(extent_key(Ino(7), 0), &b"extent"[..]),
        Op::delete(block_key(BlockId(999))),
    ] {
        assert!(shipped.contains(&op), "{op:?} is missing in {shipped:?}");
    }
    // The registration itself put the block's entry: it must not appear in the next group.
    f.put(inode_key(Ino(8)), b"next");
    assert_eq!(f.seal(), Some(SegmentNo(2)));
    let next = f.segment(SegmentNo(2));
    assert_eq!(next.footer.header.previous, meta.footer.hash);
    let ops = ops_of(&next);
    assert_eq!(ops, [Op::put(inode_key(Ino(8)), &b"next"[..])]);
    assert!(f.journal.get(&block_key(id)).unwrap().is_some());
    assert!(f.journal.get(&dirty_key(id)).unwrap().is_none());
}

#[test]
fn equal_blocks_share_a_frame_within_and_across_groups() {
    let mut f = Fixture::new();
    let raw = random(9000, 1);
    let (a, b) = (f.dirty(&raw), f.dirty(&raw));
    f.seal();
    let first = f.segment(SegmentNo(1));
    assert_eq!(first.footer.frames, 1);
    assert_eq!(first.index[0].1, first.index[1].1);
    let c = f.dirty(&raw);
    f.dirty(&random(9000, 2));
    f.seal();
    let second = f.segment(SegmentNo(2));
    assert_eq!((second.footer.frames, second.index.len()), (1, 2));
    let again = second.index.iter().find(|(id, _)| *id == c).unwrap().1;
    assert_eq!(again, first.index[0].1, "it points into the older segment");
    let frame = |f: &Fixture| f.journal.get(&frame_key(&BlockHash::of(&raw))).unwrap();
    assert_eq!(FrameValue::decode(&frame(&f).unwrap()).unwrap().uses, 3);
    [a, b, c].into_iter().for_each(|id| f.release(id));
    assert!(frame(&f).is_none());
    let value = f.journal.get(&segment_key(SegmentNo(1))).unwrap().unwrap();
    assert_eq!(SegmentValue::decode(&value).unwrap().live, 0);
    // Nobody uses the frame any more, so it is not relied on: the content is stored anew.
    f.dirty(&raw);
    f.seal();
    assert_eq!(f.segment(SegmentNo(3)).footer.frames, 1);
}

#[test]
fn a_block_that_dies_behind_its_cut_is_sealed_and_taken_away_by_the_log() {
    let mut f = Fixture::new();
    let raw = random(3000, 3);
    let id = f.dirty(&raw);
    let cut = f.cut();
    f.release(id);
    assert_eq!(f.sealer.seal(&cut, Time::default()).unwrap(), Some(SegmentNo(1)));
    assert_eq!(f.segment(SegmentNo(1)).index.len(), 1, "the group's state needs it");
    assert!(f.journal.get(&block_key(id)).unwrap().is_none());
    assert!(f.journal.get(&frame_key(&BlockHash::of(&raw))).unwrap().is_none());
    f.seal();
    let ops = ops_of(&f.segment(SegmentNo(2)));
    assert!(ops.contains(&Op::delete(block_key(id))), "{ops:?}");
    assert_eq!((f.blocks.space.dirty(), f.blocks.counts().1), (0, 0));
}

#[test]
fn a_block_that_dies_before_its_cut_is_never_stored() {
    let mut f = Fixture::new();
    let id = f.dirty(&random(3000, 3));
    f.release(id);
    f.put(inode_key(Ino(9)), b"x");
    f.seal();
    let meta = f.segment(SegmentNo(1));
    assert_eq!((meta.index.len(), meta.footer.frames), (0, 0));
}

#[test]
fn a_large_group_is_several_segments_with_one_commit() {
    let mut f = Fixture::new();
    let raws: Vec<Vec<u8>> = (0..20).map(|i| random(BS as usize, i)).collect();
    let ids: Vec<BlockId> = raws.iter().map(|raw| f.dirty(raw)).collect();
    let cut = f.cut();
    let watch = f.staging.watch();
    assert_eq!(f.sealer.seal(&cut, Time::default()).unwrap(), Some(SegmentNo(2)));
    assert_eq!(*watch.borrow(), SegmentNo(2));
    let (first, second) = (f.segment(SegmentNo(1)), f.segment(SegmentNo(2)));
    assert_eq!((first.footer.commit, second.footer.commit), (None, Some(cut.lsn)));
    assert_eq!(second.footer.header.txg_first, SegmentNo(1));
    assert_eq!(second.footer.header.previous, first.footer.hash);
    let mut named: Vec<BlockId> = first.index.iter().chain(&second.index).map(|(id, _)| *id).collect();
    named.sort_unstable();
    assert_eq!(named, ids);
    assert_eq!(f.staging.segments_after(SegmentNo(0), 10).len(), 2);
    f.staging.trim(SegmentNo(1));
    assert_eq!(f.files().len(), 1);
    assert_eq!(f.staging.oldest().0, Some(SegmentNo(2)));
}

/// A commit, and then a cut of 70 blocks that takes several groups, whose last block needs the source.
fn large_cut(f: &mut Fixture) -> (Lsn, Cut, Vec<BlockId>) {
    let base = random(4000, 99);
    let below = f.dirty(&base);
    f.put(inode_key(Ino(1)), b"x");
    f.seal();
    f.source.blocks.lock().insert(BlockHash::of(&base), base.into());
    let before = f.sealer.mark().lsn;
    let mut ids: Vec<BlockId> = (0..70).map(|i| f.dirty(&random(BS as usize, i))).collect();
    let last = f.blocks.create(Some(below), u32::MAX).unwrap();
    f.blocks.write(&last, 100, &[1; 50]).unwrap();
    ids.push(last.id);
    f.note(last.id);
    f.put(extent_key(Ino(1), 0), b"names them");
    f.blocks.drop_all_clean();
    (before, f.cut(), ids)
}

/// Replays all segments as a restore does; gives the blocks at the end. Groups of content only must not change a commit.
fn replay(f: &Fixture) -> Vec<BlockId> {
    let (mut found, mut first, mut commit, mut previous) =
        (std::collections::BTreeSet::new(), SegmentNo(1), Lsn(0), SegmentHash::default());
    for staged in f.staging.segments_after(SegmentNo(0), 99) {
        let meta = f.segment(staged.number);
        assert_eq!((meta.footer.header.txg_first, meta.footer.header.previous), (first, previous));
        previous = meta.footer.hash;
        found.extend(meta.index.iter().map(|(id, _)| *id));
        for op in &ops_of(&meta) {
            if let Op::Delete { key } = op
                && key.first() == Some(&table::BLOCK)
            {
                found.remove(&BlockId(u64::from_be_bytes(key[1..].try_into().unwrap())));
            }
        }
        if let Some(next) = meta.footer.commit {
            assert!(next > commit || next == commit && meta.records.is_empty(), "{}", staged.number);
            (commit, first) = (next, staged.number.next());
        }
    }
    found.into_iter().collect()
}

#[test]
fn a_large_cut_goes_in_groups_of_content_and_a_last_one_with_the_records() {
    let mut f = Fixture::new();
    let (before, cut, ids) = large_cut(&mut f);
    let dead = ids[40];
    f.release(dead);
    assert_eq!(f.sealer.seal(&cut, Time::default()).unwrap(), Some(SegmentNo(6)));
    let commits: Vec<_> = (2..=6).map(|n| f.segment(SegmentNo(n)).footer.commit).collect();
    assert_eq!(commits, [None, Some(before), None, Some(before), Some(cut.lsn)]);
    let records: Vec<_> = (2..=6).map(|n| f.segment(SegmentNo(n)).footer.records).collect();
    assert!(records[..4].iter().all(|n| *n == 0) && records[4] > 0, "{records:?}");
    let all = replay(&f);
    assert!(ids.iter().all(|id| all.contains(id)), "also the one that died behind the cut");
    f.seal();
    let all = replay(&f);
    assert!(ids.iter().all(|id| all.contains(id) == (*id != dead)), "the log takes it away");
    assert_eq!((f.blocks.counts().1, f.blocks.space.dirty()), (0, 0));
    assert_eq!(f.staging.newest(), SegmentNo(7));
}

#[test]
fn groups_of_content_commit_what_the_last_group_did_also_when_local_changes_came_since() {
    let mut f = Fixture::new();
    f.put(inode_key(Ino(1)), b"x");
    f.seal();
    let committed = f.sealer.mark().lsn;
    // Such as cursors: there is nothing to ship, and the mark moves on.
    f.put(local_key("cursor"), b"1");
    assert_eq!(f.seal(), None);
    assert!(f.sealer.mark().lsn > committed);
    let ids: Vec<_> = (0..70).map(|i| f.dirty(&random(BS as usize, i))).collect();
    f.put(extent_key(Ino(1), 0), b"names them");
    let cut = f.cut();
    f.sealer.dies = Some(Step::Published);
    let dies = std::panic::AssertUnwindSafe(|| f.sealer.seal(&cut, Time::default()).map(|_| ()));
    std::panic::catch_unwind(dies).unwrap_err();
    let commits: Vec<_> = (1..=3).map(|n| f.segment(SegmentNo(n)).footer.commit).collect();
    assert_eq!(commits, [Some(committed), None, Some(committed)]);
    drop(cut);
    // All records since are still to be had, and come with the last group.
    let mut f = f.reopen();
    f.seal();
    assert!(ids.iter().all(|id| replay(&f).contains(id)));
}

#[test]
fn a_large_cut_that_fails_keeps_what_was_sealed_and_goes_on_there() {
    for again in [true, false] {
        let mut f = Fixture::new();
        let (before, cut, ids) = large_cut(&mut f);
        *f.source.down.lock() = true;
        f.sealer.seal(&cut, Time::default()).unwrap_err();
        assert_eq!((f.sealer.mark().lsn, f.sealer.mark().segment), (before, SegmentNo(5)));
        assert_eq!((f.staging.newest(), f.files().len()), (SegmentNo(5), 5));
        // One that is sealed dies, and one that is not.
        let (a, b) = (ids[3], ids[68]);
        f.release(a);
        f.release(b);
        *f.source.down.lock() = false;
        let last = match again {
            true => f.sealer.seal(&cut, Time::default()).unwrap(),
            false => f.seal(),
        };
        assert_eq!(last, Some(SegmentNo(6)));
        let meta = f.segment(SegmentNo(6));
        let rest = ids[64..].iter().filter(|id| again || **id != b).copied();
        assert_eq!(meta.index.iter().map(|(id, _)| *id).collect::<Vec<_>>(), rest.collect::<Vec<_>>());
        f.put(inode_key(Ino(2)), b"later");
        f.seal();
        let all = replay(&f);
        assert!(ids.iter().all(|id| all.contains(id) != [a, b].contains(id)), "{again}");
    }
}

#[test]
fn a_crash_at_any_step_of_a_group_of_content_loses_nothing_and_sends_nothing_twice() {
    for step in [Step::Staged, Step::Registered, Step::Entered, Step::Published] {
        let mut f = Fixture::new();
        let (before, cut, ids) = large_cut(&mut f);
        f.sealer.dies = Some(step);
        let dies = std::panic::AssertUnwindSafe(|| f.sealer.seal(&cut, Time::default()).map(|_| ()));
        std::panic::catch_unwind(dies).unwrap_err();
        let sent = f.staging.newest();
        assert_eq!(sent, SegmentNo(if step == Step::Published { 3 } else { 1 }), "{step:?}");
        drop(cut);
        let mut f = f.reopen();
        let there = SegmentNo(if step == Step::Staged { 1 } else { 3 });
        assert_eq!((f.sealer.mark().segment, f.sealer.mark().lsn), (there, before), "{step:?}");
        assert_eq!((f.staging.newest(), f.files().len() as u64), (there, there.0), "{step:?}");
        assert!(replay(&f).len() < ids.len());
        let dirty = if matches!(step, Step::Staged | Step::Registered) { 71 } else { 39 };
        assert_eq!(f.blocks.counts().1, dirty, "{step:?}");
        // One that a segment may name dies before the next cut.
        f.release(ids[5]);
        f.source.blocks.lock().insert(BlockHash::of(&random(4000, 99)), random(4000, 99).into());
        f.seal();
        let all = replay(&f);
        assert!(ids.iter().all(|id| all.contains(id) == (*id != ids[5])), "{step:?}");
        for id in ids.iter().filter(|id| **id != ids[5]) {
            let entry = f.blocks.entry(*id).unwrap();
            let frame = f.journal.get(&frame_key(&entry.hash)).unwrap().unwrap();
            assert_eq!(FrameValue::decode(&frame).unwrap().uses, 1, "{step:?}");
        }
        assert_eq!(f.blocks.counts().1, 0);
    }
}

#[test]
fn what_a_crash_staged_and_did_not_register_is_removed_and_sealed_again() {
    let mut f = Fixture::new();
    f.put(inode_key(Ino(3)), b"x");
    f.seal();
    let raw = random(4000, 4);
    let id = f.dirty(&raw);
    // Staged, not registered: two files of one group, and one cut short.
    f.staging.write(SegmentNo(2), Epoch(1), Bytes::from_static(b"staged")).unwrap();
    f.staging.write(SegmentNo(3), Epoch(1), Bytes::from_static(b"sta")).unwrap();
    let mut f = f.reopen();
    assert_eq!(f.files().len(), 1);
    assert_eq!((f.staging.newest(), f.sealer.mark().segment), (SegmentNo(1), SegmentNo(1)));
    assert_eq!(f.seal(), Some(SegmentNo(2)));
    assert_eq!(f.segment(SegmentNo(2)).index[0].0, id);
    assert_eq!(f.staging.backlog(SegmentNo(0)).segments, 2);
}

#[test]
fn a_crash_between_segments_and_blocks_seals_the_blocks_once_more() {
    let mut f = Fixture::new();
    let raw = random(4000, 5);
    let (id, dead) = (f.dirty(&raw), f.dirty(&random(4000, 6)));
    let cut = f.cut();
    // As in `seal`, up to the registration of the segments.
    let (staged, done) = f.sealer.stage(&cut, Time::default());
    assert!(staged.unwrap().is_some());
    f.sealer.register_segments(&done, cut.lsn, Time::default()).unwrap();
    drop(cut);

    let mut f = f.reopen();
    assert_eq!((f.sealer.mark().segment, f.files().len()), (SegmentNo(1), 1));
    assert_eq!(f.staging.segments_after(SegmentNo(0), 9).len(), 1, "it is registered, so it is shipped");
    assert_eq!(f.blocks.counts().1, 2, "both blocks are still dirty");
    f.release(dead);
    f.seal();
    let meta = f.segment(SegmentNo(2));
    assert_eq!(meta.index.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [id]);
    let ops = ops_of(&meta);
    assert!(ops.contains(&Op::delete(block_key(dead))), "segment 1 names it: {ops:?}");
    let frame = f.journal.get(&frame_key(&BlockHash::of(&raw))).unwrap().unwrap();
    assert_eq!(FrameValue::decode(&frame).unwrap().uses, 1);
}

#[test]
fn a_seal_that_fails_leaves_nothing_and_is_tried_again() {
    let mut f = Fixture::new();
    let base = random(4000, 7);
    let id = f.dirty(&base);
    f.seal();
    f.source.blocks.lock().insert(BlockHash::of(&base), base.clone().into());
    // The block below is needed and not cached.
    let block = f.blocks.create(Some(id), u32::MAX).unwrap();
    f.blocks.write(&block, 100, &[1; 50]).unwrap();
    f.note(block.id);
    f.dirty(&random(100, 8));
    f.blocks.drop_all_clean();
    *f.source.down.lock() = true;
    let cut = f.cut();
    let failed = f.sealer.seal(&cut, Time::default());
    assert!(matches!(failed, Err(SealError::Store(StoreError::Fetch(_)))), "{failed:?}");
    assert_eq!((f.files().len(), f.staging.newest()), (1, SegmentNo(1)));
    // What is written meanwhile belongs to the next group.
    f.put(orphan_key(Ino(5)), b"");
    *f.source.down.lock() = false;
    assert_eq!(f.sealer.seal(&cut, Time::default()).unwrap(), Some(SegmentNo(2)));
    let mut expected = base;
    expected[100..150].fill(1);
    let meta = f.segment(SegmentNo(2));
    assert!(meta.index.iter().any(|(i, e)| *i == block.id && e.hash == BlockHash::of(&expected)));
    assert!(meta.records.to_vec().unwrap().iter().all(|r| r.lsn <= cut.lsn));
    f.seal();
    assert_eq!(ops_of(&f.segment(SegmentNo(3))), [Op::put(orphan_key(Ino(5)), Bytes::new())]);
}

#[test]
fn local_changes_alone_make_no_segment_and_never_outrun_the_remembered_mark() {
    let mut f = Fixture::new();
    f.put(volume_key("x"), b"1");
    assert_eq!(f.seal(), Some(SegmentNo(1)));
    // Far more of them than a tail file holds.
    for round in 0..12u64 {
        for n in 0..500u64 {
            f.put(local_key(&format!("t{n}")), &[round as u8; 400]);
        }
        assert_eq!(f.seal(), None);
        assert_eq!(f.sealer.mark().segment, SegmentNo(1));
    }
    let mut f = f.reopen();
    f.put(volume_key("x"), b"2");
    assert_eq!(f.seal(), Some(SegmentNo(2)), "the records behind the mark are still there");
    let ops = ops_of(&f.segment(SegmentNo(2)));
    assert_eq!(ops, [Op::put(volume_key("x"), &b"2"[..])]);
}

#[test]
fn staged_checkpoints_count_and_go_when_nobody_waits_for_them_or_writers_do() {
    let f = Fixture::new();
    let stage = |number: u64, len: u64| {
        let path = f.staging.checkpoints().join(number.to_string());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("part"), [1; 10]).unwrap();
        let staged = Staged {
            kind: StagedKind::Checkpoint,
            number: SegmentNo(number),
            epoch: Epoch(1),
            path: path.clone(),
            len,
            cut_at: 0.0,
        };
        f.staging.publish_checkpoint(staged, SegmentNo(number + 1));
        path
    };
    let first = stage(3, 1000);
    assert_eq!((f.staging.oldest().1, f.blocks.space.staged()), (1000, 1000));
    let second = stage(5, 2000);
    assert_eq!((f.staging.oldest().1, f.blocks.space.staged()), (2000, 2000), "the older one is gone");
    assert!(!first.exists());
    f.staging.trim_checkpoints(SegmentNo(4));
    let offered = |cursor| f.staging.checkpoint(SegmentNo(0), SegmentNo(cursor)).is_some();
    assert!(!offered(5) && offered(6), "a replica gets the segment that names it first");
    assert!(second.exists() && f.staging.checkpoint(SegmentNo(0), SegmentNo(9)).is_some());
    f.staging.trim_checkpoints(SegmentNo(5));
    assert!(!second.exists() && f.staging.checkpoint(SegmentNo(0), SegmentNo(9)).is_none());
    assert_eq!((f.staging.oldest().1, f.blocks.space.staged()), (0, 0));
    // One that leaves writers no space is given up although nobody has it.
    assert!(f.staging.has_room(1000) && !f.staging.has_room(2 << 30));
    let third = stage(7, 2 << 30);
    f.staging.trim_checkpoints(SegmentNo(0));
    assert!(!third.exists());
    assert_eq!(f.blocks.space.staged(), 0);
}

#[test]
fn a_segment_is_read_from_local_disk_before_it_is_published() {
    let f = Fixture::new();
    let loc = |number, epoch| crate::format::tables::FrameLoc {
        segment: SegmentNo(number),
        epoch: Epoch(epoch),
        offset: 0,
        stored_len: 1,
        raw_len: 1,
        codec: 0,
    };
    assert_eq!(f.staging.file_of(&loc(1, 1)), None);
    // Its blocks are registered before it is published, and may be evicted from then on, when no replica has them.
    f.staging.write(SegmentNo(1), Epoch(1), Bytes::from_static(b"content")).unwrap();
    let path = f.staging.file_of(&loc(1, 1)).expect("its file is the only place of its blocks");
    assert_eq!(fs::read(path).unwrap(), b"content");
    assert_eq!(f.staging.file_of(&loc(1, 2)), None, "of another epoch");
    f.staging.discard(&[(SegmentNo(1), Epoch(1))]);
    assert_eq!(f.staging.file_of(&loc(1, 1)), None);
}
