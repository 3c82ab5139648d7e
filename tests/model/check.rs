//! Whether tables are consistent in themselves, and whether they say what the reference says.
//!
//! Works on a plain copy of a key space: the local journal's, or one replayed from segments. Every sum is counted anew
//! here, from the tables' format alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use mirrorfs::cache::dirty::DirtyValue;
use mirrorfs::format::local::{CachedValue, FrameValue, SegmentValue};
use mirrorfs::format::tables::{
    self, BLOCKS_PER_CHUNK, BlockEntry, Body as TableBody, Dirent, Extents, FileKind, Inode, number_of_key,
    split_dirent_key, table,
};
use mirrorfs::fsck::{Input, Source, Stop};
use mirrorfs::ids::{BlockHash, BlockId, Ino, Lsn, SegmentNo};
use mirrorfs::journal::Journal;

use crate::reference::{Body, Meta, Model};

pub type Tables = BTreeMap<Bytes, Bytes>;

/// A copy of everything in a journal.
pub fn dump(journal: &Journal) -> Tables {
    let mut out = Tables::new();
    let (mut start, end) = (vec![0], [0xff]);
    loop {
        let page = journal.scan(&start, &end, 10_000).unwrap();
        let Some((last, _)) = page.last() else { return out };
        start = last.to_vec();
        start.push(0);
        out.extend(page);
    }
}

fn of(tables: &Tables, table: u8) -> impl Iterator<Item = (&Bytes, &Bytes)> {
    tables.range(Bytes::copy_from_slice(&[table])..Bytes::copy_from_slice(&[table + 1]))
}

fn units(len: u32) -> u64 {
    u64::from(len).div_ceil(4096) * 8
}

/// What the tables say of files, decoded.
pub struct Decoded {
    pub inodes: BTreeMap<Ino, Inode>,
    pub dirents: BTreeMap<Ino, BTreeMap<Vec<u8>, Ino>>,
    pub extents: BTreeMap<Ino, BTreeMap<u64, BlockId>>,
    pub blocks: HashMap<BlockId, BlockEntry>,
    pub dirty: HashMap<BlockId, DirtyValue>,
    pub orphans: BTreeSet<Ino>,
    pub xattrs: BTreeMap<Ino, BTreeMap<Vec<u8>, Vec<u8>>>,
}

pub fn decode(t: &Tables, block_size: u32) -> Decoded {
    let number = |k: &Bytes| number_of_key(k).unwrap();
    let mut d = Decoded {
        inodes: of(t, table::INODE).map(|(k, v)| (Ino(number(k)), Inode::decode(v).unwrap())).collect(),
        dirents: BTreeMap::new(),
        extents: BTreeMap::new(),
        blocks: of(t, table::BLOCK)
            .map(|(k, v)| (BlockId(number(k)), BlockEntry::decode(v).unwrap()))
            .collect(),
        dirty: of(t, table::DIRTY)
            .map(|(k, v)| (BlockId(number(k)), DirtyValue::decode(v, block_size).unwrap()))
            .collect(),
        orphans: of(t, table::ORPHAN).map(|(k, _)| Ino(number(k))).collect(),
        xattrs: BTreeMap::new(),
    };
    for (k, v) in of(t, table::DIRENT) {
        let (_, name) = split_dirent_key(k).unwrap();
        let entry = Dirent::decode(v).unwrap();
        assert_eq!(d.inodes[&entry.ino].kind, entry.kind, "kind of the entry {name:?}");
        d.dirents.entry(Ino(number(k))).or_default().insert(name.to_vec(), entry.ino);
    }
    for (k, v) in of(t, table::EXTENT) {
        let chunk = tables::chunk_of_extent_key(k).unwrap();
        let extents = Extents::decode(v).unwrap();
        assert!(!extents.is_empty(), "an empty extent is stored");
        for (i, id) in extents.0.iter().enumerate().filter(|(_, id)| id.0 != 0) {
            d.extents.entry(Ino(number(k))).or_default().insert(chunk * BLOCKS_PER_CHUNK + i as u64, *id);
        }
    }
    for (k, v) in of(t, table::XATTR) {
        d.xattrs.entry(Ino(number(k))).or_default().insert(k[9..].to_vec(), v.to_vec());
    }
    d
}

