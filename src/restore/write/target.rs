//! The folder that is restored into, by system calls that never follow a symbolic link below it.
//!
//! Owns descriptors: every name is opened relative to its directory's descriptor with `O_NOFOLLOW`, so whatever lies
//! in the folder already, or is put there meanwhile, leads nowhere else. Knows no tables and no network.

use std::ffi::{CString, OsStr};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use lru::LruCache;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};

use crate::format::tables::{FileKind, Inode, Time};
use crate::ids::Ino;
use crate::private;

/// Descriptors of directories and of files kept open.
const OPEN: usize = 64;
/// Unit in which zeros inside a block are left out of the file.
const PAGE: usize = 4096;

const PRIVATE_DIR: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

struct Dir {
    /// Its parent; the root is its own.
    parent: usize,
    name: Bytes,
}

/// The folder and the directories made or met in it.
pub(super) struct Target {
    root: Rc<OwnedFd>,
    created_root: bool,
    dirs: Vec<Dir>,
    /// Directories whose attributes are to be set at the end, in order of making.
    kept: Vec<(usize, Ino)>,
    open_dirs: LruCache<usize, Rc<OwnedFd>>,
    open_files: LruCache<(usize, Bytes), Rc<OwnedFd>>,
    uid: u32,
    gid: u32,
    owner_skipped: u64,
}

fn cache<K: std::hash::Hash + Eq, V>() -> LruCache<K, V> {
    LruCache::new(std::num::NonZeroUsize::new(OPEN).unwrap_or(std::num::NonZeroUsize::MIN))
}

