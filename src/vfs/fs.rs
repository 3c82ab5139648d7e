//! [`Vfs`] as a [`FileSystem`]: each operation in one line.

use bytes::Bytes;

use super::Vfs;
use super::api::{FileSystem, VfsResult};
use super::names::NewInode;
use super::types::{
    Attr, Caller, DirItem, Fallocate, FileKind, RenameMode, Seek, SetAttr, StatFs, VfsError, Wait, XattrMode,
};
use crate::ids::Ino;

impl FileSystem for Vfs {
    fn caller_keeps_times(&self) {
        self.times_are_kept.store(true, std::sync::atomic::Ordering::Release);
    }

    fn lookup(&self, parent: Ino, name: &[u8]) -> VfsResult<Attr> {
        self.do_lookup(parent, name)
    }

    fn forget(&self, ino: Ino, n: u64) {
        self.do_forget(ino, n);
    }

    fn getattr(&self, ino: Ino) -> VfsResult<Attr> {
        self.do_getattr(ino)
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, caller: &Caller) -> VfsResult<Attr> {
        self.do_setattr(ino, set, caller)
    }

    fn readlink(&self, ino: Ino) -> VfsResult<Bytes> {
        // A link's target never changes, so that what is pending of it does not count.
        match self.load(ino)?.body {
            crate::format::tables::Body::Target(target) => Ok(target),
            _ => Err(VfsError::Invalid),
        }
    }

    fn create(&self, parent: Ino, name: &[u8], perm: u16, caller: &Caller) -> VfsResult<Attr> {
        let new = NewInode { kind: FileKind::Regular, perm, rdev: 0, target: b"" };
        self.make(parent, name, &new, caller, true)
    }

    fn mknod(
        &self,
        parent: Ino,
        name: &[u8],
        kind: FileKind,
        perm: u16,
        rdev: u32,
        caller: &Caller,
    ) -> VfsResult<Attr> {
        if matches!(kind, FileKind::Directory | FileKind::Symlink) {
            return Err(VfsError::Invalid);
        }
        self.make(parent, name, &NewInode { kind, perm, rdev, target: b"" }, caller, false)
    }

    fn mkdir(&self, parent: Ino, name: &[u8], perm: u16, caller: &Caller) -> VfsResult<Attr> {
        let new = NewInode { kind: FileKind::Directory, perm, rdev: 0, target: b"" };
        self.make(parent, name, &new, caller, false)
    }

    fn symlink(&self, parent: Ino, name: &[u8], target: &[u8], caller: &Caller) -> VfsResult<Attr> {
        self.do_symlink(parent, name, target, caller)
    }

    fn link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> VfsResult<Attr> {
        self.do_link(ino, new_parent, new_name)
    }

    fn unlink(&self, parent: Ino, name: &[u8]) -> VfsResult<()> {
        self.do_unlink(parent, name)
    }

    fn rmdir(&self, parent: Ino, name: &[u8]) -> VfsResult<()> {
        self.do_rmdir(parent, name)
    }

    fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> VfsResult<()> {
        self.do_rename(parent, name, new_parent, new_name, mode)
    }

    fn open(&self, ino: Ino, write: bool, truncate: bool) -> VfsResult<()> {
        self.do_open(ino, write, truncate)
    }

    fn release(&self, ino: Ino) {
        self.do_release(ino);
    }

    fn flush(&self, ino: Ino) -> VfsResult<()> {
        self.do_flush(ino)
    }

    fn readdir(
        &self,
        ino: Ino,
        after: u64,
        plus: bool,
        emit: &mut dyn FnMut(&DirItem<'_>) -> bool,
    ) -> VfsResult<()> {
        self.do_readdir(ino, after, plus, emit)
    }

    fn read(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> VfsResult<Bytes> {
        self.read_known(ino, offset, len, wait, false)
    }

    fn read_to_change(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> VfsResult<Bytes> {
        self.read_known(ino, offset, len, wait, true)
    }

    fn has_refused(&self, ino: Ino) -> bool {
        self.unwritten.book.end(ino).is_some()
    }

    fn accessed(&self, ino: Ino) {
        self.note_access(ino);
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> VfsResult<u32> {
        self.do_write(ino, offset, data, Some(self.now()), wait)
    }

    fn write_back(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> VfsResult<u32> {
        self.do_write_back(ino, offset, data, wait)
    }

    fn fsync(&self, ino: Ino, _datasync: bool, wait: Wait) -> VfsResult<()> {
        self.do_fsync(ino, wait)
    }

    fn fsyncdir(&self, ino: Ino, wait: Wait) -> VfsResult<()> {
        self.do_fsync(ino, wait)
    }

    fn fallocate(&self, ino: Ino, how: Fallocate, offset: u64, len: u64, wait: Wait) -> VfsResult<()> {
        self.do_fallocate(ino, how, offset, len, wait)
    }

    fn lseek(&self, ino: Ino, offset: u64, seek: Seek) -> VfsResult<u64> {
        self.seek_known(ino, offset, seek)
    }

    fn copy_file_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
        wait: Wait,
    ) -> VfsResult<u64> {
        self.do_copy(source, source_offset, target, target_offset, len, wait)
    }

    fn statfs(&self) -> VfsResult<StatFs> {
        self.do_statfs()
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> VfsResult<Bytes> {
        self.do_getxattr(ino, name)
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> VfsResult<()> {
        self.do_setxattr(ino, name, value, mode)
    }

    fn listxattr(&self, ino: Ino) -> VfsResult<Vec<Vec<u8>>> {
        self.do_listxattr(ino)
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> VfsResult<()> {
        self.do_removexattr(ino, name)
    }
}
