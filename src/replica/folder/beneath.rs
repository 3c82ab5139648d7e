//! Files and folders below a replica's folder, reached without following links.
//!
//! A folder replica may lie on a disk that others can write to. A symbolic link in place of a
//! folder would lead writes out of it, and a FIFO in place of an object would hang whoever opens
//! it. So each step down is one `openat` that follows nothing, and only regular files count as
//! objects. The replica's folder itself may be a link: its owner named it.

use std::ffi::OsStr;
use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::direct;

/// Folders below the root in which only mirrorfs's own objects lie.
const OURS: [&str; 3] = ["segments", "epochs", "checkpoints"];
/// Folders are made for their owner only.
const FOLDER_MODE: u32 = 0o700;
/// Deeper folders are none of ours.
const MOST_DEPTH: usize = 16;

/// Why something below the replica's folder cannot be used.
#[derive(Debug)]
pub(super) enum Refused {
    /// The system refuses; not there, above all.
    Io(io::Error),
    /// A link, or something else, lies where a folder should be.
    NoFolder(String),
    /// What lies under the object's name is no regular file.
    NoFile(String),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        Refused::Io(e)
    }
}

impl From<Errno> for Refused {
    fn from(e: Errno) -> Self {
        Refused::Io(e.into())
    }
}

/// A file with its size, relative to the root.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// Its path with slashes.
    pub path: String,
    /// What the system says of it.
    pub len: u64,
    /// When it was last changed.
    pub modified: std::time::SystemTime,
    /// Tells it from what lay there before.
    pub tag: String,
}

/// What tells a file from the one that lay there before it.
pub(super) fn tag(meta: &Metadata) -> String {
    let nanos = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    format!("{:x}-{nanos:x}-{:x}", meta.ino(), meta.len())
}

fn kind(file_type: FileType) -> &'static str {
    match file_type {
        t if t.is_symlink() => "a symbolic link",
        t if t.is_fifo() => "a FIFO",
        t if t.is_socket() => "a socket",
        t if t.is_dir() => "a folder",
        t if t.is_file() => "a file",
        _ => "a device",
    }
}

/// What lies at a path, in words; it is not followed.
fn what(path: &Path) -> &'static str {
    std::fs::symlink_metadata(path).map_or("something else", |meta| kind(meta.file_type()))
}

/// A path that leads to an open folder, or into it, and cannot be redirected.
fn path_of(folder: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}

fn open_root(root: &Path) -> Result<OwnedFd, Refused> {
    Ok(rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a folder in another one.
fn step(folder: &OwnedFd, name: &OsStr, shown: &Path) -> Result<OwnedFd, Refused> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(found) => Ok(found),
        Err(Errno::LOOP | Errno::NOTDIR) => Err(Refused::NoFolder(format!(
            "{} is {} where a folder of the replica should be; nothing is read or written through it: move it away, \
             then mirrorfs makes the folder again",
            shown.display(),
            what(shown)
        ))),
        Err(e) => Err(e.into()),
    }
}

