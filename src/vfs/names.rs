//! Names: looking up, making and removing directory entries.

use std::sync::Arc;

use bytes::Bytes;

use super::cell::Cell;
use super::types::{Attr, Caller, DirItem, FileKind, Time, VfsError};
use super::{
    LINK_MAX, LOOKS, Result, TARGET_MAX, TxError, Vfs, check_name, leads_nowhere, tx_dir, tx_entry, tx_inode,
    tx_is_empty, usage,
};
use crate::format::brief;
use crate::format::tables::{
    Body, Dirent, Inode, dirent_key, dirent_range, inode_key, orphan_key, split_dirent_key,
};
use crate::ids::Ino;

/// Entries read from the journal at once while a directory is listed.
const PAGE: usize = 256;

/// What a new inode begins with.
pub(super) struct NewInode<'a> {
    pub kind: FileKind,
    pub perm: u16,
    pub rdev: u32,
    pub target: &'a [u8],
}

impl NewInode<'_> {
    /// The inode as `caller` makes it in `dir`, whose number is `parent`.
    pub(super) fn inode(&self, dir: &Inode, parent: Ino, caller: Caller, now: Time) -> Inode {
        let is_dir = self.kind == FileKind::Directory;
        let inherits = dir.perm & 0o2000 != 0;
        let perm = (self.perm & 0o7777) | if is_dir && inherits { 0o2000 } else { 0 };
        let owner = (caller.uid, if inherits { dir.gid } else { caller.gid });
        Inode {
            rdev: self.rdev,
            size: self.target.len() as u64,
            parent: if is_dir { parent } else { Ino(0) },
            body: match self.kind {
                FileKind::Regular => Body::Inline(Bytes::new()),
                FileKind::Symlink => Body::Target(Bytes::copy_from_slice(self.target)),
                _ => Body::Blocks,
            },
            ..Inode::new(self.kind, perm, owner, now)
        }
    }
}

impl Vfs {
    pub(super) fn find(&self, parent: Ino, name: &[u8]) -> Result<Option<Dirent>> {
        self.brief(&dirent_key(parent, name), brief::dirent, Dirent::decode)
    }

