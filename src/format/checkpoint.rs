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
use super::frame::{Codec, pack, unpack};
use super::json;
use super::segment::SegmentHash;
use super::tables::is_replicated;
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
        let manifest: Self = json::decode(MANIFEST, bytes)?;
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
        let parts = self.parts.iter().all(|p| p.len <= MAX_PART_LEN);
        let entries = self.parts.iter().try_fold(0u64, |sum, p| sum.checked_add(p.entries));
        let order = self.lsn_begin <= self.lsn_end
            && self.lsn_end <= self.commit_lsn
            && self.number.0 != 0
            && self.epoch.0 != 0
            && self.replay_from.0 != 0
            && self.replay_from <= self.number.next()
            && (self.replay_from <= self.number || self.lsn_begin == self.lsn_end);
        if !parts || entries != Some(self.entries) || !order || u32::try_from(self.parts.len()).is_err() {
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
        if !is_replicated(key) {
            return Err(FormatError::new(PART, "a local key"));
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
        let (codec, stored) = pack(PART, raw, LEVEL)?;
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

/// A part, verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// Its place among the parts.
    pub index: u32,
    /// The LSN at which its scan began.
    pub lsn_begin: Lsn,
    /// Keys and values, ascending; slices of one buffer.
    pub entries: Vec<(Bytes, Bytes)>,
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
        || part.entries.len() as u64 != info.entries
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
    let (count, raw_len, stored_len) = (d.u32()?, d.u32()? as usize, d.u32()? as usize);
    d.bytes(12)?;
    let stored = d.rest();
    if stored.len() != stored_len || raw_len > MAX_PART_RAW {
        return Err(bad("impossible lengths"));
    }
    let entries = parse_entries(&unpack(PART, codec, stored, raw_len)?, count)?;
    Ok(Part { volume, index, lsn_begin, entries })
}

fn parse_entries(raw: &Bytes, count: u32) -> Result<Vec<(Bytes, Bytes)>, FormatError> {
    let mut d = Decoder::new(PART, raw);
    let mut entries: Vec<(Bytes, Bytes)> = Vec::with_capacity((count as usize).min(raw.len() / 2));
    for _ in 0..count {
        let key = raw.slice_ref(d.blob()?);
        let value = raw.slice_ref(d.blob()?);
        if !is_replicated(&key) || entries.last().is_some_and(|(before, _)| *before >= key) {
            return Err(d.error("a key out of order or out of place"));
        }
        entries.push((key, value));
    }
    d.finish()?;
    Ok(entries)
}
