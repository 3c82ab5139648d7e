//! Puts a new mount in the place of a dead one, so that the folder below the mountpoint never shows.
//!
//! The new mount is made detached. Since Linux 6.5 it is moved beneath the dead one, which is then detached: a path leads to one
//! or the other at every moment. An older kernel can only stack it on top, and the dead mount stays below until both are
//! unmounted.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::MountOptions;
use super::identity::DeadMount;
use super::mountinfo::{FSTYPE, SUBTYPE};

/// A mount that is nowhere in the tree yet.
#[derive(Debug)]
pub(super) struct Detached(OwnedFd);

/// How a new mount took the place of a dead one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Swap {
    /// Moved beneath it; the dead one is detached.
    Beneath,
    /// Stacked on top of it; the dead one stays below.
    Stacked,
}

/// Makes a mount that `device` serves.
///
/// # Errors
/// `EPERM` without the right to mount, `ENOSYS` before Linux 5.2, or what the kernel says of the options.
pub(super) fn make(options: &MountOptions, device: &File) -> io::Result<Detached> {
    let context = fsopen(FSTYPE, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // SAFETY: these calls have no preconditions.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let rootmode = format!("{:o}", libc::S_IFDIR);
    for (key, value) in [
        ("source", options.fsname.as_str()),
        ("subtype", SUBTYPE),
        ("fd", &device.as_raw_fd().to_string()),
        ("rootmode", &rootmode),
        ("user_id", &uid.to_string()),
        ("group_id", &gid.to_string()),
    ] {
        fsconfig_set_string(&context, key, value)?;
    }
    for (on, flag) in [
        (true, "default_permissions"),
        (options.allow_other, "allow_other"),
        (options.read_only, "ro"),
        (options.sync, "sync"),
        (options.dirsync, "dirsync"),
    ] {
        if on {
            fsconfig_set_flag(&context, flag)?;
        }
    }
    for label in options.kernel_labels() {
        match label.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, label)?,
        }
    }
    fsconfig_create(&context)?;
    Ok(Detached(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(options))?))
}

fn attributes(options: &MountOptions) -> MountAttrFlags {
    let mut attributes = MountAttrFlags::empty();
    for (on, flag) in [
        (options.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (!options.suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (!options.dev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (options.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (options.nodiratime, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (options.nosymfollow, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
        // The two are values of one field; relatime is its zero.
        (options.noatime, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (options.strictatime && !options.noatime, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
    ] {
        if on {
            attributes |= flag;
        }
    }
    attributes
}

impl Detached {
    /// Takes the place of `dead`.
    ///
    /// # Errors
    /// `NotFound` when the dead mount has been unmounted meanwhile: then nobody wants a mount there any more. Else what
    /// the kernel says; the dead mount stays.
    pub fn take_place_of(&self, dead: &DeadMount) -> io::Result<Swap> {
        let beneath = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
            | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
            | MoveMountFlags::MOVE_MOUNT_BENEATH;
        match move_mount(&self.0, "", dead.place().file(), "", beneath) {
            Ok(()) => {
                dead.detach()?;
                return Ok(Swap::Beneath);
            }
            Err(Errno::INVAL) if dead.is_there() => {}
            Err(Errno::INVAL) => return Err(io::ErrorKind::NotFound.into()),
            Err(error) => return Err(error.into()),
        }
        self.stack_on(dead).map(|()| Swap::Stacked)
    }

    fn stack_on(&self, dead: &DeadMount) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.0, "", CWD, dead.mountpoint(), flags)?)
    }
}
