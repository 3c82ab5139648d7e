//! The guardian: a small process beside the daemon that takes the mount away when the daemon dies without having done so.
//!
//! A mount whose daemon was killed answers `ENOTCONN` to everybody until somebody unmounts it. The guardian waits on a pipe that
//! only the daemon holds open; when it closes, and the mount is still there and dead, the guardian detaches it. It is the same
//! program started anew (a fork of a large process with threads would pin its memory), and does nothing else.
//!
//! What it detaches is certain: it opens the directory, compares the number of the mount, sees that nobody serves it, and detaches
//! what it has opened, not what lies at the path by then. So a new mount in the same place is never touched.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::attach::{detach_by_helper, is_gone};
use super::mountinfo::{MountEntry, is_mirrorfs, mounts};

/// The word by which the program knows that it is to be a guardian; what tells its mount ([`Mounted`]) and the mountpoint follow.
pub const COMMAND: &str = "guard";

/// How long to try when detaching fails.
const ENDING: Duration = Duration::from_secs(120);
/// How often to look meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long the daemon waits for its guardian when all is over.
const LEAVING: Duration = Duration::from_secs(2);

/// What tells one mount from all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The number of its device, as `major:minor`; given again to others when it is gone.
    pub device: String,
    /// A number that is never given again; 0 when the kernel has none (before Linux 6.8).
    pub unique: u64,
}

impl Mounted {
    /// That of the mount of `device` at `path`.
    pub(super) fn at(device: &str, path: &Path) -> Self {
        let unique =
            CString::new(path.as_os_str().as_bytes()).ok().and_then(|p| unique_id(libc::AT_FDCWD, &p, 0));
        Self { device: device.to_owned(), unique: unique.unwrap_or(0) }
    }
}

/// The daemon's end of its guardian. Dropping it tells the guardian that the daemon is done.
#[derive(Debug)]
pub(super) struct Guardian {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guardian {
    /// Starts one for a mount at `mountpoint`.
    pub fn start(mounted: &Mounted, mountpoint: &Path) -> io::Result<Self> {
        // Not by its name: the file may have been replaced since this process began.
        let mut child = Command::new("/proc/self/exe")
            .arg0("mirrorfs")
            .arg(COMMAND)
            .arg(&mounted.device)
            .arg(mounted.unique.to_string())
            .arg(mountpoint)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let until = Instant::now() + LEAVING;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits until the other end of standard input closes, then detaches that mount if it is still there and dead.
pub fn guard(mounted: &Mounted, mountpoint: &Path) {
    stand_alone();
    let mut rest = Vec::new();
    // Nobody writes to it: this returns when the daemon is gone.
    if let Err(e) = io::stdin().read_to_end(&mut rest) {
        log::warn!("the guardian of {} cannot wait for the daemon: {e}", mountpoint.display());
        return;
    }
    let until = Instant::now() + ENDING;
    loop {
        let left = detach_dead(mounted);
        if left == 0 || Instant::now() >= until {
            return;
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Takes this process out of what may end the daemon: the terminal's signals, those to a group, and a busy directory.
fn stand_alone() {
    // SAFETY: calls on numbers; a new process leads no group, and if it does nothing is lost but the separation.
    unsafe {
        libc::setsid();
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        // What was inherited by mistake, above standard error, must not keep a mount or a pipe open.
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
    if let Err(e) = std::env::set_current_dir("/") {
        log::debug!("cannot leave the working directory: {e}");
    }
}

/// Detaches a mount if it is dead; answers how many are to be tried again.
fn detach_dead(mounted: &Mounted) -> usize {
    let Ok(all) = mounts() else { return 0 };
    let ours = all.into_iter().filter(|m| m.device == mounted.device && is_mirrorfs(m));
    ours.filter(|entry| match detach_if_dead(entry, mounted.unique) {
        Ok(true) => {
            log::warn!("the daemon is gone: detached {}", entry.mountpoint.display());
            false
        }
        // It answers: the number of the device has been given to a new mount.
        Ok(false) => false,
        Err(e) => {
            log::debug!("{} stays for now: {e}", entry.mountpoint.display());
            true
        }
    })
    .count()
}

/// Detaches this very mount if nobody serves it; answers whether it did.
fn detach_if_dead(entry: &MountEntry, unique: u64) -> io::Result<bool> {
    // Only a place, which needs no answer from the daemon.
    let place = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&entry.mountpoint)?;
    if mount_id(&place)? != Some(entry.id) {
        // Something else lies over it.
        return Ok(false);
    }
    if unique_id(place.as_raw_fd(), c"", libc::AT_EMPTY_PATH).is_some_and(|id| unique != 0 && id != unique) {
        // Another one, which has got the number of our device.
        return Ok(false);
    }
    let this = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    if !is_gone(&this) {
        return Ok(false);
    }
    let path = CString::new(OsStr::new(&this).as_bytes())?;
    // SAFETY: the string outlives the call. The link leads to the mount that `place` holds, wherever that is by now.
    if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    drop(place);
    detach_by_helper(&entry.mountpoint, true)?;
    Ok(true)
}

/// The number of the mount that an open directory belongs to.
fn mount_id(place: &File) -> io::Result<Option<u64>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", place.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(line.and_then(|id| id.trim().parse().ok()))
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
    fn the_number_of_a_mount_is_that_of_the_list() {
        let root = File::open("/").unwrap();
        assert_eq!(mount_id(&root).unwrap(), Some(mount_at(Path::new("/")).unwrap().unwrap().id));
    }

    #[test]
    fn what_lives_or_is_something_else_is_not_touched() {
        let root = mount_at(Path::new("/")).unwrap().unwrap();
        assert!(!detach_if_dead(&root, 0).unwrap(), "it answers");
        assert!(!detach_if_dead(&MountEntry { id: root.id + 1_000_000, ..root }, 0).unwrap(), "another one");
        assert_eq!(detach_dead(&Mounted { device: "0:999999".into(), unique: 0 }), 0);
    }
}
