//! The frame: the stored form of one block's bytes.
//!
//! Owns the frame header and the choice whether compression pays. Knows no segment.
//!
//! ```text
//! offset length
//!      0      4  magic "MFFR"
//!      4      1  version 1
//!      5      1  codec: 0 raw, 1 zstd
//!      6      1  encryption: 0 none
//!      7      1  0
//!      8      4  raw length, at most 16 MiB
//!     12      4  payload length
//!     16      4  CRC-32 of bytes 0 to 15
//!     20      …  payload
//! ```
//!
//! All integers are little-endian. The payload has no checksum of its own: the raw bytes are checked against the
//! BLAKE3 hash under which the block is known.

use bytes::Bytes;

use super::codec::{Decoder, FormatError};
use super::limits::is_plausible;
use super::tables::BlockEntry;
use super::volume::MAX_BLOCK_SIZE;
use crate::ids::BlockHash;

/// Bytes before a frame's payload.
pub const HEADER_LEN: usize = 20;
/// Largest raw length of a frame.
pub const MAX_RAW: usize = MAX_BLOCK_SIZE as usize;
/// Largest stored length of a frame: compression that does not shrink is never kept.
pub const MAX_STORED: usize = MAX_RAW + HEADER_LEN;

const MAGIC: [u8; 4] = *b"MFFR";
const VERSION: u8 = 1;
const WHAT: &str = "frame";

/// How bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    /// Reads a codec's number.
    pub fn from_byte(what: &'static str, byte: u8) -> Result<Self, FormatError> {
        match byte {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Zstd),
            other => Err(FormatError::newer(what, format_args!("codec {other}"), "codecs 0 and 1")),
        }
    }
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// How the payload is stored.
    pub codec: Codec,
    /// Length of the content.
    pub raw_len: u32,
    /// Length of the payload.
    pub payload_len: u32,
}

impl FrameHeader {
    /// Reads the header at the front of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new(WHAT, bytes);
        let header = d.bytes(HEADER_LEN)?;
        let mut d = Decoder::new(WHAT, header);
        if d.array()? != MAGIC {
            return Err(d.error("no frame begins here"));
        }
        let (version, codec, encryption, _) = (d.u8()?, d.u8()?, d.u8()?, d.u8()?);
        let (raw_len, payload_len) = (d.u32()?, d.u32()?);
        if d.u32()? != crc32fast::hash(&header[..HEADER_LEN - 4]) {
            return Err(d.error("its header is damaged"));
        }
        if version != VERSION {
            return Err(FormatError::newer(WHAT, version, VERSION));
        }
        if encryption != 0 {
            return Err(FormatError::newer(WHAT, format_args!("encryption {encryption}"), "no encryption"));
        }
        let codec = Codec::from_byte(WHAT, codec)?;
        let header = Self { codec, raw_len, payload_len };
        if raw_len as usize > MAX_RAW || payload_len > raw_len {
            return Err(d.error(format!("impossible lengths {raw_len} and {payload_len}")));
        }
        if codec == Codec::Raw && payload_len != raw_len {
            return Err(d.error(format!("{payload_len} stored bytes for {raw_len} raw ones")));
        }
        Ok(header)
    }

    /// The header's bytes.
    pub(super) fn encode(self) -> [u8; HEADER_LEN] {
        let mut o = [0; HEADER_LEN];
        o[..4].copy_from_slice(&MAGIC);
        o[4] = VERSION;
        o[5] = self.codec as u8;
        o[8..12].copy_from_slice(&self.raw_len.to_le_bytes());
        o[12..16].copy_from_slice(&self.payload_len.to_le_bytes());
        let crc = crc32fast::hash(&o[..16]);
        o[16..].copy_from_slice(&crc.to_le_bytes());
        o
    }
}

/// A frame's bytes and what its [`super::tables::FrameLoc`] needs of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// The same in words.
    pub header: FrameHeader,
}

/// Turns raw blocks into frames; keeps its compressor's memory between blocks.
pub struct FrameEncoder {
    compressor: Option<Compressors>,
}

struct Compressors {
    full: zstd::bulk::Compressor<'static>,
    trial: zstd::bulk::Compressor<'static>,
}

/// Below this length nothing is compressed.
const MIN_COMPRESS: usize = 64;
/// From this length on a sample decides whether compressing is tried at all.
const MIN_SAMPLED: usize = 64 << 10;
const SAMPLE: usize = 4 << 10;
const SAMPLES: usize = 4;

/// Whether `stored` bytes instead of `raw` ones are worth a decompression: at least 3 % less.
fn pays(raw: usize, stored: usize) -> bool {
    stored + raw.div_ceil(32) <= raw
}

