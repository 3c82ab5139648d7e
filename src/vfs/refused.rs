//! The book of refused content: bytes that the kernel handed over from its page cache and that were
//! not taken.
//!
//! The kernel reports such an error to one `fsync` or `close` and then calls the pages clean. So the
//! file's loss is remembered here, until the bytes are written again, cut off, or deleted with the
//! file. Owns the ranges and, up to a bound, the bytes; knows no journal and no inode's attributes.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::types::VfsError;
use crate::ids::Ino;

/// Bytes are held in pieces of at most this size, each within one page of the kernel's cache.
pub(super) const PAGE: u64 = 4096;
/// Bytes held in memory at most, in all files together.
const MOST_HELD: usize = 16 << 20;
/// Ranges of one file at most. With more, all between the first and the last counts as refused.
const MOST_PIECES: usize = 16 << 10;
/// Files at most. With more, no `fsync` succeeds until the next mount.
const MOST_FILES: usize = 1 << 17;

/// A range that was refused; its start is the key under which it is filed.
struct Piece {
    end: u64,
    /// The bytes, while they are held. Such a piece lies within one page.
    bytes: Option<Box<[u8]>>,
}

impl Piece {
    /// `[from, to)` of this piece, which begins at `start`.
    fn part(&self, start: u64, from: u64, to: u64) -> Self {
        let within = |at: u64| (at - start) as usize;
        let bytes = self.bytes.as_ref().and_then(|b| b.get(within(from)..within(to)).map(Into::into));
        Self { end: to, bytes }
    }

    fn held(&self) -> usize {
        self.bytes.as_ref().map_or(0, |b| b.len())
    }
}

/// What was refused of one file.
pub(super) struct RefusedFile {
    /// Disjoint, by their start.
    pieces: BTreeMap<u64, Piece>,
    /// Bytes held.
    held: usize,
    /// The error of the last refusal.
    why: VfsError,
}

impl RefusedFile {
    fn new(why: VfsError) -> Self {
        Self { pieces: BTreeMap::new(), held: 0, why }
    }

    fn put(&mut self, start: u64, piece: Piece) {
        self.held += piece.held();
        self.pieces.insert(start, piece);
    }

    fn take(&mut self, start: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&start)?;
        self.held -= piece.held();
        Some(piece)
    }

    /// Notes that `data` at `offset` was refused. `hold`: keeps the bytes.
    fn insert(&mut self, offset: u64, data: &[u8], hold: bool) {
        let end = offset + data.len() as u64;
        self.remove(offset, end);
        if hold {
            let mut at = offset;
            while at < end {
                let upto = (at / PAGE * PAGE + PAGE).min(end);
                let bytes = &data[(at - offset) as usize..(upto - offset) as usize];
                self.put(at, Piece { end: upto, bytes: Some(bytes.into()) });
                at = upto;
            }
        } else {
            self.insert_unheld(offset, end);
        }
        if self.pieces.len() > MOST_PIECES
            && let (Some(from), Some(to)) = (self.pieces.keys().next().copied(), self.end())
        {
            self.pieces.clear();
            self.held = 0;
            self.put(from, Piece { end: to, bytes: None });
        }
    }

    /// Adds `[from, to)`, which nothing overlaps, and joins it with its neighbours.
    fn insert_unheld(&mut self, mut from: u64, mut to: u64) {
        let before = self.pieces.range(..from).next_back();
        if let Some((&start, piece)) = before
            && piece.end == from
            && piece.bytes.is_none()
        {
            self.take(start);
            from = start;
        }
        if let Some(after) = self.pieces.get(&to).filter(|p| p.bytes.is_none()).map(|p| p.end) {
            self.take(to);
            to = after;
        }
        self.put(from, Piece { end: to, bytes: None });
    }

    /// Notes that `[from, to)` is stored now, or was given up by its owner.
    fn remove(&mut self, from: u64, to: u64) {
        let reaches = self.pieces.range(..from).next_back().filter(|(_, p)| p.end > from);
        let first = reaches.map_or(from, |(start, _)| *start);
        if first >= to {
            return;
        }
        let starts: Vec<u64> = self.pieces.range(first..to).map(|(start, _)| *start).collect();
        for start in starts {
            let Some(piece) = self.take(start) else { continue };
            if start < from {
                self.put(start, piece.part(start, start, from));
            }
            if piece.end > to {
                self.put(to, piece.part(start, to, piece.end));
            }
        }
    }

    /// The first refused bytes at or after `offset`, without what lies before it.
    fn next(&self, offset: u64) -> Option<(u64, u64)> {
        let before = self.pieces.range(..=offset).next_back().filter(|(_, p)| p.end > offset);
        let (start, piece) = before.or_else(|| self.pieces.range(offset..).next())?;
        Some(((*start).max(offset), piece.end))
    }

    /// Where the last refused byte ends.
    fn end(&self) -> Option<u64> {
        self.pieces.values().next_back().map(|p| p.end)
    }

    /// Puts what was refused over `out`, the content from `offset` on. False when not all of it is held.
    fn overlay(&self, offset: u64, out: &mut [u8]) -> bool {
        let end = offset + out.len() as u64;
        let mut at = offset;
        while let Some((from, _)) = self.next(at).filter(|(from, _)| *from < end) {
            let Some((start, piece)) = self.pieces.range(..=from).next_back() else { return false };
            let to = piece.end.min(end);
            let bytes = piece.bytes.as_ref();
            let part = bytes.and_then(|b| b.get((from - start) as usize..(to - start) as usize));
            let Some(part) = part else { return false };
            out[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
            at = to;
        }
        true
    }
}