/// Checks every sum and every reference. Panics with what is wrong.
pub fn consistent(t: &Tables, block_size: u32) -> Decoded {
    let d = decode(t, block_size);
    let bs = u64::from(block_size);
    // Names and links.
    let mut links: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut subdirs: BTreeMap<Ino, u32> = BTreeMap::new();
    for (dir, entries) in &d.dirents {
        assert_eq!(d.inodes[dir].kind, FileKind::Directory, "entries of {dir}");
        assert!(d.inodes[dir].nlink > 0, "names in the removed directory {dir}");
        for ino in entries.values() {
            *links.entry(*ino).or_default() += 1;
            if d.inodes[ino].kind == FileKind::Directory {
                *subdirs.entry(*dir).or_default() += 1;
                assert_eq!(d.inodes[ino].parent, *dir, "parent of directory {ino}");
            }
        }
    }
    for (ino, inode) in &d.inodes {
        let names = links.get(ino).copied().unwrap_or(0);
        let expected = match inode.kind {
            FileKind::Directory if names == 0 && *ino != Ino::ROOT => 0,
            FileKind::Directory => {
                assert!(names <= 1, "directory {ino} has {names} names");
                2 + subdirs.get(ino).copied().unwrap_or(0)
            }
            _ => names,
        };
        assert_eq!(inode.nlink, expected, "link count of {ino} ({:?})", inode.kind);
        assert_eq!(inode.nlink == 0, d.orphans.contains(ino), "orphan mark of {ino}");
    }
    for ino in d.xattrs.keys().chain(d.extents.keys()).chain(&d.orphans) {
        assert!(d.inodes.contains_key(ino), "something is left of inode {ino}");
    }
    // Content.
    let len_of = |id: &BlockId| -> u32 {
        match (d.blocks.get(id), d.dirty.get(id)) {
            (Some(entry), None) => entry.loc.raw_len,
            (None, Some(dirty)) => dirty.len,
            (None, None) => panic!("block {id} is referenced but nowhere"),
            (Some(_), Some(_)) => panic!("block {id} is both sealed and dirty"),
        }
    };
    let mut references: HashMap<BlockId, u64> = HashMap::new();
    let (mut used_blocks, mut used_inodes) = (0, 0);
    for (ino, inode) in &d.inodes {
        let mut counted = match &inode.body {
            TableBody::Inline(b) => {
                assert!(!d.extents.contains_key(ino), "inline file {ino} has blocks");
                assert!(b.len() as u64 <= inode.size, "inline bytes beyond the end of {ino}");
                units(b.len() as u32)
            }
            _ => 0,
        };
        for (index, id) in d.extents.get(ino).into_iter().flatten() {
            assert_eq!(inode.kind, FileKind::Regular);
            let len = len_of(id);
            assert!(len > 0, "block {id} of {ino} is empty");
            // A half deleted inode keeps its size until the end; so this holds for it, too.
            assert!(
                index * bs + u64::from(len) <= inode.size,
                "block {index} of {ino} ends beyond {}",
                inode.size
            );
            *references.entry(*id).or_default() += 1;
            counted += units(len);
        }
        if inode.nlink > 0 {
            assert_eq!(inode.blocks, counted, "allocated units of {ino} ({:?})", inode.body);
        }
        used_blocks += inode.blocks;
        used_inodes += 1;
    }
    for (id, n) in &references {
        let more =
            t.get(&tables::block_refs_key(*id)).map_or(0, |v| u64::from_le_bytes(v[..].try_into().unwrap()));
        assert_eq!(*n, 1 + more, "references of block {id}");
    }
    for table in [table::BLOCK, table::DIRTY, table::BLOCK_REFS] {
        for (k, _) in of(t, table) {
            let id = BlockId(number_of_key(k).unwrap());
            assert!(references.contains_key(&id), "table {table:#x} has block {id}, no file does");
        }
    }
    let usage = &t[&tables::volume_key("usage")];
    let at = |i: usize| u64::from_le_bytes(usage[i..i + 8].try_into().unwrap());
    assert_eq!((at(0), at(8)), (used_blocks, used_inodes), "usage counters");
    d
}

struct Plain<'a>(&'a Tables);

