//! Opening: from files to a running state, or a refusal.
//!
//! Owns the decision what the files on disk mean. Nothing it meets is skipped: either the state is the one that was
//! acknowledged, or the open fails and says what is wrong.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};

use super::applier;
use super::disk::{Disk, occupied};
use super::error::JournalError;
use super::flusher::Flush;
use super::kept::Kept;
use super::memtable::{MemTable, View};
use super::proof;
use super::shared::{Pending, Shared, Wishes};
use super::sled_store::SledStore;
use super::tail::{self, Found};
use super::tail_set::{TailFile, TailSet, Writer};
use super::witness::{Point, State, Statement, Witness};
use super::{Opened, Options};
use crate::format::record::Record;
use crate::ids::Lsn;

/// During replay a table of this size is applied before reading on.
const ROUND_BYTES: usize = 8 << 20;

/// Opens everything; threads are the caller's business.
pub(super) fn open(options: Options, disk: Disk) -> Result<(Arc<Shared>, Opened), JournalError> {
    let dir = options.dir.clone();
    fs::create_dir_all(&dir).map_err(|e| JournalError::io("create", &dir, e))?;
    let (mut witness, fresh) = find_or_create(&disk, &dir)?;
    witness.settle()?;
    let said = witness.now;
    if said.state == State::Importing {
        return Err(JournalError::Incomplete(format!("the import into {} was interrupted", dir.display())));
    }
    let db = dir.join("db");
    if !fresh && !db.join("db").exists() {
        return Err(JournalError::Damaged(format!("sled's files in {} are gone", db.display())));
    }
    let kept = Kept::look(&dir, &db.join("db"));
    let store = SledStore::open(&db, options.form)?;
    let tail = Arc::new(TailSet::open(&disk, &dir.join("tail"), options.tail_file_size)?);
    if fresh {
        fs::File::open(&dir).and_then(|d| d.sync_all()).map_err(|e| JournalError::io("sync", &dir, e))?;
        witness.say(Statement::at(State::Open, Point::default(), 0))?;
    }
    if tail.newest_seq() < said.tail_seq {
        return Err(JournalError::Damaged(format!(
            "the tail in {} ends with file {}, but file {} existed",
            dir.join("tail").display(),
            tail.newest_seq(),
            said.tail_seq
        )));
    }
    let clean = said.state == State::Clean;
    let applied = store.applied()?;
    if applied != said.after.applied && (clean || applied != said.before.applied) {
        return Err(JournalError::Damaged(format!(
            "sled in {} is at record {applied}, but the witness says {} or {}",
            db.display(),
            said.before.applied,
            said.after.applied
        )));
    }
    let redo = (applied != said.after.applied).then_some(said.after.applied);
    let small = occupied(&db) < options.prove_at_once;
    let later = !small && !fresh && (clean || kept.is_so());
    if redo.is_none() && !fresh && !later {
        proof::all_at_once(&store, &said)?;
    }

    let writer = Writer::new(tail.clone(), witness.now.tail_seq);
    let shared = Arc::new(Shared {
        dir,
        data_sync: options.data_sync,
        memtable_limit: options.memtable_limit.max(1 << 20),
        commit: Mutex::new(()),
        last: AtomicU64::new(applied.0),
        durable: AtomicU64::new(applied.0),
        applied: AtomicU64::new(applied.0),
        released: AtomicU64::new(0),
        view: RwLock::new(View::default()),
        snapshots: Default::default(),
        mem: AtomicUsize::new(0),
        pending: Mutex::new(Pending { first: applied.next(), last: applied, ..Pending::default() }),
        flush: Mutex::new(Flush::new(writer)),
        flush_wanted: Condvar::new(),
        flushed: Condvar::new(),
        tail,
        store: RwLock::new(Some(Arc::new(store))),
        witness: Mutex::new(witness),
        wishes: Mutex::new(Wishes { verify: u64::from(later), ..Wishes::default() }),
        wished: Condvar::new(),
        room: Mutex::new(()),
        room_made: Condvar::new(),
        applier_full: AtomicBool::new(false),
        poison: Mutex::new(None),
        poisoned: AtomicBool::new(false),
        kept: kept.clone(),
        closed: AtomicBool::new(false),
        form: options.form,
        count: Default::default(),
    });
    let mut replay = Replay { s: &shared, applied, redo, prove: !later, replayed: 0 };
    replay.run()?;
    let replayed = replay.replayed;
    let last = Lsn(shared.last.load(SeqCst));
    if clean && last != said.last {
        return Err(JournalError::Damaged(format!(
            "the tail in {} ends with record {last}, but {} was the last one when the journal was closed",
            shared.dir.join("tail").display(),
            said.last
        )));
    }
    kept.note();
    if said.state == State::Clean {
        // From here on a crash is a crash.
        let mut w = shared.witness.lock();
        let now = Statement { state: State::Open, ..w.now };
        w.say(now)?;
    }
    Ok((shared, Opened { last_lsn: last, replayed, fresh, clean: clean || fresh }))
}

