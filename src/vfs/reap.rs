//! Orphans: inodes without names, deleted once nobody refers to them.
//!
//! Owns the thread that deletes their content in steps, so that no transaction grows with the size of a file.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::thread;

use parking_lot::{Condvar, Mutex};

use super::cell::{Cell, CellState};
use super::types::{FileKind, VfsError};
use super::{Result, Vfs, shard, usage};
use crate::cache::store::scan_table;
use crate::format::tables::{
    BLOCKS_PER_CHUNK, Extents, Inode, chunk_of_extent_key, dirent_range, extent_key, inode_key,
    number_of_key, orphan_key, prefix_range, table, xattr_key,
};
use crate::ids::Ino;

/// Extent chunks released in one transaction.
const CHUNKS_PER_STEP: usize = 8;
/// Extent chunks given to an orphan in one transaction: a record of at most 10 MB.
const CHUNKS_PER_ORPHAN: usize = 16 << 10;

/// Pause after a deletion that failed.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Orphans whose last reference went.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    wake: Condvar,
}

#[derive(Default)]
struct QueueState {
    inodes: BTreeSet<Ino>,
    busy: bool,
    stopped: bool,
}

impl Vfs {
    /// Reads the orphans that an earlier run left and starts the thread.
    pub(super) fn start_reaper(self: &Arc<Self>) -> Result<()> {
        let mut left = Vec::new();
        scan_table::<VfsError>(&self.journal, table::ORPHAN, |key, _| {
            left.extend(number_of_key(key).map(Ino));
            Ok(())
        })?;
        self.orphans.lock().extend(left.iter().copied());
        self.reaper.state.lock().inodes = left.into_iter().collect();
        let weak = Arc::downgrade(self);
        thread::Builder::new()
            .name("mirrorfs-reap".into())
            .spawn(move || run(&weak))
            .map_err(|e| VfsError::Io(format!("cannot start a thread: {e}")))?;
        Ok(())
    }

    /// Stops the thread after the deletion in progress; what is left goes on at the next start.
    pub fn stop_reaper(&self) {
        let mut state = self.reaper.state.lock();
        state.stopped = true;
        self.reaper.wake.notify_all();
        while state.busy {
            self.reaper.wake.wait(&mut state);
        }
    }

    /// Waits until every orphan that nobody refers to is deleted.
    pub fn wait_reaped(&self) {
        let mut state = self.reaper.state.lock();
        while !state.stopped && (state.busy || !state.inodes.is_empty()) {
            self.reaper.wake.wait(&mut state);
        }
    }

    /// Notes that `ino` lost its last name.
    pub(super) fn orphaned(&self, ino: Ino) {
        self.orphans.lock().insert(ino);
        self.reap_if_unused(ino);
    }

    pub(super) fn do_forget(&self, ino: Ino, n: u64) {
        {
            let mut references = self.references[shard(ino)].lock();
            let Some(count) = references.get_mut(&ino) else { return };
            *count = count.saturating_sub(n);
            if *count > 0 {
                return;
            }
            references.remove(&ino);
        }
        self.reap_if_unused(ino);
    }

    pub(super) fn reap_if_unused(&self, ino: Ino) {
        if !self.orphans.lock().contains(&ino) || self.is_referenced(ino) {
            return;
        }
        if self.is_open(ino) {
            return;
        }
        let mut state = self.reaper.state.lock();
        if state.inodes.insert(ino) {
            self.reaper.wake.notify_all();
        }
    }

