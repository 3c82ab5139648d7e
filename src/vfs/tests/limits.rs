//! Tests of limits and failures: tiny writes, huge truncates, lost blocks, full disks, poisoned journals, crashes at bad
//! moments. Over a real journal, block store and sealer.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI64, AtomicU32};

use bytes::Bytes;
use parking_lot::Mutex as PlainMutex;

use crate::format::frame;
use crate::format::local::SealedMark;
use crate::format::segment::verify_whole;
use crate::format::tables::BlockEntry;
use crate::ids::{BlockHash, Epoch, SegmentNo, VolumeId};
use crate::journal::Options as JournalOptions;
use crate::replica::{FetchError, FrameSource, Outbox};
use crate::txg::{Sealer, Staging};
use crate::vfs::api::FileSystem;
use crate::vfs::types::{Caller, Fallocate, SetAttr, Wait};
use crate::vfs::*;

const BS: u32 = 64 << 10;

/// Content of everything that was sealed, by hash; and what is missing of it.
#[derive(Default)]
struct Shelf {
    frames: PlainMutex<HashMap<BlockHash, Bytes>>,
    lost: PlainMutex<Option<BlockHash>>,
    asked: AtomicU32,
}

impl FrameSource for Shelf {
    fn fetch(
        &self,
        wanted: &BlockEntry,
        _: &[BlockEntry],
        _: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError> {
        self.asked.fetch_add(1, SeqCst);
        let lost = *self.lost.lock() == Some(wanted.hash);
        self.frames
            .lock()
            .get(&wanted.hash)
            .filter(|_| !lost)
            .cloned()
            .ok_or_else(|| FetchError::Lost { what: wanted.hash.to_string(), detail: "as told".into() })
    }
}

struct Bench {
    dir: tempfile::TempDir,
    journal: Arc<Journal>,
    blocks: Arc<BlockStore>,
    vfs: Arc<Vfs>,
    staging: Arc<Staging>,
    sealer: Sealer,
    shelf: Arc<Shelf>,
    shipped: SegmentNo,
}

impl Bench {
    fn new() -> Self {
        // In memory where there is some: what is tested is order and content.
        let memory = std::path::Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self::open(dir.unwrap(), Arc::default())
    }

    fn open(dir: tempfile::TempDir, shelf: Arc<Shelf>) -> Self {
        let slots: Arc<OnceLock<Arc<crate::cache::slots::SlotFile>>> = Arc::default();
        let hook = Arc::clone(&slots);
        let sync = Arc::new(move |mark| hook.get().map_or(Ok(()), |s| s.sync(mark)));
        let options = JournalOptions { form: crate::vfs::FORM, ..JournalOptions::new(dir.path(), sync) };
        let (journal, _) = Journal::open(options).unwrap();
        let blocks = BlockStore::open(&dir.path().join("slots"), BS, 1 << 30, Arc::clone(&journal)).unwrap();
        slots.set(Arc::clone(blocks.slots())).ok().unwrap();
        blocks.set_source(Arc::clone(&shelf) as _);
        let staging = Staging::open(&dir.path().join("staging"), &journal, Arc::clone(&blocks)).unwrap();
        let mark = journal.get(&crate::format::tables::local_key(crate::format::local::SEALED_MARK)).unwrap();
        let mark = mark.map_or(SealedMark::default(), |v| SealedMark::decode(&v).unwrap());
        let volume = VolumeId::from_random([7; 16]);
        let sealer = Sealer::new(
            Arc::clone(&journal),
            Arc::clone(&blocks),
            Arc::clone(&staging),
            volume,
            Epoch(1),
            1,
            mark,
        )
        .unwrap();
        let clock = AtomicI64::new(1);
        let options = Options {
            clock: Arc::new(move || Time { secs: clock.fetch_add(1, SeqCst), nanos: 0 }),
            remote_fsync: false,
            space_wait: Duration::from_millis(50),
        };
        let vfs = Vfs::open(Arc::clone(&journal), Arc::clone(&blocks), options).unwrap();
        Self { dir, journal, blocks, vfs, staging, sealer, shelf, shipped: mark.segment }
    }

