//! What the journal's threads share, and the rules of waiting.
//!
//! Owns the state between committers, flusher and applier. Every wait here ends: each looks again at least every
//! 100 ms whether the journal was poisoned or closed.
//!
//! Locks are taken in this order: `commit`, `view`, `pending`; the others stand alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};

use super::Brief;
use super::DataSync;
use super::brief::Form;
use super::error::JournalError;
use super::flusher::{self, Flush};
use super::kept::Kept;
use super::memtable::{Changes, View};
use super::sled_store::SledStore;
use super::snapshot::Snapshots;
use super::tail::GROUP;
use super::tail_set::TailSet;
use super::witness::Witness;
use crate::format::record::{self, Op};
use crate::ids::Lsn;
use crate::trace::{self, Stage};

/// A waiting thread looks again after this long, whatever it missed.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Buffered tail bytes that wake the flusher.
pub(super) const FLUSH_AT: usize = 1 << 20;
/// A memtable of this size is frozen (an eighth of the limit when that is less), so that memory comes free in steps.
const FREEZE_BYTES: usize = 4 << 20;
/// Buffered tail bytes at which committers wait.
const BUFFER_LIMIT: usize = 8 << 20;
/// A journal whose threads do not get on for this long is stuck in the disk or in sled.
const STALLED: Duration = Duration::from_secs(120);

/// Records that are not in the tail yet, and who waits for what.
#[derive(Default)]
pub(super) struct Pending {
    /// Room for a group's header, then encoded records; empty when there are none.
    pub(super) buf: Vec<u8>,
    pub(super) first: Lsn,
    pub(super) last: Lsn,
    /// The highest mark that one of them rests on.
    pub(super) mark: u64,
    /// Somebody is making records durable.
    pub(super) leading: bool,
    /// The last attempt failed for want of space; counts attempts so that a waiter gets the outcome of its own.
    pub(super) full: Option<JournalError>,
    pub(super) attempts: u64,
    pub(super) stop: bool,
}

/// What the applier is asked for.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) stop: bool,
    /// Requests to verify sled against the witness, and how many were answered, with the last outcome.
    pub(super) verify: u64,
    pub(super) verified: u64,
    pub(super) outcome: Option<JournalError>,
    pub(super) cut: bool,
}

/// Counters for `stats`.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) syncs: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) rounds: AtomicU64,
    /// Moves whenever flusher or applier finish something.
    pub(super) progress: AtomicU64,
}

/// See the module's head.
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) data_sync: DataSync,
    pub(super) memtable_limit: usize,
    /// Held by the one transaction that runs.
    pub(super) commit: Mutex<()>,
    pub(super) last: AtomicU64,
    pub(super) durable: AtomicU64,
    pub(super) applied: AtomicU64,
    pub(super) released: AtomicU64,
    pub(super) view: RwLock<View>,
    pub(super) snapshots: Snapshots,
    /// Estimated memory of both memtables (grows and shrinks by wrapping differences).
    pub(super) mem: AtomicUsize,
    pub(super) pending: Mutex<Pending>,
    /// Held by whoever leads.
    pub(super) flush: Mutex<Flush>,
    pub(super) flush_wanted: Condvar,
    pub(super) flushed: Condvar,
    pub(super) tail: Arc<TailSet>,
    pub(super) store: RwLock<Option<Arc<SledStore>>>,
    pub(super) witness: Mutex<Witness>,
    pub(super) wishes: Mutex<Wishes>,
    pub(super) wished: Condvar,
    pub(super) room: Mutex<()>,
    pub(super) room_made: Condvar,
    /// The applier cannot go on for want of space.
    pub(super) applier_full: AtomicBool,
    pub(super) poison: Mutex<Option<JournalError>>,
    pub(super) poisoned: AtomicBool,
    pub(super) closed: AtomicBool,
    pub(super) kept: Kept,
    pub(super) form: Form,
    pub(super) count: Counters,
}

impl Shared {
    /// Stops all changes for good. The first reason stays.
    pub(super) fn poison_with(&self, why: &JournalError) {
        {
            let mut poison = self.poison.lock();
            if poison.is_none() {
                log::error!("journal in {}: {why}", self.dir.display());
                *poison = Some(match why {
                    JournalError::Damaged(_) | JournalError::Poisoned(_) => why.clone(),
                    other => JournalError::Poisoned(other.to_string()),
                });
            }
        }
        self.kept.forget();
        self.poisoned.store(true, SeqCst);
        self.wake_all();
    }

