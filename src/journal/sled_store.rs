//! sled, fenced in: the only file that names it.
//!
//! Owns opening, bounded synced steps, checksummed values, and turning its panics into errors. Knows neither the tail
//! nor the memtables. What is done here and why was measured: see "sled" in `docs/` (flush is no fsync; more than
//! about a segment written between real syncs can damage *older* data on power loss; a torn `.generating` file makes
//! open fail; a flipped bit can return older intact values).
//!
//! ```text
//! stored value = crc32(lsn, key, payload):u32  lsn:u64  payload
//! ```
//! `flush_every_ms` is `None`: sled's own flusher would move pages between our syncs (up to 250 ms of garbage
//! collection with no sync in between). Without it sled writes only inside our steps (it also collects garbage there,
//! one page per change), and each step ends with a sync of our own.

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Brief;
use super::brief::{Briefs, Form};
use super::disk::free_space;
use super::error::{JournalError, is_full};
use crate::ids::Lsn;
use crate::trace::{self, Stage};

/// Payload bytes between two syncs.
const STEP_BYTES: usize = 256 << 10;
/// Changes between two syncs: small changes cost sled far more than their payload.
const STEP_CHANGES: usize = 2_000;
/// By how much sled's file may grow in one step, generously.
const STEP_ROOM: u64 = 8 << 20;
/// By how much of its payload sled's file may grow in an import, generously.
const LOAD_GROWTH: u64 = 12;
/// What sled's other files (its snapshots) may take; it is not laid aside.
const BESIDE: u64 = 2 << 20;
const SEGMENT: usize = 4 << 20;
const CACHE: u64 = 128 << 20;
const WRAP: usize = 12;
/// Outside every table: tables are below it.
const APPLIED: &[u8] = b"\xffapplied";

/// A value as sled holds it.
#[derive(Debug)]
pub(super) struct Stored {
    /// The record that wrote it.
    pub(super) lsn: Lsn,
    /// The checksum stored with it, which was verified.
    pub(super) crc: u32,
    /// The payload.
    pub(super) value: Bytes,
}

/// One change for [`SledStore::apply`].
pub(super) struct Change<'a> {
    pub(super) key: &'a [u8],
    pub(super) lsn: Lsn,
    pub(super) value: Option<&'a [u8]>,
}

/// The open database.
pub(super) struct SledStore {
    dir: PathBuf,
    db: sled::Db,
    /// Our own descriptor of sled's file, for real syncs.
    file: File,
    /// sled met a full disk. It takes no more changes until it is opened anew; what it holds can be read.
    stuck: AtomicBool,
    /// What it holds, in brief.
    pub(super) briefs: Briefs,
    /// Steps to be done before the disk seems to be full, and whether sled itself meets it then.
    #[cfg(test)]
    pub(super) pretend: parking_lot::Mutex<Option<(u32, bool)>>,
}

/// The checksum that is stored with a value.
pub(super) fn checksum(key: &[u8], lsn: Lsn, value: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&lsn.0.to_le_bytes());
    h.update(&(key.len() as u32).to_le_bytes());
    h.update(key);
    h.update(value);
    h.finalize()
}

fn wrap(key: &[u8], lsn: Lsn, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(WRAP + value.len());
    out.extend_from_slice(&checksum(key, lsn, value).to_le_bytes());
    out.extend_from_slice(&lsn.0.to_le_bytes());
    out.extend_from_slice(value);
    out
}

impl SledStore {
    /// End of the range of table keys.
    pub(super) const TABLES_END: &[u8] = b"\xff";

    /// Opens or creates the database in `dir`; every file and directory is synced afterwards. `form` says what is kept in memory of its
    /// values.
    pub(super) fn open(dir: &Path, form: Form) -> Result<Self, JournalError> {
        remove_leftovers(dir)?;
        let io = |what, e| JournalError::io(what, dir, e);
        fs::create_dir_all(dir).map_err(|e| io("create", e))?;
        let db = open_unlocked(dir)?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(dir.join("db"))
            .map_err(|e| io("open sled's file in", e))?;
        let store = Self {
            dir: dir.to_owned(),
            db,
            file,
            stuck: AtomicBool::new(false),
            briefs: Briefs::new(form),
            #[cfg(test)]
            pretend: parking_lot::Mutex::default(),
        };
        store.guard("flush", || store.db.flush())?;
        sync_tree(dir)?;
        Ok(store)
    }

