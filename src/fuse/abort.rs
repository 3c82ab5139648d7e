//! Ends a FUSE connection whose server is gone although something still holds the connection open.
//!
//! A connection ends by itself when the last descriptor of its server closes. A thread of the server that sleeps
//! uninterruptibly in the kernel keeps its descriptors open, and every user of the mount would wait for ever. After an
//! abort all requests fail, the sleeping thread returns, and the mount stays in the tree and returns `ENOTCONN`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags, fsconfig_create, fsmount, fsopen,
};

use super::identity::Place;
use super::mountinfo::{MountEntry, is_mirrorfs, mounts};

/// Where the kernel's control files of FUSE connections usually are. Their owner is the user who mounted.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// Aborts the connection of the mirrorfs mount that has this device number (`major:minor`), wherever it is mounted;
/// `mountpoint` is looked at first. The mount stays in the tree. The call returns quickly and never asks the server.
///
/// The caller must know that the server is gone: what programs wrote and the kernel did not hand over yet is lost.
///
/// # Errors
/// `NotFound` when no mirrorfs mount of this device can be reached; `PermissionDenied` when the connection belongs to
/// another user, or there is neither root nor a control file.
pub fn abort_connection(device: &str, mountpoint: &Path) -> io::Result<()> {
    let mut ours: Vec<MountEntry> =
        mounts()?.into_iter().filter(|m| m.device == device && is_mirrorfs(m)).collect();
    ours.sort_by_key(|m| m.mountpoint != mountpoint);
    let mut outcome = Err(io::ErrorKind::NotFound.into());
    for entry in &ours {
        outcome = open_place(entry).and_then(|place| abort_at(device, &place));
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

/// A handle to the mount, for which the server is not asked. While it is held, the mount exists and its device number
/// cannot be given to another one.
fn open_place(entry: &MountEntry) -> io::Result<Place> {
    let place = Place::open(&entry.mountpoint)?;
    // Another mount may cover it.
    if place.mount_id()? == Some(entry.id) { Ok(place) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn abort_at(device: &str, place: &Place) -> io::Result<()> {
    match abort_by_number(device) {
        Ok(()) => return Ok(()),
        Err(e) => log::debug!("connection {device} has no control file: {e}"),
    }
    match rustix::mount::unmount(place.path(), UnmountFlags::FORCE) {
        // The kernel aborts first. Then it finds the mount busy, because `place` is open, and leaves it in the tree.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Aborts the connection of a device number through its control file. The caller must know that the device still
/// exists; the kernel gives numbers of ended mounts to new ones.
///
/// # Errors
/// When the control file cannot be written.
pub(super) fn abort_by_number(device: &str) -> io::Result<()> {
    let number = connection_number(device).ok_or(io::ErrorKind::InvalidInput)?;
    let usual = OpenOptions::new().write(true).open(format!("{CONTROL}/{number}/abort"));
    let mut file = match usual {
        Ok(file) => file,
        Err(e) => open_own_control(number).map_err(|_| e)?,
    };
    file.write_all(b"1")
}

/// The name of a connection in the control filesystem: the kernel's device number in decimal.
fn connection_number(device: &str) -> Option<u64> {
    let (major, minor) = device.split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major < 1 << 12 && minor < 1 << 20).then_some(u64::from(major) << 20 | u64::from(minor))
}

/// Opens the control file in a control filesystem that is mounted nowhere: containers have none at the usual place.
/// Needs root.
fn open_own_control(number: u64) -> io::Result<File> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&root, format!("{number}/abort"), flags, Mode::empty())?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_has_the_number_of_its_device() {
        assert_eq!(connection_number("0:45"), Some(45));
        assert_eq!(connection_number("1:2"), Some((1 << 20) + 2));
        for wrong in ["", "45", "0:", "x:1", "0:1048576", "4096:0", "0:-1"] {
            assert_eq!(connection_number(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_mount_of_ours_is_not_touched() {
        let root = mounts().unwrap().into_iter().rev().find(|m| m.mountpoint == Path::new("/")).unwrap();
        for device in [root.device.as_str(), "0:999999", ""] {
            let error = abort_connection(device, Path::new("/")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{device}");
        }
        let other = MountEntry { id: root.id + 1_000_000, ..root };
        assert!(open_place(&other).is_err(), "the list shows another mount there");
    }
}
