//! Keys and values of the metadata tables.
//!
//! Owns the byte form of every value that is replicated; that of the keys is in `keys`. Knows nothing of where the key space is stored.

mod keys;

use bytes::Bytes;

use super::codec::{Decoder, FormatError};
use crate::ids::{BlockHash, BlockId, Epoch, Ino, SegmentNo};

pub use self::keys::*;

/// The kind of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FileKind {
    /// A regular file.
    Regular = 1,
    /// A directory.
    Directory = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A named pipe.
    Fifo = 4,
    /// A socket.
    Socket = 5,
    /// A character device.
    CharDevice = 6,
    /// A block device.
    BlockDevice = 7,
}

impl FileKind {
    pub(super) fn from_byte(b: u8) -> Option<Self> {
        Some(match b {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::Symlink,
            4 => Self::Fifo,
            5 => Self::Socket,
            6 => Self::CharDevice,
            7 => Self::BlockDevice,
            _ => return None,
        })
    }
}

/// A moment: seconds since 1970 (negative before) and nanoseconds (0 to 999,999,999).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Whole seconds, rounded towards the past.
    pub secs: i64,
    /// Nanoseconds on top.
    pub nanos: u32,
}

/// What an inode holds beside its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing, or content in blocks.
    Blocks,
    /// The whole content of a small file; at most [`INLINE_MAX`] bytes, ends at the last byte ever written (bytes
    /// from there to the size read as zeros).
    Inline(Bytes),
    /// A symbolic link's target.
    Target(Bytes),
}

/// Largest content kept inside an inode, in bytes.
pub const INLINE_MAX: usize = 4096;

/// Value of the inode table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Kind of file.
    pub kind: FileKind,
    /// Permission bits, 12 of them (with set-uid, set-gid, sticky).
    pub perm: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead here; for a directory 2 + its subdirectories.
    pub nlink: u32,
    /// Device number of a device node.
    pub rdev: u32,
    /// Size in bytes; 0 for a directory.
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of content.
    pub mtime: Time,
    /// Last change of anything.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Distinguishes successive uses of an inode number (never reused today, so always 1).
    pub generation: u32,
    /// Reserved: 0.
    pub flags: u32,
    /// For a directory its parent (`..`); else 0.
    pub parent: Ino,
    /// Content that lives in the inode itself.
    pub body: Body,
}

const INODE_VERSION: u8 = 1;

fn put_time(out: &mut Vec<u8>, t: Time) {
    out.extend_from_slice(&t.secs.to_le_bytes());
    out.extend_from_slice(&t.nanos.to_le_bytes());
}

fn get_time(d: &mut Decoder<'_>) -> Result<Time, FormatError> {
    let t = Time { secs: d.i64()?, nanos: d.u32()? };
    if t.nanos > 999_999_999 {
        return Err(d.error(format!("{} nanoseconds", t.nanos)));
    }
    Ok(t)
}

