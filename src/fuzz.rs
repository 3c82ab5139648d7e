//! Entries for the fuzzer: each takes any bytes, and must neither panic nor take much memory.
//!
//! `tests/fuzz/` has a target for each; `tests/fuzz_corpus.rs` runs a small corpus and mutations of
//! it through all of them. What stands behind a hash is also tried with the hash that belongs to
//! it, since an attacker can compute it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::cache::dirty::DirtyValue;
use crate::config;
use crate::format::checkpoint::{Manifest, Part, verify_part};
use crate::format::codec::{Decoder, FormatError};
use crate::format::frame::{self, FrameHeader, MAX_RAW};
use crate::format::local::{CachedValue, FrameValue, PatchValue, SealedMark, SegmentValue};
use crate::format::names::ObjectName;
use crate::format::record::Record;
use crate::format::segment::{self, SegmentMeta, verify_whole};
use crate::format::tables::{BlockEntry, Dirent, Extents, Inode, is_well_formed};
use crate::format::volume::{Claim, Release, Volume};
use crate::format::{brief, tables};
use crate::ids::{BlockHash, BlockId, Epoch, Ino, SegmentNo};
use crate::journal;

/// A name and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All entries by name.
pub const TARGETS: [Target; 13] = [
    ("segment", segment),
    ("frame", frame),
    ("part", part),
    ("manifest", manifest),
    ("claim", claim),
    ("release", release),
    ("volume", volume),
    ("record", record),
    ("values", values),
    ("tail", tail),
    ("witness", witness),
    ("names", names),
    ("config", config),
];

/// A whole segment: header, footer, index, records.
pub fn segment(bytes: &[u8]) {
    let _ = segment::parse_header(bytes);
    let _ = segment::parse_footer(bytes, bytes.len() as u64);
    let look = |bytes: &[u8]| verify_whole(bytes).map(|meta| look_into(&meta));
    let _ = look(bytes);
    let mut sealed = bytes.to_vec();
    segment::reseal(&mut sealed);
    let _ = look(&sealed);
}

fn look_into(meta: &SegmentMeta) {
    let (mut records, mut last) = (0, None);
    let visited = meta.records.visit(|lsn, op| {
        assert!(is_well_formed(op.key()), "a key that was to be refused");
        assert!(last.is_none_or(|before| before <= lsn), "records out of order");
        records += usize::from(last != Some(lsn));
        last = Some(lsn);
        Ok::<_, FormatError>(())
    });
    assert!(visited.is_ok() && records == meta.records.len(), "what was verified reads otherwise");
    assert!(meta.index.is_sorted_by_key(|(id, _)| *id), "an index out of order");
}

