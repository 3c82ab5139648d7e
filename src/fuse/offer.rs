//! What we want of what the kernel offers.

use fuser::InitFlags;

/// What is always wanted.
///
/// Not `FUSE_ASYNC_DIO`: with it the kernel drops pages from its cache before an asynchronous
/// direct write only. A page that is read in the meantime stays, older than the write, and the
/// kernel writes it back over it later.
///
/// Not `FUSE_POSIX_LOCKS`, not `FUSE_FLOCK_LOCKS`: then the kernel keeps locks itself, which is all that one machine needs.
pub(super) const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_ATOMIC_O_TRUNC)
    .union(InitFlags::FUSE_EXPORT_SUPPORT)
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_READDIRPLUS_AUTO)
    .union(InitFlags::FUSE_WRITEBACK_CACHE)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT);

/// What access control lists need: where a default list is inherited the umask does not count, so it is ours to apply.
pub(super) const LISTS: InitFlags = InitFlags::FUSE_POSIX_ACL.union(InitFlags::FUSE_DONT_MASK);
