//! Golden files: bytes written by the first version of each format are still read to the same values, and today's
//! encoder still writes the same bytes.
//!
//! What zstd wrote is compared by its decoded content only: another zstd version may compress otherwise. A missing file
//! is written with `MIRRORFS_GOLDEN=write`; existing ones are never overwritten.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::path::PathBuf;

use mirrorfs::format::checkpoint::{Manifest, PartBuilder, PartInfo, parse_part, verify_part};
use mirrorfs::format::frame::{self, Codec};
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::segment::{SegmentBuilder, SegmentHash, SegmentHeader, verify_whole};
use mirrorfs::format::tables::{
    BlockEntry, Body, Dirent, Extents, FileKind, FrameLoc, Inode, Time, dirent_key, extent_key, inode_key,
    volume_key, xattr_key,
};
use mirrorfs::format::volume::{Claim, Compression, Release, Volume};
use mirrorfs::ids::{BlockHash, BlockId, Epoch, Ino, Lsn, SegmentNo, VolumeId};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The golden bytes of `name`; `today` is written there when it is missing and that was asked for.
fn golden(name: &str, today: &[u8]) -> Vec<u8> {
    match std::fs::read(path(name)) {
        Ok(bytes) => bytes,
        Err(_) if std::env::var("MIRRORFS_GOLDEN").as_deref() == Ok("write") => {
            std::fs::write(path(name), today).unwrap();
            today.to_vec()
        }
        Err(e) => panic!("{name}: {e}; MIRRORFS_GOLDEN=write writes it"),
    }
}

fn volume_id() -> VolumeId {
    "6f1c1f3e-52a9-4b0e-9d3a-7f0a3d1c2b4e".parse::<uuid::Uuid>().map(VolumeId).unwrap()
}

#[test]
fn small_json_objects() {
    let volume = Volume {
        volume: volume_id(),
        created_at: 1_790_000_000,
        block_size: 1 << 20,
        compression: Compression::Zstd,
        key_wrapping: None,
        created_by: "mirrorfs 0.1.0".into(),
    };
    let today = volume.encode().unwrap();
    let old = golden("v1-volume.json", &today);
    assert_eq!(Volume::decode(&old), Ok(volume));
    assert_eq!(old, today);

    let claim = Claim {
        volume: volume_id(),
        epoch: Epoch(3),
        claim_id: *b"0123456789abcdef",
        host: "alpha".into(),
        pid: 4711,
        claimed_at: 1_790_000_100,
        first_segment: SegmentNo(41),
        mirrorfs: "0.1.0".into(),
    };
    let today = claim.encode().unwrap();
    let old = golden("v1-claim.json", &today);
    assert_eq!(Claim::decode(&old, Epoch(3)), Ok(claim.clone()));
    assert_eq!(old, today);

    let release = Release {
        volume: volume_id(),
        epoch: Epoch(3),
        claim_id: claim.claim_id,
        released_at: 1_790_000_200,
        last_segment: SegmentNo(77),
    };
    let today = release.encode().unwrap();
    let old = golden("v1-released.json", &today);
    assert_eq!(Release::decode(&old, Epoch(3)), Ok(release));
    assert_eq!(old, today);
}

fn inode(kind: FileKind, size: u64, body: Body) -> Inode {
    Inode {
        kind,
        perm: 0o640,
        uid: 1000,
        gid: 100,
        nlink: 1,
        rdev: 0,
        size,
        blocks: size.div_ceil(512),
        atime: Time { secs: 1_790_000_000, nanos: 1 },
        mtime: Time { secs: -1, nanos: 999_999_999 },
        ctime: Time { secs: 1_790_000_000, nanos: 3 },
        btime: Time { secs: 1_790_000_000, nanos: 4 },
        generation: 1,
        flags: 0,
        parent: Ino(0),
        body,
    }
}

fn records() -> Vec<Record> {
    let mut extents = Extents::default();
    extents.0[0] = BlockId(11);
    extents.0[63] = BlockId(12);
    let file = Dirent { ino: Ino(2), kind: FileKind::Regular };
    vec![
        Record {
            lsn: Lsn(300),
            ops: vec![
                Op::put(inode_key(Ino(2)), inode(FileKind::Regular, 70_000, Body::Blocks).encode()),
                Op::put(dirent_key(Ino(1), b"file"), file.encode()),
            ],
        },
        Record {
            lsn: Lsn(302),
            ops: vec![
                Op::put(extent_key(Ino(2), 0), extents.encode()),
                Op::delete(xattr_key(Ino(2), b"user.x")),
            ],
        },
        Record {
            lsn: Lsn(310),
            ops: (3..20).map(|i| Op::put(xattr_key(Ino(i), b"user.colour"), &b"blue"[..])).collect(),
        },
    ]
}

