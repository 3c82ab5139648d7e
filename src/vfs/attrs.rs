//! Attributes: stat, chmod, chown, utimens, truncate by path, statfs.

use super::types::{Attr, Caller, FileKind, SetAttr, SetTime, StatFs, Time, VfsError};
use super::{NAME_MAX, Result, SIZE_MAX, Vfs, usage};
use crate::format::tables::Inode;
use crate::ids::Ino;

/// Space shown as the volume's size at the least: buckets have no size, but programs want one.
const NOMINAL_BYTES: u64 = 1 << 50;
/// Inodes shown as possible.
const NOMINAL_INODES: u64 = 1 << 40;

impl Vfs {
    pub(super) fn do_getattr(&self, ino: Ino) -> Result<Attr> {
        let inode = self.inode(ino)?;
        Ok(self.attr(ino, &inode))
    }

    pub(super) fn do_setattr(&self, ino: Ino, set: &SetAttr, _caller: &Caller) -> Result<Attr> {
        let now = self.now();
        if set.atime.is_some() {
            self.accessed.forget(ino);
        }
        if let Some(size) = set.size {
            self.set_size(ino, size, set, now)?;
            self.no_longer_refused(ino, size, u64::MAX);
            let inode = self.inode(ino)?;
            return Ok(self.attr(ino, &inode));
        }
        if set.is_only_times() {
            match self.set_times(ino, set, now) {
                Err(VfsError::IsDirectory) => {}
                done => return done,
            }
        }
        let (_, inode) = self.modify(ino, |tx, inode| {
            if let Some(perm) = set.perm {
                self.acl_follows_mode(tx, ino, perm)?;
            }
            self.apply(inode, set, now);
            Ok(())
        })?;
        Ok(self.attr(ino, &inode))
    }

    /// Sets a file's times. Those of what was written to it, which the kernel sends for each file that is closed, behind its content,
    /// go into the journal together with that.
    fn set_times(&self, ino: Ino, set: &SetAttr, now: Time) -> Result<Attr> {
        self.with_state(ino, |cell, state| {
            // The kernel's last word about a file that is being deleted waits, too: it goes with what deletes it.
            let waits = set.is_of_a_write() || state.inode.nlink == 0;
            if waits && state.inode.kind == FileKind::Regular {
                self.apply(&mut state.inode, set, now);
                self.mark_pending(cell, state);
            } else {
                self.modify_cell(cell, state, |_, inode| {
                    self.apply(inode, set, now);
                    Ok(())
                })?;
            }
            Ok(self.attr(ino, &state.inode))
        })
    }

    /// Truncates or extends, and applies what else `set` asks for, in one transaction.
    fn set_size(&self, ino: Ino, size: u64, set: &SetAttr, now: Time) -> Result<()> {
        if size > SIZE_MAX {
            return Err(VfsError::FileTooLarge);
        }
        self.with_state(ino, |cell, state| {
            if state.inode.kind != FileKind::Regular {
                return Err(VfsError::Invalid);
            }
            self.shed(cell, state, size)?;
            self.mark_pending(cell, state);
            let same = size == state.inode.size;
            self.truncate_state(ino, state, size)?;
            if same && *set == (SetAttr { size: Some(size), ..SetAttr::default() }) {
                // The kernel keeps the times of files itself, and leaves them as they are then: so do we.
                return Ok(());
            }
            self.stamp(&mut state.inode, now);
            self.apply(&mut state.inode, set, now);
            // With blocks given up there is something to reclaim: commit at once. So truncation by path is in order
            // with the renames around it, too.
            self.flush_cell(cell, state)?;
            Ok(())
        })
    }

    pub(super) fn do_statfs(&self) -> Result<StatFs> {
        let used = usage::read(&self.journal)?;
        let block_size = 4096;
        let used_blocks = used.blocks.div_ceil(u64::from(block_size) / 512);
        let total = (NOMINAL_BYTES / u64::from(block_size)).max(used_blocks.saturating_mul(2));
        Ok(StatFs {
            block_size,
            blocks: total,
            free: total - used_blocks,
            inodes: NOMINAL_INODES,
            inodes_free: NOMINAL_INODES.saturating_sub(used.inodes),
            name_max: NAME_MAX as u32,
        })
    }

    /// What the volume holds.
    pub fn usage(&self) -> Result<usage::Usage> {
        Ok(usage::read(&self.journal)?)
    }

    fn apply(&self, inode: &mut Inode, set: &SetAttr, now: Time) {
        let time = |t: SetTime| match t {
            SetTime::Now => now,
            SetTime::At(t) => t,
        };
        if let Some(perm) = set.perm {
            inode.perm = perm & 0o7777;
        }
        if let Some(uid) = set.uid {
            inode.uid = uid;
        }
        if let Some(gid) = set.gid {
            inode.gid = gid;
        }
        if let Some(t) = set.atime {
            inode.atime = time(t);
        }
        if let Some(t) = set.mtime {
            inode.mtime = time(t);
        }
        if let Some(ctime) = set.ctime {
            inode.ctime = ctime;
        } else if !self.keeps_times_of(inode) {
            inode.ctime = now;
        }
    }
}
