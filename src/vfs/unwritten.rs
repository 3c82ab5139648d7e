//! Files of which the kernel handed over content that was refused: what `read`, `lseek`, `stat`,
//! `fsync` and `close` return for them, and their names.
//!
//! A read must show no byte that is stored nowhere, and zeros in place of refused bytes would be such
//! bytes. So a read fails. Only a descriptor that may write gets a page that is still held in memory:
//! the kernel reads a page before it changes a part of it, and then hands over all of it again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::refused::{self, PAGE, Refusals};
use super::types::{Seek, VfsError, Wait};
use super::{Result, Vfs, pathfinder};
use crate::ids::Ino;

/// Paths that are named at most.
const NAMED: usize = 8;
/// Files of which the refusal is logged by itself, since the last time that there was none.
const LOGGED: usize = 16;
/// How long the names of files are believed.
const FRESH: Duration = Duration::from_secs(5);

/// The files that lack content which the kernel handed over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedFiles {
    /// How many there are.
    pub count: usize,
    /// There are more that are not known.
    pub more: bool,
    /// Some of them: a path, or the inode and why there is no path to be had; then the error.
    pub names: Vec<String>,
}

/// What the filesystem knows of such files.
#[derive(Default)]
pub(super) struct Unwritten {
    pub(super) book: Refusals,
    /// Names that were found, when, and for which version of the book.
    named: Mutex<Option<(Instant, u64, RefusedFiles)>>,
}

/// A write of the kernel's that counts as refused unless it is answered otherwise: also when it panics.
struct WriteBack<'a> {
    vfs: &'a Vfs,
    ino: Ino,
    offset: u64,
    data: &'a [u8],
    answered: bool,
}

impl Drop for WriteBack<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.vfs.refused(self.ino, self.offset, self.data, VfsError::Io("the write broke off".into()));
        }
    }
}

/// The unit in which the kernel reads before it changes a part: 4 KiB, and more on some machines.
fn kernel_page() -> u64 {
    // SAFETY: sysconf has no preconditions.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_or(PAGE, |page| page.max(PAGE))
}

impl Vfs {
    /// Writes what the kernel hands over from its page cache; remembers it when that fails.
    pub(super) fn do_write_back(&self, ino: Ino, offset: u64, data: &[u8], wait: Wait) -> Result<u32> {
        let mut write = WriteBack { vfs: self, ino, offset, data, answered: false };
        let done = self.do_write(ino, offset, data, None, wait);
        write.answered = true;
        match &done {
            // A deleted file lacks nothing.
            Ok(_) | Err(VfsError::WouldBlock | VfsError::Stale) => {}
            Err(why) => self.refused(ino, offset, data, why.clone()),
        }
        done
    }

    fn refused(&self, ino: Ino, offset: u64, data: &[u8], why: VfsError) {
        let bounded = offset.checked_add(data.len() as u64).is_some();
        if data.is_empty() || !bounded || self.inode(ino) == Err(VfsError::Stale) {
            return;
        }
        let text = format!("bytes that a program wrote are lost, since they could not be stored: {why}");
        if self.unwritten.book.note(ino, offset, data, why) && self.unwritten.book.all().0.len() <= LOGGED {
            self.pathfinder.report(&self.journal, ino, "is not what was written to it", text);
        }
    }

    /// Notes that `[from, to)` of a file is stored now, or that its owner gave it up.
    pub(super) fn no_longer_refused(&self, ino: Ino, from: u64, to: u64) {
        if self.unwritten.book.written(ino, from, to) {
            log::info!("inode {ino}: all that could not be stored was written again, or cut off");
        }
    }

