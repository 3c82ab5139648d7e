//! The journal: the durable, ordered key-value space of all metadata.
//!
//! Owns the local truth: which records exist, in which order, and what they add up to. Knows no table (keys are bytes
//! whose first byte is below 0xff), no file of the volume, no network, no clock of the caller.
//!
//! ```text
//! transact ──► memtable (visible)            get, scan ──► active ─► frozen ─► sled
//!     └──────► buffer ──► tail file (durable at `barrier`: one write + one fdatasync for all who wait)
//!                            └──► applier ──► sled (rounds of small synced steps, announced in the witness)
//! ```
//! * The **tail** is the truth; sled is never ahead of it. A record is in the tail until it is applied *and*
//!   [released](Journal::release).
//! * The **witness** holds a sum over all live keys of sled, so that old but intact values are noticed.
//! * After a failed write or sync the journal is **poisoned**: reads go on, changes fail until it is opened again.
//! * Nothing waits for ever: poisoning, closing and a full disk end every wait with an error.
//!
//! What the tail promises about flipped bits: a flip in anything that was synced is reported as
//! [`JournalError::Damaged`], with one exception: a flip in the *last* group when a power loss swallowed the
//! confirmation behind it looks like a torn write and ends the replay before that group.

mod applier;
mod brief;
mod disk;
mod error;
mod flusher;
#[doc(hidden)]
pub mod fuzz;
mod import;
mod kept;
mod memtable;
mod numbers;
mod proof;
mod replay;
mod shared;
mod sled_store;
mod snapshot;
mod tail;
mod tail_set;
#[cfg(test)]
mod tests;
mod tx;
mod witness;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;

pub use brief::Form;
pub use error::JournalError;
pub use numbers::Numbers;
pub use snapshot::Snapshot;
pub use tail_set::RecordIter;
pub use tx::Tx;

use crate::format::record::{Op, Record};
use crate::ids::Lsn;
use crate::trace::{self, Stage};
use disk::Disk;
use memtable::Changes;
use shared::Shared;
use witness::{Point, State, Statement};

// The longest value is far below what sled puts into files that it never syncs (1 MiB), and leaves
// room for several in one page.
pub use crate::format::limits::{MAX_KEY, MAX_VALUE};

/// Called before each sync of the tail, by whoever does that, with the highest mark that its records rest on ([`Tx::rest_on`]; 0 for none):
/// returns when block data up to that mark is durable. Must not call the journal. An error poisons.
pub type DataSync = Arc<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

/// How to open a journal.
#[derive(Clone)]
pub struct Options {
    /// Holds `db/`, `tail/` and `witness`.
    pub dir: PathBuf,
    /// See [`DataSync`].
    pub data_sync: DataSync,
    /// Memory for changes that are not in sled yet, in bytes; beyond it transactions wait.
    pub memtable_limit: usize,
    /// Length of a tail file in bytes.
    pub tail_file_size: u64,
    /// When sled occupies less than this, in bytes, all of it is proved against the witness before it is used. A larger one is proved in
    /// the background, if it must be as it was written: after a clean close, and while the kernel has kept its files.
    pub prove_at_once: u64,
    /// What is kept in memory of sled's values, for [`Journal::brief`].
    pub form: Form,
}

/// What [`Journal::brief`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Brief {
    /// There is no such key.
    Absent,
    /// The brief form was appended to the buffer.
    Short,
    /// The whole value, of which there is no brief form.
    Whole(Bytes),
}

impl Options {
    /// The defaults: 32 MiB of memtable, tail files of 16 MiB, 64 MiB proved at once, nothing kept in brief.
    pub fn new(dir: impl Into<PathBuf>, data_sync: DataSync) -> Self {
        Self {
            dir: dir.into(),
            data_sync,
            memtable_limit: 32 << 20,
            tail_file_size: 16 << 20,
            prove_at_once: 64 << 20,
            form: Form::NONE,
        }
    }
}

/// What an open found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The newest record.
    pub last_lsn: Lsn,
    /// Records that were read back from the tail.
    pub replayed: u64,
    /// There was no journal before.
    pub fresh: bool,
    /// It was closed in order last time (or is fresh).
    pub clean: bool,
}