/// A frame, behind the hash under which it is known.
pub fn frame(bytes: &[u8]) {
    let (hash, stored) = bytes.split_at(bytes.len().min(32));
    let mut stored = stored.to_vec();
    let _ = FrameHeader::decode(&stored);
    if stored.len() >= frame::HEADER_LEN {
        let crc = crc32fast::hash(&stored[..frame::HEADER_LEN - 4]);
        stored[frame::HEADER_LEN - 4..frame::HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
    }
    let hash = BlockHash(<[u8; 32]>::try_from(hash).unwrap_or_default());
    if let Ok(raw) = frame::decode(&stored, &hash) {
        assert!(raw.len() <= MAX_RAW, "a frame that is too long");
    }
}

/// A part of a checkpoint.
pub fn part(bytes: &[u8]) {
    let look = |bytes: &[u8]| verify_part(bytes).map(|part| look_into_part(&part));
    let _ = look(bytes);
    let mut sealed = bytes.to_vec();
    if let Some(at) = sealed.len().checked_sub(32) {
        let hash = *blake3::hash(&sealed[..at]).as_bytes();
        sealed[at..].copy_from_slice(&hash);
        let _ = look(&sealed);
    }
}

fn look_into_part(part: &Part) {
    let (mut entries, mut raw) = (0u32, 0);
    let mut last = Bytes::new();
    let read = part.batches(|batch| {
        for (key, value) in batch {
            assert!(is_well_formed(&key) && key > last, "a key that was to be refused");
            entries += 1;
            raw += (key.len() + value.len()) as u64;
            last = key;
        }
        Ok::<_, FormatError>(())
    });
    assert!(read.is_ok(), "what was verified reads otherwise");
    assert!((entries, raw) == (part.entries, part.raw_bytes), "what was verified has other sums");
}

/// The text of a JSON object with the checksum that belongs to it: `bytes` is what stands before.
fn with_checksum(bytes: &[u8]) -> Vec<u8> {
    let body = match bytes.windows(13).rposition(|w| w == b",\n  \"blake3\": ") {
        Some(at) => &bytes[..at],
        None => bytes,
    };
    let mut out = body.to_vec();
    out.extend_from_slice(format!(",\n  \"blake3\": \"{}\"\n}}\n", blake3::hash(body).to_hex()).as_bytes());
    out
}

/// A manifest.
pub fn manifest(bytes: &[u8]) {
    let (number, epoch) = (SegmentNo(42), Epoch(3));
    let _ = Manifest::decode(bytes, number, epoch);
    if let Ok(manifest) = Manifest::decode(&with_checksum(bytes), number, epoch) {
        let again = manifest.encode().and_then(|bytes| Manifest::decode(&bytes, number, epoch));
        assert!(again == Ok(manifest), "a manifest is written otherwise than it was read");
    }
}

/// A claim.
pub fn claim(bytes: &[u8]) {
    let _ = Claim::decode(bytes, Epoch(3));
    if let Ok(claim) = Claim::decode(&with_checksum(bytes), Epoch(3)) {
        let again = claim.encode().and_then(|bytes| Claim::decode(&bytes, Epoch(3)));
        // One whose host is so long that it does not fit when it is written is no claim of ours.
        assert!(again.is_err() || again == Ok(claim), "a claim is written otherwise than it was read");
    }
}

/// A release.
pub fn release(bytes: &[u8]) {
    let _ = Release::decode(bytes, Epoch(3));
    if let Ok(release) = Release::decode(&with_checksum(bytes), Epoch(3)) {
        let again = release.encode().and_then(|bytes| Release::decode(&bytes, Epoch(3)));
        assert!(again == Ok(release), "a release is written otherwise than it was read");
    }
}

/// `volume.json`.
pub fn volume(bytes: &[u8]) {
    let _ = Volume::decode(bytes);
    let _ = Volume::decode(&with_checksum(bytes));
}

/// Records one after the other, as in the tail.
pub fn record(bytes: &[u8]) {
    let mut d = Decoder::new("record", bytes);
    while d.remaining() > 0 {
        let Ok(record) = Record::decode(&mut d) else { return };
        let mut out = Vec::new();
        record.encode(&mut out);
        let again = Record::decode(&mut Decoder::new("record", &out));
        assert!(again == Ok(record), "a record is written otherwise than it was read");
    }
}

/// Values of the tables, replicated and local; what can be read is written alike.
pub fn values(bytes: &[u8]) {
    fn same<T>(bytes: &[u8], read: Result<T, FormatError>, write: impl FnOnce(T) -> Bytes) {
        if let Ok(value) = read {
            assert!(write(value) == bytes, "a value is written otherwise than it was read");
        }
    }
    same(bytes, Inode::decode(bytes), |v| v.encode());
    same(bytes, Dirent::decode(bytes), |v| v.encode());
    same(bytes, Extents::decode(bytes), |v| v.encode());
    same(bytes, BlockEntry::decode(bytes), |v| v.encode());
    same(bytes, FrameValue::decode(bytes), |v| v.encode());
    same(bytes, SegmentValue::decode(bytes), |v| v.encode());
    same(bytes, CachedValue::decode(bytes), |v| v.encode());
    same(bytes, SealedMark::decode(bytes), |v| v.encode());
    same(bytes, PatchValue::decode(bytes, 1 << 20), |v| v.encode());
    let _ = DirtyValue::decode(bytes, 1 << 20);
    let mut short = Vec::new();
    if brief::value(&tables::inode_key(Ino(7)), bytes, &mut short) {
        assert!(brief::inode(&short).is_ok(), "a brief inode that cannot be read");
    }
    let _ = brief::inode(bytes);
    let _ = brief::dirent(bytes);
    // As a key.
    let _ = (is_well_formed(bytes), tables::split_dirent_key(bytes), tables::chunk_of_extent_key(bytes));
    let _ = (tables::number_of_key(bytes).map(BlockId), brief::key(bytes, &mut Vec::new()));
}

/// A file of the tail.
pub fn tail(bytes: &[u8]) {
    journal::fuzz::tail_file(bytes);
    let mut sealed = bytes.to_vec();
    journal::fuzz::reseal_tail(&mut sealed);
    journal::fuzz::tail_file(&sealed);
}

/// A slot of the witness.
pub fn witness(bytes: &[u8]) {
    journal::fuzz::witness(bytes);
}

/// A name in the listing of a replica.
pub fn names(bytes: &[u8]) {
    if let Ok(path) = std::str::from_utf8(bytes)
        && let Some(name) = ObjectName::parse(path)
    {
        assert!(name.path() == path, "a name is written otherwise than it was read");
    }
}

/// A configuration file.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let env = config::Env { vars: BTreeMap::new(), cwd: PathBuf::from("/") };
    let _ = config::file::parse(text, Path::new("/etc/mirrorfs.toml"), &env);
}