fn as_name(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

impl Target {
    /// Opens the folder; makes it, with its parents, when it is missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut created_root = false;
        if let Err(e) = DirBuilder::new().mode(private::DIR).create(path) {
            match e.kind() {
                io::ErrorKind::AlreadyExists => {}
                io::ErrorKind::NotFound => {
                    private::create_dir_all(path)?;
                    created_root = true;
                }
                _ => return Err(e),
            }
        } else {
            created_root = true;
        }
        // The folder itself may be reached through links: it is what the caller named.
        let root = fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if created_root {
            fs::fchmod(&root, PRIVATE_DIR)?;
        }
        Ok(Self {
            root: Rc::new(root),
            created_root,
            dirs: vec![Dir { parent: 0, name: Bytes::new() }],
            kept: Vec::new(),
            open_dirs: cache(),
            open_files: cache(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            owner_skipped: 0,
        })
    }

    pub(super) fn created_root(&self) -> bool {
        self.created_root
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Path of a directory below the folder, with a slash behind every name.
    pub(super) fn path_of(&self, dir: usize) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = dir;
        while at != 0 {
            names.push(&self.dirs[at].name);
            at = self.dirs[at].parent;
        }
        names.into_iter().rev().flat_map(|n| n.iter().copied().chain([b'/'])).collect()
    }

    fn dir(&mut self, number: usize) -> io::Result<Rc<OwnedFd>> {
        // Down from the nearest open ancestor.
        let mut missing = Vec::new();
        let mut at = number;
        let mut fd = loop {
            if at == 0 {
                break self.root.clone();
            }
            if let Some(fd) = self.open_dirs.get(&at) {
                break fd.clone();
            }
            missing.push(at);
            at = self.dirs[at].parent;
        };
        for number in missing.into_iter().rev() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fd = Rc::new(fs::openat(&fd, as_name(&self.dirs[number].name), flags, Mode::empty())?);
            self.open_dirs.put(number, fd.clone());
        }
        Ok(fd)
    }

    /// Makes a directory, or takes the one that is there. Says whether it was made.
    pub(super) fn make_dir(&mut self, parent: usize, name: &Bytes) -> io::Result<(usize, bool)> {
        let fd = self.dir(parent)?;
        let created = match fs::mkdirat(&fd, as_name(name), PRIVATE_DIR) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let number = self.dirs.len();
        self.dirs.push(Dir { parent, name: name.clone() });
        match self.dir(number) {
            Ok(_) => Ok((number, created)),
            Err(e) => {
                self.dirs.pop();
                Err(match e.raw_os_error() {
                    Some(libc::ENOTDIR | libc::ELOOP) => io::Error::other("something else has its name"),
                    _ => e,
                })
            }
        }
    }

    /// Says that a directory gets the attributes of `ino` at the end.
    pub(super) fn keep_attributes(&mut self, dir: usize, ino: Ino) {
        self.kept.push((dir, ino));
    }

    /// Those directories, everyone after all that are in it.
    pub(super) fn kept_attributes(&mut self) -> Vec<(usize, Ino)> {
        let mut kept = std::mem::take(&mut self.kept);
        // A directory's number is above its parent's.
        kept.sort_by_key(|(dir, _)| std::cmp::Reverse(*dir));
        kept
    }

    /// Runs `make`; when the name exists and may be replaced, removes it and runs `make` again.
    fn making<T>(
        &mut self,
        dir: usize,
        name: &[u8],
        replace: bool,
        make: impl Fn(&OwnedFd) -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        let fd = self.dir(dir)?;
        match make(&fd) {
            Err(rustix::io::Errno::EXIST) if replace => {
                self.open_files.pop(&(dir, Bytes::copy_from_slice(name)));
                fs::unlinkat(&fd, as_name(name), AtFlags::empty())?;
                Ok(make(&fd)?)
            }
            other => Ok(other?),
        }
    }

    /// Makes an empty file of the given size, all hole.
    pub(super) fn create_file(
        &mut self,
        dir: usize,
        name: &Bytes,
        size: u64,
        replace: bool,
    ) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.making(dir, name, replace, |at| fs::openat(at, as_name(name), flags, PRIVATE_FILE))?;
        let sized = fs::ftruncate(&fd, size);
        self.open_files.put((dir, name.clone()), Rc::new(fd));
        Ok(sized?)
    }

    fn file(&mut self, dir: usize, name: &Bytes) -> io::Result<Rc<OwnedFd>> {
        let key = (dir, name.clone());
        if let Some(fd) = self.open_files.get(&key) {
            return Ok(fd.clone());
        }
        let at = self.dir(dir)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = Rc::new(fs::openat(&at, as_name(name), flags, Mode::empty())?);
        self.open_files.put(key, fd.clone());
        Ok(fd)
    }

    /// Writes content into a file made before; pages of zeros are left as holes.
    pub(super) fn write(&mut self, dir: usize, name: &Bytes, offset: u64, content: &[u8]) -> io::Result<()> {
        let fd = self.file(dir, name)?;
        let mut at = 0;
        while at < content.len() {
            let zeros = run(&content[at..], true);
            let data = run(&content[at + zeros..], false);
            let mut start = at + zeros;
            at = start + data;
            while start < at {
                match rustix::io::pwrite(&fd, &content[start..at], offset + start as u64) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => start += n,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    pub(super) fn link(
        &mut self,
        first: (usize, &Bytes),
        new: (usize, &Bytes),
        replace: bool,
    ) -> io::Result<()> {
        let from = self.dir(first.0)?;
        self.making(new.0, new.1, replace, |at| {
            fs::linkat(&from, as_name(first.1), at, as_name(new.1), AtFlags::empty())
        })
    }

    pub(super) fn symlink(&mut self, dir: usize, name: &[u8], to: &[u8], replace: bool) -> io::Result<()> {
        self.making(dir, name, replace, |at| fs::symlinkat(as_name(to), at, as_name(name)))
    }

    /// Makes a fifo, a socket's name or a device node.
    pub(super) fn special(
        &mut self,
        dir: usize,
        name: &[u8],
        inode: &Inode,
        replace: bool,
    ) -> io::Result<()> {
        let kind = match inode.kind {
            FileKind::Fifo => FileType::Fifo,
            FileKind::Socket => FileType::Socket,
            FileKind::CharDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Regular | FileKind::Directory | FileKind::Symlink => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        };
        // The kernel's encoding of 32 bits, as FUSE gives it, to that of the system calls.
        let (major, minor) =
            ((inode.rdev >> 8) & 0xfff, (inode.rdev & 0xff) | ((inode.rdev >> 12) & 0xfff00));
        let device = fs::makedev(major, minor);
        self.making(dir, name, replace, |at| fs::mknodat(at, as_name(name), kind, PRIVATE_FILE, device))
    }

    /// Gives a file its attributes; what did not work is answered in words.
    pub(super) fn finish_file(
        &mut self,
        dir: usize,
        name: &Bytes,
        inode: &Inode,
        xattrs: &[(Bytes, Bytes)],
    ) -> Vec<String> {
        match self.file(dir, name) {
            Ok(fd) => {
                let trouble = self.finish_open(&fd, inode, xattrs);
                self.open_files.pop(&(dir, name.clone()));
                trouble
            }
            Err(e) => vec![format!("its attributes: {e}")],
        }
    }

    /// Gives a directory its attributes.
    pub(super) fn finish_dir(&mut self, dir: usize, inode: &Inode, xattrs: &[(Bytes, Bytes)]) -> Vec<String> {
        match self.dir(dir) {
            Ok(fd) => self.finish_open(&fd, inode, xattrs),
            Err(e) => vec![format!("its attributes: {e}")],
        }
    }

    fn finish_open(&mut self, fd: &OwnedFd, inode: &Inode, xattrs: &[(Bytes, Bytes)]) -> Vec<String> {
        let mut trouble = Vec::new();
        let set = |name: &[u8], value: &[u8]| fs::fsetxattr(fd, as_name(name), value, XattrFlags::empty());
        // A user attribute needs permission to write; a change of owner drops capabilities: hence the order.
        let late = |name: &[u8]| name.starts_with(b"security.") || name.starts_with(b"system.");
        set_xattrs(xattrs.iter().filter(|(name, _)| !late(name)), set, &mut trouble);
        if self.changes_owner(inode) {
            note(&mut trouble, "owner", fs::fchown(fd, uid(inode), gid(inode)));
        }
        let (mode, listed) = (self.mode(inode), has_list(xattrs));
        note(&mut trouble, "mode", fs::fchmod(fd, before_list(mode, listed)));
        let troubles = trouble.len();
        set_xattrs(xattrs.iter().filter(|(name, _)| late(name)), set, &mut trouble);
        if listed && trouble.len() == troubles {
            note(&mut trouble, "mode", fs::fchmod(fd, mode));
        }
        note(&mut trouble, "times", fs::futimens(fd, &times(inode)));
        trouble
    }

    /// Gives a symbolic link, fifo, socket or device node its attributes.
    pub(super) fn finish_special(
        &mut self,
        dir: usize,
        name: &Bytes,
        inode: &Inode,
        xattrs: &[(Bytes, Bytes)],
    ) -> Vec<String> {
        let at = match self.dir(dir) {
            Ok(at) => at,
            Err(e) => return vec![format!("its attributes: {e}")],
        };
        let mut trouble = Vec::new();
        if self.changes_owner(inode) {
            let result = fs::chownat(&at, as_name(name), uid(inode), gid(inode), AtFlags::SYMLINK_NOFOLLOW);
            note(&mut trouble, "owner", result);
        }
        // Attributes without opening: the descriptor names the inode itself, be it a link.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(&at, as_name(name), flags, Mode::empty()) {
            Ok(fd) => {
                let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
                let (mode, listed) = (self.mode(inode), has_list(xattrs));
                if inode.kind != FileKind::Symlink {
                    note(&mut trouble, "mode", fs::chmod(path.as_str(), before_list(mode, listed)));
                }
                let troubles = trouble.len();
                let set = |name: &[u8], value: &[u8]| {
                    fs::setxattr(path.as_str(), as_name(name), value, XattrFlags::empty())
                };
                set_xattrs(xattrs.iter(), set, &mut trouble);
                if listed && inode.kind != FileKind::Symlink && trouble.len() == troubles {
                    note(&mut trouble, "mode", fs::chmod(path.as_str(), mode));
                }
            }
            Err(e) => note(&mut trouble, "attributes", Err(e)),
        }
        let result = fs::utimensat(&at, as_name(name), &times(inode), AtFlags::SYMLINK_NOFOLLOW);
        note(&mut trouble, "times", result);
        trouble
    }

    fn changes_owner(&mut self, inode: &Inode) -> bool {
        if self.uid == 0 {
            return true;
        }
        self.owner_skipped += u64::from((inode.uid, inode.gid) != (self.uid, self.gid));
        false
    }

    /// What to say at the end about owners; `None` when all are right.
    pub(super) fn owner_note(&self) -> Option<String> {
        let n = self.owner_skipped;
        (n > 0).then(|| format!("owners of {n} entries were not restored: only root can; they belong to you"))
    }

    /// The mode to set. Set-uid and set-gid are not passed on to a new owner.
    fn mode(&self, inode: &Inode) -> Mode {
        let mut bits = u32::from(inode.perm);
        if self.uid != 0 {
            if inode.uid != self.uid {
                bits &= !0o4000;
            }
            if inode.gid != self.gid && inode.kind != FileKind::Directory {
                bits &= !0o2000;
            }
        }
        Mode::from_raw_mode(bits)
    }

    /// Adds a dot and `word` (or, when that exists or is too long, something like it) to a name.
    pub(super) fn mark(&mut self, dir: usize, name: &[u8], word: &str) -> io::Result<()> {
        let fd = self.dir(dir)?;
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for n in 0..100 {
            let end = if n == 0 { format!(".{word}") } else { format!(".{word}-{n}") };
            let mut new = name[..name.len().min(255 - end.len())].to_vec();
            new.extend_from_slice(end.as_bytes());
            let flags = fs::RenameFlags::NOREPLACE;
            match fs::renameat_with(&fd, as_name(name), &fd, as_name(&new), flags) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::EXIST) => {}
                Err(e) => {
                    last = e.into();
                    break;
                }
            }
        }
        Err(last)
    }

    /// Brings all to stable storage.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(fs::syncfs(self.root.as_fd())?)
    }
}