    /// Kills it (nothing more reaches the disk) and opens what is there.
    fn crash(self) -> Self {
        self.journal.poison("killed by the test");
        self.vfs.stop_reaper();
        let weak = Arc::downgrade(&self.journal);
        let Self { dir, journal, blocks, vfs, staging, sealer, shelf, .. } = self;
        drop((vfs, sealer, staging, blocks, journal));
        while weak.strong_count() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        Self::open(dir, shelf)
    }

    /// Sets or deletes a key behind the filesystem's back.
    fn set(&self, key: &Bytes, value: Option<&[u8]>) {
        let change = |tx: &mut Tx<'_>| -> Result<(), JournalError> {
            match value {
                Some(value) => tx.put(key.clone(), value.to_vec()),
                None => tx.delete(key.clone()),
            }
            Ok(())
        };
        self.journal.transact(change).unwrap();
    }

    fn file(&self, name: &str) -> Ino {
        let attr = self.vfs.create(Ino::ROOT, name.as_bytes(), 0o644, &Caller::default()).unwrap();
        attr.ino
    }

    fn write(&self, ino: Ino, at: u64, data: &[u8]) -> Result<u32> {
        self.vfs.write(ino, at, data, Wait::Yes)
    }

    fn read(&self, ino: Ino, at: u64, len: u32) -> Result<Vec<u8>> {
        self.vfs.read(ino, at, len, Wait::Yes).map(|b| b.to_vec())
    }

    fn truncate(&self, ino: Ino, size: u64) -> Result<Attr> {
        self.vfs.setattr(ino, &SetAttr { size: Some(size), ..SetAttr::default() }, &Caller::default())
    }

    /// Cuts, seals and ships; answers the index entries of the new segments.
    fn seal(&mut self) -> Vec<(BlockId, BlockEntry)> {
        let cut = self.vfs.cut().unwrap();
        self.sealer.seal(&cut, Time::default()).unwrap();
        let mut index = Vec::new();
        for staged in self.staging.segments_after(self.shipped, usize::MAX) {
            let bytes = std::fs::read(&staged.path).unwrap();
            let meta = verify_whole(&bytes).unwrap();
            for (_, entry) in &meta.index {
                if entry.loc.segment == staged.number {
                    let stored = &bytes[entry.loc.offset as usize..][..entry.loc.stored_len as usize];
                    let raw = frame::decode_entry(stored, entry).unwrap();
                    self.shelf.frames.lock().insert(entry.hash, raw);
                }
            }
            index.extend(meta.index);
            self.shipped = staged.number;
        }
        index
    }
}

/// Every second byte, alone: the block's value must not outgrow the journal.
#[test]
fn single_bytes_cannot_make_a_file_uncommittable() {
    let mut bench = Bench::new();
    let (bare, based) = (bench.file("bare"), bench.file("based"));
    bench.write(bare, u64::from(BS) - 1, &[9]).unwrap();
    let old: Vec<u8> = (0..BS).map(|i| (i % 251) as u8).collect();
    bench.write(based, 0, &old).unwrap();
    bench.seal();
    bench.blocks.drop_all_clean();
    let (mut bare_now, mut based_now) = (vec![0; BS as usize], old);
    bare_now[BS as usize - 1] = 9;
    for at in (0..BS as u64 - 1).step_by(2) {
        for (ino, now) in [(bare, &mut bare_now), (based, &mut based_now)] {
            bench.write(ino, at, &[7]).unwrap();
            now[at as usize] = 7;
        }
        // Frozen blocks are copied with all their ranges: no growth from there, either.
        if at % 600 == 0 {
            bench.blocks.freeze();
        }
    }
    let longest = |bench: &Bench| {
        let (start, end) = crate::format::tables::prefix_range(&[crate::format::tables::table::DIRTY]);
        bench.journal.scan(&start, &end, 100).unwrap().iter().map(|(_, v)| v.len()).max()
    };
    bench.vfs.commit().unwrap();
    assert!(longest(&bench).unwrap() < 8192, "{:?}", longest(&bench));
    assert_eq!(bench.read(bare, 0, BS).unwrap(), bare_now);
    assert_eq!(bench.read(based, 0, BS).unwrap(), based_now);
    bench.seal();
    assert_eq!(bench.read(bare, 0, BS).unwrap(), bare_now);
    assert_eq!(bench.read(based, 0, BS).unwrap(), based_now);
}

