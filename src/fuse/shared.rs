//! What the adapter's threads share: the filesystem, the threads that may wait, who may write, the way to the kernel.
//!
//! Owns the knowledge of which inodes the kernel may hold unwritten pages of, and the rule by which set-user-id bits fall.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use fuser::{INodeNo, Notifier, OpenAccMode, OpenFlags};
use parking_lot::Mutex;

use super::convert::without_privileges;
use super::pool::Pool;
use crate::ids::Ino;
use crate::vfs::api::FileSystem;
use crate::vfs::types::{Caller, FileKind, SetAttr, VfsError};

/// What the adapter's threads share.
pub(super) struct Shared {
    pub(super) fs: Arc<dyn FileSystem>,
    /// Reads that wait for a replica.
    pub(super) reads: Pool,
    /// Writes that wait for space, or for a block that they change in part.
    pub(super) writes: Pool,
    /// All syncs: they wait for the disk at least.
    pub(super) syncs: Pool,
    /// How many descriptors may write to an inode: only then the kernel may hold pages of it that we have not seen.
    writers: Mutex<HashMap<Ino, u32>>,
    notifier: Arc<OnceLock<Notifier>>,
}

impl Shared {
    /// Around `fs`; `notifier` is to be set when the session is there.
    pub(super) fn new(fs: Arc<dyn FileSystem>, notifier: Arc<OnceLock<Notifier>>) -> Self {
        Self {
            fs,
            reads: Pool::new("mirrorfs-read", 48),
            writes: Pool::new("mirrorfs-write", 32),
            syncs: Pool::new("mirrorfs-sync", 48),
            writers: Mutex::default(),
            notifier,
        }
    }

    /// Makes the kernel ask again for an inode's attributes.
    pub(super) fn forget_attr(&self, ino: Ino) {
        if let Some(notifier) = self.notifier.get()
            && let Err(e) = notifier.inval_inode(INodeNo(ino.0), -1, 0)
        {
            log::debug!("the kernel kept its attributes of inode {ino}: {e}");
        }
    }

    /// Makes the kernel hand over the pages of `ino` that it has not written yet. Waits for our own answers to its
    /// writes: never call this on a thread that serves requests.
    pub(super) fn pull_pages(&self, ino: Ino) {
        if let Some(notifier) = self.notifier.get()
            && let Err(e) = notifier.inval_inode(INodeNo(ino.0), 0, 0)
        {
            log::debug!("the kernel kept its pages of inode {ino}: {e}");
        }
    }

    pub(super) fn opened(&self, ino: Ino, flags: OpenFlags) {
        if may_write(flags) {
            *self.writers.lock().entry(ino).or_default() += 1;
        }
    }

    pub(super) fn closed(&self, ino: Ino, flags: OpenFlags) {
        if may_write(flags) {
            let mut writers = self.writers.lock();
            if let Some(n) = writers.get_mut(&ino) {
                *n -= 1;
                if *n == 0 {
                    writers.remove(&ino);
                }
            }
        }
    }

    pub(super) fn has_writers(&self, ino: Ino) -> bool {
        self.writers.lock().contains_key(&ino)
    }

    /// The permission bits to set because content or owner of `ino` change, if that changes them.
    pub(super) fn fallen_privileges(&self, ino: Ino) -> Option<u16> {
        let attr = self.fs.getattr(ino).ok()?;
        let perm = without_privileges(attr.perm);
        (perm != attr.perm && !matches!(attr.kind, FileKind::Directory | FileKind::Symlink)).then_some(perm)
    }

    /// Takes set-user-id and set-group-id from `ino`, as before a write or truncation by an unprivileged process.
    pub(super) fn drop_privileges(&self, ino: Ino, caller: &Caller) -> Result<(), VfsError> {
        if let Some(perm) = self.fallen_privileges(ino) {
            self.fs.setattr(ino, &SetAttr { perm: Some(perm), ..SetAttr::default() }, caller)?;
            self.forget_attr(ino);
        }
        Ok(())
    }
}

/// Whether a descriptor opened with these flags may write.
pub(super) fn may_write(flags: OpenFlags) -> bool {
    flags.acc_mode() != OpenAccMode::O_RDONLY
}
