//! The fuzzer's corpus, and mutations of it, through the same entries as `tests/fuzz`: a short run
//! without the fuzzer.
//!
//! `MIRRORFS_FUZZ_CORPUS=write` writes the inputs that this file makes into the corpus. Others lie
//! there because the fuzzer found something with them, or to cover more.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::fs;
use std::path::PathBuf;

use mirrorfs::format::codec::{put_blob, put_varint};
use mirrorfs::format::frame;
use mirrorfs::format::local::{FrameValue, SealedMark, SegmentValue};
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::tables::{
    BlockEntry, Body, Dirent, Extents, FileKind, FrameLoc, Inode, Time, dirent_key, inode_key, orphan_key,
};
use mirrorfs::fuzz::TARGETS;
use mirrorfs::ids::{BlockHash, BlockId, Epoch, Ino, Lsn, SegmentNo};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mutations of each target.
const MUTATIONS: usize = 400;
/// Bytes of the corpus.
const MOST: u64 = 1 << 20;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

fn golden(name: &str) -> Vec<u8> {
    fs::read(folder("golden").join(name)).unwrap()
}

fn inode(kind: FileKind, body: Body) -> Vec<u8> {
    let now = Time { secs: 1_790_000_000, nanos: 7 };
    Inode { body, ..Inode::new(kind, 0o755, (0, 0), now) }.encode().to_vec()
}

fn records() -> Vec<u8> {
    let mut out = Vec::new();
    for lsn in 1..4 {
        let file = Dirent { ino: Ino(lsn), kind: FileKind::Regular };
        let ops = vec![
            Op::put(dirent_key(Ino(1), b"name"), file.encode()),
            Op::put(inode_key(Ino(lsn)), inode(FileKind::Regular, Body::Blocks)),
            Op::delete(orphan_key(Ino(lsn))),
        ];
        Record { lsn: Lsn(lsn), ops }.encode(&mut out);
    }
    out
}

/// A file of the tail: its header, a group of records, a confirmation.
fn tail() -> Vec<u8> {
    let mut out = b"MFSTAIL1".to_vec();
    for n in [9u64, 1, 8192] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    out.resize(4096, 0);
    for (kind, payload, first, last) in [(b"MFg1", records(), 1u64, 3u64), (b"MFc1", Vec::new(), 3, 3)] {
        out.extend_from_slice(kind);
        out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&first.to_le_bytes());
        out.extend_from_slice(&last.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&payload);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    mirrorfs::journal::fuzz::reseal_tail(&mut out);
    out
}

fn entry() -> BlockEntry {
    let loc = FrameLoc {
        segment: SegmentNo(3),
        epoch: Epoch(1),
        offset: 128,
        stored_len: 220,
        raw_len: 200,
        codec: 0,
    };
    BlockEntry { hash: BlockHash([7; 32]), loc }
}

