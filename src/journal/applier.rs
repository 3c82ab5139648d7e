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
use super::proof::Proof;
use super::shared::{LOOK_AGAIN, Shared};
use super::sled_store::{Change, SledStore, checksum};
use super::witness::{Point, State, Statement, Sum};
use crate::ids::Lsn;

/// A table too small to be frozen at commit is applied after this long.
const FREEZE_AGE: Duration = Duration::from_secs(2);
/// sled must never meet a full disk (it would neither write nor open any more): before a round this much is laid aside for its
/// file, and four times what the round brings.
const HEADROOM: u64 = 16 << 20;
/// How long closing waits for a proof under way: a journal that is open only for moments each time must be proved, too.
const PROVE_AT_END: Duration = Duration::from_secs(5);
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
    // The proof under way, and the request that it answers.
    let mut proving: Option<(Proof, u64)> = None;
    let mut stopping: Option<Instant> = None;
    loop {
        let (stop, verify, cut) = {
            let mut w = s.wishes.lock();
            if !w.stop && proving.is_none() && w.verify == w.verified && !w.cut && !due(s) {
                s.wished.wait_for(&mut w, LOOK_AGAIN);
            }
            (w.stop, (w.verify > w.verified).then_some(w.verify), std::mem::take(&mut w.cut))
        };
        if s.poisoned.load(SeqCst) {
            return;
        }
        if stop && stopping.get_or_insert_with(Instant::now).elapsed() > PROVE_AT_END {
            proving = None;
        } else if let (None, Some(asked)) = (&proving, verify) {
            proving = Some((Proof::new(), asked));
        }
        let done = (|| {
            if cut {
                trim(s)?;
            }
            let applied = if due(s) || stop && s.mem_holds() && proving.is_none() {
                round(s, proving.as_mut().map(|(proof, _)| proof))
            } else {
                Ok(())
            };
            // Also when there is no space for a round: whoever waits for the proof is told.
            applied.and(prove_on(s, &mut proving))
        })();
        match done {
            Ok(()) => {
                s.applier_full.store(false, SeqCst);
                if stop && !s.mem_holds() && proving.is_none() {
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

/// A piece of the proof under way; at its end whoever asked for it is told.
fn prove_on(s: &Shared, proving: &mut Option<(Proof, u64)>) -> Result<(), JournalError> {
    let Some((proof, asked)) = proving else { return Ok(()) };
    let advanced = usable(s).and_then(|store| {
        let now = s.witness.lock().now;
        // In the middle of a round that waits for space nothing can be said.
        if now.after.applied.0 > s.applied.load(SeqCst) {
            return Err(JournalError::Full { path: s.dir.clone() });
        }
        proof.advance(&store, &now)
    });
    s.count.progress.fetch_add(1, SeqCst);
    if matches!(advanced, Ok(false)) {
        return Ok(());
    }
    {
        let mut w = s.wishes.lock();
        w.verified = w.verified.max(*asked);
        w.outcome = advanced.as_ref().err().cloned();
        s.wished.notify_all();
    }
    // For want of space it only waits, though nobody waits for it.
    if !matches!(advanced, Err(JournalError::Full { .. })) {
        *proving = None;
    }
    advanced.map(|_| ())
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
    let store = Arc::new(SledStore::open(&s.dir.join("db"), s.form)?);
    log::info!("journal in {}: there is space again", s.dir.display());
    *place = Some(Arc::clone(&store));
    Ok(store)
}

/// Applies the oldest frozen table, or else the active one.
/// `proof` is the one under way, which must hear of it.
pub(super) fn round(s: &Shared, mut proof: Option<&mut Proof>) -> Result<(), JournalError> {
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
        let (change, covered) = changes_of(&store, before, &table, proof.as_deref())?;
        let mut after = Point { applied: table.last, sum: before.sum };
        after.sum.merge(change);
        let tail_seq = s.tail.newest_seq();
        let announced = Statement { state: State::Open, before, after, tail_seq, last: table.last };
        witness.say(announced)?;
        if let Some(proof) = &mut proof {
            proof.follow(covered);
        }
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

/// By how much the sum over sled's keys changes when a table is applied, and how much of that is of keys that `proof` covers. Reads, and
/// so verifies, every value that will be replaced.
fn changes_of(
    store: &SledStore,
    before: Point,
    table: &MemTable,
    proof: Option<&Proof>,
) -> Result<(Sum, Sum), JournalError> {
    let (mut all, mut covered) = (Sum::default(), Sum::default());
    for (key, lsn, value) in table.iter() {
        let mut change = Sum::default();
        if let Some(old) = store.get(key)? {
            if old.lsn > before.applied {
                return Err(JournalError::Damaged(format!(
                    "sled in {}: a value of record {} although only {} is applied",
                    store.dir().display(),
                    old.lsn,
                    before.applied
                )));
            }
            change.sub(key, old.lsn, old.crc);
        }
        if let Some(value) = value {
            change.add(key, lsn, checksum(key, lsn, value));
        }
        all.merge(change);
        if proof.is_some_and(|proof| proof.covers(key)) {
            covered.merge(change);
        }
    }
    Ok((all, covered))
}

/// Cuts the tail behind what is both applied and released.
fn trim(s: &Shared) -> Result<(), JournalError> {
    s.tail.cut(Lsn(s.applied.load(SeqCst).min(s.released.load(SeqCst))))
}
