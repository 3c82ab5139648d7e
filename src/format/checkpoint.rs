//! The checkpoint: a dump of the replicated tables in parts, and its manifest.
//!
//! Owns the bytes of both. Knows neither where a dump comes from nor where it goes.
//!
//! ```text
//! part: header (64) · entries, compressed as a whole · hash (32)
//! offset length
//!      0      8  magic "MFCHKPNT"
//!      8      2  version 1
//!     10      1  codec of the entries: 0 raw, 1 zstd
//!     11      1  encryption: 0 none
//!     12      4  index of this part, from 0
//!     16     16  volume
//!     32      8  LSN at which the scan began
//!     40      4  number of entries
//!     44      4  raw length of the entries, at most 16 MiB
//!     48      4  stored length of the entries
//!     52     12  zeros
//!     64      …  entries: (key:blob value:blob)*, keys strictly ascending within and across parts
//!      …     32  BLAKE3 of all before
//! ```
//!
//! # A dump that is taken while changes go on
//!
//! The scan reads each key once, some time between `lsn_begin` and `lsn_end`; different keys at different times. So
//! what it saw is no state that ever was. But every key that changed after `lsn_begin` is set or removed by some record
//! with a higher LSN, and records say the whole new value: applying, in order, every record from `lsn_begin` up to
//! some commit at or after `lsn_end` leaves each key as its last change up to that commit left it, whatever the scan had
//! seen of it. Hence three rules:
//!
//! * `replay_from` is the first segment of the first transaction group that was *not yet wholly in the tables* when the
//!   scan began: neither its records up to `lsn_begin` nor the block entries of its index, which enter the tables only
//!   when it is sealed, later than its cut. Earlier is allowed, later is not.
//! * `number` is the first segment whose commit is at or after `lsn_end`. Loading is complete only when the replay has
//!   reached the end of `number`; with fewer segments the checkpoint must not be used.
//! * `number + 1 = replay_from` is allowed: nothing changed during the scan, nothing need be replayed.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec::{Decoder, FormatError, put_blob};
use super::frame::{Codec, pack};
use super::json;
use super::limits::{MAX_KEY, MAX_VALUE, is_plausible};
use super::segment::SegmentHash;
use super::tables::{is_replicated, is_well_formed};
use super::unpack::Unpacker;
use crate::ids::{Epoch, Lsn, SegmentNo, VolumeId};

#[cfg(test)]
mod tests;

/// A part is closed when its raw entries reach this many bytes.
pub const PART_TARGET: usize = 8 << 20;
/// Largest raw length of a part.
pub const MAX_PART_RAW: usize = 16 << 20;
/// Largest stored length of a part.
pub const MAX_PART_LEN: u64 = (MAX_PART_RAW + HEADER_LEN + HASH_LEN) as u64;

const HEADER_LEN: usize = 64;
const HASH_LEN: usize = 32;
const MAGIC: [u8; 8] = *b"MFCHKPNT";
const VERSION: u16 = 1;
const PART: &str = "checkpoint part";
const MANIFEST: &str = "mirrorfs checkpoint";
const LEVEL: i32 = 3;
/// Bytes of the shortest entry: a key of 2 bytes, no value, and the lengths of both.
const LEAST_ENTRY: u64 = 4;
/// Most parts of a checkpoint.
pub const MAX_PARTS: usize = 1 << 16;
/// Keys and values that [`Part::batches`] gives at a time, in bytes.
const BATCH: usize = 256 << 10;

/// What a manifest says of one part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Bytes of the object.
    pub len: u64,
    /// BLAKE3 of the object without its last 32 bytes, which are that hash.
    #[serde(with = "json::hex")]
    pub blake3: [u8; 32],
    /// Entries in it.
    pub entries: u64,
}

/// BLAKE3 of a manifest's bytes: what the log says of the checkpoint. The manifest in turn names the hash of each part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ManifestHash(pub [u8; 32]);

impl ManifestHash {
    /// The hash of a manifest object.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Reads the value that stands under the key of a checkpoint in the tables.
    pub fn from_value(value: &[u8]) -> Result<Self, FormatError> {
        let bytes = value.try_into();
        bytes.map(Self).map_err(|_| FormatError::new("checkpoint entry", "it is not 32 bytes long"))
    }
}

