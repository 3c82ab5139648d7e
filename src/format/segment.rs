//! The segment: one immutable object of frames, records and an index.
//!
//! Owns header, footer, index and the checks between them. Knows no I/O; [`SegmentBuilder`] (in `builder`) writes what
//! this file reads.
//!
//! ```text
//! header (128) · frames · records · index · footer (328)
//! ```
//!
//! The footer repeats the header, so one ranged GET of an object's last bytes gives footer, index and records, all
//! that a restore needs; a scrub checks all stored bytes against the footer without any key.
//!
//! ```text
//! header
//! offset length
//!      0      8  magic "MFSEGMNT"
//!      8      2  version 1
//!     10      2  flags: 0
//!     12      4  header length 128
//!     16     16  volume
//!     32      8  number
//!     40      4  epoch
//!     44      4  time of the cut: nanoseconds
//!     48      8  time of the cut: seconds since 1970
//!     56      8  number of the first segment of this transaction group
//!     64     32  hash of the segment before (zeros for the first of a volume)
//!     96     28  zeros
//!    124      4  CRC-32 of bytes 0 to 123
//!
//! index entry (69, ascending by block number)
//!      0      8  block number
//!      8     61  block entry (see `tables`)
//!
//! footer
//!      0    128  the header again
//!    128      4  footer length 328
//!    132      4  flags: bit 0 COMMIT
//!    136      8  length of the object
//!    144      8  length of the frames (they begin at 128)
//!    152      4  number of frames
//!    156      4  number of records
//!    160      8  stored length of the records
//!    168      8  raw length of the records
//!    176      4  number of index entries
//!    180      1  codec of the records: 0 raw, 1 zstd
//!    181      3  zeros
//!    184      8  length of the index
//!    192      8  LSN of the first record here, 0 when there is none
//!    200      8  LSN of the last record here, 0 when there is none
//!    208      8  LSN up to which the group is complete, 0 without COMMIT
//!    216      8  raw length of all frames together
//!    224     32  BLAKE3 of header, stored records and index ("meta hash")
//!    256     32  BLAKE3 of all bytes before the footer ("body hash")
//!    288     32  BLAKE3 of footer bytes 0 to 287: the hash of the segment
//!    320      2  version 1
//!    322      6  magic "MFSEND"
//! ```

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::codec::{Decoder, FormatError};
use super::frame::{Codec, HEADER_LEN as FRAME_HEADER_LEN, MAX_RAW, MAX_STORED};
use super::json;
use super::limits::is_plausible;
use super::tables::{BlockEntry, Time};
use crate::ids::{BlockId, Epoch, Lsn, SegmentNo, VolumeId};

mod builder;
mod forge;
mod log;
#[cfg(test)]
mod tests;

pub use builder::{SegmentBuilder, SegmentSummary};
#[doc(hidden)]
pub use forge::reseal;
pub use log::RecordLog;

/// Bytes of a segment's header.
pub const HEADER_LEN: usize = 128;
/// Bytes of a segment's footer.
pub const FOOTER_LEN: usize = 328;
/// Bytes of an index entry.
pub const INDEX_ENTRY_LEN: usize = 8 + BlockEntry::LEN;
/// Largest segment that is written or read. A cut aims at 16 MiB; one frame or record more may follow.
pub const MAX_LEN: u64 = 256 << 20;
/// Largest raw length of the records of one segment.
pub const MAX_RECORDS: u64 = 64 << 20;
/// Largest length of the stored records and the index of one segment together: a restore has them
/// in memory.
pub const MAX_META: u64 = 32 << 20;
/// Bytes of the shortest record: LSN, count, kind of operation, and a key of 2 bytes with its
/// length.
const LEAST_RECORD: u64 = 6;

const MAGIC: [u8; 8] = *b"MFSEGMNT";
const END: [u8; 6] = *b"MFSEND";
const VERSION: u16 = 1;
const FLAG_COMMIT: u32 = 1;
const WHAT: &str = "segment";

