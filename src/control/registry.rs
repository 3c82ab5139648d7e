//! Which daemon serves which mountpoint: one small file per live mount in a folder of the system's runtime area.
//!
//! A file is only a hint. It counts while the kernel has the mount; whether the daemon lives is found out by asking it.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::mounts;

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the volume is mounted.
    pub mountpoint: PathBuf,
    /// Folder of its local state.
    pub state: PathBuf,
    /// Process of its daemon.
    pub pid: u32,
}

/// A folder of entries.
#[derive(Clone, Debug)]
pub struct Registry {
    own: PathBuf,
    others: Vec<PathBuf>,
}

/// Removes its entry when dropped.
#[derive(Debug)]
pub struct Registration {
    path: PathBuf,
    text: Vec<u8>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Not that of a mount which came after us in the same place. A left-over entry does no harm: the kernel no longer has
        // the mount.
        if std::fs::read(&self.path).is_ok_and(|text| text == self.text) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Registry {
    /// That of the user who runs this process: `/run/mirrorfs` for root, who also sees those of the others;
    /// `$XDG_RUNTIME_DIR/mirrorfs` (or `/run/user/UID/mirrorfs`, or `/tmp/mirrorfs-UID`) for everyone else.
    #[must_use]
    pub fn of_user() -> Registry {
        // SAFETY: geteuid has no preconditions and cannot fail.
        let uid = unsafe { libc::geteuid() };
        if uid == 0 {
            let entries = |folder| std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
            let users = entries("/run/user").map(|user| user.path().join("mirrorfs"));
            let without = entries("/tmp").filter_map(|entry| {
                let uid = entry.file_name().to_str()?.strip_prefix("mirrorfs-")?.parse().ok()?;
                belongs_to(&entry.path(), uid).then(|| entry.path())
            });
            return Registry { own: "/run/mirrorfs".into(), others: users.chain(without).collect() };
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
        let usual = PathBuf::from(format!("/run/user/{uid}"));
        let own = match runtime.or_else(|| usual.is_dir().then_some(usual)) {
            Some(folder) => folder.join("mirrorfs"),
            None => format!("/tmp/mirrorfs-{uid}").into(),
        };
        Registry { own, others: Vec::new() }
    }

    /// One in `folder` alone, for tests.
    #[must_use]
    pub fn in_folder(folder: &Path) -> Registry {
        Registry { own: folder.to_owned(), others: Vec::new() }
    }

    /// Enters a live mount.
    pub fn enter(&self, entry: &Entry) -> std::io::Result<Registration> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.own)?;
        if !ours(&self.own) {
            // In /tmp somebody else may have made it first, to send us to a socket of his.
            return Err(std::io::Error::new(
                std::io::ErrorKind::PermissionDenied,
                format!("{} belongs to another user", self.own.display()),
            ));
        }
        let path = self.own.join(file_name(&entry.mountpoint));
        let temporary = self.own.join(format!(".{}", entry.pid));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        let mut text = mounts::escape(&entry.mountpoint);
        text.push(b' ');
        text.extend(mounts::escape(&entry.state));
        text.extend(format!(" {}\n", entry.pid).bytes());
        file.write_all(&text)?;
        std::fs::rename(&temporary, &path)?;
        Ok(Registration { path, text })
    }

    /// The entry for a mountpoint, whether or not its daemon lives.
    #[must_use]
    pub fn find(&self, mountpoint: &Path) -> Option<Entry> {
        let folders = std::iter::once(&self.own).chain(&self.others);
        folders.filter(|folder| ours(folder) || self.others.contains(folder)).find_map(|folder| {
            let entry = parse(&std::fs::read(folder.join(file_name(mountpoint))).ok()?)?;
            (entry.mountpoint == mountpoint).then_some(entry)
        })
    }
}

fn ours(folder: &Path) -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    belongs_to(folder, unsafe { libc::geteuid() })
}

fn belongs_to(folder: &Path, uid: u32) -> bool {
    std::fs::symlink_metadata(folder).is_ok_and(|m| m.is_dir() && m.uid() == uid)
}

fn file_name(mountpoint: &Path) -> String {
    blake3::hash(mountpoint.as_os_str().as_bytes()).to_hex()[..32].to_owned()
}

fn parse(text: &[u8]) -> Option<Entry> {
    let mut words = text.strip_suffix(b"\n")?.split(|b| *b == b' ');
    let (mountpoint, state, pid) = (words.next()?, words.next()?, words.next()?);
    Some(Entry {
        mountpoint: mounts::unescape(mountpoint).into(),
        state: mounts::unescape(state).into(),
        pid: std::str::from_utf8(pid).ok()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::in_folder(&dir.path().join("run"));
        let entry = Entry { mountpoint: "/mnt/my files".into(), state: "/s p\n".into(), pid: 77 };
        assert_eq!(registry.find(&entry.mountpoint), None);
        let registration = registry.enter(&entry).unwrap();
        assert_eq!(registry.find(&entry.mountpoint), Some(entry.clone()));
        assert_eq!(registry.find(Path::new("/mnt/my")), None);
        drop(registration);
        assert_eq!(registry.find(&entry.mountpoint), None);
    }

    #[test]
    fn a_broken_entry_is_none() {
        for text in ["", "\n", "/a /b x\n", "/a /b\n", "/a /b 1"] {
            assert_eq!(parse(text.as_bytes()), None, "{text:?}");
        }
    }
}
