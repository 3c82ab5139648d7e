//! The one table from the filesystem's refusals to errnos.
//!
//! No wildcard arm: a new refusal does not compile until it has its errno here.

use fuser::Errno;

use crate::vfs::types::VfsError;

/// The errno that an application sees for `error`.
///
/// [`VfsError::WouldBlock`] is handled by the adapter, which asks again; should it get here all the same, EAGAIN is
/// what it means.
pub(super) fn errno(error: &VfsError) -> Errno {
    match error {
        VfsError::NotFound => Errno::ENOENT,
        VfsError::Exists => Errno::EEXIST,
        VfsError::NotDirectory => Errno::ENOTDIR,
        VfsError::IsDirectory => Errno::EISDIR,
        VfsError::NotEmpty => Errno::ENOTEMPTY,
        VfsError::NameTooLong => Errno::ENAMETOOLONG,
        VfsError::Invalid => Errno::EINVAL,
        VfsError::NotPermitted => Errno::EPERM,
        VfsError::AccessDenied => Errno::EACCES,
        VfsError::FileTooLarge => Errno::EFBIG,
        VfsError::TooManyLinks => Errno::EMLINK,
        VfsError::NoAttribute => Errno::NO_XATTR,
        VfsError::Range => Errno::ERANGE,
        VfsError::TooBig => Errno::E2BIG,
        VfsError::NoSuchOffset => Errno::ENXIO,
        VfsError::BadHandle => Errno::EBADF,
        VfsError::Stale => Errno::ESTALE,
        VfsError::NoSpace => Errno::ENOSPC,
        VfsError::ReadOnly(_) => Errno::EROFS,
        VfsError::NotSupported => Errno::EOPNOTSUPP,
        VfsError::Io(_) => Errno::EIO,
        VfsError::TimedOut(_) => Errno::ETIMEDOUT,
        VfsError::WouldBlock => Errno::EAGAIN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_are_the_documented_ones() {
        for (error, number) in [
            (VfsError::NotFound, libc::ENOENT),
            (VfsError::NoAttribute, libc::ENODATA),
            (VfsError::NoSuchOffset, libc::ENXIO),
            (VfsError::ReadOnly("a newer writer".into()), libc::EROFS),
            (VfsError::NotSupported, libc::EOPNOTSUPP),
            (VfsError::Io("lost".into()), libc::EIO),
            (VfsError::TimedOut("s3".into()), libc::ETIMEDOUT),
            (VfsError::TooBig, libc::E2BIG),
        ] {
            assert_eq!(i32::from(errno(&error)), number, "{error}");
        }
    }
}