#[test]
fn joining_ranges_asks_for_the_block_below_outside_of_all_locks() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, 0, &vec![1; BS as usize]).unwrap();
    bench.seal();
    bench.blocks.drop_all_clean();
    let mut answers = Vec::new();
    for at in (0..4096).step_by(2) {
        let answer = bench.vfs.write(ino, at, &[7], Wait::No);
        if answer == Err(VfsError::WouldBlock) {
            assert_eq!(bench.write(ino, at, &[7]), Ok(1));
        }
        answers.push(answer);
    }
    assert_eq!(answers.iter().filter(|a| **a == Err(VfsError::WouldBlock)).count(), 1);
    assert_eq!(bench.shelf.asked.load(SeqCst), 1);
}

#[test]
fn a_long_hole_is_punched_in_steps() {
    let bench = Bench::new();
    let ino = bench.file("f");
    let blocks = 4096 + 500;
    for i in 0..blocks {
        bench.write(ino, i * u64::from(BS), &[1; 8192][..if i == 0 { 8192 } else { 1 }]).unwrap();
    }
    bench.vfs.commit().unwrap();
    let before = bench.journal.last_lsn();
    let size = bench.vfs.getattr(ino).unwrap().size;
    bench.vfs.fallocate(ino, Fallocate::PunchHole, 1, 1 << 50, Wait::Yes).unwrap();
    bench.vfs.commit().unwrap();
    assert_eq!(bench.journal.last_lsn().0 - before.0, 2);
    let attr = bench.vfs.getattr(ino).unwrap();
    assert_eq!((attr.size, attr.blocks), (size, 16));
    assert_eq!(bench.read(ino, 0, 3).unwrap(), [1, 0, 0]);
}

#[test]
fn a_file_that_cannot_be_committed_stops_no_other() {
    let bench = Bench::new();
    let files: Vec<Ino> = (0..20).map(|i| bench.file(&format!("f{i}"))).collect();
    for ino in &files {
        bench.write(*ino, 0, &[1; 10_000]).unwrap();
    }
    let key = crate::format::tables::extent_key(files[7], 0);
    bench.set(&key, Some(b"damaged"));
    assert!(bench.vfs.commit().is_err());
    assert!(bench.vfs.cut().is_err(), "not the exact state");
    for ino in &files {
        let committed = Inode::decode(&bench.journal.get(&inode_key(*ino)).unwrap().unwrap()).unwrap();
        assert_eq!(committed.size, if *ino == files[7] { 0 } else { 10_000 });
    }
    assert_eq!(bench.vfs.pending_files(), 1);
    bench.set(&key, None);
    bench.vfs.cut().unwrap();
    assert_eq!(bench.vfs.pending_files(), 0);
}

#[test]
fn nothing_is_accepted_once_the_journal_is_poisoned() {
    let bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, 0, &[1; 100]).unwrap();
    bench.journal.poison("a disk died");
    let refused = |r: Result<()>| assert_eq!(r, Err(VfsError::ReadOnly("a disk died".into())));
    refused(bench.write(ino, 0, &[2; 100]).map(|_| ()));
    refused(bench.truncate(ino, 5).map(|_| ()));
    refused(bench.vfs.open(ino, true, false));
    refused(bench.vfs.open(ino, false, true));
    assert_eq!(bench.vfs.open(ino, false, false), Ok(()));
    assert_eq!(bench.read(ino, 0, 200).unwrap(), [1; 100]);
}

