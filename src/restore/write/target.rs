//! The folder that is restored into, by system calls that never follow a symbolic link below it.
//!
//! Owns names: every name is taken relative to its directory's descriptor, and nothing that this
//! restore made is replaced by it or taken for something else, be it under another name. Knows no
//! tables and no network.

use std::collections::HashSet;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};

use super::attributes::Owner;
use super::dirs::{Dirs, FileId, Met, as_name, look, replaced};
use super::drafts::{self, Draft, Drafts, open_file, rename};
use super::existing::same;
use crate::format::tables::{Body, FileKind, Inode};
use crate::ids::Ino;
use crate::private;

const PRIVATE_DIR: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);
const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A name in a directory of the target.
#[derive(Clone, Debug)]
pub(super) struct Name {
    /// The directory's number in [`Target`].
    pub dir: usize,
    pub name: Bytes,
}

/// Inode and extended attributes that an entry is to have.
pub(super) struct Wished<'a> {
    pub inode: &'a Inode,
    pub xattrs: &'a [(Bytes, Bytes)],
}

/// An inode of the volume that has its first name in the target.
#[derive(Clone, Debug)]
pub(super) struct First {
    pub at: Name,
    pub id: FileId,
    /// How many names it has there.
    pub names: u64,
}

/// Size and time of last change of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(i64, i64, u64);

impl Stamp {
    #[allow(clippy::unnecessary_cast)] // the types differ between processors
    fn of(stat: &Stat) -> Self {
        Self(stat.st_size, stat.st_mtime, stat.st_mtime_nsec as u64)
    }
}

/// How a second name was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linked {
    Link,
    /// The target has no links, so that the file is there twice.
    Copy,
}

/// The folder and what was made or met in it.
pub(super) struct Target {
    /// The root as it was found.
    root_stat: Stat,
    created_root: bool,
    dirs: Dirs,
    drafts_name: String,
    drafts: Option<Drafts>,
    /// Directories whose attributes are to be set at the end.
    kept: Vec<usize>,
    /// All that this restore made, or found to be what it would make.
    known: HashSet<FileId>,
    pub owner: Owner,
}

fn merged() -> io::Error {
    io::Error::other(
        "another entry of the volume has this name there: the folder's filesystem does not tell their names apart \
         (upper and lower case?). Restore this one into another folder, or all onto a filesystem that does",
    )
}

impl Target {
    /// Opens the folder; makes it, with its parents, when it is missing. `drafts` is a name that
    /// the volume's root does not hold.
    pub(super) fn open(path: &Path, drafts: String) -> io::Result<Self> {
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
        // Before anything is made in it.
        let root_stat = fs::fstat(&root)?;
        let dirs = Dirs::new(root)?;
        let mut target = Self {
            root_stat,
            created_root,
            known: HashSet::from([dirs.id(0)]),
            dirs,
            drafts_name: drafts,
            drafts: None,
            kept: Vec::new(),
            owner: Owner::current(),
        };
        match target.drafts(0) {
            // Perhaps all that is wanted lies in a directory below, which may be written to.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {}
            other => _ = other?,
        }
        Ok(target)
    }

    pub(super) fn created_root(&self) -> bool {
        self.created_root
    }

    /// Path of a directory below the folder, with a slash after every name.
    pub(super) fn path_of(&self, dir: usize) -> Vec<u8> {
        self.dirs.path_of(dir)
    }

    /// The volume's number of a directory.
    pub(super) fn ino_of(&self, dir: usize) -> Ino {
        self.dirs.ino(dir)
    }