fn raw_block() -> Vec<u8> {
    (0..200u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn text_block() -> Vec<u8> {
    (0..70_000).map(|i| b"mirrored thrice "[i % 16]).collect()
}

fn header(number: u64, first: u64) -> SegmentHeader {
    SegmentHeader {
        volume: volume_id(),
        number: SegmentNo(number),
        epoch: Epoch(3),
        cut_at: Time { secs: 1_790_000_123, nanos: 456_000_000 },
        txg_first: SegmentNo(first),
        previous: SegmentHash(*b"the hash of the segment before!!"),
    }
}

/// The first segment of a group: a raw frame, a zstd frame (its bytes given), and a block whose frame is older.
fn first_segment(zstd_frame: &[u8]) -> (Vec<u8>, Vec<(BlockId, BlockEntry)>) {
    let mut b = SegmentBuilder::new(header(41, 41));
    let raw = frame::encode(&raw_block(), 3).unwrap();
    assert_eq!(raw.header.codec, Codec::Raw);
    let old = FrameLoc {
        segment: SegmentNo(7),
        epoch: Epoch(1),
        offset: 4096,
        stored_len: 520,
        raw_len: 500,
        codec: 0,
    };
    let index = vec![
        (
            BlockId(11),
            BlockEntry { hash: BlockHash::of(&raw_block()), loc: b.push_frame(&raw.bytes).unwrap() },
        ),
        (
            BlockId(12),
            BlockEntry { hash: BlockHash::of(&text_block()), loc: b.push_frame(zstd_frame).unwrap() },
        ),
        (BlockId(13), BlockEntry { hash: BlockHash([0x77; 32]), loc: old }),
    ];
    for (id, entry) in &index {
        b.push_index(*id, *entry).unwrap();
    }
    let small = Record { lsn: Lsn(299), ops: vec![Op::put(volume_key("label"), &b"photos"[..])] };
    b.push(&small).unwrap();
    (b.finish(None).unwrap().0.to_vec(), index)
}

#[test]
fn segment_with_frames() {
    let compressed = frame::encode(&text_block(), 3).unwrap();
    assert_eq!(compressed.header.codec, Codec::Zstd);
    let (today, _) = first_segment(&compressed.bytes);
    let old = golden("v1-segment-frames.seg", &today);
    let meta = verify_whole(&old).unwrap();
    assert_eq!(meta.footer.header, header(41, 41));
    assert_eq!(meta.footer.commit, None);
    let stored = |i: usize| {
        let loc = &meta.index[i].1.loc;
        &old[loc.offset as usize..loc.offset as usize + loc.stored_len as usize]
    };
    assert_eq!(frame::decode_entry(stored(0), &meta.index[0].1).unwrap(), raw_block());
    assert_eq!(frame::decode_entry(stored(1), &meta.index[1].1).unwrap(), text_block());
    // With the old compressed frame in it, today's segment is the old one, byte for byte.
    let (same, index) = first_segment(stored(1));
    assert_eq!(meta.index, index);
    assert_eq!(old, same);
}

#[test]
fn segment_with_compressed_records_and_commit() {
    let mut b = SegmentBuilder::new(header(42, 41));
    for record in records() {
        b.push(&record).unwrap();
    }
    let (today, _) = b.finish(Some(Lsn(310))).unwrap();
    let meta = verify_whole(&golden("v1-segment-commit.seg", &today)).unwrap();
    assert_eq!(meta.footer.header, header(42, 41));
    assert_eq!(meta.footer.records_codec, Codec::Zstd);
    assert_eq!(meta.footer.commit, Some(Lsn(310)));
    assert_eq!(meta.records.to_vec().unwrap(), records());
    assert!(meta.index.is_empty());
}

#[test]
fn checkpoint_parts_and_manifest() {
    let entries = |n: u64| -> Vec<_> {
        (2..2 + n)
            .map(|i| {
                let body = Body::Inline(format!("content {i}").into_bytes().into());
                (inode_key(Ino(i)), inode(FileKind::Regular, 9, body).encode())
            })
            .collect()
    };
    let build = |index: u32, n: u64| -> (Vec<u8>, PartInfo) {
        let mut b = PartBuilder::new(volume_id(), Lsn(280));
        for (key, value) in entries(n) {
            b.push(&key, &value).unwrap();
        }
        b.finish(index).unwrap()
    };
    let (today, info) = build(0, 1);
    let raw = golden("v1-checkpoint-part-raw", &today);
    assert_eq!(raw, today);
    let old = golden("v1-checkpoint-part-zstd", &build(1, 50).0);
    assert_eq!(old[10], Codec::Zstd as u8);
    let part = verify_part(&old).unwrap();
    assert_eq!(part.to_vec().unwrap(), entries(50));
    assert_eq!((part.index, part.lsn_begin, part.volume), (1, Lsn(280), volume_id()));

    let hash = old.last_chunk::<32>().copied().unwrap();
    let manifest = Manifest {
        volume: volume_id(),
        number: SegmentNo(42),
        epoch: Epoch(3),
        commit_lsn: Lsn(310),
        lsn_begin: Lsn(280),
        lsn_end: Lsn(305),
        replay_from: SegmentNo(41),
        previous: header(41, 41).previous,
        created_at: 1_790_000_150,
        entries: 51,
        raw_bytes: 6789,
        parts: vec![info, PartInfo { len: old.len() as u64, blake3: hash, entries: 50 }],
    };
    let today = manifest.encode().unwrap();
    let bytes = golden("v1-checkpoint-manifest", &today);
    assert_eq!(bytes, today);
    assert_eq!(Manifest::decode(&bytes, SegmentNo(42), Epoch(3)).as_ref(), Ok(&manifest));
    assert_eq!(parse_part(&raw, &manifest, 0).unwrap().to_vec().unwrap(), entries(1));
    assert_eq!(parse_part(&old, &manifest, 1).unwrap().to_vec().unwrap(), entries(50));
}
