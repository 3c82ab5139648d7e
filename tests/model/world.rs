//! The code under test, put together in a temporary folder: journal, block store, filesystem, sealer, staging; and one
//! "replica": a folder that gets every sealed segment, from which misses are answered and the volume is restored.
//!
//! Owns opening, crashing, closing, sealing and restoring. Knows nothing of the reference.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mirrorfs::cache::BlockStore;
use mirrorfs::cache::slots::SlotFile;
use mirrorfs::format::frame;
use mirrorfs::format::local::{FrameValue, SEALED_MARK, SealedMark, SegmentValue};
use mirrorfs::format::record::Op;
use mirrorfs::format::segment::verify_whole;
use mirrorfs::format::tables::{
    BlockEntry, Time, block_key, frame_key, is_replicated, local_key, segment_key, table,
};
use mirrorfs::ids::{BlockHash, Epoch, Lsn, SegmentNo, VolumeId};
use mirrorfs::journal::{Journal, Options as JournalOptions};
use mirrorfs::replica::{FetchError, FrameSource, Outbox};
use mirrorfs::txg::{Cut, SealError, Sealer, Staging};
use mirrorfs::vfs::{Options, Vfs};

use crate::check::Tables;

pub const BLOCK_SIZE: u32 = 64 << 10;

/// How a world is set up.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Allowance of the block store in bytes.
    pub limit: u64,
    /// How long a writer waits for space.
    pub space_wait: Duration,
}

/// Answers misses as a mount's reader does, from what is staged, else from the replica's folder; fails as often as it is told.
pub struct Source {
    folder: PathBuf,
    /// Blocks count as sealed a moment before their segment is on the replica.
    staging: Mutex<Weak<Staging>>,
    /// Of 1000 fetches so many fail.
    pub failing: AtomicU32,
    state: AtomicU64,
    pub fetched: AtomicU64,
    pub failed: AtomicU64,
}

impl Source {
    fn read(&self, entry: &BlockEntry) -> Result<Bytes, FetchError> {
        use std::os::unix::fs::FileExt;
        let path = segment_file(&self.folder, entry.loc.segment, entry.loc.epoch);
        let lost = |e: &dyn std::fmt::Display| FetchError::Lost {
            what: entry.hash.to_string(),
            detail: e.to_string(),
        };
        let staged = self.staging.lock().unwrap().upgrade().and_then(|s| s.file_of(&entry.loc));
        // What is no longer staged was shipped before.
        let shipped = || fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = staged.and_then(|path| fs::File::open(path).ok()).unwrap_or_else(shipped);
        let mut stored = vec![0; entry.loc.stored_len as usize];
        file.read_exact_at(&mut stored, entry.loc.offset).map_err(|e| lost(&e))?;
        frame::decode_entry(&stored, entry).map_err(|e| lost(&e))
    }
}

