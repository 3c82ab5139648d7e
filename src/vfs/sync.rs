//! Durability: local commits, fsync, and the cut that ends a transaction group.

use std::sync::Arc;

use super::cell::Cell;
use super::types::{VfsError, Wait};
use super::{Result, Vfs};
use crate::ids::{Ino, Lsn};
use crate::txg::{Cut, CutSource};

/// Waits for replicas on behalf of fsync. Implemented by whoever ships.
pub trait Durability: Send + Sync {
    /// Returns when everything committed before the call is on as many replicas as the volume's fsync level asks for, or
    /// says why not (after a deadline).
    fn replicate(&self) -> std::result::Result<(), VfsError>;
}

impl Vfs {
    /// Gives fsync the replicas to wait for. Once.
    pub fn set_durability(&self, durability: Arc<dyn Durability>) {
        let _ = self.durability.set(durability);
    }

    pub(super) fn do_flush(&self, ino: Ino) -> Result<()> {
        self.commit_file(ino, false)?;
        self.unwritten.book.check(ino)
    }

    /// Puts what is pending of a file into the journal; `waits`: to be made durable at once.
    fn commit_file(&self, ino: Ino, waits: bool) -> Result<()> {
        let Some(cell) = self.existing_cell(ino) else { return Ok(()) };
        let committed = self.commit_cell(&cell, waits);
        self.let_go(cell);
        committed
    }

    fn commit_cell(&self, cell: &Cell, waits: bool) -> Result<()> {
        if cell.state.read().dirty {
            let _gate = self.enter()?;
            let mut state = cell.state.write();
            state.is_waited_for = waits;
            let flushed = self.flush_cell(cell, &mut state);
            state.is_waited_for = false;
            flushed?;
        }
        Ok(())
    }

    pub(super) fn do_fsync(&self, ino: Ino, wait: Wait) -> Result<()> {
        if self.options.remote_fsync && wait == Wait::No {
            return Err(VfsError::WouldBlock);
        }
        self.commit_file(ino, true)?;
        self.journal.barrier(self.journal.last_lsn())?;
        // The kernel told one caller of it, and calls the pages clean since.
        self.unwritten.book.check(ino)?;
        match self.durability.get() {
            Some(durability) if self.options.remote_fsync => durability.replicate(),
            _ => Ok(()),
        }
    }

    /// Commits what is pending of every file and makes it durable locally. A file that cannot be committed stops no
    /// other: it stays pending, and the first such error is the answer.
    pub fn commit(&self) -> Result<Lsn> {
        let pending: Vec<Arc<Cell>> = self.pending.lock().values().cloned().collect();
        let mut failed = None;
        for cell in pending {
            let flushed = {
                let _gate = self.gate.read();
                self.flush_cell(&cell, &mut cell.state.write())
            };
            if let Err(e) = flushed {
                // A full disk is told of elsewhere, and once.
                if e != VfsError::NoSpace {
                    log::error!("inode {} cannot be committed: {e}", cell.ino);
                }
                failed = failed.or(Some(e));
            }
            self.let_go(cell);
        }
        let lsn = self.journal.last_lsn();
        self.journal.barrier(lsn)?;
        self.blocks.housekeep()?;
        failed.map_or(Ok(lsn), Err)
    }

    /// Ends the collecting transaction group: the state of this moment, exactly. So one file whose changes cannot be
    /// committed makes the cut fail as a whole: a replica would otherwise show a later change of another file without
    /// this earlier one, and frozen blocks that no record names. What can fail for one file alone is damage in the local
    /// tables, which only a rebuild mends; all else (space, a failed disk) is the journal's and ends with its cause.
    pub fn cut(&self) -> Result<Cut> {
        // Most of what is pending is committed before writers are held off, so that they wait only for the rest.
        self.commit()?;
        // Nobody waits for the disk while holding writers off.
        self.journal.make_room()?;
        let cells;
        let cut = {
            let _gate = self.gate.write();
            cells = self.pending.lock().values().cloned().collect::<Vec<_>>();
            for cell in &cells {
                self.flush_cell_with(cell, &mut cell.state.write(), true)?;
            }
            Cut { lsn: self.journal.last_lsn(), frozen: self.blocks.freeze() }
        };
        cells.into_iter().for_each(|c| self.let_go(c));
        Ok(cut)
    }

    /// Files with changes that are not in the journal yet.
    pub fn pending_files(&self) -> usize {
        self.pending.lock().len()
    }
}

impl CutSource for Vfs {
    fn cut(&self) -> std::result::Result<Cut, String> {
        Vfs::cut(self).map_err(|e| e.to_string())
    }

    fn has_pending(&self) -> bool {
        self.pending_files() > 0
    }
}