/// Figures for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Newest record.
    pub last_lsn: Lsn,
    /// Newest durable record.
    pub durable_lsn: Lsn,
    /// Newest record in sled.
    pub applied_lsn: Lsn,
    /// Estimated memory of changes not in sled, in bytes.
    pub memtable_bytes: usize,
    /// Memory of values in brief, in bytes.
    pub brief_bytes: usize,
    /// Disk that the tail's files occupy, in bytes.
    pub tail_bytes: u64,
    /// Disk that sled occupies, in bytes.
    pub db_bytes: u64,
    /// Syncs of the tail since the open.
    pub syncs: u64,
    /// Transactions that had to wait for memory or disk since the open.
    pub waits: u64,
    /// Rounds applied to sled since the open.
    pub rounds: u64,
}

/// The open journal. Share it with `Arc`; every method may be called from any thread.
pub struct Journal {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    flusher: JoinHandle<()>,
    applier: JoinHandle<()>,
}

impl Journal {
    /// Opens or creates the journal and replays its tail. [`JournalError::Damaged`] and [`JournalError::Incomplete`]
    /// mean: [`quarantine`] and rebuild.
    pub fn open(options: Options) -> Result<(Arc<Journal>, Opened), JournalError> {
        Self::open_on(options, Disk::default())
    }

    fn open_on(options: Options, disk: Disk) -> Result<(Arc<Journal>, Opened), JournalError> {
        let dir = options.dir.clone();
        let (shared, opened) = replay::open(options, disk)?;
        let spawn_error = |e| JournalError::io("start a thread for", &dir, e);
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let s = shared.clone();
        let flusher = thread("journal-flush").spawn(move || flusher::run(&s)).map_err(spawn_error)?;
        let s = shared.clone();
        let applier = match thread("journal-apply").spawn(move || applier::run(&s)) {
            Ok(t) => t,
            Err(e) => {
                shared.pending.lock().stop = true;
                shared.wake_all();
                return Err(spawn_error(e));
            }
        };
        let threads = Mutex::new(Some(Threads { flusher, applier }));
        Ok((Arc::new(Journal { shared, threads }), opened))
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        self.shared.get(None, key)
    }

    /// The value of a key in the brief form that the [`Options`] name, which is appended to `out`: mostly from memory.
    pub fn brief(&self, key: &[u8], out: &mut Vec<u8>) -> Result<Brief, JournalError> {
        self.shared.brief(key, out)
    }

    /// Up to `limit` pairs with keys in `[start, end)`, in order, as of one moment.
    pub fn scan(&self, start: &[u8], end: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        self.shared.scan(None, start, end, limit)
    }

    /// The pair with the highest key in `[start, end)`.
    pub fn last_in(&self, start: &[u8], end: &[u8]) -> Result<Option<(Bytes, Bytes)>, JournalError> {
        self.shared.last_in(None, start, end)
    }