impl Inode {
    /// A new one with one name, made `now`, and nothing in it yet. What its kind asks for besides (a parent, a target, a device) is still
    /// to be set.
    #[must_use]
    pub fn new(kind: FileKind, perm: u16, (uid, gid): (u32, u32), now: Time) -> Self {
        Self {
            kind,
            perm,
            uid,
            gid,
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            generation: 1,
            flags: 0,
            parent: Ino(0),
            body: Body::Blocks,
        }
    }

    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(120);
        o.push(INODE_VERSION);
        o.push(self.kind as u8);
        o.extend_from_slice(&self.perm.to_le_bytes());
        o.extend_from_slice(&self.uid.to_le_bytes());
        o.extend_from_slice(&self.gid.to_le_bytes());
        o.extend_from_slice(&self.nlink.to_le_bytes());
        o.extend_from_slice(&self.rdev.to_le_bytes());
        o.extend_from_slice(&self.size.to_le_bytes());
        o.extend_from_slice(&self.blocks.to_le_bytes());
        for t in [self.atime, self.mtime, self.ctime, self.btime] {
            put_time(&mut o, t);
        }
        o.extend_from_slice(&self.generation.to_le_bytes());
        o.extend_from_slice(&self.flags.to_le_bytes());
        o.extend_from_slice(&self.parent.0.to_le_bytes());
        match &self.body {
            Body::Blocks => o.push(0),
            Body::Inline(b) => {
                o.push(1);
                o.extend_from_slice(b);
            }
            Body::Target(b) => {
                o.push(2);
                o.extend_from_slice(b);
            }
        }
        o.into()
    }

    /// Reads a value of the inode table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (inode, held) = Self::decode_head(bytes)?;
        let body = match held {
            Held::Nothing => Body::Blocks,
            Held::Inline(b) => Body::Inline(Bytes::copy_from_slice(b)),
            Held::Target(b) => Body::Target(Bytes::copy_from_slice(b)),
        };
        Ok(Self { body, ..inode })
    }

    /// The attributes (with [`Body::Blocks`]), and apart from them what the inode holds, where it lies.
    pub(super) fn decode_head(bytes: &[u8]) -> Result<(Self, Held<'_>), FormatError> {
        let mut d = Decoder::new("inode", bytes);
        let version = d.u8()?;
        if version != INODE_VERSION {
            return Err(d.error(format!("unknown version {version}")));
        }
        let kind = d.u8()?;
        let kind = FileKind::from_byte(kind).ok_or_else(|| d.error(format!("unknown kind {kind}")))?;
        let inode = Self {
            kind,
            perm: d.u16()?,
            uid: d.u32()?,
            gid: d.u32()?,
            nlink: d.u32()?,
            rdev: d.u32()?,
            size: d.u64()?,
            blocks: d.u64()?,
            atime: get_time(&mut d)?,
            mtime: get_time(&mut d)?,
            ctime: get_time(&mut d)?,
            btime: get_time(&mut d)?,
            generation: d.u32()?,
            flags: d.u32()?,
            parent: Ino(d.u64()?),
            body: Body::Blocks,
        };
        let held = match d.u8()? {
            0 => {
                let extra = d.remaining();
                if extra != 0 {
                    return Err(d.error(format!("{extra} bytes too many")));
                }
                Held::Nothing
            }
            1 => Held::Inline(d.rest()),
            2 => Held::Target(d.rest()),
            other => return Err(d.error(format!("unknown body {other}"))),
        };
        Ok((inode, held))
    }
}

/// What an inode holds, in the bytes of its value.
pub(super) enum Held<'a> {
    Nothing,
    Inline(&'a [u8]),
    Target(&'a [u8]),
}

impl Held<'_> {
    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Held::Nothing => 0,
            Held::Inline(b) | Held::Target(b) => b.len(),
        }
    }
}

/// Value of the dirent table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Where the name leads.
    pub ino: Ino,
    /// Its kind, so that readdir need not read the inode.
    pub kind: FileKind,
}

impl Dirent {
    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(9);
        o.extend_from_slice(&self.ino.0.to_le_bytes());
        o.push(self.kind as u8);
        o.into()
    }

    /// Reads a value of the dirent table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("directory entry", bytes);
        let ino = Ino(d.u64()?);
        let kind = d.u8()?;
        let kind = FileKind::from_byte(kind).ok_or_else(|| d.error(format!("unknown kind {kind}")))?;
        d.finish()?;
        Ok(Self { ino, kind })
    }
}

/// Blocks in one value of the extent table.
pub const BLOCKS_PER_CHUNK: u64 = 64;

/// Value of the extent table: the blocks of one stretch of [`BLOCKS_PER_CHUNK`] blocks; holes are `BlockId(0)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents(pub [BlockId; BLOCKS_PER_CHUNK as usize]);

impl Default for Extents {
    fn default() -> Self {
        Self([BlockId(0); BLOCKS_PER_CHUNK as usize])
    }
}

impl Extents {
    /// Whether there is no block at all (then the key is deleted, not stored).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|b| b.0 == 0)
    }

    /// The value's bytes: a bitmap (u64) of which blocks are there, then their ids (u64 each).
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut map = 0u64;
        let mut o = vec![0; 8];
        for (i, id) in self.0.iter().enumerate() {
            if id.0 != 0 {
                map |= 1 << i;
                o.extend_from_slice(&id.0.to_le_bytes());
            }
        }
        o[..8].copy_from_slice(&map.to_le_bytes());
        o.into()
    }

    /// Reads a value of the extent table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("extent", bytes);
        let map = d.u64()?;
        let mut out = Self::default();
        for (i, slot) in out.0.iter_mut().enumerate() {
            if map & (1 << i) != 0 {
                *slot = BlockId(d.u64()?);
                if slot.0 == 0 {
                    return Err(d.error("block number 0"));
                }
            }
        }
        d.finish()?;
        Ok(out)
    }
}