/// Opens the folder in which an object lies; makes it, and those above it, durably when `make`.
/// Gives also the object's own name.
pub(super) fn folder_of<'a>(
    root: &Path,
    object: &'a str,
    make: bool,
) -> Result<(OwnedFd, &'a OsStr), Refused> {
    let (parents, name) = object.rsplit_once('/').unwrap_or(("", object));
    if name.is_empty() || object.split('/').any(|part| part == "." || part == "..") {
        return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
    }
    let mut folder = open_root(root)?;
    let mut shown = root.to_owned();
    for part in parents.split('/').filter(|p| !p.is_empty()) {
        shown.push(part);
        let part = OsStr::new(part);
        folder = match step(&folder, part, &shown) {
            Err(Refused::Io(e)) if make && e.kind() == io::ErrorKind::NotFound => {
                match rustix::fs::mkdirat(&folder, part, Mode::from_raw_mode(FOLDER_MODE)) {
                    Ok(()) => rustix::fs::fsync(&folder)?,
                    Err(Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
                step(&folder, part, &shown)?
            }
            other => other?,
        };
    }
    Ok((folder, OsStr::from_bytes(name.as_bytes())))
}

/// Opens an object for reading. It never waits, whatever lies there.
pub(super) fn open(root: &Path, object: &str) -> Result<(File, Metadata), Refused> {
    let (folder, name) = folder_of(root, object, false)?;
    let shown = root.join(object);
    let no_file = || Refused::NoFile(format!("{} is {}, not a regular file", shown.display(), what(&shown)));
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(&folder, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        // A link; a socket, or a device that is not there.
        Err(Errno::LOOP | Errno::NXIO) => return Err(no_file()),
        Err(e) => return Err(e.into()),
    };
    let meta = file.metadata()?;
    if meta.is_dir() {
        // A folder of objects is no object.
        return Err(io::Error::from(io::ErrorKind::NotFound).into());
    }
    if meta.is_file() { Ok((file, meta)) } else { Err(no_file()) }
}

/// Writes an object durably under a temporary name, which no listing shows, and then gives it its
/// own: what lies there, if anything, is replaced as it is and never written through, and with
/// `new` it stays. Gives the file's tag.
pub(super) fn put(root: &Path, object: &str, bytes: &[u8], new: bool) -> Result<String, Refused> {
    let (folder, name) = folder_of(root, object, true)?;
    let dir = path_of(&folder);
    let dest = dir.join(name);
    if !new && std::fs::symlink_metadata(&dest).is_ok_and(|meta| meta.is_dir()) {
        let text = format!("{} is a folder, not a regular file", root.join(object).display());
        return Err(Refused::NoFile(text));
    }
    let mut attempt = 1;
    let temporary = loop {
        let mut temporary = dest.clone().into_os_string();
        temporary.push(format!("#{attempt}"));
        let temporary = PathBuf::from(temporary);
        match direct::create(&temporary, bytes) {
            // Another write's, or what a killed one left.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            Err(e) => {
                let _ = std::fs::remove_file(&temporary);
                return Err(e.into());
            }
            Ok(()) => break temporary,
        }
    };
    let written = std::fs::symlink_metadata(&temporary);
    let named = if new { std::fs::hard_link(&temporary, &dest) } else { std::fs::rename(&temporary, &dest) };
    let named = named.and_then(|()| rustix::fs::fsync(&folder).map_err(io::Error::from));
    // It is gone already behind a rename.
    let _ = std::fs::remove_file(&temporary);
    named?;
    Ok(tag(&written?))
}

/// All regular files below the folder `prefix` (the root when empty), but for temporary ones. A
/// link in place of one of the folders in which our objects lie is an error, since what lies behind
/// it is no part of the replica.
pub(super) fn list(root: &Path, prefix: &str) -> Result<Vec<Listed>, Refused> {
    let mut found = Vec::new();
    let folder = match prefix {
        "" => open_root(root)?,
        prefix => {
            let (parent, name) = folder_of(root, prefix, false)?;
            let shown = root.join(prefix);
            match step(&parent, name, &shown) {
                // An object has nothing below it.
                Err(Refused::NoFolder(_)) if std::fs::symlink_metadata(&shown).is_ok_and(|m| m.is_file()) => {
                    return Ok(found);
                }
                folder => folder?,
            }
        }
    };
    walk(root, &folder, prefix, 0, &mut found)?;
    Ok(found)
}

fn walk(
    root: &Path,
    folder: &OwnedFd,
    prefix: &str,
    depth: usize,
    found: &mut Vec<Listed>,
) -> Result<(), Refused> {
    for entry in std::fs::read_dir(path_of(folder))? {
        let entry = entry?;
        let name = entry.file_name();
        let path = match prefix {
            "" => name.to_string_lossy().into_owned(),
            prefix => format!("{prefix}/{}", name.to_string_lossy()),
        };
        let file_type = match entry.file_type() {
            Ok(file_type) => file_type,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        let is_ours = path.split('/').next().is_some_and(|top| OURS.contains(&top));
        if file_type.is_dir() {
            match step(folder, &name, &root.join(&path)) {
                Ok(below) if depth < MOST_DEPTH => walk(root, &below, &path, depth + 1, found)?,
                Ok(_) => {}
                Err(Refused::Io(e)) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        } else if file_type.is_file() {
            // Gone meanwhile, or not.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_file() && !is_temporary(&path) {
                let modified = meta.modified().unwrap_or(std::time::UNIX_EPOCH);
                found.push(Listed { path, len: meta.len(), modified, tag: tag(&meta) });
            }
        } else if file_type.is_symlink() && is_ours {
            let leads = rustix::fs::statat(folder, &name, AtFlags::empty());
            let to_folder =
                leads.is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir());
            if to_folder || !path.contains('/') {
                step(folder, &name, &root.join(&path))?;
            }
        }
    }
    Ok(())
}

/// Whether a name is one that [`put`], or object_store's local store, gives while it writes.
fn is_temporary(path: &str) -> bool {
    path.rsplit_once('#')
        .is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) && !n.contains('/'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn paths(found: &[Listed]) -> Vec<&str> {
        let mut paths: Vec<_> = found.iter().map(|l| l.path.as_str()).collect();
        paths.sort_unstable();
        paths
    }

    #[test]
    fn objects_are_written_listed_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "segments/00000000/x.seg", b"one", true).unwrap();
        let again = put(root, "segments/00000000/x.seg", b"two", true).unwrap_err();
        assert!(matches!(again, Refused::Io(e) if e.kind() == io::ErrorKind::AlreadyExists));
        put(root, "segments/00000000/x.seg", b"three", false).unwrap();
        put(root, "volume.json", &vec![7; 2 << 20], true).unwrap();
        std::fs::write(root.join("volume.json#1"), "half").unwrap();
        std::fs::write(root.join("a#b"), "not ours").unwrap();
        let all = list(root, "").unwrap();
        assert_eq!(paths(&all), ["a#b", "segments/00000000/x.seg", "volume.json"]);
        assert_eq!(paths(&list(root, "segments").unwrap()), ["segments/00000000/x.seg"]);
        let absent = list(root, "epochs").unwrap_err();
        assert!(matches!(absent, Refused::Io(e) if e.kind() == io::ErrorKind::NotFound));
        let (file, meta) = open(root, "segments/00000000/x.seg").unwrap();
        assert_eq!((io::read_to_string(file).unwrap().as_str(), meta.len()), ("three", 5));
        let folder = open(root, "segments").unwrap_err();
        assert!(matches!(folder, Refused::Io(e) if e.kind() == io::ErrorKind::NotFound));
        assert!(open(root, "segments/../volume.json").is_err());
    }

    #[test]
    fn a_link_for_a_folder_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("r"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("segments")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("x.seg"), "theirs").unwrap();
        symlink(&outside, root.join("segments/00000000")).unwrap();
        symlink(&outside, root.join("epochs")).unwrap();
        for object in ["segments/00000000/x.seg", "epochs/x.seg"] {
            let refused = open(&root, object).unwrap_err();
            assert!(
                matches!(&refused, Refused::NoFolder(text) if text.contains("symbolic link")),
                "{refused:?}"
            );
            assert!(matches!(put(&root, object, b"ours", false), Err(Refused::NoFolder(_))));
        }
        assert!(matches!(list(&root, ""), Err(Refused::NoFolder(_))));
        assert!(matches!(list(&root, "segments"), Err(Refused::NoFolder(_))));
        assert!(matches!(list(&root, "epochs"), Err(Refused::NoFolder(_))));
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(std::fs::read(outside.join("x.seg")).unwrap(), b"theirs");
        // Links elsewhere are somebody's own business, and no objects.
        std::fs::remove_file(root.join("epochs")).unwrap();
        std::fs::remove_file(root.join("segments/00000000")).unwrap();
        symlink(&outside, root.join("holiday")).unwrap();
        assert!(list(&root, "").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_regular_file_is_never_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir(root.join("epochs")).unwrap();
        let fifo = root.join("epochs/00000001.json");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let refused = open(root, "epochs/00000001.json").unwrap_err();
        assert!(matches!(&refused, Refused::NoFile(text) if text.contains("a FIFO")), "{refused:?}");
        assert!(list(root, "").unwrap().is_empty());
        put(root, "epochs/00000001.json", b"a claim", false).unwrap();
        assert_eq!(std::fs::read(&fifo).unwrap(), b"a claim", "it is replaced, not written through");
        let secret = root.join("secret");
        std::fs::write(&secret, "secret").unwrap();
        symlink(&secret, root.join("volume.json")).unwrap();
        assert!(matches!(open(root, "volume.json"), Err(Refused::NoFile(_))));
        put(root, "volume.json", b"ours", false).unwrap();
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
    }
}
