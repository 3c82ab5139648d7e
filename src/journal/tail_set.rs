//! The tail's files: finding, appending, cutting, recycling, reading back.
//!
//! Owns the directory `tail/` and the order of steps that keeps it recoverable: a file gets its header before it gets
//! its name, and loses its name before its content. Knows nothing of what the records mean.
//!
//! `{seq:016x}.tail` are files of the tail; `spare-*` and `*.tmp` are nobody's and are removed at open.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;

use super::disk::{Disk, free_space};
use super::error::JournalError;
use super::tail::{self, Found, GROUP, GroupReader, HEADER};
use crate::format::record::Record;
use crate::ids::Lsn;

const SPARES: usize = 2;
/// When so much of a file is used, the next one should be at hand.
const STOCK_FROM: u64 = 8;
/// So many times its length must be free on the disk for a file to be made ahead.
const STOCK_FREE: u64 = 8;
/// Whole pieces of this length are written: into a part of a page that is not in its memory the kernel would have to read the rest.
const PAGE: usize = 4096;
/// A buffer for pages is kept up to this size.
const KEPT: usize = 2 << 20;

/// One file of the tail.
#[derive(Debug)]
pub(super) struct TailFile {
    /// Its number.
    pub(super) seq: u64,
    /// The first record it holds or will hold.
    pub(super) first: Lsn,
    last: AtomicU64,
    /// Where it lies.
    pub(super) path: PathBuf,
    pub(super) size: u64,
}

impl TailFile {
    /// The newest record in it; `first - 1` when empty.
    pub(super) fn last(&self) -> Lsn {
        Lsn(self.last.load(SeqCst))
    }

    /// Set by replay, when it knows.
    pub(super) fn set_last(&self, last: Lsn) {
        self.last.store(last.0, SeqCst);
    }

    /// A reader of its groups.
    pub(super) fn reader(&self) -> Result<GroupReader, JournalError> {
        let file = File::open(&self.path).map_err(|e| JournalError::io("open", &self.path, e))?;
        Ok(GroupReader::new(file, self.seq, self.size))
    }
}

#[derive(Default)]
struct Files {
    /// In order.
    live: Vec<Arc<TailFile>>,
    spares: Vec<PathBuf>,
}

/// All files of the tail.
pub(super) struct TailSet {
    dir: PathBuf,
    disk: Disk,
    file_size: u64,
    files: Mutex<Files>,
    /// The next file is to be made, if none is at hand: else that would happen while somebody waits for a sync.
    short: AtomicBool,
}

impl TailSet {
    /// Finds the files in `dir`, which it makes if need be. Headers are checked, groups are not read.
    pub(super) fn open(disk: &Disk, dir: &Path, file_size: u64) -> Result<Self, JournalError> {
        let io = |what, path: &Path, e| JournalError::io(what, path, e);
        fs::create_dir_all(dir).map_err(|e| io("create", dir, e))?;
        let live = list(dir, |path| disk.remove(path))?;
        // The name of the newest one may still be with the kernel, left by a process that was killed: the witness must not name it
        // before it is durable.
        disk.sync_dir(dir).map_err(|e| io("sync", dir, e))?;
        Ok(Self {
            dir: dir.to_owned(),
            disk: disk.clone(),
            file_size: file_size.max(64 << 10),
            files: Mutex::new(Files { live, spares: Vec::new() }),
            short: AtomicBool::new(false),
        })
    }

    /// The files, oldest first.
    pub(super) fn files(&self) -> Vec<Arc<TailFile>> {
        self.files.lock().live.clone()
    }

    /// The highest file number; 0 when there is none.
    pub(super) fn newest_seq(&self) -> u64 {
        self.files.lock().live.last().map_or(0, |f| f.seq)
    }

    /// Bytes that the files occupy, spares included.
    pub(super) fn bytes(&self) -> u64 {
        let files = self.files.lock();
        files.live.iter().map(|f| f.size).sum::<u64>() + files.spares.len() as u64 * self.file_size
    }