/// The hash of a segment: it stands in the footer and covers, directly or through other hashes, every byte.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentHash(#[serde(with = "json::hex")] pub [u8; 32]);

impl fmt::Display for SegmentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&json::hex::text(&self.0))
    }
}

impl fmt::Debug for SegmentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SegmentHash({self})")
    }
}

/// What stands before the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// Its number.
    pub number: SegmentNo,
    /// The tenure in which it was written.
    pub epoch: Epoch,
    /// When its transaction group was cut.
    pub cut_at: Time,
    /// The first segment of its transaction group; itself when the group is one segment or begins here.
    pub txg_first: SegmentNo,
    /// Hash of the segment before it; zeros for the first of a volume.
    pub previous: SegmentHash,
}

impl SegmentHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut o = [0; HEADER_LEN];
        o[..8].copy_from_slice(&MAGIC);
        o[8..10].copy_from_slice(&VERSION.to_le_bytes());
        o[12..16].copy_from_slice(&(HEADER_LEN as u32).to_le_bytes());
        o[16..32].copy_from_slice(&self.volume.bytes());
        o[32..40].copy_from_slice(&self.number.0.to_le_bytes());
        o[40..44].copy_from_slice(&self.epoch.0.to_le_bytes());
        o[44..48].copy_from_slice(&self.cut_at.nanos.to_le_bytes());
        o[48..56].copy_from_slice(&self.cut_at.secs.to_le_bytes());
        o[56..64].copy_from_slice(&self.txg_first.0.to_le_bytes());
        o[64..96].copy_from_slice(&self.previous.0);
        let crc = crc32fast::hash(&o[..124]);
        o[124..].copy_from_slice(&crc.to_le_bytes());
        o
    }
}

/// Reads the header at the front of a segment's bytes.
pub fn parse_header(bytes: &[u8]) -> Result<SegmentHeader, FormatError> {
    const WHAT: &str = "segment header";
    let bytes = Decoder::new(WHAT, bytes).bytes(HEADER_LEN)?;
    let mut d = Decoder::new(WHAT, bytes);
    if d.array()? != MAGIC {
        return Err(d.error("no segment begins here"));
    }
    let (version, flags, length) = (d.u16()?, d.u16()?, d.u32()?);
    if crc32fast::hash(&bytes[..124]).to_le_bytes() != bytes[124..] {
        return Err(d.error("damaged"));
    }
    if version != VERSION {
        return Err(FormatError::newer(WHAT, version, VERSION));
    }
    if flags != 0 {
        return Err(FormatError::newer(WHAT, format_args!("flags {flags:#x}"), "no flags"));
    }
    if length as usize != HEADER_LEN {
        return Err(d.error(format!("its length is {length}")));
    }
    let volume = VolumeId(uuid::Uuid::from_bytes(d.array()?));
    let (number, epoch) = (SegmentNo(d.u64()?), Epoch(d.u32()?));
    let nanos = d.u32()?;
    let cut_at = Time { secs: d.i64()?, nanos };
    let txg_first = SegmentNo(d.u64()?);
    let previous = SegmentHash(d.array()?);
    if number.0 == 0 || epoch.0 == 0 || txg_first.0 == 0 || txg_first > number || nanos > 999_999_999 {
        return Err(d.error("impossible numbers"));
    }
    Ok(SegmentHeader { volume, number, epoch, cut_at, txg_first, previous })
}