    pub(super) fn do_lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        if name.len() > super::NAME_MAX {
            return Err(VfsError::NameTooLong);
        }
        let ino = match name {
            b"." => parent,
            b".." => self.load_brief(parent)?.parent,
            _ => self.find(parent, name)?.ok_or(VfsError::NotFound)?.ino,
        };
        // Referenced first, so that it cannot be reaped between the two looks.
        self.reference(ino);
        match self.inode(ino) {
            Ok(inode) => Ok(self.attr(ino, &inode)),
            Err(e) => {
                self.do_forget(ino, 1);
                Err(if e == VfsError::Stale { VfsError::NotFound } else { e })
            }
        }
    }

    /// Makes an inode with a name. With `open`, one open handle is counted.
    pub(super) fn make(
        &self,
        parent: Ino,
        name: &[u8],
        new: &NewInode<'_>,
        caller: &Caller,
        open: bool,
    ) -> Result<Attr> {
        check_name(name)?;
        self.admit_name()?;
        let _gate = self.enter()?;
        let ino = self.new_ino()?;
        let now = self.now();
        let is_dir = new.kind == FileKind::Directory;
        // Referenced before anybody else can know of it, so that it cannot be reaped under our hands.
        self.reference(ino);
        let made = self.journal.transact::<_, VfsError>(|tx| {
            let mut dir = tx_dir(tx, parent)?;
            if tx_entry(tx, parent, name)?.is_some() {
                return Err(VfsError::Exists);
            }
            let inode = self.new_inode(tx, ino, new, (parent, &dir), caller, now)?;
            if is_dir {
                dir.nlink = dir.nlink.checked_add(1).ok_or(VfsError::TooManyLinks)?;
            }
            dir.mtime = now;
            dir.ctime = now;
            tx.put(inode_key(ino), inode.encode());
            tx.put(dirent_key(parent, name), Dirent { ino, kind: new.kind }.encode());
            tx.put(inode_key(parent), dir.encode());
            usage::change(tx, 0, 1)?;
            Ok(inode)
        });
        match made {
            Ok((inode, _)) => {
                if open {
                    self.count_open(ino);
                }
                Ok(self.attr(ino, &inode))
            }
            Err(e) => {
                self.do_forget(ino, 1);
                Err(e)
            }
        }
    }

    pub(super) fn do_symlink(
        &self,
        parent: Ino,
        name: &[u8],
        target: &[u8],
        caller: &Caller,
    ) -> Result<Attr> {
        if target.is_empty() {
            return Err(VfsError::NotFound);
        }
        if target.len() > TARGET_MAX {
            return Err(VfsError::NameTooLong);
        }
        self.make(
            parent,
            name,
            &NewInode { kind: FileKind::Symlink, perm: 0o777, rdev: 0, target },
            caller,
            false,
        )
    }

    pub(super) fn do_link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        self.admit_name()?;
        let now = self.now();
        let (_, inode) = match self.existing_kind(ino)? {
            FileKind::Directory => return Err(VfsError::NotPermitted),
            kind => self.modify(ino, |tx, inode| {
                let mut dir = tx_dir(tx, parent)?;
                if tx_entry(tx, parent, name)?.is_some() {
                    return Err(VfsError::Exists);
                }
                if inode.nlink == 0 {
                    return Err(VfsError::NotFound);
                }
                if inode.nlink >= LINK_MAX {
                    return Err(VfsError::TooManyLinks);
                }
                inode.nlink += 1;
                inode.ctime = now;
                dir.mtime = now;
                dir.ctime = now;
                tx.put(dirent_key(parent, name), Dirent { ino, kind }.encode());
                tx.put(inode_key(parent), dir.encode());
                Ok(())
            })?,
        };
        self.reference(ino);
        Ok(self.attr(ino, &inode))
    }

    fn existing_kind(&self, ino: Ino) -> Result<FileKind> {
        Ok(self.load_brief(ino)?.kind)
    }

    pub(super) fn do_unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let _gate = self.enter()?;
        for _ in 0..LOOKS {
            let entry = self.find(parent, name)?.ok_or(VfsError::NotFound)?;
            if entry.kind == FileKind::Directory {
                return Err(VfsError::IsDirectory);
            }
            let cell = match self.cell(entry.ino) {
                Err(VfsError::Stale) => continue,
                other => other?,
            };
            let done = self.unlink_cell(parent, name, &cell);
            self.let_go(cell);
            match done {
                Ok(()) => return Ok(()),
                Err(e) => match e.into_refusal() {
                    Some(refusal) => return Err(refusal),
                    None => continue,
                },
            }
        }
        Err(leads_nowhere(parent, name))
    }

    fn unlink_cell(&self, parent: Ino, name: &[u8], cell: &Arc<Cell>) -> Result<(), TxError> {
        let mut state = cell.state.write();
        if state.gone {
            return Err(TxError::Again);
        }
        let now = self.now();
        let mut gone = Vec::new();
        let (inode, lsn) = self.journal.transact::<_, TxError>(|tx| {
            if tx_entry(tx, parent, name)?.map(|e| e.ino) != Some(cell.ino) {
                return Err(TxError::Again);
            }
            let mut dir = tx_dir(tx, parent)?;
            dir.mtime = now;
            dir.ctime = now;
            tx.put(inode_key(parent), dir.encode());
            tx.delete(dirent_key(parent, name));
            let mut inode = state.inode.clone();
            inode.nlink = inode.nlink.saturating_sub(1);
            inode.ctime = now;
            if inode.nlink == 0 {
                tx.put(orphan_key(cell.ino), Bytes::new());
            }
            state.put(tx, cell.ino, &inode, &self.blocks, &mut gone)?;
            Ok(inode)
        })?;
        let orphan = inode.nlink == 0;
        self.committed(cell, &mut state, inode, lsn, &gone);
        drop(state);
        if orphan {
            self.orphaned(cell.ino);
        }
        Ok(())
    }

    pub(super) fn do_rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        if name == b"." {
            return Err(VfsError::Invalid);
        }
        if name == b".." {
            return Err(VfsError::NotEmpty);
        }
        let _gate = self.enter()?;
        let now = self.now();
        let (ino, lsn) = self.journal.transact::<_, VfsError>(|tx| {
            let mut dir = tx_dir(tx, parent)?;
            let entry = tx_entry(tx, parent, name)?.ok_or(VfsError::NotFound)?;
            if entry.kind != FileKind::Directory {
                return Err(VfsError::NotDirectory);
            }
            if !tx_is_empty(tx, entry.ino)? {
                return Err(VfsError::NotEmpty);
            }
            let mut child = tx_inode(tx, entry.ino)?;
            child.nlink = 0;
            child.ctime = now;
            dir.nlink = dir.nlink.saturating_sub(1);
            dir.mtime = now;
            dir.ctime = now;
            tx.put(inode_key(entry.ino), child.encode());
            tx.put(orphan_key(entry.ino), Bytes::new());
            tx.put(inode_key(parent), dir.encode());
            tx.delete(dirent_key(parent, name));
            Ok(entry.ino)
        })?;
        self.blocks.after_commit(lsn, &[]);
        self.orphaned(ino);
        Ok(())
    }

    pub(super) fn do_readdir(
        &self,
        ino: Ino,
        after: u64,
        plus: bool,
        emit: &mut dyn FnMut(&DirItem<'_>) -> bool,
    ) -> Result<()> {
        let dir = self.load_brief(ino)?;
        if dir.kind != FileKind::Directory {
            return Err(VfsError::NotDirectory);
        }
        for (cookie, name, target) in [(1, &b"."[..], ino), (2, &b".."[..], dir.parent)] {
            let item = DirItem { ino: target, kind: FileKind::Directory, cookie, name, attr: None };
            if after < cookie && !emit(&item) {
                return Ok(());
            }
        }
        let mut after = after.max(2);
        loop {
            let (start, end) = dirent_range(ino, after);
            let page = self.journal.scan(&start, &end, PAGE)?;
            for (key, value) in &page {
                let Some((cookie, name)) = split_dirent_key(key) else { continue };
                let entry = Dirent::decode(value)?;
                let attr = if plus {
                    // Referenced first, as in a lookup.
                    self.reference(entry.ino);
                    match self.inode(entry.ino) {
                        Ok(inode) => Some(self.attr(entry.ino, &inode)),
                        Err(e) => {
                            self.do_forget(entry.ino, 1);
                            // Removed since the page was read.
                            if e == VfsError::Stale {
                                continue;
                            }
                            return Err(e);
                        }
                    }
                } else {
                    None
                };
                if !emit(&DirItem { ino: entry.ino, kind: entry.kind, cookie, name, attr }) {
                    if plus {
                        self.do_forget(entry.ino, 1);
                    }
                    return Ok(());
                }
                after = cookie;
            }
            if page.len() < PAGE {
                return Ok(());
            }
        }
    }
}
