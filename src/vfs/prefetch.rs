//! Fetching ahead: the queue of what readers in order will want next, and the threads that empty it.
//!
//! Owns what has been asked for and has not come yet. When to ask is decided in `readahead`, what one request fetches in
//! `replica::read_plan`.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::cell::Cell;
use super::{Result, Vfs, VfsError, readahead};
use crate::cache::BlockStore;
use crate::format::tables::BlockEntry;
use crate::ids::BlockHash;
use crate::replica::read_plan;

/// Bytes asked for by one request.
const PIECE: u64 = 4 << 20;
/// How far beyond the window lies what is fetched along when it lies beside something in it: writers overtake one another, so that
/// the neighbours of a block in its segment are some blocks away from it in the file.
const BEYOND: u64 = 16 << 20;
/// Requests that may wait for a thread; more are not asked for.
const WAITING: usize = 64;

/// Blocks that are waited for, or being fetched.
type Asked = Arc<Mutex<HashSet<BlockHash>>>;

/// What is fetched ahead, and by whom. Threads are there only behind [`Vfs::start_prefetch`].
#[derive(Default)]
pub(super) struct Prefetch {
    queue: OnceLock<SyncSender<Part>>,
    asked: Asked,
}

/// The blocks of one request. They count as asked for as long as this lives.
struct Part {
    blocks: Vec<BlockEntry>,
    asked: Asked,
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut asked = self.asked.lock();
        for block in &self.blocks {
            asked.remove(&block.hash);
        }
    }
}

impl Part {
    /// One request gets what lies beside the first block; if the rest turns out to lie elsewhere, there are more.
    fn fetch(&self, blocks: &BlockStore) {
        let mut wanted: &[BlockEntry] = &self.blocks;
        while let Some((first, rest)) = wanted.split_first() {
            wanted = rest;
            if blocks.is_cached(&first.hash) {
                continue;
            }
            let others: Vec<_> = rest.iter().filter(|b| !blocks.is_cached(&b.hash)).copied().collect();
            if let Err(e) = blocks.fetch_ahead(first, &others) {
                log::debug!("fetching ahead: {e}");
                return;
            }
        }
    }
}

impl Vfs {
    /// Asks for the blocks that a reader in order will want next, after a read of `len` bytes at `offset`.
    pub(super) fn read_ahead(&self, cell: &Cell, offset: u64, len: u64) {
        let Some(queue) = self.prefetch.queue.get() else { return };
        let bs = u64::from(self.blocks.block_size());
        let most = readahead::MOST.min(self.blocks.space.limit() / 8);
        let (from, to) = cell.readahead.lock().note(offset, len, bs, most);
        if from >= to {
            return;
        }
        let (wanted, beyond) = {
            let state = cell.state.read();
            let end = state.inode.size.div_ceil(bs);
            if state.inline.is_some() || from >= end {
                return;
            }
            let asked = self.prefetch.asked.lock();
            let missing = |from: u64, to: u64| -> Vec<BlockEntry> {
                (from..to.min(end))
                    .filter_map(|index| state.block_at(&self.journal, cell.ino, index).ok())
                    .filter(|id| id.0 != 0 && self.blocks.dirty(*id).is_none())
                    .filter_map(|id| self.blocks.entry(id).ok())
                    .filter(|e| !e.is_without_content() && !asked.contains(&e.hash))
                    .filter(|e| !self.blocks.is_cached(&e.hash))
                    .collect()
            };
            (missing(from, to), missing(to, to + BEYOND.min(most / 3) / bs))
        };
        // In pieces, so that several requests are under way; a full queue means that enough are.
        for blocks in read_plan::ranges(wanted, beyond, PIECE) {
            self.prefetch.asked.lock().extend(blocks.iter().map(|b| b.hash));
            let part = Part { blocks, asked: Arc::clone(&self.prefetch.asked) };
            if queue.try_send(part).is_err() {
                return;
            }
        }
    }

    /// Starts `threads` threads that fetch ahead for sequential readers.
    pub fn start_prefetch(self: &Arc<Self>, threads: usize) -> Result<()> {
        let (sender, receiver) = sync_channel::<Part>(WAITING);
        let receiver: Arc<Mutex<Receiver<Part>>> = Arc::new(Mutex::new(receiver));
        for _ in 0..threads {
            let (receiver, blocks) = (Arc::clone(&receiver), Arc::clone(&self.blocks));
            std::thread::Builder::new()
                .name("mirrorfs-ahead".into())
                .spawn(move || {
                    loop {
                        let next = receiver.lock().recv();
                        let Ok(part) = next else { return };
                        part.fetch(&blocks);
                    }
                })
                .map_err(|e| VfsError::Io(format!("cannot start a thread: {e}")))?;
        }
        let _ = self.prefetch.queue.set(sender);
        Ok(())
    }
}
