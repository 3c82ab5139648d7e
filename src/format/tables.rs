//! Keys and values of the metadata tables.
//!
//! Owns the byte form of every key and value in the one ordered key space; a table is a one-byte prefix, integers in
//! keys are big-endian so that ranges scan in order. Knows nothing of where the key space is stored.
//!
//! Table bytes below 0x80 are replicated (shipped inside records); those from 0x80 on are local.

use bytes::Bytes;

use super::codec::{Decoder, FormatError};
use crate::ids::{BlockHash, BlockId, Epoch, Ino, SegmentNo};

/// One-byte table prefixes.
pub mod table {
    /// Settings and counters of the volume: name -> bytes.
    pub const VOLUME: u8 = 0x01;
    /// ino -> [`super::Inode`].
    pub const INODE: u8 = 0x02;
    /// parent ino, hash of the name, name -> [`super::Dirent`].
    pub const DIRENT: u8 = 0x03;
    /// ino, name -> bytes.
    pub const XATTR: u8 = 0x04;
    /// ino, chunk index -> [`super::Extents`].
    pub const EXTENT: u8 = 0x05;
    /// BlockId -> [`super::BlockEntry`]. Not shipped as a record's put: the segment's index carries it.
    pub const BLOCK: u8 = 0x06;
    /// BlockId -> references beyond the first (u64), present only when there are any.
    pub const BLOCK_REFS: u8 = 0x07;
    /// ino -> nothing: unlinked while open, or being deleted in steps.
    pub const ORPHAN: u8 = 0x08;
    /// name -> a named past of the volume (LSN, time).
    pub const SNAPSHOT: u8 = 0x09;
    /// First byte that is local: never shipped, never in a checkpoint.
    pub const FIRST_LOCAL: u8 = 0x80;
    /// Local: BlockId -> a block that no segment holds yet.
    pub const DIRTY: u8 = 0x81;
    /// Local, derived: hash -> the frame that blocks of this content share.
    pub const FRAME: u8 = 0x82;
    /// Local: segment number -> what is known of a sealed segment.
    pub const SEGMENT: u8 = 0x83;
    /// Local: replica name and URL -> cursor.
    pub const CURSOR: u8 = 0x84;
    /// Local: hash -> slot of a clean cached block.
    pub const CACHED: u8 = 0x85;
    /// Local: name -> bytes, the daemon's own settings (the sealed mark).
    pub const LOCAL: u8 = 0x86;
    /// Local: BlockId, number -> bytes of a dirty block's slot, written over it by an open.
    pub const PATCH: u8 = 0x87;
}

/// Whether changes of `key` are shipped to replicas as part of a record.
#[must_use]
pub fn is_replicated(key: &[u8]) -> bool {
    key.first().is_some_and(|t| *t < table::FIRST_LOCAL)
}

fn key_u64(table: u8, n: u64) -> Bytes {
    let mut k = Vec::with_capacity(9);
    k.push(table);
    k.extend_from_slice(&n.to_be_bytes());
    k.into()
}

fn key_u64_bytes(table: u8, n: u64, tail: &[u8]) -> Bytes {
    let mut k = Vec::with_capacity(9 + tail.len());
    k.push(table);
    k.extend_from_slice(&n.to_be_bytes());
    k.extend_from_slice(tail);
    k.into()
}

fn key_bytes(table: u8, tail: &[u8]) -> Bytes {
    let mut k = Vec::with_capacity(1 + tail.len());
    k.push(table);
    k.extend_from_slice(tail);
    k.into()
}

/// Key of a volume setting or counter.
#[must_use]
pub fn volume_key(name: &str) -> Bytes {
    key_bytes(table::VOLUME, name.as_bytes())
}

/// Key of an inode.
#[must_use]
pub fn inode_key(ino: Ino) -> Bytes {
    key_u64(table::INODE, ino.0)
}

/// Key of an orphan mark.
#[must_use]
pub fn orphan_key(ino: Ino) -> Bytes {
    key_u64(table::ORPHAN, ino.0)
}

/// Key of an extended attribute.
#[must_use]
pub fn xattr_key(ino: Ino, name: &[u8]) -> Bytes {
    key_u64_bytes(table::XATTR, ino.0, name)
}

/// Key of a chunk of [`BLOCKS_PER_CHUNK`] blocks of a file.
#[must_use]
pub fn extent_key(ino: Ino, chunk: u64) -> Bytes {
    key_u64_bytes(table::EXTENT, ino.0, &chunk.to_be_bytes())
}

/// The chunk index out of an extent key.
#[must_use]
pub fn chunk_of_extent_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(9..17)?.try_into().ok()?))
}

/// The u64 that follows the table byte (an ino, a BlockId or a segment number).
#[must_use]
pub fn number_of_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..9)?.try_into().ok()?))
}