impl std::fmt::Display for ManifestHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..8].iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl PartInfo {
    fn is_possible(&self) -> bool {
        let least = (HEADER_LEN + HASH_LEN) as u64;
        (least..=MAX_PART_LEN).contains(&self.len) && self.entries <= MAX_PART_RAW as u64 / LEAST_ENTRY
    }
}

/// A checkpoint's manifest, written after its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The volume.
    pub volume: VolumeId,
    /// The first segment whose commit is at or after `lsn_end`: with it the checkpoint becomes usable.
    pub number: SegmentNo,
    /// The epoch of that segment.
    pub epoch: Epoch,
    /// The LSN up to which that segment commits.
    pub commit_lsn: Lsn,
    /// Everything up to this LSN was in the tables when the scan began.
    pub lsn_begin: Lsn,
    /// The last LSN that was in the tables when the scan ended.
    pub lsn_end: Lsn,
    /// The first segment to replay over it.
    pub replay_from: SegmentNo,
    /// Hash of the segment before `replay_from` (zeros when that is segment 1): the replay's chain begins with it.
    pub previous: SegmentHash,
    /// Seconds since 1970 at which it was finished.
    pub created_at: u64,
    /// Entries of all parts.
    pub entries: u64,
    /// Raw bytes of keys and values of all parts.
    pub raw_bytes: u64,
    /// The parts, in key order.
    pub parts: Vec<PartInfo>,
}

impl Manifest {
    /// The object's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        json::encode(MANIFEST, self)
    }

    /// Reads a manifest that was found under the name of `number` and `epoch`.
    pub fn decode(bytes: &[u8], number: SegmentNo, epoch: Epoch) -> Result<Self, FormatError> {
        let manifest: Self = json::decode(MANIFEST, bytes, json::MAX_LEN)?;
        if (manifest.number, manifest.epoch) != (number, epoch) {
            return Err(FormatError::new(
                MANIFEST,
                format!("it is number {} of epoch {}", manifest.number, manifest.epoch),
            ));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Bytes of all its parts.
    #[must_use]
    pub fn parts_len(&self) -> u64 {
        self.parts.iter().fold(0, |sum, p| sum.saturating_add(p.len))
    }

    fn check(&self) -> Result<(), FormatError> {
        let parts = self.parts.len() <= MAX_PARTS && self.parts.iter().all(PartInfo::is_possible);
        // Each entry has two lengths beside its key and its value.
        let raw = self.raw_bytes <= self.parts.len() as u64 * MAX_PART_RAW as u64
            && self.entries <= self.raw_bytes / (LEAST_ENTRY - 2);
        let entries = self.parts.iter().try_fold(0u64, |sum, p| sum.checked_add(p.entries));
        let order = self.lsn_begin <= self.lsn_end
            && self.lsn_end <= self.commit_lsn
            && self.number.0 != 0
            && self.epoch.0 != 0
            && self.replay_from.0 != 0
            && self.replay_from <= self.number.next()
            && (self.replay_from <= self.number || self.lsn_begin == self.lsn_end);
        if !parts || !raw || entries != Some(self.entries) || !order {
            return Err(FormatError::new(MANIFEST, "impossible numbers"));
        }
        Ok(())
    }
}

/// Collects the entries of one part.
pub struct PartBuilder {
    volume: VolumeId,
    lsn_begin: Lsn,
    raw: Vec<u8>,
    entries: u32,
    last: Vec<u8>,
}

impl PartBuilder {
    /// An empty part of a dump whose scan began at `lsn_begin`.
    #[must_use]
    pub fn new(volume: VolumeId, lsn_begin: Lsn) -> Self {
        Self { volume, lsn_begin, raw: Vec::new(), entries: 0, last: Vec::new() }
    }

    /// Appends an entry; keys ascend and are replicated ones.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<(), FormatError> {
        if !is_replicated(key) || !is_well_formed(key) || key.len() > MAX_KEY {
            return Err(FormatError::new(
                PART,
                format!("the impossible key {:02x?}", &key[..key.len().min(20)]),
            ));
        }
        if value.len() > MAX_VALUE {
            return Err(FormatError::new(PART, format!("a value of {} bytes", value.len())));
        }
        if self.entries != 0 && key <= self.last.as_slice() {
            return Err(FormatError::new(PART, "keys do not ascend"));
        }
        if self.raw.len() + key.len() + value.len() + 20 > MAX_PART_RAW {
            return Err(FormatError::new(PART, "an entry too large"));
        }
        put_blob(&mut self.raw, key);
        put_blob(&mut self.raw, value);
        self.entries += 1;
        self.last.clear();
        self.last.extend_from_slice(key);
        Ok(())
    }

    /// Whether it is time to begin the next part.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.raw.len() >= PART_TARGET
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The object's bytes as part `index`; the builder is empty again, and keys must go on ascending.
    pub fn finish(&mut self, index: u32) -> Result<(Vec<u8>, PartInfo), FormatError> {
        let raw = std::mem::take(&mut self.raw);
        let entries = std::mem::take(&mut self.entries);
        let raw_len = raw.len() as u32;
        let (codec, stored) = pack(PART, raw, u64::from(entries), LEVEL)?;
        let mut o = Vec::with_capacity(HEADER_LEN + stored.len() + HASH_LEN);
        o.extend_from_slice(&MAGIC);
        o.extend_from_slice(&VERSION.to_le_bytes());
        o.extend_from_slice(&[codec as u8, 0]);
        o.extend_from_slice(&index.to_le_bytes());
        o.extend_from_slice(&self.volume.bytes());
        o.extend_from_slice(&self.lsn_begin.0.to_le_bytes());
        o.extend_from_slice(&entries.to_le_bytes());
        o.extend_from_slice(&raw_len.to_le_bytes());
        o.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        o.resize(HEADER_LEN, 0);
        o.extend_from_slice(&stored);
        let hash = *blake3::hash(&o).as_bytes();
        o.extend_from_slice(&hash);
        let info = PartInfo { len: o.len() as u64, blake3: hash, entries: u64::from(entries) };
        Ok((o, info))
    }
}