    /// Before a file is cut to `size`: when that gives up very much, most of it goes, with all extents as they are, to a new
    /// inode without a name, which is deleted in steps like any other. The cell is locked by the caller.
    pub(super) fn shed(&self, cell: &Arc<Cell>, state: &mut CellState, size: u64) -> Result<()> {
        if size >= state.inode.size || state.inline.is_some() {
            return Ok(());
        }
        let chunk_bytes = u64::from(self.blocks.block_size()).saturating_mul(BLOCKS_PER_CHUNK);
        let first = size.div_ceil(chunk_bytes);
        let (start, end) = (extent_key(cell.ino, first), extent_key(cell.ino, u64::MAX));
        if self.journal.scan(&start, &end, CHUNKS_PER_STEP + 1)?.len() <= CHUNKS_PER_STEP {
            return Ok(());
        }
        self.flush_cell(cell, state)?;
        let mut chunks = Vec::new();
        let mut from = start;
        loop {
            let page = self.journal.scan(&from, &end, 4096)?;
            let Some((last, _)) = page.last() else { break };
            let mut next = last.to_vec();
            next.push(0);
            chunks.extend(page.iter().filter_map(|(key, _)| chunk_of_extent_key(key)));
            from = next.into();
        }
        // From the end, so that a crash between two steps shows the file cut to a size on the way.
        for part in chunks.rchunks(CHUNKS_PER_ORPHAN) {
            let Some(lowest) = part.first() else { break };
            let all = size == 0 && chunks.first() == Some(lowest);
            self.shed_part(cell, state, part, if all { 0 } else { lowest * chunk_bytes }, all)?;
        }
        Ok(())
    }

    /// Moves some extent chunks, the last that the file has, to an orphan, and makes `size` (where they begin) the file's
    /// end. `all`: nothing else is left.
    fn shed_part(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        part: &[u64],
        size: u64,
        all: bool,
    ) -> Result<()> {
        let orphan = self.new_ino()?;
        let mut moved = state.inode.blocks;
        if !all {
            moved = 0;
            let last = part.last().map_or(0, |c| (c + 1).saturating_mul(BLOCKS_PER_CHUNK));
            let from = part.first().map_or(last, |c| c * BLOCKS_PER_CHUNK);
            for id in state.blocks_in(&self.journal, cell.ino, from, last)?.into_values() {
                moved += super::content::units(self.blocks.block_len(id)?);
            }
        }
        let mut inode = state.inode.clone();
        inode.size = size;
        inode.blocks = inode.blocks.saturating_sub(moved);
        self.stamp(&mut inode, self.now());
        let heir = Inode { nlink: 0, blocks: state.inode.blocks - inode.blocks, ..state.inode.clone() };
        if all {
            state.inline = Some(Vec::new());
        }
        let mut gone = Vec::new();
        let moving = self.journal.transact::<_, VfsError>(|tx| {
            for chunk in part {
                let key = extent_key(cell.ino, *chunk);
                if let Some(value) = tx.get(&key)? {
                    tx.put(extent_key(orphan, *chunk), value);
                    tx.delete(key);
                }
            }
            tx.put(inode_key(orphan), heir.encode());
            tx.put(orphan_key(orphan), bytes::Bytes::new());
            usage::change(tx, heir.blocks as i64, 1)?;
            state.put(tx, cell.ino, &inode, &self.blocks, &mut gone)?;
            Ok(())
        });
        let (_, lsn) = match moving {
            Ok(done) => done,
            Err(e) => {
                state.inline = None;
                return Err(e);
            }
        };
        self.committed(cell, state, inode, lsn, &gone);
        self.orphaned(orphan);
        Ok(())
    }

    /// Why an inode that is marked as deleted must stay, if so. No operation of ours leaves such a
    /// mark: it is damage or forgery, and to follow it would delete what names lead to.
    fn must_stay(&self, ino: Ino) -> Result<Option<String>> {
        if ino == Ino::ROOT {
            return Ok(Some("it is the root directory".to_owned()));
        }
        let inode = match self.inode(ino) {
            Err(VfsError::Stale) => return Ok(None),
            other => other?,
        };
        if inode.nlink > 0 {
            return Ok(Some(format!("its link count is {}", inode.nlink)));
        }
        let (start, end) = dirent_range(ino, 0);
        let has_names = inode.kind == FileKind::Directory && !self.journal.scan(&start, &end, 1)?.is_empty();
        Ok(has_names.then(|| "there are names in it".to_owned()))
    }

