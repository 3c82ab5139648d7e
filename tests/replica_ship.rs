//! Shipping and reading over real servers: one stops, others go on; damage on one is answered by another.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mirrorfs::format::frame;
use mirrorfs::format::names::ObjectName;
use mirrorfs::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader};
use mirrorfs::format::tables::{BlockEntry, Time};
use mirrorfs::format::volume::{Claim, Compression, Volume};
use mirrorfs::ids::{BlockHash, BlockId, Epoch, Lsn, ReplicaName, SegmentNo, VolumeId};
use mirrorfs::replica::{
    Backlog, CursorStore, Fence, FrameSource, Identity, Outbox, Reader, Replica, ReplicaState, Roster,
    Shipper, Staged, StagedKind, Store, Tuning, status, volume,
};
use support::azurite::Azurite;
use support::gcs::GcsDouble;
use support::s3::S3Server;
use tokio::sync::watch;

struct StagedFiles {
    dir: tempfile::TempDir,
    segments: Mutex<BTreeMap<SegmentNo, Staged>>,
    newest: watch::Sender<SegmentNo>,
}

impl Outbox for StagedFiles {
    fn segments_after(&self, after: SegmentNo, limit: usize) -> Vec<Staged> {
        self.segments.lock().unwrap().range(after.next()..).take(limit).map(|(_, s)| s.clone()).collect()
    }

    fn backlog(&self, after: SegmentNo) -> Backlog {
        let segments = self.segments_after(after, usize::MAX);
        Backlog {
            segments: segments.len() as u64,
            bytes: segments.iter().map(|s| s.len).sum(),
            oldest_cut_at: segments.first().map_or(0.0, |s| s.cut_at),
        }
    }

    fn checkpoint(&self, _: SegmentNo, _: SegmentNo) -> Option<Staged> {
        None
    }

    fn hash(&self, _: SegmentNo) -> Option<SegmentHash> {
        None
    }

    fn watch(&self) -> watch::Receiver<SegmentNo> {
        self.newest.subscribe()
    }
}

#[derive(Default)]
struct Cursors(Mutex<BTreeMap<ReplicaName, SegmentNo>>);

impl CursorStore for Cursors {
    fn load(&self, replica: &ReplicaName) -> Result<SegmentNo, String> {
        Ok(self.0.lock().unwrap().get(replica).copied().unwrap_or_default())
    }

    fn save(&self, replica: &ReplicaName, cursor: SegmentNo) -> Result<(), String> {
        self.0.lock().unwrap().insert(replica.clone(), cursor);
        Ok(())
    }
}

/// Blocks that do not compress.
fn content(seed: u64) -> Vec<u8> {
    let mut out = vec![0; 300_000];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

struct World {
    runtime: tokio::runtime::Runtime,
    outbox: Arc<StagedFiles>,
    replicas: Vec<Arc<Replica>>,
    closing: watch::Sender<bool>,
    blocks: Vec<(Vec<u8>, BlockEntry)>,
}

impl World {
    fn new(stores: Vec<Store>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let id = VolumeId::from_random([5; 16]);
        let volume_file = Volume {
            volume: id,
            created_at: 1,
            block_size: 1 << 20,
            compression: Compression::Zstd,
            key_wrapping: None,
            created_by: "test".into(),
        };
        let claim = Claim {
            volume: id,
            epoch: Epoch(1),
            claim_id: [3; 16],
            host: "here".into(),
            pid: 1,
            claimed_at: 1,
            first_segment: SegmentNo(1),
            mirrorfs: "0".into(),
        };
        runtime.block_on(async {
            for store in &stores {
                store.prepare().await.unwrap();
                volume::require_conditions(store, 1).await.unwrap();
                volume::create(store, &volume_file).await.unwrap();
            }
            assert_eq!(volume::claim(&stores, &claim, &[]).await.unwrap().on.len(), stores.len());
        });
        let outbox = Arc::new(StagedFiles {
            dir: tempfile::tempdir().unwrap(),
            segments: Mutex::default(),
            newest: watch::channel(SegmentNo(0)).0,
        });
        let replicas: Vec<_> = stores.into_iter().map(|s| Arc::new(Replica::new(s))).collect();
        let closing = watch::channel(false).0;
        let cursors = Arc::new(Cursors::default());
        let identity = Arc::new(Identity { volume: volume_file, claims: vec![claim] });
        for replica in &replicas {
            let shipper = Shipper {
                replica: Arc::clone(replica),
                peers: Roster::new(replicas.clone()),
                outbox: outbox.clone(),
                cursors: cursors.clone(),
                identity: Arc::clone(&identity),
                fence: Fence::new(|by| panic!("fenced by {by:?}")),
                closing: closing.subscribe(),
                tuning: Tuning::default(),
            };
            runtime.spawn(shipper.run());
        }
        Self { runtime, outbox, replicas, closing, blocks: Vec::new() }
    }

    /// Seals a segment of four blocks.
    fn seal(&mut self) -> SegmentNo {
        let number = self.outbox.newest.borrow().next();
        let mut builder = SegmentBuilder::new(SegmentHeader {
            volume: VolumeId::from_random([5; 16]),
            number,
            epoch: Epoch(1),
            cut_at: Time { secs: 1_790_000_000, nanos: 0 },
            txg_first: number,
            previous: SegmentHash::default(),
        });
        for i in 0..4 {
            let raw = content(number.0 * 10 + i);
            let loc = builder.push_frame(&frame::encode(&raw, 3).unwrap().bytes).unwrap();
            let entry = BlockEntry { hash: BlockHash::of(&raw), loc };
            builder.push_index(BlockId(number.0 * 10 + i), entry).unwrap();
            self.blocks.push((raw, entry));
        }
        let (bytes, _) = builder.finish(Some(Lsn(number.0))).unwrap();
        let path = self.outbox.dir.path().join(number.hex());
        std::fs::write(&path, &bytes).unwrap();
        let staged = Staged {
            kind: StagedKind::Segment,
            number,
            epoch: Epoch(1),
            path,
            len: bytes.len() as u64,
            cut_at: 1_790_000_000.0,
        };
        self.outbox.segments.lock().unwrap().insert(number, staged);
        self.outbox.newest.send_replace(number);
        number
    }

    fn wait(&self, name: &str, number: SegmentNo) {
        let replica = self.replica(name);
        let waited = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(60), replica.wait_for(number)).await
        });
        assert!(waited.is_ok(), "{:?}", status(replica, &*self.outbox));
    }

    fn replica(&self, name: &str) -> &Arc<Replica> {
        self.replicas.iter().find(|r| r.name().as_str() == name).unwrap()
    }

    fn state(&self, name: &str) -> ReplicaState {
        status(self.replica(name), &*self.outbox).state
    }

    /// Reads everything from the given replicas.
    fn read_all(&self, names: &[&str]) {
        let replicas = names.iter().map(|n| Arc::clone(self.replica(n))).collect();
        let reader =
            Reader::new(Roster::new(replicas), None, self.runtime.handle().clone(), self.closing.subscribe());
        for (raw, entry) in &self.blocks {
            assert_eq!(reader.fetch(entry, &[], &|_, _| {}).unwrap(), raw);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.closing.send_replace(true);
    }
}