    /// Reads a file of which content may have been refused. `may_change`: for a descriptor that may write.
    pub(super) fn read_known(
        &self,
        ino: Ino,
        offset: u64,
        len: u32,
        wait: Wait,
        may_change: bool,
    ) -> Result<Bytes> {
        let book = &self.unwritten.book;
        let Some(end) = book.end(ino) else { return self.do_read(ino, offset, len, wait) };
        let to = offset.saturating_add(len.into()).min(end);
        let concerned = book.next(ino, offset).is_some_and(|(from, _)| from < to);
        let lost = || VfsError::Io(format!("inode {ino} lacks bytes that could not be stored"));
        let page = kernel_page();
        let one_page = offset.is_multiple_of(page) && u64::from(len) <= page;
        if concerned && !(may_change && one_page) {
            return Err(lost());
        }
        let stored = self.do_read(ino, offset, len, wait)?;
        let wanted = to.saturating_sub(offset) as usize;
        if stored.len() >= wanted && !concerned {
            return Ok(stored);
        }
        let mut page = BytesMut::from(&stored[..]);
        page.resize(wanted.max(stored.len()), 0);
        if book.overlay(ino, offset, &mut page) { Ok(page.freeze()) } else { Err(lost()) }
    }

    /// Finds data or a hole. What was refused is no hole: a copy that leaves it out would be taken for
    /// the whole.
    pub(super) fn seek_known(&self, ino: Ino, offset: u64, seek: Seek) -> Result<u64> {
        let book = &self.unwritten.book;
        let Some(end) = book.end(ino) else { return self.do_lseek(ino, offset, seek) };
        if seek == Seek::Data {
            let refused = book.next(ino, offset).map(|(from, _)| from);
            return match (self.do_lseek(ino, offset, seek), refused) {
                (Ok(stored), Some(refused)) => Ok(stored.min(refused)),
                (Err(VfsError::NoSuchOffset), Some(refused)) => Ok(refused),
                (stored, _) => stored,
            };
        }
        if offset >= end {
            return self.do_lseek(ino, offset, seek);
        }
        let mut at = offset;
        loop {
            let before = at;
            if let Some((_, to)) = book.next(ino, at).filter(|(from, _)| *from == at) {
                at = to;
            }
            match self.do_lseek(ino, at, seek) {
                Ok(hole) => at = hole,
                Err(VfsError::NoSuchOffset) => {}
                Err(e) => return Err(e),
            }
            if at == before {
                return Ok(at);
            }
        }
    }

    /// How much of `len` bytes from `from` on may be copied: up to what was refused. An error when that is
    /// nothing.
    pub(super) fn copyable(&self, ino: Ino, from: u64, len: u64) -> Result<u64> {
        match self.unwritten.book.next(ino, from) {
            Some((start, _)) if start < from.saturating_add(len) && start == from => {
                Err(VfsError::Io(format!("inode {ino} lacks bytes that could not be stored")))
            }
            Some((start, _)) => Ok(len.min(start - from)),
            None => Ok(len),
        }
    }

    /// Whether content was refused since the last call. An error that the kernel reports for the whole filesystem
    /// is then no news.
    pub fn take_refusals(&self) -> bool {
        self.unwritten.book.take_fresh()
    }

    /// The files that lack content; their names are looked for at most as long as `longest`. Files without
    /// a name do not count: nobody can miss anything in them after the next mount.
    pub fn refused_files(&self, longest: Duration) -> RefusedFiles {
        if self.unwritten.book.is_empty() {
            return RefusedFiles::default();
        }
        let (mut files, more, version) = self.unwritten.book.all();
        let known = self.unwritten.named.lock().clone().filter(|(_, of, _)| *of == version);
        if let Some((_, _, found)) = known.as_ref().filter(|(at, ..)| at.elapsed() < FRESH) {
            return found.clone();
        }
        {
            let orphans = self.orphans.lock();
            files.retain(|(ino, _)| !orphans.contains(ino));
        }
        files.sort_by_key(|(ino, _)| *ino);
        let count = files.len();
        files.truncate(NAMED);
        let wanted: HashSet<Ino> = files.iter().map(|(ino, _)| *ino).collect();
        let mut paths = pathfinder::paths_of(&self.journal, &wanted, longest);
        // The tables may be closed by now.
        if let Some((_, _, found)) = known.filter(|_| paths.len() < wanted.len()) {
            return found;
        }
        let names = files.into_iter().map(|(ino, why)| match paths.remove(&ino) {
            Some(path) => format!("{path} ({why})"),
            None => format!("inode {ino} ({why})"),
        });
        let mut names: Vec<String> = names.collect();
        if more {
            names.push(refused::full());
        }
        let found = RefusedFiles { count, more, names };
        *self.unwritten.named.lock() = Some((Instant::now(), version, found.clone()));
        found
    }
}
