//! copy_file_range: whole blocks are shared, the rest is copied.

use std::sync::Arc;

use super::cell::{Cell, CellState};
use super::types::{FileKind, VfsError, Wait};
use super::{Result, SIZE_MAX, Vfs};
use crate::ids::{BlockId, Ino};

/// Most bytes shared in one transaction.
const SHARE_MAX: u64 = 256 << 20;
/// Most bytes copied by one call when nothing can be shared.
const COPY_MAX: u64 = 1 << 20;

/// How the next piece of a copy is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Read and write this many bytes.
    Bytes(u64),
    /// Share this many whole blocks (the last may be the source's short last one).
    Blocks(u64),
}

/// What comes next: `from` and `to` are offsets, `len` bytes are left, `source_size` and `target_size` are file sizes.
fn plan(bs: u64, from: u64, to: u64, len: u64, source_size: u64, target_size: u64) -> Step {
    if from % bs != to % bs {
        return Step::Bytes(len.min(COPY_MAX));
    }
    let within = from % bs;
    if within != 0 {
        return Step::Bytes(len.min(bs - within).min(COPY_MAX));
    }
    let whole = len / bs;
    if whole > 0 {
        return Step::Blocks(whole.min((SHARE_MAX / bs).max(1)));
    }
    // A short last block can be shared when it ends the source and nothing of the target lies behind it.
    if from + len >= source_size && to + len >= target_size {
        return Step::Blocks(1);
    }
    Step::Bytes(len.min(COPY_MAX))
}