#[test]
fn what_is_written_behind_a_cut_does_not_show_inside_the_old_length() {
    let bench = Bench::new();
    let ino = bench.file("f");
    let old = vec![1; 60_000];
    bench.write(ino, 0, &old).unwrap();
    bench.vfs.commit().unwrap();
    bench.truncate(ino, 100).unwrap();
    bench.write(ino, 200, b"new").unwrap();
    let bench = bench.crash();
    let size = bench.vfs.getattr(ino).unwrap().size;
    assert!(size == 100 || size == 60_000, "{size}");
    assert_eq!(bench.read(ino, 0, 60_000).unwrap(), old[..size as usize]);
}

#[test]
fn a_large_truncate_leaves_its_extents_to_the_reaper() {
    let bench = Bench::new();
    let stretch = u64::from(BS) * crate::format::tables::BLOCKS_PER_CHUNK;
    for (name, size) in [("to nothing", 0), ("to a chunk", stretch * 4), ("into a block", stretch * 3 + 10)] {
        let ino = bench.file(name);
        for i in 0..20 {
            bench.write(ino, i * stretch, &vec![i as u8 + 1; BS as usize]).unwrap();
        }
        bench.vfs.commit().unwrap();
        let before = bench.journal.last_lsn();
        bench.truncate(ino, size).unwrap();
        bench.vfs.commit().unwrap();
        bench.vfs.wait_reaped();
        let largest = bench
            .journal
            .records(before, bench.journal.last_lsn())
            .unwrap()
            .map(|r| {
                r.unwrap().ops.iter().filter(|op| op.key()[0] == crate::format::tables::table::DIRTY).count()
            })
            .max();
        assert!(largest.unwrap() <= 8, "{largest:?} blocks released at once");
        let attr = bench.vfs.getattr(ino).unwrap();
        let kept = size.div_ceil(stretch);
        let last = if size % stretch == 0 { 128 } else { 8 };
        assert_eq!((attr.size, attr.blocks), (size, if kept == 0 { 0 } else { (kept - 1) * 128 + last }));
        // What was cut off does not come back.
        bench.truncate(ino, stretch * 20).unwrap();
        for i in 0..20 {
            let first = bench.read(ino, i * stretch, 20).unwrap();
            let here = size.saturating_sub(i * stretch).min(20) as usize;
            assert_eq!(first[..here], vec![i as u8 + 1; here]);
            assert_eq!(first[here..], vec![0; 20 - here]);
        }
        bench.vfs.unlink(Ino::ROOT, name.as_bytes()).unwrap();
        bench.vfs.release(ino);
        bench.vfs.forget(ino, 1);
        bench.vfs.wait_reaped();
        assert_eq!(bench.vfs.usage().unwrap(), Usage { blocks: 0, inodes: 1 });
    }
    assert_eq!(bench.blocks.counts().1, 0);
}

#[test]
fn a_deletion_that_fails_is_tried_again() {
    let bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, 0, &[1; 10_000]).unwrap();
    bench.vfs.commit().unwrap();
    let key = crate::format::tables::extent_key(ino, 0);
    let good = bench.journal.get(&key).unwrap().unwrap();
    bench.set(&key, Some(b"damaged"));
    bench.vfs.unlink(Ino::ROOT, b"f").unwrap();
    bench.vfs.release(ino);
    bench.vfs.forget(ino, 1);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bench.journal.get(&inode_key(ino)).unwrap().is_some());
    assert_eq!(bench.vfs.open(ino, false, false), Err(VfsError::Stale), "half deleted");
    bench.set(&key, Some(&good[..]));
    bench.vfs.wait_reaped();
    assert_eq!(bench.vfs.usage().unwrap(), Usage { blocks: 0, inodes: 1 });
    assert!(bench.vfs.existing_cell(ino).is_none());
}

