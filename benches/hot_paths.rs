//! Benchmarks of what runs for each block, record or lookup, without a mount: `cargo bench --bench hot_paths [FILTER]`.
//!
//! Owns the input: made here, from fixed seeds. Each group is one path of docs/architecture.md; figures are in docs/performance.md.
//! Only the cache touches a disk, and of that only what the kernel has in memory.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mirrorfs::cache::ranges::Ranges;
use mirrorfs::cache::{BlockStore, Supply};
use mirrorfs::format::codec::Decoder;
use mirrorfs::format::frame::{self, FrameEncoder};
use mirrorfs::format::names::ObjectName;
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader, verify_whole};
use mirrorfs::format::tables::{
    BlockEntry, Body, Dirent, Extents, FileKind, FrameLoc, Inode, Time, block_key, dirent_key, extent_key,
    inode_key,
};
use mirrorfs::format::volume::Claim;
use mirrorfs::ids::{BlockHash, BlockId, Epoch, Ino, Lsn, SegmentNo, VolumeId};
use mirrorfs::journal::{Journal, Options};
use mirrorfs::reconcile::plan::Expected;
use mirrorfs::replica::read_plan::Span;
use mirrorfs::replica::ship_plan::ShipPlan;
use mirrorfs::replica::{Staged, StagedKind};
use mirrorfs::restore::{Sink, Tables};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const MIB: usize = 1 << 20;
/// zstd's level for frames, as the daemon has it.
const LEVEL: i32 = 1;

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(5)
}

fn random_bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng().fill_bytes(&mut bytes);
    bytes
}

/// Lines of a log, which zstd makes about a sixth of.
fn text(len: usize) -> Vec<u8> {
    let mut rng = rng();
    let mut text = String::with_capacity(len + 200);
    while text.len() < len {
        let (user, page, took) =
            (rng.random_range(0..5000), rng.random_range(0..300), rng.random_range(1..9999));
        text.push_str(&format!("2026-11-21 GET /articles/{page}/comments user={user} 200 took {took} us\n"));
    }
    text.truncate(len);
    text.into_bytes()
}

fn header() -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_random([7; 16]),
        number: SegmentNo(1),
        epoch: Epoch(1),
        cut_at: Time { secs: 1_795_000_000, nanos: 0 },
        txg_first: SegmentNo(1),
        previous: SegmentHash::default(),
    }
}

// ---- seal -------------------------------------------------------------------------------------------------------------

/// What the sealer does with each block: hash, compress, append.
fn pack(encoder: &mut FrameEncoder, blocks: &[Vec<u8>]) -> Bytes {
    let mut segment = SegmentBuilder::new(header());
    for (i, raw) in blocks.iter().enumerate() {
        let hash = BlockHash::of(raw);
        let frame = encoder.encode(raw).unwrap();
        let loc = segment.push_frame(&frame.bytes).unwrap();
        segment.push_index(BlockId(i as u64 + 1), BlockEntry { hash, loc }).unwrap();
    }
    segment.finish(Some(Lsn(1))).unwrap().0
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    let (random, text) = (random_bytes(MIB), text(MIB));
    group.throughput(Throughput::Bytes(MIB as u64));
    group.bench_function("hash 1 MiB", |b| b.iter(|| BlockHash::of(black_box(&random))));
    let mut encoder = FrameEncoder::new(LEVEL).unwrap();
    for (name, raw) in [("random", &random), ("text", &text)] {
        group.bench_function(format!("compress 1 MiB of {name}"), |b| {
            b.iter(|| encoder.encode(black_box(raw)).unwrap());
        });
        let (stored, hash) = (encoder.encode(raw).unwrap(), BlockHash::of(raw));
        group.bench_function(format!("decode 1 MiB of {name}"), |b| {
            b.iter(|| frame::decode(black_box(&stored.bytes), &hash).unwrap());
        });
    }
    group.throughput(Throughput::Bytes(16 * MIB as u64));
    for (name, raw) in [("random", random_bytes(16 * MIB)), ("text", self::text(16 * MIB))] {
        let blocks: Vec<Vec<u8>> = raw.chunks(MIB).map(<[u8]>::to_vec).collect();
        group.bench_function(format!("segment of 16 MiB of {name}"), |b| {
            b.iter(|| pack(&mut encoder, &blocks))
        });
        let small: Vec<Vec<u8>> = raw.chunks(16 << 10).map(<[u8]>::to_vec).collect();
        group.bench_function(format!("segment of 1,024 blocks of 16 KiB of {name}"), |b| {
            b.iter(|| pack(&mut encoder, &small));
        });
    }
    group.finish();
}

