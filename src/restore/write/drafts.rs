//! Files while their content is written: without a name of the volume, in a folder of their own.
//!
//! Owns that folder, `.mirrorfs-restore` in the target, so that a file that has its name is whole,
//! and what a killed restore leaves is known. Content goes only to the regular file that was made
//! here, known by its device and inode.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use lru::LruCache;
use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags};

use super::dirs::{FileId, as_name, cache, look, replaced};

/// Unit in which zeros inside a block are left out of the file.
const PAGE: usize = 4096;
/// Bytes copied at a time.
const COPY: usize = 1 << 20;

const PRIVATE_DIR: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A file that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Draft {
    number: u64,
    pub id: FileId,
}

impl Draft {
    fn name(self) -> String {
        self.number.to_string()
    }
}

/// The folder of drafts.
pub(super) struct Drafts {
    parent: Rc<OwnedFd>,
    name: String,
    fd: OwnedFd,
    pub id: FileId,
    /// Whether an earlier restore left it, which then did not come to its end.
    pub resumed: bool,
    next: u64,
    open: LruCache<u64, Rc<OwnedFd>>,
}

impl Drafts {
    /// Makes the folder, or takes over and empties the one that an earlier restore left.
    pub(super) fn open(parent: Rc<OwnedFd>, name: &str, uid: u32) -> io::Result<Self> {
        let resumed = match fs::mkdirat(&parent, name, PRIVATE_DIR) {
            Ok(()) => false,
            Err(rustix::io::Errno::EXIST) => true,
            Err(e) => return Err(e.into()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let wrong = |why: &str| io::Error::other(format!("{name} in it {why}: remove it"));
        let fd = fs::openat(&parent, name, flags, Mode::empty()).map_err(|e| match e {
            rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP => wrong("is no folder of a restore"),
            e => e.into(),
        })?;
        let stat = fs::fstat(&fd)?;
        if stat.st_uid != uid {
            return Err(wrong("belongs to another user"));
        }
        match fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::other("another restore writes there at this moment"));
            }
            // Where there are no locks, only the order of commands protects.
            _ => fs::fchmod(&fd, PRIVATE_DIR)?,
        }
        let drafts = Self {
            parent,
            name: name.to_owned(),
            id: FileId::of(&stat),
            fd,
            resumed,
            next: 0,
            open: cache(),
        };
        drafts.empty()?;
        Ok(drafts)
    }

    fn empty(&self) -> io::Result<()> {
        let mut left = Vec::new();
        for entry in fs::Dir::read_from(&self.fd)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if !name.is_empty() && name.iter().all(u8::is_ascii_digit) {
                left.push(name);
            }
        }
        for name in left {
            fs::unlinkat(&self.fd, as_name(&name), AtFlags::empty())?;
        }
        Ok(())
    }

    /// Begins a file of the given size, all hole.
    pub(super) fn begin(&mut self, size: u64) -> io::Result<Draft> {
        let number = self.next;
        self.next += 1;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.fd, number.to_string(), flags, PRIVATE_FILE)?;
        let draft = Draft { number, id: FileId::of_open(&fd)? };
        self.open.put(number, Rc::new(fd));
        let sized = self.file(draft).and_then(|fd| Ok(fs::ftruncate(&fd, size)?));
        if let Err(e) = sized {
            self.discard(draft);
            return Err(e);
        }
        Ok(draft)
    }

    /// The open file of a draft.
    pub(super) fn file(&mut self, draft: Draft) -> io::Result<Rc<OwnedFd>> {
        if let Some(fd) = self.open.get(&draft.number) {
            return Ok(Rc::clone(fd));
        }
        let fd = Rc::new(open_file(&self.fd, draft.name().as_bytes(), OFlags::RDWR, draft.id)?);
        self.open.put(draft.number, Rc::clone(&fd));
        Ok(fd)
    }

    /// Gives a draft its name in the folder `at`.
    pub(super) fn place(&mut self, draft: Draft, at: &OwnedFd, name: &[u8], replace: bool) -> io::Result<()> {
        rename(&self.fd, draft.name().as_bytes(), at, name, replace)?;
        self.open.pop(&draft.number);
        Ok(())
    }

    /// Removes a draft. That it is not there any more is none of anybody's business.
    pub(super) fn discard(&mut self, draft: Draft) {
        self.open.pop(&draft.number);
        let _ = fs::unlinkat(&self.fd, draft.name(), AtFlags::empty());
    }

    /// Removes the folder with what is left in it.
    pub(super) fn remove(self) {
        let Self { parent, name, .. } = &self;
        if self.empty().is_ok() {
            let _ = fs::unlinkat(parent, name.as_str(), AtFlags::REMOVEDIR);
        }
    }
}

/// Opens the regular file `id`, and no other, under a name that something else may have taken
/// meanwhile. Nothing but a regular file is opened: opening a device alone can do something.
pub(super) fn open_file(at: &OwnedFd, name: &[u8], access: OFlags, id: FileId) -> io::Result<OwnedFd> {
    let is_it = |stat: &fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && FileId::of(stat) == id
    };
    if !look(at, name)?.as_ref().is_some_and(is_it) {
        return Err(replaced());
    }
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = fs::openat(at, as_name(name), flags, Mode::empty())?;
    if is_it(&fs::fstat(&fd)?) { Ok(fd) } else { Err(replaced()) }
}

/// Renames; without `replace` nothing that has the new name is replaced.
pub(super) fn rename(from: &OwnedFd, old: &[u8], to: &OwnedFd, new: &[u8], replace: bool) -> io::Result<()> {
    use rustix::io::Errno;
    let (old, new) = (as_name(old), as_name(new));
    if replace {
        return Ok(fs::renameat(from, old, to, new)?);
    }
    match fs::renameat_with(from, old, to, new, fs::RenameFlags::NOREPLACE) {
        // Some network filesystems cannot do that: the name is looked at first.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            match look(to, std::os::unix::ffi::OsStrExt::as_bytes(new))? {
                Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
                None => Ok(fs::renameat(from, old, to, new)?),
            }
        }
        other => Ok(other?),
    }
}

/// Writes content; pages of zeros are left as holes.
pub(super) fn write(fd: &OwnedFd, offset: u64, content: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while at < content.len() {
        let zeros = run(&content[at..], true);
        let data = run(&content[at + zeros..], false);
        let mut start = at + zeros;
        at = start + data;
        while start < at {
            match rustix::io::pwrite(fd, &content[start..at], offset + start as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => start += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Fills `buffer` from `offset` on; gives how much there was.
pub(super) fn read_at(fd: &OwnedFd, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut at = 0;
    while at < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[at..], offset + at as u64) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(at)
}

/// Where data begins at or after `offset`; `None` when only a hole follows.
pub(super) fn next_data(fd: &OwnedFd, offset: u64) -> io::Result<Option<u64>> {
    match fs::seek(fd, fs::SeekFrom::Data(offset)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
        Err(e) => Err(e.into()),
    }
}

/// Copies the content of a file into an empty one of the same size.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let size = fs::fstat(from)?.st_size as u64;
    fs::ftruncate(to, size)?;
    let mut buffer = vec![0; COPY];
    let mut at = 0;
    while let Some(data) = next_data(from, at)?.filter(|data| *data < size) {
        let n = read_at(from, data, &mut buffer)?;
        if n == 0 {
            break;
        }
        write(to, data, &buffer[..n])?;
        at = data + n as u64;
    }
    Ok(())
}

/// Length of the leading run of whole pages that are (or are not) all zeros; the last page may be
/// short.
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