#[test]
fn a_cut_waits_for_no_room_while_writers_stand() {
    let dir = tempfile::tempdir().unwrap();
    let options =
        JournalOptions { memtable_limit: 1, ..JournalOptions::new(dir.path(), Arc::new(|_| Ok(()))) };
    let (journal, _) = Journal::open(options).unwrap();
    for i in 0..40u8 {
        let put = |tx: &mut Tx<'_>| -> Result<(), JournalError> {
            tx.put(vec![1, i], vec![i; 100_000]);
            Ok(())
        };
        journal.transact_at_once(put).unwrap();
    }
    assert_eq!(journal.stats().waits, 0);
    journal.make_room().unwrap();
    assert!(journal.stats().memtable_bytes <= 1 << 20);
}

/// Nobody has the rest of a block: everything else goes on.
#[test]
fn a_lost_block_stops_no_txg_and_never_shows_wrong_bytes() {
    let mut bench = Bench::new();
    let (torn, fine) = (bench.file("torn"), bench.file("fine"));
    let old = vec![5; 1000];
    bench.write(torn, 0, &[&old[..], &[0; 9000]].concat()).unwrap();
    let first = bench.seal();
    let [(_, base)] = first[..] else { panic!("{first:?}") };
    bench.blocks.drop_all_clean();
    *bench.shelf.lost.lock() = Some(base.hash);
    // Longer than the block below.
    bench.write(torn, 20_000, b"new").unwrap();
    bench.write(fine, 0, &[3; 10_000]).unwrap();
    let second = bench.seal();
    let (torn_id, entry) =
        *second.iter().find(|(_, e)| e.is_without_content()).expect("an entry without content");
    assert_eq!(entry.loc.raw_len, 20_003);
    assert_ne!(entry.hash, base.hash);
    assert_eq!(second.len(), 2, "the other file is whole");
    assert_eq!(bench.blocks.counters.lost.load(SeqCst), 1);
    assert_eq!(bench.blocks.entry(torn_id).unwrap(), entry, "a checkpoint has it, too");
    // Here it is as readable as before.
    assert_eq!(bench.read(torn, 20_000, 9).unwrap(), b"new");
    assert!(matches!(bench.read(torn, 0, 10), Err(VfsError::Io(_))));
    // It is not tried with every txg, and others pass.
    bench.write(fine, 10_000, &[4; 10_000]).unwrap();
    assert_eq!(bench.seal().len(), 1);
    // A restart keeps what there is.
    bench.vfs.commit().unwrap();
    let mut bench = bench.crash();
    assert_eq!(bench.read(torn, 20_000, 9).unwrap(), b"new");
    // The copy turns up: the next group heals it.
    *bench.shelf.lost.lock() = None;
    bench.write(fine, 0, b"x").unwrap();
    let third = bench.seal();
    assert!(third.iter().any(|(id, e)| *id == torn_id && !e.is_without_content()));
    assert_eq!(bench.blocks.counters.lost.load(SeqCst), 0);
    assert_eq!(bench.read(torn, 999, 2).unwrap(), [5, 0]);
    // Deleting leaves nothing.
    for (name, ino) in [("torn", torn), ("fine", fine)] {
        bench.vfs.unlink(Ino::ROOT, name.as_bytes()).unwrap();
        bench.vfs.forget(ino, 1);
    }
    bench.vfs.wait_reaped();
    let (start, end) = crate::format::tables::prefix_range(&[crate::format::tables::table::FRAME]);
    assert_eq!(bench.journal.scan(&start, &end, 9).unwrap(), []);
}

