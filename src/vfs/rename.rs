//! Rename: replacing, refusing to replace, and swapping.

use std::sync::Arc;

use bytes::Bytes;

use super::ancestry::{self, Ancestry};
use super::cell::{Cell, CellState};
use super::names::NewInode;
use super::types::{Caller, FileKind, RenameMode, VfsError};
use super::{
    LOOKS, Result, TxError, Vfs, check_name, damaged, leads_nowhere, tx_dir, tx_entry, tx_inode, tx_is_empty,
    usage,
};
use crate::format::tables::{Dirent, Inode, dirent_key, inode_key, orphan_key};
use crate::ids::{BlockId, Ino};
use crate::journal::Tx;

/// One side of a rename as it was found before locking.
struct Side<'a> {
    parent: Ino,
    name: &'a [u8],
    entry: Option<Dirent>,
}

impl Vfs {
    pub(super) fn do_rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        let whiteout = match mode {
            RenameMode::Whiteout(owner) | RenameMode::WhiteoutNoReplace(owner) => {
                self.admit_name()?;
                Some((self.new_ino()?, owner))
            }
            _ => None,
        };
        let keeps = matches!(mode, RenameMode::NoReplace | RenameMode::WhiteoutNoReplace(_));
        let _gate = self.enter()?;
        for _ in 0..LOOKS {
            let from = Side { parent, name, entry: self.find(parent, name)? };
            let to = Side { parent: new_parent, name: new_name, entry: self.find(new_parent, new_name)? };
            let source = from.entry.ok_or(VfsError::NotFound)?;
            if to.entry.is_some_and(|t| t.ino == source.ino) && !keeps {
                // Two names of one inode: nothing happens.
                return Ok(());
            }
            // The cells of both files, locked in order of their numbers.
            let mut inos: Vec<Ino> = [from.entry, to.entry]
                .into_iter()
                .flatten()
                .filter(|e| e.kind != FileKind::Directory)
                .map(|e| e.ino)
                .collect();
            inos.sort_unstable();
            inos.dedup();
            let cells: Vec<Arc<Cell>> = match inos.iter().map(|i| self.cell(*i)).collect::<Result<_>>() {
                Err(VfsError::Stale) => continue,
                other => other?,
            };
            let done = self.rename_cells(&from, &to, mode, whiteout, &cells);
            cells.into_iter().for_each(|c| self.let_go(c));
            match done {
                Ok(orphan) => {
                    if let Some(ino) = orphan {
                        self.orphaned(ino);
                    }
                    return Ok(());
                }
                Err(e) => match e.into_refusal() {
                    Some(refusal) => return Err(refusal),
                    None => continue,
                },
            }
        }
        Err(leads_nowhere(parent, name))
    }

    fn rename_cells(
        &self,
        from: &Side<'_>,
        to: &Side<'_>,
        mode: RenameMode,
        whiteout: Option<(Ino, Caller)>,
        cells: &[Arc<Cell>],
    ) -> Result<Option<Ino>, TxError> {
        let mut states: Vec<_> = cells.iter().map(|c| c.state.write()).collect();
        if states.iter().any(|s| s.gone) {
            return Err(TxError::Again);
        }
        let mut gone = Vec::new();
        let ((changed, orphan), lsn) = self.journal.transact::<_, TxError>(|tx| {
            if tx_entry(tx, from.parent, from.name)? != from.entry
                || tx_entry(tx, to.parent, to.name)? != to.entry
            {
                return Err(TxError::Again);
            }
            let known: Vec<(Ino, &CellState)> =
                cells.iter().zip(&states).map(|(c, s)| (c.ino, &**s)).collect();
            let mut work = Work { vfs: self, known, now: self.now(), files: Vec::new(), gone: &mut gone };
            let orphan = match mode {
                RenameMode::Exchange => {
                    work.exchange(tx, from, to)?;
                    None
                }
                RenameMode::NoReplace | RenameMode::WhiteoutNoReplace(_) if to.entry.is_some() => {
                    return Err(VfsError::Exists.into());
                }
                _ => work.replace(tx, from, to)?,
            };
            if let Some((ino, owner)) = whiteout {
                work.leave_whiteout(tx, from, ino, owner)?;
            }
            let files = work.files;
            Ok((files, orphan))
        })?;
        self.blocks.after_commit(lsn, &gone);
        for (ino, inode) in changed {
            if let Some(i) = cells.iter().position(|c| c.ino == ino) {
                self.committed(&cells[i], &mut states[i], inode, lsn, &[]);
            }
        }
        Ok(orphan)
    }
}

/// The transaction's view of the inodes that a rename touches.
struct Work<'a, 'b> {
    vfs: &'a Vfs,
    known: Vec<(Ino, &'a CellState)>,
    now: super::types::Time,
    /// Files written, to tell their cells.
    files: Vec<(Ino, Inode)>,
    gone: &'b mut Vec<BlockId>,
}

impl Work<'_, '_> {
    fn get(&self, tx: &Tx<'_>, entry: Dirent) -> Result<Inode> {
        match self.known.iter().find(|(i, _)| *i == entry.ino) {
            Some((_, state)) => Ok(state.inode.clone()),
            None => tx_inode(tx, entry.ino),
        }
    }

    fn put(&mut self, tx: &mut Tx<'_>, ino: Ino, inode: Inode) -> Result<()> {
        match self.known.iter().find(|(i, _)| *i == ino) {
            Some((_, state)) => {
                state.put(tx, ino, &inode, &self.vfs.blocks, self.gone)?;
                self.files.push((ino, inode));
            }
            None => tx.put(inode_key(ino), inode.encode()),
        }
        Ok(())
    }