fn folder(dir: &Path) -> Store {
    support::spec("folder", dir.join("replica").to_str().unwrap(), &[]).store().unwrap()
}

fn segment_file(root: &Path, number: SegmentNo) -> PathBuf {
    root.join(ObjectName::Segment(number, Epoch(1)).path())
}

#[test]
fn every_kind_of_replica_in_one_volume_and_one_of_them_stops() {
    let dir = tempfile::tempdir().unwrap();
    let (mut s3, gcs) = (S3Server::start(), GcsDouble::start());
    let azurite = Azurite::start("every_kind_of_replica_in_one_volume_and_one_of_them_stops");
    let mut stores = vec![folder(dir.path()), s3.store("p"), gcs.store("p/q")];
    stores.extend(azurite.as_ref().map(|a| a.store("")));
    let mut world = World::new(stores);
    let names: Vec<_> = world.replicas.iter().map(|r| r.name().to_string()).collect();
    let last = (0..5).map(|_| world.seal()).last().unwrap();
    for name in &names {
        world.wait(name, last);
        world.read_all(&[name]);
    }

    s3.http.stop();
    let started = Instant::now();
    let last = (0..5).map(|_| world.seal()).last().unwrap();
    for name in names.iter().filter(|n| *n != "s3") {
        world.wait(name, last);
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let deadline = Instant::now() + Duration::from_secs(20);
    while world.state("s3") != ReplicaState::Offline {
        assert!(Instant::now() < deadline, "{:?}", world.state("s3"));
        std::thread::sleep(Duration::from_millis(20));
    }
    world.read_all(&names.iter().map(String::as_str).collect::<Vec<_>>());
    s3.http.restart();
    world.wait("s3", last);
    world.read_all(&["s3"]);
}

#[test]
fn damage_in_a_folder_is_answered_by_another_replica() {
    let dir = tempfile::tempdir().unwrap();
    let s3 = S3Server::start();
    let mut world = World::new(vec![folder(dir.path()), s3.store("p")]);
    let last = (0..2).map(|_| world.seal()).last().unwrap();
    world.wait("folder", last);
    world.wait("s3", last);
    let file = segment_file(&dir.path().join("replica"), SegmentNo(1));
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100_000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    std::fs::remove_file(segment_file(&dir.path().join("replica"), SegmentNo(2))).unwrap();
    world.read_all(&["folder", "s3"]);
    let damages = world.replica("folder").damages();
    assert!(damages.iter().any(|d| d.block == Some(world.blocks[0].1.hash)), "{damages:?}");
    assert!(world.replica("s3").damages().is_empty());
}
