//! Files and folders for their owner only.
//!
//! A replica, a state folder and everything in them hold the content of files whose permissions
//! only the mount enforces. Knows not what the files are.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Permissions of a folder.
pub const DIR: u32 = 0o700;
/// Permissions of a file.
pub const FILE: u32 = 0o600;
/// What the process leaves out of the permissions of everything that it makes.
const UMASK: libc::mode_t = 0o077;

/// Has this process make files and folders for their owner only, libraries included. Files made
/// *through* a mount are not affected: the kernel applies the umask of the caller.
pub fn set_umask() {
    // SAFETY: umask takes a number, touches no memory and cannot fail.
    unsafe { libc::umask(UMASK) };
}

/// Makes a folder and those above it that are missing, whatever the umask is.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(DIR).create(path)
}

/// Makes or empties a file for writing, whatever the umask is. One that exists keeps its
/// permissions.
pub fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(FILE).open(path)
}

/// Refuses a folder that another user owns or may write to: what this process reads there, that
/// user could have put there.
pub fn require_own(dir: &Path) -> io::Result<()> {
    let meta = std::fs::metadata(dir)?;
    // SAFETY: geteuid has no preconditions and cannot fail.
    let me = unsafe { libc::geteuid() };
    let shown = dir.display();
    let refused = |text: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    if !meta.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a folder"));
    }
    if meta.uid() != me {
        return refused(format!(
            "it belongs to user {}, not to user {me} who runs this command; run it as its owner, name another \
             folder, or take it over with: chown -R {me} {shown}",
            meta.uid()
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return refused(format!(
            "other users may write to it (mode {:04o}) and so could change the volume; make sure that what is in \
             it is yours, then close it with: chmod go-rwx {shown}",
            meta.mode() & 0o7777
        ));
    }
    Ok(())
}

/// A folder that is open to more users than its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The folder.
    pub path: PathBuf,
    /// Its permissions.
    pub mode: u32,
}

impl Open {
    /// Looks at a folder. `None` when it is its owner's alone, is not there, or cannot be looked
    /// at.
    #[must_use]
    pub fn look(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Self::of(path, meta.mode() & 0o7777)
    }

    fn of(path: &Path, mode: u32) -> Option<Self> {
        (mode & 0o077 != 0).then(|| Self { path: path.to_owned(), mode })
    }

    /// Object, cause and remedy, in one line. `what` names the folder's role.
    #[must_use]
    pub fn warning(&self, what: &str) -> String {
        let users = if self.mode & 0o007 != 0 { "every user of this machine" } else { "its group" };
        let may = if self.mode & 0o022 != 0 { "change it" } else { "read files of the volume there" };
        let path = self.path.display();
        format!(
            "warning: {what} ({path}) is open to {users} (mode {:04o}), who may {may} whatever the files' own \
             permissions are; close it with: chmod -R go-rwx {path}",
            self.mode
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_made_is_its_owner_s_alone() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        create_dir_all(&deep).unwrap();
        create_dir_all(&deep).unwrap();
        drop(create_file(&deep.join("f")).unwrap());
        assert_eq!([mode(&dir.path().join("a")), mode(&deep), mode(&deep.join("f"))], [0o700, 0o700, 0o600]);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        for (bits, fine) in [(0o700, true), (0o755, true), (0o775, false), (0o1777, false), (0o702, false)] {
            chmod(dir.path(), bits);
            match require_own(dir.path()) {
                Ok(()) => assert!(fine, "{bits:o}"),
                Err(e) => {
                    assert!(!fine, "{bits:o}: {e}");
                    assert!(e.to_string().contains(&format!("chmod go-rwx {}", dir.path().display())), "{e}");
                }
            }
        }
        chmod(dir.path(), 0o700);
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(require_own(&dir.path().join("file")).is_err());
        assert!(require_own(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_folder_of_another_user_is_refused() {
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } != 0 {
            println!("SKIP: only root can give a folder away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        let error = require_own(dir.path()).unwrap_err().to_string();
        assert!(error.contains("belongs to user 65534, not to user 0"), "{error}");
    }

    #[test]
    fn an_open_folder_is_told_with_who_may_what() {
        let path = Path::new("/r/a");
        assert_eq!(Open::of(path, 0o700), None);
        let text = |mode| Open::of(path, mode).unwrap().warning("the folder of replica a");
        assert!(text(0o755).contains("open to every user of this machine (mode 0755), who may read"));
        assert!(text(0o2750).contains("open to its group (mode 2750), who may read"));
        assert!(text(0o777).contains("who may change it"));
        assert!(text(0o755).ends_with("close it with: chmod -R go-rwx /r/a"));
        assert_eq!(Open::look(Path::new("/no/such/folder")), None);
    }
}