/// Where a frame lies: in which segment, at which place, and how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameLoc {
    /// Segment that holds the frame.
    pub segment: SegmentNo,
    /// Epoch of that segment.
    pub epoch: Epoch,
    /// Offset of the frame's first byte in the segment object.
    pub offset: u64,
    /// Stored length in bytes, frame header included.
    pub stored_len: u32,
    /// Raw length in bytes.
    pub raw_len: u32,
    /// How the bytes are stored; the numbers are those of `format::frame::Codec`, or [`NO_CONTENT`].
    pub codec: u8,
}

/// Codec of an entry that stands for lost content: of such a block only a part could be had when it was sealed, so no
/// frame holds it. Its place is that of the damaged frame below; reading it is an error, whatever lies there.
pub const NO_CONTENT: u8 = 255;

/// Value of the block table: what a sealed block contains and where its frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockEntry {
    /// Hash of the raw content.
    pub hash: BlockHash,
    /// The frame.
    pub loc: FrameLoc,
}

impl BlockEntry {
    /// The entry of block `id`, `len` bytes long, whose content cannot be completed because `below` is lost. Its hash is
    /// that of no content (it is made of the number), so that it never resolves to what the damaged frame once held, nor to
    /// zeros behind that.
    #[must_use]
    pub fn without_content(id: BlockId, len: u32, below: &Self) -> Self {
        let mut name = b"mirrorfs block without content".to_vec();
        name.extend_from_slice(&id.0.to_le_bytes());
        let loc = FrameLoc { raw_len: len, codec: NO_CONTENT, ..below.loc };
        Self { hash: BlockHash(*blake3::hash(&name).as_bytes()), loc }
    }

    /// Whether it stands for lost content.
    #[must_use]
    pub fn is_without_content(&self) -> bool {
        self.loc.codec == NO_CONTENT
    }

    /// Length of the value's bytes.
    pub const LEN: usize = 32 + 8 + 4 + 8 + 4 + 4 + 1;

    /// Appends the value's bytes.
    pub fn encode_into(&self, o: &mut Vec<u8>) {
        o.extend_from_slice(&self.hash.0);
        o.extend_from_slice(&self.loc.segment.0.to_le_bytes());
        o.extend_from_slice(&self.loc.epoch.0.to_le_bytes());
        o.extend_from_slice(&self.loc.offset.to_le_bytes());
        o.extend_from_slice(&self.loc.stored_len.to_le_bytes());
        o.extend_from_slice(&self.loc.raw_len.to_le_bytes());
        o.push(self.loc.codec);
    }

    /// The value's bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut o = Vec::with_capacity(Self::LEN);
        self.encode_into(&mut o);
        o.into()
    }

    /// Reads an entry from the front of `d`.
    pub fn decode_from(d: &mut Decoder<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            hash: BlockHash(d.array()?),
            loc: FrameLoc {
                segment: SegmentNo(d.u64()?),
                epoch: Epoch(d.u32()?),
                offset: d.u64()?,
                stored_len: d.u32()?,
                raw_len: d.u32()?,
                codec: d.u8()?,
            },
        })
    }

    /// Reads a value of the block table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut d = Decoder::new("block entry", bytes);
        let entry = Self::decode_from(&mut d)?;
        d.finish()?;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(body: Body) -> Inode {
        Inode {
            kind: FileKind::Regular,
            perm: 0o4755,
            uid: 1,
            gid: 2,
            nlink: 3,
            rdev: 4,
            size: 5,
            blocks: 8,
            atime: Time { secs: -1, nanos: 999_999_999 },
            mtime: Time { secs: i64::MAX, nanos: 0 },
            ctime: Time { secs: 0, nanos: 1 },
            btime: Time::default(),
            generation: 1,
            flags: 0,
            parent: Ino(0),
            body,
        }
    }

    #[test]
    fn values_round_trip() {
        for body in [
            Body::Blocks,
            Body::Inline(Bytes::from_static(b"abc")),
            Body::Target(Bytes::from_static(b"../x")),
        ] {
            let i = inode(body);
            assert_eq!(Inode::decode(&i.encode()), Ok(i));
        }
        let mut e = Extents::default();
        assert!(e.is_empty());
        e.0[0] = BlockId(7);
        e.0[63] = BlockId(u64::MAX);
        assert_eq!(Extents::decode(&e.encode()), Ok(e));
        let d = Dirent { ino: Ino(9), kind: FileKind::Fifo };
        assert_eq!(Dirent::decode(&d.encode()), Ok(d));
        assert!(Inode::decode(&[]).is_err());
        assert!(Inode::decode(&[9; 130]).is_err());
    }
}