    /// Deletes one orphan, in steps.
    pub(super) fn reap(&self, ino: Ino) -> Result<()> {
        if let Some(why) = self.must_stay(ino)? {
            self.orphans.lock().remove(&ino);
            log::error!(
                "local tables: inode {ino} is marked as deleted, but {why}: it stays; check the volume with mirrorfs fsck"
            );
            return Ok(());
        }
        // Somebody may use it again: then this is asked for once more when they end.
        if self.is_referenced(ino) || self.is_open(ino) {
            return Ok(());
        }
        let cell = match self.cell(ino) {
            Ok(cell) => {
                let in_use = {
                    let _gate = self.enter()?;
                    let mut state = cell.state.write();
                    self.flush_cell(&cell, &mut state)?;
                    state.gone = true;
                    // Users count themselves first and then look whether it is gone: one of us sees the other.
                    let in_use = self.is_referenced(ino) || self.is_open(ino);
                    state.gone = !in_use;
                    in_use
                };
                if in_use {
                    self.let_go(cell);
                    return Ok(());
                }
                // The cell stays in the map until the inode is deleted, so that nobody makes a new one meanwhile.
                Some(cell)
            }
            Err(VfsError::IsDirectory) => None,
            Err(VfsError::Stale) => {
                let _gate = self.enter()?;
                self.journal.transact::<_, VfsError>(|tx| {
                    tx.delete(orphan_key(ino));
                    Ok(())
                })?;
                self.orphans.lock().remove(&ino);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        while !self.reap_step(ino)? {}
        self.unwritten.book.forget(ino);
        self.orphans.lock().remove(&ino);
        if let Some(cell) = cell {
            self.let_go(cell);
        }
        Ok(())
    }

    /// Releases some extents; with the last of them the inode goes too. Answers whether it is gone.
    fn reap_step(&self, ino: Ino) -> Result<bool> {
        let _gate = self.enter()?;
        let mut gone = Vec::new();
        let (start, end) = (extent_key(ino, 0), extent_key(ino, u64::MAX));
        let (done, lsn) = self.journal.transact::<_, VfsError>(|tx| {
            let page = tx.scan(&start, &end, CHUNKS_PER_STEP)?;
            let done = page.len() < CHUNKS_PER_STEP;
            for (key, value) in page {
                for id in Extents::decode(&value)?.0 {
                    if id.0 != 0 {
                        self.blocks.release(tx, id, &mut gone)?;
                    }
                }
                tx.delete(key);
            }
            if done {
                let (start, end) = prefix_range(&xattr_key(ino, b""));
                for (key, _) in tx.scan(&start, &end, usize::MAX)? {
                    tx.delete(key);
                }
                if let Some(value) = tx.get(&inode_key(ino))? {
                    usage::change(tx, -(Inode::decode(&value)?.blocks as i64), -1)?;
                }
                tx.delete(inode_key(ino));
                tx.delete(orphan_key(ino));
            }
            Ok(done)
        })?;
        self.blocks.after_commit(lsn, &gone);
        Ok(done)
    }
}

fn run(vfs: &Weak<Vfs>) {
    // The last deletion failed: said once, not each time.
    let mut troubled = false;
    loop {
        let Some(vfs) = vfs.upgrade() else { return };
        let next = {
            let mut state = vfs.reaper.state.lock();
            if state.stopped {
                return;
            }
            if state.inodes.is_empty() {
                // Wakes now and then, so that a dropped filesystem ends the thread.
                vfs.reaper.wake.wait_for(&mut state, std::time::Duration::from_millis(200));
            }
            let next = state.inodes.pop_first();
            state.busy = next.is_some();
            next
        };
        let Some(ino) = next else { continue };
        let failed = vfs.reap(ino).err();
        let mut state = vfs.reaper.state.lock();
        state.busy = false;
        vfs.reaper.wake.notify_all();
        let Some(e) = failed else {
            troubled = false;
            continue;
        };
        if vfs.check_writable().is_err() {
            log::warn!("inode {ino} cannot be deleted now, it will be at the next start: {e}");
            continue;
        }
        if !std::mem::replace(&mut troubled, true) {
            log::warn!("inode {ino} cannot be deleted now, it is tried again: {e}");
        }
        // Its cell stays, marked as gone, so that nobody can use what is half deleted.
        state.inodes.insert(ino);
        if !state.stopped {
            vfs.reaper.wake.wait_for(&mut state, AGAIN);
        }
    }
}