impl FrameEncoder {
    /// An encoder for zstd at `level`; level 0 never compresses.
    pub fn new(level: i32) -> Result<Self, FormatError> {
        let compressor = |level| {
            zstd::bulk::Compressor::new(level).map_err(|e| FormatError::new(WHAT, format!("zstd: {e}")))
        };
        let compressor = match level {
            0 => None,
            _ => Some(Compressors { full: compressor(level)?, trial: compressor(1)? }),
        };
        Ok(Self { compressor })
    }

    /// The frame of `raw`. Compression is skipped when a sample of the content promises nothing, and not kept when
    /// it saves less than 3 %.
    pub fn encode(&mut self, raw: &[u8]) -> Result<Frame, FormatError> {
        let packed = self.pack(raw)?;
        let header = packed.header(raw);
        let payload = packed.payload(raw);
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(payload);
        Ok(Frame { bytes, header })
    }

    /// What [`FrameEncoder::encode`] would store of `raw`, without a copy of what is stored as it is.
    pub fn pack(&mut self, raw: &[u8]) -> Result<Packed, FormatError> {
        if raw.len() > MAX_RAW {
            return Err(FormatError::new(WHAT, format!("{} bytes are too many for a block", raw.len())));
        }
        Ok(Packed(self.compress(raw)?))
    }

    fn compress(&mut self, raw: &[u8]) -> Result<Option<Vec<u8>>, FormatError> {
        let Some(c) = self.compressor.as_mut().filter(|_| raw.len() >= MIN_COMPRESS) else {
            return Ok(None);
        };
        let failed = |e: std::io::Error| FormatError::new(WHAT, format!("zstd: {e}"));
        if raw.len() >= MIN_SAMPLED {
            let mut sample = Vec::with_capacity(SAMPLE * SAMPLES);
            for i in 0..SAMPLES {
                let at = (raw.len() - SAMPLE) / (SAMPLES - 1) * i;
                sample.extend_from_slice(&raw[at..at + SAMPLE]);
            }
            if !pays(sample.len(), c.trial.compress(&sample).map_err(failed)?.len()) {
                return Ok(None);
            }
        }
        let payload = c.full.compress(raw).map_err(failed)?;
        Ok(pays(raw.len(), payload.len()).then_some(payload))
    }
}

/// How a block's content is stored: compressed, or as it is.
#[derive(Debug, Default)]
pub struct Packed(Option<Vec<u8>>);

impl Packed {
    /// The frame's header, for the content that was packed.
    #[must_use]
    pub fn header(&self, raw: &[u8]) -> FrameHeader {
        let codec = if self.0.is_some() { Codec::Zstd } else { Codec::Raw };
        FrameHeader { codec, raw_len: raw.len() as u32, payload_len: self.payload(raw).len() as u32 }
    }

    /// The frame's payload.
    #[must_use]
    pub fn payload<'a>(&'a self, raw: &'a [u8]) -> &'a [u8] {
        self.0.as_deref().unwrap_or(raw)
    }
}

/// The frame of one block; see [`FrameEncoder`] for many.
pub fn encode(raw: &[u8], level: i32) -> Result<Frame, FormatError> {
    FrameEncoder::new(level)?.encode(raw)
}

/// The content of a frame (`stored` is exactly one frame), checked against the hash under which it is known. Allocates
/// no more than the raw length, which is at most [`MAX_RAW`].
pub fn decode(stored: &[u8], expected: &BlockHash) -> Result<Bytes, FormatError> {
    decode_shared(&Bytes::copy_from_slice(stored), expected)
}

/// As [`decode`]; what was stored as it is shares the memory of `stored`.
fn decode_shared(stored: &Bytes, expected: &BlockHash) -> Result<Bytes, FormatError> {
    let raw = decode_unverified(stored)?;
    let found = BlockHash::of(&raw);
    if found != *expected {
        return Err(FormatError::new(WHAT, format!("content has hash {found}, not {expected}")));
    }
    Ok(raw)
}

/// The content of the block that `entry` describes, out of the bytes that lie at its place.
pub fn decode_entry(stored: &[u8], entry: &BlockEntry) -> Result<Bytes, FormatError> {
    decode_entry_shared(&Bytes::copy_from_slice(stored), entry)
}

/// As [`decode_entry`]; what was stored as it is shares the memory of `stored`.
pub fn decode_entry_shared(stored: &Bytes, entry: &BlockEntry) -> Result<Bytes, FormatError> {
    if entry.is_without_content() {
        return Err(FormatError::new(WHAT, "a part of this block's content was lost before it was stored"));
    }
    let header = FrameHeader::decode(stored)?;
    if header.raw_len != entry.loc.raw_len {
        return Err(FormatError::new(
            WHAT,
            format!("{} bytes of content, {} expected", header.raw_len, entry.loc.raw_len),
        ));
    }
    decode_shared(stored, &entry.hash)
}

