//! Owner, mode, times and extended attributes of what was restored.
//!
//! Owns their order, and what becomes of them where the user may not set them. Works on descriptors
//! only.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{self, AtFlags, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags};

use super::dirs::as_name;
use crate::format::tables::{FileKind, Inode, Time};
use crate::restore::tree::text;

/// Sets attributes as far as the user may.
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
    skipped: u64,
}

impl Owner {
    pub(super) fn current() -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Self { uid: uid.as_raw(), gid: gid.as_raw(), skipped: 0 }
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Gives an open file or directory its attributes; what did not work is told in words.
    pub(super) fn set(&mut self, fd: &OwnedFd, inode: &Inode, xattrs: &[(Bytes, Bytes)]) -> Vec<String> {
        let mut trouble = Vec::new();
        let set = |name: &[u8], value: &[u8]| fs::fsetxattr(fd, as_name(name), value, XattrFlags::empty());
        // A user attribute needs permission to write; a change of owner drops capabilities: hence
        // the order.
        let late = |name: &[u8]| name.starts_with(b"security.") || name.starts_with(b"system.");
        set_xattrs(xattrs.iter().filter(|(name, _)| !late(name)), set, &mut trouble);
        if self.changes_owner(inode) {
            note(&mut trouble, "owner", fs::fchown(fd, uid(inode), gid(inode)));
        }
        let (mode, listed) = (self.mode(inode), has_list(xattrs));
        note(&mut trouble, "mode", fs::fchmod(fd, before_list(mode, listed)));
        let troubles = trouble.len();
        set_xattrs(xattrs.iter().filter(|(name, _)| late(name)), set, &mut trouble);
        if listed && trouble.len() == troubles {
            note(&mut trouble, "mode", fs::fchmod(fd, mode));
        }
        note(&mut trouble, "times", fs::futimens(fd, &times(inode)));
        trouble
    }

    /// Gives a symbolic link, fifo, socket or device node its attributes. `fd` is one of `O_PATH`,
    /// which names the inode itself.
    pub(super) fn set_special(
        &mut self,
        fd: &OwnedFd,
        inode: &Inode,
        xattrs: &[(Bytes, Bytes)],
    ) -> Vec<String> {
        let mut trouble = Vec::new();
        if self.changes_owner(inode) {
            note(&mut trouble, "owner", fs::chownat(fd, "", uid(inode), gid(inode), AtFlags::EMPTY_PATH));
        }
        let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        let (mode, listed) = (self.mode(inode), has_list(xattrs));
        if inode.kind != FileKind::Symlink {
            note(&mut trouble, "mode", fs::chmod(path.as_str(), before_list(mode, listed)));
        }
        let troubles = trouble.len();
        let set = |name: &[u8], value: &[u8]| {
            fs::setxattr(path.as_str(), as_name(name), value, XattrFlags::empty())
        };
        set_xattrs(xattrs.iter(), set, &mut trouble);
        if listed && inode.kind != FileKind::Symlink && trouble.len() == troubles {
            note(&mut trouble, "mode", fs::chmod(path.as_str(), mode));
        }
        let result = fs::utimensat(fs::CWD, path.as_str(), &times(inode), AtFlags::empty());
        note(&mut trouble, "times", result);
        trouble
    }

    fn changes_owner(&mut self, inode: &Inode) -> bool {
        if self.is_root() {
            return true;
        }
        self.skipped += u64::from((inode.uid, inode.gid) != (self.uid, self.gid));
        false
    }

    /// What to say at the end about owners; `None` when all are right.
    pub(super) fn note(&self) -> Option<String> {
        let n = self.skipped;
        (n > 0).then(|| format!("owners of {n} entries were not restored: only root can; they belong to you"))
    }

    /// The mode to set. Set-uid and set-gid are not passed on to a new owner.
    fn mode(&self, inode: &Inode) -> Mode {
        let mut bits = u32::from(inode.perm);
        if !self.is_root() {
            if inode.uid != self.uid {
                bits &= !0o4000;
            }
            if inode.gid != self.gid && inode.kind != FileKind::Directory {
                bits &= !0o2000;
            }
        }
        Mode::from_raw_mode(bits)
    }

    /// Whether a directory that was there has the attributes that an earlier restore gave it.
    #[allow(clippy::unnecessary_cast)] // the types differ between processors
    pub(super) fn has_set(&self, stat: &Stat, inode: &Inode) -> bool {
        let mtime = times(inode).last_modification;
        stat.st_uid == if self.is_root() { inode.uid } else { self.uid }
            && Mode::from_raw_mode(stat.st_mode) == self.mode(inode)
            && (stat.st_mtime, stat.st_mtime_nsec as u64) == (mtime.tv_sec, mtime.tv_nsec as u64)
    }
}

/// Whether an access control list is among the attributes.
fn has_list(xattrs: &[(Bytes, Bytes)]) -> bool {
    xattrs.iter().any(|(name, _)| &name[..] == b"system.posix_acl_access")
}

/// The mode to set before the list. With a list, the group's bits are those of its mask, not what
/// the group may do: until the list is there, and when it cannot be set, the group may do nothing.
fn before_list(mode: Mode, listed: bool) -> Mode {
    if listed { mode.difference(Mode::RWXG) } else { mode }
}

fn note(trouble: &mut Vec<String>, what: &str, result: rustix::io::Result<()>) {
    if let Err(e) = result {
        trouble.push(format!("its {what}: {}", io::Error::from(e)));
    }
}

fn set_xattrs<'a>(
    xattrs: impl Iterator<Item = &'a (Bytes, Bytes)>,
    set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>,
    trouble: &mut Vec<String>,
) {
    for (name, value) in xattrs {
        if CString::new(&name[..]).is_err() {
            trouble.push("an extended attribute with an impossible name".into());
        } else if let Err(e) = set(name, value) {
            let name = text(name);
            trouble.push(format!("its extended attribute {name}: {}", io::Error::from(e)));
        }
    }
}

fn uid(inode: &Inode) -> Option<Uid> {
    (inode.uid != u32::MAX).then(|| Uid::from_raw(inode.uid))
}

fn gid(inode: &Inode) -> Option<Gid> {
    (inode.gid != u32::MAX).then(|| Gid::from_raw(inode.gid))
}

fn times(inode: &Inode) -> Timestamps {
    let spec = |t: Time| Timespec { tv_sec: t.secs, tv_nsec: t.nanos.into() };
    Timestamps { last_access: spec(inode.atime), last_modification: spec(inode.mtime) }
}