/// A part, verified. Its entries stay as they are stored, and are unpacked by each reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// Its place among the parts.
    pub index: u32,
    /// The LSN at which its scan began.
    pub lsn_begin: Lsn,
    /// Number of entries.
    pub entries: u32,
    /// Raw bytes of keys and values.
    pub raw_bytes: u64,
    /// The first and the last key; `None` without entries.
    pub ends: Option<(Bytes, Bytes)>,
    codec: Codec,
    stored: Bytes,
    raw_len: u64,
}

impl Part {
    /// Calls `each` with keys and values in order, some at a time. Those of one call share their
    /// memory.
    pub fn batches<E: From<FormatError>>(
        &self,
        mut each: impl FnMut(Vec<(Bytes, Bytes)>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut u = Unpacker::new(PART, self.codec, &self.stored, self.raw_len)?;
        let (mut bytes, mut lens) = (Vec::new(), Vec::new());
        let share = |bytes: &mut Vec<u8>, lens: &mut Vec<(usize, usize)>| {
            let all = Bytes::copy_from_slice(bytes);
            bytes.clear();
            let mut at = 0;
            let pair = |(key, value)| {
                let start = at;
                at += key + value;
                (all.slice(start..start + key), all.slice(start + key..at))
            };
            lens.drain(..).map(pair).collect::<Vec<_>>()
        };
        for _ in 0..self.entries {
            u.begin_item();
            let (key, value) = (u.blob(MAX_KEY)?, u.blob(MAX_VALUE)?);
            lens.push((key.len(), value.len()));
            bytes.extend_from_slice(u.bytes(key));
            bytes.extend_from_slice(u.bytes(value));
            if bytes.len() >= BATCH {
                each(share(&mut bytes, &mut lens))?;
            }
        }
        match lens.is_empty() {
            true => Ok(()),
            false => each(share(&mut bytes, &mut lens)),
        }
    }

    /// All entries as a list. Takes a multiple of their bytes: not for what a stranger may have
    /// written.
    pub fn to_vec(&self) -> Result<Vec<(Bytes, Bytes)>, FormatError> {
        let mut all = Vec::new();
        self.batches(|mut batch| {
            all.append(&mut batch);
            Ok::<_, FormatError>(())
        })?;
        Ok(all)
    }

    /// Checks the order and form of all entries, with the memory of one.
    fn check(&mut self, stored: &[u8]) -> Result<(), FormatError> {
        let mut u = Unpacker::new(PART, self.codec, stored, self.raw_len)?;
        if u64::from(self.entries) > self.raw_len / LEAST_ENTRY {
            return Err(u.error(format!("{} entries in {} bytes", self.entries, self.raw_len)));
        }
        let mut first = None;
        let mut before: Vec<u8> = Vec::new();
        for n in 0..self.entries {
            u.begin_item();
            let (key, value) = (u.blob(MAX_KEY)?, u.blob(MAX_VALUE)?);
            self.raw_bytes += (key.len() + value.len()) as u64;
            let key = u.bytes(key);
            if !is_well_formed(key) || (n > 0 && key <= before.as_slice()) {
                return Err(u.error("a key out of order or out of place"));
            }
            before.clear();
            before.extend_from_slice(key);
            first.get_or_insert_with(|| Bytes::copy_from_slice(&before));
        }
        self.ends = first.map(|first| (first, Bytes::from(before)));
        u.finish()
    }
}

/// Reads a part as what a manifest promises.
pub fn parse_part(bytes: &[u8], manifest: &Manifest, index: u32) -> Result<Part, FormatError> {
    let bad = |why: &str| FormatError::new(PART, why);
    let info = manifest.parts.get(index as usize).ok_or_else(|| bad("no such part"))?;
    if bytes.len() as u64 != info.len || bytes.last_chunk::<HASH_LEN>() != Some(&info.blake3) {
        return Err(bad("it is not the one that the manifest names"));
    }
    let part = verify_part(bytes)?;
    if (part.volume, part.index, part.lsn_begin) != (manifest.volume, index, manifest.lsn_begin)
        || u64::from(part.entries) != info.entries
    {
        return Err(bad("it belongs to another checkpoint"));
    }
    Ok(part)
}

/// Reads a part by itself, as a scrub does.
pub fn verify_part(bytes: &[u8]) -> Result<Part, FormatError> {
    let bad = |why: &str| FormatError::new(PART, why);
    let at = bytes.len().checked_sub(HASH_LEN).ok_or_else(|| bad("too short"))?;
    let (body, hash) = bytes.split_at(at);
    let mut d = Decoder::new(PART, body);
    if d.array()? != MAGIC {
        return Err(bad("no checkpoint part begins here"));
    }
    if bytes.len() as u64 > MAX_PART_LEN || *blake3::hash(body).as_bytes() != hash {
        return Err(bad("damaged"));
    }
    let version = d.u16()?;
    if version != VERSION {
        return Err(FormatError::newer(PART, version, VERSION));
    }
    let codec = Codec::from_byte(PART, d.u8()?)?;
    let encryption = d.u8()?;
    if encryption != 0 {
        return Err(FormatError::newer(PART, format_args!("encryption {encryption}"), "no encryption"));
    }
    let index = d.u32()?;
    let volume = VolumeId(uuid::Uuid::from_bytes(d.array()?));
    let lsn_begin = Lsn(d.u64()?);
    let (entries, raw_len, stored_len) = (d.u32()?, u64::from(d.u32()?), d.u32()? as usize);
    d.bytes(12)?;
    let stored = d.rest();
    let plausible = codec == Codec::Raw || is_plausible(stored.len() as u64, raw_len, u64::from(entries));
    if stored.len() != stored_len || raw_len > MAX_PART_RAW as u64 || !plausible {
        return Err(bad("impossible lengths"));
    }
    let mut part = Part {
        volume,
        index,
        lsn_begin,
        entries,
        raw_bytes: 0,
        ends: None,
        codec,
        stored: Bytes::new(),
        raw_len,
    };
    part.check(stored)?;
    part.stored = Bytes::copy_from_slice(stored);
    Ok(part)
}
