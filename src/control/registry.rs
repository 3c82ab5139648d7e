//! Which daemon serves which mountpoint: one small file per live mount in a folder of the runtime
//! area of its user.
//!
//! A file is only a hint. It counts while the kernel has the mount; whether the daemon lives is found out by asking it.
//! Root asks for mounts of other users, too, in folders where those users may put anything. So an
//! entry is taken only from the folder of the user that the *kernel* names as the mounter, and
//! nothing there is followed or waited for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};

use super::mounts::{self, Mount};
use crate::private;

/// An entry holds two escaped paths and a number.
const LONGEST: u64 = 64 << 10;

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

/// The folders of entries that one user may look into.
#[derive(Clone, Debug)]
pub struct Registry {
    /// Where this user's entries go.
    own: PathBuf,
    /// Who that is.
    user: u32,
    /// Whether entries of other users are looked for.
    all: bool,
}

/// Removes its entry when dropped.
#[derive(Debug)]
pub struct Registration {
    folder: PathBuf,
    user: u32,
    name: String,
    text: Vec<u8>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Not that of a mount which came after us in the same place. A left-over entry does no harm: the kernel no longer has
        // the mount.
        let Ok(folder) = open_folder(&self.folder, self.user) else { return };
        if read(&folder, &self.name, self.user).is_some_and(|text| text == self.text) {
            let _ = rustix::fs::unlinkat(&folder, &self.name, AtFlags::empty());
        }
    }
}

impl Registry {
    /// That of the user who runs this process: `/run/mirrorfs` for root, who also finds those of
    /// the others; `$XDG_RUNTIME_DIR/mirrorfs` (or `/run/user/UID/mirrorfs`, or
    /// `/tmp/mirrorfs-UID`) for everyone else.
    #[must_use]
    pub fn of_user() -> Registry {
        let user = rustix::process::geteuid().as_raw();
        if user == 0 {
            return Registry { own: "/run/mirrorfs".into(), user, all: true };
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
        let usual = PathBuf::from(format!("/run/user/{user}"));
        let own = match runtime.or_else(|| usual.is_dir().then_some(usual)) {
            Some(folder) => folder.join("mirrorfs"),
            None => format!("/tmp/mirrorfs-{user}").into(),
        };
        Registry { own, user, all: false }
    }

    /// One in `folder` alone, for tests.
    #[must_use]
    pub fn in_folder(folder: &Path) -> Registry {
        Registry { own: folder.to_owned(), user: rustix::process::geteuid().as_raw(), all: false }
    }

    /// Enters a live mount.
    pub fn enter(&self, entry: &Entry) -> io::Result<Registration> {
        private::create_dir_all(&self.own)?;
        // In /tmp another user may have made it first, to send us to a socket of their own.
        let folder = open_folder(&self.own, self.user)?;
        let mut text = mounts::escape(&entry.mountpoint);
        text.push(b' ');
        text.extend(mounts::escape(&entry.state));
        text.extend(format!(" {}\n", entry.pid).bytes());
        let (name, temporary) = (file_name(&entry.mountpoint), format!(".{}", entry.pid));
        // Left by a process of the same number that was killed.
        let _ = rustix::fs::unlinkat(&folder, &temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&folder, &temporary, flags, Mode::from_raw_mode(private::FILE))?;
        File::from(file).write_all(&text)?;
        rustix::fs::renameat(&folder, &temporary, &folder, &name)?;
        Ok(Registration { folder: self.own.clone(), user: self.user, name, text })
    }

    /// The entry for one of the mounts `all`, whether or not its daemon lives. `None` also when
    /// this user has no business with it.
    #[must_use]
    pub fn find(&self, mount: &Mount, all: &[Mount]) -> Option<Entry> {
        let owner = mount.user?;
        self.folders_of(owner).iter().filter(|folder| !is_served(folder, all)).find_map(|folder| {
            let folder = open_folder(folder, owner).ok()?;
            let entry = parse(&read(&folder, &file_name(&mount.mountpoint), owner)?)?;
            (entry.mountpoint == mount.mountpoint).then_some(entry)
        })
    }

    /// The entry that a daemon of this user left for a place where nothing is mounted any more.
    #[must_use]
    pub fn find_left(&self, mountpoint: &Path) -> Option<Entry> {
        let folder = open_folder(&self.own, self.user).ok()?;
        let entry = parse(&read(&folder, &file_name(mountpoint), self.user)?)?;
        (entry.mountpoint == mountpoint).then_some(entry)
    }

    fn folders_of(&self, owner: u32) -> Vec<PathBuf> {
        if owner == self.user {
            vec![self.own.clone()]
        } else if self.all {
            vec![format!("/run/user/{owner}/mirrorfs").into(), format!("/tmp/mirrorfs-{owner}").into()]
        } else {
            Vec::new()
        }
    }
}

/// Whether a program answers for what is at `folder`, as its owner could arrange: then to open it
/// can take for ever.
fn is_served(folder: &Path, all: &[Mount]) -> bool {
    mounts::around(all, folder).is_some_and(|m| m.fstype == "fuse" || m.fstype.starts_with("fuse."))
}

/// Opens a folder that must be `owner`'s own.
fn open_folder(path: &Path, owner: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())?;
    if is_of(&rustix::fs::fstat(&folder)?, owner) {
        return Ok(folder);
    }
    let text = format!("{} is not user {owner}'s alone (see: ls -ld)", path.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// The content of an entry's file, which must be a regular one and `owner`'s own. Never waits.
fn read(folder: &impl AsFd, name: &str, owner: u32) -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?);
    let meta = file.metadata().ok()?;
    let fine = meta.is_file() && meta.uid() == owner && meta.mode() & 0o022 == 0 && meta.len() <= LONGEST;
    let mut text = Vec::new();
    if !fine || file.take(LONGEST).read_to_end(&mut text).is_err() {
        return None;
    }
    Some(text)
}

