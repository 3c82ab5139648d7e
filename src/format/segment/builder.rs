//! Writing a segment, in memory.
//!
//! Owns the order of sections and the sums of the footer. Knows no file: the caller stores the bytes.

use bytes::Bytes;

use super::{
    END, FOOTER_LEN, Footer, HEADER_LEN, INDEX_ENTRY_LEN, MAX_LEN, MAX_META, MAX_RECORDS, SegmentHash,
    SegmentHeader, WHAT, check_entry,
};
use crate::direct::Gathered;
use crate::format::codec::{Decoder, FormatError};
use crate::format::frame::{FrameHeader, Packed, pack};
use crate::format::record::Record;
use crate::format::tables::{BlockEntry, FrameLoc};
use crate::ids::{BlockId, Lsn};

/// Level at which records are compressed: they are few and read whole.
const RECORD_LEVEL: i32 = 3;

/// What there is to know of a segment once it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSummary {
    /// Bytes of the object.
    pub len: u64,
    /// The hash of the segment (see [`SegmentHash`]): the next one carries it.
    pub hash: SegmentHash,
    /// Everything that the footer says.
    pub footer: Footer,
}

/// Collects frames, index entries and records of one segment.
pub struct SegmentBuilder {
    header: SegmentHeader,
    out: Gathered,
    frames: u32,
    frames_raw: u64,
    records: Vec<u8>,
    record_count: u32,
    ops: u64,
    lsns: Option<(Lsn, Lsn)>,
    index: Vec<(BlockId, BlockEntry)>,
}

impl SegmentBuilder {
    /// An empty segment.
    #[must_use]
    pub fn new(header: SegmentHeader) -> Self {
        Self::expecting(header, 0)
    }

    /// An empty segment that will have some `expected` bytes: memory for them is taken at once.
    #[must_use]
    pub fn expecting(header: SegmentHeader, expected: usize) -> Self {
        let mut out = Gathered::new(expected.max(HEADER_LEN));
        out.extend_from_slice(&header.encode());
        Self {
            header,
            out,
            frames: 0,
            frames_raw: 0,
            records: Vec::new(),
            record_count: 0,
            ops: 0,
            lsns: None,
            index: Vec::new(),
        }
    }

    /// The header it was begun with.
    #[must_use]
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Appends one frame (the bytes of `format::frame`) and says where it lies.
    pub fn push_frame(&mut self, frame: &[u8]) -> Result<FrameLoc, FormatError> {
        let header = FrameHeader::decode(frame)?;
        self.push_parts(header, &[frame])
    }

    /// Appends the frame of a block's content, of which `packed` says how it is stored.
    pub fn push_packed(&mut self, raw: &[u8], packed: &Packed) -> Result<FrameLoc, FormatError> {
        let header = packed.header(raw);
        self.push_parts(header, &[&header.encode(), packed.payload(raw)])
    }

    fn push_parts(&mut self, header: FrameHeader, parts: &[&[u8]]) -> Result<FrameLoc, FormatError> {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        self.room(len)?;
        let loc = FrameLoc {
            segment: self.header.number,
            epoch: self.header.epoch,
            offset: self.out.len() as u64,
            stored_len: len as u32,
            raw_len: header.raw_len,
            codec: header.codec as u8,
        };
        for part in parts {
            self.out.extend_from_slice(part);
        }
        self.frames += 1;
        self.frames_raw += u64::from(header.raw_len);
        Ok(loc)
    }

    /// Says what a block contains and where its frame lies: here (then the frame has been pushed) or in an older segment.
    pub fn push_index(&mut self, id: BlockId, entry: BlockEntry) -> Result<(), FormatError> {
        if id.0 == 0 {
            return Err(FormatError::new(WHAT, "an index entry for block 0"));
        }
        check_entry(&self.header, (self.out.len() - HEADER_LEN) as u64, &entry)
            .map_err(|why| FormatError::new(WHAT, format!("index entry of block {id}: {why}")))?;
        if ((self.index.len() + 1) * INDEX_ENTRY_LEN) as u64 > MAX_META {
            return Err(FormatError::new(WHAT, "its index is full"));
        }
        self.room(INDEX_ENTRY_LEN)?;
        self.index.push((id, entry));
        Ok(())
    }