    /// Lets go of files whose records are all at or before `upto`, except the newest file and those being read.
    pub(super) fn cut(&self, upto: Lsn) -> Result<(), JournalError> {
        loop {
            let mut files = self.files.lock();
            // Two holders: the list and the writer (the newest file). A reader is a third.
            let gone = files.live.len() > 1
                && files.live[0].last() <= upto
                && files.live[1].first <= upto.next()
                && Arc::strong_count(&files.live[0]) == 1;
            if !gone {
                return Ok(());
            }
            let file = files.live.remove(0);
            let done = if files.spares.len() < SPARES && file.size == self.file_size {
                let spare = self.dir.join(format!("spare-{:016x}", file.seq));
                self.disk
                    .rename(&file.path, &spare)
                    .and_then(|()| self.disk.sync_dir(&self.dir))
                    .map(|()| files.spares.push(spare))
            } else {
                self.disk.remove(&file.path)
            };
            drop(files);
            done.map_err(|e| JournalError::io("retire", &file.path, e))?;
        }
    }

    /// Whether [`TailSet::stock`] should be called soon.
    pub(super) fn is_short(&self) -> bool {
        self.short.load(SeqCst)
    }

    /// Makes a spare file, so that the next one needs only a header and its name. That it cannot be made now is no failure.
    pub(super) fn stock(&self) {
        self.short.store(false, SeqCst);
        // On a disk that is filling up it would only be in the way.
        let roomy = free_space(&self.dir).is_ok_and(|free| free >= STOCK_FREE * self.file_size);
        if !roomy || !self.files.lock().spares.is_empty() {
            return;
        }
        let spare = self.dir.join(format!("spare-{:016x}-new", self.newest_seq()));
        match self.disk.create_zeroed(&spare, self.file_size) {
            Ok(_) => self.files.lock().spares.push(spare),
            Err(e) => {
                log::debug!("{} is not made ahead: {e}", spare.display());
                // Best effort: give back what the attempt took.
                fs::remove_file(&spare).ok();
            }
        }
    }

    /// Makes the next file, for records from `first` on and a group of `need` bytes. [`JournalError::Full`] leaves
    /// everything as it was.
    fn prepare(&self, seq: u64, first: Lsn, need: u64) -> Result<(Arc<TailFile>, File), JournalError> {
        let least = HEADER + need.next_multiple_of(8) + 2 * GROUP as u64;
        let size = self.file_size.max(least.next_multiple_of(4096));
        let path = self.dir.join(format!("{seq:016x}.tail"));
        let spare = if size == self.file_size { self.files.lock().spares.pop() } else { None };
        let (tmp, file) = match spare {
            Some(spare) => {
                let file = File::options().read(true).write(true).open(&spare);
                (spare.clone(), file.map_err(|e| JournalError::io("open", &spare, e))?)
            }
            None => {
                let tmp = self.dir.join("next.tmp");
                match self.disk.create_zeroed(&tmp, size) {
                    Ok(file) => (tmp, file),
                    Err(e) => {
                        // Best effort: give back what the attempt took.
                        fs::remove_file(&tmp).ok();
                        return Err(JournalError::io("create", &tmp, e));
                    }
                }
            }
        };
        let header = tail::file_header(seq, first, size);
        self.disk
            .write(&file, &tmp, 0, &header)
            .and_then(|()| self.disk.sync(&file, &tmp))
            .and_then(|()| self.disk.rename(&tmp, &path))
            .and_then(|()| self.disk.sync_dir(&self.dir))
            .map_err(|e| JournalError::io("prepare", &path, e))?;
        let last = AtomicU64::new(first.0.saturating_sub(1));
        let entry = Arc::new(TailFile { seq, first, last, path, size });
        self.files.lock().live.push(entry.clone());
        Ok((entry, file))
    }

    /// The records in `(after, upto]`, all of which must have been written.
    pub(super) fn records(&self, after: Lsn, upto: Lsn) -> Result<RecordIter, JournalError> {
        let mut files: Vec<_> = self.files();
        files.retain(|f| f.last() > after && f.first <= upto);
        if after < upto {
            let oldest = files.first().map_or(upto.next(), |f| f.first);
            if oldest > after.next() {
                return Err(JournalError::Gone { after, oldest });
            }
        }
        files.reverse();
        Ok(RecordIter {
            files,
            current: None,
            ready: Vec::new().into_iter(),
            next: after.next(),
            upto,
            failed: false,
        })
    }
}