impl FrameSource for Source {
    fn fetch(
        &self,
        wanted: &BlockEntry,
        ahead: &[BlockEntry],
        deliver: &dyn Fn(&BlockEntry, Bytes),
    ) -> Result<Bytes, FetchError> {
        // A small generator of its own: the number of fetches depends on threads, the operations must not.
        let n = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let draw = ((n ^ (n >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) % 1000;
        if draw < u64::from(self.failing.load(Ordering::Relaxed)) {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Err(FetchError::Unavailable { what: wanted.hash.to_string(), detail: "as told".into() });
        }
        self.fetched.fetch_add(1, Ordering::Relaxed);
        for entry in ahead {
            if let Ok(raw) = self.read(entry) {
                deliver(entry, raw);
            }
        }
        self.read(wanted)
    }
}

fn segment_file(folder: &Path, number: SegmentNo, epoch: Epoch) -> PathBuf {
    folder.join(format!("{}-{}.seg", number.hex(), epoch.hex()))
}

/// What a restore reads out of the replica, kept up with every segment that arrives.
#[derive(Default)]
pub struct Replay {
    pub tables: Tables,
    pub lsn: Lsn,
    pub last: SegmentNo,
    segments: Vec<(SegmentNo, SegmentValue)>,
    /// Each frame's place and the hash of what it holds, decoded here.
    frames: HashMap<(SegmentNo, u64), BlockHash>,
    records: Vec<mirrorfs::format::record::Record>,
}

impl Replay {
    /// Takes one more segment.
    fn apply(&mut self, bytes: &[u8]) {
        let meta = verify_whole(bytes).unwrap();
        let header = meta.footer.header;
        assert_eq!(header.number, self.last.next(), "segments in order");
        self.last = header.number;
        for (id, entry) in meta.index {
            let at = (entry.loc.segment, entry.loc.offset);
            if entry.loc.segment == header.number && !self.frames.contains_key(&at) {
                let stored = &bytes[entry.loc.offset as usize..][..entry.loc.stored_len as usize];
                let raw = frame::decode_entry(stored, &entry).unwrap();
                self.frames.insert(at, BlockHash::of(&raw));
            }
            assert_eq!(self.frames.get(&at), Some(&entry.hash), "block {id} lies in no frame that holds it");
            self.tables.insert(block_key(id), entry.encode());
        }
        self.records.extend(meta.records.to_vec().unwrap());
        let value = SegmentValue {
            epoch: header.epoch,
            len: bytes.len() as u64,
            blake3: meta.footer.hash.0,
            commit: meta.footer.commit.unwrap_or_default(),
            cut_at: 0.0,
            live: 0,
        };
        self.segments.push((header.number, value));
        let Some(commit) = meta.footer.commit else { return };
        assert!(commit >= self.lsn);
        self.lsn = commit;
        for record in self.records.drain(..) {
            for op in record.ops {
                assert!(is_replicated(op.key()));
                match op {
                    Op::Put { key, value } => {
                        assert_ne!(key[0], table::BLOCK, "a block's entry was shipped as a record");
                        self.tables.insert(key, value);
                    }
                    Op::Delete { key } => {
                        self.tables.remove(&key);
                    }
                }
            }
        }
    }

    /// The operations that make a fresh journal hold this state, the derived tables included.
    fn import(&self) -> Vec<Op> {
        let mut ops: Vec<Op> = self.tables.iter().map(|(k, v)| Op::put(k.clone(), v.clone())).collect();
        let mut frames: HashMap<BlockHash, FrameValue> = HashMap::new();
        let mut live: BTreeMap<SegmentNo, u64> = BTreeMap::new();
        for (key, value) in &self.tables {
            if key[0] == table::BLOCK {
                let entry = BlockEntry::decode(value).unwrap();
                frames.entry(entry.hash).or_insert(FrameValue { entry, uses: 0 }).uses += 1;
            }
        }
        for (hash, frame) in &frames {
            *live.entry(frame.entry.loc.segment).or_default() += u64::from(frame.entry.loc.stored_len);
            ops.push(Op::put(frame_key(hash), frame.encode()));
        }
        let mut mark = SealedMark { lsn: self.lsn, ..SealedMark::default() };
        for (number, value) in &self.segments {
            let value = SegmentValue { live: live.get(number).copied().unwrap_or(0), ..*value };
            ops.push(Op::put(segment_key(*number), value.encode()));
            (mark.segment, mark.blake3) = (*number, value.blake3);
        }
        ops.push(Op::put(local_key(SEALED_MARK), mark.encode()));
        ops
    }
}

/// All that is open.
pub struct Stack {
    pub journal: Arc<Journal>,
    pub blocks: Arc<BlockStore>,
    pub vfs: Arc<Vfs>,
    pub staging: Arc<Staging>,
    pub sealer: Sealer,
}

/// A folder in memory where there is one: what is tested here is order and content, and a disk's syncs would take ten
/// times as long. (Syncs that lie are tested with the journal and by killing real processes.)
pub fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match std::env::var_os("TMPDIR").is_none() && memory.is_dir() {
        true => tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()),
        false => tempfile::tempdir(),
    }
    .unwrap()
}