    /// Appends one record (the bytes of `format::record`, exactly one). LSNs must ascend.
    pub fn push_record(&mut self, record: &[u8]) -> Result<(), FormatError> {
        let mut d = Decoder::new("record", record);
        let (lsn, ops) = (Lsn(d.varint()?), d.varint()?);
        if ops == 0 {
            return Err(FormatError::new(WHAT, format!("record {lsn} changes nothing")));
        }
        if lsn.0 == 0 || self.lsns.is_some_and(|(_, last)| last >= lsn) {
            return Err(FormatError::new(WHAT, format!("record {lsn} is out of order")));
        }
        if (self.records.len() + record.len()) as u64 > MAX_RECORDS {
            return Err(FormatError::new(WHAT, "it has too many records"));
        }
        self.room(record.len())?;
        #[cfg(debug_assertions)]
        {
            let mut d = Decoder::new("record", record);
            Record::decode(&mut d)?;
            d.finish()?;
        }
        self.records.extend_from_slice(record);
        self.record_count += 1;
        self.ops += ops;
        self.lsns = Some((self.lsns.map_or(lsn, |(first, _)| first), lsn));
        Ok(())
    }

    /// Appends one record.
    pub fn push(&mut self, record: &Record) -> Result<(), FormatError> {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        self.push_record(&bytes)
    }

    /// Bytes that the finished object will have at most.
    #[must_use]
    pub fn size(&self) -> u64 {
        (self.out.len() + self.records.len() + self.index.len() * INDEX_ENTRY_LEN + FOOTER_LEN) as u64
    }

    /// Whether there is nothing in it yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames == 0 && self.record_count == 0 && self.index.is_empty()
    }

    fn room(&self, more: usize) -> Result<(), FormatError> {
        if self.size() + more as u64 > MAX_LEN {
            return Err(FormatError::new(WHAT, "it is full"));
        }
        Ok(())
    }

    /// The object's bytes. `commit` makes it the last segment of its transaction group, complete up to that LSN.
    pub fn finish(mut self, commit: Option<Lsn>) -> Result<(Bytes, SegmentSummary), FormatError> {
        let last = self.lsns.map_or(Lsn(0), |(_, last)| last);
        if commit.is_some_and(|commit| commit.0 == 0 || commit < last) {
            return Err(FormatError::new(WHAT, format!("a commit below its last record {last}")));
        }
        let frames_len = (self.out.len() - HEADER_LEN) as u64;
        let meta_start = self.out.len();
        let records_raw = self.records.len() as u64;
        let (records_codec, records) = pack(WHAT, self.records, self.ops, RECORD_LEVEL)?;
        self.out.extend_from_slice(&records);
        self.index.sort_by_key(|(id, _)| *id);
        self.index.dedup();
        let mut index = Vec::with_capacity(self.index.len() * INDEX_ENTRY_LEN);
        for (i, (id, entry)) in self.index.iter().enumerate() {
            if i > 0 && self.index[i - 1].0 == *id {
                return Err(FormatError::new(WHAT, format!("block {id} has two entries")));
            }
            index.extend_from_slice(&id.0.to_le_bytes());
            entry.encode_into(&mut index);
        }
        self.out.extend_from_slice(&index);
        let index_len = index.len() as u64;
        if records.len() as u64 + index_len > MAX_META {
            return Err(FormatError::new(WHAT, "its records and its index are too long"));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.out[..HEADER_LEN]);
        hasher.update(&self.out[meta_start..]);
        let mut footer = Footer {
            header: self.header,
            object_len: (self.out.len() + FOOTER_LEN) as u64,
            frames_len,
            frames: self.frames,
            frames_raw: self.frames_raw,
            records: self.record_count,
            records_codec,
            records_len: records.len() as u64,
            records_raw,
            entries: self.index.len() as u32,
            index_len,
            lsns: self.lsns,
            commit,
            meta_hash: *hasher.finalize().as_bytes(),
            body_hash: *blake3::hash(&self.out).as_bytes(),
            hash: SegmentHash::default(),
        };
        let bytes = footer.encode();
        debug_assert!(bytes.ends_with(&END));
        footer.hash.0.copy_from_slice(&bytes[288..320]);
        self.out.extend_from_slice(&bytes);
        let summary = SegmentSummary { len: self.out.len() as u64, hash: footer.hash, footer };
        Ok((self.out.into_bytes(), summary))
    }
}