    /// The folder of drafts, made in the root or, where that is refused, in `dir`.
    fn drafts(&mut self, dir: usize) -> io::Result<&mut Drafts> {
        if self.drafts.is_none() {
            let mut opened = Drafts::open(self.dirs.open(0)?, &self.drafts_name, self.owner.uid);
            if opened.is_err() && dir != 0 {
                opened = Drafts::open(self.dirs.open(dir)?, &self.drafts_name, self.owner.uid);
            }
            let opened = opened?;
            self.known.insert(opened.id);
            self.drafts = Some(opened);
        }
        self.drafts.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes a directory, or takes the one that is there. Says whether it is to get the attributes
    /// of `inode` at the end: it was made, now or by an earlier restore into this folder.
    pub(super) fn make_dir(&mut self, at: &Name, ino: Ino, inode: &Inode) -> io::Result<(usize, bool)> {
        let Met { number, created, fd, stat } = self.dirs.make(at.dir, &at.name, ino)?;
        if !self.known.insert(FileId::of(&stat)) {
            self.dirs.forget_last();
            return Err(merged());
        }
        let ours = created || self.is_ours(&stat, inode);
        if ours && !created && !self.owner.is_root() {
            // It gets its own mode back at the end.
            let _ = fs::fchmod(&fd, Mode::from_raw_mode(stat.st_mode) | PRIVATE_DIR);
        }
        Ok((number, ours))
    }

    /// Whether the root was made by an earlier restore of `inode` into it.
    pub(super) fn root_is_ours(&self, inode: &Inode) -> bool {
        self.created_root || self.is_ours(&self.root_stat, inode)
    }

    fn is_ours(&self, stat: &Stat, inode: &Inode) -> bool {
        let left_over = self.drafts.as_ref().is_some_and(|d| d.resumed)
            && stat.st_uid == self.owner.uid
            && Mode::from_raw_mode(stat.st_mode) == PRIVATE_DIR;
        left_over || self.owner.has_set(stat, inode)
    }

    /// Says that a directory gets its attributes at the end.
    pub(super) fn keep_attributes(&mut self, dir: usize) {
        self.kept.push(dir);
    }

    /// Those directories, everyone after all that are in it.
    pub(super) fn kept_attributes(&mut self) -> Vec<usize> {
        let mut kept = std::mem::take(&mut self.kept);
        // A directory's number is above its parent's.
        kept.sort_unstable_by_key(|dir| std::cmp::Reverse(*dir));
        kept
    }

    /// Gives a directory its attributes. After the root's nothing can be made any more.
    pub(super) fn finish_dir(&mut self, dir: usize, wished: &Wished<'_>) -> Vec<String> {
        if dir == 0 {
            self.remove_drafts();
        }
        match self.dirs.open_with_parent(dir) {
            Ok(fd) => self.owner.set(&fd, wished.inode, wished.xattrs),
            Err(e) => vec![format!("its attributes: {e}")],
        }
    }

    /// Removes the folder of drafts. What is left in it was not finished.
    pub(super) fn remove_drafts(&mut self) {
        if let Some(drafts) = self.drafts.take() {
            drafts.remove();
        }
    }

    /// What has the name now. An error when this restore made it under another name.
    pub(super) fn existing(&mut self, at: &Name) -> io::Result<Option<Stat>> {
        let dir = self.dirs.open(at.dir)?;
        let found = look(&dir, &at.name)?;
        match found {
            Some(stat) if self.known.contains(&FileId::of(&stat)) => Err(merged()),
            found => Ok(found),
        }
    }

    /// Says that what has this identity is an entry of the volume.
    pub(super) fn recognise(&mut self, id: FileId) {
        self.known.insert(id);
    }

    /// Begins a file of the given size, all hole, which is to get a name in `dir`.
    pub(super) fn begin(&mut self, dir: usize, size: u64) -> io::Result<Draft> {
        self.drafts(dir)?.begin(size)
    }

    /// Writes content into a draft.
    pub(super) fn write(&mut self, draft: Draft, offset: u64, content: &[u8]) -> io::Result<()> {
        let fd = self.drafts(0)?.file(draft)?;
        drafts::write(&fd, offset, content)
    }

    pub(super) fn discard(&mut self, draft: Draft) {
        if let Some(drafts) = &mut self.drafts {
            drafts.discard(draft);
        }
    }

    /// Gives a draft its attributes and then its name; tells what of the attributes was not
    /// restored. When that fails the draft is still there.
    pub(super) fn place(
        &mut self,
        draft: Draft,
        at: &Name,
        replace: bool,
        wished: &Wished<'_>,
    ) -> io::Result<(First, Vec<String>)> {
        let fd = self.drafts(0)?.file(draft)?;
        let trouble = self.owner.set(&fd, wished.inode, wished.xattrs);
        self.may_have(at, replace)?;
        let dir = self.dirs.open(at.dir)?;
        let id = match self.drafts(0)?.place(draft, &dir, &at.name, replace) {
            // A directory of the target lies on another filesystem.
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                let id = self.copy(&fd, at, replace, wished)?;
                self.discard(draft);
                id
            }
            other => other.map(|()| draft.id)?,
        };
        self.known.insert(id);
        Ok((First { at: at.clone(), id, names: 1 }, trouble))
    }

    /// An error when the name may not be taken.
    fn may_have(&mut self, at: &Name, replace: bool) -> io::Result<()> {
        match self.existing(at)? {
            Some(_) if !replace => Err(io::ErrorKind::AlreadyExists.into()),
            _ => Ok(()),
        }
    }

