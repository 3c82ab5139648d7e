//! What tells one mount from all others, and whether it is still there.
//!
//! Device numbers and mount ids are given again after an unmount. Since Linux 6.8 each mount also has a number that is never
//! reused; where the kernel has it, it decides.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::attach::is_gone;
use super::mountinfo::{MountEntry, is_mirrorfs, is_placeholder, mounts};

/// Identifies one mount of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountIdentity {
    /// Device number, as `major:minor`.
    pub device: String,
    /// The kernel's number that is never given again; 0 when the kernel has none (before Linux 6.8).
    pub unique: u64,
}

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is not in the tree any more.
    Gone,
    /// It is in the tree, and nobody serves it.
    Dead,
    /// It is in the tree, and somebody serves it.
    Live,
}

impl MountIdentity {
    /// Of the mount with `device` at `path`.
    #[must_use]
    pub fn of(device: &str, path: &Path) -> Self {
        let unique =
            CString::new(path.as_os_str().as_bytes()).ok().and_then(|p| unique_id(libc::AT_FDCWD, &p, 0));
        Self { device: device.to_owned(), unique: unique.unwrap_or(0) }
    }

    /// Whether the mount is in this process's tree and served. Waits for the answer of a server that lives.
    #[must_use]
    pub fn presence(&self) -> Presence {
        // Unreadable, the list shows nothing: then nothing may be done to a mount.
        let all = mounts().unwrap_or_default();
        let found: Vec<Presence> = all
            .iter()
            .filter(|m| m.device == self.device && is_mirrorfs(m))
            .filter_map(|entry| self.presence_of(entry))
            .collect();
        match (found.contains(&Presence::Live), found.is_empty()) {
            (true, _) => Presence::Live,
            (_, true) => Presence::Gone,
            _ => Presence::Dead,
        }
    }

    /// That of one entry with our device number; `None` for another mount that was given the number.
    fn presence_of(&self, entry: &MountEntry) -> Option<Presence> {
        let Ok(place) = Place::open(&entry.mountpoint) else { return Some(Presence::Dead) };
        if place.mount_id().ok().flatten() != Some(entry.id) {
            // Covered by something else. It is there, and nobody can ask it.
            return Some(Presence::Dead);
        }
        if self.unique != 0 && place.unique_id().is_some_and(|id| id != self.unique) {
            return None;
        }
        Some(if place.is_gone() { Presence::Dead } else { Presence::Live })
    }
}

/// A directory that was opened without asking its filesystem: a handle to exactly the mount that was on top at that moment.
#[derive(Debug)]
pub(super) struct Place(File);

impl Place {
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        OpenOptions::new().read(true).custom_flags(flags).open(path).map(Self)
    }

    /// The kernel's number of the mount, as in `mountinfo`.
    pub fn mount_id(&self) -> io::Result<Option<u64>> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        Ok(line.and_then(|id| id.trim().parse().ok()))
    }

    fn unique_id(&self) -> Option<u64> {
        unique_id(self.0.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
    }

    /// A path that leads to this mount, whatever lies at its mountpoint by now.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    pub fn is_gone(&self) -> bool {
        is_gone(&self.path())
    }

    pub fn file(&self) -> &File {
        &self.0
    }
}

/// A mount of ours whose server has died.
#[derive(Debug)]
pub(super) struct DeadMount {
    place: Place,
    entry: MountEntry,
}

impl DeadMount {
    /// The one that is on top at `path`, if it is ours and dead; also a guardian's placeholder.
    pub fn at(path: &Path) -> io::Result<Option<Self>> {
        let place = Place::open(path)?;
        let id = place.mount_id()?;
        // By its number: the order of the list does not tell what is on top.
        let entry = mounts()?.into_iter().find(|m| Some(m.id) == id && m.mountpoint == path);
        let Some(entry) = entry.filter(|m| is_mirrorfs(m) || is_placeholder(m)) else { return Ok(None) };
        Ok(place.is_gone().then_some(Self { place, entry }))
    }

    /// Takes it out of the tree, wherever it is by now.
    pub fn detach(&self) -> io::Result<()> {
        let path = CString::new(self.place.path().as_os_str().as_bytes())?;
        // SAFETY: the string outlives the call. The link leads to the dead mount and to no other.
        if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Somebody else has detached it.
        if self.is_there() { Err(error) } else { Ok(()) }
    }

    /// Whether it is a volume's, and no placeholder.
    pub fn is_volume(&self) -> bool {
        is_mirrorfs(&self.entry)
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.entry.mountpoint
    }

    /// Whether it still is in the tree.
    pub fn is_there(&self) -> bool {
        mounts().unwrap_or_default().iter().any(|m| m.id == self.entry.id && m.device == self.entry.device)
    }
}

/// The number of a mount that is never given again. Asks the kernel alone, not the server.
fn unique_id(dir: i32, path: &CStr, flags: i32) -> Option<u64> {
    // Not in every libc's headers yet.
    const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
    // SAFETY: all zeros is a valid statx; the string and it outlive the call.
    let (answer, found) = unsafe {
        let mut found: libc::statx = std::mem::zeroed();
        let flags = flags | libc::AT_STATX_DONT_SYNC | libc::AT_SYMLINK_NOFOLLOW;
        (libc::statx(dir, path.as_ptr(), flags, STATX_MNT_ID_UNIQUE, &raw mut found), found)
    };
    (answer == 0 && found.stx_mask & STATX_MNT_ID_UNIQUE != 0).then_some(found.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::mountinfo::mount_at;

    #[test]
    fn a_place_has_the_mount_number_of_the_list() {
        let root = Place::open(Path::new("/")).unwrap();
        assert_eq!(root.mount_id().unwrap(), Some(mount_at(Path::new("/")).unwrap().unwrap().id));
        assert!(!root.is_gone());
    }

    #[test]
    fn what_is_not_mounted_is_gone_and_what_is_not_ours_is_not_dead() {
        let nowhere = MountIdentity { device: "0:999999".into(), unique: 0 };
        assert_eq!(nowhere.presence(), Presence::Gone);
        assert!(DeadMount::at(Path::new("/")).unwrap().is_none());
    }
}