/// Before the machine goes, somebody asks that all be sealed: what was only said to be lost must not stay behind on it.
#[test]
fn who_insists_gets_lost_blocks_sealed_as_soon_as_their_rest_is_there_again() {
    let mut bench = Bench::new();
    let torn = bench.file("torn");
    bench.write(torn, 0, &[5; 10_000]).unwrap();
    let [(_, base)] = bench.seal()[..] else { panic!() };
    bench.blocks.drop_all_clean();
    *bench.shelf.lost.lock() = Some(base.hash);
    bench.write(torn, 20_000, b"new").unwrap();
    assert!(bench.seal().iter().all(|(_, e)| e.is_without_content()));
    *bench.shelf.lost.lock() = None;
    assert_eq!(bench.seal(), [], "it was tried a moment ago");
    bench.sealer.try_lost_again();
    let [(_, entry)] = bench.seal()[..] else { panic!() };
    assert!(!entry.is_without_content());
    assert_eq!(bench.blocks.counters.lost.load(SeqCst), 0);
}

#[test]
fn content_written_again_does_not_rest_on_a_lost_frame() {
    let mut bench = Bench::new();
    let (one, two) = (bench.file("one"), bench.file("two"));
    bench.write(one, 0, &[5; 10_000]).unwrap();
    let [(_, base)] = bench.seal()[..] else { panic!() };
    bench.blocks.drop_all_clean();
    *bench.shelf.lost.lock() = Some(base.hash);
    assert!(bench.read(one, 0, 1).is_err());
    bench.write(two, 0, &[5; 10_000]).unwrap();
    let [(_, again)] = bench.seal()[..] else { panic!() };
    assert_eq!(again.hash, base.hash);
    assert_ne!(again.loc, base.loc, "a frame of its own");
    for (name, ino) in [("one", one), ("two", two)] {
        bench.vfs.unlink(Ino::ROOT, name.as_bytes()).unwrap();
        bench.vfs.release(ino);
        bench.vfs.forget(ino, 1);
    }
    bench.vfs.wait_reaped();
    let (start, end) = crate::format::tables::prefix_range(&[crate::format::tables::table::SEGMENT]);
    for (_, value) in bench.journal.scan(&start, &end, 9).unwrap() {
        assert_eq!(crate::format::local::SegmentValue::decode(&value).unwrap().live, 0);
    }
}

#[test]
fn a_full_disk_takes_the_cache_before_a_writer_fails() {
    let mut bench = Bench::new();
    for i in 0..10 {
        let ino = bench.file(&format!("old{i}"));
        bench.write(ino, 0, &vec![i + 1; BS as usize]).unwrap();
    }
    bench.seal();
    assert_eq!(bench.blocks.counts(), (10, 0));
    bench.blocks.slots().most.store(10, SeqCst);
    let ino = bench.file("new");
    let data = vec![99; BS as usize];
    assert_eq!(bench.vfs.write(ino, 0, &data, Wait::No), Err(VfsError::WouldBlock));
    assert_eq!(bench.write(ino, 0, &data), Ok(BS));
    assert_eq!(bench.read(ino, 0, BS).unwrap(), data);
    // Nothing clean is left in the end: then it is an error, not a wait.
    bench.blocks.drop_all_clean();
    bench.blocks.slots().most.store(0, SeqCst);
    assert_eq!(bench.write(ino, u64::from(BS), &data), Err(VfsError::NoSpace));
}

#[test]
fn slots_are_freed_although_the_journal_takes_nothing() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, 0, &vec![1; BS as usize]).unwrap();
    bench.seal();
    bench.vfs.commit().unwrap();
    bench.blocks.drop_all_clean();
    assert_eq!(bench.blocks.slots().in_limbo(), 1);
    bench.journal.poison("as if it were full");
    assert!(bench.blocks.housekeep().is_err());
    assert_eq!(bench.blocks.slots().in_limbo(), 0);
}
