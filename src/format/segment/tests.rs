//! Tests of segments: round trips, every damage, hostile numbers.

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::format::codec::put_varint;
use crate::format::frame;
use crate::format::record::{Op, Record};
use crate::format::tables::{FrameLoc, inode_key, orphan_key};
use crate::ids::{BlockHash, Ino};

fn header(number: u64) -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_random([5; 16]),
        number: SegmentNo(number),
        epoch: Epoch(2),
        cut_at: Time { secs: 1_790_000_000, nanos: 5 },
        txg_first: SegmentNo(number),
        previous: SegmentHash([3; 32]),
    }
}

fn record(lsn: u64, len: usize) -> Record {
    Record {
        lsn: Lsn(lsn),
        ops: vec![Op::put(inode_key(Ino(2)), vec![7; len]), Op::delete(orphan_key(Ino(9)))],
    }
}

/// What a segment was made of.
#[derive(Clone, Debug, PartialEq)]
struct Parts {
    footer: Footer,
    index: Vec<(BlockId, BlockEntry)>,
    records: Vec<Record>,
}

fn parts(meta: SegmentMeta) -> Parts {
    assert_eq!(meta.records.len(), meta.footer.records as usize);
    Parts { footer: meta.footer, index: meta.index, records: meta.records.to_vec().unwrap() }
}

fn sample(blocks: usize, records: usize, commit: Option<Lsn>) -> (Vec<u8>, Parts) {
    let mut b = SegmentBuilder::new(header(9));
    let mut index = Vec::new();
    for i in (0..blocks as u64).rev() {
        let raw = vec![i as u8; 300 + i as usize];
        let frame = frame::encode(&raw, 1).unwrap();
        let loc = b.push_frame(&frame.bytes).unwrap();
        let entry = BlockEntry { hash: BlockHash::of(&raw), loc };
        b.push_index(BlockId(i + 1), entry).unwrap();
        index.insert(0, (BlockId(i + 1), entry));
    }
    let old = FrameLoc {
        segment: SegmentNo(3),
        epoch: Epoch(1),
        offset: 128,
        stored_len: 21,
        raw_len: 1,
        codec: 0,
    };
    let shared = BlockEntry { hash: BlockHash([1; 32]), loc: old };
    b.push_index(BlockId(1000), shared).unwrap();
    index.push((BlockId(1000), shared));
    let records: Vec<_> = (0..records as u64).map(|i| record(100 + 3 * i, i as usize * 10)).collect();
    for r in &records {
        b.push(r).unwrap();
    }
    let most = b.size();
    let (bytes, summary) = b.finish(commit).unwrap();
    assert_eq!(bytes.len() as u64, summary.len);
    assert!(summary.len <= most);
    (bytes.to_vec(), Parts { footer: summary.footer, index, records })
}