/// Inputs that lead far into the decoders, and some that attack them.
fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut all: Vec<(&'static str, String, Vec<u8>)> = Vec::new();
    let mut add = |target, name: &str, bytes: Vec<u8>| all.push((target, name.to_owned(), bytes));
    for (target, name) in [
        ("segment", "v1-segment-commit.seg"),
        ("segment", "v1-segment-frames.seg"),
        ("part", "v1-checkpoint-part-raw"),
        ("part", "v1-checkpoint-part-zstd"),
        ("manifest", "v1-checkpoint-manifest"),
        ("claim", "v1-claim.json"),
        ("release", "v1-released.json"),
        ("volume", "v1-volume.json"),
    ] {
        add(target, name, golden(name));
    }
    for (name, raw) in [("raw", (0..200).collect::<Vec<u8>>()), ("zstd", vec![b'a'; 3000])] {
        let stored = frame::encode(&raw, 3).unwrap().bytes;
        add("frame", name, [&BlockHash::of(&raw).0[..], &stored].concat());
    }
    add("record", "records", records());
    // Many operations, said and done.
    let mut count = vec![1];
    put_varint(&mut count, u64::MAX);
    add("record", "count", count);
    let mut empty = vec![1];
    put_varint(&mut empty, 1000);
    empty.extend_from_slice(&[0; 2000]);
    add("record", "empty-keys", empty);
    let mut long = vec![1, 1, 1];
    put_blob(&mut long, &[2; 5000]);
    add("record", "long-key", long);
    for (name, kind, body) in [
        ("file", FileKind::Regular, Body::Inline("content".into())),
        ("link", FileKind::Symlink, Body::Target("../x".into())),
        ("directory", FileKind::Directory, Body::Blocks),
    ] {
        add("values", name, inode(kind, body));
    }
    let mut extents = Extents::default();
    (extents.0[0], extents.0[63]) = (BlockId(1), BlockId(u64::MAX));
    add("values", "extents", extents.encode().to_vec());
    add("values", "name", Dirent { ino: Ino(2), kind: FileKind::Fifo }.encode().to_vec());
    add("values", "block", entry().encode().to_vec());
    add("values", "frame", FrameValue { entry: entry(), uses: 2 }.encode().to_vec());
    let segment =
        SegmentValue { epoch: Epoch(1), len: 9, blake3: [1; 32], commit: Lsn(4), cut_at: 1.5, live: 7 };
    add("values", "segment", segment.encode().to_vec());
    add("values", "mark", SealedMark { lsn: Lsn(5), ..SealedMark::default() }.encode().to_vec());
    add("values", "key", dirent_key(Ino(1), b"name").to_vec());
    add("tail", "groups", tail());
    let mut huge = tail();
    huge[4100..4104].copy_from_slice(&u32::MAX.to_le_bytes());
    add("tail", "huge-group", huge);
    let mut witness = b"MFSWIT01".to_vec();
    for n in [7u64, 3, 100, 1, 2, 110, 3, 4, 5, 110] {
        witness.extend_from_slice(&n.to_le_bytes());
    }
    witness.resize(96, 0);
    add("witness", "open", witness);
    for (n, path) in [
        "volume.json",
        "epochs/00000007.json",
        "epochs/00000007.released.json",
        "segments/00000123/0000000000123456-00000007.seg",
        "checkpoints/0000000000123456-00000007/part-00042",
        "checkpoints/ffffffffffffffff-ffffffff/manifest",
        "segments/000fffff/ffffffffffffffff-ffffffff.seg",
    ]
    .into_iter()
    .enumerate()
    {
        add("names", &format!("path-{n}"), path.into());
    }
    let config = "fsync = \"quorum\"\ncache_size = \"10 GiB\"\n[replica.home]\nurl = \"/srv/mirror\"\n[replica.cloud]\n\
                  url = \"s3://bucket/path\"\nregion = \"eu\"\n[mount]\nallow_other = true\n";
    add("config", "usual", config.into());
    add("config", "nested", "a = [[[[[[[[".repeat(500).into_bytes());
    all
}

/// The inputs in the corpus, by target.
fn committed(target: &str) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder("fuzz/corpus").join(target)) else { return Vec::new() };
    let mut all: Vec<_> = entries
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(p).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn the_corpus_is_whole_and_small() {
    let write = std::env::var("MIRRORFS_FUZZ_CORPUS").as_deref() == Ok("write");
    for (target, name, bytes) in seeds() {
        let path = folder("fuzz/corpus").join(target).join(&name);
        if write {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        assert!(path.exists(), "{} is missing: MIRRORFS_FUZZ_CORPUS=write writes it", path.display());
    }
    let mut total = 0;
    for (target, _) in TARGETS {
        let inputs = committed(target);
        assert!(!inputs.is_empty(), "no corpus for {target}");
        total += inputs.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        let source = folder("fuzz/fuzz_targets").join(format!("{target}.rs"));
        assert!(source.exists(), "the fuzzer has no target {target}");
    }
    assert!(total < MOST, "{total} bytes");
}

#[test]
fn every_input_is_read_without_a_panic() {
    for (target, run) in TARGETS {
        for (name, bytes) in committed(target) {
            println!("{target}/{name}");
            run(&bytes);
        }
        run(&[]);
    }
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..5) {
        let at = rng.random_range(0..=bytes.len());
        let len = rng.random_range(0..=(bytes.len() - at).min(64));
        match rng.random_range(0..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = rng.random(),
            2 => bytes[at..at + len].fill(if rng.random() { 0xff } else { 0 }),
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..at + len)),
            5 => {
                let piece = bytes[at..at + len].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let from = rng.random_range(0..=other.len());
                let piece = other[from..(from + len).min(other.len())].to_vec();
                bytes.splice(at..at + piece.len().min(len), piece);
            }
        }
    }
}

#[test]
fn mutations_are_read_without_a_panic() {
    let seed = std::env::var("MIRRORFS_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    println!("seed {seed}");
    for (target, run) in TARGETS {
        let inputs: Vec<_> = committed(target).into_iter().map(|(_, bytes)| bytes).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for n in 0..MUTATIONS {
            let mut bytes = inputs[n % inputs.len()].clone();
            let other = &inputs[rng.random_range(0..inputs.len())];
            mutate(&mut bytes, other, &mut rng);
            let caught = std::panic::catch_unwind(|| run(&bytes));
            assert!(caught.is_ok(), "{target}: seed {seed}, mutation {n}: {}", bytes.escape_ascii());
        }
    }
}