    /// Wakes everybody who waits for anything.
    pub(super) fn wake_all(&self) {
        self.flush_wanted.notify_all();
        self.flushed.notify_all();
        self.wished.notify_all();
        self.room_made.notify_all();
    }

    /// Fails once poisoned.
    pub(super) fn healthy(&self) -> Result<(), JournalError> {
        if !self.poisoned.load(SeqCst) {
            return Ok(());
        }
        Err(self.poison.lock().clone().unwrap_or_else(|| JournalError::Poisoned("unknown".into())))
    }

    /// Fails once poisoned or closed.
    pub(super) fn usable(&self) -> Result<(), JournalError> {
        self.healthy()?;
        if self.closed.load(SeqCst) { Err(JournalError::Closed) } else { Ok(()) }
    }

    /// The store, while open.
    pub(super) fn store(&self) -> Result<Arc<SledStore>, JournalError> {
        self.store.read().clone().ok_or(JournalError::Closed)
    }

    /// Poisons when an error says that sled's content is damaged; hands the result on.
    pub(super) fn watch<T>(&self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if let Err(e @ JournalError::Damaged(_)) = &result {
            self.poison_with(e);
        }
        result
    }

    /// Waits until a transaction may run: memory and tail buffer are below their limits.
    pub(super) fn make_room(&self) -> Result<(), JournalError> {
        let mut since: Option<(Instant, u64)> = None;
        loop {
            self.usable()?;
            let ahead = {
                let p = self.pending.lock();
                if let Some(full) = &p.full {
                    return Err(full.clone());
                }
                p.buf.len() > BUFFER_LIMIT
            };
            let heavy = self.mem.load(SeqCst) > self.memtable_limit;
            if !ahead && !heavy {
                return Ok(());
            }
            if heavy && self.applier_full.load(SeqCst) {
                return Err(JournalError::Full { path: self.dir.clone() });
            }
            if since.is_none() {
                self.count.waits.fetch_add(1, SeqCst);
            }
            let progress = self.count.progress.load(SeqCst);
            match since {
                Some((at, seen)) if seen == progress => {
                    if at.elapsed() > STALLED {
                        self.poison_with(&JournalError::Poisoned(format!(
                            "nothing was written to {} for {} s: the disk or sled hangs",
                            self.dir.display(),
                            STALLED.as_secs()
                        )));
                    }
                }
                _ => since = Some((Instant::now(), progress)),
            }
            self.flush_wanted.notify_one();
            self.wished.notify_one();
            self.room_made.wait_for(&mut self.room.lock(), LOOK_AGAIN);
        }
    }

    /// Makes a transaction's changes visible and hands them to the flusher. `commit` must be held.
    pub(super) fn commit(&self, lsn: Lsn, changes: Changes, mark: u64) {
        let ops: Vec<Op> = changes
            .into_iter()
            .map(|(key, value)| match value {
                Some(value) => Op::Put { key, value },
                None => Op::Delete { key },
            })
            .collect();
        let mut view = self.view.write();
        let wake = {
            let mut p = self.pending.lock();
            if p.buf.is_empty() {
                p.buf.resize(GROUP, 0);
                p.first = lsn;
            }
            let before = p.buf.len();
            record::encode(lsn, &ops, &mut p.buf);
            p.last = lsn;
            p.mark = p.mark.max(mark);
            before < FLUSH_AT && p.buf.len() >= FLUSH_AT
        };
        let grown = view.active.insert(lsn, ops, Instant::now);
        self.mem.fetch_add(grown, SeqCst);
        let freeze = view.active.bytes > FREEZE_BYTES.min(self.memtable_limit / 8);
        if freeze {
            view.freeze();
        }
        self.last.store(lsn.0, SeqCst);
        drop(view);
        if wake {
            self.flush_wanted.notify_one();
        }
        if freeze {
            self.wished.notify_one();
        }
    }

    /// Waits until records up to `lsn` (at most the newest one) are durable.
    pub(super) fn barrier(&self, lsn: Lsn) -> Result<(), JournalError> {
        let lsn = Lsn(lsn.0.min(self.last.load(SeqCst)));
        if self.durable.load(SeqCst) >= lsn.0 {
            return Ok(());
        }
        let mut p = self.pending.lock();
        let asked_at = p.attempts;
        loop {
            if self.durable.load(SeqCst) >= lsn.0 {
                return Ok(());
            }
            self.healthy()?;
            if let Some(full) = &p.full
                && p.attempts > asked_at
            {
                return Err(full.clone());
            }
            if p.leading {
                self.flushed.wait_for(&mut p, LOOK_AGAIN);
            } else if p.stop {
                return Err(JournalError::Closed);
            } else {
                p = flusher::lead(self, p).0;
            }
        }
    }

