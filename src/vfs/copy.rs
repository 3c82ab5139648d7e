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
        let len = len.min(source_inode.size.saturating_sub(from));
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
                Step::Blocks(n) => self.share_blocks(source, from / bs, target, to / bs, n, len - done),
                Step::Bytes(n) => self.copy_bytes(source, from, target, to, n, wait),
            };
            match step {
                Ok(0) => break,
                Ok(n) => done += n,
                // What is done is done; the caller comes back for the rest.
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn copy_bytes(&self, source: Ino, from: u64, target: Ino, to: u64, n: u64, wait: Wait) -> Result<u64> {
        let data = self.do_read(source, from, n as u32, wait)?;
        Ok(u64::from(self.do_write(target, to, &data, wait)?))
    }

    /// Lets the target name `count` blocks of the source; `len` bounds the bytes. Answers the bytes covered.
    fn share_blocks(
        &self,
        source: Ino,
        first: u64,
        target: Ino,
        at: u64,
        count: u64,
        len: u64,
    ) -> Result<u64> {
        let bs = u64::from(self.blocks.block_size());
        let _gate = self.enter()?;
        let from_cell = self.cell(source)?;
        let to_cell = self.cell(target)?;
        let bytes = if source == target {
            let mut state = to_cell.state.write();
            let wanted = Self::shareable(self, &from_cell, &mut state, first, count)?;
            self.take_blocks(&to_cell, &mut state, &wanted, first, at, (count * bs).min(len))?
        } else {
            // In order of their numbers.
            let (mut from_state, mut to_state) = if source < target {
                let from_state = from_cell.state.write();
                (from_state, to_cell.state.write())
            } else {
                let to_state = to_cell.state.write();
                (from_cell.state.write(), to_state)
            };
            let wanted = Self::shareable(self, &from_cell, &mut from_state, first, count)?;
            self.take_blocks(&to_cell, &mut to_state, &wanted, first, at, (count * bs).min(len))?
        };
        self.let_go(from_cell);
        self.let_go(to_cell);
        Ok(bytes)
    }

    /// The source's blocks, all of them in the journal and none of them inline; by index.
    fn shareable(
        &self,
        cell: &Arc<Cell>,
        state: &mut CellState,
        first: u64,
        count: u64,
    ) -> Result<Vec<(u64, BlockId)>> {
        if state.gone {
            return Err(VfsError::Stale);
        }
        if state.inline.is_some() {
            self.mark_pending(cell, state);
            self.spill_now(cell.ino, state)?;
        }
        self.flush_cell(cell, state)?;
        Ok(state.blocks_in(&self.journal, cell.ino, first, first + count)?.into_iter().collect())
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
        let bs = u64::from(self.blocks.block_size());
        self.mark_pending(cell, state);
        if state.inline.is_some() {
            self.spill_now(cell.ino, state)?;
        }
        self.flush_cell(cell, state)?;
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
        let now = self.now();
        inode.size = inode.size.max(at * bs + bytes);
        inode.mtime = now;
        inode.ctime = now;
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
        Ok(bytes)
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