pub struct World {
    _temp: tempfile::TempDir,
    root: PathBuf,
    setup: Setup,
    volume: VolumeId,
    epoch: Epoch,
    tenures: u32,
    pub clock: Arc<AtomicI64>,
    pub source: Arc<Source>,
    pub replay: Replay,
    stack: Option<Stack>,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let temp = scratch();
        let root = temp.path().to_owned();
        let replica = root.join("replica");
        fs::create_dir(&replica).unwrap();
        let source = Source {
            folder: replica,
            staging: Mutex::default(),
            failing: AtomicU32::new(0),
            state: AtomicU64::new(1),
            fetched: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        };
        let mut world = Self {
            _temp: temp,
            root,
            setup,
            volume: VolumeId::from_random([7; 16]),
            epoch: Epoch(1),
            tenures: 0,
            clock: Arc::new(AtomicI64::new(1)),
            source: Arc::new(source),
            replay: Replay::default(),
            stack: None,
        };
        world.open(&[]);
        world
    }

    pub fn stack(&self) -> &Stack {
        self.stack.as_ref().unwrap()
    }

    pub fn vfs(&self) -> &Arc<Vfs> {
        &self.stack().vfs
    }

    fn state(&self) -> PathBuf {
        self.root.join(format!("state-{}", self.tenures))
    }

    /// Opens everything in the state folder; `import` is put into the (then fresh) journal first.
    fn open(&mut self, import: &[Op]) {
        let state = self.state();
        fs::create_dir_all(&state).unwrap();
        let slots: Arc<OnceLock<Arc<SlotFile>>> = Arc::default();
        let hook = Arc::clone(&slots);
        let options = JournalOptions {
            // Small files, so that the tail is cut while the test runs.
            tail_file_size: 1 << 20,
            form: mirrorfs::vfs::FORM,
            ..JournalOptions::new(&state, Arc::new(move |mark| hook.get().map_or(Ok(()), |s| s.sync(mark))))
        };
        let (journal, _) = Journal::open(options).unwrap();
        if !import.is_empty() {
            journal.import(self.replay.lsn, &mut import.iter().cloned().map(Ok)).unwrap();
        }
        let blocks =
            BlockStore::open(&state.join("slots"), BLOCK_SIZE, self.setup.limit, Arc::clone(&journal))
                .unwrap();
        slots.set(Arc::clone(blocks.slots())).ok().unwrap();
        blocks.set_source(Arc::clone(&self.source) as _);
        let staging = Staging::open(&state.join("staging"), &journal, Arc::clone(&blocks)).unwrap();
        *self.source.staging.lock().unwrap() = Arc::downgrade(&staging);
        let mark = journal.get(&local_key(SEALED_MARK)).unwrap();
        let mark = mark.map_or(SealedMark::default(), |v| SealedMark::decode(&v).unwrap());
        assert!(mark.segment >= self.replay.last, "a segment was shipped before it was registered durably");
        let sealer = Sealer::new(
            Arc::clone(&journal),
            Arc::clone(&blocks),
            Arc::clone(&staging),
            self.volume,
            self.epoch,
            1,
            mark,
        )
        .unwrap();
        let clock = Arc::clone(&self.clock);
        let options = Options {
            clock: Arc::new(move || Time { secs: clock.load(Ordering::SeqCst), nanos: 0 }),
            remote_fsync: false,
            space_wait: self.setup.space_wait,
        };
        let vfs = Vfs::open(Arc::clone(&journal), Arc::clone(&blocks), options).unwrap();
        self.stack = Some(Stack { journal, blocks, vfs, staging, sealer });
        // What an earlier run registered and did not ship.
        self.ship();
    }

    /// Ends the process, in order or not. With `clean` what is pending is committed and the journal closed.
    fn end(&mut self, clean: bool) {
        let Some(stack) = self.stack.take() else { return };
        if clean {
            stack.vfs.commit().unwrap();
        } else {
            // What is in no tail file yet is lost, as with SIGKILL.
            stack.journal.poison("killed by the test");
        }
        stack.vfs.stop_reaper();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Arc::strong_count(&stack.vfs) > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        let closed = stack.journal.close();
        assert!(!clean || closed.is_ok(), "{closed:?}");
    }

    /// Closes in order and opens again.
    pub fn restart(&mut self) {
        self.end(true);
        self.open(&[]);
    }

    /// Kills and opens again. With `litter` the kill left an unregistered segment's file.
    pub fn crash(&mut self, litter: bool) {
        let stack = self.stack();
        let next = stack.sealer.mark().segment.next();
        let file = stack.staging.segment_path(next, self.epoch);
        self.end(false);
        if litter && !file.exists() {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, b"half a segment").unwrap();
        }
        self.open(&[]);
        assert!(!file.exists(), "what was not registered is removed");
    }

    /// Loses the whole local state; comes back from the replica alone, as a new writer.
    pub fn restore(&mut self) {
        self.end(false);
        fs::remove_dir_all(self.state()).unwrap();
        self.tenures += 1;
        self.epoch = self.epoch.next();
        let ops = self.replay.import();
        self.open(&ops);
    }

    pub fn cut(&self) -> Cut {
        self.vfs().cut().unwrap()
    }

    /// Seals a cut, ships it and replays it. Answers whether anything was sealed.
    pub fn seal(&mut self, cut: &Cut) -> Result<Option<SegmentNo>, SealError> {
        let now = Time { secs: self.clock.load(Ordering::SeqCst), nanos: 0 };
        let stack = self.stack.as_mut().unwrap();
        let sealed = stack.sealer.seal(cut, now)?;
        self.ship();
        Ok(sealed)
    }

    /// Copies what is staged to the replica, replays it there and trims the staging area.
    fn ship(&mut self) {
        let stack = self.stack.as_ref().unwrap();
        for staged in stack.staging.segments_after(self.replay.last, usize::MAX) {
            let bytes = fs::read(&staged.path).unwrap();
            fs::write(segment_file(&self.source.folder, staged.number, staged.epoch), &bytes).unwrap();
            self.replay.apply(&bytes);
        }
        stack.staging.trim(self.replay.last);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end(false);
    }
}