/// Reads the witness, or starts a new journal where there is nothing at all (or only the beginnings of one).
fn find_or_create(disk: &Disk, dir: &Path) -> Result<(Witness, bool), JournalError> {
    let (db, tail) = (dir.join("db"), dir.join("tail"));
    match Witness::open(disk, dir)? {
        Some(w) if w.now.state != State::Creating => Ok((w, false)),
        Some(w) => {
            // The creation was interrupted; nothing was ever written.
            for part in [&db, &tail] {
                match fs::remove_dir_all(part) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(JournalError::io("remove", part, e));
                    }
                    _ => {}
                }
            }
            Ok((w, true))
        }
        None => {
            for part in [&db, &tail] {
                if fs::read_dir(part).is_ok_and(|mut d| d.next().is_some()) {
                    return Err(JournalError::Damaged(format!(
                        "{} exists, but the witness beside it is gone",
                        part.display()
                    )));
                }
            }
            Ok((Witness::create(disk, dir)?, true))
        }
    }
}

struct Replay<'a> {
    s: &'a Shared,
    applied: Lsn,
    /// An interrupted round that must be finished with exactly the records up to this one.
    redo: Option<Lsn>,
    /// Prove at once what the interrupted round gave.
    prove: bool,
    replayed: u64,
}

impl Replay<'_> {
    fn run(&mut self) -> Result<(), JournalError> {
        let files = self.s.tail.files();
        let damaged = |file: &TailFile, why: String| {
            JournalError::Damaged(format!("tail file {}: {why}", file.path.display()))
        };
        if let Some(first) = files.first()
            && first.first > self.applied.next()
        {
            let why = format!("it begins with record {}, but sled ends with {}", first.first, self.applied);
            return Err(damaged(first, why));
        }
        for (n, file) in files.iter().enumerate() {
            let next_file = files.get(n + 1);
            let mut expected = file.first;
            let mut reader = file.reader()?;
            // What the kernel still holds of a killed process must not be lost after it was built upon.
            reader.sync().map_err(|e| JournalError::io("sync", &file.path, e))?;
            let confirmed = loop {
                if next_file.is_some_and(|f| f.first == expected) {
                    break None;
                }
                match reader.next().map_err(|e| JournalError::io("read", &file.path, e))? {
                    Found::Group { first, last, payload } => {
                        if first != expected || last < first {
                            let why = format!("record {first} where {expected} belongs");
                            return Err(damaged(file, why));
                        }
                        if last > self.applied {
                            for record in tail::records_of(&file.path, first, last, &payload)? {
                                self.take(record)?;
                            }
                        }
                        expected = last.next();
                        file.set_last(last);
                    }
                    Found::Confirmed(lsn) => break Some(lsn),
                    Found::End => break None,
                }
            };
            let missing = match next_file {
                // A later file proves that this one was complete.
                Some(f) if f.first != expected => Some(Lsn(f.first.0.saturating_sub(1))),
                Some(_) => None,
                None => confirmed.filter(|c| *c >= expected).or(reader
                    .proof_of_more(expected)
                    .map_err(|e| JournalError::io("read", &file.path, e))?),
            };
            if let Some(missing) = missing {
                let why =
                    format!("record {expected} is not readable, although {missing} was synced after it");
                return Err(damaged(file, why));
            }
        }
        if let Some(newest) = files.last()
            && newest.last() < self.applied
        {
            let why = format!("it ends with record {}, but sled is at {}", newest.last(), self.applied);
            return Err(damaged(newest, why));
        }
        if let Some(until) = self.redo {
            let why = format!("it lacks record {until}, up to which sled was being brought");
            return Err(JournalError::Damaged(format!("tail in {}: {why}", self.s.dir.display())));
        }
        Ok(())
    }

    fn take(&mut self, record: Record) -> Result<(), JournalError> {
        if record.lsn <= self.applied {
            return Ok(());
        }
        let s = self.s;
        let lsn = record.lsn;
        let size = {
            let mut view = s.view.write();
            let grown = view.active.insert(lsn, record.ops, Instant::now);
            s.mem.fetch_add(grown, SeqCst);
            view.active.bytes
        };
        s.last.store(lsn.0, SeqCst);
        s.durable.store(lsn.0, SeqCst);
        self.replayed += 1;
        if self.redo == Some(lsn) {
            // The round was announced: finish it and prove that it gave what was announced.
            let table: MemTable = std::mem::take(&mut s.view.write().active);
            s.mem.store(0, SeqCst);
            let store = s.store()?;
            applier::apply(&store, &table, || {})?;
            if self.prove {
                proof::all_at_once(&store, &s.witness.lock().now)?;
            }
            s.applied.store(lsn.0, SeqCst);
            self.redo = None;
        } else if self.redo.is_none() && size > ROUND_BYTES {
            applier::round(s, None)?;
        }
        Ok(())
    }
}