/// What stands at the end of a segment, with the header that it repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The header.
    pub header: SegmentHeader,
    /// Length of the object in bytes.
    pub object_len: u64,
    /// Bytes of all frames; they begin at [`HEADER_LEN`].
    pub frames_len: u64,
    /// Number of frames.
    pub frames: u32,
    /// Raw bytes of all frames together.
    pub frames_raw: u64,
    /// Number of records.
    pub records: u32,
    /// How the records are stored.
    pub records_codec: Codec,
    /// Stored bytes of the records, which follow the frames.
    pub records_len: u64,
    /// Their raw bytes.
    pub records_raw: u64,
    /// Number of index entries.
    pub entries: u32,
    /// Bytes of the index, which follows the records.
    pub index_len: u64,
    /// First and last LSN of the records here; `None` when there are none.
    pub lsns: Option<(Lsn, Lsn)>,
    /// `Some` in the last segment of a transaction group: the LSN up to which the group is complete.
    pub commit: Option<Lsn>,
    /// BLAKE3 of header, stored records and index.
    pub meta_hash: [u8; 32],
    /// BLAKE3 of all bytes before the footer.
    pub body_hash: [u8; 32],
    /// The hash of the segment.
    pub hash: SegmentHash,
}

impl Footer {
    /// Where frames may lie in the object.
    #[must_use]
    pub fn frames_range(&self) -> Range<u64> {
        HEADER_LEN as u64..HEADER_LEN as u64 + self.frames_len
    }

    /// Where records and index lie in the object; the footer follows at once.
    #[must_use]
    pub fn meta_range(&self) -> Range<u64> {
        let start = HEADER_LEN as u64 + self.frames_len;
        start..start + self.records_len + self.index_len
    }

    /// Whether the body of `object`, the whole segment with this footer, is the one that the footer speaks of.
    #[must_use]
    pub fn covers(&self, object: &[u8]) -> bool {
        let body = object.get(..object.len().saturating_sub(FOOTER_LEN)).unwrap_or_default();
        *blake3::hash(body).as_bytes() == self.body_hash
    }

    /// Refuses a segment that is not the one asked for.
    pub fn expect(&self, volume: VolumeId, number: SegmentNo, epoch: Epoch) -> Result<(), FormatError> {
        let h = &self.header;
        if h.volume != volume {
            return Err(FormatError::new(WHAT, format!("it belongs to volume {}", h.volume)));
        }
        if (h.number, h.epoch) != (number, epoch) {
            return Err(FormatError::new(WHAT, format!("it is number {} of epoch {}", h.number, h.epoch)));
        }
        Ok(())
    }

    fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut o = Vec::with_capacity(FOOTER_LEN);
        o.extend_from_slice(&self.header.encode());
        o.extend_from_slice(&(FOOTER_LEN as u32).to_le_bytes());
        o.extend_from_slice(&(if self.commit.is_some() { FLAG_COMMIT } else { 0 }).to_le_bytes());
        o.extend_from_slice(&self.object_len.to_le_bytes());
        o.extend_from_slice(&self.frames_len.to_le_bytes());
        o.extend_from_slice(&self.frames.to_le_bytes());
        o.extend_from_slice(&self.records.to_le_bytes());
        o.extend_from_slice(&self.records_len.to_le_bytes());
        o.extend_from_slice(&self.records_raw.to_le_bytes());
        o.extend_from_slice(&self.entries.to_le_bytes());
        o.extend_from_slice(&[self.records_codec as u8, 0, 0, 0]);
        o.extend_from_slice(&self.index_len.to_le_bytes());
        let (first, last) = self.lsns.unwrap_or_default();
        for lsn in [first, last, self.commit.unwrap_or_default()] {
            o.extend_from_slice(&lsn.0.to_le_bytes());
        }
        o.extend_from_slice(&self.frames_raw.to_le_bytes());
        o.extend_from_slice(&self.meta_hash);
        o.extend_from_slice(&self.body_hash);
        let hash = blake3::hash(&o);
        o.extend_from_slice(hash.as_bytes());
        o.extend_from_slice(&VERSION.to_le_bytes());
        o.extend_from_slice(&END);
        let mut out = [0; FOOTER_LEN];
        out.copy_from_slice(&o);
        out
    }
}

