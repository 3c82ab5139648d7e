//! What the tests of shipper and reader share: segments, an outbox of files, cursors in memory, replicas with faults.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::fault::Faults;
use super::{Backlog, CursorStore, Identity, Limits, Outbox, Replica, Staged, StagedKind, Store};
use crate::format::frame;
use crate::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader};
use crate::format::tables::{BlockEntry, Time};
use crate::format::volume::Claim;
use crate::format::volume::testing::volume;
use crate::ids::{BlockHash, BlockId, Epoch, Lsn, ReplicaName, SegmentNo};

pub fn identity(claims: &[Claim]) -> Arc<Identity> {
    Arc::new(Identity { volume: volume(1), claims: claims.to_vec() })
}

/// Content that does not compress, told apart by `seed`.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// A segment of blocks, and their entries.
pub fn segment(number: u64, epoch: u32, blocks: &[Vec<u8>]) -> (Vec<u8>, Vec<BlockEntry>) {
    let mut builder = SegmentBuilder::new(SegmentHeader {
        volume: volume(1).volume,
        number: SegmentNo(number),
        epoch: Epoch(epoch),
        cut_at: Time { secs: 1_790_000_000, nanos: 0 },
        txg_first: SegmentNo(number),
        previous: SegmentHash::default(),
    });
    let mut entries = Vec::new();
    for (i, raw) in blocks.iter().enumerate() {
        let frame = frame::encode(raw, 3).unwrap();
        let loc = builder.push_frame(&frame.bytes).unwrap();
        let entry = BlockEntry { hash: BlockHash::of(raw), loc };
        builder.push_index(BlockId(number * 1000 + i as u64 + 1), entry).unwrap();
        entries.push(entry);
    }
    (builder.finish(Some(Lsn(number))).unwrap().0.to_vec(), entries)
}

/// A segment without content that names the one before it, and its hash.
pub fn chained(number: u64, previous: SegmentHash) -> (Vec<u8>, SegmentHash) {
    let builder = SegmentBuilder::new(SegmentHeader {
        volume: volume(1).volume,
        number: SegmentNo(number),
        epoch: Epoch(1),
        cut_at: Time { secs: 1_790_000_000, nanos: 0 },
        txg_first: SegmentNo(number),
        previous,
    });
    let (bytes, summary) = builder.finish(Some(Lsn(number))).unwrap();
    (bytes.to_vec(), summary.hash)
}

/// Staged objects as files.
pub struct FakeOutbox {
    dir: tempfile::TempDir,
    segments: Mutex<BTreeMap<SegmentNo, Staged>>,
    checkpoints: Mutex<Vec<Staged>>,
    /// What is known of segments' hashes.
    pub hashes: Mutex<BTreeMap<SegmentNo, SegmentHash>>,
    newest: watch::Sender<SegmentNo>,
}

impl FakeOutbox {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            dir: tempfile::tempdir().unwrap(),
            segments: Mutex::default(),
            checkpoints: Mutex::default(),
            hashes: Mutex::default(),
            newest: watch::channel(SegmentNo(0)).0,
        })
    }

    /// Stages the next segment with one block of `len` bytes; gives its bytes and the block's entry.
    pub fn seal(&self, epoch: u32, len: usize) -> (Vec<u8>, BlockEntry) {
        let number = self.newest.borrow().0 + 1;
        let (bytes, entries) = segment(number, epoch, &[content(number, len)]);
        self.stage(number, epoch, &bytes);
        let footer = crate::format::segment::parse_footer(&bytes, bytes.len() as u64).unwrap();
        self.hashes.lock().insert(SegmentNo(number), footer.hash);
        (bytes, entries[0])
    }

    pub fn stage(&self, number: u64, epoch: u32, bytes: &[u8]) {
        let path = self.path(number);
        std::fs::write(&path, bytes).unwrap();
        let staged = Staged {
            kind: StagedKind::Segment,
            number: SegmentNo(number),
            epoch: Epoch(epoch),
            path,
            len: bytes.len() as u64,
            cut_at: 1_790_000_000.0,
        };
        self.segments.lock().insert(staged.number, staged);
        self.newest.send_replace(SegmentNo(number));
    }

    pub fn stage_checkpoint(&self, number: u64, epoch: u32, parts: usize) {
        let path = self.dir.path().join(format!("checkpoint{number}"));
        std::fs::create_dir(&path).unwrap();
        for i in 0..parts {
            std::fs::write(path.join(format!("part-{i:05}")), content(i as u64, 1000)).unwrap();
        }
        std::fs::write(path.join("manifest"), b"manifest").unwrap();
        self.checkpoints.lock().push(Staged {
            kind: StagedKind::Checkpoint,
            number: SegmentNo(number),
            epoch: Epoch(epoch),
            path,
            len: parts as u64 * 1000,
            cut_at: 0.0,
        });
    }

    /// The file of a segment.
    pub fn path(&self, number: u64) -> PathBuf {
        self.dir.path().join(format!("{number}.seg"))
    }

    /// Removes a segment's file, and what is known of it when `forget`.
    pub fn unstage(&self, number: u64, forget: bool) {
        let _ = std::fs::remove_file(self.path(number));
        if forget {
            self.segments.lock().remove(&SegmentNo(number));
        }
    }
}