/// The book, for all threads. Costs one look at a number while nothing is refused.
#[derive(Default)]
pub(super) struct Refusals {
    /// Files in the book, and one more when it is full.
    count: AtomicUsize,
    /// Something was noted since somebody asked.
    fresh: AtomicBool,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    files: HashMap<Ino, RefusedFile>,
    /// Bytes held.
    held: usize,
    /// A file found no place.
    full: bool,
    /// Counts the changes.
    version: u64,
}

impl Refusals {
    /// Whether nothing is refused.
    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Notes that `data` for `ino` at `offset` was refused, and `why`. True for the file's first.
    pub fn note(&self, ino: Ino, offset: u64, data: &[u8], why: VfsError) -> bool {
        let mut first = false;
        self.fresh.store(true, Ordering::Release);
        self.change(|book| {
            let room = book.files.len() < MOST_FILES;
            if !room && !book.files.contains_key(&ino) {
                book.full = true;
                return;
            }
            let hold = book.held + data.len() <= MOST_HELD;
            let file = book.files.entry(ino).or_insert_with(|| {
                first = true;
                RefusedFile::new(why.clone())
            });
            let before = file.held;
            file.why = why;
            file.insert(offset, data, hold);
            book.held = book.held + file.held - before;
        });
        first
    }

    /// Whether something was noted since the last call.
    pub fn take_fresh(&self) -> bool {
        self.fresh.swap(false, Ordering::AcqRel)
    }

    /// Notes that `[from, to)` of `ino` is stored. True when nothing is left that was refused.
    pub fn written(&self, ino: Ino, from: u64, to: u64) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut cleared = false;
        self.change(|book| {
            let Some(file) = book.files.get_mut(&ino) else { return };
            let before = file.held;
            file.remove(from, to);
            book.held = book.held + file.held - before;
            cleared = file.pieces.is_empty();
            if cleared {
                book.files.remove(&ino);
            }
        });
        cleared
    }

    /// Notes that `ino` was deleted.
    pub fn forget(&self, ino: Ino) {
        self.written(ino, 0, u64::MAX);
    }

    fn change(&self, change: impl FnOnce(&mut Book)) {
        let mut book = self.book.lock();
        change(&mut book);
        book.version += 1;
        self.count.store(book.files.len() + usize::from(book.full), Ordering::Release);
    }

    fn with<R>(&self, ino: Ino, ask: impl FnOnce(&RefusedFile) -> R) -> Option<R> {
        if self.is_empty() {
            return None;
        }
        self.book.lock().files.get(&ino).map(ask)
    }

    /// Fails with the error of the refusal when something of `ino` was refused.
    pub fn check(&self, ino: Ino) -> Result<(), VfsError> {
        if self.is_empty() {
            return Ok(());
        }
        let book = self.book.lock();
        match book.files.get(&ino) {
            Some(file) => Err(file.why.clone()),
            None if book.full => Err(VfsError::Io(full())),
            None => Ok(()),
        }
    }

    /// Where the last refused byte of `ino` ends.
    pub fn end(&self, ino: Ino) -> Option<u64> {
        self.with(ino, RefusedFile::end).flatten()
    }

    /// The first refused bytes of `ino` at or after `offset`.
    pub fn next(&self, ino: Ino, offset: u64) -> Option<(u64, u64)> {
        self.with(ino, |file| file.next(offset)).flatten()
    }

    /// Puts what was refused of `ino` over `out`. False when not all of it is held.
    pub fn overlay(&self, ino: Ino, offset: u64, out: &mut [u8]) -> bool {
        self.with(ino, |file| file.overlay(offset, out)).unwrap_or(true)
    }

    /// All files with their errors, whether there were more than the book holds, and its version.
    pub fn all(&self) -> (Vec<(Ino, VfsError)>, bool, u64) {
        let book = self.book.lock();
        let files = book.files.iter().map(|(ino, file)| (*ino, file.why.clone()));
        (files.collect(), book.full, book.version)
    }
}

