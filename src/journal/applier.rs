//! The applier: one thread that moves what is durable in the tail into sled, in rounds.
//!
//! Owns freezing, the rounds, the witness's statements and the cutting of the tail. A round is announced in the
//! witness before sled is touched, so that an interrupted one is redone from the tail and then proved complete.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use super::disk::free_space;
use super::error::JournalError;
use super::memtable::MemTable;
use super::shared::{LOOK_AGAIN, Shared};
use super::sled_store::{Change, SledStore, checksum};
use super::witness::{Point, State, Statement};
use crate::ids::Lsn;

/// A table too small to be frozen at commit is applied after this long.
const FREEZE_AGE: Duration = Duration::from_secs(2);
/// sled must never meet a full disk (it would neither write nor open any more): before a round this much is laid aside for its
/// file, and four times what the round brings.
const HEADROOM: u64 = 16 << 20;
/// Free disk at which sled is opened anew after it has met a full one all the same.
const REOPEN: u64 = 64 << 20;
/// How long readers of sled are waited for then.
const READERS: Duration = Duration::from_secs(5);

/// Runs until stopped or poisoned. A panic poisons.
pub(super) fn run(shared: &Arc<Shared>) {
    if catch_unwind(AssertUnwindSafe(|| serve(shared))).is_err() {
        shared.poison_with(&JournalError::Poisoned("the journal's applier thread panicked".into()));
    }
    shared.wake_all();
}

fn serve(s: &Shared) {
    loop {
        let (stop, verify, cut) = {
            let mut w = s.wishes.lock();
            if !w.stop && w.verify == w.verified && !w.cut && !due(s) {
                s.wished.wait_for(&mut w, LOOK_AGAIN);
            }
            (w.stop, w.verify > w.verified, std::mem::take(&mut w.cut))
        };
        if s.poisoned.load(SeqCst) {
            return;
        }
        let done = (|| {
            if verify {
                let outcome = usable(s).and_then(|store| {
                    let now = s.witness.lock().now;
                    // In the middle of a round that waits for space nothing can be said.
                    if now.after.applied.0 > s.applied.load(SeqCst) {
                        return Err(JournalError::Full { path: s.dir.clone() });
                    }
                    prove(&store, &now)
                });
                let mut w = s.wishes.lock();
                w.verified = w.verify;
                w.outcome = outcome.as_ref().err().cloned();
                s.wished.notify_all();
                drop(w);
                outcome?;
            }
            if cut {
                trim(s)?;
            }
            if due(s) || stop && s.mem_holds() { round(s) } else { Ok(()) }
        })();
        match done {
            Ok(()) => {
                s.applier_full.store(false, SeqCst);
                if stop && !s.mem_holds() {
                    return;
                }
            }
            Err(full @ JournalError::Full { .. }) => {
                if !s.applier_full.swap(true, SeqCst) {
                    log::warn!("journal: {full}");
                }
                s.room_made.notify_all();
                if stop {
                    return;
                }
                let mut w = s.wishes.lock();
                s.wished.wait_for(&mut w, 5 * LOOK_AGAIN);
            }
            Err(JournalError::Closed) => return,
            Err(e) => {
                s.poison_with(&e);
                return;
            }
        }
    }
}

impl Shared {
    fn mem_holds(&self) -> bool {
        let view = self.view.read();
        !view.frozen.is_empty() || view.active.born.is_some()
    }
}

fn due(s: &Shared) -> bool {
    let view = s.view.read();
    !view.frozen.is_empty() || view.active.born.is_some_and(|t| t.elapsed() > FREEZE_AGE)
}