/// Lists the tail files of a directory, giving all others that belong to a tail to `stray`.
fn list(
    dir: &Path,
    stray: impl Fn(&Path) -> std::io::Result<()>,
) -> Result<Vec<Arc<TailFile>>, JournalError> {
    let mut live = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| JournalError::io("list", dir, e))? {
        let entry = entry.map_err(|e| JournalError::io("list", dir, e))?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with("spare-") || name.ends_with(".tmp") {
            stray(&path).map_err(|e| JournalError::io("remove", &path, e))?;
            continue;
        }
        let Some(seq) = name.strip_suffix(".tail").and_then(|s| u64::from_str_radix(s, 16).ok()) else {
            continue;
        };
        let file = File::open(&path).map_err(|e| JournalError::io("open", &path, e))?;
        let (first, size) = tail::read_file_header(&file, seq)
            .map_err(|why| JournalError::Damaged(format!("tail file {}: {why}", path.display())))?;
        let last = AtomicU64::new(first.0.saturating_sub(1));
        live.push(Arc::new(TailFile { seq, first, last, path, size }));
    }
    live.sort_by_key(|f| f.seq);
    Ok(live)
}

/// The file that is being written.
struct Current {
    entry: Arc<TailFile>,
    file: File,
    /// Where the next group begins.
    at: u64,
    /// The last page so far, up to there.
    page: Vec<u8>,
    /// Pages that are written, whole.
    image: Vec<u8>,
    /// Enough of it is used that the next one was asked for.
    stocked: bool,
}

impl Current {
    fn new(entry: Arc<TailFile>, file: File) -> Self {
        Self { entry, file, at: HEADER, page: Vec::new(), image: Vec::new(), stocked: false }
    }

    /// Writes `bytes` where the next group begins. What stands before them in the page is written once more, and zeros behind them.
    fn write(&mut self, disk: &Disk, bytes: &[u8]) -> std::io::Result<()> {
        let from = self.at - self.page.len() as u64;
        self.image.clear();
        self.image.extend_from_slice(&self.page);
        self.image.extend_from_slice(bytes);
        let len = self.image.len().next_multiple_of(PAGE) as u64;
        self.image.resize(len.min(self.entry.size - from) as usize, 0);
        disk.write(&self.file, &self.entry.path, from, &self.image)
    }

    /// The `len` bytes that were just written stay.
    fn advance(&mut self, len: usize) {
        let end = self.page.len() + len;
        self.page.clear();
        self.page.extend_from_slice(&self.image[end / PAGE * PAGE..end]);
        self.at += len as u64;
        if self.image.capacity() > KEPT {
            self.image = Vec::new();
        }
    }
}

/// Appends groups; only the flusher holds one.
pub(super) struct Writer {
    set: Arc<TailSet>,
    current: Option<Current>,
    next_seq: u64,
}

impl Writer {
    /// A writer that begins a new file with its first group.
    pub(super) fn new(set: Arc<TailSet>, witnessed_seq: u64) -> Self {
        let next_seq = set.newest_seq().max(witnessed_seq) + 1;
        Self { set, current: None, next_seq }
    }

    /// Begins a new file if the current one cannot take a group of `len` bytes (header included). Nothing of the
    /// group is written yet: an error here may be tried again.
    pub(super) fn make_room(&mut self, first: Lsn, len: usize) -> Result<(), JournalError> {
        if self.fits(len) {
            return Ok(());
        }
        let need = (len as u64).next_multiple_of(8) + GROUP as u64;
        let (entry, file) = self.set.prepare(self.next_seq, first, need)?;
        self.next_seq += 1;
        self.current = Some(Current::new(entry, file));
        Ok(())
    }

    /// Whether the current file can take a group of `len` bytes (header included) and its confirmation.
    pub(super) fn fits(&self, len: usize) -> bool {
        let need = (len as u64).next_multiple_of(8) + GROUP as u64;
        self.current.as_ref().is_some_and(|c| c.at + need <= c.entry.size)
    }