    /// Runs a call into sled; a panic is damage. A sled call that panics leaves nothing locked that we rely on.
    fn guard<T>(&self, what: &str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, JournalError> {
        let error = match catch_unwind(AssertUnwindSafe(call)) {
            Ok(Ok(t)) => return Ok(t),
            Ok(Err(e)) => translate(&self.dir, what, e),
            Err(panic) => of_panic(&self.dir, what, &panic_text(&*panic)),
        };
        if matches!(error, JournalError::Full { .. }) {
            self.stuck.store(true, Ordering::Release);
        }
        Err(error)
    }

    /// Whether it must be opened anew before it takes changes.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }

    /// Lays disk aside so that sled's file can grow by `bytes`, whoever fills the disk meanwhile. [`JournalError::Full`] when there
    /// is not as much.
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), JournalError> {
        use std::os::unix::fs::MetadataExt;
        let io = |e| JournalError::io("lay space aside for", &self.dir, e);
        let meta = self.file.metadata().map_err(io)?;
        let wanted = meta.len().saturating_add(bytes);
        let lacking = wanted.saturating_sub(meta.blocks().saturating_mul(512));
        let free = free_space(&self.dir).map_err(io)?;
        // Not only as the call's error: a failed attempt keeps what it got.
        if free < lacking.saturating_add(BESIDE) {
            return Err(JournalError::Full { path: self.dir.clone() });
        }
        use rustix::fs::FallocateFlags;
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, wanted) {
            // Where it cannot be laid aside, having seen it must do.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            done => done.map_err(|e| io(e.into())),
        }
    }

    /// LSN, checksum and payload of what sled holds, verified.
    fn parts<'a>(&self, key: &[u8], stored: &'a [u8]) -> Result<(Lsn, u32, &'a [u8]), JournalError> {
        let parts = stored.split_first_chunk::<4>().and_then(|(crc, rest)| {
            let (lsn, value) = rest.split_first_chunk::<8>()?;
            Some((Lsn(u64::from_le_bytes(*lsn)), u32::from_le_bytes(*crc), value))
        });
        parts.filter(|(lsn, crc, value)| checksum(key, *lsn, value) == *crc).ok_or_else(|| {
            damaged(&self.dir, "read", &format!("wrong checksum of the value of key {}", hex(key)))
        })
    }

    /// What `of` makes of LSN, checksum and payload of a key, verified.
    fn read<T>(&self, key: &[u8], of: impl FnOnce(Lsn, u32, &[u8]) -> T) -> Result<Option<T>, JournalError> {
        let stored = trace::stage(Stage::Tables, || self.guard("read", || self.db.get(key)))?;
        let Some(stored) = stored else { return Ok(None) };
        let (lsn, crc, value) = self.parts(key, &stored)?;
        Ok(Some(of(lsn, crc, value)))
    }

    /// The value of a key, verified.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Stored>, JournalError> {
        self.read(key, |lsn, crc, value| Stored { lsn, crc, value: Bytes::copy_from_slice(value) })
    }

    /// The brief form of a key's value, appended to `out`; out of memory, or verified.
    pub(super) fn brief(&self, key: &[u8], out: &mut Vec<u8>) -> Result<Brief, JournalError> {
        let ticket = match self.briefs.get(key, out) {
            Ok(()) => return Ok(Brief::Short),
            Err(ticket) => ticket,
        };
        let found = self.read(key, |_, _, value| match ticket {
            Some(ticket) if self.briefs.fill(ticket, key, value, out) => Brief::Short,
            _ => Brief::Whole(Bytes::copy_from_slice(value)),
        })?;
        Ok(found.unwrap_or(Brief::Absent))
    }

    /// The record up to which everything is applied; 0 in a new database.
    pub(super) fn applied(&self) -> Result<Lsn, JournalError> {
        Ok(self.get(APPLIED)?.map_or(Lsn(0), |s| s.lsn))
    }

    /// Calls `each` with the pairs in `[start, end)` in order, until it returns `false`.
    pub(super) fn scan(
        &self,
        start: &[u8],
        end: &[u8],
        backwards: bool,
        mut each: impl FnMut(Bytes, Stored) -> bool,
    ) -> Result<(), JournalError> {
        self.walk(start, end, backwards, |key, lsn, crc, value| {
            each(Bytes::copy_from_slice(key), Stored { lsn, crc, value: Bytes::copy_from_slice(value) })
        })
    }

    /// Calls `each` with key, LSN, checksum and value of the pairs in `[start, end)`, in order and verified, until it returns `false`.
    pub(super) fn walk(
        &self,
        start: &[u8],
        end: &[u8],
        backwards: bool,
        mut each: impl FnMut(&[u8], Lsn, u32, &[u8]) -> bool,
    ) -> Result<(), JournalError> {
        let end = end.min(Self::TABLES_END);
        if start >= end {
            return Ok(());
        }
        let mut iter = self.guard("scan", || Ok(self.db.range(start..end)))?;
        loop {
            let item = self.guard("scan", || {
                let item = if backwards { iter.next_back() } else { iter.next() };
                item.transpose()
            })?;
            let Some((key, stored)) = item else { return Ok(()) };
            let (lsn, crc, value) = self.parts(&key, &stored)?;
            if !each(&key, lsn, crc, value) {
                return Ok(());
            }
        }
    }

    /// Applies changes in synced steps, then records that everything up to `applied` is in (unless `None`).
    pub(super) fn apply<'a>(
        &self,
        changes: impl Iterator<Item = Change<'a>>,
        applied: Option<Lsn>,
        mut step_done: impl FnMut(),
    ) -> Result<(), JournalError> {
        let mut batch = sled::Batch::default();
        let mut step: Vec<Change<'a>> = Vec::new();
        let mut bytes = 0;
        for c in changes {
            let size = c.key.len() + WRAP + c.value.map_or(0, <[u8]>::len);
            if !step.is_empty() && (bytes + size > STEP_BYTES || step.len() >= STEP_CHANGES) {
                self.step(std::mem::take(&mut batch), &step)?;
                step_done();
                step.clear();
                bytes = 0;
            }
            match c.value {
                Some(v) => batch.insert(c.key, wrap(c.key, c.lsn, v)),
                None => batch.remove(c.key),
            }
            bytes += size;
            step.push(c);
        }
        if let Some(lsn) = applied {
            batch.insert(APPLIED, wrap(APPLIED, lsn, &[]));
        }
        if applied.is_some() || !step.is_empty() {
            self.step(batch, &step)?;
            step_done();
        }
        Ok(())
    }

    /// Lays space aside for [`SledStore::load`]s of `bytes` altogether.
    pub(super) fn make_room_for_load(&self, bytes: usize) -> Result<(), JournalError> {
        self.reserve(STEP_ROOM + LOAD_GROWTH * bytes as u64)
    }

    /// Puts a single pair, without a sync and from any thread: for an import.
    pub(super) fn load(&self, key: &[u8], lsn: Lsn, value: &[u8]) -> Result<(), JournalError> {
        self.guard("write", || self.db.insert(key, wrap(key, lsn, value))).map(|_| ())
    }

    /// Hands what was put to the kernel.
    pub(super) fn flush(&self) -> Result<(), JournalError> {
        self.guard("flush", || self.db.flush()).map(|_| ())
    }

    fn step(&self, batch: sled::Batch, changes: &[Change<'_>]) -> Result<(), JournalError> {
        self.reserve(STEP_ROOM)?;
        #[cfg(test)]
        if let Some((left, sticks)) = &mut *self.pretend.lock() {
            if *left == 0 {
                self.stuck.store(*sticks, Ordering::Release);
                return Err(JournalError::Full { path: self.dir.clone() });
            }
            *left -= 1;
        }
        let applied = self.guard("write", || self.db.apply_batch(batch));
        // Also when it has failed: nobody knows how far it came. What has is behind the layers that readers ask first until it is done.
        for c in changes {
            self.briefs.change(c.key, c.value.filter(|_| applied.is_ok()));
        }
        applied?;
        self.guard("flush", || self.db.flush())?;
        let path = self.dir.join("db");
        self.file.sync_data().map_err(|e| JournalError::Io { what: "sync", path, source: Arc::new(e) })
    }

    /// The first or the last key in `[start, end)`.
    pub(super) fn edge(&self, start: &[u8], end: &[u8], last: bool) -> Result<Option<Bytes>, JournalError> {
        let mut found = None;
        self.walk(start, end, last, |key, _, _, _| {
            found = Some(Bytes::copy_from_slice(key));
            false
        })?;
        Ok(found)
    }

    /// The error for a value of a record that is yet to come.
    pub(super) fn too_new(&self, key: &[u8], lsn: Lsn) -> JournalError {
        let why = format!("key {} is of record {lsn}, which is yet to come", hex(key));
        damaged(&self.dir, "verify", &why)
    }

    /// Where it lies.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Closes the database and waits until its lock is free (sled lets go of it a little later).
    pub(super) fn close(self) {
        let Self { dir, db, file, .. } = self;
        if let Err(panic) = catch_unwind(AssertUnwindSafe(move || drop(db))) {
            log::warn!("closing sled in {}: {}", dir.display(), panic_text(&*panic));
        }
        let until = Instant::now() + Duration::from_secs(2);
        while !lock_is_free(&file) && Instant::now() < until {
            // sled's last references sit in deferred work of crossbeam-epoch: push it along.
            crossbeam_epoch::pin().flush();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn lock_is_free(file: &File) -> bool {
    // The standard library's lock is flock(2), as sled's is.
    match file.try_lock() {
        Ok(()) => file.unlock().is_ok(),
        Err(_) => false,
    }
}

/// A torn `.generating` file would make sled refuse to open.
fn remove_leftovers(dir: &Path) -> Result<(), JournalError> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            let path = entry.path();
            fs::remove_file(&path).map_err(|e| JournalError::io("remove", &path, e))?;
        }
    }
    Ok(())
}