/// Reads the footer at the end of `tail`, which is the end of an object of `object_len` bytes.
pub fn parse_footer(tail: &[u8], object_len: u64) -> Result<Footer, FormatError> {
    const WHAT: &str = "segment footer";
    let bad = |why: &str| FormatError::new(WHAT, why);
    let at = tail.len().checked_sub(FOOTER_LEN).ok_or_else(|| bad("the object is too short"))?;
    let bytes = &tail[at..];
    if bytes[322..] != END {
        return Err(bad("no segment ends here (cut short?)"));
    }
    let version = u16::from_le_bytes([bytes[320], bytes[321]]);
    // The only field that no hash covers. A later version may end in another shape, but where our header is repeated it is ours.
    if version != VERSION {
        return Err(match parse_header(&bytes[..HEADER_LEN]) {
            Ok(_) => bad("damaged"),
            Err(_) => FormatError::newer(WHAT, version, VERSION),
        });
    }
    let hash = blake3::hash(&bytes[..288]);
    if *hash.as_bytes() != bytes[288..320] {
        return Err(bad("damaged"));
    }
    let header = parse_header(&bytes[..HEADER_LEN])?;
    let mut d = Decoder::new(WHAT, &bytes[HEADER_LEN..]);
    let (length, flags) = (d.u32()?, d.u32()?);
    if flags & !FLAG_COMMIT != 0 {
        return Err(FormatError::newer(WHAT, format_args!("flags {flags:#x}"), "flag 1"));
    }
    let (stated_len, frames_len) = (d.u64()?, d.u64()?);
    let (frames, records) = (d.u32()?, d.u32()?);
    let (records_len, records_raw) = (d.u64()?, d.u64()?);
    let entries = d.u32()?;
    let records_codec = Codec::from_byte(WHAT, d.u8()?)?;
    d.bytes(3)?;
    let index_len = d.u64()?;
    let (first, last, commit) = (Lsn(d.u64()?), Lsn(d.u64()?), Lsn(d.u64()?));
    let frames_raw = d.u64()?;
    let (meta_hash, body_hash) = (d.array()?, d.array()?);
    let footer = Footer {
        header,
        object_len: stated_len,
        frames_len,
        frames,
        frames_raw,
        records,
        records_codec,
        records_len,
        records_raw,
        entries,
        index_len,
        lsns: (records != 0).then_some((first, last)),
        commit: (flags & FLAG_COMMIT != 0).then_some(commit),
        meta_hash,
        body_hash,
        hash: SegmentHash(*hash.as_bytes()),
    };
    if stated_len != object_len {
        return Err(FormatError::new(WHAT, format!("the object has {object_len} bytes, not {stated_len}")));
    }
    let sections = [HEADER_LEN as u64, frames_len, records_len, index_len, FOOTER_LEN as u64];
    let sum = sections.iter().try_fold(0u64, |sum, n| sum.checked_add(*n));
    let lengths = length as usize == FOOTER_LEN
        && object_len <= MAX_LEN
        && sum == Some(object_len)
        && index_len == u64::from(entries) * INDEX_ENTRY_LEN as u64
        && records_len + index_len <= MAX_META
        && records_raw <= MAX_RECORDS
        && records_len <= records_raw
        && u64::from(frames) <= frames_len / FRAME_HEADER_LEN as u64
        && frames_raw <= u64::from(frames) * MAX_RAW as u64
        && u64::from(records) <= records_raw / LEAST_RECORD
        && match records_codec {
            Codec::Raw => records_len == records_raw,
            // At least one operation a record.
            Codec::Zstd => is_plausible(records_len, records_raw, u64::from(records)),
        };
    let lsns = if records == 0 {
        first.0 == 0 && last.0 == 0 && records_raw == 0
    } else {
        first.0 != 0 && first <= last
    };
    let commits = if footer.commit.is_some() { commit.0 != 0 && last <= commit } else { commit.0 == 0 };
    if !lengths || !lsns || !commits {
        return Err(bad("impossible numbers"));
    }
    Ok(footer)
}