fn is_of(meta: &rustix::fs::Stat, owner: u32) -> bool {
    meta.st_uid == owner && meta.st_mode & 0o022 == 0
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
    use std::os::unix::fs::{PermissionsExt, chown};

    fn me() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn mount(mountpoint: &str, user: u32) -> Mount {
        Mount {
            mountpoint: mountpoint.into(),
            fstype: mounts::FSTYPE.into(),
            source: "x".into(),
            user: Some(user),
        }
    }

    fn entry(mountpoint: &str) -> Entry {
        Entry { mountpoint: mountpoint.into(), state: "/s p\n".into(), pid: 77 }
    }

    #[test]
    fn an_entry_is_found_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::in_folder(&dir.path().join("run"));
        let entry = entry("/mnt/my files");
        let find = |path: &str| registry.find(&mount(path, me()), &[]);
        assert_eq!(find("/mnt/my files"), None);
        let registration = registry.enter(&entry).unwrap();
        assert_eq!(find("/mnt/my files"), Some(entry.clone()));
        assert_eq!(registry.find_left(Path::new("/mnt/my files")), Some(entry.clone()));
        assert_eq!(find("/mnt/my"), None);
        // A later mount in the same place.
        let other = registry.enter(&Entry { pid: 78, ..entry.clone() }).unwrap();
        drop(registration);
        assert_eq!(find("/mnt/my files").unwrap().pid, 78);
        drop(other);
        assert_eq!(find("/mnt/my files"), None);
    }

    #[test]
    fn only_the_folder_of_the_mount_s_user_is_looked_into() {
        let root = Registry { own: "/run/mirrorfs".into(), user: 0, all: true };
        assert_eq!(root.folders_of(0), [Path::new("/run/mirrorfs")]);
        let of_other = ["/run/user/7/mirrorfs", "/tmp/mirrorfs-7"].map(PathBuf::from);
        assert_eq!(root.folders_of(7), of_other);
        let user = Registry { own: "/run/user/7/mirrorfs".into(), user: 7, all: false };
        assert_eq!(user.folders_of(7), of_other[..1]);
        assert!(user.folders_of(0).is_empty() && user.folders_of(8).is_empty());
        let unknown = Mount { user: None, ..mount("/m", 0) };
        assert_eq!(root.find(&unknown, &[]), None);
    }

    /// Makes an entry for `/m`, has `spoil` change its file and its folder, and looks for it.
    fn found_after(spoil: impl FnOnce(&Path, &Path)) -> Option<Entry> {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let registry = Registry::in_folder(&folder);
        let _registration = registry.enter(&entry("/m")).unwrap();
        spoil(&folder, &folder.join(file_name(Path::new("/m"))));
        registry.find(&mount("/m", me()), &[])
    }

    #[test]
    fn what_is_not_a_plain_file_of_the_user_is_no_entry_and_is_not_waited_for() {
        let chmod = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        assert!(found_after(|_, _| {}).is_some());
        let aside = |folder: &Path, file: &Path| {
            let to = folder.join("aside");
            std::fs::rename(file, &to).unwrap();
            to
        };
        assert_eq!(found_after(|_, file| chmod(file, 0o622)), None);
        assert_eq!(found_after(|folder, _| chmod(folder, 0o777)), None);
        let linked = |folder: &Path, file: &Path| {
            std::os::unix::fs::symlink(aside(folder, file), file).unwrap();
        };
        assert_eq!(found_after(linked), None);
        let fifo = |folder: &Path, file: &Path| {
            aside(folder, file);
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, file, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        };
        assert_eq!(found_after(fifo), None);
        let long = |_: &Path, file: &Path| {
            std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(1 << 40).unwrap();
        };
        assert_eq!(found_after(long), None);
        let moved = |folder: &Path, _: &Path| {
            let to = folder.with_extension("moved");
            std::fs::rename(folder, &to).unwrap();
            std::os::unix::fs::symlink(&to, folder).unwrap();
        };
        assert_eq!(found_after(moved), None);
        if me() == 0 {
            assert_eq!(found_after(|_, file| chown(file, Some(7), None).unwrap()), None);
            assert_eq!(found_after(|folder, _| chown(folder, Some(7), None).unwrap()), None);
        }
    }

    #[test]
    fn a_folder_that_a_program_serves_is_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::in_folder(dir.path());
        let _registration = registry.enter(&entry("/m")).unwrap();
        let served = |fstype: &str| Mount { fstype: fstype.into(), ..mount(dir.path().to_str().unwrap(), 7) };
        assert!(registry.find(&mount("/m", me()), &[served("tmpfs")]).is_some());
        assert_eq!(registry.find(&mount("/m", me()), &[served("fuse.sshfs")]), None);
    }

    #[test]
    fn a_folder_that_others_made_first_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Registry::in_folder(&folder).enter(&entry("/m")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn a_broken_entry_is_none() {
        for text in ["", "\n", "/a /b x\n", "/a /b\n", "/a /b 1"] {
            assert_eq!(parse(text.as_bytes()), None, "{text:?}");
        }
    }
}