    /// All keys as of this moment, for as long as it is kept; changes go on meanwhile.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::take(&self.shared)
    }

    /// Runs `f`, alone among transactions, and commits its changes as one record. When `f` fails nothing happened;
    /// when it changes nothing no LSN is used and the newest one is returned. The changes are visible at once and
    /// durable after [`Journal::barrier`]. `f` must not start another transaction.
    ///
    /// Waits while too much is on its way to the disk. Fails with [`JournalError::Full`] before `f` is run when
    /// there is no space for more.
    pub fn transact<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&mut Tx<'_>) -> Result<R, E>,
    ) -> Result<(R, Lsn), E> {
        trace::stage(Stage::Turn, || self.shared.make_room())?;
        self.transact_at_once(f)
    }

    /// Waits as [`Journal::transact`] does until a transaction may run, and fails when there is no space for one.
    pub fn make_room(&self) -> Result<(), JournalError> {
        self.shared.make_room()
    }

    /// [`Journal::transact`] without its wait for memory and disk: for one who holds a lock that many wait for, and has
    /// called [`Journal::make_room`] before. Memory grows beyond its limit by what is committed in this way.
    pub fn transact_at_once<R, E: From<JournalError>>(
        &self,
        f: impl FnOnce(&mut Tx<'_>) -> Result<R, E>,
    ) -> Result<(R, Lsn), E> {
        let s = &*self.shared;
        let _turn = trace::stage(Stage::Turn, || s.commit.lock());
        s.usable()?;
        let last = Lsn(s.last.load(SeqCst));
        let mut tx = Tx { shared: s, lsn: last.next(), changes: Changes::new(), refused: None, mark: 0 };
        let result = f(&mut tx)?;
        if let Some(refused) = tx.refused {
            return Err(refused.into());
        }
        if tx.changes.is_empty() {
            return Ok((result, last));
        }
        s.usable()?;
        s.snapshots.note(s, &tx.changes);
        s.commit(tx.lsn, tx.changes, tx.mark);
        Ok((result, tx.lsn))
    }

    /// Returns when every record up to `lsn` is on stable storage (a higher LSN than the newest one means the
    /// newest one).
    pub fn barrier(&self, lsn: Lsn) -> Result<(), JournalError> {
        trace::stage(Stage::Sync, || self.shared.barrier(lsn))
    }

    /// The newest record.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        Lsn(self.shared.last.load(SeqCst))
    }

    /// The newest durable record.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        Lsn(self.shared.durable.load(SeqCst))
    }

    /// The records in `(after, upto]`, in order, read from the tail; makes them durable first. Fails with
    /// [`JournalError::Gone`] when records after `after` were released and cut.
    pub fn records(&self, after: Lsn, upto: Lsn) -> Result<RecordIter, JournalError> {
        let upto = upto.min(self.last_lsn());
        self.shared.barrier(upto)?;
        self.shared.tail.records(after, upto)
    }

    /// Records up to `upto` are sealed: the tail may be cut behind what is released and applied. Not remembered:
    /// to be called again after an open. Never moves back.
    pub fn release(&self, upto: Lsn) {
        let s = &self.shared;
        if s.released.fetch_max(upto.0, SeqCst) < upto.0 {
            s.wishes.lock().cut = true;
            s.wished.notify_all();
        }
    }

    /// Loads a restored state into a fresh journal, straight into sled, in bounded synced steps. Afterwards `lsn` is
    /// the newest record, durable and applied. A crash inside shows at the next open as
    /// [`JournalError::Incomplete`]; so does an error here.
    pub fn import(
        &self,
        lsn: Lsn,
        ops: &mut dyn Iterator<Item = Result<Op, JournalError>>,
    ) -> Result<(), JournalError> {
        let s = &*self.shared;
        let _turn = s.commit.lock();
        s.usable()?;
        let store = s.store()?;
        let mut witness = s.witness.lock();
        let last = self.last_lsn();
        if last != Lsn(0) || witness.now.after != Point::default() || s.tail.newest_seq() != 0 {
            return Err(JournalError::NotFresh { last });
        }
        witness.say(Statement::at(State::Importing, Point::default(), 0))?;
        let done = import::load(&store, lsn, ops).and_then(|sum| {
            let point = Point { applied: lsn, sum };
            witness.say(Statement::at(State::Open, point, 0))
        });
        if let Err(e) = done {
            s.poison_with(&JournalError::Poisoned(format!("an import failed: {e}")));
            return Err(e);
        }
        {
            let mut p = s.pending.lock();
            p.first = lsn.next();
            p.last = lsn;
        }
        for n in [&s.last, &s.durable, &s.applied] {
            n.store(lsn.0, SeqCst);
        }
        Ok(())
    }

    /// Reads all of sled and compares it with the witness; a difference poisons. Takes about a second per 1–3
    /// million keys, during which nothing is applied to sled.
    pub fn verify(&self) -> Result<(), JournalError> {
        let s = &self.shared;
        let mut w = s.wishes.lock();
        w.verify += 1;
        let mine = w.verify;
        s.wished.notify_all();
        loop {
            if w.verified >= mine {
                return w.outcome.clone().map_or(Ok(()), Err);
            }
            s.usable()?;
            s.wished.wait_for(&mut w, shared::LOOK_AGAIN);
        }
    }

    /// Stops all changes until the journal is opened again; the first reason is kept.
    pub fn poison(&self, why: &str) {
        self.shared.poison_with(&JournalError::Poisoned(why.to_owned()));
    }

    /// Why changes are refused, if they are.
    #[must_use]
    pub fn poisoned(&self) -> Option<String> {
        self.shared.healthy().err().map(|e| match e {
            JournalError::Poisoned(why) => why,
            other => other.to_string(),
        })
    }

    /// Figures for status and metrics. Looks at the disk: not for hot paths.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let s = &self.shared;
        Stats {
            last_lsn: self.last_lsn(),
            durable_lsn: self.durable_lsn(),
            applied_lsn: Lsn(s.applied.load(SeqCst)),
            memtable_bytes: s.mem.load(SeqCst),
            brief_bytes: s.store().map_or(0, |store| store.briefs.bytes()),
            tail_bytes: s.tail.bytes(),
            db_bytes: disk::occupied(&s.dir.join("db")),
            syncs: s.count.syncs.load(SeqCst),
            waits: s.count.waits.load(SeqCst),
            rounds: s.count.rounds.load(SeqCst),
        }
    }

    /// Makes everything durable, applies it, marks the journal clean, stops its threads and lets go of sled's lock.
    /// May be called again. Without it (a crash, a poisoned journal) nothing acknowledged is lost; the next open
    /// just reads more.
    pub fn close(&self) -> Result<(), JournalError> {
        let s = &*self.shared;
        // Whoever else closes waits here until it is done.
        let mut threads = self.threads.lock();
        let Some(threads) = threads.take() else { return s.healthy() };
        {
            // A transaction that is running finishes first.
            let _turn = s.commit.lock();
            s.closed.store(true, SeqCst);
        }
        let durable = s.barrier(self.last_lsn());
        s.wishes.lock().stop = true;
        s.wished.notify_all();
        let mut panicked = threads.applier.join().is_err();
        s.pending.lock().stop = true;
        s.wake_all();
        panicked |= threads.flusher.join().is_err();
        let outcome = durable.and_then(|()| s.healthy()).and_then(|()| {
            if panicked {
                return Err(JournalError::Poisoned("a thread of the journal panicked".into()));
            }
            let mut w = s.witness.lock();
            let clean = Statement {
                state: State::Clean,
                before: w.now.after,
                after: w.now.after,
                tail_seq: s.tail.newest_seq(),
                last: self.last_lsn(),
            };
            // An announced round that did not finish must be redone: that is not clean.
            if s.applied.load(SeqCst) == w.now.after.applied.0 { w.say(clean) } else { Ok(()) }
        });
        let store = s.store.write().take();
        // Readers that are inside finish first; the last one to let go closes sled.
        if let Some(mut store) = store {
            for _ in 0..1000 {
                match Arc::try_unwrap(store) {
                    Ok(store) => {
                        store.close();
                        return outcome;
                    }
                    Err(shared) => store = shared,
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        outcome
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            log::warn!("closing the journal in {}: {e}", self.shared.dir.display());
        }
    }
}

/// Moves a journal that cannot be opened aside, whole (database, tail and witness), into `dir/quarantine-{label}`
/// (with a number when that exists), so that a new one can be begun. Records that no replica holds are read back
/// from there with [`salvage`].
pub fn quarantine(dir: &Path, now_label: &str) -> io::Result<PathBuf> {
    let mut to = dir.join(format!("quarantine-{now_label}"));
    let mut n = 1;
    while to.exists() {
        n += 1;
        to = dir.join(format!("quarantine-{now_label}-{n}"));
    }
    fs::create_dir(&to)?;
    // The witness last: without it, what is left would be refused, not taken for a new journal.
    for part in ["db", "tail", "witness"] {
        match fs::rename(dir.join(part), to.join(part)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    fs::File::open(&to)?.sync_all()?;
    fs::File::open(dir)?.sync_all()?;
    Ok(to)
}

/// What [`salvage`] found.
#[derive(Clone, Debug)]
pub struct Salvaged {
    /// The records in order, without a gap, up to the first that cannot be read.
    pub records: Vec<Record>,
    /// The newest record that is known to have been durable. When `records` end before it, acknowledged changes are
    /// missing.
    pub proved: Lsn,
}

/// The records after `after` in the tail of a quarantined journal, in order, up to the first that cannot be read.
/// [`JournalError::Gone`] when the tail begins later. Changes nothing.
pub fn salvage(quarantined: &Path, after: Lsn) -> Result<Salvaged, JournalError> {
    let tail = quarantined.join("tail");
    let (records, mut proved) = match tail.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => (Vec::new(), after),
        _ => tail_set::salvage(&tail, after)?,
    };
    // The witness may know of more than the tail still shows; a damaged one says nothing.
    if let Ok(Some(witness)) = witness::Witness::open(&Disk::default(), quarantined) {
        proved = proved.max(witness.now.last).max(witness.now.after.applied);
    }
    Ok(Salvaged { records, proved })
}
