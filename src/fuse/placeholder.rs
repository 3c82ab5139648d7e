//! Holds a mountpoint for those who cannot replace a dead mount atomically: users without the right to mount.
//!
//! The helper `fusermount3` can only mount where it gets an answer, so a dead mount must go before the next one comes. The
//! guardian therefore mounts this filesystem first. It has a root that can be mounted on, and refuses everything else with
//! `ENOTCONN`. So a path leads to the volume or to an error, and never to the folder below.
//!
//! The helper runs with root's effective user id. The kernel refuses it access to a user's FUSE mount unless that has the
//! option `allow_other` (`fuse_allow_current_process` in Linux), which `user_allow_other` in `/etc/fuse.conf` must permit.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, OpenFlags,
    ReplyAttr, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request, TimeOrNow,
};

use super::attach::{self, detach_by_helper, is_attached, is_gone, mount_by_helper};
use super::mountinfo::{PLACEHOLDER_SUBTYPE, is_placeholder, mounts};
use super::{MountError, MountOptions};

/// The right to mount, as a bit of `CapEff` in `/proc/self/status` (capabilities(7)).
const CAP_SYS_ADMIN: u32 = 21;
/// More mounts than can lie in one place.
const MOST_MOUNTS: usize = 20;

/// Whether this process may mount by itself; else only through the helper.
#[must_use]
pub fn mounts_directly() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    effective & (1 << CAP_SYS_ADMIN) != 0
}

/// Whether `/etc/fuse.conf` lets users mount what the helper can mount on.
#[must_use]
pub fn is_permitted() -> bool {
    let conf = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    conf.lines().any(|line| line.trim() == "user_allow_other")
}

/// A placeholder that is mounted and served. Dropping it unmounts it.
#[derive(Debug)]
pub struct Placeholder {
    mountpoint: PathBuf,
    connection: OwnedFd,
}

impl Placeholder {
    /// Mounts one at `mountpoint`, after taking away dead mounts of ours there.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn mount(mountpoint: &Path) -> Result<Self, MountError> {
        let path = attach::check(mountpoint)?.path;
        attach::detach_dead_by_helper(&path)?;
        let options = MountOptions {
            fsname: PLACEHOLDER_SUBTYPE.to_owned(),
            allow_other: true,
            ..MountOptions::default()
        };
        let device = mount_by_helper(&path, &options, PLACEHOLDER_SUBTYPE)?;
        let failed = |e: io::Error| MountError::Refused { path: path.clone(), why: e.to_string() };
        let connection = device.try_clone().map_err(failed)?;
        let placeholder = Self { mountpoint: path.clone(), connection };
        let session =
            fuser::Session::from_fd(Nothing, device, fuser::SessionACL::All, fuser::Config::default())
                .map_err(failed)?;
        let serve = move || {
            if let Err(e) = session.run() {
                log::debug!("the placeholder ended: {e}");
            }
        };
        thread::Builder::new().name("mirrorfs-place".into()).spawn(serve).map_err(failed)?;
        Ok(placeholder)
    }

    /// Whether the kernel still has it; false when somebody has unmounted it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        is_attached(&self.connection)
    }

    /// Whether something is mounted on it; yes when that cannot be told.
    #[must_use]
    pub fn is_covered(&self) -> bool {
        let Ok(all) = mounts() else { return true };
        all.iter().rev().find(|m| m.mountpoint == self.mountpoint).is_some_and(|top| !is_placeholder(top))
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        for _ in 0..MOST_MOUNTS {
            if !self.is_there() {
                return;
            }
            // A volume that lives is another guardian's, or the daemon's that goes on.
            if self.is_covered() && !is_gone(&self.mountpoint) {
                log::warn!("{} stays below a volume that is mounted on it", self.mountpoint.display());
                return;
            }
            if let Err(e) = detach_by_helper(&self.mountpoint, true) {
                log::warn!("{} stays mounted: {e}", self.mountpoint.display());
                return;
            }
        }
    }
}

/// A root, and nothing else.
#[derive(Debug)]
struct Nothing;

impl Nothing {
    fn root() -> FileAttr {
        // SAFETY: these calls have no preconditions.
        let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
        let then = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo(1),
            size: 0,
            blocks: 0,
            atime: then,
            mtime: then,
            ctime: then,
            crtime: then,
            kind: FileType::Directory,
            perm: 0o700,
            nlink: 2,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Nothing {
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::ENOTCONN);
    }

    fn getattr(&self, _: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &Self::root());
    }

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::ENOTCONN);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOTCONN);
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, reply: ReplyDirectory) {
        reply.error(Errno::ENOTCONN);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The helper asks before it mounts.
        reply.ok();
    }
}