impl Outbox for FakeOutbox {
    fn segments_after(&self, after: SegmentNo, limit: usize) -> Vec<Staged> {
        self.segments.lock().range(after.next()..).take(limit).map(|(_, s)| s.clone()).collect()
    }

    fn backlog(&self, after: SegmentNo) -> Backlog {
        let segments = self.segments.lock();
        let lacking: Vec<_> = segments.range(after.next()..).map(|(_, s)| s).collect();
        Backlog {
            segments: lacking.len() as u64,
            bytes: lacking.iter().map(|s| s.len).sum(),
            oldest_cut_at: lacking.first().map_or(0.0, |s| s.cut_at),
        }
    }

    fn checkpoint(&self, after: SegmentNo, cursor: SegmentNo) -> Option<Staged> {
        let checkpoints = self.checkpoints.lock();
        checkpoints
            .iter()
            .filter(|c| c.number > after && c.number <= cursor)
            .max_by_key(|c| c.number)
            .cloned()
    }

    fn hash(&self, number: SegmentNo) -> Option<SegmentHash> {
        self.hashes.lock().get(&number).copied()
    }

    fn learned(&self, number: SegmentNo, _: Epoch, hash: SegmentHash, _: Option<u64>) {
        self.hashes.lock().insert(number, hash);
    }

    fn watch(&self) -> watch::Receiver<SegmentNo> {
        self.newest.subscribe()
    }
}

/// Cursors in memory.
#[derive(Default)]
pub struct FakeCursors(
    pub Mutex<BTreeMap<ReplicaName, SegmentNo>>,
    /// Filesystems.
    pub Mutex<BTreeMap<ReplicaName, String>>,
);

impl CursorStore for FakeCursors {
    fn load(&self, replica: &ReplicaName) -> Result<SegmentNo, String> {
        Ok(self.0.lock().get(replica).copied().unwrap_or_default())
    }

    fn save(&self, replica: &ReplicaName, cursor: SegmentNo) -> Result<(), String> {
        self.0.lock().insert(replica.clone(), cursor);
        Ok(())
    }

    fn load_filesystem(&self, replica: &ReplicaName) -> Result<Option<String>, String> {
        Ok(self.1.lock().get(replica).cloned())
    }

    fn save_filesystem(&self, replica: &ReplicaName, filesystem: &str) -> Result<(), String> {
        self.1.lock().insert(replica.clone(), filesystem.to_owned());
        Ok(())
    }
}

/// A replica in memory, its faults, and its store without faults to look behind the scenes.
pub fn faulty(name: &str, seed: u64) -> (Arc<Replica>, Faults, Store) {
    let faults = Faults::new(seed);
    let limits = Limits { call: Duration::from_millis(300), ..Limits::default() };
    let bare = Store::in_memory(name.parse().unwrap());
    let store = bare.clone().with_limits(limits).wrapped(|s| faults.wrap(s));
    (Arc::new(Replica::new(store)), faults, bare)
}