impl Source for Plain<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Stop> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, Stop> {
        let rows = self.0.range(Bytes::copy_from_slice(start)..Bytes::copy_from_slice(end));
        Ok(rows.take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

/// What `mirrorfs fsck` says of the same tables: it must agree.
pub fn fsck(t: &Tables, d: &Decoded, block_size: u32) {
    let is_local = t.last_key_value().is_some_and(|(k, _)| k[0] >= table::FIRST_LOCAL);
    let segments = d.blocks.values().map(|e| {
        let epoch = e.loc.epoch;
        let value = SegmentValue { epoch, len: 0, blake3: [0; 32], commit: Lsn(0), cut_at: 0.0, live: 0 };
        (e.loc.segment, value)
    });
    let segments: BTreeMap<SegmentNo, SegmentValue> = segments.collect();
    let input = Input {
        source: &Plain(t),
        block_size,
        segments: (!is_local).then_some(&segments),
        slots_len: None,
        last_lsn: None,
        cancelled: &|| false,
    };
    assert_eq!(mirrorfs::fsck::lines(&input).unwrap(), Vec::<String>::new(), "fsck");
}

/// Checks the derived local tables: frames and live bytes of segments.
pub fn derived(t: &Tables, d: &Decoded) {
    let mut uses: HashMap<BlockHash, u64> = HashMap::new();
    for entry in d.blocks.values() {
        *uses.entry(entry.hash).or_default() += 1;
    }
    let mut live: BTreeMap<SegmentNo, u64> = BTreeMap::new();
    for (k, v) in of(t, table::FRAME) {
        let frame = FrameValue::decode(v).unwrap();
        assert_eq!(&k[1..], frame.entry.hash.0);
        assert_eq!(uses.remove(&frame.entry.hash), Some(frame.uses), "uses of frame {}", frame.entry.hash);
        *live.entry(frame.entry.loc.segment).or_default() += u64::from(frame.entry.loc.stored_len);
    }
    assert!(uses.is_empty(), "blocks without a frame: {uses:?}");
    for (k, v) in of(t, table::SEGMENT) {
        let number = SegmentNo(number_of_key(k).unwrap());
        let value = SegmentValue::decode(v).unwrap();
        assert_eq!(value.live, live.remove(&number).unwrap_or(0), "live bytes of segment {number}");
    }
    assert!(live.is_empty(), "frames in unknown segments: {live:?}");
}

/// Number and bytes of clean blocks, as the table has them.
pub fn cached(t: &Tables) -> (usize, u64) {
    let mut slots = BTreeSet::new();
    let mut bytes = 0;
    for (_, v) in of(t, table::CACHED) {
        let v = CachedValue::decode(v).unwrap();
        assert!(slots.insert(v.slot), "two cached blocks in slot {}", v.slot);
        bytes += u64::from(v.len);
    }
    (slots.len(), bytes)
}

/// An inode's attributes in the reference's words.
fn meta(i: &Inode) -> Meta {
    Meta {
        kind: i.kind,
        perm: i.perm,
        nlink: i.nlink,
        uid: i.uid,
        gid: i.gid,
        rdev: i.rdev,
        atime: i.atime,
        mtime: i.mtime,
        ctime: i.ctime,
        btime: i.btime,
    }
}

/// Checks that sealed tables hold exactly the reference's tree and content. Content is compared by hash; the caller has
/// checked each frame against its own.
pub fn equals(d: &Decoded, model: &Model, block_size: u32) {
    let bs = u64::from(block_size);
    for ino in d.inodes.keys() {
        assert!(
            model.nodes.contains_key(ino) || d.orphans.contains(ino),
            "inode {ino} is in the segments, not in the reference"
        );
    }
    let empty = BTreeMap::new();
    for (ino, node) in &model.nodes {
        let inode = d.inodes.get(ino).unwrap_or_else(|| panic!("inode {ino} is missing in the segments"));
        assert_eq!(meta(inode), node.meta, "attributes of {ino} in the segments");
        assert_eq!(d.xattrs.get(ino).unwrap_or(&empty), &node.xattrs, "xattrs of {ino} in the segments");
        match &node.body {
            Body::Dir(entries) => {
                let none = BTreeMap::new();
                assert_eq!(d.dirents.get(ino).unwrap_or(&none), entries, "entries of {ino} in the segments");
            }
            Body::Link(target) => assert_eq!(inode.body, TableBody::Target(target.clone().into())),
            Body::Other => {}
            Body::File(content) => {
                assert_eq!(inode.size, content.size, "size of {ino} in the segments");
                let mut covered = Vec::new();
                match &inode.body {
                    TableBody::Inline(b) => {
                        assert_eq!(&content.read(0, b.len() as u64)[..], &b[..], "inline content of {ino}");
                        covered.push((0, b.len() as u64));
                    }
                    _ => {
                        for (index, id) in d.extents.get(ino).into_iter().flatten() {
                            let entry = &d.blocks[id];
                            let len = u64::from(entry.loc.raw_len);
                            let expected = content.read(index * bs, len);
                            assert_eq!(BlockHash::of(&expected), entry.hash, "block {index} ({id}) of {ino}");
                            covered.push((index * bs, index * bs + len));
                        }
                    }
                }
                let mut at = 0;
                for (start, end) in covered {
                    assert!(content.is_zero(at, start), "a hole of {ino} before {start} should hold data");
                    at = end;
                }
                assert!(content.is_zero(at, content.size), "the end of {ino} from {at} on should hold data");
            }
        }
    }
}