fn open_unlocked(dir: &Path) -> Result<sled::Db, JournalError> {
    let until = Instant::now() + Duration::from_secs(2);
    loop {
        let config = sled::Config::new()
            .path(dir)
            .segment_size(SEGMENT)
            .cache_capacity(CACHE)
            .flush_every_ms(None)
            .mode(sled::Mode::HighThroughput);
        match catch_unwind(AssertUnwindSafe(|| config.open())) {
            Ok(Ok(db)) => return Ok(db),
            Ok(Err(sled::Error::Io(e))) if e.to_string().contains("could not acquire lock") => {
                if Instant::now() > until {
                    return Err(JournalError::Locked { path: dir.join("db") });
                }
                // A journal of this process that was just closed, perhaps.
                crossbeam_epoch::pin().flush();
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(Err(e)) => return Err(translate(dir, "open", e)),
            Err(panic) => {
                return Err(of_panic(dir, "open", &panic_text(&*panic)));
            }
        }
    }
}

/// fsyncs every file and directory below `dir`, and `dir`'s own entry.
fn sync_tree(dir: &Path) -> Result<(), JournalError> {
    let err = |path: &Path, e| JournalError::io("sync", path, e);
    for entry in fs::read_dir(dir).map_err(|e| err(dir, e))? {
        let path = entry.map_err(|e| err(dir, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| err(&path, e))?;
        }
    }
    File::open(dir).and_then(|f| f.sync_all()).map_err(|e| err(dir, e))
}

fn translate(dir: &Path, what: &str, e: sled::Error) -> JournalError {
    match e {
        sled::Error::Io(e) if is_full(&e) => JournalError::Full { path: dir.to_owned() },
        sled::Error::Io(e) => {
            JournalError::Io { what: "use sled in", path: dir.to_owned(), source: Arc::new(e) }
        }
        other => damaged(dir, what, &other.to_string()),
    }
}

fn damaged(dir: &Path, what: &str, why: &str) -> JournalError {
    JournalError::Damaged(format!("sled in {} ({what}): {why}", dir.display()))
}

/// A panic of sled is damage, unless it speaks of a full disk.
fn of_panic(dir: &Path, what: &str, text: &str) -> JournalError {
    if text.contains("No space left") || text.contains("StorageFull") {
        return JournalError::Full { path: dir.to_owned() };
    }
    damaged(dir, what, text)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "it panicked".into())
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|b| format!("{b:02x}")).collect()
}