impl Vfs {
    pub(super) fn do_copy(
        &self,
        source: Ino,
        from: u64,
        target: Ino,
        to: u64,
        len: u64,
        wait: Wait,
    ) -> Result<u64> {
        let source_inode = self.inode(source)?;
        let target_inode = self.inode(target)?;
        if source_inode.kind == FileKind::Directory || target_inode.kind == FileKind::Directory {
            return Err(VfsError::IsDirectory);
        }
        if source_inode.kind != FileKind::Regular || target_inode.kind != FileKind::Regular {
            return Err(VfsError::Invalid);
        }
        let asked = len;
        let len = self.copyable(source, from, len)?;
        let len = len.min(source_inode.size.saturating_sub(from));
        if asked > 0 && len == 0 && self.unwritten.book.end(source).is_some_and(|end| end > from) {
            // Not the end of the file: refused bytes come later.
            return Err(VfsError::Io(format!("inode {source} lacks bytes that could not be stored")));
        }
        if to.checked_add(len).is_none_or(|e| e > SIZE_MAX) {
            return Err(VfsError::FileTooLarge);
        }
        if source == target && from < to + len && to < from + len {
            return Err(VfsError::Invalid);
        }
        let bs = u64::from(self.blocks.block_size());
        let mut done = 0;
        while done < len {
            let (from, to) = (from + done, to + done);
            let target_size = self.inode(target)?.size;
            let step = match plan(bs, from, to, len - done, source_inode.size, target_size) {
                Step::Blocks(n) => {
                    let bytes = (n * bs).min(len - done);
                    match self.share_blocks(source, from / bs, target, to / bs, bytes) {
                        Ok(None) => self.copy_bytes(source, from, target, to, bytes.min(COPY_MAX), wait),
                        Ok(Some(n)) => Ok(n),
                        Err(e) => Err(e),
                    }
                }
                Step::Bytes(n) => self.copy_bytes(source, from, target, to, n, wait),
            };
            match step {
                Ok(0) => break,
                Ok(n) => {
                    self.no_longer_refused(target, to, to + n);
                    done += n;
                }
                // What is done is done; the caller comes back for the rest.
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn copy_bytes(&self, source: Ino, from: u64, target: Ino, to: u64, n: u64, wait: Wait) -> Result<u64> {
        let data = self.do_read(source, from, n as u32, wait)?;
        Ok(u64::from(self.do_write(target, to, &data, Some(self.now()), wait)?))
    }

    /// Lets the target name the source's blocks from `first` on, up to `bytes` bytes. Answers the bytes covered, or
    /// `None` when it cannot be done by sharing (the files have changed since it was planned).
    pub(super) fn share_blocks(
        &self,
        source: Ino,
        first: u64,
        target: Ino,
        at: u64,
        bytes: u64,
    ) -> Result<Option<u64>> {
        let _gate = self.enter()?;
        self.with_cell(source, |from_cell| {
            self.with_cell(target, |to_cell| {
                if source == target {
                    let mut state = to_cell.state.write();
                    let Some(bytes) = self.still_shareable(&state, &state, first, at, bytes) else {
                        return Ok(None);
                    };
                    let wanted = self.shareable(from_cell, &mut state, first, bytes)?;
                    return self.take_blocks(to_cell, &mut state, &wanted, first, at, bytes).map(Some);
                }
                // In order of their numbers.
                let (mut from_state, mut to_state) = if source < target {
                    let from_state = from_cell.state.write();
                    (from_state, to_cell.state.write())
                } else {
                    let to_state = to_cell.state.write();
                    (from_cell.state.write(), to_state)
                };
                let Some(bytes) = self.still_shareable(&from_state, &to_state, first, at, bytes) else {
                    return Ok(None);
                };
                let wanted = self.shareable(from_cell, &mut from_state, first, bytes)?;
                self.take_blocks(to_cell, &mut to_state, &wanted, first, at, bytes).map(Some)
            })
        })
    }

    /// How many of `bytes` bytes the source has now. `None` when the last block is a short one, but does not end the
    /// source or would take away what the target has behind it.
    fn still_shareable(
        &self,
        source: &CellState,
        target: &CellState,
        first: u64,
        at: u64,
        bytes: u64,
    ) -> Option<u64> {
        let bs = u64::from(self.blocks.block_size());
        let bytes = bytes.min(source.inode.size.saturating_sub(first * bs));
        let ends_both = first * bs + bytes >= source.inode.size && at * bs + bytes >= target.inode.size;
        (bytes.is_multiple_of(bs) || ends_both).then_some(bytes)
    }

    /// The source's blocks, all of them in the journal and none of them inline; by index.
    fn shareable(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        first: u64,
        bytes: u64,
    ) -> Result<Vec<(u64, BlockId)>> {
        if state.gone {
            return Err(VfsError::Stale);
        }
        if state.inline.is_some() {
            self.mark_pending(cell, state);
            self.spill_now(cell.ino, state)?;
        }
        self.flush_cell(cell, state)?;
        let end = first + bytes.div_ceil(u64::from(self.blocks.block_size()));
        Ok(state.blocks_in(&self.journal, cell.ino, first, end)?.into_iter().collect())
    }

    fn take_blocks(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        wanted: &[(u64, BlockId)],
        first: u64,
        at: u64,
        bytes: u64,
    ) -> Result<u64> {
        if state.gone {
            return Err(VfsError::Stale);
        }
        if bytes == 0 {
            return Ok(0);
        }
        self.mark_pending(cell, state);
        if state.inline.is_some() {
            self.spill_now(cell.ino, state)?;
        }
        self.flush_cell(cell, state)?;
        // Nothing is pending now; a failure goes back to that.
        let units = state.inode.blocks;
        let taken = self.take_into(cell, state, wanted, first, at, bytes);
        if taken.is_err() {
            state.inode.blocks = units;
            state.extents.clear();
            state.touched.clear();
            state.released.clear();
        }
        taken.map(|()| bytes)
    }

    fn take_into(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        wanted: &[(u64, BlockId)],
        first: u64,
        at: u64,
        bytes: u64,
    ) -> Result<()> {
        let bs = u64::from(self.blocks.block_size());
        // What the target has there now goes, holes of the source included.
        let end = at + bytes.div_ceil(bs);
        for (index, id) in state.blocks_in(&self.journal, cell.ino, at, end)? {
            self.drop_block_now(state, index, id)?;
        }
        let mut inode = state.inode.clone();
        for (index, id) in wanted {
            state.extents.insert(index - first + at, *id);
            inode.blocks += u64::from(self.blocks.block_len(*id)?).div_ceil(4096) * 8;
        }
        inode.size = inode.size.max(at * bs + bytes);
        self.stamp(&mut inode, self.now());
        let mut gone = Vec::new();
        let (_, lsn) = self.journal.transact::<_, VfsError>(|tx| {
            // Shared first: a block may be both taken and released.
            for (_, id) in wanted {
                self.blocks.share(tx, *id)?;
            }
            state.put(tx, cell.ino, &inode, &self.blocks, &mut gone)?;
            Ok(())
        })?;
        state.dirty = true;
        self.committed(cell, state, inode, lsn, &gone);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_heads_blocks_and_tails() {
        let bs = 100;
        assert_eq!(plan(bs, 30, 130, 500, 1000, 0), Step::Bytes(70));
        assert_eq!(plan(bs, 100, 200, 500, 1000, 0), Step::Blocks(5));
        assert_eq!(plan(bs, 100, 200, 50, 150, 100), Step::Blocks(1));
        assert_eq!(plan(bs, 100, 200, 50, 150, 900), Step::Bytes(50));
        assert_eq!(plan(bs, 100, 200, 50, 900, 100), Step::Bytes(50));
        assert_eq!(plan(bs, 1, 2, 500, 1000, 0), Step::Bytes(500));
    }
}