    /// Copies a file under another name, on any filesystem.
    fn copy(&mut self, from: &OwnedFd, at: &Name, replace: bool, wished: &Wished<'_>) -> io::Result<FileId> {
        let dir = self.dirs.open(at.dir)?;
        let draft = format!("{}-copy", self.drafts_name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match fs::openat(&dir, draft.as_str(), flags, PRIVATE_FILE) {
            // A killed restore left it.
            Err(rustix::io::Errno::EXIST) => {
                fs::unlinkat(&dir, draft.as_str(), AtFlags::empty())?;
                fs::openat(&dir, draft.as_str(), flags, PRIVATE_FILE)?
            }
            other => other?,
        };
        let copied = drafts::copy(from, &fd).and_then(|()| {
            // What does not work was told of the first one.
            let _ = self.owner.set(&fd, wished.inode, wished.xattrs);
            rename(&dir, draft.as_bytes(), &dir, &at.name, replace)?;
            FileId::of_open(&fd)
        });
        match &copied {
            Ok(id) => _ = self.known.insert(*id),
            Err(_) => _ = fs::unlinkat(&dir, draft.as_str(), AtFlags::empty()),
        }
        copied
    }

    /// Gives a file another name: by a link or, where there are none, by a copy. A name that leads
    /// to it, or to the same content, already is left alone.
    pub(super) fn link_file(
        &mut self,
        first: &mut First,
        new: &Name,
        replace: bool,
        wished: &Wished<'_>,
    ) -> io::Result<Linked> {
        match self.link(first, new, replace) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let size = wished.inode.size;
                let Some(stat) = self.existing(new)?.filter(|stat| stat.st_size as u64 == size) else {
                    return Err(e);
                };
                if !same(&self.reopen(&first.at, first.id)?, &self.reopen(new, FileId::of(&stat))?, size)? {
                    return Err(e);
                }
                self.known.insert(FileId::of(&stat));
                Ok(Linked::Copy)
            }
            Err(e) if has_no_links(&e) => {
                self.may_have(new, replace)?;
                let fd = self.reopen(&first.at, first.id)?;
                self.copy(&fd, new, replace, wished)?;
                Ok(Linked::Copy)
            }
            other => other.map(|()| Linked::Link),
        }
    }

    /// Opens a file again to be read: the one that is meant, and no other.
    pub(super) fn reopen(&mut self, at: &Name, id: FileId) -> io::Result<OwnedFd> {
        let dir = self.dirs.open(at.dir)?;
        open_file(&dir, &at.name, OFlags::RDONLY, id)
    }

    /// Links `new` to the inode that has its first name.
    #[allow(clippy::unnecessary_cast)] // the types differ between processors
    fn link(&mut self, first: &mut First, new: &Name, replace: bool) -> io::Result<()> {
        let (id, from) = (first.id, self.dirs.open(first.at.dir)?);
        if look(&from, &first.at.name)?.map(|stat| FileId::of(&stat)) != Some(id) {
            return Err(replaced());
        }
        let dir = self.dirs.open(new.dir)?;
        if let Some(stat) = look(&dir, &new.name)?.filter(|stat| FileId::of(stat) == id) {
            // Two names that the filesystem takes for one are no two links.
            if (stat.st_nlink as u64) <= first.names {
                return Err(merged());
            }
            first.names += 1;
            return Ok(());
        }
        self.making(new, replace, |at| {
            fs::linkat(&from, as_name(&first.at.name), at, as_name(&new.name), AtFlags::empty())
        })?;
        match look(&dir, &new.name)? {
            Some(stat) if FileId::of(&stat) == id => {
                first.names += 1;
                Ok(())
            }
            _ => {
                let _ = fs::unlinkat(&dir, as_name(&new.name), AtFlags::empty());
                Err(replaced())
            }
        }
    }

    /// Runs `make`; when the name exists and may be replaced, removes it and runs `make` again.
    fn making<T>(
        &mut self,
        name: &Name,
        replace: bool,
        make: impl Fn(&OwnedFd) -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        let fd = self.dirs.open(name.dir)?;
        match make(&fd) {
            Err(rustix::io::Errno::EXIST) => {
                self.may_have(name, replace)?;
                fs::unlinkat(&fd, as_name(&name.name), AtFlags::empty())?;
                Ok(make(&fd)?)
            }
            other => Ok(other?),
        }
    }

    /// Makes a symbolic link, a fifo, a socket's name or a device node with its attributes. `first`
    /// is a name of the same inode that was made before. What is there already is left alone when
    /// it is the same.
    pub(super) fn special(
        &mut self,
        at: &Name,
        first: Option<&mut First>,
        replace: bool,
        wished: &Wished<'_>,
    ) -> io::Result<(FileId, Vec<String>)> {
        if let Some(first) = first {
            match self.link(first, at, replace) {
                Err(e) if has_no_links(&e) || e.kind() == io::ErrorKind::AlreadyExists => {}
                other => return other.map(|()| (first.id, Vec::new())),
            }
        }
        if !replace
            && let Some(stat) = self.existing(at)?
            && self.is_same_special(at, &stat, wished.inode)?
        {
            let id = FileId::of(&stat);
            self.known.insert(id);
            return Ok((id, Vec::new()));
        }
        self.make_special(at, replace, wished.inode)?;
        let dir = self.dirs.open(at.dir)?;
        let fd = fs::openat(&dir, as_name(&at.name), PATH_ONLY, Mode::empty())?;
        let stat = fs::fstat(&fd)?;
        // Nothing of anybody else's gets these attributes.
        let is_made = file_type(wished.inode.kind) == FileType::from_raw_mode(stat.st_mode)
            && stat.st_uid == self.owner.uid
            && stat.st_nlink == 1
            && self.known.insert(FileId::of(&stat));
        if !is_made {
            return Err(replaced());
        }
        Ok((FileId::of(&stat), self.owner.set_special(&fd, wished.inode, wished.xattrs)))
    }

    fn make_special(&mut self, at: &Name, replace: bool, inode: &Inode) -> io::Result<()> {
        if let (FileKind::Symlink, Body::Target(to)) = (inode.kind, &inode.body) {
            return self.making(at, replace, |dir| fs::symlinkat(as_name(to), dir, as_name(&at.name)));
        }
        let kind = file_type(inode.kind);
        if matches!(kind, FileType::RegularFile | FileType::Directory | FileType::Symlink) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let device = device(inode);
        self.making(at, replace, |dir| fs::mknodat(dir, as_name(&at.name), kind, PRIVATE_FILE, device))
    }

    fn is_same_special(&mut self, at: &Name, stat: &Stat, inode: &Inode) -> io::Result<bool> {
        if FileType::from_raw_mode(stat.st_mode) != file_type(inode.kind) {
            return Ok(false);
        }
        match (inode.kind, &inode.body) {
            (FileKind::Symlink, Body::Target(to)) => {
                let dir = self.dirs.open(at.dir)?;
                Ok(fs::readlinkat(&dir, as_name(&at.name), Vec::new())?.as_bytes() == &to[..])
            }
            (FileKind::CharDevice | FileKind::BlockDevice, _) => Ok(stat.st_rdev == device(inode)),
            (FileKind::Fifo | FileKind::Socket, _) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Size and time of a file, as the target keeps them.
    pub(super) fn stamp(&mut self, at: &Name) -> io::Result<Option<Stamp>> {
        let dir = self.dirs.open(at.dir)?;
        Ok(look(&dir, &at.name)?.as_ref().map(Stamp::of))
    }

    /// The same of a draft.
    pub(super) fn stamp_of_draft(&mut self, draft: Draft) -> io::Result<Stamp> {
        Ok(Stamp::of(&fs::fstat(self.drafts(0)?.file(draft)?)?))
    }

    /// Removes a file that an earlier restore left under `at`: no other program gives a file just
    /// this size and time. Says whether the name is free now.
    pub(super) fn remove_left_over(&mut self, at: &Name, like: Stamp) -> io::Result<bool> {
        let dir = self.dirs.open(at.dir)?;
        let Some(stat) = look(&dir, &at.name)? else { return Ok(true) };
        let is_left = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && Stamp::of(&stat) == like
            && !self.known.contains(&FileId::of(&stat));
        if is_left {
            fs::unlinkat(&dir, as_name(&at.name), AtFlags::empty())?;
        }
        Ok(is_left)
    }

    /// Brings all to stable storage.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        Ok(fs::syncfs(self.dirs.open(0)?.as_fd())?)
    }
}

/// The `n`th name, from 0 on, that a file gets of which something is amiss.
pub(super) fn marked(at: &Name, word: &str, n: u32) -> Name {
    let end = if n == 0 { format!(".{word}") } else { format!(".{word}-{n}") };
    let mut name = at.name[..at.name.len().min(255 - end.len())].to_vec();
    name.extend_from_slice(end.as_bytes());
    Name { dir: at.dir, name: name.into() }
}

/// Whether a failed link says that the filesystem has none, or no more of this file.
fn has_no_links(e: &io::Error) -> bool {
    let none = [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS, libc::EMLINK, libc::EXDEV, libc::EINVAL];
    e.raw_os_error().is_some_and(|code| none.contains(&code))
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::Fifo,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharacterDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kernel's encoding of 32 bits, as FUSE gives it, in that of the system calls.
fn device(inode: &Inode) -> u64 {
    match inode.kind {
        FileKind::CharDevice | FileKind::BlockDevice => {
            let (major, minor) =
                ((inode.rdev >> 8) & 0xfff, (inode.rdev & 0xff) | ((inode.rdev >> 12) & 0xfff00));
            fs::makedev(major, minor)
        }
        _ => 0,
    }
}