    /// Refuses to move a directory below itself.
    fn check_not_below(tx: &Tx<'_>, moved: Ino, new_parent: Ino) -> Result<()> {
        let above = |ino: Ino| match tx_inode(tx, ino) {
            Ok(inode) => Ok(inode.parent),
            Err(VfsError::Stale) => {
                Err(damaged(&format!("directory {ino}, on the way to the root, has no inode")))
            }
            Err(e) => Err(e),
        };
        match ancestry::is_below(moved, new_parent, above)? {
            Ancestry::Apart => Ok(()),
            Ancestry::Below => Err(VfsError::Invalid),
            Ancestry::Cycle(ino) => {
                Err(damaged(&format!("no way leads from directory {ino} to the root: it is above itself")))
            }
        }
    }

    /// Notes new times, and `links` more subdirectories, of a parent.
    fn touch_parent(&self, tx: &mut Tx<'_>, parent: Ino, links: i32) -> Result<()> {
        let mut dir = tx_dir(tx, parent)?;
        dir.nlink = dir.nlink.saturating_add_signed(links);
        dir.mtime = self.now;
        dir.ctime = self.now;
        tx.put(inode_key(parent), dir.encode());
        Ok(())
    }

    fn replace(&mut self, tx: &mut Tx<'_>, from: &Side<'_>, to: &Side<'_>) -> Result<Option<Ino>> {
        let source = from.entry.ok_or(VfsError::NotFound)?;
        let source_is_dir = source.kind == FileKind::Directory;
        // A removed directory takes no names, and what was above it may be gone.
        tx_dir(tx, to.parent)?;
        if source_is_dir {
            Self::check_not_below(tx, source.ino, to.parent)?;
        }
        let mut orphan = None;
        let mut replaced_dir = false;
        if let Some(target) = to.entry {
            match (source_is_dir, target.kind == FileKind::Directory) {
                (true, false) => return Err(VfsError::NotDirectory),
                (false, true) => return Err(VfsError::IsDirectory),
                (true, true) if !tx_is_empty(tx, target.ino)? => return Err(VfsError::NotEmpty),
                (_, is_dir) => replaced_dir = is_dir,
            }
            let mut inode = self.get(tx, target)?;
            inode.nlink = if replaced_dir { 0 } else { inode.nlink.saturating_sub(1) };
            inode.ctime = self.now;
            if inode.nlink == 0 {
                tx.put(orphan_key(target.ino), Bytes::new());
                orphan = Some(target.ino);
            }
            self.put(tx, target.ino, inode)?;
        }
        let moved_links = i32::from(source_is_dir);
        let lost_links = i32::from(replaced_dir);
        if from.parent == to.parent {
            self.touch_parent(tx, from.parent, -lost_links)?;
        } else {
            self.touch_parent(tx, from.parent, -moved_links)?;
            self.touch_parent(tx, to.parent, moved_links - lost_links)?;
        }
        tx.delete(dirent_key(from.parent, from.name));
        tx.put(dirent_key(to.parent, to.name), source.encode());
        let mut inode = self.get(tx, source)?;
        inode.ctime = self.now;
        if source_is_dir {
            inode.parent = to.parent;
        }
        self.put(tx, source.ino, inode)?;
        Ok(orphan)
    }

    /// Puts a whiteout, the sign of overlay filesystems that a name below is gone, where the name was.
    fn leave_whiteout(&self, tx: &mut Tx<'_>, from: &Side<'_>, ino: Ino, owner: Caller) -> Result<()> {
        let dir = tx_dir(tx, from.parent)?;
        let new = NewInode { kind: FileKind::CharDevice, perm: 0, rdev: 0, target: b"" };
        let inode = new.inode(&dir, from.parent, owner, self.now);
        tx.put(inode_key(ino), inode.encode());
        tx.put(dirent_key(from.parent, from.name), Dirent { ino, kind: inode.kind }.encode());
        usage::change(tx, 0, 1)?;
        Ok(())
    }

    fn exchange(&mut self, tx: &mut Tx<'_>, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
        let source = from.entry.ok_or(VfsError::NotFound)?;
        let target = to.entry.ok_or(VfsError::NotFound)?;
        let (source_is_dir, target_is_dir) =
            (source.kind == FileKind::Directory, target.kind == FileKind::Directory);
        if source_is_dir {
            Self::check_not_below(tx, source.ino, to.parent)?;
        }
        if target_is_dir {
            Self::check_not_below(tx, target.ino, from.parent)?;
        }
        let links = i32::from(target_is_dir) - i32::from(source_is_dir);
        if from.parent == to.parent {
            self.touch_parent(tx, from.parent, 0)?;
        } else {
            self.touch_parent(tx, from.parent, links)?;
            self.touch_parent(tx, to.parent, -links)?;
        }
        tx.put(dirent_key(from.parent, from.name), target.encode());
        tx.put(dirent_key(to.parent, to.name), source.encode());
        for (entry, parent) in [(source, to.parent), (target, from.parent)] {
            let mut inode = self.get(tx, entry)?;
            inode.ctime = self.now;
            if entry.kind == FileKind::Directory {
                inode.parent = parent;
            }
            self.put(tx, entry.ino, inode)?;
        }
        Ok(())
    }
}
