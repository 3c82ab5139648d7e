//! Values of the local tables: frames, segments, cursors, cached blocks.
//!
//! Owns their byte form. They are never shipped, and all but the segment table's staging facts can be derived again.

use bytes::Bytes;

use super::codec::{Decoder, FormatError};
use super::tables::BlockEntry;
use crate::ids::{Epoch, Lsn, SegmentNo};

/// Value of the frame table: the frame that all blocks of one content share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameValue {
    /// Hash and place.
    pub entry: BlockEntry,
    /// Blocks that use it.
    pub uses: u64,
}

impl FrameValue {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(BlockEntry::LEN + 8);
        self.entry.encode_into(&mut o);
        o.extend_from_slice(&self.uses.to_le_bytes());
        o.into()
    }

    /// Reads a value of the frame table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("frame entry", bytes);
        let value = Self { entry: BlockEntry::decode_from(&mut d)?, uses: d.u64()? };
        d.finish()?;
        Ok(value)
    }
}

/// Value of the segment table: what is known of a sealed segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentValue {
    /// Its epoch.
    pub epoch: Epoch,
    /// Bytes of the object.
    pub len: u64,
    /// Hash of the segment (see `SegmentHash`); zeros when a restore did not read it.
    pub blake3: [u8; 32],
    /// The state that this segment completes; 0 when it is not the last of its txg.
    pub commit: Lsn,
    /// When its txg was cut, in seconds since 1970.
    pub cut_at: f64,
    /// Stored bytes of frames that some block still uses.
    pub live: u64,
}

impl SegmentValue {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(72);
        o.extend_from_slice(&self.epoch.0.to_le_bytes());
        o.extend_from_slice(&self.len.to_le_bytes());
        o.extend_from_slice(&self.blake3);
        o.extend_from_slice(&self.commit.0.to_le_bytes());
        o.extend_from_slice(&self.cut_at.to_bits().to_le_bytes());
        o.extend_from_slice(&self.live.to_le_bytes());
        o.into()
    }

    /// Reads a value of the segment table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("segment entry", bytes);
        let value = Self {
            epoch: Epoch(d.u32()?),
            len: d.u64()?,
            blake3: d.array()?,
            commit: Lsn(d.u64()?),
            cut_at: f64::from_bits(d.u64()?),
            live: d.u64()?,
        };
        d.finish()?;
        Ok(value)
    }
}

/// Value of the cached-block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedValue {
    /// Slot number.
    pub slot: u32,
    /// Raw length in bytes.
    pub len: u32,
}

impl CachedValue {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(8);
        o.extend_from_slice(&self.slot.to_le_bytes());
        o.extend_from_slice(&self.len.to_le_bytes());
        o.into()
    }

    /// Reads a value of the cached-block table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("cached block", bytes);
        let value = Self { slot: d.u32()?, len: d.u32()? };
        d.finish()?;
        Ok(value)
    }
}

/// Value of the patch table: bytes of a dirty block's slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchValue {
    /// Where in the slot they begin.
    pub start: u32,
    /// The bytes.
    pub bytes: Bytes,
}

impl PatchValue {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(4 + self.bytes.len());
        o.extend_from_slice(&self.start.to_le_bytes());
        o.extend_from_slice(&self.bytes);
        o.into()
    }

    /// Reads a value of the patch table, of a block of at most `block_size` bytes.
    pub fn decode(bytes: &[u8], block_size: u32) -> Result<Self, FormatError> {
        let mut d = Decoder::new("patch", bytes);
        let start = d.u32()?;
        let bytes = Bytes::copy_from_slice(d.rest());
        match u64::from(start) + bytes.len() as u64 > u64::from(block_size) {
            true => Err(d.error(format!("{} bytes at {start} do not fit a block", bytes.len()))),
            false => Ok(Self { start, bytes }),
        }
    }
}

/// Local setting: how far the log is sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SealedMark {
    /// Every record up to here is in a segment.
    pub lsn: Lsn,
    /// The newest segment.
    pub segment: SegmentNo,
    /// Its hash, for the next one's header.
    pub blake3: [u8; 32],
    /// The newest checkpoint's segment number.
    pub checkpoint: SegmentNo,
    /// Bytes of records and index in segments since that checkpoint.
    pub log_bytes: u64,
}

/// Name of the [`SealedMark`] in the local table.
pub const SEALED_MARK: &str = "sealed";

impl SealedMark {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(64);
        o.extend_from_slice(&self.lsn.0.to_le_bytes());
        o.extend_from_slice(&self.segment.0.to_le_bytes());
        o.extend_from_slice(&self.blake3);
        o.extend_from_slice(&self.checkpoint.0.to_le_bytes());
        o.extend_from_slice(&self.log_bytes.to_le_bytes());
        o.into()
    }

    /// Reads the local setting.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("sealed mark", bytes);
        let value = Self {
            lsn: Lsn(d.u64()?),
            segment: SegmentNo(d.u64()?),
            blake3: d.array()?,
            checkpoint: SegmentNo(d.u64()?),
            log_bytes: d.u64()?,
        };
        d.finish()?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_values_round_trip() {
        let s =
            SegmentValue { epoch: Epoch(2), len: 3, blake3: [4; 32], commit: Lsn(5), cut_at: 6.5, live: 7 };
        assert_eq!(SegmentValue::decode(&s.encode()), Ok(s));
        let m = SealedMark {
            lsn: Lsn(1),
            segment: SegmentNo(2),
            blake3: [3; 32],
            checkpoint: SegmentNo(4),
            log_bytes: 5,
        };
        assert_eq!(SealedMark::decode(&m.encode()), Ok(m));
        let c = CachedValue { slot: 1, len: 2 };
        assert_eq!(CachedValue::decode(&c.encode()), Ok(c));
        assert!(CachedValue::decode(&[0; 7]).is_err());
        let p = PatchValue { start: 96, bytes: Bytes::from_static(b"abcd") };
        assert_eq!(PatchValue::decode(&p.encode(), 100), Ok(p.clone()));
        assert!(PatchValue::decode(&p.encode(), 99).is_err());
        assert!(PatchValue::decode(&[0; 3], 100).is_err());
    }
}