// ---- records ----------------------------------------------------------------------------------------------------------

fn inode(ino: u64, body: Body) -> Inode {
    let at = Time { secs: 1_795_000_000 + ino as i64, nanos: 1 };
    Inode { size: 4096, blocks: 8, body, ..Inode::new(FileKind::Regular, 0o644, (1000, 1000), at) }
}

/// What creating a file leaves: its name, its inode, its directory's inode.
fn creation(n: u64, body: Body) -> Record {
    let (dir, ino) = (Ino(2 + n / 1000), Ino(10_000 + n));
    let name = format!("file-{n:07}.txt");
    let mut parent = inode(dir.0, Body::Blocks);
    parent.kind = FileKind::Directory;
    let dirent = Dirent { ino, kind: FileKind::Regular };
    let ops = vec![
        Op::put(dirent_key(dir, name.as_bytes()), dirent.encode()),
        Op::put(inode_key(ino), inode(ino.0, body).encode()),
        Op::put(inode_key(dir), parent.encode()),
    ];
    Record { lsn: Lsn(n + 1), ops }
}

fn records(c: &mut Criterion) {
    const COUNT: u64 = 10_000;
    let mut group = c.benchmark_group("records");
    group.throughput(Throughput::Elements(COUNT));
    let records: Vec<Record> = (0..COUNT).map(|n| creation(n, Body::Blocks)).collect();
    let mut bytes = Vec::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            bytes.clear();
            records.iter().for_each(|r| r.encode(&mut bytes));
            bytes.len()
        });
    });
    let decode = |bytes: &[u8]| -> Vec<Record> {
        let mut d = Decoder::new("record", bytes);
        (0..COUNT).map(|_| Record::decode(&mut d).unwrap()).collect()
    };
    group.bench_function("decode", |b| b.iter(|| decode(black_box(&bytes))));
    let ops = || -> Vec<Op> { records.iter().flat_map(|r| r.ops.clone()).collect() };
    group.bench_function("replay into tables", |b| {
        b.iter_batched(
            ops,
            |ops| {
                let mut tables = Tables::default();
                tables.apply(ops).unwrap();
                tables
            },
            BatchSize::LargeInput,
        );
    });
    let page = Bytes::from(random_bytes(4096));
    let inline: Vec<Record> = (0..COUNT).map(|n| creation(n, Body::Inline(page.clone()))).collect();
    group.bench_function("encode with 4 KiB of content", |b| {
        b.iter(|| {
            bytes.clear();
            inline.iter().for_each(|r| r.encode(&mut bytes));
            bytes.len()
        });
    });
    let segment = |records: &[Record]| {
        let mut segment = SegmentBuilder::new(header());
        records.iter().for_each(|r| segment.push(r).unwrap());
        segment.finish(Some(Lsn(COUNT))).unwrap().0
    };
    group.bench_function("into a segment", |b| b.iter(|| segment(&records)));
    let object = segment(&records);
    group.bench_function("out of a segment", |b| b.iter(|| verify_whole(black_box(&object)).unwrap()));
    group.bench_function("inode: encode and decode", |b| {
        let inode = inode(7, Body::Blocks);
        b.iter(|| (0..COUNT).filter(|_| Inode::decode(&black_box(&inode).encode()).is_ok()).count());
    });
    group.finish();
}

// ---- extents ----------------------------------------------------------------------------------------------------------