    /// Writes and syncs one group, then confirms it. `buf` begins with room for the header. After an error nothing
    /// may be appended any more.
    pub(super) fn append(&mut self, buf: &mut Vec<u8>, first: Lsn, last: Lsn) -> Result<(), JournalError> {
        let Some(current) = &mut self.current else {
            return Err(JournalError::Poisoned("a group was appended before there was a tail file".into()));
        };
        let (disk, entry) = (&self.set.disk, Arc::clone(&current.entry));
        tail::seal_group(buf, entry.seq, first, last);
        // ENOSPC inside a preallocated file leaves an unknown state: never passed on as "full".
        let fail = |what, e: std::io::Error| JournalError::Io {
            what,
            path: entry.path.clone(),
            source: Arc::new(e),
        };
        current.write(disk, buf).map_err(|e| fail("write to", e))?;
        disk.sync(&current.file, &entry.path).map_err(|e| fail("sync", e))?;
        current.advance(buf.len());
        let confirm = tail::confirmation(entry.seq, last);
        current.write(disk, &confirm).map_err(|e| fail("write to", e))?;
        entry.set_last(last);
        if !current.stocked && current.at >= entry.size / STOCK_FROM {
            current.stocked = true;
            self.set.short.store(true, SeqCst);
        }
        Ok(())
    }
}

/// Iterates over records of the tail in LSN order. The files it reads are not recycled while it lives.
pub struct RecordIter {
    /// Newest first.
    files: Vec<Arc<TailFile>>,
    current: Option<(Arc<TailFile>, GroupReader)>,
    ready: std::vec::IntoIter<Record>,
    next: Lsn,
    upto: Lsn,
    failed: bool,
}

impl RecordIter {
    fn step(&mut self) -> Result<Option<Record>, JournalError> {
        loop {
            if let Some(record) = self.ready.next() {
                if record.lsn < self.next {
                    continue;
                }
                self.next = record.lsn.next();
                return Ok(Some(record));
            }
            let Some((file, reader)) = &mut self.current else {
                let Some(file) = self.files.pop() else {
                    return Err(JournalError::Damaged(format!(
                        "record {} is in none of the tail's files",
                        self.next
                    )));
                };
                let reader = file.reader()?;
                self.current = Some((file, reader));
                continue;
            };
            if file.last() < self.next {
                self.current = None;
                continue;
            }
            match reader.next().map_err(|e| JournalError::io("read", &file.path, e))? {
                Found::Group { first, last, payload } => {
                    if first > self.next {
                        return Err(JournalError::Damaged(format!(
                            "tail file {}: record {} where {} belongs",
                            file.path.display(),
                            first,
                            self.next
                        )));
                    }
                    if last >= self.next {
                        self.ready = tail::records_of(&file.path, first, last, &payload)?.into_iter();
                    }
                }
                Found::Confirmed(_) | Found::End => {
                    return Err(JournalError::Damaged(format!(
                        "tail file {}: record {} cannot be read",
                        file.path.display(),
                        self.next
                    )));
                }
            }
        }
    }
}

impl Iterator for RecordIter {
    type Item = Result<Record, JournalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.next > self.upto {
            return None;
        }
        let got = self.step();
        self.failed = got.is_err();
        got.transpose()
    }
}

/// The records after `after` that can still be read from the tail in `dir` (a quarantined journal's `tail/`), up to
/// the first that cannot, and the newest record that is proved to have been synced. For rebuilding: changes nothing.
pub(super) fn salvage(dir: &Path, after: Lsn) -> Result<(Vec<Record>, Lsn), JournalError> {
    let mut out: Vec<Record> = Vec::new();
    let mut next = after.next();
    let mut proved = after;
    let mut broken = false;
    for file in list(dir, |_| Ok(()))? {
        let failed = |e| JournalError::io("read", &file.path, e);
        let mut reader = file.reader()?;
        loop {
            match reader.next().map_err(failed)? {
                Found::Group { first, last, payload } => {
                    proved = proved.max(last);
                    if first > next && !broken {
                        if out.is_empty() && next == after.next() {
                            return Err(JournalError::Gone { after, oldest: first });
                        }
                        broken = true;
                    }
                    if last >= next && !broken {
                        let records = tail::records_of(&file.path, first, last, &payload)?;
                        out.extend(records.into_iter().filter(|r| r.lsn >= next));
                        next = last.next();
                    }
                }
                Found::Confirmed(lsn) => {
                    proved = proved.max(lsn);
                    break;
                }
                Found::End => break,
            }
        }
        if let Some(lsn) = reader.proof_of_more(next).map_err(failed)? {
            proved = proved.max(lsn);
        }
    }
    Ok((out, proved))
}