#[test]
fn segments_round_trip() {
    for (blocks, records, commit) in
        [(0, 0, None), (0, 0, Some(Lsn(5))), (5, 0, None), (3, 40, Some(Lsn(400))), (0, 1, Some(Lsn(100)))]
    {
        let (bytes, expected) = sample(blocks, records, commit);
        let meta = verify_whole(&bytes).unwrap();
        assert_eq!(parts(meta.clone()), expected);
        assert_eq!(meta.footer.commit, commit);
        meta.footer.expect(header(9).volume, SegmentNo(9), Epoch(2)).unwrap();
        assert!(meta.footer.expect(header(9).volume, SegmentNo(8), Epoch(2)).is_err());
        assert!(meta.footer.expect(header(9).volume, SegmentNo(9), Epoch(1)).is_err());
        assert!(meta.footer.expect(VolumeId::from_random([6; 16]), SegmentNo(9), Epoch(2)).is_err());
        // What a restore does: the tail only.
        let len = bytes.len() as u64;
        let footer = parse_footer(&bytes[bytes.len() - FOOTER_LEN..], len).unwrap();
        let range = footer.meta_range();
        assert_eq!(range.end + FOOTER_LEN as u64, len);
        let part = &bytes[range.start as usize..range.end as usize];
        assert_eq!(parts(parse_meta(&footer, part).unwrap()), expected);
        for (_, entry) in expected.index.iter().filter(|(_, e)| e.loc.segment == SegmentNo(9)) {
            let at = entry.loc.offset as usize;
            let stored = &bytes[at..at + entry.loc.stored_len as usize];
            assert_eq!(frame::decode_entry(stored, entry).unwrap().len(), entry.loc.raw_len as usize);
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let (bytes, _) = sample(2, 4, Some(Lsn(200)));
    for cut in 0..bytes.len() {
        assert!(verify_whole(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    let mut longer = bytes.clone();
    longer.insert(200, 0);
    assert!(verify_whole(&longer).is_err());
    let tail = &bytes[bytes.len() - FOOTER_LEN..];
    assert!(parse_footer(tail, bytes.len() as u64 + 1).is_err());
    assert!(parse_footer(&tail[1..], bytes.len() as u64).is_err());
}

#[test]
fn every_flipped_bit_is_refused() {
    let (bytes, _) = sample(2, 4, Some(Lsn(200)));
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(verify_whole(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn restore_sees_damage_of_records_and_index_without_reading_frames() {
    let (bytes, _) = sample(2, 4, Some(Lsn(200)));
    let footer = parse_footer(&bytes, bytes.len() as u64).unwrap();
    let range = footer.meta_range();
    for at in range.clone() {
        let mut meta = bytes[range.start as usize..range.end as usize].to_vec();
        meta[(at - range.start) as usize] ^= 0x10;
        assert!(parse_meta(&footer, &meta).is_err());
    }
}

/// Rewrites fields of a footer and makes its hash right again: what only an attacker or a bug would do.
fn forge(bytes: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let at = out.len() - FOOTER_LEN;
    change(&mut out[at..]);
    let hash = blake3::hash(&out[at..at + 288]);
    out[at + 288..at + 320].copy_from_slice(hash.as_bytes());
    out
}

#[test]
fn forged_numbers_never_panic_nor_allocate_much() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (bytes, _) = sample(2, 40, Some(Lsn(400)));
    for _ in 0..20_000 {
        let bad = forge(&bytes, |footer| {
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(128..224);
                let len = rng.random_range(1..8usize).min(224 - at);
                if rng.random() {
                    rng.fill_bytes(&mut footer[at..at + len]);
                } else {
                    footer[at..at + len].fill(rng.random());
                }
            }
        });
        if let Ok(meta) = verify_whole(&bad) {
            assert!(meta.records.len() <= 40 && meta.index.len() <= 3);
        }
    }
    let newer = forge(&bytes, |footer| footer[132] = 0x81);
    assert!(verify_whole(&newer).unwrap_err().newer);
    let mut newer = forge(&bytes, |footer| footer[8] = 2);
    let at = newer.len() - 8;
    newer[at] = 2;
    assert!(verify_whole(&newer).unwrap_err().newer);
    let no_commit = forge(&bytes, |footer| footer[132] = 0);
    assert!(verify_whole(&no_commit).is_err());
}

#[test]
fn a_flipped_bit_is_damage_and_never_a_newer_format() {
    let (good, _) = sample(2, 40, Some(Lsn(400)));
    for byte in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            let error = verify_whole(&bad).unwrap_err();
            assert!(!error.newer, "bit {bit} of byte {byte}: {error}");
        }
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..5_000 {
        let mut bytes = vec![0; rng.random_range(0..1000)];
        rng.fill_bytes(&mut bytes);
        if bytes.len() > FOOTER_LEN && rng.random() {
            let at = bytes.len() - 6;
            bytes[at..].copy_from_slice(&END);
            bytes = forge(&bytes, |_| ());
        }
        assert!(verify_whole(&bytes).is_err());
        assert!(parse_header(&bytes).is_err());
    }
}

#[test]
fn the_builder_refuses_nonsense() {
    let mut b = SegmentBuilder::new(header(9));
    assert!(b.is_empty());
    b.push(&record(5, 1)).unwrap();
    assert!(b.push(&record(5, 1)).is_err());
    assert!(b.push(&record(4, 1)).is_err());
    assert!(b.push_frame(b"not a frame").is_err());
    let raw = b"content".to_vec();
    let loc = b.push_frame(&frame::encode(&raw, 0).unwrap().bytes).unwrap();
    let good = BlockEntry { hash: BlockHash::of(&raw), loc };
    assert!(b.push_index(BlockId(0), good).is_err());
    for loc in [
        FrameLoc { segment: SegmentNo(10), ..loc },
        FrameLoc { epoch: Epoch(1), ..loc },
        FrameLoc { offset: loc.offset + 1, ..loc },
        FrameLoc { offset: u64::MAX, ..loc },
        FrameLoc { raw_len: u32::MAX, ..loc },
        FrameLoc { stored_len: 1, ..loc },
    ] {
        assert!(b.push_index(BlockId(1), BlockEntry { loc, ..good }).is_err(), "{loc:?}");
    }
    b.push_index(BlockId(1), good).unwrap();
    b.push_index(BlockId(1), good).unwrap();
    assert!(!b.is_empty());
    let mut twice = SegmentBuilder::new(header(9));
    let loc = twice.push_frame(&frame::encode(&raw, 0).unwrap().bytes).unwrap();
    twice.push_index(BlockId(1), BlockEntry { hash: BlockHash([0; 32]), loc }).unwrap();
    twice.push_index(BlockId(1), BlockEntry { hash: BlockHash([1; 32]), loc }).unwrap();
    assert!(twice.finish(None).is_err());
    let (bytes, _) = b.finish(Some(Lsn(5))).unwrap();
    assert_eq!(verify_whole(&bytes).unwrap().index.len(), 1);
    let mut b = SegmentBuilder::new(header(9));
    b.push(&record(5, 1)).unwrap();
    assert!(b.finish(Some(Lsn(4))).is_err());
}

/// A segment with these bytes as records, all its hashes right. It says what the bytes need.
fn forged(codec: Codec, stored: &[u8], raw_len: u64, records: u32, lsns: (u64, u64)) -> Vec<u8> {
    let mut out = header(9).encode().to_vec();
    out.extend_from_slice(stored);
    let footer = Footer {
        header: header(9),
        object_len: (HEADER_LEN + stored.len() + FOOTER_LEN) as u64,
        frames_len: 0,
        frames: 0,
        frames_raw: 0,
        records,
        records_codec: codec,
        records_len: stored.len() as u64,
        records_raw: raw_len,
        entries: 0,
        index_len: 0,
        lsns: Some((Lsn(lsns.0), Lsn(lsns.1))),
        commit: Some(Lsn(lsns.1)),
        meta_hash: *blake3::hash(&out).as_bytes(),
        body_hash: *blake3::hash(&out).as_bytes(),
        hash: SegmentHash::default(),
    };
    out.extend_from_slice(&footer.encode());
    out
}

/// A record of `count` operations that are all `op`.
fn many(lsn: u64, count: u64, op: &[u8]) -> Vec<u8> {
    let mut raw = Vec::new();
    put_varint(&mut raw, lsn);
    put_varint(&mut raw, count);
    raw.extend_from_slice(&op.repeat(count as usize));
    raw
}

fn delete_of(key: &[u8]) -> Vec<u8> {
    let mut op = vec![0];
    crate::format::codec::put_blob(&mut op, key);
    op
}

#[test]
fn a_small_segment_cannot_unpack_to_millions_of_operations() {
    let tomb = delete_of(&orphan_key(Ino(9)));
    for op in [&delete_of(b"")[..], &tomb] {
        let raw = many(5, (60 << 20) / op.len() as u64, op);
        let stored = zstd::bulk::compress(&raw, 19).unwrap();
        let bytes = forged(Codec::Zstd, &stored, raw.len() as u64, 1, (5, 5));
        assert!(bytes.len() < 20_000, "{}", bytes.len());
        let why = verify_whole(&bytes).unwrap_err().why;
        assert!(why.contains("impossible numbers"), "{why}");
    }
    // Within the limit of bytes it is that of operations that ends it.
    let raw = many(5, 5000, &tomb);
    let stored = zstd::bulk::compress(&raw, 3).unwrap();
    let padded = many(5, 50, &[&[1, 9][..], &orphan_key(Ino(9)), &[0x80, 0x04], &[7; 512]].concat());
    assert!(stored.len() as u64 * 256 < raw.len() as u64, "{} {}", stored.len(), raw.len());
    assert!(verify_whole(&forged(Codec::Raw, &padded, padded.len() as u64, 1, (5, 5))).is_ok());
    let mut mixed = many(5, 20_000, &tomb);
    let noise: Vec<u8> = (0..4000).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    let mut record = Vec::new();
    Record { lsn: Lsn(6), ops: vec![Op::put(inode_key(Ino(3)), noise)] }.encode(&mut record);
    mixed.extend_from_slice(&record);
    let stored = zstd::bulk::compress(&mixed, 3).unwrap();
    let why = verify_whole(&forged(Codec::Zstd, &stored, mixed.len() as u64, 2, (5, 6))).unwrap_err().why;
    assert!(why.contains("operations in"), "{why}");
}

#[test]
fn a_writer_keeps_to_the_limits_that_readers_hold_it_to() {
    // Records that shrink to nothing.
    for len in [0, 4096] {
        let mut b = SegmentBuilder::new(header(9));
        for lsn in 1..300 {
            b.push(&Record { lsn: Lsn(lsn), ops: vec![Op::put(inode_key(Ino(2)), vec![0; len]); 5] })
                .unwrap();
        }
        let (bytes, summary) = b.finish(None).unwrap();
        let meta = verify_whole(&bytes).unwrap();
        assert_eq!(meta.records.len(), 299);
        assert_eq!(summary.footer.records_codec, Codec::Raw);
    }
}

#[test]
fn keys_that_no_table_has_are_refused() {
    let good = delete_of(&inode_key(Ino(2)));
    let block = crate::format::tables::block_key(BlockId(3));
    let put = |key: &[u8]| [&[1][..], &delete_of(key)[1..], &[1, 0]].concat();
    assert!(verify_whole(&forged(Codec::Raw, &many(5, 1, &good), 13, 1, (5, 5))).is_ok());
    for (op, text) in [
        (delete_of(b""), "impossible key"),
        (delete_of(&[2]), "impossible key"),
        (delete_of(&[2; 10]), "impossible key"),
        (delete_of(&[0x0a; 9]), "impossible key"),
        (delete_of(&[0x81; 9]), "impossible key"),
        (put(&block), "a block's entry"),
        (vec![2, 9, 2, 0, 0, 0, 0, 0, 0, 0, 2], "unknown operation"),
    ] {
        let raw = many(5, 1, &op);
        let why = verify_whole(&forged(Codec::Raw, &raw, raw.len() as u64, 1, (5, 5))).unwrap_err().why;
        // The shortest ones are below what a record can be.
        assert!(why.contains(text) || raw.len() < 7, "{text}: {why}");
    }
    let raw = many(5, 1, &delete_of(&block));
    assert!(verify_whole(&forged(Codec::Raw, &raw, raw.len() as u64, 1, (5, 5))).is_ok());
    // A count that the bytes cannot hold, none at all, LSN 0.
    for (lsn, count, records) in [(5, 1 << 40, 1), (5, 0, 1), (0, 1, 1), (5, 1, u32::MAX)] {
        let mut raw = Vec::new();
        put_varint(&mut raw, lsn);
        put_varint(&mut raw, count);
        raw.extend_from_slice(&good);
        let bad = forged(Codec::Raw, &raw, raw.len() as u64, records, (5, 5));
        assert!(verify_whole(&bad).is_err(), "{lsn} {count} {records}");
    }
}
