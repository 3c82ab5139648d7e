//! A small writer of volumes onto stores in memory, with a model of what each commit holds, and means to spoil them.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Sink, Tables};
use crate::checkpoint;
use crate::format::checkpoint::ManifestHash;
use crate::format::frame;
use crate::format::names::ObjectName;
use crate::format::record::{Op, Record};
use crate::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader};
use crate::format::tables::{
    BlockEntry, FileKind, Inode, Time, block_key, checkpoint_key, inode_key, is_replicated, table, volume_key,
};
use crate::format::volume::{Claim, Volume, testing};
use crate::ids::{BlockHash, BlockId, Epoch, Ino, Lsn, SegmentNo};
use crate::replica::Store;
use crate::replica::fault::Faults;

/// A writer and its replicas.
#[derive(Clone)]
pub(super) struct World {
    pub stores: Vec<Store>,
    pub faults: Vec<Faults>,
    pub volume: Volume,
    pub epoch: Epoch,
    /// The last segment written.
    pub number: SegmentNo,
    pub hash: SegmentHash,
    pub lsn: Lsn,
    pub next_block: u64,
    /// All that was said so far.
    pub live: BTreeMap<Bytes, Bytes>,
    /// The state at each commit, by the number of its segment.
    pub commits: BTreeMap<SegmentNo, (Lsn, Tables)>,
    hashes: BTreeMap<SegmentNo, SegmentHash>,
    records: Vec<Record>,
    blocks: Vec<(BlockId, Vec<u8>)>,
}

/// Tables out of a map.
pub(super) fn tables(map: &BTreeMap<Bytes, Bytes>) -> Tables {
    let mut tables = Tables::default();
    let ops = map.iter().filter(|(k, _)| is_replicated(k)).map(|(k, v)| Op::put(k.clone(), v.clone()));
    tables.apply(ops.collect()).unwrap();
    tables
}

impl World {
    pub async fn new(replicas: usize) -> Self {
        let names = ["alpha", "beta", "gamma", "delta"];
        let faults: Vec<_> = (0..replicas).map(|i| Faults::new(i as u64)).collect();
        let stores = names[..replicas].iter().zip(&faults).map(|(name, faults)| {
            Store::in_memory(name.parse().unwrap())
                .wrapped(|backend| faults.wrap(backend))
                .with_patience(std::time::Duration::from_millis(100))
        });
        let mut world = Self {
            stores: stores.collect(),
            faults,
            volume: Volume { block_size: 64 << 10, ..testing::volume(9) },
            epoch: Epoch(1),
            number: SegmentNo(0),
            hash: SegmentHash::default(),
            lsn: Lsn(0),
            next_block: 1,
            live: BTreeMap::new(),
            commits: BTreeMap::new(),
            hashes: BTreeMap::new(),
            records: Vec::new(),
            blocks: Vec::new(),
        };
        world.put_all("volume.json", world.volume.encode().unwrap()).await;
        world.claim(Epoch(1)).await;
        world
    }

    pub async fn put_all(&self, path: &str, bytes: Vec<u8>) {
        let bytes = Bytes::from(bytes);
        for store in &self.stores {
            store.put(path, bytes.clone()).await.unwrap();
        }
    }

    pub fn claim_bytes(&self, epoch: Epoch, id: u8) -> Vec<u8> {
        let claim = Claim { volume: self.volume.volume, ..testing::claim(epoch.0, id, self.number.next().0) };
        claim.encode().unwrap()
    }

    /// Begins a tenure after the last segment of this writer.
    pub async fn claim(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        let bytes = self.claim_bytes(epoch, epoch.0 as u8);
        self.put_all(&ObjectName::Claim(epoch).path(), bytes).await;
    }

    pub fn record(&mut self, ops: Vec<Op>) {
        self.lsn = self.lsn.next();
        for op in &ops {
            match op.clone() {
                Op::Put { key, value } => self.live.insert(key, value),
                Op::Delete { key } => self.live.remove(&key),
            };
        }
        self.records.push(Record { lsn: self.lsn, ops });
    }

    pub fn block(&mut self, raw: Vec<u8>) -> BlockId {
        let id = BlockId(self.next_block);
        self.next_block += 1;
        self.blocks.push((id, raw));
        id
    }

    /// Some changes without meaning for a tree.
    pub fn noise(&mut self, n: u64) {
        if !self.live.contains_key(&inode_key(Ino::ROOT)) {
            let root = Inode::new(FileKind::Directory, 0o755, (0, 0), Time::default());
            let next = |name| Op::put(volume_key(name), (1u64 << 40).to_le_bytes().to_vec());
            self.record(vec![
                Op::put(inode_key(Ino::ROOT), Inode { parent: Ino::ROOT, ..root }.encode()),
                next("next_ino"),
                next("next_block"),
            ]);
        }
        for _ in 0..n {
            let id = self.block(format!("block {}", self.next_block).into_bytes());
            let at = self.lsn.0;
            let key = |i: u64| [&[table::XATTR][..], &(i % 7).to_be_bytes(), b"name"].concat();
            self.record(vec![
                Op::put(key(at), [&at.to_be_bytes()[..], &id.0.to_be_bytes()].concat()),
                Op::delete(key(at + 3)),
            ]);
        }
    }