fn extents(c: &mut Criterion) {
    let mut group = c.benchmark_group("extents");
    let mut full = Extents::default();
    full.0.iter_mut().enumerate().for_each(|(i, id)| *id = BlockId(i as u64 + 1));
    let value = full.encode();
    group.bench_function("find a block in a chunk", |b| {
        b.iter(|| Extents::decode(black_box(&value)).unwrap().0[black_box(17)]);
    });
    group.bench_function("replace a block in a chunk", |b| {
        b.iter(|| {
            let mut extents = Extents::decode(black_box(&value)).unwrap();
            extents.0[black_box(17)] = BlockId(4711);
            extents.encode()
        });
    });
    // A file of 64 GiB among others.
    let mut tables = Tables::default();
    let puts = (1..=8).flat_map(|ino| (0..1024).map(move |chunk| (Ino(ino), chunk)));
    tables.apply(puts.map(|(ino, chunk)| Op::put(extent_key(ino, chunk), full.encode())).collect()).unwrap();
    group.bench_function("all 65,536 blocks of a file", |b| b.iter(|| tables.blocks(Ino(5)).unwrap()));

    // Which bytes of a 1 MiB block are valid, written in random pages.
    let mut rng = rng();
    let pages: Vec<u32> = (0..128).map(|_| rng.random_range(0..256) * 4096).collect();
    let scattered = || {
        let mut ranges = Ranges::default();
        pages.iter().for_each(|at| ranges.insert(*at, at + 4096));
        ranges
    };
    group.bench_function("note 128 random pages of a block", |b| b.iter(scattered));
    let ranges = scattered();
    group.bench_function("read plan of a block with 128 random pages", |b| {
        b.iter(|| ranges.pieces(0, black_box(MIB as u32)).filter(|p| p.2).count());
    });
    group.finish();
}

// ---- cache ------------------------------------------------------------------------------------------------------------

fn cache(c: &mut Criterion) {
    const BLOCKS: u64 = 1_024;
    const SIZE: u32 = 64 << 10;
    let mut group = c.benchmark_group("cache");
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(Options::new(dir.path(), Arc::new(|_| Ok(())))).unwrap();
    let store = BlockStore::open(&dir.path().join("slots"), SIZE, 1 << 30, Arc::clone(&journal)).unwrap();
    let entry = |n: u64, hash| BlockEntry {
        hash,
        loc: FrameLoc {
            segment: SegmentNo(1 + n / 256),
            epoch: Epoch(1),
            offset: 128 + n % 256 * u64::from(SIZE),
            stored_len: SIZE,
            raw_len: SIZE,
            codec: 0,
        },
    };
    let mut raw = random_bytes(SIZE as usize);
    let entries: Vec<BlockEntry> = (0..BLOCKS)
        .map(|n| {
            raw[..8].copy_from_slice(&n.to_le_bytes());
            let entry = entry(n, BlockHash::of(&raw));
            store.insert_clean(&entry, &raw).unwrap();
            entry
        })
        .collect();
    // Numbers far above those that the store gives itself.
    let id = |n: usize| BlockId(1_000_000 + n as u64);
    journal
        .transact::<_, mirrorfs::journal::JournalError>(|tx| {
            entries.iter().enumerate().for_each(|(n, e)| tx.put(block_key(id(n)), e.encode()));
            Ok(())
        })
        .unwrap();
    let dirty = store.create(None, 0).unwrap();
    store.write(&dirty, 0, &raw).unwrap();
    let none = Supply::new();
    let mut rng = rng();
    let mut page = [0; 4096];
    let mut any = || rng.random_range(0..BLOCKS as usize);
    let strange = BlockHash::of(b"nobody's");
    group.bench_function("look up, there", |b| b.iter(|| assert!(store.is_cached(&entries[any()].hash))));
    group.bench_function("look up, not there", |b| b.iter(|| assert!(!store.is_cached(black_box(&strange)))));
    group.bench_function("read 4 KiB of a clean block", |b| {
        b.iter(|| store.read_sealed(&entries[any()], 8192, &mut page, &none).unwrap());
    });
    group.bench_function("read 4 KiB of a clean block, by number", |b| {
        b.iter(|| store.read(id(any()), 8192, &mut page, &none).unwrap());
    });
    group.bench_function("read 4 KiB of a dirty block", |b| {
        b.iter(|| store.read(dirty.id, 8192, &mut page, &none).unwrap());
    });
    group.bench_function("write 4 KiB of a dirty block", |b| {
        b.iter(|| store.write(&dirty, 8192, black_box(&raw[..4096])).unwrap());
    });
    group.finish();
    journal.close().unwrap();
}