fn decode_unverified(stored: &Bytes) -> Result<Bytes, FormatError> {
    let header = FrameHeader::decode(stored)?;
    let payload = stored.slice(HEADER_LEN..);
    if payload.len() != header.payload_len as usize {
        return Err(FormatError::new(
            WHAT,
            format!("{} bytes of payload, {} expected", payload.len(), header.payload_len),
        ));
    }
    if header.codec == Codec::Raw {
        return Ok(payload);
    }
    // Unpacks straight into memory of the promised length: what is longer is an error, and no
    // window is kept.
    let raw_len = header.raw_len as usize;
    let raw = zstd::bulk::decompress(&payload, raw_len)
        .map_err(|e| FormatError::new(WHAT, format!("its compressed bytes are damaged: {e}")))?;
    if raw.len() != raw_len {
        return Err(FormatError::new(WHAT, format!("{} bytes of content, {raw_len} expected", raw.len())));
    }
    Ok(raw.into())
}

/// Compresses a section of `ops` entries when that pays, and a reader takes it.
pub(super) fn pack(
    what: &'static str,
    raw: Vec<u8>,
    ops: u64,
    level: i32,
) -> Result<(Codec, Vec<u8>), FormatError> {
    if raw.len() >= MIN_PACK {
        let small =
            zstd::bulk::compress(&raw, level).map_err(|e| FormatError::new(what, format!("zstd: {e}")))?;
        if pays(raw.len(), small.len()) && is_plausible(small.len() as u64, raw.len() as u64, ops) {
            return Ok((Codec::Zstd, small));
        }
    }
    Ok((Codec::Raw, raw))
}

/// Sections below this length are not compressed.
const MIN_PACK: usize = 256;

#[cfg(test)]
mod tests {
    use rand::{Rng, RngCore, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| b"the quick brown fox "[i % 20]).collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut out);
        out
    }

    #[test]
    fn content_round_trips() {
        for raw in [vec![], vec![9], text(63), text(300), text(1 << 20), noise(300), noise(1 << 20)] {
            for level in [0, 1, 3] {
                let frame = encode(&raw, level).unwrap();
                assert_eq!(FrameHeader::decode(&frame.bytes), Ok(frame.header));
                assert_eq!(decode(&frame.bytes, &BlockHash::of(&raw)).unwrap(), raw);
                assert!(frame.bytes.len() <= raw.len() + HEADER_LEN);
            }
        }
    }

    #[test]
    fn compresses_only_what_pays() {
        assert_eq!(encode(&text(1 << 20), 3).unwrap().header.codec, Codec::Zstd);
        assert_eq!(encode(&text(1 << 20), 0).unwrap().header.codec, Codec::Raw);
        assert_eq!(encode(&noise(1 << 20), 3).unwrap().header.codec, Codec::Raw);
        // The sample misses the compressible part, or the gain is below 3 %.
        let mut mixed = noise(1 << 20);
        mixed[100_000..101_000].fill(0);
        assert_eq!(encode(&mixed, 3).unwrap().header.codec, Codec::Raw);
        assert!(encode(&vec![0; MAX_RAW + 1], 3).is_err());
        assert!(encode(&vec![0; MAX_RAW], 3).unwrap().bytes.len() < 4096);
    }

    #[test]
    fn damage_is_refused_or_harmless() {
        for raw in [text(5000), noise(200)] {
            let (frame, hash) = (encode(&raw, 3).unwrap().bytes, BlockHash::of(&raw));
            for cut in 0..frame.len() {
                assert!(decode(&frame[..cut], &hash).is_err(), "cut at {cut}");
            }
            for bit in 0..frame.len() * 8 {
                let mut bad = frame.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                if let Ok(got) = decode(&bad, &hash) {
                    assert_eq!(got, raw, "bit {bit}");
                }
            }
            let mut longer = frame.clone();
            longer.push(0);
            assert!(decode(&longer, &hash).is_err());
            assert!(decode(&frame, &BlockHash([0; 32])).is_err());
        }
    }

    #[test]
    fn random_headers_never_panic() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..20_000 {
            let mut bytes = vec![0; rng.random_range(0..60)];
            rng.fill_bytes(&mut bytes);
            if bytes.len() >= HEADER_LEN {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4] = VERSION;
                bytes[5] &= 1;
                bytes[6] = 0;
                let crc = crc32fast::hash(&bytes[..16]);
                bytes[16..20].copy_from_slice(&crc.to_le_bytes());
            }
            assert!(decode(&bytes, &BlockHash([1; 32])).is_err());
        }
    }
}
