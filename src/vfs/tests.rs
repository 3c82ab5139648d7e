//! Tests of the filesystem over a real journal and block store. The random comparison with a reference is in
//! `tests/model`; here are the cases it cannot reach.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI64, AtomicU32};

use bytes::Bytes;
use parking_lot::Mutex as PlainMutex;

use super::api::FileSystem;
use super::types::{Caller, Fallocate, SetAttr, Wait};
use super::*;
use crate::format::frame;
use crate::format::local::SealedMark;
use crate::format::segment::verify_whole;
use crate::format::tables::BlockEntry;
use crate::ids::{BlockHash, Epoch, SegmentNo, VolumeId};
use crate::journal::Options as JournalOptions;
use crate::replica::{FetchError, FrameSource, Outbox};
use crate::txg::{Sealer, Staging};

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
        Self::open(tempfile::tempdir().unwrap(), Arc::default())
    }

    fn open(dir: tempfile::TempDir, shelf: Arc<Shelf>) -> Self {
        let slots: Arc<OnceLock<Arc<crate::cache::slots::SlotFile>>> = Arc::default();
        let hook = Arc::clone(&slots);
        let sync = Arc::new(move || hook.get().map_or(Ok(()), |s| s.sync()));
        let (journal, _) = Journal::open(JournalOptions::new(dir.path(), sync)).unwrap();
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