/// A segment without its frames, verified.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentMeta {
    /// Footer and header.
    pub footer: Footer,
    /// What this segment says of blocks, ascending by number.
    pub index: Vec<(BlockId, BlockEntry)>,
    /// The metadata changes that travel in it, ascending by LSN.
    pub records: RecordLog,
}

/// Reads records and index (`meta` is exactly [`Footer::meta_range`]) and checks them against the footer.
pub fn parse_meta(footer: &Footer, meta: &[u8]) -> Result<SegmentMeta, FormatError> {
    let bad = |why: String| FormatError::new(WHAT, why);
    if meta.len() as u64 != footer.records_len + footer.index_len {
        return Err(bad(format!("{} bytes of records and index", meta.len())));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&footer.header.encode());
    hasher.update(meta);
    if *hasher.finalize().as_bytes() != footer.meta_hash {
        return Err(bad("its records or its index are damaged".into()));
    }
    let (records, index) = meta.split_at(footer.records_len as usize);
    let index = parse_index(footer, index)?;
    let records = RecordLog::new(footer, records)?;
    Ok(SegmentMeta { footer: *footer, index, records })
}

fn parse_index(footer: &Footer, bytes: &[u8]) -> Result<Vec<(BlockId, BlockEntry)>, FormatError> {
    let mut d = Decoder::new("index of a segment", bytes);
    let mut index = Vec::with_capacity(bytes.len() / INDEX_ENTRY_LEN);
    let mut before = BlockId(0);
    while d.remaining() != 0 {
        let id = BlockId(d.u64()?);
        let entry = BlockEntry::decode_from(&mut d)?;
        if id <= before {
            return Err(d.error(format!("block {id} is out of order")));
        }
        check_entry(&footer.header, footer.frames_len, &entry).map_err(|why| d.error(why))?;
        before = id;
        index.push((id, entry));
    }
    Ok(index)
}

/// Why `entry` cannot stand in the index of this segment.
fn check_entry(header: &SegmentHeader, frames_len: u64, entry: &BlockEntry) -> Result<(), String> {
    let loc = &entry.loc;
    if loc.raw_len as usize > MAX_RAW
        || (loc.stored_len as usize) < FRAME_HEADER_LEN
        || loc.stored_len as usize > MAX_STORED
    {
        return Err(format!("a frame of {} bytes for {} raw ones", loc.stored_len, loc.raw_len));
    }
    if loc.segment.0 == 0 || loc.segment > header.number || loc.epoch.0 == 0 || loc.epoch > header.epoch {
        return Err(format!("a frame in segment {} of epoch {}", loc.segment, loc.epoch));
    }
    if loc.segment == header.number && loc.epoch != header.epoch {
        return Err(format!("a frame in segment {} of another epoch", loc.segment));
    }
    let limit = if loc.segment == header.number { HEADER_LEN as u64 + frames_len } else { MAX_LEN };
    let end = loc.offset.checked_add(u64::from(loc.stored_len));
    if loc.offset < HEADER_LEN as u64 || end.is_none_or(|end| end > limit) {
        return Err(format!("a frame at {} of {} bytes", loc.offset, loc.stored_len));
    }
    Ok(())
}

/// Checks every byte of a segment against its hashes and decodes its records and index. Needs no key: content hashes
/// of blocks are left to those who decode them.
pub fn verify_whole(bytes: &[u8]) -> Result<SegmentMeta, FormatError> {
    let footer = parse_footer(bytes, bytes.len() as u64)?;
    if !footer.covers(bytes) {
        return Err(FormatError::new(WHAT, "its content is damaged"));
    }
    let body = &bytes[..bytes.len() - FOOTER_LEN];
    if parse_header(body)? != footer.header {
        return Err(FormatError::new(WHAT, "header and footer disagree"));
    }
    let meta = footer.meta_range();
    parse_meta(&footer, &body[meta.start as usize..meta.end as usize])
}
