//! The in-memory state of a file that is open or being changed.
//!
//! Owns what of a file is not in the journal yet: size, times, which blocks were replaced. Knows how to put that into a
//! transaction; knows no POSIX rule. Directories have no cell: the journal alone holds them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use super::usage;
use crate::cache::{BlockStore, StoreError};
use crate::format::tables::{BLOCKS_PER_CHUNK, Body, Extents, Inode, extent_key, inode_key};
use crate::ids::{BlockId, Ino};
use crate::journal::{Journal, Tx};

/// The files of some inode numbers that are in use.
#[derive(Default)]
pub(super) struct Files {
    /// Of an open one only once somebody has needed more of it than that it is there.
    pub cells: HashMap<Ino, Arc<Cell>>,
    /// Open handles, where there are any.
    pub opens: HashMap<Ino, u32>,
}

/// One file in memory.
pub(super) struct Cell {
    pub ino: Ino,
    pub state: RwLock<CellState>,
    /// Where the last read ended and how far ahead to fetch; a guess, so races do no harm.
    pub readahead: parking_lot::Mutex<super::readahead::Window>,
}

/// A file's content and attributes as they are now, and how they differ from the journal's.
pub(super) struct CellState {
    /// Attributes, with all pending changes. Its body is `Blocks` or `Target`; inline content is in `inline`.
    pub inode: Inode,
    /// The content, while it is kept in the inode.
    pub inline: Option<Vec<u8>>,
    /// Something below differs from the journal.
    pub dirty: bool,
    /// Blocks replaced since the last flush, by index; `BlockId(0)` is a hole.
    pub extents: BTreeMap<u64, BlockId>,
    /// Dirty blocks whose slot's valid bytes changed since the last flush.
    pub touched: BTreeSet<BlockId>,
    /// Blocks that this file no longer names, still counted in the journal.
    pub released: Vec<BlockId>,
    /// Somebody waits for the next flush to be durable.
    pub is_waited_for: bool,
    /// `inode.blocks` as the journal has it, for the volume's usage.
    pub flushed_blocks: u64,
    /// The extent chunk read last from the journal.
    chunk: Option<(u64, Extents)>,
    /// The inode was deleted for good.
    pub gone: bool,
}

impl Cell {
    pub fn new(ino: Ino, inode: Inode) -> Self {
        Self { ino, state: RwLock::new(CellState::new(inode)), readahead: parking_lot::Mutex::default() }
    }
}

impl CellState {
    fn new(mut inode: Inode) -> Self {
        let inline = match std::mem::replace(&mut inode.body, Body::Blocks) {
            Body::Inline(bytes) => Some(bytes.to_vec()),
            Body::Blocks => None,
            target @ Body::Target(_) => {
                inode.body = target;
                None
            }
        };
        let flushed_blocks = inode.blocks;
        Self {
            inode,
            inline,
            dirty: false,
            extents: BTreeMap::new(),
            touched: BTreeSet::new(),
            released: Vec::new(),
            is_waited_for: false,
            flushed_blocks,
            chunk: None,
            gone: false,
        }
    }

    /// The block at `index`, as the file has it now; `BlockId(0)` is a hole.
    pub fn block_at(&self, journal: &Journal, ino: Ino, index: u64) -> Result<BlockId, StoreError> {
        if let Some(id) = self.extents.get(&index) {
            return Ok(*id);
        }
        let (chunk, at) = (index / BLOCKS_PER_CHUNK, (index % BLOCKS_PER_CHUNK) as usize);
        if let Some((n, extents)) = &self.chunk
            && *n == chunk
        {
            return Ok(extents.0[at]);
        }
        Ok(load_chunk(journal, ino, chunk)?.0[at])
    }

    /// Like [`CellState::block_at`], and remembers the chunk for the next call.
    pub fn block_at_cached(
        &mut self,
        journal: &Journal,
        ino: Ino,
        index: u64,
    ) -> Result<BlockId, StoreError> {
        let chunk = index / BLOCKS_PER_CHUNK;
        if !self.extents.contains_key(&index) && self.chunk.as_ref().is_none_or(|(n, _)| *n != chunk) {
            self.chunk = Some((chunk, load_chunk(journal, ino, chunk)?));
        }
        self.block_at(journal, ino, index)
    }

