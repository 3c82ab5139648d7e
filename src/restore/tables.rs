//! The metadata tables in memory.
//!
//! Owns one ordered map. Knows no network: [`super::load`] fills it.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::load::Sink;
use super::sound::Flaw;
use super::tree::text;
use crate::format::codec::FormatError;
use crate::format::record::Op;
use crate::format::tables::{
    BlockEntry, Dirent, Extents, Inode, block_key, chunk_of_extent_key, dirent_range, inode_key, name_cookie,
    prefix_range, split_dirent_key, table,
};
use crate::ids::{BlockId, Ino};

/// All replicated tables of a volume at one commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    map: BTreeMap<Bytes, Bytes>,
}

impl Sink for Tables {
    fn reset(&mut self) -> Result<(), String> {
        self.map.clear();
        Ok(())
    }

    fn apply(&mut self, ops: Vec<Op>) -> Result<(), String> {
        for op in ops {
            match op {
                Op::Put { key, value } => self.map.insert(key, value),
                Op::Delete { key } => self.map.remove(&key),
            };
        }
        Ok(())
    }

    fn flaws(&self, block_size: u32) -> Vec<Flaw> {
        super::sound::flaws(self, block_size)
    }
}

impl Tables {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Bytes> {
        self.map.get(key)
    }

    /// The entries of a range, in order.
    pub fn range(&self, start: Bytes, end: Bytes) -> impl Iterator<Item = (&Bytes, &Bytes)> {
        // An empty end (of the last table) or a reversed pair is an empty range, not a panic.
        let end = end.max(start.clone());
        self.map.range(start..end)
    }

    /// All entries, in order; each is let go of when it was taken.
    pub fn into_entries(self) -> impl Iterator<Item = (Bytes, Bytes)> {
        self.map.into_iter()
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is nothing at all: a volume that was never written to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// An inode.
    pub fn inode(&self, ino: Ino) -> Result<Option<Inode>, FormatError> {
        self.get(&inode_key(ino)).map(|v| Inode::decode(v)).transpose()
    }

    /// A directory's names in byte order, each once; and what is wrong with the other entries of the directory.
    pub fn children(&self, dir: Ino) -> (Vec<(Bytes, Dirent)>, Vec<String>) {
        let (start, end) = prefix_range(&dirent_range(dir, 0).0[..9]);
        let (mut names, mut wrong) = (Vec::new(), Vec::new());
        for (key, value) in self.range(start, end) {
            let Some((cookie, name)) = split_dirent_key(key) else {
                wrong.push("one of its entries has too short a key".to_owned());
                continue;
            };
            // The cookie follows from the name, so that a name can stand here once only.
            if cookie != name_cookie(name) {
                wrong.push(format!("it holds the name {:?} at a place that is not its own", text(name)));
                continue;
            }
            match Dirent::decode(value) {
                Ok(dirent) => names.push((key.slice_ref(name), dirent)),
                Err(e) => wrong.push(format!("its entry {:?}: {e}", text(name))),
            }
        }
        names.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        (names, wrong)
    }

    /// A file's blocks with their places in it (in units of the block size), ascending; holes are absent.
    pub fn blocks(&self, ino: Ino) -> Result<Vec<(u64, BlockId)>, FormatError> {
        use crate::format::tables::BLOCKS_PER_CHUNK;
        let mut blocks = Vec::new();
        for (key, value) in self.of_ino(table::EXTENT, ino) {
            let chunk = chunk_of_extent_key(key)
                .and_then(|chunk| chunk.checked_mul(BLOCKS_PER_CHUNK))
                .ok_or_else(|| FormatError::new("extent", "a bad key"))?;
            for (i, id) in Extents::decode(value)?.0.into_iter().enumerate().filter(|(_, id)| id.0 != 0) {
                blocks.push((chunk.saturating_add(i as u64), id));
            }
        }
        Ok(blocks)
    }

    /// Extended attributes in byte order of their names.
    pub fn xattrs(&self, ino: Ino) -> impl Iterator<Item = (&[u8], &Bytes)> {
        self.of_ino(table::XATTR, ino).filter_map(|(key, value)| Some((key.get(9..)?, value)))
    }

    /// Where a sealed block lies.
    pub fn block(&self, id: BlockId) -> Result<Option<BlockEntry>, FormatError> {
        self.get(&block_key(id)).map(|v| BlockEntry::decode(v)).transpose()
    }

    fn of_ino(&self, table: u8, ino: Ino) -> impl Iterator<Item = (&Bytes, &Bytes)> {
        let mut prefix = [table; 9];
        prefix[1..].copy_from_slice(&ino.0.to_be_bytes());
        let (start, end) = prefix_range(&prefix);
        self.range(start, end)
    }
}
