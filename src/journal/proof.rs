//! Proving that sled holds what the witness says: all at once before anything is read, or in pieces while the journal is in use.
//!
//! Owns both ways of summing up all keys. Decides neither when a proof is due (see [`super::replay`]) nor what follows.
//!
//! In pieces: a cursor runs through the keys, and what lies before it is in the proof's sum. A round that is applied meanwhile takes the
//! values that it replaces out of the witness's sum, *as it reads them*, and puts the new ones in; for keys before the cursor the
//! proof's sum is changed alike. So both sums move together, and where sled had a value that is not the witnessed one the difference between
//! them stays, also when that value was overwritten before the cursor came by.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::JournalError;
use super::sled_store::SledStore;
use super::witness::{Point, Statement, Sum};
use crate::ids::Lsn;

/// Keys summed up at a time, between which a round may be applied: some milliseconds.
const PIECE: usize = if cfg!(test) { 32 } else { 4096 };
/// Threads of a proof all at once, at most.
const THREADS: usize = 8;
/// Into how many ranges the keys with one first byte are cut, for the threads to share.
const RANGES: u64 = 32;

/// A proof in pieces.
#[derive(Debug)]
pub(super) struct Proof {
    /// Keys before this one are in the sum.
    cursor: Vec<u8>,
    sum: Sum,
}

impl Proof {
    /// Nothing is proved yet.
    pub(super) fn new() -> Self {
        Self { cursor: Vec::new(), sum: Sum::default() }
    }

    /// Whether a key is in the sum already.
    pub(super) fn covers(&self, key: &[u8]) -> bool {
        key < self.cursor.as_slice()
    }

    /// Follows a round: what it put in and took out among the keys that are covered.
    pub(super) fn follow(&mut self, change: Sum) {
        self.sum.merge(change);
    }

    /// One piece; `true` when all keys are proved. `now` is the witness's newest statement, with no round under way.
    pub(super) fn advance(&mut self, store: &SledStore, now: &Statement) -> Result<bool, JournalError> {
        let mut last = None;
        let mut count = 0;
        let (sum, complete) = sum_up(store, &self.cursor, SledStore::TABLES_END, now.after.applied, |key| {
            count += 1;
            if count == PIECE {
                last = Some(key.to_vec());
            }
            count < PIECE
        })?;
        self.sum.merge(sum);
        if !complete && let Some(mut key) = last {
            key.push(0);
            self.cursor = key;
            return Ok(false);
        }
        compare(store, Point { applied: store.applied()?, sum: self.sum }, now)?;
        Ok(true)
    }
}

/// Fails unless sled holds exactly what the witness says it holds after its last round. Reads everything, on all CPUs.
pub(super) fn all_at_once(store: &SledStore, witness: &Statement) -> Result<(), JournalError> {
    let newest = witness.after.applied;
    let ranges = ranges(store)?;
    let next = AtomicUsize::new(0);
    let work = || -> Result<Sum, JournalError> {
        let mut sum = Sum::default();
        while let Some(range) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            let part = sum_up(store, &range.start, &range.end, newest, |_| true);
            if part.is_err() {
                // The others need not go on.
                next.store(ranges.len(), Ordering::Relaxed);
            }
            sum.merge(part?.0);
        }
        Ok(sum)
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)).min(ranges.len());
    let sums: Result<Vec<Sum>, JournalError> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let lost = |_| Err(JournalError::Poisoned("a thread of the journal panicked".into()));
        running.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect()
    });
    let mut sum = Sum::default();
    sums?.into_iter().for_each(|part| sum.merge(part));
    compare(store, Point { applied: store.applied()?, sum }, witness)
}

/// The sum over `[start, end)`, and whether the end was reached; `go_on` is asked behind each key. Fails on a value newer than `newest`.
fn sum_up(
    store: &SledStore,
    start: &[u8],
    end: &[u8],
    newest: Lsn,
    mut go_on: impl FnMut(&[u8]) -> bool,
) -> Result<(Sum, bool), JournalError> {
    let mut sum = Sum::default();
    let mut late = None;
    let mut complete = true;
    store.walk(start, end, false, |key, lsn, crc, value| {
        if lsn > newest {
            late = Some((key.to_vec(), lsn));
            return false;
        }
        sum.add(key, lsn, crc);
        // Nobody changes it meanwhile: whoever does is the thread that proves, or not there yet.
        store.briefs.offer(key, value);
        complete = go_on(key);
        complete
    })?;
    match late {
        Some((key, lsn)) => Err(store.too_new(&key, lsn)),
        None => Ok((sum, complete)),
    }
}

fn compare(store: &SledStore, found: Point, witness: &Statement) -> Result<(), JournalError> {
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

/// Ranges that hold all keys, each once, and are of about one size where the bytes behind the first one are spread evenly.
fn ranges(store: &SledStore) -> Result<Vec<Range<Vec<u8>>>, JournalError> {
    // The eight bytes behind the first, as far as there are any.
    let number = |key: &[u8]| {
        let mut bytes = [0; 8];
        let rest = key.get(1..).unwrap_or_default();
        let n = rest.len().min(8);
        bytes[..n].copy_from_slice(&rest[..n]);
        u64::from_be_bytes(bytes)
    };
    let mut bounds = vec![Vec::new()];
    let mut first = 0u8;
    while let Some(key) = store.edge(&[first], SledStore::TABLES_END, false)? {
        let byte = key.first().copied().unwrap_or(first);
        let Some(after) = byte.checked_add(1) else { break };
        let end = [after];
        let last = store.edge(&[byte], &end, true)?.map_or(0, |key| number(&key));
        let (low, width) = (number(&key), (last.saturating_sub(number(&key)) / RANGES).max(1));
        for n in 1..RANGES {
            let at = low.saturating_add(n * width);
            if at > last {
                break;
            }
            bounds.push([&[byte][..], &at.to_be_bytes()].concat());
        }
        bounds.push(end.to_vec());
        first = after;
    }
    bounds.push(SledStore::TABLES_END.to_vec());
    bounds.dedup();
    Ok(bounds.windows(2).map(|pair| pair[0].clone()..pair[1].clone()).collect())
}