/// Key of a sealed block's entry.
#[must_use]
pub fn block_key(id: BlockId) -> Bytes {
    key_u64(table::BLOCK, id.0)
}

/// Key of a block's count of further references.
#[must_use]
pub fn block_refs_key(id: BlockId) -> Bytes {
    key_u64(table::BLOCK_REFS, id.0)
}

/// Local key of a dirty block.
#[must_use]
pub fn dirty_key(id: BlockId) -> Bytes {
    key_u64(table::DIRTY, id.0)
}

/// Local key of a dirty block's patch.
#[must_use]
pub fn patch_key(id: BlockId, number: u32) -> Bytes {
    key_u64_bytes(table::PATCH, id.0, &number.to_be_bytes())
}

/// The number out of a patch's key.
#[must_use]
pub fn number_of_patch_key(key: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(key.get(9..13)?.try_into().ok()?))
}

/// Local key of a frame.
#[must_use]
pub fn frame_key(hash: &BlockHash) -> Bytes {
    key_bytes(table::FRAME, &hash.0)
}

/// Local key of a sealed segment.
#[must_use]
pub fn segment_key(number: SegmentNo) -> Bytes {
    key_u64(table::SEGMENT, number.0)
}

/// Local key of a replica's cursor.
#[must_use]
pub fn cursor_key(replica: &str) -> Bytes {
    key_bytes(table::CURSOR, replica.as_bytes())
}

/// Local key of a clean cached block.
#[must_use]
pub fn cached_key(hash: &BlockHash) -> Bytes {
    key_bytes(table::CACHED, &hash.0)
}

/// Local key of one of the daemon's own settings.
#[must_use]
pub fn local_key(name: &str) -> Bytes {
    key_bytes(table::LOCAL, name.as_bytes())
}

/// The range `[start, end)` of keys that begin with `prefix`.
#[must_use]
pub fn prefix_range(prefix: &[u8]) -> (Bytes, Bytes) {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last == 0xff {
            end.pop();
        } else {
            *last += 1;
            break;
        }
    }
    (Bytes::copy_from_slice(prefix), end.into())
}

/// Offset cookies below this one are `.` and `..`.
pub const FIRST_NAME_COOKIE: u64 = 3;

/// The place of a name in its directory's order, which is also its readdir cookie: the first 63 bits of the name's
/// BLAKE3 hash, never below [`FIRST_NAME_COOKIE`]. It depends on the name only, so a position stays valid whatever is
/// created or removed around it.
#[must_use]
pub fn name_cookie(name: &[u8]) -> u64 {
    let hash = blake3::hash(name);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    (u64::from_be_bytes(first) >> 1).max(FIRST_NAME_COOKIE)
}

/// Key of a directory entry.
#[must_use]
pub fn dirent_key(parent: Ino, name: &[u8]) -> Bytes {
    let mut k = Vec::with_capacity(17 + name.len());
    k.push(table::DIRENT);
    k.extend_from_slice(&parent.0.to_be_bytes());
    k.extend_from_slice(&name_cookie(name).to_be_bytes());
    k.extend_from_slice(name);
    k.into()
}

/// Key range of a directory's entries whose cookie is above `after`.
#[must_use]
pub fn dirent_range(parent: Ino, after: u64) -> (Bytes, Bytes) {
    let start = key_u64_bytes(table::DIRENT, parent.0, &after.saturating_add(1).to_be_bytes());
    (start, key_u64(table::DIRENT, parent.0.saturating_add(1)))
}

/// Cookie and name out of a directory entry's key.
#[must_use]
pub fn split_dirent_key(key: &[u8]) -> Option<(u64, &[u8])> {
    let cookie = u64::from_be_bytes(key.get(9..17)?.try_into().ok()?);
    Some((cookie, key.get(17..)?))
}

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

    #[test]
    fn ranges_cover_exactly_their_keys() {
        let (start, end) = dirent_range(Ino(5), 0);
        let key = dirent_key(Ino(5), b"name");
        assert!(start <= key && key < end);
        assert!(dirent_key(Ino(6), b"name") >= end);
        assert!(dirent_key(Ino(4), b"name") < start);
        let (cookie, name) = split_dirent_key(&key).unwrap();
        assert_eq!((cookie, name), (name_cookie(b"name"), &b"name"[..]));
        let (start, _) = dirent_range(Ino(5), cookie);
        assert!(key < start);
        let (s, e) = prefix_range(&[3, 0xff]);
        assert_eq!((&s[..], &e[..]), (&[3, 0xff][..], &[4][..]));
    }

    #[test]
    fn only_low_tables_are_replicated() {
        assert!(is_replicated(&inode_key(Ino(1))));
        assert!(!is_replicated(&dirty_key(BlockId(1))));
        assert!(!is_replicated(b""));
    }
}
