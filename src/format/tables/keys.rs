//! Keys of the tables.
//!
//! Owns the byte form of every key in the one ordered key space: a table is a one-byte prefix, integers are big-endian so that ranges
//! scan in order.
//!
//! Table bytes below 0x80 are replicated (shipped inside records); those from 0x80 on are local.

use bytes::Bytes;

use crate::ids::{BlockHash, BlockId, Epoch, Ino, SegmentNo};

/// One-byte table prefixes.
pub mod table {
    /// Settings and counters of the volume: name -> bytes.
    pub const VOLUME: u8 = 0x01;
    /// ino -> [`Inode`](super::super::Inode).
    pub const INODE: u8 = 0x02;
    /// parent ino, hash of the name, name -> [`Dirent`](super::super::Dirent).
    pub const DIRENT: u8 = 0x03;
    /// ino, name -> bytes.
    pub const XATTR: u8 = 0x04;
    /// ino, chunk index -> [`Extents`](super::super::Extents).
    pub const EXTENT: u8 = 0x05;
    /// BlockId -> [`BlockEntry`](super::super::BlockEntry). Not shipped as a record's put: the segment's index carries it.
    pub const BLOCK: u8 = 0x06;
    /// BlockId -> references beyond the first (u64), present only when there are any.
    pub const BLOCK_REFS: u8 = 0x07;
    /// ino -> nothing: unlinked while open, or being deleted in steps.
    pub const ORPHAN: u8 = 0x08;
    /// name -> a named past of the volume (LSN, time).
    pub const SNAPSHOT: u8 = 0x09;
    /// Segment number, epoch -> hash of the manifest of a checkpoint that a writer of this volume made.
    pub const CHECKPOINT: u8 = 0x0a;
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

/// Whether `key` is one that a replicated table can have: of a known table, and of that table's
/// form. What it names may still be nonsense.
#[must_use]
pub fn is_well_formed(key: &[u8]) -> bool {
    let Some((table, rest)) = key.split_first() else { return false };
    let len = rest.len();
    match *table {
        table::INODE | table::BLOCK | table::BLOCK_REFS | table::ORPHAN => len == 8,
        table::EXTENT => len == 16,
        table::CHECKPOINT => len == 12,
        table::DIRENT => len > 16,
        table::XATTR => len > 8,
        table::VOLUME | table::SNAPSHOT => len > 0,
        _ => false,
    }
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

/// Key of a chunk of [`BLOCKS_PER_CHUNK`](super::BLOCKS_PER_CHUNK) blocks of a file.
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

/// Key of a checkpoint that the log names; its value is the hash of the manifest.
#[must_use]
pub fn checkpoint_key(number: SegmentNo, epoch: Epoch) -> Bytes {
    key_u64_bytes(table::CHECKPOINT, number.0, &epoch.0.to_be_bytes())
}

/// Number and epoch out of a checkpoint's key.
#[must_use]
pub fn split_checkpoint_key(key: &[u8]) -> Option<(SegmentNo, Epoch)> {
    let (table, rest) = key.split_first()?;
    let (number, epoch) = rest.split_first_chunk::<8>()?;
    let epoch: [u8; 4] = epoch.try_into().ok()?;
    (*table == table::CHECKPOINT)
        .then(|| (SegmentNo(u64::from_be_bytes(*number)), Epoch(u32::from_be_bytes(epoch))))
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn keys_of_other_forms_are_told_apart() {
        let (ino, block) = (Ino(7), BlockId(8));
        for key in [
            volume_key("usage"),
            inode_key(ino),
            dirent_key(ino, b"n"),
            xattr_key(ino, b"user.x"),
            extent_key(ino, 3),
            block_key(block),
            block_refs_key(block),
            orphan_key(ino),
            checkpoint_key(SegmentNo(9), Epoch(10)),
        ] {
            assert!(is_well_formed(&key), "{key:?}");
            for other in [&key[..1], &[0x0a; 9], &[0; 9], &[]] {
                assert!(!is_well_formed(other), "{other:?}");
            }
        }
        assert!(!is_well_formed(&[&inode_key(ino)[..], b"x"].concat()));
        assert!(!is_well_formed(&inode_key(ino)[..8]));
        assert!(!is_well_formed(&dirent_key(ino, b"")));
        assert!(!is_well_formed(&xattr_key(ino, b"")));
        assert!(!is_well_formed(&dirty_key(block)));
    }

    #[test]
    fn only_low_tables_are_replicated() {
        assert!(is_replicated(&inode_key(Ino(1))));
        assert!(!is_replicated(&dirty_key(BlockId(1))));
        assert!(!is_replicated(b""));
    }

    #[test]
    fn a_checkpoint_key_parses_back() {
        let key = checkpoint_key(SegmentNo(7), Epoch(9));
        assert!(is_replicated(&key));
        assert_eq!(split_checkpoint_key(&key), Some((SegmentNo(7), Epoch(9))));
        assert_eq!(split_checkpoint_key(&key[..12]), None);
        assert_eq!(split_checkpoint_key(&segment_key(SegmentNo(7))), None);
    }
}