/// The store, opened anew when it met a full disk; not before there is space again, since then it could not be opened.
fn usable(s: &Shared) -> Result<Arc<SledStore>, JournalError> {
    let open = s.store.read().clone();
    if let Some(store) = open.filter(|store| !store.is_stuck()) {
        return Ok(store);
    }
    let full = || JournalError::Full { path: s.dir.clone() };
    let free = free_space(&s.dir).map_err(|e| JournalError::io("look at the space of", &s.dir, e))?;
    if free < REOPEN {
        return Err(full());
    }
    let mut place = s.store.write();
    if let Some(mut old) = place.take() {
        let until = Instant::now() + READERS;
        loop {
            match Arc::try_unwrap(old) {
                Ok(old) => break old.close(),
                Err(read) if Instant::now() > until => {
                    *place = Some(read);
                    return Err(full());
                }
                Err(read) => old = read,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let store = Arc::new(SledStore::open(&s.dir.join("db"))?);
    log::info!("journal in {}: there is space again", s.dir.display());
    *place = Some(Arc::clone(&store));
    Ok(store)
}

/// Applies the oldest frozen table, or else the active one.
pub(super) fn round(s: &Shared) -> Result<(), JournalError> {
    let Some(table) = s.view.write().begin() else { return Ok(()) };
    s.barrier(table.last)?;
    let store = usable(s)?;
    store.reserve(HEADROOM + 4 * table.bytes as u64)?;
    let mut witness = s.witness.lock();
    let announced = if witness.now.after.applied.0 > s.applied.load(SeqCst) {
        // It was announced before, and broken off for want of space: some of it may be in sled.
        if witness.now.after.applied != table.last {
            let why = format!(
                "a round up to record {} was announced, but the next table ends with {}",
                witness.now.after.applied, table.last
            );
            return Err(JournalError::Poisoned(why));
        }
        witness.now
    } else {
        let before = witness.now.after;
        let after = Point { applied: table.last, sum: expected_sum(&store, before, &table)? };
        let tail_seq = s.tail.newest_seq();
        let announced = Statement { state: State::Open, before, after, tail_seq, last: table.last };
        witness.say(announced)?;
        announced
    };
    apply(&store, &table, || {
        s.count.progress.fetch_add(1, SeqCst);
    })?;
    witness.say(Statement { before: announced.after, ..announced })?;
    drop(witness);

    let bytes = table.bytes;
    s.view.write().frozen.pop_front();
    s.mem.fetch_sub(bytes, SeqCst);
    s.applied.store(table.last.0, SeqCst);
    s.count.rounds.fetch_add(1, SeqCst);
    s.room_made.notify_all();
    trim(s)
}

/// Puts a table into sled, and the LSN up to which sled is then complete.
pub(super) fn apply(
    store: &SledStore,
    table: &MemTable,
    step_done: impl FnMut(),
) -> Result<(), JournalError> {
    let changes = table.iter().map(|(key, lsn, value)| Change { key, lsn, value: value.as_deref() });
    store.apply(changes, Some(table.last), step_done)
}

/// The sum after a table will have been applied. Reads, and so verifies, every value that will be replaced.
fn expected_sum(
    store: &SledStore,
    before: Point,
    table: &MemTable,
) -> Result<super::witness::Sum, JournalError> {
    let mut sum = before.sum;
    for (key, lsn, value) in table.iter() {
        if let Some(old) = store.get(key)? {
            if old.lsn > before.applied {
                return Err(JournalError::Damaged(format!(
                    "sled in {}: a value of record {} although only {} is applied",
                    store.dir().display(),
                    old.lsn,
                    before.applied
                )));
            }
            sum.sub(key, old.lsn, old.crc);
        }
        if let Some(value) = value {
            sum.add(key, lsn, checksum(key, lsn, value));
        }
    }
    Ok(sum)
}

/// Fails unless sled holds exactly what the witness says it holds after its last round.
pub(super) fn prove(store: &SledStore, witness: &Statement) -> Result<(), JournalError> {
    let found = store.survey(witness.after.applied)?;
    if found == witness.after {
        return Ok(());
    }
    Err(JournalError::Damaged(format!(
        "sled in {} is at record {} with sum {:032x}, but the witness says {} with {:032x}",
        store.dir().display(),
        found.applied,
        found.sum.0,
        witness.after.applied,
        witness.after.sum.0
    )))
}

/// Cuts the tail behind what is both applied and released.
fn trim(s: &Shared) -> Result<(), JournalError> {
    s.tail.cut(Lsn(s.applied.load(SeqCst).min(s.released.load(SeqCst))))
}
