//! Between the kernel's words and the filesystem's: attributes, times, kinds, flags.
//!
//! Pure functions; knows no reply and no session.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow};

use crate::vfs::acl::is_acl;
use crate::vfs::types::{Attr, Caller, Fallocate, FileKind, RenameMode, SetTime, Time, XattrMode};

/// A moment as fuser takes it. Moments that `SystemTime` cannot hold become 1970.
fn system_time(t: Time) -> SystemTime {
    let whole = Duration::from_secs(t.secs.unsigned_abs());
    let second = if t.secs < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    second.and_then(|s| s.checked_add(Duration::from_nanos(t.nanos.into()))).unwrap_or(UNIX_EPOCH)
}

/// A moment as fuser hands it over.
///
/// For a moment before 1970 fuser 0.18 subtracts the nanoseconds instead of adding them: the kernel's (-2 s,
/// +0.8 s) comes as 1970 minus 2.8 s. The two numbers are still all there, so they are taken as they were sent.
pub(super) fn time(t: SystemTime) -> Time {
    match t.duration_since(UNIX_EPOCH) {
        Ok(d) => Time { secs: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), nanos: d.subsec_nanos() },
        Err(e) => {
            let d = e.duration();
            Time {
                secs: 0_i64.checked_sub_unsigned(d.as_secs()).unwrap_or(i64::MIN),
                nanos: d.subsec_nanos(),
            }
        }
    }
}

/// A time to set.
pub(super) fn set_time(t: TimeOrNow) -> SetTime {
    match t {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(t) => SetTime::At(time(t)),
    }
}

/// The kind as fuser names it.
pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that `mknod`'s mode asks for; `None` for one that it cannot make. No type bits mean a regular file.
pub(super) fn kind_of_mode(mode: u32) -> Option<FileKind> {
    Some(match mode & libc::S_IFMT {
        0 | libc::S_IFREG => FileKind::Regular,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => return None,
    })
}

/// The twelve permission bits of a mode.
pub(super) fn perm_of_mode(mode: u32) -> u16 {
    u16::try_from(mode & 0o7777).unwrap_or_default()
}

/// Attributes as fuser takes them.
pub(super) fn file_attr(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino.0),
        size: a.size,
        blocks: a.blocks,
        atime: system_time(a.atime),
        mtime: system_time(a.mtime),
        ctime: system_time(a.ctime),
        crtime: system_time(a.btime),
        kind: file_type(a.kind),
        perm: a.perm,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: a.rdev,
        blksize: a.blksize,
        flags: 0,
    }
}

/// Attributes of nothing but a number and a kind: of `.` and `..` in a listing, and, with number 0, of a name that
/// is not there.
pub(super) fn bare_attr(ino: u64, kind: FileKind) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// What `renameat2`'s flags ask for; `None` for a combination that is not supported.
pub(super) fn rename_mode(flags: RenameFlags, caller: Caller) -> Option<RenameMode> {
    if flags.is_empty() {
        Some(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Some(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Some(RenameMode::Exchange)
    } else if flags == RenameFlags::RENAME_WHITEOUT {
        Some(RenameMode::Whiteout(caller))
    } else if flags == RenameFlags::RENAME_WHITEOUT | RenameFlags::RENAME_NOREPLACE {
        Some(RenameMode::WhiteoutNoReplace(caller))
    } else {
        None
    }
}

/// What `fallocate`'s mode asks for; `None` for a combination that is not supported.
pub(super) fn fallocate_mode(mode: i32) -> Option<Fallocate> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | KEEP;
    Some(match mode {
        0 => Fallocate::Allocate,
        KEEP => Fallocate::KeepSize,
        PUNCH => Fallocate::PunchHole,
        ZERO => Fallocate::ZeroRange,
        ZERO_KEEP => Fallocate::ZeroRangeKeepSize,
        _ => return None,
    })
}

/// Whether a name is of a namespace that there is, and has more than its prefix. The rest of `system` (NFSv4 lists, SMB
/// attributes) stands for what we do not enforce, so it is not kept either.
pub(super) fn check_xattr_name(name: &[u8]) -> Result<(), Errno> {
    if is_acl(name) {
        return Ok(());
    }
    for prefix in [&b"user."[..], b"trusted.", b"security."] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return if rest.is_empty() { Err(Errno::EINVAL) } else { Ok(()) };
        }
    }
    Err(Errno::EOPNOTSUPP)
}

/// What `setxattr`'s flags ask for; `None` for a combination that is not supported.
pub(super) fn xattr_mode(flags: i32) -> Option<XattrMode> {
    const BOTH: i32 = libc::XATTR_CREATE | libc::XATTR_REPLACE;
    Some(match flags {
        0 => XattrMode::Any,
        libc::XATTR_CREATE => XattrMode::Create,
        libc::XATTR_REPLACE => XattrMode::Replace,
        BOTH => XattrMode::Both,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_around_1970_reach_fuser_exactly() {
        for (secs, nanos) in [(0, 0), (0, 1), (1_700_000_000, 999_999_999), (-1, 0), (-2, 800_000_000)] {
            let t = system_time(Time { secs, nanos });
            let back = match t.duration_since(UNIX_EPOCH) {
                Ok(d) => i128::from(d.as_secs()) * 1_000_000_000 + i128::from(d.subsec_nanos()),
                Err(e) => -i128::try_from(e.duration().as_nanos()).unwrap(),
            };
            assert_eq!(back, i128::from(secs) * 1_000_000_000 + i128::from(nanos));
        }
    }

    #[test]
    fn times_from_fuser_are_as_the_kernel_sent_them() {
        assert_eq!(time(UNIX_EPOCH + Duration::new(5, 7)), Time { secs: 5, nanos: 7 });
        // How fuser 0.18 builds (-2, 800_000_000).
        assert_eq!(time(UNIX_EPOCH - Duration::new(2, 800_000_000)), Time { secs: -2, nanos: 800_000_000 });
        assert_eq!(time(UNIX_EPOCH - Duration::new(2, 0)), Time { secs: -2, nanos: 0 });
        assert_eq!(time(UNIX_EPOCH - Duration::new(1 << 63, 0)), Time { secs: i64::MIN, nanos: 0 });
    }

    #[test]
    fn extreme_times_do_not_panic() {
        for secs in [i64::MIN, i64::MAX] {
            let _ = system_time(Time { secs, nanos: 999_999_999 });
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert_eq!(fallocate_mode(libc::FALLOC_FL_PUNCH_HOLE), None);
        assert_eq!(fallocate_mode(libc::FALLOC_FL_COLLAPSE_RANGE), None);
        let me = Caller::default();
        assert_eq!(rename_mode(RenameFlags::RENAME_WHITEOUT | RenameFlags::RENAME_EXCHANGE, me), None);
        assert_eq!(rename_mode(RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE, me), None);
        assert_eq!(xattr_mode(4), None);
    }
}
