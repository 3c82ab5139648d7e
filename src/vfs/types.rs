//! The words in which the filesystem is asked and answers: attributes, changes of them, errors.
//!
//! Owns no behaviour; knows nothing of FUSE.

use crate::ids::Ino;

pub use crate::format::tables::{FileKind, Time};

/// Who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, for messages.
    pub pid: u32,
    /// Permission bits that what it makes does not get, unless a default access control list says what it gets.
    pub umask: u16,
}

/// Whether an operation may wait for the network or for space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Answer [`VfsError::WouldBlock`] instead of waiting.
    No,
    /// Wait (bounded by the deadlines of the volume).
    Yes,
}

/// Attributes of an inode, as `stat` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Kind of file.
    pub kind: FileKind,
    /// Permission bits (12).
    pub perm: u16,
    /// Names that lead here.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of content.
    pub mtime: Time,
    /// Last change of anything.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Preferred size of I/O in bytes.
    pub blksize: u32,
    /// Distinguishes successive uses of an inode number.
    pub generation: u32,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The server's clock.
    Now,
    /// This moment.
    At(Time),
}

/// Attributes to change; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits (12).
    pub perm: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size: truncates or extends with zeros.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time, as the kernel sends it when it owns the times (writeback cache).
    pub ctime: Option<Time>,
}

impl SetAttr {
    /// Whether nothing but times is to change.
    #[must_use]
    pub fn is_only_times(&self) -> bool {
        let times = Self { atime: self.atime, mtime: self.mtime, ctime: self.ctime, ..Self::default() };
        *self == times && times != Self::default()
    }

    /// Whether it tells when content was written: both times the same. So does the kernel for what it held back; one who sets times
    /// names another moment than the present.
    #[must_use]
    pub fn is_of_a_write(&self) -> bool {
        self.is_only_times()
            && self.atime.is_none()
            && self.ctime.is_some_and(|ctime| self.mtime == Some(SetTime::At(ctime)))
    }
}

/// How `rename` treats an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replaces it.
    Replace,
    /// Fails with [`VfsError::Exists`].
    NoReplace,
    /// Swaps the two.
    Exchange,
    /// Replaces it and leaves a whiteout (a character device 0:0) of the caller's in the old place.
    Whiteout(Caller),
    /// Leaves a whiteout, but fails with [`VfsError::Exists`] when there is a target.
    WhiteoutNoReplace(Caller),
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next data.
    Data,
    /// The next hole (the end of the file counts as one).
    Hole,
}

/// What `fallocate` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Makes the size at least the range's end.
    Allocate,
    /// Promises space, keeps the size.
    KeepSize,
    /// Makes a hole; keeps the size.
    PunchHole,
    /// Makes zeros; may enlarge the file.
    ZeroRange,
    /// Makes zeros; keeps the size.
    ZeroRangeKeepSize,
}

/// How an xattr may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Creates or replaces.
    Any,
    /// Fails with [`VfsError::Exists`] when it is there.
    Create,
    /// Fails with [`VfsError::NoAttribute`] when it is not.
    Replace,
    /// Fails with either.
    Both,
}

impl XattrMode {
    /// Refuses, when an attribute of that name `exists` or does not.
    pub fn check(self, exists: bool) -> Result<(), VfsError> {
        match (self, exists) {
            (Self::Create | Self::Both, true) => Err(VfsError::Exists),
            (Self::Replace | Self::Both, false) => Err(VfsError::NoAttribute),
            _ => Ok(()),
        }
    }
}

/// One directory entry.
#[derive(Clone, Copy, Debug)]
pub struct DirItem<'a> {
    /// The inode it leads to.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// Position right behind it: give it to `readdir` to go on. Stays valid whatever happens to the directory.
    pub cookie: u64,
    /// Its name.
    pub name: &'a [u8],
    /// Its attributes, when they were asked for (and the name is neither `.` nor `..`).
    pub attr: Option<Attr>,
}

/// Space and inodes, as `statfs` shows them. Blocks are of `block_size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Fundamental block size in bytes.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks free.
    pub free: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Inodes free.
    pub inodes_free: u64,
    /// Longest name in bytes.
    pub name_max: u32,
}

/// Why the filesystem refuses. Each maps to exactly one errno (in the FUSE adapter).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VfsError {
    /// ENOENT.
    #[error("no such file or directory")]
    NotFound,
    /// EEXIST.
    #[error("it exists")]
    Exists,
    /// ENOTDIR.
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR.
    #[error("is a directory")]
    IsDirectory,
    /// ENOTEMPTY.
    #[error("directory not empty")]
    NotEmpty,
    /// ENAMETOOLONG.
    #[error("name too long")]
    NameTooLong,
    /// EINVAL.
    #[error("invalid argument")]
    Invalid,
    /// EPERM.
    #[error("not permitted")]
    NotPermitted,
    /// EACCES.
    #[error("access denied")]
    AccessDenied,
    /// EFBIG.
    #[error("file too large")]
    FileTooLarge,
    /// EMLINK.
    #[error("too many links")]
    TooManyLinks,
    /// ENODATA.
    #[error("no such attribute")]
    NoAttribute,
    /// ERANGE.
    #[error("buffer too small")]
    Range,
    /// E2BIG.
    #[error("argument too big")]
    TooBig,
    /// ENXIO.
    #[error("no such offset")]
    NoSuchOffset,
    /// EBADF.
    #[error("bad file handle")]
    BadHandle,
    /// ESTALE.
    #[error("stale file handle")]
    Stale,
    /// ENOSPC.
    #[error("no space left")]
    NoSpace,
    /// EROFS; the text says why the mount is read-only.
    #[error("read-only: {0}")]
    ReadOnly(String),
    /// EOPNOTSUPP.
    #[error("not supported")]
    NotSupported,
    /// EIO; the text has been logged.
    #[error("input/output error: {0}")]
    Io(String),
    /// ETIMEDOUT; a deadline for replicas passed.
    #[error("timed out: {0}")]
    TimedOut(String),
    /// Not an errno: ask again with [`Wait::Yes`] from a thread that may block.
    #[error("would block")]
    WouldBlock,
}