// ---- plans ------------------------------------------------------------------------------------------------------------

fn plans(c: &mut Criterion) {
    const SEGMENTS: u64 = 10_000;
    let mut group = c.benchmark_group("plans");
    let claim = Claim {
        volume: VolumeId::from_random([7; 16]),
        epoch: Epoch(1),
        claim_id: [0; 16],
        host: "host".into(),
        pid: 1,
        claimed_at: 1_795_000_000,
        first_segment: SegmentNo(1),
        mirrorfs: "bench".into(),
    };
    let numbers = (1..=SEGMENTS).map(SegmentNo);
    let expected = Expected {
        cursor: SegmentNo(SEGMENTS),
        segments: numbers.clone().map(|n| (n, (Epoch(1), 16 << 20))).collect(),
        claims: vec![claim],
        ..Expected::default()
    };
    let mut found: BTreeMap<String, u64> =
        numbers.map(|n| (ObjectName::Segment(n, Epoch(1)).path(), 16 << 20)).collect();
    found.insert(ObjectName::Volume.path(), 500);
    found.insert(ObjectName::Claim(Epoch(1)).path(), 500);
    group.bench_function("reconcile: 10,000 segments, all there", |b| {
        b.iter(|| {
            let plan = expected.compare(black_box(&found));
            assert!(plan.wrong.is_empty());
            plan
        });
    });
    let mut holes = found.clone();
    let mut n = 0;
    holes.retain(|_, _| {
        n += 1;
        n % 10 != 0
    });
    group.bench_function("reconcile: 10,000 segments, a tenth missing", |b| {
        b.iter(|| expected.compare(black_box(&holes)));
    });

    let staged: Vec<Staged> = (1..=1000)
        .map(|n| Staged {
            kind: StagedKind::Segment,
            number: SegmentNo(n),
            epoch: Epoch(1),
            path: "segment".into(),
            len: 16 << 20,
            cut_at: 0.0,
        })
        .collect();
    group.bench_function("ship: 1,000 segments, 8 in flight, answered out of order", |b| {
        b.iter(|| {
            let mut plan = ShipPlan::new(SegmentNo(0), 8, 1 << 30);
            let mut flying: Vec<SegmentNo> = Vec::new();
            while plan.cursor() < SegmentNo(1000) {
                let from = plan.cursor().0 as usize;
                let upto = (from + plan.span()).min(staged.len());
                flying.extend(plan.next(&staged[from..upto]).iter().map(|s| s.number));
                if let Some(number) = flying.pop() {
                    plan.verified(number);
                }
            }
        });
    });

    let near: Vec<BlockEntry> = (0..256u64)
        .map(|n| BlockEntry {
            hash: BlockHash::of(&n.to_le_bytes()),
            loc: FrameLoc {
                segment: SegmentNo(1),
                epoch: Epoch(1),
                offset: 128 + n * 65_556,
                stored_len: 65_556,
                raw_len: 65_536,
                codec: 0,
            },
        })
        .collect();
    group.bench_function("read: one range around 256 neighbours", |b| {
        b.iter(|| Span::around(black_box(&near[100]), &near));
    });
    group.finish();
}

criterion_group! {
    name = hot_paths;
    // Enough to see a change of some percent; the whole takes about a minute.
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = seal, records, extents, cache, plans
}
criterion_main!(hot_paths);