    /// Writes what is pending as a group of `segments` segments; the last one commits unless told otherwise.
    pub async fn cut(&mut self, segments: usize, commit: bool) {
        let first = self.number.next();
        let mut records = std::mem::take(&mut self.records);
        let mut blocks = std::mem::take(&mut self.blocks);
        for n in (1..=segments).rev() {
            let header = SegmentHeader {
                volume: self.volume.volume,
                number: self.number.next(),
                epoch: self.epoch,
                cut_at: Time { secs: 3, nanos: 4 },
                txg_first: first,
                previous: self.hash,
            };
            let mut b = SegmentBuilder::new(header);
            for (id, raw) in blocks.drain(..blocks.len().div_ceil(n)) {
                let frame = frame::encode(&raw, 1).unwrap();
                let entry =
                    BlockEntry { hash: BlockHash::of(&raw), loc: b.push_frame(&frame.bytes).unwrap() };
                b.push_index(id, entry).unwrap();
                self.live.insert(block_key(id), entry.encode());
            }
            for record in records.drain(..records.len().div_ceil(n)) {
                b.push(&record).unwrap();
            }
            let last = n == 1 && commit;
            let (bytes, summary) = b.finish(last.then_some(self.lsn)).unwrap();
            self.number = header.number;
            self.hash = summary.hash;
            self.hashes.insert(self.number, self.hash);
            self.put_all(&self.segment(self.number), bytes.to_vec()).await;
        }
        if commit {
            self.commits.insert(self.number, (self.lsn, tables(&self.live)));
        }
    }

    pub fn segment(&self, number: SegmentNo) -> String {
        ObjectName::Segment(number, self.epoch).path()
    }

    /// Takes a checkpoint of `seen`, a state of the tables that needs replay from `replay_from` to the last segment.
    pub async fn checkpoint_of(
        &self,
        seen: &BTreeMap<Bytes, Bytes>,
        begin: Lsn,
        replay_from: SegmentNo,
    ) -> ManifestHash {
        let folder = tempfile::tempdir().unwrap();
        let scan = |start: &[u8], end: &[u8], limit: usize| {
            let range = (
                std::ops::Bound::Included(Bytes::copy_from_slice(start)),
                std::ops::Bound::Excluded(Bytes::copy_from_slice(end)),
            );
            let found = seen.range(range).take(limit).map(|(k, v)| (k.clone(), v.clone()));
            Ok::<_, String>(found.collect())
        };
        let begin = checkpoint::Begin {
            volume: self.volume.volume,
            lsn: begin,
            replay_from,
            previous: self.hashes.get(&SegmentNo(replay_from.0 - 1)).copied().unwrap_or_default(),
        };
        let end = checkpoint::End {
            lsn: self.lsn,
            number: self.number,
            epoch: self.epoch,
            commit_lsn: self.lsn,
            created_at: 5,
        };
        let dump = checkpoint::dump(&scan, begin, &folder.path().join("new")).unwrap();
        let checkpoint::Finished { path, manifest, hash } = dump.finish(end, folder.path()).unwrap();
        for (object, file) in checkpoint::objects(&manifest, &path) {
            self.put_all(&object, std::fs::read(file).unwrap()).await;
        }
        hash
    }

    /// A checkpoint of the last commit: nothing to replay.
    pub async fn checkpoint(&self) -> ManifestHash {
        self.checkpoint_of(&self.live, self.lsn, self.number.next()).await
    }

    /// Names the checkpoint as of the last segment in the log, as a writer does.
    pub async fn name_checkpoint(&mut self, hash: ManifestHash) {
        let key = checkpoint_key(self.number, self.epoch);
        self.record(vec![Op::put(key, hash.0.to_vec())]);
        self.cut(1, true).await;
    }

    /// Flips a bit of an object on one replica; `at` counts from its end.
    pub async fn spoil(&self, replica: usize, path: &str, at: usize) {
        let mut bytes = self.stores[replica].get(path).await.unwrap().to_vec();
        let at = bytes.len() - at;
        bytes[at] ^= 4;
        self.stores[replica].put(path, bytes.into()).await.unwrap();
    }

    pub async fn shorten(&self, replica: usize, path: &str, by: usize) {
        let bytes = self.stores[replica].get(path).await.unwrap();
        self.stores[replica].put(path, bytes.slice(..bytes.len() - by)).await.unwrap();
    }

    pub async fn delete(&self, replica: usize, path: &str) {
        self.stores[replica].delete(path).await.unwrap();
    }
}
