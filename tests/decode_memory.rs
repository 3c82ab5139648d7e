//! What decoding takes of memory: bytes that somebody else wrote, and that unpack to much, cost
//! little.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use mirrorfs::format::checkpoint::{MAX_PART_RAW, Manifest, verify_part};
use mirrorfs::format::codec::{FormatError, put_blob, put_varint};
use mirrorfs::format::record::{Op, Record};
use mirrorfs::format::segment::{
    FOOTER_LEN, HEADER_LEN, SegmentBuilder, SegmentHash, SegmentHeader, reseal, verify_whole,
};
use mirrorfs::format::tables::{Time, inode_key, orphan_key, xattr_key};
use mirrorfs::format::volume::{Claim, Volume};
use mirrorfs::ids::{Epoch, Ino, Lsn, SegmentNo, VolumeId};

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps to the contract of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps to the contract of the trait.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// Runs `f`; fails when it has more than `limit` bytes at a time beyond what there was.
#[track_caller]
fn within<R>(limit: usize, what: &str, f: impl FnOnce() -> R) -> R {
    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    let result = f();
    let taken = MOST.load(Relaxed).saturating_sub(before);
    println!("{what}: {taken} bytes");
    assert!(taken <= limit, "{what} took {taken} bytes of memory, {limit} are allowed");
    result
}

fn header() -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_random([5; 16]),
        number: SegmentNo(9),
        epoch: Epoch(2),
        cut_at: Time { secs: 1, nanos: 5 },
        txg_first: SegmentNo(9),
        previous: SegmentHash([3; 32]),
    }
}

/// A segment that says of itself what an attacker wants: its records are `raw`, compressed as far
/// as zstd can.
fn forged(raw: &[u8], lsn: u64) -> Vec<u8> {
    let (empty, _) = SegmentBuilder::new(header()).finish(Some(Lsn(lsn))).unwrap();
    let stored = zstd::bulk::compress(raw, 3).unwrap();
    let mut out = empty[..HEADER_LEN].to_vec();
    out.extend_from_slice(&stored);
    let mut footer = empty[HEADER_LEN..].to_vec();
    let len = (out.len() + FOOTER_LEN) as u64;
    let mut put = |at: usize, bytes: &[u8]| footer[at..at + bytes.len()].copy_from_slice(bytes);
    put(136, &len.to_le_bytes());
    put(156, &1u32.to_le_bytes());
    put(160, &(stored.len() as u64).to_le_bytes());
    put(168, &(raw.len() as u64).to_le_bytes());
    put(180, &[1]);
    for at in [192, 200, 208] {
        put(at, &lsn.to_le_bytes());
    }
    out.extend_from_slice(&footer);
    reseal(&mut out);
    out
}

/// One record of equal operations that fills `len` bytes.
fn equal(op: &[u8], len: usize) -> (Vec<u8>, u64) {
    let count = (len - 20) / op.len();
    let mut raw = Vec::with_capacity(len);
    put_varint(&mut raw, 5);
    put_varint(&mut raw, count as u64);
    for _ in 0..count {
        raw.extend_from_slice(op);
    }
    (raw, count as u64)
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// All in one test: the allocator counts for the whole process.
#[test]
fn what_others_wrote_takes_little_memory() {
    // 33 million operations in some thousand bytes: with empty keys, and with keys that could be.
    let mut tomb = vec![0];
    put_blob(&mut tomb, &orphan_key(Ino(9)));
    for (op, what) in [(&[0, 0][..], "empty keys"), (&tomb, "marks")] {
        let (raw, count) = equal(op, 64 * MIB);
        let bytes = forged(&raw, 5);
        drop(raw);
        println!("{count} operations in {} bytes", bytes.len());
        assert!(bytes.len() < 20_000);
        assert!(within(MIB, what, || verify_whole(&bytes)).is_err());
    }

    // As much as the limits allow: 60 MiB of records out of 300 KB. They are read, but never all of
    // them are in memory.
    let mut ops = vec![Op::put(inode_key(Ino(3)), noise(100 << 10, 0))];
    ops.extend((1..=2).map(|n| Op::put(xattr_key(Ino(n), b"user.x"), noise(100 << 10, n))));
    ops.extend((0..480).map(|n| Op::put(xattr_key(Ino(n), b"user.zeros"), vec![0; 128 << 10])));
    let mut raw = Vec::new();
    Record { lsn: Lsn(5), ops }.encode(&mut raw);
    let bytes = forged(&raw, 5);
    println!("{} bytes unpack to {}", bytes.len(), raw.len());
    drop(raw);
    let meta = within(3 * MIB, "records at the limit", || verify_whole(&bytes)).unwrap();
    let mut seen = 0;
    within(3 * MIB, "reading them", || {
        meta.records.visit(|_, op| {
            seen += op.key().len();
            Ok::<_, FormatError>(())
        })
    })
    .unwrap();
    assert!(seen > 480 * 9);

    // A part of a checkpoint that says to hold more entries than its bytes, and one that unpacks to
    // 16 MiB.
    for (entries, raw) in [(u32::MAX, vec![0; 64]), (8 << 20, vec![0; MAX_PART_RAW])] {
        let stored = zstd::bulk::compress(&raw, 3).unwrap();
        let mut part = b"MFCHKPNT\x01\x00\x01\x00".to_vec();
        part.extend_from_slice(&[0; 28]);
        for n in [entries, raw.len() as u32, stored.len() as u32] {
            part.extend_from_slice(&n.to_le_bytes());
        }
        part.resize(64, 0);
        part.extend_from_slice(&stored);
        let hash = blake3::hash(&part);
        part.extend_from_slice(hash.as_bytes());
        assert!(within(MIB, "a part", || verify_part(&part)).is_err());
    }

    // Texts: names that nobody knows, lists in lists, numbers without end.
    let sealed = |body: String| {
        let hash = blake3::hash(body.as_bytes()).to_hex();
        Bytes::from(format!("{body},\n  \"blake3\": \"{hash}\"\n}}\n"))
    };
    let names = "\"\",".repeat(4 << 20);
    let manifest = sealed(format!(
        "{{\n  \"format\": \"mirrorfs checkpoint\",\n  \"format_version\": 1,\n  \"requires\": [{names}\"x\"]"
    ));
    let decoded = within(MIB, "a manifest", || Manifest::decode(&manifest, SegmentNo(1), Epoch(1)));
    assert!(decoded.unwrap_err().newer);
    let wrapping = "[".repeat(4 << 20);
    let volume = sealed(format!("{{\n  \"format\": \"mirrorfs volume\",\n  \"key_wrapping\": {wrapping}"));
    assert!(within(MIB, "volume.json", || Volume::decode(&volume)).is_err());
    let host = "x".repeat(8 << 20);
    let claim = sealed(format!("{{\n  \"format\": \"mirrorfs epoch claim\",\n  \"host\": \"{host}\""));
    assert!(within(MIB, "a claim", || Claim::decode(&claim, Epoch(1))).is_err());

    // What the allocator does not see, zstd's own memory, is in here; so are the forged objects
    // themselves.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 256 << 10, "{peak} KiB");
}