/// What is wrong when the book is full.
pub(super) fn full() -> String {
    format!("content of more than {MOST_FILES} files was refused, so that not each is known: mount again")
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ino = Ino(7);

    fn ranges(book: &Refusals) -> Vec<(u64, u64)> {
        let files = &book.book.lock().files;
        files.get(&A).map_or_else(Vec::new, |f| f.pieces.iter().map(|(s, p)| (*s, p.end)).collect())
    }

    #[test]
    fn a_refusal_is_remembered_until_all_of_it_is_written() {
        let book = Refusals::default();
        assert!(book.is_empty() && book.check(A).is_ok());
        assert!(book.note(A, 4096, &[1; 10_000], VfsError::NoSpace));
        assert!(!book.note(A, 4096, &[1; 10_000], VfsError::NoSpace), "it is the same file");
        assert_eq!(book.check(A), Err(VfsError::NoSpace));
        assert_eq!(book.check(Ino(8)), Ok(()), "another file");
        assert_eq!((book.end(A), book.next(A, 0)), (Some(14_096), Some((4096, 8192))));
        assert!(!book.written(A, 0, 4096), "beside it");
        assert!(!book.written(A, 4096, 14_095), "all but one byte");
        assert_eq!((book.check(A), ranges(&book)), (Err(VfsError::NoSpace), vec![(14_095, 14_096)]));
        assert!(book.written(A, 14_095, 20_000));
        assert!(book.is_empty() && book.check(A).is_ok() && book.book.lock().held == 0);
    }

    #[test]
    fn ranges_are_cut_where_they_were_written_or_truncated() {
        let book = Refusals::default();
        book.note(A, 0, &[2; 12_288], VfsError::NoSpace);
        book.written(A, 1000, 5000);
        assert_eq!(ranges(&book), [(0, 1000), (5000, 8192), (8192, 12_288)]);
        // A cut at 9000, and one at 500.
        book.written(A, 9000, u64::MAX);
        assert_eq!(ranges(&book), [(0, 1000), (5000, 8192), (8192, 9000)]);
        assert_eq!(book.book.lock().held, 1000 + 3192 + 808);
        book.written(A, 500, u64::MAX);
        assert_eq!((ranges(&book), book.end(A)), (vec![(0, 500)], Some(500)));
        assert_eq!((book.next(A, 499), book.next(A, 500)), (Some((499, 500)), None));
        book.forget(A);
        assert!(book.is_empty());
    }

    #[test]
    fn what_is_held_is_laid_over_what_is_stored() {
        let book = Refusals::default();
        book.note(A, 100, &[3; 5000], VfsError::NoSpace);
        book.written(A, 200, 300);
        let mut page = vec![0; 400];
        assert!(book.overlay(A, 0, &mut page));
        assert_eq!(page, [vec![0; 100], vec![3; 100], vec![0; 100], vec![3; 100]].concat());
        let mut rest = vec![0; 4096];
        assert!(book.overlay(A, 4096, &mut rest));
        assert_eq!(rest, [vec![3; 1004], vec![0; 3092]].concat());
        // Too much to be held: the ranges stay, joined; the bytes are gone.
        for n in 1..=20 {
            book.note(A, n << 20, &vec![4; 1 << 20], VfsError::NoSpace);
        }
        assert!(book.book.lock().held <= MOST_HELD);
        assert!(book.overlay(A, 1 << 20, &mut rest));
        assert!(!book.overlay(A, 20 << 20, &mut rest));
        assert_eq!(book.next(A, 18 << 20), Some((18 << 20, 21 << 20)));
        assert_eq!(book.next(A, 2 << 20), Some((2 << 20, (2 << 20) + 4096)), "held page by page");
    }

    #[test]
    fn the_book_is_bounded() {
        let book = Refusals::default();
        for n in 0..=MOST_PIECES as u64 {
            book.note(A, n * 2 * PAGE, &[5], VfsError::NoSpace);
        }
        assert_eq!(ranges(&book), [(0, MOST_PIECES as u64 * 2 * PAGE + 1)]);
        assert_eq!(book.book.lock().held, 0);
        for n in 0..=MOST_FILES as u64 {
            book.note(Ino(100 + n), 0, &[6], VfsError::NoSpace);
        }
        assert_eq!(book.all().0.len(), MOST_FILES);
        assert!(matches!(book.check(Ino(3)), Err(VfsError::Io(_))), "a file that found no place");
        for n in 0..=MOST_FILES as u64 {
            book.forget(Ino(100 + n));
        }
        book.forget(A);
        assert!(book.check(Ino(3)).is_err() && !book.is_empty(), "that stays so");
    }
}