    /// All blocks with indexes in `[from, to)`, holes left out, in order.
    pub fn blocks_in(
        &self,
        journal: &Journal,
        ino: Ino,
        from: u64,
        to: u64,
    ) -> Result<BTreeMap<u64, BlockId>, StoreError> {
        let mut found = BTreeMap::new();
        if from >= to {
            return Ok(found);
        }
        let mut start = extent_key(ino, from / BLOCKS_PER_CHUNK);
        let end = extent_key(ino, (to - 1) / BLOCKS_PER_CHUNK + 1);
        loop {
            let page = journal.scan(&start, &end, 256)?;
            let Some((last, _)) = page.last() else { break };
            let mut next = last.to_vec();
            next.push(0);
            for (key, value) in &page {
                let chunk = crate::format::tables::chunk_of_extent_key(key).unwrap_or(0);
                for (i, id) in Extents::decode(value)?.0.iter().enumerate() {
                    let index = chunk * BLOCKS_PER_CHUNK + i as u64;
                    if id.0 != 0 && (from..to).contains(&index) {
                        found.insert(index, *id);
                    }
                }
            }
            start = next.into();
        }
        for (index, id) in self.extents.range(from..to) {
            if id.0 == 0 {
                found.remove(index);
            } else {
                found.insert(*index, *id);
            }
        }
        Ok(found)
    }

    /// Names `id` at `index` in place of `old` (either may be 0).
    pub fn replace_block(&mut self, index: u64, old: BlockId, id: BlockId) {
        self.extents.insert(index, id);
        if old.0 != 0 {
            self.touched.remove(&old);
            self.released.push(old);
        }
        if id.0 != 0 {
            self.touched.insert(id);
        }
    }

    /// Puts `inode` and all pending content changes into `tx`. Blocks that lost their last reference are added to
    /// `gone`. The caller calls [`CellState::flushed`] once the transaction is committed.
    pub fn put(
        &self,
        tx: &mut Tx<'_>,
        ino: Ino,
        inode: &Inode,
        blocks: &BlockStore,
        gone: &mut Vec<BlockId>,
    ) -> Result<(), StoreError> {
        let mut value = inode.clone();
        if let Some(inline) = &self.inline {
            value.body = Body::Inline(Bytes::copy_from_slice(inline));
        }
        tx.put(inode_key(ino), value.encode());
        usage::change(tx, inode.blocks as i64 - self.flushed_blocks as i64, 0)?;
        let mut changes = self.extents.iter().peekable();
        while let Some((first, _)) = changes.peek() {
            let chunk = **first / BLOCKS_PER_CHUNK;
            let key = extent_key(ino, chunk);
            let mut extents = match tx.get(&key)? {
                Some(value) => Extents::decode(&value)?,
                None => Extents::default(),
            };
            while let Some((&index, &id)) = changes.next_if(|(i, _)| **i / BLOCKS_PER_CHUNK == chunk) {
                extents.0[(index % BLOCKS_PER_CHUNK) as usize] = id;
            }
            if extents.is_empty() {
                tx.delete(key);
            } else {
                tx.put(key, extents.encode());
            }
        }
        let small = self.is_waited_for && blocks.is_small(&self.touched);
        for id in &self.touched {
            blocks.put_dirty(tx, *id, small)?;
        }
        for id in &self.released {
            blocks.release(tx, *id, gone)?;
        }
        Ok(())
    }

    /// Notes that the journal now has everything, with `inode` as the attributes.
    pub fn flushed(&mut self, inode: Inode, blocks: &BlockStore) {
        blocks.after_put(&self.touched);
        self.flushed_blocks = inode.blocks;
        self.inode = inode;
        self.dirty = false;
        self.extents.clear();
        self.touched.clear();
        self.released.clear();
        self.chunk = None;
    }
}

fn load_chunk(journal: &Journal, ino: Ino, chunk: u64) -> Result<Extents, StoreError> {
    Ok(match journal.get(&extent_key(ino, chunk))? {
        Some(value) => Extents::decode(&value)?,
        None => Extents::default(),
    })
}