    /// Reads a key through all layers.
    pub(super) fn get(&self, own: Option<&Changes>, key: &[u8]) -> Result<Option<Bytes>, JournalError> {
        if let Some(found) = own.and_then(|c| c.get(key)) {
            return Ok(found.clone());
        }
        let store = self.store()?;
        if let Some(found) = self.view.read().get(key) {
            return Ok(found);
        }
        Ok(self.watch(store.get(key))?.map(|s| s.value))
    }

    /// The brief form of a key's value, appended to `out`.
    pub(super) fn brief(&self, key: &[u8], out: &mut Vec<u8>) -> Result<Brief, JournalError> {
        let store = self.store()?;
        // The newer layers first: what sled's values are in brief holds only for keys that are not in them.
        let newer = self.view.read().get(key);
        match newer {
            Some(None) => Ok(Brief::Absent),
            Some(Some(value)) => {
                let from = out.len();
                if (self.form.value)(key, &value, out) {
                    return Ok(Brief::Short);
                }
                out.truncate(from);
                Ok(Brief::Whole(value))
            }
            None => self.watch(store.brief(key, out)),
        }
    }

    /// Runs `read` with the store such that what it read there fits to the overlay that `look` took: sled may only
    /// have moved towards tables that were frozen then.
    pub(super) fn consistently<O, R>(
        &self,
        look: impl Fn(&View) -> O,
        read: impl Fn(&SledStore, O) -> Result<R, JournalError>,
    ) -> Result<R, JournalError> {
        let store = self.store()?;
        for _ in 0..3 {
            let (overlay, freezes) = {
                let view = self.view.read();
                (look(&view), view.freezes)
            };
            let got = self.watch(read(&store, overlay))?;
            if self.view.read().begun <= freezes {
                return Ok(got);
            }
        }
        let view = self.view.read();
        self.watch(read(&store, look(&view)))
    }

    /// Up to `limit` pairs in `[start, end)`, in order, as of one moment.
    pub(super) fn scan(
        &self,
        own: Option<&Changes>,
        start: &[u8],
        end: &[u8],
        limit: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, JournalError> {
        if start >= end || limit == 0 {
            return Ok(Vec::new());
        }
        trace::stage(Stage::Tables, || {
            self.consistently(
                |view| view.overlay(own, start, end, limit),
                |store, overlay| {
                    let mut out: Vec<(Bytes, Bytes)> = Vec::new();
                    let mut layer = overlay.into_iter().peekable();
                    store.scan(start, end, false, |key, stored| {
                        while let Some((k, v)) = layer.next_if(|(k, _)| *k < key) {
                            if let Some(v) = v {
                                out.push((k, v));
                                if out.len() == limit {
                                    return false;
                                }
                            }
                        }
                        match layer.next_if(|(k, _)| *k == key) {
                            Some((k, Some(v))) => out.push((k, v)),
                            Some((_, None)) => {}
                            None => out.push((key, stored.value)),
                        }
                        out.len() < limit
                    })?;
                    let rest = layer.filter_map(|(k, v)| v.map(|v| (k, v)));
                    let missing = limit - out.len();
                    out.extend(rest.take(missing));
                    Ok(out)
                },
            )
        })
    }

    /// The last pair in `[start, end)`.
    pub(super) fn last_in(
        &self,
        own: Option<&Changes>,
        start: &[u8],
        end: &[u8],
    ) -> Result<Option<(Bytes, Bytes)>, JournalError> {
        if start >= end {
            return Ok(None);
        }
        self.consistently(
            |view| view.overlay_back(own, start, end),
            |store, overlay| {
                let mut best = None;
                let mut layer = overlay.into_iter().peekable();
                store.scan(start, end, true, |key, stored| {
                    while let Some((k, v)) = layer.next_if(|(k, _)| *k > key) {
                        if let Some(v) = v {
                            best = Some((k, v));
                            return false;
                        }
                    }
                    match layer.next_if(|(k, _)| *k == key) {
                        Some((_, None)) => return true,
                        Some((k, Some(v))) => best = Some((k, v)),
                        None => best = Some((key, stored.value)),
                    }
                    false
                })?;
                Ok(best.or_else(|| layer.find_map(|(k, v)| v.map(|v| (k, v)))))
            },
        )
    }
}