/// Length of the leading run of whole pages that are (or are not) all zeros; the last page may be short.
fn run(content: &[u8], zeros: bool) -> usize {
    let mut len = 0;
    for page in content.chunks(PAGE) {
        if page.iter().all(|b| *b == 0) != zeros {
            break;
        }
        len += page.len();
    }
    len
}

/// Whether an access control list is among the attributes.
fn has_list(xattrs: &[(Bytes, Bytes)]) -> bool {
    xattrs.iter().any(|(name, _)| &name[..] == b"system.posix_acl_access")
}

/// The mode to set before the list. With a list, the group's bits are those of its mask, not what
/// the group may do: until the list is there, and when it cannot be set, the group may do nothing.
fn before_list(mode: Mode, listed: bool) -> Mode {
    if listed { mode.difference(Mode::RWXG) } else { mode }
}

fn note(trouble: &mut Vec<String>, what: &str, result: rustix::io::Result<()>) {
    if let Err(e) = result {
        trouble.push(format!("its {what}: {}", io::Error::from(e)));
    }
}

fn set_xattrs<'a>(
    xattrs: impl Iterator<Item = &'a (Bytes, Bytes)>,
    set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>,
    trouble: &mut Vec<String>,
) {
    for (name, value) in xattrs {
        if CString::new(&name[..]).is_err() {
            trouble.push("an extended attribute with an impossible name".into());
        } else if let Err(e) = set(name, value) {
            let name = super::text(name);
            trouble.push(format!("its extended attribute {name}: {}", io::Error::from(e)));
        }
    }
}

fn uid(inode: &Inode) -> Option<Uid> {
    (inode.uid != u32::MAX).then(|| Uid::from_raw(inode.uid))
}

fn gid(inode: &Inode) -> Option<Gid> {
    (inode.gid != u32::MAX).then(|| Gid::from_raw(inode.gid))
}

fn times(inode: &Inode) -> Timestamps {
    let spec = |t: Time| Timespec { tv_sec: t.secs, tv_nsec: t.nanos.into() };
    Timestamps { last_access: spec(inode.atime), last_modification: spec(inode.mtime) }
}
