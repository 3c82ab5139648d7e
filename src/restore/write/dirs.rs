//! The directories of a restore: each is made or met once, and found again however deep it lies.
//!
//! Owns descriptors of directories, a bounded number at a time. Every directory is known by its
//! device and inode, so that none that was put in its place is taken for it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use bytes::Bytes;
use lru::LruCache;
use rustix::fs::{self, AtFlags, Mode, OFlags, Stat};

use crate::ids::Ino;

/// Descriptors kept open, of directories and of files.
pub(super) const OPEN: usize = 64;
/// Bytes of the longest path that is opened at once, below `PATH_MAX`.
const PATH: usize = 3_500;

const PRIVATE_DIR: Mode = Mode::RWXU;
const OPEN_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Which inode something is, on which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    dev: u64,
    ino: u64,
}

impl FileId {
    pub(super) fn of(stat: &Stat) -> Self {
        Self { dev: stat.st_dev, ino: stat.st_ino }
    }

    pub(super) fn of_open(fd: &OwnedFd) -> io::Result<Self> {
        Ok(Self::of(&fs::fstat(fd)?))
    }
}

pub(super) fn as_name(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

/// What has a name, without following it; `None` when nothing has.
pub(super) fn look(dir: &OwnedFd, name: &[u8]) -> io::Result<Option<Stat>> {
    match fs::statat(dir, as_name(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn replaced() -> io::Error {
    io::Error::other("something else was put in its place while it was being restored")
}

pub(super) fn cache<K: std::hash::Hash + Eq, V>() -> LruCache<K, V> {
    LruCache::new(std::num::NonZeroUsize::new(OPEN).unwrap_or(std::num::NonZeroUsize::MIN))
}

struct Dir {
    /// Its parent; the root is its own.
    parent: usize,
    /// Levels below the root.
    depth: usize,
    name: Bytes,
    id: FileId,
    /// Which directory of the volume it is.
    ino: Ino,
}

/// All directories of a restore, by number; a parent's is below its children's. The root's is 0.
pub(super) struct Dirs {
    root: Rc<OwnedFd>,
    dirs: Vec<Dir>,
    open: LruCache<usize, Rc<OwnedFd>>,
    /// The one that was opened last: its parent is one step away.
    last: Option<(usize, Rc<OwnedFd>)>,
    /// Levels that were gone up or down to open directories.
    steps: u64,
}

/// A directory that was made or met.
pub(super) struct Met {
    pub number: usize,
    pub created: bool,
    pub fd: Rc<OwnedFd>,
    pub stat: Stat,
}

impl Dirs {
    pub(super) fn new(root: OwnedFd) -> io::Result<Self> {
        let id = FileId::of_open(&root)?;
        let dirs = vec![Dir { parent: 0, depth: 0, name: Bytes::new(), id, ino: Ino::ROOT }];
        Ok(Self { root: Rc::new(root), dirs, open: cache(), last: None, steps: 0 })
    }

    pub(super) fn id(&self, number: usize) -> FileId {
        self.dirs[number].id
    }

    pub(super) fn ino(&self, number: usize) -> Ino {
        self.dirs[number].ino
    }

    /// How many levels were gone up or down so far.
    #[cfg(test)]
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Path of a directory below the root, with a slash after every name.
    pub(super) fn path_of(&self, number: usize) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = number;
        while at != 0 {
            names.push(&self.dirs[at].name);
            at = self.dirs[at].parent;
        }
        names.into_iter().rev().flat_map(|n| n.iter().copied().chain([b'/'])).collect()
    }

    /// Opens a directory: down from the nearest open one above it, or up from the last one and down
    /// again, whatever is shorter.
    pub(super) fn open(&mut self, number: usize) -> io::Result<Rc<OwnedFd>> {
        if number == 0 {
            return Ok(Rc::clone(&self.root));
        }
        let fd = match self.open.get(&number) {
            Some(fd) => Rc::clone(fd),
            None => {
                if let Some(above) = self.shorter_way(number) {
                    self.climb(above);
                }
                match self.open.get(&number) {
                    Some(fd) => Rc::clone(fd),
                    None => self.down(number)?,
                }
            }
        };
        self.last = Some((number, Rc::clone(&fd)));
        Ok(fd)
    }

    /// The directory above both the last one and this one, when the way over it is the shorter one.
    /// Both ways are looked for step by step, so that the search is no longer than the way.
    fn shorter_way(&self, number: usize) -> Option<usize> {
        let (mut from, mut to) = (self.last.as_ref()?.0, number);
        let mut above = number;
        while above != 0 && !self.open.contains(&above) {
            above = self.dirs[above].parent;
            if self.dirs[from].depth >= self.dirs[to].depth {
                from = self.dirs[from].parent;
            } else {
                to = self.dirs[to].parent;
            }
            if from == to {
                return Some(from);
            }
        }
        None
    }

    /// Opens the directories from the last one up to `above`, as far as that works.
    fn climb(&mut self, above: usize) {
        let Some((mut at, mut fd)) = self.last.clone() else { return };
        while at != above && at != 0 {
            at = self.dirs[at].parent;
            self.steps += 1;
            let up = fs::openat(&fd, "..", OPEN_DIR, Mode::empty()).map_err(io::Error::from);
            match up.and_then(|up| self.keep(at, up)) {
                Ok(up) => fd = up,
                Err(_) => return,
            }
        }
    }

    /// Opens the parent of a directory too, which cannot be reached through it once it has its
    /// final mode.
    pub(super) fn open_with_parent(&mut self, number: usize) -> io::Result<Rc<OwnedFd>> {
        let fd = self.open(number)?;
        // Where that fails, the parent is opened by its path later.
        let _ = self.open(self.dirs[number].parent);
        Ok(fd)
    }

    fn keep(&mut self, number: usize, fd: OwnedFd) -> io::Result<Rc<OwnedFd>> {
        if FileId::of_open(&fd)? != self.dirs[number].id {
            return Err(replaced());
        }
        let fd = Rc::new(fd);
        self.open.put(number, Rc::clone(&fd));
        Ok(fd)
    }

    fn down(&mut self, number: usize) -> io::Result<Rc<OwnedFd>> {
        let mut way = Vec::new();
        let mut at = number;
        let mut fd = loop {
            if at == 0 {
                break Rc::clone(&self.root);
            }
            if let Some(fd) = self.open.get(&at) {
                break Rc::clone(fd);
            }
            way.push(at);
            at = self.dirs[at].parent;
        };
        // Many levels at a time. A link between them leads to another inode in the end, which is
        // not taken. The parent is kept open, as its other children are likely to be next.
        let mut path: Vec<u8> = Vec::new();
        self.steps += way.len() as u64;
        while let Some(next) = way.pop() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&self.dirs[next].name);
            let longer = way.last().map_or(0, |n| self.dirs[*n].name.len() + 1);
            if way.len() <= 1 || path.len() + longer > PATH {
                let opened = fs::openat(&fd, as_name(&path), OPEN_DIR, Mode::empty())?;
                fd = self.keep(next, opened)?;
                path.clear();
            }
        }
        Ok(fd)
    }

    /// Makes a directory, or takes the one that is there.
    pub(super) fn make(&mut self, parent: usize, name: &Bytes, ino: Ino) -> io::Result<Met> {
        let at = self.open(parent)?;
        let created = match fs::mkdirat(&at, as_name(name), PRIVATE_DIR) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let fd = fs::openat(&at, as_name(name), OPEN_DIR, Mode::empty()).map_err(|e| match e {
            rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP => {
                io::Error::other("something else has its name")
            }
            e => e.into(),
        })?;
        let stat = fs::fstat(&fd)?;
        let number = self.dirs.len();
        let depth = self.dirs[parent].depth + 1;
        self.dirs.push(Dir { parent, depth, name: name.clone(), id: FileId::of(&stat), ino });
        let fd = Rc::new(fd);
        self.open.put(number, Rc::clone(&fd));
        self.last = Some((number, Rc::clone(&fd)));
        Ok(Met { number, created, fd, stat })
    }

    /// Takes back what [`Dirs::make`] met last.
    pub(super) fn forget_last(&mut self) {
        self.dirs.pop();
        self.open.pop(&self.dirs.len());
        self.last = None;
    }
}
