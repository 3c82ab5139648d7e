//! What is known of a daemon's death: the note `crash.json` in the state folder.
//!
//! The guardian writes it; `mirrorfs status` and the next daemon read it. It is a hint for people, so a damaged note counts as
//! none.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::state::{Holder, write_durably};
use crate::control::CrashNote;
use crate::fuse::MountIdentity;

/// Name of the note in the state folder.
const FILE: &str = "crash.json";
/// No note is longer.
const LONGEST: u64 = 64 << 10;

/// Replaces the note in the state folder `state`.
///
/// # Errors
/// What the disk says.
pub fn note_crash(state: &Path, note: &CrashNote) -> io::Result<()> {
    write_durably(state, FILE, &serde_json::to_vec_pretty(note)?)
}

/// The note in the state folder `state`.
#[must_use]
pub fn last_crash(state: &Path) -> Option<CrashNote> {
    // Root reads it in the folder of another user, who may have put anything there.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(state.join(FILE)).ok()?;
    file.metadata().ok().filter(|m| m.is_file() && m.len() <= LONGEST)?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The mount that the daemon `pid` had last, as it noted in the lock of the state folder `state`; `None` when it had none.
#[must_use]
pub fn last_mount(state: &Path, pid: u32) -> Option<MountIdentity> {
    let holder = Holder::parse(&fs::read_to_string(state.join("LOCK")).ok()?);
    (holder.pid == Some(pid)).then_some(holder.mounted)?
}

/// Whether the daemon `pid` noted in the lock of the state folder `state` that its mount is gone and it is ending.
#[must_use]
pub fn noted_end(state: &Path, pid: u32) -> bool {
    let text = fs::read_to_string(state.join("LOCK")).unwrap_or_default();
    let holder = Holder::parse(&text);
    holder.pid == Some(pid) && holder.ending
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Then;

    #[test]
    fn a_note_comes_back_and_a_damaged_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_crash(dir.path()), None);
        let note = CrashNote { at: 1.5, pid: 7, how: "killed by signal 9".into(), then: Then::GaveUp };
        note_crash(dir.path(), &note).unwrap();
        assert_eq!(last_crash(dir.path()), Some(note));
        fs::rename(dir.path().join(FILE), dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", dir.path().join(FILE)).unwrap();
        assert_eq!(last_crash(dir.path()), None, "a link is not followed");
        fs::remove_file(dir.path().join(FILE)).unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(last_crash(dir.path()), None);
    }

    #[test]
    fn only_the_note_of_that_daemon_counts() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("LOCK"), "7\nmounted 0:45 4294967301\n").unwrap();
        let identity = MountIdentity { device: "0:45".into(), unique: 4_294_967_301 };
        assert_eq!(last_mount(dir.path(), 7), Some(identity));
        assert_eq!(last_mount(dir.path(), 8), None);
        fs::write(dir.path().join("LOCK"), "7\n").unwrap();
        assert_eq!(last_mount(dir.path(), 7), None);
    }
}
