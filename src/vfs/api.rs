//! What the filesystem can be asked: the one trait between whoever speaks a kernel's protocol and the POSIX rules.
//!
//! Owns no behaviour. `Vfs` implements it; the FUSE adapter and the tests call it through `dyn FileSystem`.

use bytes::Bytes;

use super::types::{
    Attr, Caller, DirItem, Fallocate, FileKind, RenameMode, Seek, SetAttr, StatFs, VfsError, Wait, XattrMode,
};
use crate::ids::Ino;

/// What an operation answers.
pub type VfsResult<T> = Result<T, VfsError>;

/// A POSIX filesystem, addressed by inode numbers.
///
/// Names are bytes without `/` and NUL. Permission bits are checked by the caller (the kernel, `default_permissions`).
///
/// *References*: `lookup`, `create`, `mknod`, `mkdir`, `symlink`, `link`, and every entry of a `readdir` with
/// `plus` that was taken and carries attributes, count one reference to the inode; [`FileSystem::forget`] gives them
/// back. *Opens*: `create` and `open` count one, [`FileSystem::release`] gives it back. An inode without names lives
/// while it is referenced or open.
///
/// *Waiting*: operations that take a [`Wait`] answer [`VfsError::WouldBlock`] instead of waiting for replicas or
/// space when given [`Wait::No`]; then nothing has been changed, and the same call with [`Wait::Yes`] does it.
pub trait FileSystem: Send + Sync {
    /// From now on the caller keeps the modification and change times of regular files itself: it
    /// shows its own, and sends them with [`FileSystem::setattr`]. So changes of content move no
    /// times here; a time of ours would take the place of the one that was shown.
    fn caller_keeps_times(&self) {}

    /// The inode that `name` in `parent` leads to; counts a reference.
    fn lookup(&self, parent: Ino, name: &[u8]) -> VfsResult<Attr>;

    /// Gives back `n` references to `ino`.
    fn forget(&self, ino: Ino, n: u64);

    /// Attributes.
    fn getattr(&self, ino: Ino) -> VfsResult<Attr>;

    /// Changes attributes; answers the new ones.
    fn setattr(&self, ino: Ino, set: &SetAttr, caller: &Caller) -> VfsResult<Attr>;

    /// Target of a symbolic link.
    fn readlink(&self, ino: Ino) -> VfsResult<Bytes>;

    /// Makes a regular file and opens it; counts a reference and an open.
    fn create(&self, parent: Ino, name: &[u8], perm: u16, caller: &Caller) -> VfsResult<Attr>;

    /// Makes an inode of any kind but directory and symbolic link; counts a reference.
    fn mknod(
        &self,
        parent: Ino,
        name: &[u8],
        kind: FileKind,
        perm: u16,
        rdev: u32,
        caller: &Caller,
    ) -> VfsResult<Attr>;

    /// Makes a directory; counts a reference.
    fn mkdir(&self, parent: Ino, name: &[u8], perm: u16, caller: &Caller) -> VfsResult<Attr>;

    /// Makes a symbolic link; counts a reference.
    fn symlink(&self, parent: Ino, name: &[u8], target: &[u8], caller: &Caller) -> VfsResult<Attr>;

    /// Gives `ino` another name; counts a reference.
    fn link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> VfsResult<Attr>;

    /// Removes a name that is not a directory.
    fn unlink(&self, parent: Ino, name: &[u8]) -> VfsResult<()>;

    /// Removes an empty directory.
    fn rmdir(&self, parent: Ino, name: &[u8]) -> VfsResult<()>;

    /// Moves, replaces or swaps names.
    fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> VfsResult<()>;

    /// Counts an open; `write` says whether the handle may write, `truncate` empties the file first.
    fn open(&self, ino: Ino, write: bool, truncate: bool) -> VfsResult<()>;

    /// Gives back an open.
    fn release(&self, ino: Ino);

    /// A descriptor of the file was closed (there may be more of it).
    fn flush(&self, ino: Ino) -> VfsResult<()>;

    /// Hands the entries behind `after` (0: from the start; `.` has cookie 1 and `..` 2) to `emit`, in the
    /// directory's stable order, until it answers `false`: that entry was not taken. With `plus` entries carry
    /// attributes and a taken one counts a reference (not `.` and `..`).
    fn readdir(
        &self,
        ino: Ino,
        after: u64,
        plus: bool,
        emit: &mut dyn FnMut(&DirItem<'_>) -> bool,
    ) -> VfsResult<()>;

    /// Up to `len` bytes from `offset`; fewer only at the end of the file.
    fn read(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> VfsResult<Bytes>;

    /// The same through a descriptor that may write. It also gets content that was refused and that is still
    /// held, page by page: the kernel reads a page before it changes a part of it.
    fn read_to_change(&self, ino: Ino, offset: u64, len: u32, wait: Wait) -> VfsResult<Bytes> {
        self.read(ino, offset, len, wait)
    }

    /// Whether the kernel handed over content of `ino` that was refused, so that its page cache holds what is
    /// stored nowhere.
    fn has_refused(&self, _ino: Ino) -> bool {
        false
    }

    /// `ino` was read, listed or followed, by somebody who leaves traces: its access time may change.
    fn accessed(&self, ino: Ino);

    /// Writes all of `data`, or fails; answers its length.
    fn write(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> VfsResult<u32>;

    /// The same for content that the kernel has held back and now hands over. The file's times are the kernel's then: it sends
    /// them apart, before or after, so this changes none of them.
    fn write_back(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> VfsResult<u32> {
        self.write(ino, offset, data, wait)
    }

    /// Returns when all of the file is as durable as the volume promises. It always waits for the local disk; for replicas only
    /// with `wait`, and is [`VfsError::WouldBlock`] without when it had to.
    fn fsync(&self, ino: Ino, datasync: bool, wait: Wait) -> VfsResult<()>;

    /// Returns when the directory's entries are as durable as the volume promises.
    fn fsyncdir(&self, ino: Ino, wait: Wait) -> VfsResult<()>;

    /// Allocates, punches or zeroes a range.
    fn fallocate(&self, ino: Ino, how: Fallocate, offset: u64, len: u64, wait: Wait) -> VfsResult<()>;

    /// The next data or hole at or behind `offset`.
    fn lseek(&self, ino: Ino, offset: u64, seek: Seek) -> VfsResult<u64>;

    /// Copies a range by sharing blocks where it can; answers how many bytes were copied.
    fn copy_file_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
        wait: Wait,
    ) -> VfsResult<u64>;

    /// Space and inodes.
    fn statfs(&self) -> VfsResult<StatFs>;

    /// Value of an extended attribute.
    fn getxattr(&self, ino: Ino, name: &[u8]) -> VfsResult<Bytes>;

    /// Sets an extended attribute.
    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> VfsResult<()>;

    /// Names of all extended attributes.
    fn listxattr(&self, ino: Ino) -> VfsResult<Vec<Vec<u8>>>;

    /// Removes an extended attribute.
    fn removexattr(&self, ino: Ino, name: &[u8]) -> VfsResult<()>;
}
